//! `database`: the PostgreSQL that holds the outbox, and how it is reached.
//!
//! The section's struct, its keys with their ranges and defaults, and how they are read. A connection string is only
//! looked at here: `postgres/` takes it apart, and connecting judges it. None is ever shown. Pure but for the files in
//! which secrets stand, on the thread that loads the configuration.

use std::path::PathBuf;
use std::time::Duration;

use PreparedStatements::{Always, Auto, Never};

use super::changes::Changes;
use super::key::{Reload, key, optional};
use super::reading::{ConfigReading, Section};
use super::secrets::Secret;
use super::section::section;
use super::values::{
    MINUTE, SECOND, any_text, boolean, checked_by, count, duration, elsewhere, file, one_of, secret, shown,
    text, up_to,
};
use super::yaml::{Node, Value};

/// PostgreSQL's own limit on a name, in bytes.
const MAX_NAME: usize = 63;

/// Idle connections kept, where there are as many.
const DEFAULT_MAX_IDLE: u32 = 10;

const DSN_FORMS: &str = "allowed: postgresql://user:password@host:5432/database, \
    or host=... user=... password=... dbname=...";

section! {
    /// How PostgreSQL is reached.
    pub struct Database = "database" {
        /// Connections of the pool at most; at least `workers` + 2.
        pub max_connections: u32 = key(20, count(1..=1_000)),
        /// The schema that holds the outbox. Default: where the connection's `search_path` finds it.
        pub schema: Option<String> = optional(checked_by(schema)),
        /// Idle connections kept at most, no more than `max_connections`. The default is less with fewer connections.
        pub max_idle: u32 = key(DEFAULT_MAX_IDLE, count(0..=1_000)),
        /// Longest wait for a connection.
        pub connect_timeout: Duration = key(5 * SECOND, duration(up_to(10 * MINUTE))),
        /// LISTEN for new events; false: poll every poll_interval.
        pub listen: bool = key(true, boolean()),
        /// Connection string for LISTEN alone, around a transaction pooler. Default: dsn.
        pub listen_dsn: Option<Secret> = optional(elsewhere(checked_by(connection_string))),
        /// Whether statements are prepared once a connection.
        pub prepared_statements: PreparedStatements = key(Auto, one_of("way to prepare statements", PREPARING)),
        /// Settle with synchronous_commit on; without it a PostgreSQL crash republishes a moment's events.
        pub synchronous_commit: bool = key(false, boolean()),
    }
    with {
        /// Connection string, URL or key=value; here it only looks like one. Required (or `DATABASE_DSN`).
        pub dsn: Secret,
        /// What dsn and listen_dsn may leave out.
        pub parts: DsnParts,
    }
}

section! {
    /// Parts of a connection string that may stand beside it, each in a file or a credential of its own. A connection
    /// string that has the part keeps its own.
    #[derive(Default)]
    pub struct DsnParts = "database" {
        /// `user`.
        pub user: Option<String> = optional(elsewhere(any_text())),
        /// `password`.
        pub password: Option<Secret> = optional(elsewhere(secret())),
        /// `sslrootcert`: file with the CA certificates that the server's must lead to, or `system`.
        pub sslrootcert: Option<PathBuf> = optional(file()),
        /// `sslcert`: file with our certificate.
        pub sslcert: Option<PathBuf> = optional(file()),
        /// `sslkey`: file with its key.
        pub sslkey: Option<PathBuf> = optional(file()),
    }
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

const PREPARING: &[(&str, PreparedStatements)] = &[("auto", Auto), ("always", Always), ("never", Never)];

impl Database {
    pub(super) fn read(section: &Section<'_>, reading: &mut ConfigReading<'_>) -> Database {
        let dsn = key(Secret::new(""), elsewhere(checked_by(connection_string))).variable("DATABASE_DSN");
        let dsn = reading.value(section, "dsn", dsn);
        let parts = DsnParts::read_keys(section, reading);
        let mut database = Database::read_keys(section, reading, dsn, parts);
        if !reading.is_given("database.max_idle") {
            database.max_idle = database.max_idle.min(database.max_connections);
        }
        if !reading.is_given("database.dsn") {
            let text = "missing; write the connection string here or in the environment as DATABASE_DSN";
            reading.missing(section, "dsn", text.to_owned());
        }
        database
    }

    pub(super) fn take_live(&mut self, new: &Database, changes: &mut Changes) {
        changes.compare("database.dsn", Reload::NeedsRestart, &mut self.dsn, &new.dsn);
        self.take_keys(new, changes);
        self.parts.take_keys(&new.parts, changes);
    }
}

/// A PostgreSQL connection string, by its looks: only connecting can judge all of it.
fn connection_string(node: &Node) -> Result<Secret, String> {
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

/// A schema's name, as it is. It goes into statements between quotation marks.
fn schema(node: &Node) -> Result<String, String> {
    let name = text(node)?;
    let fits =
        name.len() <= MAX_NAME && !name.contains(['"', '\'', '\\']) && !name.contains(char::is_control);
    if fits {
        return Ok(name.to_owned());
    }
    Err(format!(
        "{} is not a schema's name; allowed: 1 to {MAX_NAME} bytes, no quotation marks, backslashes or control characters",
        shown(node)
    ))
}
