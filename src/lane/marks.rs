//! How far each lane is known to be settled, so that claims need not look at what is behind them.
//!
//! A lane's *cursor* is a `seq`; at or below it the lane has no fresh event (pending and not in retry), and none
//! will appear. Reads begin behind it. Without cursors a read walks over the index entries of everything that was
//! settled since the last vacuum, and while any old snapshot lives anywhere, vacuum removes none of them.
//!
//! # The protocol
//!
//! 1. **The horizon** is a `seq` at or below which no event can still appear. Sequences are not transactional: a
//!    writer can draw 7, another draw 8 and commit, and 7 commits later. A cursor at 8 would jump over 7, and the
//!    next event of 7's key would overtake it. So, about once a second while claims are being made: read L, the
//!    sequence's last value; *then* read H, the transactions that hold the lock that every INSERT takes on the
//!    table before it draws, and keeps to its end. When all of H have ended, everything up to L has appeared or
//!    never will: the horizon is L. Who began later drew more than L; who reads, or writes elsewhere, is not in H.
//!    (PREPARE TRANSACTION gives a transaction another name: a prepared one that turns up when a member of H
//!    vanishes is taken for it.)
//! 2. **A cursor moves** when a claim of its lane is settled, or when the lane was looked at, which also shows what
//!    other instances have settled. It moves up to the end of what was read without a gap: not past an event that is
//!    still fresh, be it one that was left out because a retry or a dead letter of its key holds it, or one that the
//!    claim left untouched; and never past the horizon *as it was known before the read began* ([`Basis`]). The
//!    present horizon would not do: it may cover events that appeared after the read.
//! 3. **A released or failed claim** moves nothing: its lanes' cursors stand where its read began.
//! 4. **All cursors go back to the beginning** ([`Cursors::clear`]) when a connection to the database is lost: after
//!    a crash or failover, settled events may be pending again, and the sequence may have gone back. What was read
//!    on the basis of before counts for nothing afterwards (the epoch).
//! 5. They also go back now and then for no reason: rows can be changed by hand, and a `seq` can be written that was
//!    never drawn. That is the belt to these braces, and the claimer's to time.
//!
//! Plain data and pure decisions, used by the claimer's thread alone.

use std::collections::BTreeSet;

use super::{ByLane, by_lane};

/// A cursor that is before every event.
pub const BEGINNING: i64 = i64::MIN;

/// The cursors of all lanes, and the horizon that bounds them.
#[derive(Debug, Clone)]
pub struct Cursors {
    /// By lane.
    at: ByLane<i64>,
    /// No event at or below it can still appear; [`BEGINNING`] when nothing is known.
    horizon: i64,
    /// The next horizon, once its transactions have ended.
    candidate: Option<Candidate>,
    /// The highest last value read.
    last_seq: i64,
    /// Counts the clears.
    epoch: u64,
}

/// One reading of what the horizon is made of; the last value was read before the writers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HorizonReading {
    /// L: the sequence's last value; 0 when none was drawn yet.
    pub last_seq: i64,
    /// H: names of the transactions that can have drawn a value and are still open.
    pub writers: BTreeSet<OpenWriter>,
}

/// A transaction that can have inserted events.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct OpenWriter {
    /// Unique among all transactions for as long as the server runs, until it is prepared.
    pub name: String,
    /// Prepared for two-phase commit: known by another name before.
    pub prepared: bool,
}

/// What was known when a read began. It bounds how far that read may move a cursor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Basis {
    epoch: u64,
    horizon: i64,
}

#[derive(Debug, Clone)]
struct Candidate {
    seq: i64,
    writers: BTreeSet<OpenWriter>,
    /// Prepared transactions of the last reading: those that turn up later are new.
    prepared: BTreeSet<OpenWriter>,
}

impl Default for Cursors {
    fn default() -> Cursors {
        Cursors { at: by_lane(BEGINNING), horizon: BEGINNING, candidate: None, last_seq: 0, epoch: 0 }
    }
}

impl Cursors {
    /// The cursor of each lane: read what is above it.
    pub fn positions(&self) -> &ByLane<i64> {
        &self.at
    }

    /// To be taken before a read begins, and brought back with what it found.
    pub fn basis(&self) -> Basis {
        Basis { epoch: self.epoch, horizon: self.horizon }
    }

    /// Takes in a reading. Two of them, in the order in which they were made, can make a new horizon.
    pub fn observe(&mut self, reading: HorizonReading) {
        if reading.last_seq < self.last_seq {
            // A sequence that was reset, or another server's: nothing that was known holds.
            self.clear();
        }
        self.last_seq = reading.last_seq;
        if let Some(candidate) = &mut self.candidate {
            candidate.observe(&reading.writers);
            if !candidate.writers.is_empty() {
                return;
            }
            self.horizon = self.horizon.max(candidate.seq);
            self.candidate = None;
        }
        if reading.writers.is_empty() {
            self.horizon = self.horizon.max(reading.last_seq);
        } else {
            let prepared = reading.writers.iter().filter(|writer| writer.prepared).cloned().collect();
            self.candidate = Some(Candidate { seq: reading.last_seq, writers: reading.writers, prepared });
        }
    }

    /// A read that began with `basis` found, and settling made sure, that `lane` has no fresh event up to `reach`
    /// (see [`reach`]). Returns whether that moved the lane's cursor.
    pub fn advance(&mut self, basis: Basis, lane: i32, reach: i64) -> bool {
        let cursor = usize::try_from(lane).ok().and_then(|lane| self.at.get_mut(lane));
        let to = reach.min(basis.horizon);
        match cursor {
            Some(cursor) if basis.epoch == self.epoch && *cursor < to => {
                *cursor = to;
                true
            }
            _ => false,
        }
    }

    /// Forgets everything: reads begin at the beginning again.
    pub fn clear(&mut self) {
        *self = Cursors { epoch: self.epoch + 1, ..Cursors::default() };
    }

    /// Lets all reads begin at the beginning once, and keeps the horizon, which is no less true.
    pub fn rewind(&mut self) {
        self.at = by_lane(BEGINNING);
        self.epoch += 1;
    }
}

impl Candidate {
    /// Drops the writers that have ended.
    fn observe(&mut self, open: &BTreeSet<OpenWriter>) {
        let renamed = self.writers.iter().any(|writer| !writer.prepared && !open.contains(writer));
        self.writers.retain(|writer| open.contains(writer));
        let prepared: BTreeSet<OpenWriter> = open.iter().filter(|writer| writer.prepared).cloned().collect();
        if renamed {
            self.writers.extend(prepared.difference(&self.prepared).cloned());
        }
        self.prepared = prepared;
    }
}

/// Up to where a lane has no fresh event once its claim is settled.
///
/// `read_to` is the last `seq` of the read, or `i64::MAX` when it came to the lane's end. `left_out` is the first
/// fresh event that the read passed over, `untouched` the first that the claim leaves as it was.
pub fn reach(read_to: i64, left_out: Option<i64>, untouched: Option<i64>) -> i64 {
    let before = |seq: Option<i64>| seq.map_or(i64::MAX, |seq| seq.saturating_sub(1));
    read_to.min(before(left_out)).min(before(untouched))
}

#[cfg(test)]
mod tests;
