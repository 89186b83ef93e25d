//! PostgreSQL: with the files below `store/`, the only ones that name `postgres`, and the only one that names
//! `r2d2`. It owns the connection pool, the claim and its settling, the LISTEN connection, and the numbers that
//! gauges show.
//!
//! A claim is one open transaction. It locks lanes, then reads their events in a second statement, and stays
//! open while they are published; the row locks on the lanes are what keeps every other claim off their keys,
//! and they fall with the connection. Under READ COMMITTED a statement sees what was committed when it began,
//! so a statement that locked and read at once could lock a lane that was settled a moment ago and still read
//! its events as pending: two statements, never one.
//!
//! Every method blocks its caller, on any thread; nothing here logs above debug, as callers report an outage
//! once (but for a password that crosses the network in clear). A connection that has seen any error is closed, never pooled again: what state its transaction is
//! in, nobody knows. Dropping a claim rolls it back.

/// The statement in `store/<name>.sql`, and the types of its parameters.
macro_rules! query {
    ($name:literal $(, $parameter:ident)*) => {
        $crate::store::Query {
            name: $name,
            text: include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/store/", $name, ".sql")),
            types: &[$(postgres::types::Type::$parameter),*],
        }
    };
}

mod adopt;
mod dead;
mod dsn;
mod overview;
mod partitions;
mod plain;
mod replay;
mod sessions;
mod target;
mod wake;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::ops::DerefMut;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use log::debug;
// The name that `to_sql_checked!` itself has for what `ToSql` writes to.
use postgres::types::private::BytesMut;
use postgres::types::{FromSql, IsNull, ToSql, Type, accepts, to_sql_checked};
use postgres::{Client, Row, Statement};
use r2d2::{HandleError, ManageConnection};
use uuid::Uuid;

use self::sessions::Preparing;
use self::target::Target;
use crate::config::{Database, DsnParts, Secret};
use crate::cursors::{self, Reading, Writer};
use crate::event::{Event, Outcome};
use crate::failpoint;

pub use self::adopt::Adopting;
pub use self::dead::{CHANGE_MAX, Change, Letter, Selection, Whole};
pub use self::overview::{BlockedKey, DeadLetter, Instance, OpenTransaction, Retry, Topic};
pub use self::partitions::{
    Cleaned, Dropped, Partition, PartitionState, Partitions, UPKEEP_STEP, UpkeepTurn,
};
pub use self::plain::{Insert, Plain};
pub use self::replay::{Found as FoundPublished, FoundEvent};
pub use self::sessions::Sessions;
pub use self::wake::{Asked, Listener, SleepLock};

/// Lanes there are: rows of `outbox_lanes`, values of `outbox_lane()`.
pub const LANES: i32 = 64;

/// Longest `last_error` written, in characters; what is longer is cut.
const LAST_ERROR_MAX_CHARS: usize = 2_000;
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

/// The migrations in order; each records its version in `outbox_schema` and does nothing the second time.
const MIGRATIONS: &[(i32, &str)] = &[(1, include_str!("../schema/001_outbox.sql"))];

/// What a claim does beyond its limits; the same for every claim of a store.
#[derive(Debug, Clone, Default)]
pub struct ClaimSettings {
    /// true: a settle is on disk when it returns (and wherever else the server's own setting wants it).
    /// false: a crash of PostgreSQL may forget the last moment's settles, whose events are published again.
    pub synchronous_commit: bool,
    /// PostgreSQL ends a claim, and frees its lanes, when nothing was heard of it for this long.
    pub idle_in_transaction_timeout: Duration,
    /// An event waits for the earlier events of its key that are in retry.
    pub ordered: bool,
    /// An event waits for the earlier dead letters of its key. Means nothing unless `ordered`.
    pub block_on_dead: bool,
    /// Longest backoff there is: a retry that is due later than that from now is due, as clocks jump.
    pub backoff_max: Duration,
    /// Bytes of payload and metadata that one claim holds at most; a larger event comes alone.
    pub max_claim_bytes: i64,
}

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
            backoff_max_ms: AtomicI64::new(milliseconds(settings.backoff_max)),
            begin_claim: begin_claim(&settings),
            preparing: Preparing::new(database.prepared_statements),
            age,
            settings,
        };
        Ok(Store { pool, shared: Arc::new(shared) })
    }

    /// Begins the transaction in which a claim is made.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn open(&self) -> Result<Opening, StoreError> {
        let connection = self.begin(&self.shared.begin_claim)?;
        Ok(Opening { transaction: Transaction(Some(connection)), shared: self.shared.clone() })
    }

    /// What bounds the cursors, as `cursors.rs` wants it read; `None` where events can appear below any bound, as
    /// `seq` does not come from a sequence of its own without a cache.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn horizon(&self) -> Result<Option<Reading>, StoreError> {
        let mut connection = self.begin(&begin_reading(STATEMENT_TIMEOUT))?;
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
        let mut client = connect(&target)?;
        let before = schema_version(&mut client)?;
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
                    "SET LOCAL pg_outbox.\"order\" = '{order}'; SET LOCAL statement_timeout = 0; \
                     SET LOCAL lock_timeout = 0; {text}"
                ))
                .map_err(sql)?;
        }
        let version = schema_version(&mut client)?;
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
        let mut connection = self.begin(&begin_reading(timeout))?;
        let rows = connection.query(query, params)?;
        connection.batch("COMMIT")?;
        Ok(rows)
    }
}

/// An open transaction; dropping it rolls it back. `None` once it has ended.
struct Transaction(Option<Connection>);

impl Transaction {
    fn query(&mut self, query: &Query, params: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, StoreError> {
        match self.0.as_mut() {
            Some(connection) => connection.query(query, params),
            None => Err(StoreError::outage("the claim has ended".into())),
        }
    }

    fn roll_back(&mut self) -> Result<(), StoreError> {
        self.0.take().map_or(Ok(()), |mut connection| connection.batch("ROLLBACK"))
    }
}

impl Drop for Transaction {
    fn drop(&mut self) {
        if let Err(error) = self.roll_back() {
            debug!("rollback of a dropped claim failed; its connection is closed: {error}");
        }
    }
}

/// A transaction in which a claim is about to be made. Dropping it ends it.
pub struct Opening {
    transaction: Transaction,
    shared: Arc<Shared>,
}

/// What a look into a lane found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// The lane.
    pub lane: i32,
    /// It has something to claim, though perhaps somebody else has claimed it already.
    pub claimable: bool,
    /// It has no fresh event above its cursor at all.
    pub settled: bool,
}

impl Opening {
    /// Looks into `lanes`, in this order, without locking anything; fresh events are looked for above the cursors.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn find(&mut self, lanes: &[i32], cursors: &[i64; cursors::LANES]) -> Result<Vec<Found>, StoreError> {
        let ClaimSettings { ordered, block_on_dead, .. } = self.shared.settings;
        let backoff_max_ms = self.shared.backoff_max_ms.load(Ordering::Relaxed);
        let rows = self.transaction.query(
            &FIND_LANES,
            &[&lanes, &positions(lanes, cursors), &ordered, &(ordered && block_on_dead), &backoff_max_ms],
        )?;
        read_all(&rows, |row| {
            Ok(Found { lane: row.try_get(0)?, claimable: row.try_get(1)?, settled: row.try_get(2)? })
        })
    }

    /// Locks those of `lanes` that nobody else has claimed, and reads events of theirs, about as many of each lane;
    /// fresh ones from above the cursors. A claim that found nothing holds no connection.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses; nothing stays locked.
    pub fn claim(
        self,
        lanes: &[i32],
        limits: ClaimLimits,
        cursors: &[i64; cursors::LANES],
    ) -> Result<Claim, StoreError> {
        let settings = &self.shared.settings;
        let backoff_max_ms = self.shared.backoff_max_ms.load(Ordering::Relaxed);
        let max_events = limits.events.max(1);
        let max_lanes = limits.lanes.clamp(1, LANES.min(max_events));
        let max_event_bytes = i64::try_from(limits.event_bytes).unwrap_or(i64::MAX);
        let mut claim = Claim {
            transaction: self.transaction,
            lanes: Vec::new(),
            server: ServerLife::default(),
            reads: Vec::new(),
            events: Vec::new(),
        };
        let rows = claim.transaction.query(&LOCK_LANES, &[&lanes, &max_lanes])?;
        let Some(row) = rows.first() else { return claim.release_empty() };
        claim.server = ServerLife::read(row).map_err(|error| StoreError::from(&error))?;
        claim.lanes = read_all(&rows, |row| row.try_get(0))?;
        failpoint!("claim.locked");
        let from = positions(&claim.lanes, cursors);
        let rows = claim.transaction.query(
            &READ_EVENTS,
            &[
                &claim.lanes,
                &max_events,
                &settings.ordered,
                &(settings.ordered && settings.block_on_dead),
                &backoff_max_ms,
                &settings.max_claim_bytes,
                &from,
                &Some(max_event_bytes),
            ],
        )?;
        let read = read_all(&rows, |row| read_event(row, limits.event_bytes))?;
        drop(rows);
        if read.is_empty() {
            return claim.release_empty();
        }
        claim.reads = lane_reads(&read, &claim.lanes, usize_of(max_events));
        let held = read.iter().any(|row| row.held);
        claim.events = read.into_iter().filter_map(|row| row.event).collect();
        if held {
            claim.find_left_out(&from)?;
        }
        // Within a lane the retries came first; a key's events go out in seq order.
        claim.events.sort_by_key(|event| (event.lane, event.seq));
        failpoint!("claim.read");
        Ok(claim)
    }

    /// The event that a claim of one event of this lane would read; without its texts, so that nothing about it can
    /// keep it from being read. `None` when the lane has nothing to claim.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn head(&mut self, lane: i32, cursors: &[i64; cursors::LANES]) -> Result<Option<Head>, StoreError> {
        let settings = &self.shared.settings;
        let lanes = &[lane][..];
        let rows = self.transaction.query(
            &READ_EVENTS,
            &[
                &lanes,
                &1,
                &settings.ordered,
                &(settings.ordered && settings.block_on_dead),
                &self.shared.backoff_max_ms.load(Ordering::Relaxed),
                &settings.max_claim_bytes,
                &positions(lanes, cursors),
                &None::<i64>,
            ],
        )?;
        let head = |row: &Row| -> Result<Head, postgres::Error> {
            let (id, seq, attempts) = (row.try_get(1)?, row.try_get(2)?, row.try_get(6)?);
            Ok(Head { id, seq, created_at: row.try_get::<_, Timestamp>(3)?.0, attempts })
        };
        rows.first().map(head).transpose().map_err(|error| StoreError::from(&error))
    }

    /// Makes a dead letter of `head`, which cannot be read, says `reason`; returns whether it did. It does not if
    /// another event is the first one to claim by now, or somebody else has the lane.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses; nothing is changed.
    pub fn bury(
        mut self,
        lane: i32,
        cursors: &[i64; cursors::LANES],
        head: Head,
        reason: &str,
    ) -> Result<bool, StoreError> {
        let lanes = &[lane][..];
        if self.transaction.query(&LOCK_LANES, &[&lanes, &1])?.is_empty()
            || self.head(lane, cursors)? != Some(head)
        {
            return Ok(false);
        }
        let Some(mut connection) = self.transaction.0.take() else { return Ok(false) };
        let ids = vec![head.id];
        let created_at = vec![Timestamp(head.created_at)];
        let attempts = vec![head.attempts.saturating_add(1)];
        let buried =
            connection.execute(&SETTLE_DEAD, &[&ids, &created_at, &attempts, &vec![storable(reason)]])?;
        connection.batch("COMMIT")?;
        Ok(buried > 0)
    }
}

/// How much a claim may have.
#[derive(Debug, Clone, Copy)]
pub struct ClaimLimits {
    /// Lanes at most.
    pub lanes: i32,
    /// Events at most.
    pub events: i32,
    /// Bytes of a payload at most, and of a metadata: what is larger can be no message, and stays in the database.
    pub event_bytes: usize,
}

/// An event without its texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// `outboxes.id`.
    pub id: Uuid,
    /// `outboxes.seq`.
    pub seq: i64,
    created_at: i64,
    attempts: i32,
}

/// Lanes locked plus their events read, in one open transaction. Ends by [`Claim::settle`], by
/// [`Claim::release`], or by being dropped, which releases it too.
pub struct Claim {
    transaction: Transaction,
    /// The lanes locked; empty when there was nothing to claim.
    pub lanes: Vec<i32>,
    /// The server that this claim was made on.
    pub server: ServerLife,
    /// How each lane was read.
    reads: Vec<LaneRead>,
    events: Vec<Event>,
}

/// One life of a server: another one may have forgotten what was settled in this one, as settles need not have been
/// on disk when it crashed, nor have reached the standby that took over. Two different lives are never equal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ServerLife {
    /// When the server was started; microseconds since 2000-01-01 UTC.
    started: i64,
    /// When its statistics began: also at every recovery from a crash of one of its processes.
    recovered: i64,
}

impl ServerLife {
    fn read(row: &Row) -> Result<ServerLife, postgres::Error> {
        let recovered: Option<Timestamp> = row.try_get(2)?;
        Ok(ServerLife {
            started: row.try_get::<_, Timestamp>(1)?.0,
            recovered: recovered.map_or(0, |Timestamp(at)| at),
        })
    }
}

/// How a lane was read.
#[derive(Debug, Clone, Copy)]
struct LaneRead {
    lane: i32,
    /// The last fresh event read; `i64::MAX` when the read came to the end of the lane.
    read_to: i64,
    /// The first fresh event passed over on the way there.
    left_out: Option<i64>,
}

impl LaneRead {
    /// A limit cut the read of this lane short.
    fn is_cut(&self) -> bool {
        self.read_to != i64::MAX
    }
}

/// What a claim's outcomes mean for one of its lanes, once they are settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaneEnd {
    /// The lane.
    pub lane: i32,
    /// No fresh event is left in the lane up to here, of those that had appeared when it was read.
    pub reach: i64,
    /// The lane may have more to claim at once, as a limit of this claim cut it short or an event stays untouched.
    pub more: bool,
}

impl Claim {
    /// The events read, for whoever publishes them; by lane, each lane in `seq` order. Empty the second time.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// How many events were read and not yet taken.
    pub fn len(&self) -> usize {
        self.events.len()
    }

    /// Bytes of payload and metadata of the events read and not yet taken.
    pub fn bytes(&self) -> usize {
        let bytes = |event: &Event| event.payload.len() + event.metadata.as_ref().map_or(0, String::len);
        self.events.iter().map(bytes).sum()
    }

    /// True when nothing was found to claim.
    pub fn is_empty(&self) -> bool {
        self.lanes.is_empty()
    }

    /// True when one of its limits cut this claim short: its lanes have more.
    pub fn more(&self) -> bool {
        self.reads.iter().any(LaneRead::is_cut)
    }

    /// What these outcomes mean for the claim's lanes, once they are settled; `untouched` are the events that stay as
    /// they were.
    pub fn ends<'e>(&self, untouched: impl IntoIterator<Item = &'e Event>) -> Vec<LaneEnd> {
        let mut first_untouched: HashMap<i32, i64> = HashMap::new();
        let mut untouched_lanes = HashSet::new();
        for event in untouched {
            untouched_lanes.insert(event.lane);
            if !event.in_retry {
                let seq = first_untouched.entry(event.lane).or_insert(event.seq);
                *seq = event.seq.min(*seq);
            }
        }
        let end = |read: &LaneRead| LaneEnd {
            lane: read.lane,
            reach: cursors::reach(read.read_to, read.left_out, first_untouched.get(&read.lane).copied()),
            more: read.is_cut() || untouched_lanes.contains(&read.lane),
        };
        self.reads.iter().map(end).collect()
    }

    /// Writes what became of the events and commits, in at most three statements. An event without an outcome
    /// stays as it is, like an `Untouched` one.
    ///
    /// # Errors
    /// The connection was lost or PostgreSQL refuses: nothing of the claim is settled, and what was published
    /// will be published again (a lost COMMIT may have happened all the same).
    pub fn settle<'e>(
        mut self,
        outcomes: impl IntoIterator<Item = (&'e Event, &'e Outcome)>,
    ) -> Result<Settled, StoreError> {
        let mut writes = Writes::default();
        for (event, outcome) in outcomes {
            writes.add(event, outcome);
        }
        let Some(mut connection) = self.transaction.0.take() else {
            return Ok(Settled { missed: writes.len(), ..Settled::default() });
        };
        let settled = writes.apply(&mut connection)?;
        failpoint!("settle.written");
        connection.batch("COMMIT")?;
        failpoint!("settle.committed");
        Ok(settled)
    }

    /// Rolls the claim back: nothing was attempted, and the next claim may have its lanes.
    ///
    /// # Errors
    /// The connection was lost, which releases the claim as well.
    pub fn release(mut self) -> Result<(), StoreError> {
        self.transaction.roll_back()
    }

    /// Rolls back a claim that has found nothing and returns it as an empty one.
    fn release_empty(mut self) -> Result<Claim, StoreError> {
        self.transaction.roll_back()?;
        self.lanes.clear();
        Ok(self)
    }

    /// Finds the first fresh event that each lane's read has passed over.
    fn find_left_out(&mut self, from: &[i64]) -> Result<(), StoreError> {
        let read_to: Vec<i64> = self.reads.iter().map(|read| read.read_to).collect();
        let seqs: Vec<i64> = self.events.iter().map(|event| event.seq).collect();
        let rows = self.transaction.query(&LEFT_OUT, &[&self.lanes, &from, &read_to, &seqs])?;
        let left_out: Vec<Option<i64>> = read_all(&rows, |row| row.try_get(1))?;
        for (read, left_out) in self.reads.iter_mut().zip(left_out) {
            read.left_out = left_out;
        }
        Ok(())
    }
}

/// What a settle changed, in events.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Settled {
    /// Marked published.
    pub published: u64,
    /// Put into retry.
    pub retried: u64,
    /// Made dead letters.
    pub dead: u64,
    /// Not written, as the row was no longer pending: settled, buried or deleted by somebody else meanwhile.
    pub missed: u64,
}

/// Why PostgreSQL did not do something. Displays as `SQLSTATE: message (detail)` where it is the server's word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreError {
    text: String,
    sqlstate: Option<String>,
    outage: bool,
}

impl StoreError {
    /// The server's five-character code, if the server answered at all.
    pub fn sqlstate(&self) -> Option<&str> {
        self.sqlstate.as_deref()
    }

    /// True in an outage of PostgreSQL: there is no connection, or the server cannot serve anybody now (it
    /// ends, starts, is a standby, has no resources left). False when it judged the statement.
    pub fn is_outage(&self) -> bool {
        self.outage
    }

    /// True when PostgreSQL has what was asked for and cannot hand it over, now or ever: as text it is over 1 GB, or,
    /// from a database in SQL_ASCII, no UTF-8. (XX000 is any internal error; the text of one is never translated.)
    pub fn is_unreadable(&self) -> bool {
        match self.sqlstate() {
            Some("54000" | "22021" | "22P05") => true,
            Some("XX000") => self.text.contains("invalid memory alloc request size"),
            _ => false,
        }
    }

    /// The server ended the session, or it is lost without a word.
    fn has_ended_the_session(&self) -> bool {
        self.outage
            && self.sqlstate.as_deref().is_none_or(|code| code.starts_with("57P") || code.starts_with("08"))
    }

    fn outage(text: String) -> StoreError {
        StoreError { text, sqlstate: None, outage: true }
    }

    fn refused(text: String) -> StoreError {
        StoreError { text, sqlstate: None, outage: false }
    }
}

/// The one place where an error of the driver becomes text: its own text is often just `db error`.
impl From<&postgres::Error> for StoreError {
    fn from(error: &postgres::Error) -> StoreError {
        let Some(db) = error.as_db_error() else {
            let mut text = error.to_string();
            let mut cause = std::error::Error::source(error);
            while let Some(inner) = cause {
                text = format!("{text}: {inner}");
                cause = inner.source();
            }
            return StoreError::outage(text);
        };
        let detail = db.detail().map(|detail| format!(" ({detail})")).unwrap_or_default();
        let code = db.code().code();
        // Classes 08: connection exceptions; 53: out of connections, memory or disk; 58: the disk failed. 57P:
        // the server ends, starts or kills the session; 25P03: idle_in_transaction_session_timeout did.
        // 25006 and 0A000: it is a standby, which answers our BEGIN ... READ WRITE with the latter.
        let outage =
            ["08", "53", "57P", "58", "25P03", "25006", "0A000"].iter().any(|class| code.starts_with(class));
        StoreError {
            text: format!("{code}: {}{detail}", db.message()),
            sqlstate: Some(code.to_owned()),
            outage,
        }
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for StoreError {}

/// A statement of `store/*.sql`, prepared once a connection where connections are sessions.
struct Query {
    name: &'static str,
    text: &'static str,
    /// Of `$1`, `$2`, ...
    types: &'static [Type],
}

const FIND_LANES: Query = query!("find_lanes", INT4_ARRAY, INT8_ARRAY, BOOL, BOOL, INT8);
const LOCK_LANES: Query = query!("lock_lanes", INT4_ARRAY, INT4);
const READ_EVENTS: Query = query!("read_events", INT4_ARRAY, INT4, BOOL, BOOL, INT8, INT8, INT8_ARRAY, INT8);
const LEFT_OUT: Query = query!("left_out", INT4_ARRAY, INT8_ARRAY, INT8_ARRAY, INT8_ARRAY);
const LAST_SEQ: Query = query!("last_seq");
const OPEN_WRITERS: Query = query!("open_writers");
const SETTLE_PUBLISHED: Query = query!("settle_published", UUID_ARRAY, TIMESTAMPTZ_ARRAY);
const SETTLE_RETRIED: Query =
    query!("settle_retried", UUID_ARRAY, TIMESTAMPTZ_ARRAY, INT4_ARRAY, INT8_ARRAY, TEXT_ARRAY);
const SETTLE_DEAD: Query = query!("settle_dead", UUID_ARRAY, TIMESTAMPTZ_ARRAY, INT4_ARRAY, TEXT_ARRAY);
const OUTLOOK: Query = query!("outlook", INT8);
const BACKLOG: Query = query!("backlog");
const SCHEMA_PROBLEMS: Query = query!("schema_problems");
const HIDDEN: Query = query!("hidden");
const MISSING_LANES: Query = query!("missing_lanes");
const SERVER_VERSION: Query = query!("server_version");

/// A connection on loan from the pool. It goes back unless it is doomed or the pool has enough idle ones.
struct Connection {
    pooled: r2d2::PooledConnection<Manager>,
    pool: r2d2::Pool<Manager>,
    shared: Arc<Shared>,
}

impl Connection {
    /// Begins a transaction by statements of which the last one returns the server process as its last column.
    fn begin(&mut self, text: &str) -> Result<(), StoreError> {
        let messages = self.attempt(|session| session.client.simple_query(text))?;
        let now = sessions::last_number(&messages).unwrap_or_default();
        let before = *self.pooled.served_by.get_or_insert(now);
        let moved = self.shared.preparing.moved(before, now);
        self.pooled.doomed |= moved.is_err();
        moved
    }

    fn batch(&mut self, text: &str) -> Result<(), StoreError> {
        self.attempt(|session| session.client.batch_execute(text))
    }

    fn query(&mut self, query: &Query, params: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, StoreError> {
        let prepares = self.shared.preparing.is_on();
        self.attempt(|session| {
            if !prepares {
                return session.client.query_typed(query.text, &typed(query, params));
            }
            let statement = session.prepared(query)?;
            session.client.query(&statement, params)
        })
    }

    fn execute(&mut self, query: &Query, params: &[&(dyn ToSql + Sync)]) -> Result<u64, StoreError> {
        let prepares = self.shared.preparing.is_on();
        self.attempt(|session| {
            if !prepares {
                return session.client.execute_typed(query.text, &typed(query, params));
            }
            let statement = session.prepared(query)?;
            session.client.execute(&statement, params)
        })
    }

    /// Every use of the client goes through here: any error dooms the connection.
    fn attempt<T>(
        &mut self,
        work: impl FnOnce(&mut Session) -> Result<T, postgres::Error>,
    ) -> Result<T, StoreError> {
        let session = self.pooled.deref_mut();
        let result = work(session);
        session.doomed |= result.is_err();
        let age = session.age;
        result.map_err(|error| {
            let error = StoreError::from(&error);
            if error.has_ended_the_session() {
                // It may have ended all that are as old.
                let _ = self.shared.age.compare_exchange(age, age + 1, Ordering::Relaxed, Ordering::Relaxed);
            }
            self.shared.preparing.failed(error)
        })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // r2d2 has no limit on idle connections. Two that return at the same time may both find room.
        self.pooled.doomed |= self.pool.state().idle_connections >= self.shared.max_idle;
    }
}

/// What the pool keeps: a client, its prepared statements, and whether it may be used again. The client is dropped
/// first: a statement that is dropped before its connection would be closed on whatever server process is there.
struct Session {
    client: Client,
    doomed: bool,
    /// How many ages had ended when it was made.
    age: u64,
    /// The server process of its first transaction.
    served_by: Option<i32>,
    statements: HashMap<&'static str, Statement>,
}

impl Session {
    fn prepared(&mut self, query: &Query) -> Result<Statement, postgres::Error> {
        if let Some(statement) = self.statements.get(query.name) {
            return Ok(statement.clone());
        }
        let statement = self.client.prepare_typed(query.text, query.types)?;
        self.statements.insert(query.name, statement.clone());
        Ok(statement)
    }
}

/// The parameters of a statement, each with its type.
fn typed<'p>(query: &Query, params: &[&'p (dyn ToSql + Sync)]) -> Vec<(&'p (dyn ToSql + Sync), Type)> {
    params.iter().copied().zip(query.types.iter().cloned()).collect()
}

struct Manager {
    target: Target,
    age: Arc<AtomicU64>,
}

impl ManageConnection for Manager {
    type Connection = Session;
    type Error = StoreError;

    fn connect(&self) -> Result<Session, StoreError> {
        let age = self.age.load(Ordering::Relaxed);
        let client = self.target.connect()?;
        Ok(Session { client, doomed: false, age, served_by: None, statements: HashMap::new() })
    }

    fn is_valid(&self, session: &mut Session) -> Result<(), StoreError> {
        session.client.simple_query("").map(|_| ()).map_err(|error| StoreError::from(&error))
    }

    fn has_broken(&self, session: &mut Session) -> bool {
        session.doomed || session.client.is_closed()
    }
}

/// The caller who waits for a connection reports why there is none, once; r2d2 would at every try.
#[derive(Debug)]
struct LogAtDebug;

impl HandleError<StoreError> for LogAtDebug {
    fn handle_error(&self, error: StoreError) {
        debug!("connect to postgres failed, will try again: {error}");
    }
}

/// `timestamptz` as PostgreSQL keeps it, microseconds since 2000-01-01 UTC, so that what is read comes back
/// exactly: also `infinity`, and years that date types refuse.
#[derive(Debug, Clone, Copy)]
struct Timestamp(i64);

impl FromSql<'_> for Timestamp {
    fn from_sql(_: &Type, raw: &[u8]) -> Result<Timestamp, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Timestamp(i64::from_be_bytes(raw.try_into()?)))
    }

    accepts!(TIMESTAMPTZ);
}

impl ToSql for Timestamp {
    fn to_sql(
        &self,
        _: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        out.extend_from_slice(&self.0.to_be_bytes());
        Ok(IsNull::No)
    }

    accepts!(TIMESTAMPTZ);
    to_sql_checked!();
}

/// The rows of a settle, by statement and column.
#[derive(Default)]
struct Writes {
    published: Rows,
    retried: Rows,
    dead: Rows,
}

#[derive(Default)]
struct Rows {
    ids: Vec<Uuid>,
    created_at: Vec<Timestamp>,
    attempts: Vec<i32>,
    delays_ms: Vec<i64>,
    errors: Vec<String>,
}

impl Writes {
    fn add(&mut self, event: &Event, outcome: &Outcome) {
        match outcome {
            Outcome::Published => self.published.add(event),
            Outcome::Retry { attempts, delay_ms, error } => {
                self.retried.add(event);
                self.retried.delays_ms.push(*delay_ms);
                self.retried.add_attempt(*attempts, error);
            }
            Outcome::Dead { attempts, error } => {
                self.dead.add(event);
                self.dead.add_attempt(*attempts, error);
            }
            Outcome::Untouched => {}
        }
    }

    fn len(&self) -> u64 {
        (self.published.ids.len() + self.retried.ids.len() + self.dead.ids.len()) as u64
    }

    fn apply(&self, connection: &mut Connection) -> Result<Settled, StoreError> {
        let Writes { published, retried, dead } = self;
        let mut settled = Settled::default();
        if !published.ids.is_empty() {
            settled.published =
                connection.execute(&SETTLE_PUBLISHED, &[&published.ids, &published.created_at])?;
        }
        if !retried.ids.is_empty() {
            let Rows { ids, created_at, attempts, delays_ms, errors } = retried;
            settled.retried =
                connection.execute(&SETTLE_RETRIED, &[ids, created_at, attempts, delays_ms, errors])?;
        }
        if !dead.ids.is_empty() {
            let Rows { ids, created_at, attempts, errors, .. } = dead;
            settled.dead = connection.execute(&SETTLE_DEAD, &[ids, created_at, attempts, errors])?;
        }
        settled.missed = self.len().saturating_sub(settled.published + settled.retried + settled.dead);
        Ok(settled)
    }
}

impl Rows {
    fn add(&mut self, event: &Event) {
        self.ids.push(event.id);
        self.created_at.push(Timestamp(event.created_at));
    }

    fn add_attempt(&mut self, attempts: u32, error: &str) {
        self.attempts.push(i32::try_from(attempts).unwrap_or(i32::MAX));
        self.errors.push(storable(error));
    }
}

/// An error text that PostgreSQL takes: it stores no NUL, and a settle that it refuses would be tried for ever.
fn storable(error: &str) -> String {
    error.chars().take(LAST_ERROR_MAX_CHARS).map(|c| if c == '\0' { '\u{fffd}' } else { c }).collect()
}

/// One row of `read_events.sql`.
struct ReadRow {
    lane: i32,
    /// `None` in the row that says that bytes cut the lane, or the claim, short.
    event: Option<Event>,
    /// Events may have been passed over, as a retry or a dead letter holds their key.
    held: bool,
}

fn read_event(row: &Row, max_event_bytes: usize) -> Result<ReadRow, postgres::Error> {
    let lane = row.try_get(0)?;
    let held = row.try_get(10)?;
    let oversize: Option<i64> = row.try_get(11)?;
    let payload: Option<String> = row.try_get(9)?;
    if payload.is_none() && oversize.is_none() {
        return Ok(ReadRow { lane, event: None, held });
    }
    let unreadable = oversize.map(|bytes| {
        format!("payload and metadata of {bytes} B are over the server's max_payload of {max_event_bytes} B")
    });
    let event = Event {
        lane,
        id: row.try_get(1)?,
        seq: row.try_get(2)?,
        created_at: row.try_get::<_, Timestamp>(3)?.0,
        topic: row.try_get(4)?,
        key: row.try_get(5)?,
        attempts: u32::try_from(row.try_get::<_, i32>(6)?).unwrap_or(0),
        in_retry: row.try_get(7)?,
        metadata: row.try_get(8)?,
        payload: payload.unwrap_or_default(),
        unreadable,
    };
    Ok(ReadRow { lane, event: Some(event), held })
}

/// How far each of `lanes` was read. A lane's read was cut short when it gave all that its share of `max_events`
/// lets it give (the shares are those of `read_events.sql`: the first lanes take what does not divide), or when
/// bytes cut it; when the last row says that bytes cut it, the lanes after its own may not have been read at all.
fn lane_reads(read: &[ReadRow], lanes: &[i32], max_events: usize) -> Vec<LaneRead> {
    let cut_from = read.last().filter(|row| row.event.is_none()).map(|row| row.lane);
    let cut_from = cut_from.and_then(|cut| lanes.iter().position(|lane| *lane == cut));
    let mut reads = Vec::with_capacity(lanes.len());
    let mut rest = read;
    for (turn, &lane) in lanes.iter().enumerate() {
        // The rows come in the order of the lanes.
        let rows;
        (rows, rest) = rest.split_at(rest.iter().take_while(|row| row.lane == lane).count());
        let share = (max_events + lanes.len() - turn - 1) / lanes.len();
        let cut = rows.len() >= share
            || rows.iter().any(|row| row.event.is_none())
            || cut_from.is_some_and(|from| turn >= from);
        let last_fresh = rows.iter().filter_map(|row| row.event.as_ref()).filter(|event| !event.in_retry);
        let last_fresh = last_fresh.map(|event| event.seq).max().unwrap_or(cursors::BEGINNING);
        reads.push(LaneRead { lane, read_to: if cut { last_fresh } else { i64::MAX }, left_out: None });
    }
    reads
}

/// The cursors of these lanes.
fn positions(lanes: &[i32], cursors: &[i64; cursors::LANES]) -> Vec<i64> {
    lanes.iter().map(|&lane| cursors.get(usize_of(lane)).copied().unwrap_or(cursors::BEGINNING)).collect()
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

fn begin_claim(settings: &ClaimSettings) -> String {
    // `on` would take from a server that is set to wait for its replicas.
    let commit =
        if settings.synchronous_commit { "" } else { ", set_config('synchronous_commit', 'off', true)" };
    format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; \
         {CLAIM_PLANS}, set_config('idle_in_transaction_session_timeout', '{}', true), \
         set_config('statement_timeout', '{}', true){commit}, {NO_OTHER_LIMITS}, pg_backend_pid()",
        milliseconds(settings.idle_in_transaction_timeout),
        milliseconds(STATEMENT_TIMEOUT),
    )
}

/// Begins a transaction for reading.
fn begin_reading(timeout: Duration) -> String {
    format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY; \
         {CLAIM_PLANS}, set_config('statement_timeout', '{}', true), {NO_OTHER_LIMITS}, pg_backend_pid()",
        milliseconds(timeout)
    )
}

fn connect(target: &Target) -> Result<Client, StoreError> {
    target.connect().map_err(|cause| StoreError {
        text: format!("connect to postgres at {}: {cause}", target.address()),
        ..cause
    })
}

/// The highest version recorded; 0 before the first migration.
fn schema_version(client: &mut Client) -> Result<i32, StoreError> {
    let sql = |error: postgres::Error| StoreError::from(&error);
    let table =
        client.query_typed_one("SELECT to_regclass('outbox_schema') IS NOT NULL", &[]).map_err(sql)?;
    if !table.get::<_, bool>(0) {
        return Ok(0);
    }
    let row =
        client.query_typed_one("SELECT coalesce(max(version), 0) FROM outbox_schema", &[]).map_err(sql)?;
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
    fn an_application_name_fits_and_stays_text() {
        assert_eq!(application_name("node-1"), "pg-outbox/node-1");
        let long = application_name(&"ä".repeat(60));
        assert!(long.len() <= 63 && long.ends_with('ä'), "{long}");
    }

    #[test]
    fn error_texts_can_be_stored() {
        assert_eq!(storable("a\0b"), "a\u{fffd}b");
        assert_eq!(storable(&"ä".repeat(5_000)).chars().count(), LAST_ERROR_MAX_CHARS);
    }

    #[test]
    fn durations_are_whole_milliseconds() {
        assert_eq!(milliseconds(Duration::from_micros(1)), 1);
        assert_eq!(milliseconds(Duration::from_secs(30)), 30_000);
        assert_eq!(milliseconds(Duration::MAX), i64::from(i32::MAX));
    }
}
