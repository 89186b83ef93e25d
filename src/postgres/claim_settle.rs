//! A claim with its events, and how it ends: what became of them is written, or nothing is and the lanes are given back.
//!
//! A worker settles it, in the transaction that has held the lanes since the claimer locked them, with few statements
//! whatever the number of events; the shared marks of its lanes go with them, where they may be written. Either all of that is on
//! record when it returns, or none is. An event that somebody else has settled, buried or deleted meanwhile is not
//! written, and counted as missed. Dropping a claim releases it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use uuid::Uuid;

use super::StoreError;
use super::claim_reader::{ClaimLane, Reader};
use super::connection::Connection;
use super::query::Query;
use super::timestamptz::Timestamptz;
use super::transaction::Transaction;
use crate::event::retry::MAX_ERROR_CHARS;
use crate::event::{Event, EventRow, Outcome, Place};
use crate::failpoint;
use crate::lane::marks::{Basis, LaneEnd, LaneRow};

pub(super) const SETTLE_PUBLISHED: Query =
    query!("settle_published", TID_ARRAY, TIMESTAMPTZ_ARRAY, UUID_ARRAY);
const SETTLE_MOVED: Query = query!("settle_moved", TIMESTAMPTZ_ARRAY, UUID_ARRAY);
const SETTLE_RETRIED: Query =
    query!("settle_retried", UUID_ARRAY, TIMESTAMPTZ_ARRAY, INT4_ARRAY, INT8_ARRAY, TEXT_ARRAY);
pub(super) const SETTLE_DEAD: Query =
    query!("settle_dead", UUID_ARRAY, TIMESTAMPTZ_ARRAY, INT4_ARRAY, TEXT_ARRAY);
const WRITE_MARKS: Query = query!("write_marks", INT4_ARRAY, INT8_ARRAY, INT8);

/// Lanes locked plus their events read, in one open transaction. Ends by [`Claim::settle`], by
/// [`Claim::release`], or by being dropped, which releases it too.
pub struct Claim {
    pub(super) transaction: Transaction,
    pub(super) reader: Reader,
    pub(super) events: Vec<Event>,
}

impl Claim {
    /// The events read, for whoever publishes them; by lane, each lane in `seq` order. Empty the second time.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// The lanes locked.
    pub fn lanes(&self) -> Vec<i32> {
        self.reader.lanes.iter().map(|lane| lane.lane).collect()
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

    /// The lane whose first event is too large to be read beside others (`Large::Refused`).
    pub fn too_large(&self) -> Option<i32> {
        self.reader.too_large()
    }

    /// Reads the events that come next in the lanes that a limit has cut short, under the same locks; all that was read
    /// before must have been published. `None` when that could lose order, or when there is nothing to go on with.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses: nothing of the claim can be settled any more.
    pub fn read_on(&mut self) -> Result<Option<Vec<Event>>, StoreError> {
        self.reader.read_on(&mut self.transaction)
    }

    /// What was known of the writers when the claim was made.
    pub fn basis(&self) -> Arc<Basis> {
        self.reader.basis.clone()
    }

    /// How the claim ends for its lanes; `untouched` are the events that stay as they were.
    pub fn ends<'e>(&self, untouched: impl IntoIterator<Item = &'e EventRow>) -> Vec<LaneEnd> {
        let mut first_untouched: HashMap<i32, i64> = HashMap::new();
        let mut untouched_lanes = HashSet::new();
        for event in untouched {
            untouched_lanes.insert(event.lane);
            if !event.in_retry {
                let seq = first_untouched.entry(event.lane).or_insert(event.seq);
                *seq = event.seq.min(*seq);
            }
        }
        let end = |lane: &ClaimLane| LaneEnd {
            lane: lane.lane,
            row: lane.locked,
            reached: Some(before(
                lane.end,
                first_untouched.get(&lane.lane).copied().into_iter().chain(lane.pinned),
            )),
            left_out: Arc::new(lane.left_out.clone()),
            more: lane.more || untouched_lanes.contains(&lane.lane),
        };
        self.reader.lanes.iter().map(end).collect()
    }

    /// Writes what became of the events, and marks that may be written, and commits. An event without an outcome stays as it
    /// is, like an `Untouched` one. `ends` is what [`Claim::ends`] said, and comes back with the marks as they are now.
    ///
    /// # Errors
    /// The connection was lost or PostgreSQL refuses: nothing of the claim is settled, and what was published
    /// will be published again (a lost COMMIT may have happened all the same).
    pub fn settle<'e>(
        mut self,
        outcomes: impl IntoIterator<Item = (&'e EventRow, &'e Outcome)>,
        ends: &mut [LaneEnd],
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
        self.write_marks(&mut connection, ends)?;
        failpoint!("settle.written");
        connection.batch("COMMIT")?;
        failpoint!("settle.committed");
        Ok(settled)
    }

    /// Writes the shared marks that have risen, of lanes whose mark was not written for a while.
    fn write_marks(&self, connection: &mut Connection, ends: &mut [LaneEnd]) -> Result<(), StoreError> {
        let (mut lanes, mut marks) = (Vec::new(), Vec::new());
        for end in ends.iter_mut() {
            let may = self.reader.lanes.iter().any(|lane| lane.lane == end.lane && lane.may_mark);
            let Some(reached) = end.reached.filter(|_| may) else { continue };
            let settled_to = end.row.settled_to;
            let mark = self.reader.basis.settled_to(end.left_out.before_first(reached), settled_to);
            if mark > settled_to {
                end.row = LaneRow { settled_to: mark, ..end.row };
                lanes.push(end.lane);
                marks.push(mark);
            }
        }
        if !lanes.is_empty() {
            connection.execute(&WRITE_MARKS, &[&lanes, &marks, &self.reader.sequence_file])?;
        }
        Ok(())
    }

    /// Rolls the claim back: nothing was attempted, and the next claim may have its lanes.
    ///
    /// # Errors
    /// The connection was lost, which releases the claim as well.
    pub fn release(mut self) -> Result<(), StoreError> {
        self.transaction.roll_back()
    }
}

/// The lower of `end` and what is right before the first of `events`.
fn before(end: i64, events: impl IntoIterator<Item = i64>) -> i64 {
    events.into_iter().map(|seq| seq.saturating_sub(1)).fold(end, i64::min)
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
    places: Vec<Place>,
    ids: Vec<Uuid>,
    created_at: Vec<Timestamptz>,
    attempts: Vec<i32>,
    delays_ms: Vec<i64>,
    errors: Vec<String>,
}

impl Writes {
    fn add(&mut self, event: &EventRow, outcome: &Outcome, connection: &Connection) {
        match outcome {
            Outcome::Published => self.published.add(event),
            Outcome::Retry { attempts, delay_ms, error } => {
                self.retried.add(event);
                self.retried.delays_ms.push(*delay_ms);
                self.retried.add_attempt(*attempts, connection.storable(error, MAX_ERROR_CHARS));
            }
            Outcome::Dead { attempts, error } => {
                self.dead.add(event);
                self.dead.add_attempt(*attempts, connection.storable(error, MAX_ERROR_CHARS));
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
            let Rows { places, created_at, ids, .. } = published;
            settled.published = connection.execute(&SETTLE_PUBLISHED, &[places, created_at, ids])?;
            if settled.published < ids.len() as u64 {
                settled.published += connection.execute(&SETTLE_MOVED, &[created_at, ids])?;
            }
        }
        if !retried.ids.is_empty() {
            let Rows { ids, created_at, attempts, delays_ms, errors, .. } = retried;
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
    fn add(&mut self, event: &EventRow) {
        self.places.push(event.place);
        self.ids.push(event.id);
        self.created_at.push(Timestamptz(event.created_at));
    }

    fn add_attempt(&mut self, attempts: u32, error: String) {
        self.attempts.push(i32::try_from(attempts).unwrap_or(i32::MAX));
        self.errors.push(error);
    }
}
