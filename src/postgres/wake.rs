//! The two sessions of the wake-up: one LISTENs, the other holds the sleep lock.
//!
//! The *sleep lock* is an advisory lock that belongs to the outbox table. The insert trigger tries to share it until
//! the end of its transaction, and notifies only when it cannot (see `outbox_notify` in the schema). Who is about to
//! sleep asks for it alone, with a call that blocks: from then on no new writer can share it, so each one notifies;
//! and it is granted when the last writer that could share it has ended, with its events there to see. Both need a
//! session of their own, which a transaction pooler does not give: the self-test finds that out.

use std::time::Duration;

use postgres::Client;
use postgres::fallible_iterator::FallibleIterator;

use super::query::Query;
use super::{STATEMENT_TIMEOUT, Secret, Sessions, Store, StoreError, Target, connect, first, sessions};

/// The sleep lock's key, beside the table's oid. `outbox_notify` in the schema has the same.
const LOCK_KEY: &str = "1869968483, 'outboxes'::regclass::oid::int8::bit(32)::int4";
/// One wait for the lock at most. The server does not notice that a session which waits has lost its client; so long
/// would such a one make all writers notify.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);
/// `lock_not_available`: the answer when that has passed.
const LOCK_NOT_AVAILABLE: &str = "55P03";

const HOME: Query = query!("home");

/// A session that hears when a transaction with new events commits.
pub struct Listener {
    client: Client,
}

/// A session that can hold the sleep lock.
pub struct SleepLock {
    client: Client,
    /// The server process that serves this session.
    pid: i32,
}

/// What asking for the sleep lock came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// It is ours. Whoever shared it has ended; whoever inserts from now on notifies.
    Granted,
    /// A writer still shares it after several seconds.
    Waiting,
    /// Another instance has it or waits for it.
    Taken,
}

impl Store {
    /// Two sessions outside the pool, for the wake-up; to `dsn` if given (around a transaction pooler), else to the
    /// store's own.
    ///
    /// # Errors
    /// The DSN is malformed, PostgreSQL is out of reach or refuses, the trigger that notifies is missing, or what is
    /// at the other end gives no sessions.
    pub fn wake_up(&self, dsn: Option<&Secret>) -> Result<(Listener, SleepLock), StoreError> {
        let shared = &self.shared;
        let target = match dsn {
            Some(dsn) => Target::new(dsn, &shared.parts, &shared.instance_id, shared.connect_timeout)?,
            None => shared.target.clone(),
        };
        let (mut listener, mut sleeper) = (connect(&target)?, connect(&target)?);
        if sessions::probe(&mut listener, &mut sleeper).map_err(lost)? == Sessions::Shared {
            return Err(StoreError::refused(
                "statements of one connection run in different sessions, as behind a transaction pooler: set \
                 database.listen_dsn to PostgreSQL itself, or database.listen to false"
                    .into(),
            ));
        }
        shared.home.of_session(&mut listener).map_err(lost)?;
        if dsn.is_some() {
            let home: String = first(&self.read(STATEMENT_TIMEOUT, &HOME, &[])?, |row| row.try_get(0))?;
            if listener.query_typed_one(HOME.text, &[]).map_err(lost)?.get::<_, String>(0) != home {
                return Err(StoreError::refused(
                    "database.listen_dsn leads to another outbox than database.dsn: to another server, database or schema"
                        .into(),
                ));
            }
        }
        shared.home.of_session(&mut sleeper).map_err(lost)?;
        let trigger = "SELECT EXISTS (SELECT FROM pg_trigger
                                       WHERE tgrelid = 'outboxes'::regclass AND tgname = 'outboxes_notify'
                                         AND tgenabled IN ('O', 'A'))";
        if !listener.query_typed_one(trigger, &[]).map_err(lost)?.get::<_, bool>(0) {
            return Err(StoreError::refused("trigger outboxes_notify is missing or disabled".into()));
        }
        let timeout = LOCK_TIMEOUT.as_millis();
        listener.batch_execute("SET idle_session_timeout = 0").map_err(lost)?;
        listener.batch_execute("LISTEN outbox_events").map_err(lost)?;
        sleeper
            .batch_execute(&format!(
                "SET idle_session_timeout = 0; SET statement_timeout = 0; SET lock_timeout = {timeout}; \
                 SELECT CASE WHEN current_setting('transaction_timeout', true) IS NOT NULL \
                             THEN set_config('transaction_timeout', '0', false) END"
            ))
            .map_err(lost)?;
        let pid = sleeper.query_typed_one("SELECT pg_backend_pid()", &[]).map_err(lost)?.get(0);
        Ok((Listener { client: listener }, SleepLock { client: sleeper, pid }))
    }
}

impl Listener {
    /// Waits until at least one notification has come, for `timeout` at most, and takes all that are there.
    /// Returns whether there was one.
    ///
    /// # Errors
    /// The connection was lost; the listener is of no further use.
    pub fn wait(&mut self, timeout: Duration) -> Result<bool, StoreError> {
        let woken = self.client.notifications().timeout_iter(timeout).next().map_err(lost)?.is_some();
        while self.client.notifications().iter().next().map_err(lost)?.is_some() {}
        // A closed connection reads like one on which nothing happens.
        if self.client.is_closed() {
            return Err(StoreError::outage("the LISTEN connection was closed".into()));
        }
        Ok(woken)
    }
}

impl SleepLock {
    /// Asks for the lock and waits for it, for a few seconds at most. Not to be called while it is held.
    ///
    /// # Errors
    /// The session was lost, and the lock with it if it was held.
    pub fn ask(&mut self) -> Result<Asked, StoreError> {
        // Among several that sleep one makes the writers notify; that all of them hear.
        let taken = "SELECT EXISTS (SELECT FROM pg_locks
                                     WHERE locktype = 'advisory' AND mode = 'ExclusiveLock'
                                       AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
                                       AND classid = 1869968483 AND objid = 'outboxes'::regclass AND objsubid = 2)";
        if self.client.query_typed_one(taken, &[]).map_err(lost)?.get(0) {
            return Ok(Asked::Taken);
        }
        let ask = format!("SELECT pg_backend_pid() FROM pg_advisory_lock({LOCK_KEY})");
        match self.client.query_typed_one(&ask, &[]) {
            Ok(row) => self.same_session(row.get(0)).map(|()| Asked::Granted),
            Err(error) if error.code().is_some_and(|code| code.code() == LOCK_NOT_AVAILABLE) => {
                Ok(Asked::Waiting)
            }
            Err(error) => Err(StoreError::from(&error)),
        }
    }

    /// Lets the lock go.
    ///
    /// # Errors
    /// The session was lost, and the lock with it.
    pub fn let_go(&mut self) -> Result<(), StoreError> {
        let let_go = format!("SELECT pg_advisory_unlock({LOCK_KEY}), pg_backend_pid()");
        let row = self.client.query_typed_one(&let_go, &[]).map_err(lost)?;
        self.same_session(row.get(1))
    }

    /// Makes sure that the session, and the lock that it may hold, is still there.
    ///
    /// # Errors
    /// It was lost, and the lock with it.
    pub fn check(&mut self) -> Result<(), StoreError> {
        // Reads what the server sent, such as its farewell, without asking it anything.
        self.client.notifications().timeout_iter(Duration::from_millis(1)).next().map_err(lost)?;
        if self.client.is_closed() {
            return Err(StoreError::outage("the connection of the sleep lock was closed".into()));
        }
        Ok(())
    }

    fn same_session(&self, pid: i32) -> Result<(), StoreError> {
        if pid == self.pid {
            return Ok(());
        }
        Err(StoreError::refused("the session changed between statements".into()))
    }
}

#[allow(clippy::needless_pass_by_value, reason = "the shape that map_err wants")]
fn lost(error: postgres::Error) -> StoreError {
    StoreError::from(&error)
}
