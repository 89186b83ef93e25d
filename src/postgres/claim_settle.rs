//! A claim with its events, and how it ends: what became of them is written, or nothing is and the lanes are given back.
//!
//! A worker settles it, in the transaction that has held the lanes since the claimer locked them, with at most three
//! statements whatever the number of events. Either all outcomes are on record when that returns, or none is. An event
//! that somebody else has settled, buried or deleted meanwhile is not written, and counted as missed. Dropping a claim
//! releases it.

use std::collections::{HashMap, HashSet};

use uuid::Uuid;

use super::StoreError;
use super::claim_lanes::{LaneEnd, LaneRead};
use super::connection::Connection;
use super::query::Query;
use super::timestamptz::Timestamptz;
use super::transaction::Transaction;
use crate::event::retry::MAX_ERROR_CHARS;
use crate::event::{Event, Outcome};
use crate::failpoint;
use crate::lane::marks;

pub(super) const SETTLE_PUBLISHED: Query = query!("settle_published", UUID_ARRAY, TIMESTAMPTZ_ARRAY);
const SETTLE_RETRIED: Query =
    query!("settle_retried", UUID_ARRAY, TIMESTAMPTZ_ARRAY, INT4_ARRAY, INT8_ARRAY, TEXT_ARRAY);
pub(super) const SETTLE_DEAD: Query =
    query!("settle_dead", UUID_ARRAY, TIMESTAMPTZ_ARRAY, INT4_ARRAY, TEXT_ARRAY);

/// Lanes locked plus their events read, in one open transaction. Ends by [`Claim::settle`], by
/// [`Claim::release`], or by being dropped, which releases it too.
pub struct Claim {
    pub(super) transaction: Transaction,
    /// The lanes locked.
    pub lanes: Vec<i32>,
    /// How each lane was read.
    pub(super) reads: Vec<LaneRead>,
    pub(super) events: Vec<Event>,
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

    /// The lane of the event that was too large to be read (`Large::Refused`) and kept the claim from having any.
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
    created_at: Vec<Timestamptz>,
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
        self.created_at.push(Timestamptz(event.created_at));
    }

    fn add_attempt(&mut self, attempts: u32, error: String) {
        self.attempts.push(i32::try_from(attempts).unwrap_or(i32::MAX));
        self.errors.push(error);
    }
}
