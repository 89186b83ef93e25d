//! PostgreSQL: every statement, the pool, how a server is reached, migration and adoption.
//!
//! It has no thread but those of the pool, which make connections: every method runs on its caller's thread, whichever
//! that is, and blocks it until the server has answered. It may name `postgres`, `r2d2`, `r2d2_postgres` and the adapter
//! to rustls, which nothing else names, and of the program what stands below: configuration, events, lanes. It names
//! neither metrics nor health, and nothing above. It never logs above debug, as callers report an outage once (but for a
//! password that crosses the network in clear), and never pools a connection again that has seen any error.
//!
//! Here is the [`Store`], which everybody asks, with its pool. `claim_open.rs` finds and locks lanes, `claim_read.rs`
//! reads their events, `claim_settle.rs` settles them; `outbox.rs` asks what waits and whether the schema is there;
//! `dead.rs` and `replay.rs` work for operators, `wake.rs` listens, `partitions.rs` keeps the partitions, `sweep.rs` looks
//! through them for what the marks have passed, `overview.rs`
//! has what `status` shows, `migrate.rs` makes the schema and `adopt.rs` makes one of a table that is there. Below them,
//! `connection.rs` is what is on loan from the pool and `pool.rs` what is in it, `target.rs` and `dsn.rs` how a server is
//! reached, `sessions.rs` whether a pooler is between, `error.rs` why something was not done.

/// The statement in `postgres/<name>.sql`, and the types of its parameters.
macro_rules! query {
    ($name:literal $(, $parameter:ident)*) => {
        $crate::postgres::query::Query {
            name: $name,
            text: include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/postgres/", $name, ".sql")),
            types: &[$(postgres::types::Type::$parameter),*],
        }
    };
}

mod adopt;
mod adoption;
mod begin;
mod claim_open;
mod claim_read;
mod claim_reader;
mod claim_rows;
mod claim_settings;
mod claim_settle;
mod connection;
mod ctid;
mod dead;
mod dsn;
mod error;
mod former;
mod home;
mod migrate;
mod outbox;
mod overview;
mod partitions;
mod plain;
mod pool;
mod query;
mod replay;
mod sample;
mod sequence;
mod sessions;
mod storable;
mod sweep;
mod target;
mod timestamptz;
mod transaction;
mod wake;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use postgres::types::ToSql;
use postgres::{Client, Row};

use self::begin::{begin_claim, begin_reading};
use self::connection::Connection;
use self::home::Home;
use self::pool::{LogAtDebug, Manager};
use self::query::Query;
use self::sessions::Preparing;
use self::target::Target;
use crate::config::{Database, DsnParts, Secret};

pub use self::adopt::Adopting;
pub use self::begin::CLAIM_PLANS;
pub use self::claim_open::{Looked, Newest, Opening};
pub use self::claim_read::Locked;
pub use self::claim_reader::{Head, Large};
pub use self::claim_settings::{ClaimLimits, ClaimSettings};
pub use self::claim_settle::{Claim, Settled};
pub use self::dead::{CHANGE_MAX, Letter, LetterChange, Selection, Whole};
pub use self::error::StoreError;
pub use self::migrate::Migrated;
pub use self::outbox::{Backlog, MissingRows};
pub use self::overview::{BlockedKey, DeadLetter, Instance, OpenTransaction, Retry, Topic};
pub use self::partitions::{
    Cleaned, Dropped, Partition, PartitionSession, PartitionState, UPKEEP_STEP, UpkeepTurn,
};
pub use self::plain::{Insert, Plain, RowInsert};
pub use self::replay::{FoundEvent, FoundPublished};
pub use self::sample::Sampled;
pub use self::sessions::Sessions;
pub use self::sweep::{Passed, SetBack, SweepSession, SweptBlocks, SweptPartition};
pub use self::wake::{Asked, Listener, SleepLock};

/// Longest `application_name` PostgreSQL keeps, in bytes.
const APPLICATION_NAME_MAX_BYTES: usize = 63;
/// A statement of a claim, or any other but the backlog's, that runs longer is broken; the server ends it.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(30);
/// `idle_session_timeout`: what a server says that has ended a session for it.
const IDLE_FOR_TOO_LONG: &str = "57P05";

/// The pool and what is done with it. Cheap to clone; clones share the pool.
#[derive(Clone)]
pub struct Store {
    pool: r2d2::Pool<Manager>,
    shared: Arc<StoreInner>,
}

struct StoreInner {
    /// Where, for messages: `db:5432`.
    address: String,
    target: Target,
    home: Home,
    /// What a DSN for the wake-up does not say.
    parts: DsnParts,
    instance_id: String,
    connect_timeout: Duration,
    max_idle: u32,
    settings: ClaimSettings,
    /// Starts as `settings.backoff_max`, and only grows.
    backoff_max_ms: AtomicI64,
    /// Begins a claim's transaction, with its settings, in one round trip.
    begin_claim: String,
    preparing: Preparing,
    /// The database's encoding has some characters only, as far as is known.
    narrow: AtomicBool,
    /// Counts the ages of connections: one ends when a connection is lost.
    age: Arc<AtomicU64>,
}

/// What the pool holds right now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolState {
    /// Open connections.
    pub connections: u32,
    /// Those of them that nobody uses.
    pub idle: u32,
    /// Open connections at most.
    pub max: u32,
}

impl Store {
    /// Reads the DSN and sets the pool up without connecting to anything.
    ///
    /// # Errors
    /// The DSN, or a certificate file that it names, cannot be used. The message never holds a secret of them.
    pub fn new(database: &Database, instance_id: &str, settings: ClaimSettings) -> Result<Store, StoreError> {
        let target = Target::new(&database.dsn, &database.parts, instance_id, database.connect_timeout)?;
        let home = Home::new(database.schema.as_deref());
        let age = Arc::new(AtomicU64::new(0));
        // All written out: by default r2d2 keeps as many idle connections as it may open, asks each one
        // whether it lives before handing it out, and logs every failure as an error. Its three threads
        // open connections, and go on trying while there is none.
        let pool = r2d2::Pool::builder()
            .max_size(database.max_connections.max(1))
            .min_idle(Some(0))
            .test_on_check_out(false)
            .max_lifetime(Some(Duration::from_secs(30 * 60)))
            .idle_timeout(Some(Duration::from_secs(10 * 60)))
            .connection_timeout(database.connect_timeout.max(Duration::from_millis(1)))
            .error_handler(Box::new(LogAtDebug))
            .build_unchecked(Manager { target: target.clone(), age: age.clone() });
        let shared = StoreInner {
            address: target.address(),
            target,
            parts: database.parts.clone(),
            instance_id: instance_id.to_owned(),
            connect_timeout: database.connect_timeout,
            max_idle: database.max_idle,
            backoff_max_ms: AtomicI64::new(milliseconds(settings.backoff_max)),
            begin_claim: begin_claim(&settings, &home),
            home,
            preparing: Preparing::new(database.prepared_statements),
            narrow: AtomicBool::new(false),
            age,
            settings,
        };
        Ok(Store { pool, shared: Arc::new(shared) })
    }

    /// Backoffs are now up to `longest`. What counts as further off than any backoff follows a longer one, or
    /// its retries would be due at once; after a shorter one it stays, as waits of the former length are still
    /// on their way.
    pub fn allow_backoff(&self, longest: Duration) {
        self.shared.backoff_max_ms.fetch_max(milliseconds(longest), Ordering::Relaxed);
    }

    /// Asks PostgreSQL for an answer.
    ///
    /// # Errors
    /// It gave none.
    pub fn ping(&self) -> Result<(), StoreError> {
        self.connection()?.batch("SELECT 1")
    }

    /// Open and idle connections of the pool.
    pub fn pool_state(&self) -> PoolState {
        let state = self.pool.state();
        PoolState { connections: state.connections, idle: state.idle_connections, max: self.pool.max_size() }
    }

    /// Where the server is, for messages: `db:5432`.
    pub fn address(&self) -> &str {
        &self.shared.address
    }

    /// Begins a transaction on a connection from the pool, by statements as [`Connection::begin`] wants them. Where the
    /// server has ended the session as it was idle for too long, another one is taken, as often as there can be such.
    fn begin(&self, text: &str) -> Result<Connection, StoreError> {
        let mut connection = self.connection()?;
        for _ in 0..self.pool.max_size() {
            match connection.begin(text) {
                Err(error) if error.sqlstate() == Some(IDLE_FOR_TOO_LONG) => {
                    drop(connection);
                    connection = self.connection()?;
                }
                begun => return begun.map(|()| connection),
            }
        }
        connection.begin(text).map(|()| connection)
    }

    /// Takes a connection from the pool that is not known to be of the past, waiting for up to `connect_timeout`.
    fn connection(&self) -> Result<Connection, StoreError> {
        loop {
            let mut connection = self.any_connection()?;
            if connection.pooled.age == self.shared.age.load(Ordering::Relaxed) {
                return Ok(connection);
            }
            connection.pooled.doomed = true;
        }
    }

    fn any_connection(&self) -> Result<Connection, StoreError> {
        let pooled = self.pool.get().map_err(|error| {
            // The cause in it is our own text; a pool that is merely used up has none.
            let text = error.to_string();
            let waited = self.shared.connect_timeout;
            let address = &self.shared.address;
            match text.split_once(": ") {
                Some((_, cause)) => {
                    StoreError::outage(format!("no connection to postgres at {address} within {waited:?}: {cause}"))
                }
                None => StoreError::outage(format!(
                    "no connection to postgres at {address} within {waited:?}: {} of {} in use, or the server does not answer",
                    self.pool.state().connections,
                    self.pool.max_size(),
                )),
            }
        })?;
        Ok(Connection { pooled, pool: self.pool.clone(), shared: self.shared.clone() })
    }

    /// Runs one reading statement in a transaction with a timeout.
    fn read(
        &self,
        timeout: Duration,
        query: &Query,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, StoreError> {
        let mut connection = self.begin(&begin_reading(timeout, &self.shared.home))?;
        let rows = connection.query(query, params)?;
        connection.batch("COMMIT")?;
        Ok(rows)
    }
}

fn read_all<T>(
    rows: &[Row],
    read: impl Fn(&Row) -> Result<T, postgres::Error>,
) -> Result<Vec<T>, StoreError> {
    rows.iter().map(|row| read(row).map_err(|error| StoreError::from(&error))).collect()
}

fn first<T>(rows: &[Row], read: impl Fn(&Row) -> Result<T, postgres::Error>) -> Result<T, StoreError> {
    let row = rows.first().ok_or_else(|| StoreError::refused("the server returned no row".into()))?;
    read(row).map_err(|error| StoreError::from(&error))
}

/// `pg-outbox/<instance>`, cut to what PostgreSQL keeps, never within a character.
fn application_name(instance_id: &str) -> String {
    let mut name = format!("pg-outbox/{instance_id}");
    while name.len() > APPLICATION_NAME_MAX_BYTES {
        name.pop();
    }
    name
}

fn connect(target: &Target) -> Result<Client, StoreError> {
    let made = target.connect().map_err(|cause| StoreError {
        text: format!("connect to postgres at {}: {cause}", target.address()),
        ..cause
    })?;
    Ok(made.client)
}

/// Whole milliseconds, rounded up; far beyond what PostgreSQL's settings take, capped at their maximum.
fn milliseconds(duration: Duration) -> i64 {
    i64::from(i32::try_from(duration.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX))
}

fn usize_of(n: i32) -> usize {
    usize::try_from(n).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Claims travel from the thread that begins them to the one that settles them.
    #[test]
    fn claims_and_stores_go_between_threads() {
        fn send<T: Send>() {}
        fn shared<T: Send + Sync + Clone>() {}
        send::<Claim>();
        send::<Listener>();
        shared::<Store>();
    }

    #[test]
    fn an_application_name_fits_and_stays_text() {
        assert_eq!(application_name("node-1"), "pg-outbox/node-1");
        let long = application_name(&"ä".repeat(60));
        assert!(long.len() <= 63 && long.ends_with('ä'), "{long}");
    }

    #[test]
    fn durations_are_whole_milliseconds() {
        assert_eq!(milliseconds(Duration::from_micros(1)), 1);
        assert_eq!(milliseconds(Duration::from_secs(30)), 30_000);
        assert_eq!(milliseconds(Duration::MAX), i64::from(i32::MAX));
    }
}
