//! Secrets, which do not print, and values that stand elsewhere: `file:/path` and `credential:NAME` in place of a secret.
//!
//! A secret in the configuration is one that everybody sees who may read the file. A file of its own can have
//! rights of its own, and systemd hands over what `LoadCredential=` names in a folder that only the service can
//! read (systemd.exec(5), `$CREDENTIALS_DIRECTORY`). A command that somebody runs beside the service is handed nothing:
//! it reads what systemd would, in /etc/credstore, which takes root. Read while the configuration is read, and again at
//! each reload, on the thread that does so. What such a file holds is shown in no message, not even when it is wrong.

use std::borrow::Cow;
use std::fmt;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use super::faults::Faults;
use super::yaml::{Node, Value};

/// Largest file that is taken for a secret, in bytes.
const MAX_BYTES: u64 = 64 << 10;

const FORMS: &str = "allowed: the value itself, file:/path or credential:NAME";

/// Where systemd looks for what the units load.
const CREDSTORE: &str = "/etc/credstore";

/// A value that must not be printed: `Debug` and `Display` show `***`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a value.
    pub fn new(value: impl Into<String>) -> Secret {
        Secret(value.into())
    }

    /// The value itself, for the one place that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// What somebody said to whom it was told, with `***` in its place. One of fewer than four characters stays: it
    /// would be found in any text.
    pub fn hidden_in(&self, said: &str) -> String {
        if self.0.len() < 4 { said.to_owned() } else { said.replace(&self.0, "***") }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Where credentials are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Credentials {
    folder: PathBuf,
    /// What their names begin with there.
    prefix: String,
}

impl Credentials {
    /// Those that systemd has handed over; without any, those that the unit would load that runs with the
    /// configuration file `config`: pg-outbox.service, or pg-outbox@orders.service for orders.yaml.
    pub(super) fn of(config: &str, environment: impl Fn(&str) -> Option<String>) -> Credentials {
        if let Some(folder) = environment("CREDENTIALS_DIRECTORY").filter(|folder| !folder.is_empty()) {
            return Credentials { folder: folder.into(), prefix: String::new() };
        }
        let instance = Path::new(config).file_stem().map(|stem| stem.to_string_lossy().into_owned());
        let prefix = match instance.as_deref() {
            None | Some("config") => "pg-outbox.".to_owned(),
            Some(instance) => format!("pg-outbox.{instance}."),
        };
        Credentials { folder: CREDSTORE.into(), prefix }
    }

    /// The file of a credential.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{}{name}", self.prefix))
    }
}

/// Parses the value of `node`, or what the file that it names holds.
pub(super) fn read<T>(
    node: &Node,
    credentials: &Credentials,
    parse: impl FnOnce(&Node) -> Result<T, Faults>,
) -> Result<T, Faults> {
    let Some((name, path)) = place(node, credentials)? else { return parse(node) };
    let node =
        Node { id: node.id, value: Value::Text(content(&path).map_err(|why| format!("{name} {why}"))?) };
    parse(&node).map_err(|faults| {
        // The faults may quote what the file holds: only what is allowed is passed on.
        let text = faults.first_text();
        let allowed = text.split_once("; ").map_or("", |(_, allowed)| allowed);
        format!("what {name} holds cannot be used here; {allowed}").trim_end_matches("; ").to_owned().into()
    })
}

/// The path of a file that is itself the value: `/path`, `file:/path` or `credential:NAME`.
pub(super) fn path(
    node: &Node,
    credentials: &Credentials,
    parse: impl FnOnce(&Node) -> Result<PathBuf, String>,
) -> Result<PathBuf, Faults> {
    match place(node, credentials)? {
        Some((_, path)) => Ok(path),
        None => parse(node).map_err(Into::into),
    }
}

/// What the value calls itself, and the file it leads to; `None` for a plain value.
fn place<'n>(node: &'n Node, credentials: &Credentials) -> Result<Option<(Cow<'n, str>, PathBuf)>, String> {
    let Value::Text(text) = &node.value else { return Ok(None) };
    if let Some(path) = text.strip_prefix("file:") {
        if !path.starts_with('/') {
            return Err(format!("file: without the full path of a file; {FORMS}"));
        }
        return Ok(Some((text.into(), path.into())));
    }
    let Some(name) = text.strip_prefix("credential:") else { return Ok(None) };
    if name.is_empty() || name.starts_with('.') || !name.bytes().all(|b| b.is_ascii_graphic() && b != b'/') {
        return Err(format!("credential: without a credential's name; {FORMS}"));
    }
    let path = credentials.path(name);
    // Of a credential handed over the name says enough.
    let shown = if credentials.prefix.is_empty() {
        text.into()
    } else {
        format!("{text} ({})", path.display()).into()
    };
    Ok(Some((shown, path)))
}

/// The text of a file, without the newline at its end.
fn content(path: &Path) -> Result<String, String> {
    let why = |error: std::io::Error| match error.kind() {
        ErrorKind::InvalidData => "is not text".to_owned(),
        _ => format!("cannot be read: {error}"),
    };
    // Before it is opened: that would wait for the writer of a FIFO.
    if !std::fs::metadata(path).map_err(why)?.is_file() {
        return Err("is not a file".to_owned());
    }
    let file = File::open(path).map_err(why)?;
    let mut text = String::new();
    // One byte more than allowed tells a file that is too large.
    file.take(MAX_BYTES + 1).read_to_string(&mut text).map_err(why)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(format!("is larger than {MAX_BYTES} bytes"));
    }
    let value = text.trim_end_matches(['\n', '\r']);
    if value.is_empty() { Err("is empty".to_owned()) } else { Ok(value.to_owned()) }
}
