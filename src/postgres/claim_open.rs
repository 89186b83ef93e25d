//! The beginning of a claim: one open transaction that finds lanes with pending events, and locks them.
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

use postgres::Row;
use postgres::types::ToSql;
use uuid::Uuid;

use super::claim_read::{Locked, READ_ANY, READ_FRESH};
use super::claim_settings::{ClaimLimits, ClaimSettings};
use super::claim_settle::{SETTLE_DEAD, SETTLE_PUBLISHED};
use super::query::Query;
use super::server_life::ServerLife;
use super::timestamptz::Timestamptz;
use super::transaction::Transaction;
use super::{Store, StoreError, StoreInner, read_all, usize_of};
use crate::event::retry::MAX_ERROR_CHARS;
use crate::failpoint;
use crate::lane::{ByLane, marks};

/// Events that [`Opening::lock_fresh`] goes through at most: as many as some transactions have, and few enough to leave
/// most of a burst to the claims that share it out.
const LOCK_FRESH_EVENTS: i32 = 16;
const FIND_LANES: Query =
    query!("find_lanes": ["held", "find_lanes"], INT4_ARRAY, INT8_ARRAY, BOOL, BOOL, INT8);
const FIND_FRESH: Query =
    query!("find_fresh": ["held", "find_fresh"], INT4_ARRAY, INT8_ARRAY, BOOL, BOOL, INT8);
const LOCK_LANES: Query = query!("lock_lanes", INT4_ARRAY, INT4);
const LOCK_FRESH: Query = query!("lock_fresh", INT4_ARRAY, INT8, INT4);

impl Store {
    /// Begins the transaction in which a claim is made.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn open(&self) -> Result<Opening, StoreError> {
        let connection = self.begin(&self.shared.begin_claim)?;
        Ok(Opening { transaction: Transaction(Some(connection)), shared: self.shared.clone() })
    }

    /// Has the connection that the next claim gets plan what a claim asks, unless it has: the first event would wait some
    /// 5 ms for that. For a moment of rest. Does nothing where statements are not prepared or no connection is kept.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn warm_up(&self) -> Result<(), StoreError> {
        if !self.shared.preparing.is_on() || self.shared.max_idle == 0 {
            return Ok(());
        }
        // The pool hands out first what came back last.
        let mut connection = self.connection()?;
        let every = [&FIND_FRESH, &LOCK_FRESH, &LOCK_LANES, &READ_FRESH, &SETTLE_PUBLISHED];
        if connection.pooled.has_prepared(&every) {
            return Ok(());
        }
        connection.begin(&self.shared.begin_claim)?;
        let ClaimSettings { ordered, block_on_dead, max_claim_bytes, .. } = self.shared.settings;
        let (ordered, block_on_dead) = (&ordered, &(ordered && block_on_dead));
        let backoff_max_ms = &self.shared.backoff_max_ms.load(Ordering::Relaxed);
        // A lane that there is not, and an event.
        let (lanes, cursors) = (&&[-1][..], &&[marks::BEGINNING][..]);
        let (ids, created_at) = (&vec![Uuid::nil()], &vec![Timestamptz(0)]);
        connection.query(&FIND_FRESH, &[lanes, cursors, ordered, block_on_dead, backoff_max_ms])?;
        connection.query(&LOCK_FRESH, &[lanes, &marks::BEGINNING, &1])?;
        connection.query(&LOCK_LANES, &[lanes, &1])?;
        connection.query(
            &READ_FRESH,
            &[
                lanes,
                &1,
                ordered,
                block_on_dead,
                backoff_max_ms,
                &max_claim_bytes,
                cursors,
                &Some(0_i64),
                &true,
            ],
        )?;
        connection.execute(&SETTLE_PUBLISHED, &[ids, created_at])?;
        connection.batch("ROLLBACK")
    }
}

/// A transaction in which a claim is about to be made. Dropping it ends it.
pub struct Opening {
    transaction: Transaction,
    shared: Arc<StoreInner>,
}

/// What a look into a lane found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaneLook {
    /// The lane.
    pub lane: i32,
    /// It has something to claim, though perhaps somebody else has claimed it already.
    pub claimable: bool,
    /// No fresh event is left in the lane up to here, of those that had appeared when it was looked into; `None` if
    /// that was not found out.
    pub reach: Option<i64>,
}

impl LaneLook {
    /// Of a lane in which nothing is held back: all that there is begins with its first fresh event.
    fn fresh(lane: i32, first: Option<i64>) -> LaneLook {
        LaneLook { lane, claimable: first.is_some(), reach: Some(marks::reach(i64::MAX, first, None)) }
    }
}

impl Opening {
    /// Looks into `lanes`, in this order, without locking anything; fresh events are looked for above the cursors.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn find(&mut self, lanes: &[i32], cursors: &ByLane<i64>) -> Result<Vec<LaneLook>, StoreError> {
        let ClaimSettings { ordered, block_on_dead, .. } = self.shared.settings;
        let backoff_max_ms = self.shared.backoff_max_ms.load(Ordering::Relaxed);
        let positions = positions(lanes, cursors);
        let params: &[&(dyn ToSql + Sync)] =
            &[&lanes, &positions, &ordered, &(ordered && block_on_dead), &backoff_max_ms];
        if !self.shared.held.load(Ordering::Relaxed) {
            let rows = self.transaction.query(&FIND_FRESH, params)?;
            if !rows.is_empty() {
                return read_all(&rows, |row| Ok(LaneLook::fresh(row.try_get(0)?, row.try_get(1)?)));
            }
            self.shared.held.store(true, Ordering::Relaxed);
        }
        let rows = self.transaction.query(&FIND_LANES, params)?;
        read_all(&rows, |row| {
            let (claimable, settled): (bool, bool) = (row.try_get(1)?, row.try_get(2)?);
            Ok(LaneLook { lane: row.try_get(0)?, claimable, reach: settled.then_some(i64::MAX) })
        })
    }

    /// Locks those of `lanes` that nobody else has claimed; fresh events of theirs are then read from above the cursors.
    /// When somebody else has them all no connection is held.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses; nothing stays locked.
    pub fn lock(
        mut self,
        lanes: &[i32],
        limits: ClaimLimits,
        cursors: &ByLane<i64>,
    ) -> Result<Locked, StoreError> {
        let rows = self.transaction.query(&LOCK_LANES, &[&lanes, &limits.max_lanes()])?;
        if rows.is_empty() {
            self.transaction.roll_back()?;
        }
        self.locked(&rows, limits, cursors)
    }

    /// Locks, without a look, those of `lanes` that have one of the first fresh events above the cursors and that nobody
    /// else has claimed.
    ///
    /// A hint, for when a few events have just come: [`Fresh::Nothing`] does not say that there is nothing. It is that at
    /// once where a search could be long or in vain: a lane has no cursor, or something may hold events back.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses; nothing stays locked.
    pub fn lock_fresh(
        mut self,
        lanes: &[i32],
        limits: ClaimLimits,
        cursors: &ByLane<i64>,
    ) -> Result<Fresh, StoreError> {
        let from = positions(lanes, cursors).into_iter().min().unwrap_or(marks::BEGINNING);
        if from == marks::BEGINNING || self.shared.held.load(Ordering::Relaxed) {
            return Ok(Fresh::Nothing(self));
        }
        let max_events = LOCK_FRESH_EVENTS.min(limits.max_lanes());
        let rows = self.transaction.query(&LOCK_FRESH, &[&lanes, &from, &max_events])?;
        if rows.is_empty() {
            return Ok(Fresh::Nothing(self));
        }
        let more = rows.len() >= usize_of(max_events);
        let locked = self.locked(&rows, limits, cursors)?;
        Ok(Fresh::Locked { locked, more })
    }

    /// What `rows` say is locked.
    fn locked(self, rows: &[Row], limits: ClaimLimits, cursors: &ByLane<i64>) -> Result<Locked, StoreError> {
        let server = rows.first().map(ServerLife::read).transpose();
        let server = server.map_err(|error| StoreError::from(&error))?.unwrap_or_default();
        let mut lanes: Vec<i32> = read_all(rows, |row| row.try_get(0))?;
        let mut seen = HashSet::new();
        lanes.retain(|lane| seen.insert(*lane));
        if !lanes.is_empty() {
            failpoint!("claim.locked");
        }
        let from = positions(&lanes, cursors);
        Ok(Locked { transaction: self.transaction, shared: self.shared, lanes, server, from, limits })
    }

    /// The event that a claim of one event of this lane would read; without its texts, so that nothing about it can
    /// keep it from being read. `None` when the lane has nothing to claim.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn head(&mut self, lane: i32, cursors: &ByLane<i64>) -> Result<Option<Head>, StoreError> {
        let settings = &self.shared.settings;
        let lanes = &[lane][..];
        let rows = self.transaction.query(
            &READ_ANY,
            &[
                &lanes,
                &1,
                &settings.ordered,
                &(settings.ordered && settings.block_on_dead),
                &self.shared.backoff_max_ms.load(Ordering::Relaxed),
                &settings.max_claim_bytes,
                &positions(lanes, cursors),
                &None::<i64>,
                &true,
            ],
        )?;
        let head = |row: &Row| -> Result<Head, postgres::Error> {
            let (id, seq, attempts) = (row.try_get(1)?, row.try_get(2)?, row.try_get(6)?);
            Ok(Head { id, seq, created_at: row.try_get::<_, Timestamptz>(3)?.0, attempts })
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
        cursors: &ByLane<i64>,
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
        let created_at = vec![Timestamptz(head.created_at)];
        let attempts = vec![head.attempts.saturating_add(1)];
        let buried = connection.execute(
            &SETTLE_DEAD,
            &[&ids, &created_at, &attempts, &vec![connection.storable(reason, MAX_ERROR_CHARS)]],
        )?;
        connection.batch("COMMIT")?;
        Ok(buried > 0)
    }
}

/// What [`Opening::lock_fresh`] came to.
pub enum Fresh {
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

/// The cursors of these lanes.
fn positions(lanes: &[i32], cursors: &ByLane<i64>) -> Vec<i64> {
    lanes.iter().map(|&lane| cursors.get(usize_of(lane)).copied().unwrap_or(marks::BEGINNING)).collect()
}
