//! What an operator wants to see of the outbox: for `pg-outbox status`, and a part of it for the janitor's gauges.
//!
//! Each is one reading statement over a pooled connection, with a limit on its time and on what it returns. Nothing
//! here takes a lock that a claim or a writer could meet, and nothing reads a payload.

use super::outbox::BACKLOG_TIMEOUT;
use super::query::Query;
use super::{Store, StoreError, first, read_all};

/// A topic and what waits of it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Topic {
    /// Its name.
    pub topic: String,
    /// Events pending, those in retry included.
    pub pending: i64,
    /// Events in retry.
    pub retrying: i64,
    /// Dead letters.
    pub dead: i64,
}

/// A key that an event in retry or a dead letter holds back.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct BlockedKey {
    /// The key.
    pub key: String,
    /// `seq` of the first event that holds it.
    pub seq: i64,
    /// How many events hold it.
    pub events: i64,
    /// They are dead letters; else they are in retry.
    pub dead: bool,
    /// Why the first one failed.
    pub reason: String,
}

/// An instance that is connected.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Instance {
    /// `dispatcher.instance_id`.
    pub name: String,
    /// Its connections.
    pub connections: i64,
    /// Those of them with a transaction open.
    pub open: i64,
    /// Lanes that its claims hold.
    pub lanes: i64,
}

/// A transaction that keeps vacuum away.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct OpenTransaction {
    /// `session 4711` (the backend's process id) or `prepared transaction x`.
    pub what: String,
    /// `application_name`.
    pub application: String,
    /// Its role.
    pub role: String,
    /// `active`, `idle in transaction`, `prepared`.
    pub state: String,
    /// How long it has been open, in seconds.
    pub seconds: f64,
}

/// A dead letter, without its content.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct DeadLetter {
    /// Id of the event.
    pub id: String,
    /// Its place in the order.
    pub seq: i64,
    /// Its topic.
    pub topic: String,
    /// Attempts that were made.
    pub attempts: i32,
    /// Why the last one failed.
    pub reason: String,
    /// When it became one, in milliseconds since 1970.
    pub dead_at_ms: i64,
}

/// An event in retry, without its content.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Retry {
    /// Its place in the order.
    pub seq: i64,
    /// Its topic.
    pub topic: String,
    /// Attempts that were made.
    pub attempts: i32,
    /// Why the last one failed.
    pub reason: String,
    /// When the next one is due, in milliseconds since 1970.
    pub next_attempt_at_ms: i64,
}

impl Store {
    /// The `most` topics of which most waits.
    ///
    /// # Errors
    /// PostgreSQL is out of reach, refuses, or needed more than 10 s.
    pub fn topics(&self, most: i64) -> Result<Vec<Topic>, StoreError> {
        read_all(&self.read(BACKLOG_TIMEOUT, &TOPICS, &[&most])?, |row| {
            Ok(Topic {
                topic: row.try_get(0)?,
                pending: row.try_get(1)?,
                retrying: row.try_get(2)?,
                dead: row.try_get(3)?,
            })
        })
    }

    /// The `most` keys that have been held back for longest; by dead letters too where the store blocks on those.
    ///
    /// # Errors
    /// As [`Store::topics`].
    pub fn blocked_keys(&self, most: i64) -> Result<Vec<BlockedKey>, StoreError> {
        let blocks = self.dead_letters_block();
        read_all(&self.read(BACKLOG_TIMEOUT, &BLOCKED_KEYS, &[&blocks, &most])?, |row| {
            Ok(BlockedKey {
                key: row.try_get(0)?,
                seq: row.try_get(1)?,
                events: row.try_get(2)?,
                dead: row.try_get(3)?,
                reason: row.try_get(4)?,
            })
        })
    }

    /// How many keys events in retry hold back, and how many dead letters do.
    ///
    /// # Errors
    /// As [`Store::topics`].
    pub fn blocked_key_counts(&self) -> Result<(i64, i64), StoreError> {
        let rows = self.read(BACKLOG_TIMEOUT, &BLOCKED_KEY_COUNTS, &[&self.dead_letters_block()])?;
        let (by_retry, by_dead): (i64, i64) = first(&rows, |row| Ok((row.try_get(0)?, row.try_get(1)?)))?;
        Ok(if self.shared.settings.ordered { (by_retry, by_dead) } else { (0, 0) })
    }

    /// Whether dead letters hold their keys.
    fn dead_letters_block(&self) -> bool {
        self.shared.settings.ordered && self.shared.settings.block_on_dead
    }

    /// The instances that are connected to this database, by their `application_name`.
    ///
    /// # Errors
    /// As [`Store::topics`].
    pub fn instances(&self) -> Result<Vec<Instance>, StoreError> {
        read_all(&self.read(BACKLOG_TIMEOUT, &INSTANCES, &[])?, |row| {
            Ok(Instance {
                name: row.try_get(0)?,
                connections: row.try_get(1)?,
                open: row.try_get(2)?,
                lanes: row.try_get(3)?,
            })
        })
    }

    /// The transaction that has kept vacuum away for longest, as far as our role may see.
    ///
    /// # Errors
    /// As [`Store::topics`].
    pub fn oldest_transaction(&self) -> Result<Option<OpenTransaction>, StoreError> {
        let rows = self.read(BACKLOG_TIMEOUT, &OLDEST_TRANSACTION, &[])?;
        let found = read_all(&rows, |row| {
            Ok(OpenTransaction {
                what: row.try_get(0)?,
                application: row.try_get(1)?,
                role: row.try_get(2)?,
                state: row.try_get(3)?,
                seconds: row.try_get(4)?,
            })
        })?;
        Ok(found.into_iter().next())
    }

    /// The `most` newest dead letters. Costs as much as there are dead letters.
    ///
    /// # Errors
    /// As [`Store::topics`].
    pub fn newest_dead(&self, most: i64) -> Result<Vec<DeadLetter>, StoreError> {
        read_all(&self.read(BACKLOG_TIMEOUT, &NEWEST_DEAD, &[&most])?, |row| {
            Ok(DeadLetter {
                id: row.try_get(0)?,
                seq: row.try_get(1)?,
                topic: row.try_get(2)?,
                attempts: row.try_get(3)?,
                reason: row.try_get(4)?,
                dead_at_ms: row.try_get(5)?,
            })
        })
    }

    /// The `most` events in retry that are due first.
    ///
    /// # Errors
    /// As [`Store::topics`].
    pub fn next_retries(&self, most: i64) -> Result<Vec<Retry>, StoreError> {
        read_all(&self.read(BACKLOG_TIMEOUT, &NEXT_RETRIES, &[&most])?, |row| {
            Ok(Retry {
                seq: row.try_get(0)?,
                topic: row.try_get(1)?,
                attempts: row.try_get(2)?,
                reason: row.try_get(3)?,
                next_attempt_at_ms: row.try_get(4)?,
            })
        })
    }

    /// How many events were ever written, rolled back ones included; its growth is the writers' rate.
    ///
    /// # Errors
    /// As [`Store::topics`].
    pub fn written(&self) -> Result<i64, StoreError> {
        first(&self.read(BACKLOG_TIMEOUT, &WRITTEN, &[])?, |row| row.try_get(0))
    }
}

const TOPICS: Query = query!("topics", INT8);
const BLOCKED_KEYS: Query = query!("blocked_keys", BOOL, INT8);
const BLOCKED_KEY_COUNTS: Query = query!("blocked_key_counts", BOOL);
const INSTANCES: Query = query!("instances");
const OLDEST_TRANSACTION: Query = query!("oldest_transaction");
const NEWEST_DEAD: Query = query!("newest_dead", INT8);
const NEXT_RETRIES: Query = query!("next_retries", INT8);
const WRITTEN: Query = query!("written");
