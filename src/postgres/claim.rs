//! A claim: one open transaction that has locked lanes and read their events.
//!
//! It locks lanes, then reads their events in a second statement, and stays open while they are published; the row
//! locks on the lanes are what keeps every other claim off their keys, and they fall with the connection. Under READ
//! COMMITTED a statement sees what was committed when it began, so a statement that locked and read at once could lock
//! a lane that was settled a moment ago and still read its events as pending: two statements, never one. The claimer
//! begins it and locks lanes ([`Opening`]), a worker reads them ([`Locked`]) and settles the events ([`Claim`]);
//! dropping any of them rolls it back.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use log::debug;
use postgres::Row;
use postgres::types::ToSql;
use uuid::Uuid;

use super::home::Home;
use super::pool::{Connection, Query, Timestamp};
use super::{
    CLAIM_PLANS, LANES, NO_OTHER_LIMITS, SERVED_BY, STATEMENT_TIMEOUT, Shared, Store, StoreError,
    milliseconds, read_all,
};
use crate::event::{Event, Outcome};
use crate::failpoint;
use crate::lane::marks;

/// Events that [`Opening::lock_fresh`] goes through at most: as many as some transactions have, and few enough to leave
/// most of a burst to the claims that share it out.
const LOCK_FRESH_EVENTS: i32 = 16;
/// The column of what is read that says whether something may hold events back.
const HELD: usize = 10;

const FIND_LANES: Query =
    query!("find_lanes": ["held", "find_lanes"], INT4_ARRAY, INT8_ARRAY, BOOL, BOOL, INT8);
const FIND_FRESH: Query =
    query!("find_fresh": ["held", "find_fresh"], INT4_ARRAY, INT8_ARRAY, BOOL, BOOL, INT8);
const LOCK_LANES: Query = query!("lock_lanes", INT4_ARRAY, INT4);
const LOCK_FRESH: Query = query!("lock_fresh", INT4_ARRAY, INT8, INT4);
const READ_ANY: Query = query!(
    "read_any": ["held", "read_before", "read_any", "read_after"],
    INT4_ARRAY, INT4, BOOL, BOOL, INT8, INT8, INT8_ARRAY, INT8, BOOL
);
const READ_FRESH: Query = query!(
    "read_fresh": ["held", "read_before", "read_fresh", "read_after", "read_held"],
    INT4_ARRAY, INT4, BOOL, BOOL, INT8, INT8, INT8_ARRAY, INT8, BOOL
);
const LEFT_OUT: Query = query!("left_out", INT4_ARRAY, INT8_ARRAY, INT8_ARRAY, INT8_ARRAY);
const SETTLE_PUBLISHED: Query = query!("settle_published", UUID_ARRAY, TIMESTAMPTZ_ARRAY);
const SETTLE_RETRIED: Query =
    query!("settle_retried", UUID_ARRAY, TIMESTAMPTZ_ARRAY, INT4_ARRAY, INT8_ARRAY, TEXT_ARRAY);
const SETTLE_DEAD: Query = query!("settle_dead", UUID_ARRAY, TIMESTAMPTZ_ARRAY, INT4_ARRAY, TEXT_ARRAY);

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
        let (ids, created_at) = (&vec![Uuid::nil()], &vec![Timestamp(0)]);
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

/// An open transaction; dropping it rolls it back. `None` once it has ended.
struct Transaction(Option<Connection>);

impl Transaction {
    fn query(&mut self, query: &Query, params: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, StoreError> {
        match self.0.as_mut() {
            Some(connection) => connection.query(query, params),
            None => Err(StoreError::outage("the claim has ended".into())),
        }
    }

    fn query_each<T>(
        &mut self,
        query: &Query,
        params: &[&(dyn ToSql + Sync)],
        read: impl Fn(&Row) -> Result<T, postgres::Error>,
    ) -> Result<Vec<T>, StoreError> {
        match self.0.as_mut() {
            Some(connection) => connection.query_each(query, params, read),
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
    /// No fresh event is left in the lane up to here, of those that had appeared when it was looked into; `None` if
    /// that was not found out.
    pub reach: Option<i64>,
}

impl Found {
    /// Of a lane in which nothing is held back: all that there is begins with its first fresh event.
    fn fresh(lane: i32, first: Option<i64>) -> Found {
        Found { lane, claimable: first.is_some(), reach: Some(marks::reach(i64::MAX, first, None)) }
    }
}

impl Opening {
    /// Looks into `lanes`, in this order, without locking anything; fresh events are looked for above the cursors.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn find(&mut self, lanes: &[i32], cursors: &[i64; marks::LANES]) -> Result<Vec<Found>, StoreError> {
        let ClaimSettings { ordered, block_on_dead, .. } = self.shared.settings;
        let backoff_max_ms = self.shared.backoff_max_ms.load(Ordering::Relaxed);
        let positions = positions(lanes, cursors);
        let params: &[&(dyn ToSql + Sync)] =
            &[&lanes, &positions, &ordered, &(ordered && block_on_dead), &backoff_max_ms];
        if !self.shared.held.load(Ordering::Relaxed) {
            let rows = self.transaction.query(&FIND_FRESH, params)?;
            if !rows.is_empty() {
                return read_all(&rows, |row| Ok(Found::fresh(row.try_get(0)?, row.try_get(1)?)));
            }
            self.shared.held.store(true, Ordering::Relaxed);
        }
        let rows = self.transaction.query(&FIND_LANES, params)?;
        read_all(&rows, |row| {
            let (claimable, settled): (bool, bool) = (row.try_get(1)?, row.try_get(2)?);
            Ok(Found { lane: row.try_get(0)?, claimable, reach: settled.then_some(i64::MAX) })
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
        cursors: &[i64; marks::LANES],
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
        cursors: &[i64; marks::LANES],
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
    fn locked(
        self,
        rows: &[Row],
        limits: ClaimLimits,
        cursors: &[i64; marks::LANES],
    ) -> Result<Locked, StoreError> {
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
    pub fn head(&mut self, lane: i32, cursors: &[i64; marks::LANES]) -> Result<Option<Head>, StoreError> {
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
        cursors: &[i64; marks::LANES],
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
        let buried = connection
            .execute(&SETTLE_DEAD, &[&ids, &created_at, &attempts, &vec![connection.storable(reason)]])?;
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

impl ClaimLimits {
    /// Lanes at most of which each may have an event.
    fn max_lanes(&self) -> i32 {
        self.lanes.clamp(1, LANES.min(self.events.max(1)))
    }
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

/// Lanes locked, in an open transaction; their events are still to be read. Dropping it gives them back.
pub struct Locked {
    transaction: Transaction,
    shared: Arc<Shared>,
    /// Which lanes.
    pub lanes: Vec<i32>,
    /// The server that they are locked on.
    pub server: ServerLife,
    /// Their cursors.
    from: Vec<i64>,
    limits: ClaimLimits,
}

/// Whether a read may begin with an event that alone is larger than what a claim may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Large {
    /// It may, and then is all that the read gives.
    Alone,
    /// It may not: then the claim is of no events, and [`Claim::too_large`] says where it is.
    Refused,
}

impl Locked {
    /// Reads events of the lanes, about as many of each lane. A claim that found nothing holds no connection.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses; nothing stays locked.
    pub fn read(self, large: Large) -> Result<Claim, StoreError> {
        let Locked { transaction, shared, lanes, from, limits, .. } = self;
        let mut claim = Claim { transaction, lanes, reads: Vec::new(), events: Vec::new() };
        if claim.lanes.is_empty() {
            return Ok(claim);
        }
        let settings = &shared.settings;
        let backoff_max_ms = shared.backoff_max_ms.load(Ordering::Relaxed);
        let max_events = limits.events.max(1);
        let max_event_bytes = i64::try_from(limits.event_bytes).unwrap_or(i64::MAX);
        let params: &[&(dyn ToSql + Sync)] = &[
            &claim.lanes,
            &max_events,
            &settings.ordered,
            &(settings.ordered && settings.block_on_dead),
            &backoff_max_ms,
            &settings.max_claim_bytes,
            &from,
            &Some(max_event_bytes),
            &(large == Large::Alone),
        ];
        let read = read_events(&mut claim.transaction, &shared.held, params, limits.event_bytes)?;
        if read.is_empty() {
            claim.transaction.roll_back()?;
            return Ok(claim);
        }
        claim.reads = lane_reads(&read, &claim.lanes, usize_of(max_events));
        let held = read.iter().any(|row| row.held);
        claim.events = read.into_iter().filter_map(|row| row.event).collect();
        if held && !claim.events.is_empty() {
            claim.find_left_out(&from)?;
        }
        // Within a lane the retries came first; a key's events go out in seq order.
        claim.events.sort_by_key(|event| (event.lane, event.seq));
        failpoint!("claim.read");
        Ok(claim)
    }

    /// Gives the lanes back.
    ///
    /// # Errors
    /// The connection was lost, which gives them back as well.
    pub fn release(mut self) -> Result<(), StoreError> {
        self.transaction.roll_back()
    }
}

/// Lanes locked plus their events read, in one open transaction. Ends by [`Claim::settle`], by
/// [`Claim::release`], or by being dropped, which releases it too.
pub struct Claim {
    transaction: Transaction,
    /// The lanes locked.
    pub lanes: Vec<i32>,
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

impl LaneEnd {
    /// For lanes of which nothing was found out.
    pub fn unmoved(lanes: &[i32]) -> Vec<LaneEnd> {
        lanes.iter().map(|&lane| LaneEnd { lane, reach: marks::BEGINNING, more: false }).collect()
    }
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

    /// True when no event was read, or none is left to take.
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// The lane of the event that was too large to be read ([`Large::Refused`]) and kept the claim from having any.
    pub fn too_large(&self) -> Option<i32> {
        let cut = self.reads.iter().find(|read| read.is_cut());
        cut.filter(|_| self.is_empty()).map(|read| read.lane)
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
            reach: marks::reach(read.read_to, read.left_out, first_untouched.get(&read.lane).copied()),
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
        let Some(mut connection) = self.transaction.0.take() else {
            let written = outcomes.into_iter().filter(|(_, outcome)| **outcome != Outcome::Untouched);
            return Ok(Settled { missed: written.count() as u64, ..Settled::default() });
        };
        for (event, outcome) in outcomes {
            writes.add(event, outcome, &connection);
        }
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
    fn add(&mut self, event: &Event, outcome: &Outcome, connection: &Connection) {
        match outcome {
            Outcome::Published => self.published.add(event),
            Outcome::Retry { attempts, delay_ms, error } => {
                self.retried.add(event);
                self.retried.delays_ms.push(*delay_ms);
                self.retried.add_attempt(*attempts, connection.storable(error));
            }
            Outcome::Dead { attempts, error } => {
                self.dead.add(event);
                self.dead.add_attempt(*attempts, connection.storable(error));
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

    fn add_attempt(&mut self, attempts: u32, error: String) {
        self.attempts.push(i32::try_from(attempts).unwrap_or(i32::MAX));
        self.errors.push(error);
    }
}

/// Reads events, by the statement that suits what the last claim `held` back: the short one, which reads nothing and says
/// so where something is in retry or holds its key, or the long one, which reads whatever there is. Within our locks it
/// makes no difference when it is asked: what holds a key of our lanes is changed by nobody else meanwhile.
fn read_events(
    transaction: &mut Transaction,
    held: &AtomicBool,
    params: &[&(dyn ToSql + Sync)],
    max_event_bytes: usize,
) -> Result<Vec<ReadRow>, StoreError> {
    if !held.load(Ordering::Relaxed) {
        // The row that says that nothing was read has no lane.
        let read = transaction.query_each(&READ_FRESH, params, |row| {
            let lane: Option<i32> = row.try_get(0)?;
            lane.map(|_| read_event(row, max_event_bytes)).transpose()
        })?;
        if let Some(read) = read.into_iter().collect() {
            return Ok(read);
        }
    }
    let read = transaction.query_each(&READ_ANY, params, |row| read_event(row, max_event_bytes))?;
    held.store(read.first().is_none_or(|row| row.held), Ordering::Relaxed);
    Ok(read)
}

/// One row of what is read.
struct ReadRow {
    lane: i32,
    /// `None` in the row that says that bytes cut the lane, or the claim, short.
    event: Option<Event>,
    /// Events may have been passed over, as a retry or a dead letter holds their key.
    held: bool,
}

/// Takes in a row of what is read; a larger event than that can be no message, and has been left where it is.
fn read_event(row: &Row, max_event_bytes: usize) -> Result<ReadRow, postgres::Error> {
    let lane = row.try_get(0)?;
    let held = row.try_get(HELD)?;
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
/// lets it give (the shares are those of `read_fresh.sql`: the first lanes take what does not divide), or when
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
        let last_fresh = last_fresh.map(|event| event.seq).max().unwrap_or(marks::BEGINNING);
        reads.push(LaneRead { lane, read_to: if cut { last_fresh } else { i64::MAX }, left_out: None });
    }
    reads
}

/// The cursors of these lanes.
fn positions(lanes: &[i32], cursors: &[i64; marks::LANES]) -> Vec<i64> {
    lanes.iter().map(|&lane| cursors.get(usize_of(lane)).copied().unwrap_or(marks::BEGINNING)).collect()
}

pub(super) fn begin_claim(settings: &ClaimSettings, home: &Home) -> String {
    // `on` would take from a server that is set to wait for its replicas.
    let commit =
        if settings.synchronous_commit { "" } else { ", set_config('synchronous_commit', 'off', true)" };
    format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; \
         {CLAIM_PLANS}, set_config('idle_in_transaction_session_timeout', '{}', true), \
         set_config('statement_timeout', '{}', true){commit}, {NO_OTHER_LIMITS}, {}{SERVED_BY}",
        milliseconds(settings.idle_in_transaction_timeout),
        milliseconds(STATEMENT_TIMEOUT),
        home.of_transaction(),
    )
}

fn usize_of(n: i32) -> usize {
    usize::try_from(n).unwrap_or(0)
}
