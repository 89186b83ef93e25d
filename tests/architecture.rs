//! The rules of the code that a test can keep: which crate is named where, what no file may hold, and that the
//! README names every configuration key and every metric.
//!
//! It reads the files of the repository as text. Test code within `src` is left out where a rule is about the
//! program: everything from a file's `#[cfg(test)]` on, and files that are called `tests.rs`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use pg_outbox::ops::metrics::Metrics;
use serde_yaml::Value;

/// A file of the repository.
struct Source {
    /// Path from the root: `src/postgres.rs`.
    path: String,
    text: String,
}

impl Source {
    /// The text without its tests.
    fn program(&self) -> &str {
        if self.path.ends_with("/tests.rs") {
            return "";
        }
        self.text.split("#[cfg(test)]").next().unwrap_or_default()
    }

    /// The program's lines that are no comments, with their numbers.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        self.program()
            .lines()
            .enumerate()
            .map(|(index, line)| (index + 1, line))
            .filter(|(_, line)| !line.trim_start().starts_with("//"))
    }

    fn is_below(&self, place: &str) -> bool {
        self.path == place || self.path.starts_with(place.strip_suffix(".rs").unwrap_or(place))
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Every Rust file below `folder`.
fn sources(folder: &str) -> Vec<Source> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(source(&path));
            }
        }
    }
    assert!(found.len() > 5, "{folder} has its files");
    found
}

fn source(path: &PathBuf) -> Source {
    let text = fs::read_to_string(path).unwrap();
    Source { path: path.strip_prefix(root()).unwrap().to_string_lossy().into_owned(), text }
}

/// Lines of the program that `breaks` calls out, as `path:line: text`.
fn lines_that(breaks: impl Fn(&Source, &str) -> bool) -> Vec<String> {
    let files = sources("src");
    let mut found = Vec::new();
    for file in &files {
        for (number, line) in file.code().filter(|(_, line)| breaks(file, line)) {
            found.push(format!("{}:{number}: {}", file.path, line.trim()));
        }
    }
    found
}

#[track_caller]
fn assert_none(found: &[String], rule: &str) {
    assert!(found.is_empty(), "{rule}:\n{}", found.join("\n"));
}

/// Whether `line`, as rustfmt writes it, has a path that begins with the crate `name`: `name::`, or `use name`.
fn names_crate(line: &str, name: &str) -> bool {
    let line = line.trim_start();
    let path = format!("{name}::");
    let in_a_path = line.match_indices(&path).any(|(at, _)| {
        // `::nats::` is the crate, `config::nats::` and `my_nats::` are not.
        let before = line[..at].strip_suffix("::").unwrap_or(&line[..at]);
        !before.ends_with(|c: char| c.is_alphanumeric() || c == '_')
    });
    in_a_path || line == format!("use {name};") || line.starts_with(&format!("use {name} as "))
}

#[test]
fn each_outside_crate_of_the_core_is_named_in_one_place() {
    let homes = [
        ("nats", "src/nats.rs"),
        ("postgres", "src/postgres.rs"),
        ("r2d2", "src/postgres.rs"),
        ("tokio_postgres_rustls", "src/postgres.rs"),
        ("rustls", "src/tls.rs"),
        ("rustls_native_certs", "src/tls.rs"),
        ("tiny_http", "src/ops/http.rs"),
        ("prometheus", "src/ops/metrics.rs"),
    ];
    for (name, home) in homes {
        let named = lines_that(|file, line| file.is_below(home) && names_crate(line, name));
        assert!(!named.is_empty(), "{name} is not even named in {home}: is this test blind?");
        let elsewhere = lines_that(|file, line| !file.is_below(home) && names_crate(line, name));
        assert_none(&elsewhere, &format!("{name} is named outside {home}"));
    }
}

#[test]
fn nothing_unwraps_outside_tests() {
    assert_none(&lines_that(|_, line| line.contains(".unwrap()")), "unwrap outside tests");
    assert_none(&lines_that(|_, line| line.contains(".expect(\"\")")), "expect without a reason");
}

#[test]
fn only_main_ends_the_process() {
    let exits = lines_that(|file, line| {
        file.path != "src/main.rs" && (line.contains("process::exit") || line.contains("process::abort"))
    });
    assert_none(&exits, "the process is ended elsewhere than in main");
}

#[test]
fn every_channel_is_bounded() {
    let unbounded = |line: &str| {
        line.contains("unbounded(") || line.contains("unbounded::<") || line.contains("mpsc::channel")
    };
    assert_none(&lines_that(|_, line| unbounded(line)), "a channel without a limit");
}

#[test]
fn every_file_says_first_what_it_is() {
    let mut silent = Vec::new();
    for file in sources("src").iter().chain(&sources("tests")) {
        if !file.text.starts_with("//! ") {
            silent.push(file.path.clone());
        }
    }
    assert_none(&silent, "a file does not begin with //!");
}

/// The keys of etc/config.yaml with their sections, the commented ones included: a `#` right before a key.
fn config_keys() -> BTreeSet<String> {
    let text: String = read("etc/config.yaml")
        .lines()
        .map(|line| {
            let trimmed = line.trim_start();
            let indent = &line[..line.len() - trimmed.len()];
            match trimmed.strip_prefix('#') {
                Some(key) if key.starts_with(|c: char| c.is_ascii_lowercase()) => format!("{indent}{key}\n"),
                _ => format!("{line}\n"),
            }
        })
        .collect();
    let yaml: Value = serde_yaml::from_str(&text).unwrap();
    let mut keys = BTreeSet::new();
    for (section, values) in yaml.as_mapping().unwrap() {
        add_keys(&mut keys, section.as_str().unwrap(), values);
    }
    keys
}

fn add_keys(keys: &mut BTreeSet<String>, path: &str, value: &Value) {
    match value.as_mapping() {
        Some(values) => {
            for (key, value) in values {
                add_keys(keys, &format!("{path}.{}", key.as_str().unwrap()), value);
            }
        }
        None => assert!(keys.insert(path.to_owned()), "{path} twice"),
    }
}

#[test]
fn the_readme_names_every_key_of_the_configuration() {
    let (readme, keys) = (read("README.md"), config_keys());
    assert!(keys.contains("dispatcher.batch_size") && keys.contains("nats.jetstream.subjects"), "{keys:?}");
    let missing: Vec<String> = keys.into_iter().filter(|key| !readme.contains(&format!("`{key}`"))).collect();
    assert_none(&missing, "keys of etc/config.yaml that the README does not name");
}

/// The words of `text` that begin with `outbox_` and are written as code, on their own or before a `{` or a space.
fn outbox_words(text: &str) -> BTreeSet<&str> {
    text.match_indices("outbox_")
        .filter(|(at, _)| !text[..*at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '-'))
        .map(|(at, _)| {
            let rest = &text[at..];
            &rest[..rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(rest.len())]
        })
        .collect()
}

#[test]
fn the_readme_names_every_metric_and_no_other() {
    let rendered = Metrics::new().render();
    let exposed: BTreeSet<&str> = rendered
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .filter_map(|line| line.split(' ').next())
        .filter(|name| name.starts_with("outbox_"))
        .collect();
    assert!(exposed.contains("outbox_events_published_total"), "{exposed:?}");
    let readme = read("README.md");
    let named = outbox_words(&readme);
    let missing: Vec<String> = exposed.difference(&named).map(|name| (*name).to_owned()).collect();
    assert_none(&missing, "metrics that the README does not name");
    // What else is called so is in the schema, or the name of the library.
    let schema: String = fs::read_dir(root().join("schema"))
        .unwrap()
        .map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap())
        .collect();
    let in_schema = outbox_words(&schema);
    let other: Vec<String> = named
        .iter()
        .filter(|name| !exposed.contains(*name) && !in_schema.contains(*name))
        .map(|name| (*name).to_owned())
        .collect();
    assert_none(&other, "the README names what is no metric and not in the schema");
}
