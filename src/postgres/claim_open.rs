//! The beginning of a claim: one open transaction that locks lanes.
//!
//! A claim locks lanes, then reads their events in a second statement, and stays open while they are published; the row
//! locks on the lanes are what keeps every other claim off their keys, and they fall with the connection. Under READ
//! COMMITTED a statement sees what was committed when it began, so a statement that locked and read at once could lock
//! a lane that was settled a moment ago and still read its events as pending: two statements, never one. The claimer
//! begins it and locks lanes ([`Opening`], here), a worker reads them ([`Locked`]) and settles the events ([`Claim`]);
//! dropping any of them rolls it back.
//!
//! [`Claim`]: super::Claim

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use postgres::Row;
use uuid::Uuid;

use super::claim_read::Locked;
use super::claim_reader::{ClaimLane, Head, READ, Reader, held_keys};
use super::claim_settings::ClaimLimits;
use super::claim_settle::{SETTLE_DEAD, SETTLE_PUBLISHED};
use super::connection::Connection;
use super::query::Query;
use super::timestamptz::Timestamptz;
use super::transaction::Transaction;
use super::{Store, StoreError, StoreInner, read_all, usize_of};
use crate::event::Place;
use crate::event::retry::MAX_ERROR_CHARS;
use crate::failpoint;
use crate::lane::marks::{LaneRow, Marks};
use crate::lane::writers::ServerLife;

/// Events that [`Opening::lock_newest`] goes through at most: as many as some transactions have, and few enough to leave
/// most of a burst to the claims that share it out.
const LOCK_NEWEST_EVENTS: i32 = 16;
/// Numbers between the lowest mark and the last one drawn for which [`Opening::lock_newest`] may be tried: it walks over
/// every event of theirs.
const NEAR: i64 = 2_000;
/// Entries of a lane's index that a look walks over at most.
const LOOK_ENTRIES: i64 = 1_000;

const LOCK_LANES: Query = query!("lock_lanes", INT4_ARRAY, INT4);
const LOCK_NEWEST: Query = query!("lock_newest", INT4_ARRAY, INT8, INT4);
const LOOK: Query = query!("look", INT4_ARRAY, INT8_ARRAY, INT4_ARRAY, INT8);
const DUE: Query = query!("due", INT8);

impl Store {
    /// Begins the transaction in which a claim is made.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn open(&self) -> Result<Opening, StoreError> {
        let connection = self.begin(&self.shared.begin_claim)?;
        Ok(Opening { transaction: Transaction(Some(connection)), shared: self.shared.clone() })
    }

    /// Has the idle connections plan what a claim asks, unless they have: the first event would wait some 5 ms for that, and any
    /// of them may be the one that the next claim gets. For a moment of rest. Does nothing where statements are not
    /// prepared.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn warm_up(&self) -> Result<(), StoreError> {
        if !self.shared.preparing.is_on() {
            return Ok(());
        }
        // Each is kept until the end, or the pool would give the same one again.
        let mut warm = Vec::new();
        for _ in 0..self.pool.state().idle_connections {
            let mut connection = self.connection()?;
            self.warm_up_one(&mut connection)?;
            warm.push(connection);
        }
        Ok(())
    }

    fn warm_up_one(&self, connection: &mut Connection) -> Result<(), StoreError> {
        if connection.pooled.has_prepared(&[&LOOK, &LOCK_NEWEST, &LOCK_LANES, &READ, &SETTLE_PUBLISHED]) {
            return Ok(());
        }
        connection.begin(&self.shared.begin_claim)?;
        // A lane that there is not, and an event.
        let (lanes, marks) = (&&[-1][..], &&[i64::MAX][..]);
        let (places, ids, created_at) = (&vec![Place::default()], &vec![Uuid::nil()], &vec![Timestamptz(0)]);
        connection.query(&LOOK, &[lanes, marks, lanes, &LOOK_ENTRIES])?;
        connection.query(&LOCK_NEWEST, &[lanes, &i64::MAX, &1])?;
        connection.query(&LOCK_LANES, &[lanes, &1])?;
        let no_writers: &[i64] = &[];
        connection.query(
            &READ,
            &[lanes, marks, &1, &1_i64, &1_i64, &Some(1_i64), &no_writers, &false, &false, &1_i64],
        )?;
        connection.execute(&SETTLE_PUBLISHED, &[places, created_at, ids])?;
        connection.batch("ROLLBACK")
    }
}

/// A transaction in which a claim is about to be made. Dropping it ends it.
pub struct Opening {
    transaction: Transaction,
    shared: Arc<StoreInner>,
}

/// What a look into lanes found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Looked {
    /// Each lane, and whether a claim of it would find something or walk on.
    pub lanes: Vec<(i32, bool)>,
    /// Something is in retry, in whatever lane.
    pub any_in_retry: bool,
    /// The server that was asked; `None` where no lane was.
    pub server: Option<ServerLife>,
}

impl Opening {
    /// Looks into `lanes`, in this order, without locking anything; fresh events are looked for above their marks.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn look(&mut self, lanes: &[i32], marks: &Marks) -> Result<Looked, StoreError> {
        let known = lanes.iter().map(|&lane| marks.look_start(lane));
        let (own, sweeps): (Vec<i64>, Vec<i32>) = known.unzip();
        let rows = self.transaction.query(&LOOK, &[&lanes, &own, &sweeps, &LOOK_ENTRIES])?;
        let lanes = read_all(&rows, |row| Ok((row.try_get(0)?, row.try_get(1)?)))?;
        let Some(first) = rows.first() else { return Ok(Looked::default()) };
        let seen = |error: postgres::Error| StoreError::from(&error);
        let any_in_retry = first.try_get(2).map_err(seen)?;
        let server = Some(ServerLife::read(first, 3).map_err(seen)?);
        Ok(Looked { lanes, any_in_retry, server })
    }

    /// Which of these keys nothing holds back any more: no event of theirs is in retry, nor a dead letter that blocks.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn free_keys(&mut self, keys: &[i64]) -> Result<HashSet<i64>, StoreError> {
        let held = held_keys(&mut self.transaction, &self.shared.settings, keys)?;
        Ok(keys.iter().copied().filter(|key| !held.contains_key(key)).collect())
    }

    /// The lanes that have events in retry, each with the time until its earliest one is due, zero if it is.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn due(&mut self) -> Result<Vec<(i32, Duration)>, StoreError> {
        let backoff_max_ms = self.shared.backoff_max_ms.load(Ordering::Relaxed);
        let rows = self.transaction.query(&DUE, &[&backoff_max_ms])?;
        read_all(&rows, |row| {
            let ms: i64 = row.try_get(1)?;
            Ok((row.try_get(0)?, Duration::from_millis(ms.max(0).unsigned_abs())))
        })
    }

    /// Locks those of `lanes` that nobody else has claimed; fresh events of theirs are then read from above the marks.
    /// When somebody else has them all no connection is held.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses, or the schema is of another version; nothing stays locked.
    pub fn lock(mut self, lanes: &[i32], limits: ClaimLimits, marks: &Marks) -> Result<Locked, StoreError> {
        let rows = self.transaction.query(&LOCK_LANES, &[&lanes, &limits.max_lanes()])?;
        if rows.is_empty() {
            self.transaction.roll_back()?;
        }
        self.locked(&rows, limits, marks)
    }

    /// Locks, without a look, those of `lanes` that have one of the first fresh events above the lowest of their marks and
    /// that nobody else has claimed.
    ///
    /// A hint, for when a few events have just come: [`Newest::Nothing`] does not say that there is nothing. It is that at
    /// once where the search could be long: a lane's mark is far below the last number drawn.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses, or the schema is of another version; nothing stays locked.
    pub fn lock_newest(
        mut self,
        lanes: &[i32],
        limits: ClaimLimits,
        marks: &Marks,
    ) -> Result<Newest, StoreError> {
        let from = lanes.iter().map(|&lane| marks.look_from(lane)).min();
        let near = |from: i64| marks.last_value().is_some_and(|last| from >= last.saturating_sub(NEAR));
        let Some(from) = from.filter(|&from| near(from)) else { return Ok(Newest::Nothing(self)) };
        let max_events = LOCK_NEWEST_EVENTS.min(limits.max_lanes());
        let rows = self.transaction.query(&LOCK_NEWEST, &[&lanes, &from, &max_events])?;
        if rows.is_empty() {
            return Ok(Newest::Nothing(self));
        }
        let more = rows.len() >= usize_of(max_events);
        let locked = self.locked(&rows, limits, marks)?;
        Ok(Newest::Locked { locked, more })
    }

    /// What `rows` say is locked.
    fn locked(self, rows: &[Row], limits: ClaimLimits, marks: &Marks) -> Result<Locked, StoreError> {
        let mut seen = HashSet::new();
        let mut lanes = Vec::new();
        let mut server = ServerLife::default();
        for row in rows {
            let (life, version, lane) = read_lane(row).map_err(|error| StoreError::from(&error))?;
            super::migrate::check_version(version)?;
            server = life;
            if seen.insert(lane.lane) {
                let start = marks.start(lane.lane);
                lanes.push((lane, start));
            }
        }
        if !lanes.is_empty() {
            failpoint!("claim.locked");
        }
        let names = lanes.iter().map(|(lane, _)| lane.lane).collect();
        let reader = Reader::new(self.shared, lanes, marks.basis(), server, limits);
        Ok(Locked { transaction: self.transaction, lanes: names, server, reader })
    }

    /// The event that a claim of one event of this lane would read; without its texts, so that nothing about it can
    /// keep it from being read. `None` when the lane has nothing to claim, or somebody else has it.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn head(self, lane: i32, marks: &Marks) -> Result<Option<Head>, StoreError> {
        Ok(self.locked_head(lane, marks)?.map(|(head, _)| head))
    }

    fn locked_head(self, lane: i32, marks: &Marks) -> Result<Option<(Head, Transaction)>, StoreError> {
        let limits = ClaimLimits { lanes: 1, events: 1, event_bytes: None };
        self.lock(&[lane], limits, marks)?.head()
    }

    /// Makes a dead letter of `head`, which cannot be read, says `reason`; returns whether it did. It does not if
    /// another event is the first one to claim by now, or somebody else has the lane.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses; nothing is changed.
    pub fn bury(self, lane: i32, marks: &Marks, head: Head, reason: &str) -> Result<bool, StoreError> {
        let Some((now, mut transaction)) = self.locked_head(lane, marks)? else { return Ok(false) };
        if now != head {
            return Ok(false);
        }
        let Some(mut connection) = transaction.0.take() else { return Ok(false) };
        let ids = vec![head.id];
        let created_at = vec![Timestamptz(head.created_at)];
        let attempts = vec![head.attempts.saturating_add(1)];
        let reasons = vec![connection.storable(reason, MAX_ERROR_CHARS)];
        let buried = connection.execute(&SETTLE_DEAD, &[&ids, &created_at, &attempts, &reasons])?;
        connection.batch("COMMIT")?;
        Ok(buried > 0)
    }
}

/// What [`Opening::lock_newest`] came to.
pub enum Newest {
    /// Lanes are locked.
    Locked {
        /// Which.
        locked: Locked,
        /// There may be more events than it went through.
        more: bool,
    },
    /// None is; the transaction is as it was.
    Nothing(Opening),
}

/// A row of what locking returns: the server's life, the schema's version, and the lane.
fn read_lane(row: &Row) -> Result<(ServerLife, i32, ClaimLane), postgres::Error> {
    let locked = LaneRow { settled_to: row.try_get(1)?, sweeps: row.try_get(2)? };
    let lane = ClaimLane::new(row.try_get(0)?, locked, row.try_get(3)?);
    Ok((ServerLife::read(row, 4)?, row.try_get(7)?, lane))
}
