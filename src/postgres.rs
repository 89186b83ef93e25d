//! PostgreSQL: with the files below `postgres/`, the only ones that name `postgres` and `r2d2`.
//!
//! Here are the pool and what is asked of the outbox as a whole: horizon, outlook, backlog, schema. `claim_open.rs`
//! finds and locks lanes, `claim_read.rs` reads their events, `claim_settle.rs` settles them; `dead.rs` and `replay.rs`
//! work for operators, `wake.rs` listens, `partitions.rs` keeps the partitions, `overview.rs` has what `status` shows,
//! `adopt.rs` what adopting finds and does. Below them, `pool.rs` is what is on loan, `target.rs` and `dsn.rs` how it is
//! reached, `sessions.rs` whether a pooler is between, `error.rs` why something was not done.
//!
//! Every method blocks its caller, on any thread; nothing here logs above debug, as callers report an outage once (but
//! for a password that crosses the network in clear). A connection that has seen any error is closed, never pooled again.

/// The statement in `postgres/<name>.sql`, or in several such files one after the other, and the types of its parameters.
macro_rules! query {
    ($name:literal $(, $parameter:ident)*) => { query!($name: [$name] $(, $parameter)*) };
    ($name:literal: [$($part:literal),+] $(, $parameter:ident)*) => {
        $crate::postgres::query::Query {
            name: $name,
            text: concat!($(include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/postgres/", $part, ".sql"))),+),
            types: &[$(postgres::types::Type::$parameter),*],
        }
    };
}

mod adopt;
mod adoption;
mod claim_lanes;
mod claim_open;
mod claim_read;
mod claim_settle;
mod connection;
mod dead;
mod dsn;
mod error;
mod home;
mod overview;
mod partitions;
mod plain;
mod pool;
mod query;
mod replay;
mod server_life;
mod sessions;
mod storable;
mod target;
mod timestamptz;
mod transaction;
mod wake;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use postgres::types::ToSql;
use postgres::{Client, Row};

use self::claim_open::begin_claim;
use self::connection::Connection;
use self::home::Home;
use self::pool::{LogAtDebug, Manager};
use self::query::Query;
use self::sessions::Preparing;
use self::target::Target;
use crate::config::{Database, DsnParts, Secret};
use crate::lane::LANES;
use crate::lane::marks::{Reading, Writer};

pub use self::adopt::Adopting;
pub use self::claim_lanes::LaneEnd;
pub use self::claim_open::{ClaimSettings, Found, Fresh, Head, Opening};
pub use self::claim_read::{ClaimLimits, Large, Locked};
pub use self::claim_settle::{Claim, Settled};
pub use self::dead::{CHANGE_MAX, Change, Letter, Selection, Whole};
pub use self::error::StoreError;
pub use self::overview::{BlockedKey, DeadLetter, Instance, OpenTransaction, Retry, Topic};
pub use self::partitions::{
    Cleaned, Dropped, Partition, PartitionState, Partitions, UPKEEP_STEP, UpkeepTurn,
};
pub use self::plain::{Insert, Plain};
pub use self::replay::{Found as FoundPublished, FoundEvent};
pub use self::server_life::ServerLife;
pub use self::sessions::Sessions;
pub use self::wake::{Asked, Listener, SleepLock};

/// Longest `application_name` PostgreSQL keeps, in bytes.
const APPLICATION_NAME_MAX_BYTES: usize = 63;
/// A statement of a claim, or any other but the backlog's, that runs longer is broken; the server ends it.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(30);
/// The backlog is worth this much and no more.
const BACKLOG_TIMEOUT: Duration = Duration::from_secs(10);
/// `idle_session_timeout`: what a server says that has ended a session for it.
const IDLE_FOR_TOO_LONG: &str = "57P05";
/// The plans of a claim are part of the design. Each of its searches has exactly one index that fits; these
/// keep the planner from preferring a scan or a hash where the tables looked empty when it planned. A plan
/// is made once a connection, and neither compiled nor made anew for each set of parameters. One statement, as
/// each costs its share in every claim.
pub const CLAIM_PLANS: &str = "SELECT set_config('plan_cache_mode', 'force_generic_plan', true), \
     set_config('enable_seqscan', 'off', true), set_config('enable_bitmapscan', 'off', true), \
     set_config('enable_hashjoin', 'off', true), set_config('enable_mergejoin', 'off', true), \
     set_config('enable_memoize', 'off', true), set_config('jit', 'off', true)";

/// For a `SELECT`: our transactions have limits of their own, and none that a role or a server sets for its usual
/// work. (Before PostgreSQL 17 there is no transaction_timeout to set.)
const NO_OTHER_LIMITS: &str = "set_config('lock_timeout', '0', true), \
     CASE WHEN current_setting('transaction_timeout', true) IS NOT NULL \
          THEN set_config('transaction_timeout', '0', true) END";

/// The last columns of a SELECT that begins a transaction: see [`Connection::begin`].
const SERVED_BY: &str = "current_setting('server_encoding'), pg_backend_pid()";

/// The migrations in order; each records its version in `outbox_schema` and does nothing the second time.
const MIGRATIONS: &[(i32, &str)] = &[(1, include_str!("../schema/001_outbox.sql"))];

/// The pool and what is done with it. Cheap to clone; clones share the pool.
#[derive(Clone)]
pub struct Store {
    pool: r2d2::Pool<Manager>,
    shared: Arc<Shared>,
}

struct Shared {
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
    /// The last look or claim found that something may hold events back.
    held: AtomicBool,
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

/// What waits in the outbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backlog {
    /// Events neither published nor dead, those in retry included.
    pub pending: i64,
    /// Events in retry, due or not.
    pub retrying: i64,
    /// Dead letters.
    pub dead: i64,
    /// Age of the oldest pending event; zero when there is none.
    pub lag: Duration,
}

/// What may make something claimable without any notification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outlook {
    /// Time until the earliest event in retry is due, zero if one is; `None` when no event is in retry.
    pub next_due: Option<Duration>,
    /// Somebody has a claim open. Should it be released, or its instance die, its events are there again.
    pub claims_open: bool,
}

/// What migrating did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Migrated {
    /// Versions applied now, in order; empty when the schema was up to date.
    pub applied: Vec<i32>,
    /// Version of the schema now.
    pub version: i32,
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
        let shared = Shared {
            address: target.address(),
            target,
            parts: database.parts.clone(),
            instance_id: instance_id.to_owned(),
            connect_timeout: database.connect_timeout,
            max_idle: database.max_idle,
            held: AtomicBool::new(false),
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

    /// What bounds the cursors, as `lane/marks.rs` wants it read; `None` where events can appear below any bound, as
    /// `seq` does not come from a sequence of its own without a cache.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn horizon(&self) -> Result<Option<Reading>, StoreError> {
        let mut connection = self.begin(&begin_reading(STATEMENT_TIMEOUT, &self.shared.home))?;
        let last_seq: Option<i64> = first(&connection.query(&LAST_SEQ, &[])?, |row| row.try_get(0))?;
        let rows = connection.query(&OPEN_WRITERS, &[])?;
        connection.batch("COMMIT")?;
        let writers = read_all(&rows, |row| Ok(Writer { name: row.try_get(0)?, prepared: row.try_get(1)? }))?;
        Ok(last_seq.map(|last_seq| Reading { last_seq, writers: writers.into_iter().collect() }))
    }

    /// Backoffs are now up to `longest`. What counts as further off than any backoff follows a longer one, or
    /// its retries would be due at once; after a shorter one it stays, as waits of the former length are still
    /// on their way.
    pub fn allow_backoff(&self, longest: Duration) {
        self.shared.backoff_max_ms.fetch_max(milliseconds(longest), Ordering::Relaxed);
    }

    /// What an empty claim may be waiting for.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn outlook(&self) -> Result<Outlook, StoreError> {
        let backoff_max_ms = self.shared.backoff_max_ms.load(Ordering::Relaxed);
        let rows = self.read(STATEMENT_TIMEOUT, &OUTLOOK, &[&backoff_max_ms])?;
        let (due_ms, claims_open): (Option<i64>, bool) =
            first(&rows, |row| Ok((row.try_get(0)?, row.try_get(1)?)))?;
        Ok(Outlook {
            next_due: due_ms.map(|ms| Duration::from_millis(ms.max(0).unsigned_abs())),
            claims_open,
        })
    }

    /// Counts what waits. Costs about 0.2 s of PostgreSQL for a million pending events, more where vacuum
    /// has not been; the server gives up after 10 s.
    ///
    /// # Errors
    /// PostgreSQL is out of reach, refuses, or needed more than 10 s (SQLSTATE 57014).
    pub fn backlog(&self) -> Result<Backlog, StoreError> {
        let rows = self.read(BACKLOG_TIMEOUT, &BACKLOG, &[])?;
        first(&rows, |row| {
            let lag_us: i64 = row.try_get::<_, Option<i64>>(3)?.unwrap_or(0);
            Ok(Backlog {
                pending: row.try_get(0)?,
                retrying: row.try_get(1)?,
                dead: row.try_get(2)?,
                lag: Duration::from_micros(lag_us.max(0).unsigned_abs()),
            })
        })
    }

    /// Asks PostgreSQL for an answer.
    ///
    /// # Errors
    /// It gave none.
    pub fn ping(&self) -> Result<(), StoreError> {
        self.connection()?.batch("SELECT 1")
    }

    /// The server's version as a number: 150004 is 15.4.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn server_version(&self) -> Result<i32, StoreError> {
        let rows = self.read(STATEMENT_TIMEOUT, &SERVER_VERSION, &[])?;
        first(&rows, |row| row.try_get(0))
    }

    /// What the schema lacks, each with the command that adds it; empty when the schema is complete.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn schema_problems(&self) -> Result<Vec<String>, StoreError> {
        let rows = self.read(STATEMENT_TIMEOUT, &SCHEMA_PROBLEMS, &[])?;
        let mut missing: Vec<String> = read_all(&rows, |row| row.try_get(0))?;
        // What a missing table would hold goes without saying.
        let whole = |what: &String| what.starts_with("table ");
        if missing.iter().any(whole) {
            missing.retain(whole);
        } else {
            let rows = self.read(STATEMENT_TIMEOUT, &MISSING_LANES, &[])?;
            let lanes: i64 = first(&rows, |row| row.try_get(0))?;
            if lanes > 0 {
                missing.push(format!("{lanes} of {LANES} rows of table outbox_lanes"));
            }
        }
        Ok(missing.into_iter().map(|what| format!("{what} is missing; run `pg-outbox migrate`")).collect())
    }

    /// What hides events from this role, in words; empty where nothing does.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses; among others, the schema is not there.
    pub fn hidden(&self) -> Result<Vec<String>, StoreError> {
        let tables: Vec<String> =
            read_all(&self.read(STATEMENT_TIMEOUT, &HIDDEN, &[])?, |row| row.try_get(0))?;
        let words = |table: String| {
            format!(
                "row-level security of table {table} may hide rows from this role, and what it hides is not published: \
                 give the role BYPASSRLS, or a policy FOR ALL USING (true)"
            )
        };
        Ok(tables.into_iter().map(words).collect())
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

    /// Brings the schema up to date over a connection of its own. `order` is what a key is (`key`, `topic` or `all`),
    /// chosen by the first migration; `None` is `key` then, and whatever it is later.
    ///
    /// # Errors
    /// PostgreSQL is out of reach, too old (below 14), or refuses; the schema is in another order. Nothing
    /// of a failed migration stays.
    pub fn migrate(database: &Database, order: Option<&str>) -> Result<Migrated, StoreError> {
        let target = Target::new(&database.dsn, &database.parts, "migrate", database.connect_timeout)?;
        let home = Home::new(database.schema.as_deref());
        let mut client = connect(&target)?;
        let before = schema_version(&mut client, &home)?;
        // What to do instead stands in the hint.
        let sql = |error: postgres::Error| {
            let hint = error.as_db_error().and_then(|db| db.hint()).map(|hint| format!("; {hint}"));
            let cause = StoreError::from(&error);
            StoreError { text: format!("{cause}{}", hint.unwrap_or_default()), ..cause }
        };
        let order = order.unwrap_or_default().replace('\'', "''");
        for (_, text) in MIGRATIONS {
            // In one message: the settings belong to the transaction that the file begins, and end with it. They take no
            // snapshot, so that the file may still choose the isolation level. What limits the role's usual work is
            // not meant for this.
            client
                .batch_execute(&format!(
                    "{}SET LOCAL pg_outbox.\"order\" = '{order}'; SET LOCAL statement_timeout = 0; \
                     SET LOCAL lock_timeout = 0; {text}",
                    home.statement_of_transaction()
                ))
                .map_err(sql)?;
        }
        let version = schema_version(&mut client, &home)?;
        let applied = MIGRATIONS.iter().map(|(version, _)| *version).filter(|version| *version > before);
        Ok(Migrated { applied: applied.collect(), version })
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

const LAST_SEQ: Query = query!("last_seq");
const OPEN_WRITERS: Query = query!("open_writers");
const OUTLOOK: Query = query!("outlook", INT8);
const BACKLOG: Query = query!("backlog");
const SCHEMA_PROBLEMS: Query = query!("schema_problems");
const HIDDEN: Query = query!("hidden");
const MISSING_LANES: Query = query!("missing_lanes");
const SERVER_VERSION: Query = query!("server_version");

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

/// Begins a transaction for reading.
fn begin_reading(timeout: Duration, home: &Home) -> String {
    format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY; \
         {CLAIM_PLANS}, set_config('statement_timeout', '{}', true), {NO_OTHER_LIMITS}, {}{SERVED_BY}",
        milliseconds(timeout),
        home.of_transaction(),
    )
}

fn connect(target: &Target) -> Result<Client, StoreError> {
    let made = target.connect().map_err(|cause| StoreError {
        text: format!("connect to postgres at {}: {cause}", target.address()),
        ..cause
    })?;
    Ok(made.client)
}

/// The highest version recorded; 0 before the first migration.
fn schema_version(client: &mut Client, home: &Home) -> Result<i32, StoreError> {
    let sql = |error: postgres::Error| StoreError::from(&error);
    let name = home.qualified("outbox_schema");
    let table = format!("SELECT to_regclass('{name}') IS NOT NULL");
    if !client.query_typed_one(&table, &[]).map_err(sql)?.get::<_, bool>(0) {
        return Ok(0);
    }
    let version = format!("SELECT coalesce(max(version), 0) FROM {name}");
    let row = client.query_typed_one(&version, &[]).map_err(sql)?;
    Ok(row.get(0))
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
    fn the_sql_has_as_many_lanes() {
        let schema = include_str!("../schema/001_outbox.sql");
        let last = LANES - 1;
        assert!(schema.contains(&format!("CHECK (lane BETWEEN 0 AND {last})")));
        assert!(
            schema.contains(&format!(
                "INSERT INTO outbox_lanes SELECT lane FROM generate_series(0, {last}) AS"
            ))
        );
        // The lane of a key is the low bits of a byte.
        assert!(schema.contains(&format!("OPERATOR(pg_catalog.&) {last}\n")));
        assert!(LANES.count_ones() == 1 && LANES <= 256, "{last} masks whole lanes of a byte");
        assert!(include_str!("postgres/missing_lanes.sql").contains(&format!("SELECT {LANES} - count(*)")));
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
