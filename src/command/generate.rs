//! `pg-outbox generate`: writes the manual pages and the shell completions, for whoever makes a package.
//!
//! Everything is derived: the pages of section 1 and the completions from the definition of the command line,
//! `pg-outbox.yaml(5)` from the comments of `etc/config.yaml`, which is built in. So they say what this very
//! program does. Reads nothing, and writes into the folder it is given and nowhere else.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use clap_complete::Shell;

const CONFIG: &str = include_str!("../../etc/config.yaml");

/// What the command line's definition does not say.
const MORE: &str = r#".SH FILES
.TP
/etc/pg\-outbox/config.yaml
The configuration, see pg\-outbox.yaml(5).
.TP
/etc/default/pg\-outbox
Environment of the service; its variables win over the configuration.
.TP
/etc/credstore/pg\-outbox.dsn
Secret that systemd hands to the service, as credential:dsn. The other commands read it there, as root. Beside it:
pg\-outbox.database.password, pg\-outbox.database.key, pg\-outbox.nats.creds, pg\-outbox.nats.nk,
pg\-outbox.nats.key, pg\-outbox.nats.password, pg\-outbox.nats.token.
.TP
/etc/pg\-outbox/NAME.yaml
For pg\-outbox@NAME.service, as are /etc/default/pg\-outbox\-NAME and /etc/credstore/pg\-outbox.NAME.dsn.
.SH "SEE ALSO"
pg\-outbox.yaml(5), systemctl(1), journalctl(1)
"#;

/// Writes `man/*.1`, `man/pg-outbox.yaml.5` and `completions/{pg-outbox,_pg-outbox,pg-outbox.fish}` below `folder`.
///
/// # Errors
/// A folder or file cannot be written.
pub fn run(mut command: clap::Command, folder: &Path) -> Result<()> {
    let (man, completions) = (folder.join("man"), folder.join("completions"));
    for folder in [&man, &completions] {
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    }
    clap_mangen::generate_to(command.clone(), &man).context("write the manual pages")?;
    File::options()
        .append(true)
        .open(man.join("pg-outbox.1"))
        .and_then(|mut page| page.write_all(MORE.as_bytes()))
        .context("write pg-outbox.1")?;
    fs::write(man.join("pg-outbox.yaml.5"), config_page(CONFIG)).context("write pg-outbox.yaml.5")?;
    for (shell, name) in
        [(Shell::Bash, "pg-outbox"), (Shell::Zsh, "_pg-outbox"), (Shell::Fish, "pg-outbox.fish")]
    {
        let mut text = Vec::new();
        clap_complete::generate(shell, &mut command, "pg-outbox", &mut text);
        // Of a program whose name has a hyphen clap_complete 4.6 writes the states of bash in two ways, so that none
        // behind a subcommand is ever found (its issue 6421).
        let text = String::from_utf8(text).context("read the completions")?;
        let text = text.replace("pg__subcmd__outbox", "pg__outbox");
        fs::write(completions.join(name), text).with_context(|| format!("write {name}"))?;
    }
    Ok(())
}

/// One line of the documented configuration.
#[derive(Debug, PartialEq, Eq)]
enum Line<'t> {
    Blank,
    /// `# text`, with what follows the blank.
    Prose(&'t str),
    Key {
        depth: usize,
        name: &'t str,
        value: &'t str,
        commented: bool,
    },
}

impl Line<'_> {
    fn of(line: &str) -> Line<'_> {
        let text = line.trim_start();
        let depth = (line.len() - text.len()) / 2;
        if text.is_empty() {
            return Line::Blank;
        }
        let (text, commented) = match text.strip_prefix('#') {
            // A key that is commented out has its # right before it, unlike prose.
            Some(rest) if rest.starts_with(|c: char| c.is_ascii_alphabetic() || c == '"') => (rest, true),
            Some(rest) => return Line::Prose(rest.strip_prefix(' ').unwrap_or(rest)),
            None => (text, false),
        };
        let (name, value) = text.split_once(':').unwrap_or((text, ""));
        let (name, value) = match name.strip_prefix('"') {
            Some(_) => ("", text),
            None => (name, value.trim()),
        };
        Line::Key { depth, name, value, commented }
    }
}

/// `pg-outbox.yaml(5)`: each comment with the keys that follow it.
fn config_page(config: &str) -> String {
    let mut page = format!(
        ".TH pg\\-outbox.yaml 5 \"\" \"pg-outbox {}\" \"pg-outbox\"\n.nh\n.ad l\n.SH NAME\npg\\-outbox.yaml \\- the \
         configuration of pg\\-outbox\n.SH DESCRIPTION\n",
        env!("CARGO_PKG_VERSION")
    );
    let mut path: Vec<&str> = Vec::new();
    let mut prose: Vec<&str> = Vec::new();
    // Keys that stand together share the comment above them.
    let mut keys = String::new();
    for line in config.lines().map(Line::of).chain([Line::Blank]) {
        match line {
            Line::Prose(text) => {
                finish(&mut page, &mut keys, &mut prose);
                prose.push(text);
            }
            Line::Blank if keys.is_empty() => {
                paragraphs(&mut page, &prose);
                prose.clear();
            }
            Line::Blank => finish(&mut page, &mut keys, &mut prose),
            Line::Key { name: "", value, .. } => {
                // An entry of a mapping whose names are the user's: an example of the key above.
                prose.extend(["", value]);
            }
            Line::Key { depth, name, value: "", commented: false } => {
                path.truncate(depth);
                path.push(name);
                page.push_str(&format!(".SH \"{}\"\n", path.join(".").to_uppercase()));
                paragraphs(&mut page, &prose);
                prose.clear();
            }
            Line::Key { depth, name, value, commented } => {
                path.truncate(depth);
                let key = path.iter().chain([&name]).copied().collect::<Vec<_>>().join(".");
                let kind = if commented { "such as" } else { "default:" };
                let shown =
                    if value.is_empty() { String::new() } else { format!(" ({kind} {})", roff(value)) };
                let request = if keys.is_empty() { "TP" } else { "TQ" };
                keys.push_str(&format!(".{request}\n\\fB{}\\fR{shown}\n", roff(&key)));
            }
        }
    }
    page.push_str(".SH \"SEE ALSO\"\npg\\-outbox(1)\n");
    page
}

/// Writes the keys gathered so far with their text.
fn finish(page: &mut String, keys: &mut String, prose: &mut Vec<&str>) {
    if keys.is_empty() {
        return;
    }
    page.push_str(keys);
    for text in prose.drain(..) {
        // Within a key's text, a gap begins a line of its own.
        page.push_str(&if text.is_empty() { ".br\n".to_owned() } else { format!("{}\n", roff(text)) });
    }
    keys.clear();
}

fn paragraphs(page: &mut String, prose: &[&str]) {
    for text in prose {
        match *text {
            "" => page.push_str(".PP\n"),
            // Indented: a list or an example, whose lines stay as they are.
            text if text.starts_with("  ") => page.push_str(&format!(".br\n{}\n", roff(text))),
            text => page.push_str(&format!("{}\n", roff(text))),
        }
    }
    if !prose.is_empty() {
        page.push_str(".PP\n");
    }
}

/// Text that troff prints as it is.
fn roff(text: &str) -> String {
    let escaped = text.replace('\\', "\\e").replace('-', "\\-");
    // At the beginning of a line these make a request of it.
    if escaped.starts_with(['.', '\'']) { format!("\\&{escaped}") } else { escaped }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comment_becomes_the_text_of_its_keys() {
        let config = "# About\n# the file.\n#\n# More.\n\n# A section.\ns:\n  # What b is.\n  b: 1\n\n  # One of both.\n  \
                      #c: \"x\"\n  #d: \"y\"\n\n  t:\n    # .deep\n    e: 5m\n\n  # Names.\n  #m:\n    #\"a.*\": \"b\"\n";
        let (_, page) = config_page(config)
            .split_once(".SH DESCRIPTION\n")
            .map(|(a, b)| (a.len(), b.to_owned()))
            .unwrap();
        let expected = "About\nthe file.\n.PP\nMore.\n.PP\n.SH \"S\"\nA section.\n.PP\n\
                        .TP\n\\fBs.b\\fR (default: 1)\nWhat b is.\n\
                        .TP\n\\fBs.c\\fR (such as \"x\")\n.TQ\n\\fBs.d\\fR (such as \"y\")\nOne of both.\n\
                        .SH \"S.T\"\n.TP\n\\fBs.t.e\\fR (default: 5m)\n\\&.deep\n\
                        .TP\n\\fBs.m\\fR\nNames.\n.br\n\"a.*\": \"b\"\n\
                        .SH \"SEE ALSO\"\npg\\-outbox(1)\n";
        assert_eq!(page, expected);
    }

    #[test]
    fn the_page_states_what_each_key_may_be() {
        let page = config_page(CONFIG).replace("\\-", "-");
        for facts in crate::config::keys() {
            let heading = format!("\n\\fB{}\\fR", facts.key);
            let about = page.split(&heading).nth(1).unwrap_or_else(|| panic!("{} is missing", facts.key));
            let about =
                about.split("\n.TP\n").next().unwrap().split("\n.SH ").next().unwrap().replace('\n', " ");
            let says =
                facts.allowed == "true, false" || facts.allowed.split(", ").all(|part| about.contains(part));
            assert!(says, "{} may be {}:\n{about}", facts.key, facts.allowed);
        }
    }

    #[test]
    fn every_key_of_the_shipped_file_is_on_the_page() {
        let page = config_page(CONFIG);
        let keys = CONFIG.lines().map(Line::of).filter(|line| match line {
            Line::Key { name, value, commented, .. } => !name.is_empty() && (!value.is_empty() || *commented),
            _ => false,
        });
        let headings = page.matches("\n.TP\n").count() + page.matches("\n.TQ\n").count();
        assert_eq!(headings, keys.count());
        for key in
            ["dispatcher.batch_size", "nats.jetstream.duplicate_window", "nats.topic_map", "metrics.path"]
        {
            assert!(page.contains(&format!("\n\\fB{key}\\fR")), "{key} is missing:\n{page}");
        }
    }
}
