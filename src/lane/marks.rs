//! Where a read of a lane begins, so that a claim need not walk over what is published: the two marks of each lane.
//!
//! The index that claims read has an entry for every event, published or not: only so does a settle touch no index. A read
//! that began at the front would walk over everything (some 2 µs for each event passed). So each lane has two marks.
//!
//! - **`settled_to`** stands in `outbox_lanes`, for all instances: no event at or below it can ever appear any more, and
//!   all of them are settled, in retry or dead. It never falls, but for a find of the sweep or a reset.
//! - **`read_to`** is in the memory of an instance: every event at or below it that was *visible* to the lane's last read
//!   is settled, in retry, dead, or remembered as left out. It may fall.
//!
//! # The protocol
//!
//! What can still appear below `read_to` comes from transactions that had drawn a number and were open at that read: the
//! open writers (`writers.rs`). The claimer observes a sample of them about every 100 ms under load, and never waits for one.
//!
//! 1. A claim takes the latest whole sample along (as a [`Basis`]), begins at the higher of the two marks, and walks a bounded
//!    number of index entries. Where it reached that bound `read_to` moves all the same, or a lane with a long past would
//!    never come to an end.
//! 2. When a sample no longer has a writer, `read_to` falls to that writer's floor in every lane, also in lanes that are
//!    claimed now: its events may have appeared there. Left out, they stay behind the mark for ever.
//! 3. A writer may end between the sample and the claim's read. Then an event of its may be visible, below the read's begin,
//!    while a later one of the same key is read. So the read says which of the writers it was asked for are over at its own
//!    snapshot, and the worker reads again from their floors, under the same locks. An aborted one counts as over, too; that
//!    costs a needless read. Left out, a key is overtaken.
//! 4. When the claim is settled, `read_to` is the lowest of: the end of what was read; the event before the first that stays
//!    unsettled; L of the sample that it took along (who draws later is in no sample yet); the floors of that sample's
//!    writers that are not asked for (young, or without an id); and whatever fell meanwhile. A claim that was released,
//!    or failed, leaves it where it was.
//! 5. `settled_to` rises, in the claim's own transaction, to the lowest of the same and the floors of *all* writers of that
//!    sample. A later sample would not do: it need not have a writer whose events appeared after the read.
//! 6. `sweeps` counts the finds of the sweep. The statement that locks a lane returns it, and another count than the last
//!    one drops the lane's `read_to`. So does the first one: what looks had found before may be older than a find. A row
//!    that was lost and put back has a count that nobody knows.
//!
//! A claim that reads on under its locks, while its first events are published, does not begin at the end of what it has read
//! but where `read_to` could go ([`Basis::read_on`]), and asks for the writers anew, as of rule 3. Events that it has in hand it
//! then meets again.
//!
//! Another life of the server, or of the sequence, forgets all: marks, writers and samples. What a claim brings home from
//! before ([`Basis`] has an epoch) moves nothing. A sample may learn of it too late, so each claim and each look asks for the
//! life in its own transaction ([`Marks::is_other_life`]): `settled_to` of another life would be written for good.
//!
//! An event can be fresh and not publishable, as an earlier event of its key is in retry, or dead and blocking. Such events
//! must not pin `read_to`, or every read would begin at the first of them. So they are *left out*: remembered by key, with the first
//! one's `seq` ([`LeftOut`]). Before a claim reads, it asks which of these keys are free by now, and begins below their first event. What
//! does not fit into the memory pins the mark, and `settled_to` stays below all of them.
//!
//! Plain data and pure decisions, used by the claimer's thread alone; [`Basis`] and [`Start`] travel with a claim.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::LANES;
use super::writers::{Floor, Lowest, OpenWriters, ServerLife, WriterSample};

/// A mark that is before every event.
pub const BEGINNING: i64 = i64::MIN;
/// Keys of one lane whose events are remembered as left out; more of them pin the lane's mark.
const LEFT_OUT_MAX: usize = 1_000;

/// The marks of all lanes, as one instance knows them, and the open writers that bound them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Marks {
    life: Option<ServerLife>,
    /// Counts how often everything was forgotten.
    epoch: u64,
    writers: OpenWriters,
    lanes: Vec<Lane>,
    /// What the next claim takes along; made anew by each sample.
    basis: Arc<Basis>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Lane {
    read_to: i64,
    /// As the last lock returned it: what other instances wrote since may be higher.
    settled_to: i64,
    sweeps: Option<i32>,
    left_out: Arc<LeftOut>,
    /// While a claim is under way: the lowest fall of `read_to` since it began.
    fell: Option<i64>,
    /// Where `settled_to` may go since the last claim: that is true for good, but for another life or a find of the sweep.
    settled: i64,
}

impl Default for Lane {
    fn default() -> Lane {
        Lane {
            read_to: BEGINNING,
            settled_to: BEGINNING,
            sweeps: None,
            left_out: Arc::default(),
            fell: None,
            settled: BEGINNING,
        }
    }
}

/// What was known of the writers when a claim was made: the sample that it took along.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Basis {
    epoch: u64,
    /// L; before the first sample nothing moves.
    last_value: Option<i64>,
    asked: Vec<(u64, Floor)>,
    unasked: Lowest,
    all: Lowest,
}

impl Basis {
    /// The ids of the writers whose end matters to a read of lanes, each with its shared mark and where its read begins.
    pub fn to_ask(&self, lanes: &[(i64, i64)]) -> Vec<u64> {
        let matters = |floor: Floor| lanes.iter().any(|&(settled_to, from)| floor.of(settled_to) < from);
        self.asked.iter().filter(|(_, floor)| matters(*floor)).map(|(xid, _)| *xid).collect()
    }

    /// Where a read of a lane begins once the writers `over` have ended, which began at `from` before.
    pub fn again(&self, over: &[u64], settled_to: i64, from: i64) -> i64 {
        let over = self.asked.iter().filter(|(xid, _)| over.contains(xid));
        over.map(|(_, floor)| floor.of(settled_to)).fold(from, i64::min)
    }

    /// Rule 4, but for what fell meanwhile: where `read_to` may go when everything up to `reached` is settled.
    pub fn read_to(&self, reached: i64, settled_to: i64) -> i64 {
        self.last_value.map_or(BEGINNING, |last| reached.min(last)).min(self.unasked.of(settled_to))
    }

    /// Where a claim begins that reads on under the same locks, after a first read that came to `end`. Later than that a writer
    /// that nobody asks for, or that is in no sample, may have committed meanwhile, and after it another event of its key.
    pub fn read_on(&self, end: i64, settled_to: i64) -> i64 {
        self.read_to(end, settled_to).max(settled_to)
    }

    /// Rule 5: where `settled_to` may go when everything up to `reached` is settled. Never falls.
    pub fn settled_to(&self, reached: i64, settled_to: i64) -> i64 {
        self.read_to(reached, settled_to).min(self.all.of(settled_to)).max(settled_to)
    }
}

/// What an instance remembers of a lane when it claims it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Start {
    /// Its own mark.
    pub read_to: i64,
    sweeps: Option<i32>,
    /// What it left out below that.
    pub left_out: Arc<LeftOut>,
}

impl Start {
    /// Where the read begins, given what locking the lane returned.
    pub fn from(&self, locked: LaneRow) -> i64 {
        if self.holds(locked) { self.read_to.max(locked.settled_to) } else { locked.settled_to }
    }

    /// Rule 6: the sweep has found nothing since. What is known from looks alone does not hold, as they do not tell.
    pub fn holds(&self, locked: LaneRow) -> bool {
        self.sweeps == Some(locked.sweeps)
    }
}

/// A row of `outbox_lanes`, as the statement that locks it returns it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct LaneRow {
    /// The shared mark.
    pub settled_to: i64,
    /// How often the sweep has found something in the lane.
    pub sweeps: i32,
}

/// Keys of a lane, by their hash, of which fresh events were read and left, as an earlier event of the key holds them: each
/// with the first such `seq`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct LeftOut(BTreeMap<i64, i64>);

impl LeftOut {
    /// Remembers an event; returns false if there is no room for its key.
    #[must_use]
    pub fn remember(&mut self, key_hash: i64, seq: i64) -> bool {
        if let Some(first) = self.0.get_mut(&key_hash) {
            *first = seq.min(*first);
            return true;
        }
        let room = self.0.len() < LEFT_OUT_MAX;
        if room {
            self.0.insert(key_hash, seq);
        }
        room
    }

    /// Events of this key were left out.
    pub fn has(&self, key_hash: i64) -> bool {
        self.0.contains_key(&key_hash)
    }

    /// Forgets a key, which nothing holds any more; returns its first event.
    pub fn free(&mut self, key_hash: i64) -> Option<i64> {
        self.0.remove(&key_hash)
    }

    /// The hashes of the keys.
    pub fn keys(&self) -> Vec<i64> {
        self.0.keys().copied().collect()
    }

    /// The first event of all.
    pub fn first(&self) -> Option<i64> {
        self.0.values().min().copied()
    }

    /// The lower of `end` and what is right before the first event of all.
    pub fn before_first(&self, end: i64) -> i64 {
        self.first().map_or(end, |first| end.min(first.saturating_sub(1)))
    }

    /// Nothing was left out.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// How the claim of a lane ended, for its marks.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LaneEnd {
    /// The lane.
    pub lane: i32,
    /// What locking it returned, or what the claim has written since.
    pub row: LaneRow,
    /// Everything visible up to here is settled, in retry, dead or in `left_out`; `None` when nothing was found out.
    pub reached: Option<i64>,
    /// What was left out.
    pub left_out: Arc<LeftOut>,
    /// The lane may have more to claim at once, as a limit of the claim cut it short or an event stays untouched.
    pub more: bool,
}

/// What an instance leaves to the next one when it stops.
#[derive(Debug, Clone)]
pub struct KeptMarks {
    /// The server and the sequence that they belong to.
    pub life: ServerLife,
    /// Which lanes.
    pub lanes: Vec<i32>,
    /// The shared mark of each.
    pub marks: Vec<i64>,
    /// How often the sweep had found something in each.
    pub sweeps: Vec<i32>,
}

/// What a sample showed that matters to whoever looks for events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// No writer has ended since the last one.
    NoEnd,
    /// Writers have ended: their events may have appeared below the marks, which fell.
    Ends,
    /// It is of another life, and everything was forgotten.
    OtherLife,
}

impl Default for Marks {
    fn default() -> Marks {
        Marks::new(LANES)
    }
}

impl Marks {
    /// Nothing is known of so many lanes.
    pub fn new(lanes: i32) -> Marks {
        Marks {
            life: None,
            epoch: 0,
            writers: OpenWriters::default(),
            lanes: (0..lanes).map(|_| Lane::default()).collect(),
            basis: Arc::default(),
        }
    }

    /// Takes in a sample, newer than all before.
    pub fn observe(&mut self, sample: &WriterSample) -> Seen {
        let went_back = self.writers.last_value().is_some_and(|last| sample.last_value < last);
        let forgets = self.is_other_life(sample.life) || went_back;
        if forgets {
            self.forget();
        }
        self.life = Some(sample.life);
        let ended = self.writers.observe(sample);
        for &floor in &ended {
            for lane in &mut self.lanes {
                let floor = floor.of(lane.settled_to);
                lane.read_to = lane.read_to.min(floor);
                lane.fell = lane.fell.map(|fell| fell.min(floor));
            }
        }
        self.basis = Arc::new(Basis {
            epoch: self.epoch,
            last_value: self.writers.last_value(),
            asked: self.writers.asked(),
            unasked: self.writers.lowest_unasked(),
            all: self.writers.lowest(),
        });
        match (forgets, ended.is_empty()) {
            (true, _) => Seen::OtherLife,
            (false, false) => Seen::Ends,
            (false, true) => Seen::NoEnd,
        }
    }

    /// Whether what is known belongs to another life than this. Knowing nothing belongs to every life.
    pub fn is_other_life(&self, life: ServerLife) -> bool {
        self.life.is_some_and(|known| known != life)
    }

    /// A server was met before the first sample, or after everything was forgotten.
    pub fn belong_to(&mut self, life: ServerLife) {
        self.life = Some(life);
    }

    /// Forgets everything, also what claims bring home that are under way.
    pub fn forget(&mut self) {
        let epoch = self.epoch + 1;
        let basis = Arc::new(Basis { epoch, ..Basis::default() });
        *self = Marks { epoch, basis, ..Marks::new(self.lanes.len() as i32) };
    }

    /// The sample that a claim takes along.
    pub fn basis(&self) -> Arc<Basis> {
        self.basis.clone()
    }

    /// What a claim of the lane takes along.
    pub fn start(&self, lane: i32) -> Start {
        let Lane { read_to, sweeps, left_out, .. } = self.lane(lane);
        Start { read_to: *read_to, sweeps: *sweeps, left_out: left_out.clone() }
    }

    /// The marks of the lane for a look: its own one, and how often the sweep had found something when it was claimed last; -1
    /// before the first claim.
    pub fn look_start(&self, lane: i32) -> (i64, i32) {
        let lane = self.lane(lane);
        (lane.read_to, lane.sweeps.unwrap_or(-1))
    }

    /// The higher of the lane's two marks, as far as they are known.
    pub fn look_from(&self, lane: i32) -> i64 {
        self.lane(lane).read_to.max(self.lane(lane).settled_to)
    }

    /// A claim takes the lane. The end of its last claim was told before, or what falls now would not reach its mark.
    pub fn claimed(&mut self, lane: i32) {
        self.lane_mut(lane).fell = Some(i64::MAX);
    }

    /// A claim of the lane has ended that took `basis` along.
    pub fn ended(&mut self, basis: &Basis, end: &LaneEnd) {
        if basis.epoch != self.epoch {
            return;
        }
        let lane = self.lane_mut(end.lane);
        let fell = lane.fell.take().unwrap_or(i64::MAX);
        let swept = lane.sweeps.replace(end.row.sweeps) != Some(end.row.sweeps);
        lane.settled_to = end.row.settled_to;
        match end.reached {
            Some(reached) => {
                lane.read_to = basis.read_to(reached, end.row.settled_to).min(fell);
                lane.left_out = end.left_out.clone();
                lane.settled = basis.settled_to(lane.left_out.before_first(reached), end.row.settled_to);
            }
            None if swept => {
                lane.read_to = BEGINNING;
                lane.left_out = Arc::default();
                lane.settled = BEGINNING;
            }
            None => {}
        }
    }

    /// A look found nothing fresh in the lane above [`look_from`](Marks::look_from): its mark may rise, and never falls. It is
    /// told at once: a sample that was observed since the look, or a claim that ended, may have let the mark fall.
    pub fn looked(&mut self, lane: i32) {
        let basis = self.basis.clone();
        let lane = self.lane_mut(lane);
        lane.read_to = lane.read_to.max(basis.read_to(i64::MAX, lane.settled_to));
        lane.settled =
            lane.settled.max(basis.settled_to(lane.left_out.before_first(i64::MAX), lane.settled_to));
    }

    /// The marks that may be written for all instances, of lanes that were claimed. `None` where no server was met, or none has
    /// risen.
    pub fn to_keep(&self) -> Option<KeptMarks> {
        let mut kept =
            KeptMarks { life: self.life?, lanes: Vec::new(), marks: Vec::new(), sweeps: Vec::new() };
        for (lane, known) in (0..).zip(&self.lanes) {
            if let Some(sweeps) = known.sweeps.filter(|_| known.settled > known.settled_to) {
                kept.lanes.push(lane);
                kept.marks.push(known.settled);
                kept.sweeps.push(sweeps);
            }
        }
        (!kept.lanes.is_empty()).then_some(kept)
    }

    /// L of the last sample; `None` before the first.
    pub fn last_value(&self) -> Option<i64> {
        self.writers.last_value()
    }

    fn lane(&self, lane: i32) -> &Lane {
        &self.lanes[lane as usize]
    }

    fn lane_mut(&mut self, lane: i32) -> &mut Lane {
        &mut self.lanes[lane as usize]
    }
}
