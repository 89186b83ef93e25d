//! A claim of the model: what it has in hand, and its steps.
//!
//! It takes basis and start along; locks; reads, and again while a writer that it asked for is newly over; reads on, perhaps;
//! settles all or a part of it, with failures, or is released; and later its instance hears how it ended. Its events are sent
//! in order of `seq`, and when one fails the later ones of its key are left alone.

use std::sync::Arc;

use super::broken::{Broken, Own};
use super::database::{Disk, KEYS, Row, State};
use super::world::{Settle, World};
use crate::lane::marks::{Basis, LaneEnd, LaneRow, LeftOut, Start};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Phase {
    /// It takes a basis along, and is about to lock.
    Taken,
    /// It is about to read.
    Locked,
    /// It may settle, or read on.
    Read,
    /// Its transaction is over, and the news is on its way.
    Ended,
}

#[derive(Debug, Clone, Hash)]
pub(super) struct Claim {
    pub(super) basis: Arc<Basis>,
    pub(super) own: Option<Arc<Own>>,
    pub(super) phase: Phase,
    pub(super) reads_on: usize,
    pub(super) parts: Vec<Part>,
}

impl Claim {
    pub(super) fn has(&self, lane: usize) -> bool {
        self.parts.iter().any(|part| part.lane == lane)
    }
}

/// A lane of a claim.
#[derive(Debug, Clone, Hash)]
pub(super) struct Part {
    pub(super) lane: usize,
    /// Until it is locked.
    pub(super) start: Option<Start>,
    pub(super) row: LaneRow,
    pub(super) left_out: Arc<LeftOut>,
    /// Where the next read begins.
    pub(super) from: i64,
    /// The end of what was read.
    pub(super) end: i64,
    pub(super) events: Vec<Taken>,
    /// Fresh events that were seen behind one that holds them: `seq` and key.
    pub(super) passed: Vec<(i64, u8)>,
    pub(super) reached: Option<i64>,
}

impl Part {
    pub(super) fn new(lane: usize, start: Start) -> Part {
        Part {
            lane,
            start: Some(start),
            row: LaneRow::default(),
            left_out: Arc::default(),
            from: 0,
            end: 0,
            events: Vec::new(),
            passed: Vec::new(),
            reached: None,
        }
    }

    /// The event is among those that it has read.
    pub(super) fn has(&self, seq: i64) -> bool {
        self.events.iter().any(|taken| taken.seq == seq)
    }

    pub(super) fn end(&self) -> LaneEnd {
        let Part { lane, row, reached, ref left_out, .. } = *self;
        LaneEnd { lane: lane as i32, row, reached, left_out: left_out.clone(), more: false }
    }

    /// Nothing of a claim that is over matters but how it ended.
    pub(super) fn clear(&mut self) {
        (self.from, self.end) = (0, 0);
        self.events.clear();
        self.passed.clear();
    }
}

/// An event that a claim has read to publish it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Taken {
    pub(super) seq: i64,
    pub(super) key: u8,
    /// It is fresh, and the same read passed over an earlier fresh event of its key.
    pub(super) overtakes: bool,
}

impl World {
    /// The claimer takes along what it knows of some lanes (a bit each).
    pub(super) fn take(&mut self, instance: usize, lanes: usize) {
        let lanes: Vec<_> = (0..self.scope.lanes).filter(|lane| lanes >> lane & 1 == 1).collect();
        let instance = &mut self.instances[instance];
        let memory = instance.memory();
        let parts = lanes.iter().map(|&lane| Part::new(lane, memory.start(lane))).collect();
        let (basis, own) = (memory.marks.basis(), memory.own());
        instance.claims.push(Claim { basis, own, phase: Phase::Taken, reads_on: 0, parts });
        instance.change(|memory| lanes.iter().for_each(|&lane| memory.claimed(lane)));
    }

    /// The claim locks those of its lanes that are free, and asks which keys that were left out are free.
    pub(super) fn lock(&mut self, instance: usize, claim: usize) {
        let mut taken = self.instances[instance].claims.remove(claim);
        taken.phase = Phase::Locked;
        taken.parts.retain(|part| self.locks[part.lane].is_none());
        if self.is_of_other_life(instance) {
            return;
        }
        for part in &mut taken.parts {
            self.locks[part.lane] = Some(instance);
            part.row = self.database.lanes()[part.lane];
            if self.is_broken(Broken::Sweeps) {
                part.row.sweeps = 0;
            }
            if let Some(start) = part.start.take() {
                self.begin_part(part, &start);
            }
        }
        if !taken.parts.is_empty() {
            self.instances[instance].claims.insert(claim, taken);
        }
    }

    fn begin_part(&self, part: &mut Part, start: &Start) {
        part.from = start.from(part.row);
        if !start.holds(part.row) || self.is_broken(Broken::Remember) {
            return;
        }
        let mut left_out = LeftOut::clone(&start.left_out);
        for key in (0..KEYS.len() as u8).filter(|_| !self.is_broken(Broken::Free)) {
            if !self.database.is_held(key, i64::MAX, self.scope.dead_blocks)
                && let Some(first) = left_out.free(i64::from(key))
            {
                part.from = part.from.min(first - 1);
            }
        }
        part.left_out = left_out.into();
    }

    /// One snapshot: who is over, and, if that changes nothing, the events of each lane.
    pub(super) fn read(&mut self, instance: usize, claim: usize, bound: usize, due: bool) {
        let mut reading = self.instances[instance].claims.remove(claim);
        let Claim { basis, parts, phase, .. } = &mut reading;
        let lanes: Vec<_> = parts.iter().map(|part| (part.row.settled_to, part.from)).collect();
        let mut over = basis.to_ask(&lanes);
        over.retain(|&xid| self.database.is_over(xid) && !self.is_broken(Broken::ReadAgain));
        let mut again = false;
        for part in parts.iter_mut() {
            let from = basis.again(&over, part.row.settled_to, part.from);
            again |= from < part.from;
            part.from = from;
        }
        if !again {
            parts.iter_mut().for_each(|part| self.walk(part, bound, due));
            *phase = Phase::Read;
        }
        self.instances[instance].claims.insert(claim, reading);
    }

    fn walk(&self, part: &mut Part, bound: usize, due: bool) {
        let rows: Vec<_> = self.database.in_lane(part.lane).collect();
        let held = |row: &Row| self.database.is_held(row.key, row.seq, self.scope.dead_blocks);
        for row in rows.iter().filter(|row| due && row.state == State::Retry && !held(row)) {
            if !part.has(row.seq) {
                part.events.push(Taken { seq: row.seq, key: row.key, overtakes: false });
            }
        }
        let walked: Vec<_> = rows.iter().filter(|row| row.seq > part.from).take(bound).collect();
        for row in walked.iter().filter(|row| row.state == State::Fresh) {
            if part.has(row.seq) {
                continue;
            }
            if held(row) {
                part.passed.push((row.seq, row.key));
            } else {
                let is_earlier = |other: &Row| other.key == row.key && other.seq < row.seq;
                let is_overtaken =
                    |other: &Row| is_earlier(other) && other.is_fresh() && !part.has(other.seq);
                let overtakes = rows.iter().any(|other| is_overtaken(other));
                part.events.push(Taken { seq: row.seq, key: row.key, overtakes });
            }
        }
        let is_full = walked.len() == bound;
        let end = walked.last().filter(|_| is_full).map_or(i64::MAX, |row| row.seq);
        part.end = part.end.max(end);
    }

    /// The claim reads on under the same locks, while its first events are published.
    pub(super) fn read_on(&mut self, instance: usize, claim: usize) {
        let at_end = self.is_broken(Broken::ReadOn);
        let Claim { basis, parts, phase, reads_on: times, .. } = &mut self.instances[instance].claims[claim];
        for part in parts {
            let begin = basis.read_on(part.end, part.row.settled_to);
            part.from = if at_end { part.end } else { begin };
        }
        *times += 1;
        *phase = Phase::Locked;
    }

    pub(super) fn settle(&mut self, instance: usize, claim: usize, how: Settle) -> Result<(), String> {
        let mut settled = self.instances[instance].claims.remove(claim);
        let basis = if self.is_broken(Broken::SampleTakenAlong) {
            self.instances[instance].memory().marks.basis()
        } else {
            settled.basis.clone()
        };
        let mut index = 0;
        for part in &mut settled.parts {
            let unsettled = self.attempt(part, &mut index, how)?;
            let reached = part.end.min(unsettled - 1);
            if how.marks {
                let first = part.left_out.first().filter(|_| !self.is_broken(Broken::BelowLeftOut));
                let below = reached.min(first.map_or(i64::MAX, |first| first - 1));
                let old = part.row.settled_to;
                let settled_to = match self.scope.broken {
                    Broken::AllFloors => basis.read_to(below, old).max(old),
                    _ => basis.settled_to(below, old),
                };
                if settled_to < old {
                    return Err(format!("settled_to of lane {} falls from {old} to {settled_to}", part.lane));
                }
                self.database.lane(part.lane).settled_to = settled_to;
                if how.answered {
                    part.row.settled_to = settled_to;
                }
            }
            part.reached = how.answered.then_some(match self.scope.broken {
                Broken::EndOfRead => unsettled - 1,
                Broken::Unsettled => part.end,
                _ => reached,
            });
        }
        self.database.committed(Disk::Later);
        self.end(&mut settled);
        self.instances[instance].claims.insert(claim, settled);
        Ok(())
    }

    /// What becomes of the events of one lane; returns the first that stays fresh and is not remembered.
    fn attempt(&mut self, part: &mut Part, index: &mut usize, how: Settle) -> Result<i64, String> {
        let mut unsettled = i64::MAX;
        let mut left = std::mem::take(&mut part.passed);
        part.events.sort_by_key(|taken| taken.seq);
        let mut failed_keys = Vec::new();
        for &Taken { seq, key, overtakes } in &part.events {
            let at = *index;
            *index += 1;
            if failed_keys.contains(&key) {
                left.push((seq, key));
                continue;
            }
            let row = self.database.row(seq).filter(|row| row.state != State::Published);
            let Some(row) = row else { return Err(format!("{seq} was settled by another")) };
            if at >= how.sent {
                if row.state == State::Fresh {
                    unsettled = unsettled.min(seq);
                }
                continue;
            }
            if overtakes {
                return Err(format!("order: {seq} overtakes an earlier event of {}", KEYS[usize::from(key)]));
            }
            row.by_hand = false;
            if how.failed.rotate_right(at as u32) & 1 == 0 {
                row.state = State::Published;
            } else {
                row.state = how.failed_is;
                failed_keys.push(key);
            }
        }
        let left_out = Arc::make_mut(&mut part.left_out);
        for (seq, key) in left {
            let fresh = self.database.row(seq).is_some_and(|row| row.state == State::Fresh);
            if self.is_broken(Broken::Remember) || !fresh {
                continue;
            }
            // Its key may be free by now: the next claim asks.
            let has_room = how.room || left_out.keys().contains(&i64::from(key));
            if !has_room || !left_out.remember(i64::from(key), seq) {
                unsettled = unsettled.min(seq);
            }
        }
        Ok(unsettled)
    }

    /// The claim's transaction is over.
    fn end(&mut self, claim: &mut Claim) {
        for part in &mut claim.parts {
            part.clear();
            self.locks[part.lane] = None;
        }
        claim.phase = Phase::Ended;
    }

    /// It is rolled back, by its instance or because its connection broke.
    pub(super) fn release(&mut self, instance: usize, claim: usize) {
        let mut released = self.instances[instance].claims.remove(claim);
        self.end(&mut released);
        self.instances[instance].claims.insert(claim, released);
    }

    pub(super) fn news(&mut self, instance: usize, claim: usize) {
        let Claim { basis, own, parts, .. } = self.instances[instance].claims.remove(claim);
        self.instances[instance].change(|memory| {
            for part in &parts {
                memory.ended(&basis, own.as_deref(), &part.end());
            }
        });
    }
}
