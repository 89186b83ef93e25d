//! `database`: the PostgreSQL that holds the outbox, and how it is reached.
//!
//! The section's struct, its keys with their ranges and defaults, and how they are read. A connection string is only
//! looked at here: `postgres/` takes it apart, and connecting judges it. None is ever shown. Pure but for the files in
//! which secrets stand, on the thread that loads the configuration.

use std::path::PathBuf;
use std::time::Duration;

use super::reading::{ConfigReading, Section};
use super::secrets::Secret;
use super::section::Keys;
use super::values::{
    MINUTE, SECOND, boolean, count, duration, file, one_of, secret, shown, text, up_to, user,
};
use super::yaml::{Node, Value};

/// PostgreSQL's own limit on a name, in bytes.
const MAX_NAME: usize = 63;

const DSN_FORMS: &str = "allowed: postgresql://user:password@host:5432/database, \
    or host=... user=... password=... dbname=...";

/// How PostgreSQL is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Database {
    /// Connection string, URL or key=value; here it only looks like one. Required (or `DATABASE_DSN`).
    pub dsn: Secret,
    /// What dsn and listen_dsn may leave out.
    pub parts: DsnParts,
    /// The schema that holds the outbox, 1 to 63 bytes. Default: where the connection's `search_path` finds it.
    pub schema: Option<String>,
    /// Connections of the pool at most, up to 1,000; at least `workers` + 2. Default 20.
    pub max_connections: u32,
    /// Idle connections kept at most, 0 to `max_connections`. Default 10, or less with fewer connections.
    pub max_idle: u32,
    /// Longest wait for a connection, 10ms to 10m. Default 5s.
    pub connect_timeout: Duration,
    /// LISTEN for new events; false: poll every poll_interval. Default true.
    pub listen: bool,
    /// Connection string for LISTEN alone, around a transaction pooler. Default: dsn.
    pub listen_dsn: Option<Secret>,
    /// Whether statements are prepared once a connection. Default auto.
    pub prepared_statements: PreparedStatements,
    /// Settle with synchronous_commit on. Default false: a PostgreSQL crash then republishes a moment's events.
    pub synchronous_commit: bool,
}

/// Parts of a connection string that may stand beside it, each in a file or a credential of its own. A connection
/// string that has the part keeps its own. Default: none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DsnParts {
    /// `user`.
    pub user: Option<String>,
    /// `password`.
    pub password: Option<Secret>,
    /// `sslrootcert`: file with the CA certificates that the server's must lead to, or `system`.
    pub sslrootcert: Option<PathBuf>,
    /// `sslcert`: file with our certificate.
    pub sslcert: Option<PathBuf>,
    /// `sslkey`: file with its key.
    pub sslkey: Option<PathBuf>,
}

/// Whether statements are prepared once a connection, which a pooler in transaction mode may not carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PreparedStatements {
    /// Where a self-test shows that connections are sessions.
    Auto,
    /// Everywhere: a pooler that is between keeps them.
    Always,
    /// Nowhere.
    Never,
}

pub(super) fn database(reading: &mut ConfigReading<'_>, root: &Section<'_>) -> Database {
    use PreparedStatements::{Always, Auto, Never};
    let section = reading.section(root, "database");
    let preparing = [("auto", Auto), ("always", Always), ("never", Never)];
    let mut value = Keys { reading, section: &section };
    let dsn = value.secret("dsn", Secret::new(""), dsn);
    let parts = DsnParts {
        user: value.secret("user", None, user),
        password: value.secret("password", None, secret),
        sslrootcert: value.path("sslrootcert", file),
        sslcert: value.path("sslcert", file),
        sslkey: value.path("sslkey", file),
    };
    let max_connections = value.of("max_connections", 20, count(1..=1_000));
    let database = Database {
        dsn,
        parts,
        schema: value.of("schema", None, schema),
        max_connections,
        max_idle: value.of("max_idle", max_connections.min(10), count(0..=1_000)),
        connect_timeout: value.of("connect_timeout", 5 * SECOND, duration(up_to(10 * MINUTE))),
        listen: value.of("listen", true, boolean),
        listen_dsn: value.secret("listen_dsn", None, optional_dsn),
        prepared_statements: value.of(
            "prepared_statements",
            Auto,
            one_of("way to prepare statements", &preparing),
        ),
        synchronous_commit: value.of("synchronous_commit", false, boolean),
    };
    if !reading.is_given("database.dsn") {
        let text = "missing; write the connection string here or in the environment as DATABASE_DSN";
        reading.missing(&section, "dsn", text.to_owned());
    }
    database
}

/// A PostgreSQL connection string, by its looks: only connecting can judge all of it.
fn dsn(node: &Node) -> Result<Secret, String> {
    let Value::Text(dsn) = &node.value else {
        return Err(format!("not a connection string; {DSN_FORMS}"));
    };
    if dsn.trim().is_empty() {
        return Err(format!("is empty; {DSN_FORMS}"));
    }
    let is_url = ["postgresql://", "postgres://"].iter().any(|scheme| {
        dsn.strip_prefix(scheme).is_some_and(|rest| !rest.is_empty() && !rest.contains(char::is_whitespace))
    });
    let is_word = |word: &str| !word.is_empty() && word.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
    let is_key_value = dsn.split_once('=').is_some_and(|(key, _)| is_word(key.trim()));
    if is_url || is_key_value {
        Ok(Secret::new(dsn.as_str()))
    } else {
        Err(format!("not a connection string; {DSN_FORMS}"))
    }
}

fn optional_dsn(node: &Node) -> Result<Option<Secret>, String> {
    dsn(node).map(Some)
}

/// A schema's name, as it is. It goes into statements between quotation marks.
fn schema(node: &Node) -> Result<Option<String>, String> {
    let name = text(node)?;
    let fits =
        name.len() <= MAX_NAME && !name.contains(['"', '\'', '\\']) && !name.contains(char::is_control);
    if fits {
        return Ok(Some(name.to_owned()));
    }
    Err(format!(
        "{} is not a schema's name; allowed: 1 to {MAX_NAME} bytes, no quotation marks, backslashes or control characters",
        shown(node)
    ))
}
