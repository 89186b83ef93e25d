//! The rules of the protocol that a run can leave out, one at a time, and the marks as they are when one is left out.
//!
//! Most rules are broken in the world around the real [`Marks`]: it ignores what they say, or tells them something wrong.
//! Rules 2 and 4 are inside them; for these, [`Own`] keeps a `read_to` of its own beside the real one, from the same
//! samples and ends, without one of the rules, and claims begin at that. With all rules it is the real one, which a test
//! asserts.

use std::sync::Arc;

use crate::lane::marks::{BEGINNING, Basis, LaneEnd, Marks, Seen, Start};
use crate::lane::writers::{Lowest, OpenWriter, OpenWriters as Writers, ServerLife, WriterSample as Sample};

/// What is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Broken {
    Nothing,
    /// Nothing, but with a `read_to` of its own.
    NothingButOwn,
    /// Rule 2: `read_to` falls when a writer is over.
    Fall,
    /// Rule 3: reads again.
    ReadAgain,
    /// Rule 4: not past the end of what was read.
    EndOfRead,
    /// Rule 4: not past what stays unsettled.
    Unsettled,
    /// Rule 4: not past L.
    LastValue,
    /// Rule 4: not past the floors of those who are not asked.
    Unasked,
    /// Rule 4: not past what fell meanwhile.
    FellMeanwhile,
    /// Rule 5: not past any floor.
    AllFloors,
    /// Rule 5: of the sample that was taken along.
    SampleTakenAlong,
    /// Rule 6: another count of sweeps.
    Sweeps,
    /// The sample: L before the locks.
    LastValueFirst,
    /// The sample: a floor is the L of the sample before.
    FloorOfSampleBefore,
    /// The sample: also those that have no id yet.
    WithoutXid,
    /// The sample: half of one is none.
    WholeSample,
    /// The sample: a prepared transaction that turns up is not new.
    PreparedIsOld,
    /// Another life of the server forgets all.
    Life,
    /// A claim asks for the server's life.
    LifeOfClaim,
    /// What is left out is remembered.
    Remember,
    /// What is left out is looked for again when nothing holds it any more.
    Free,
    /// `settled_to` stays below what is left out.
    BelowLeftOut,
    /// A look is told at once, with nothing between.
    LookAtOnce,
    /// A lane is claimed again when the news of its last claim is there.
    NewsFirst,
    /// A claim that reads on begins where `read_to` could go.
    ReadOn,
}

/// What an instance keeps in memory.
#[derive(Debug, Clone, Hash)]
pub(super) struct Memory {
    pub(super) marks: Marks,
    own: Option<Own>,
}

impl Memory {
    pub(super) fn new(lanes: usize, own: Option<Own>) -> Memory {
        Memory { marks: Marks::new(lanes as i32), own }
    }

    pub(super) fn own(&self) -> Option<Arc<Own>> {
        self.own.clone().map(Arc::new)
    }

    pub(super) fn observe(&mut self, mut sample: Sample, broken: Broken, last_writers: &[OpenWriter]) {
        match broken {
            Broken::Life => sample.life = ServerLife::default(),
            Broken::WithoutXid => sample.writers.retain(|writer| writer.xid.is_some()),
            Broken::PreparedIsOld => {
                for writer in &mut sample.writers {
                    writer.name = writer.name.replace("-1/", "prepared/");
                }
            }
            Broken::FloorOfSampleBefore if !self.marks.is_other_life(sample.life) => {
                self.marks.observe(&Sample { writers: last_writers.to_vec(), ..sample.clone() });
            }
            _ => {}
        }
        let forgets = self.marks.observe(&sample) == Seen::OtherLife;
        if let Some(own) = &mut self.own {
            if forgets {
                own.forget();
            }
            own.observe(&sample);
        }
    }

    pub(super) fn forget(&mut self) {
        self.marks.forget();
        if let Some(own) = &mut self.own {
            own.forget();
        }
    }

    pub(super) fn claimed(&mut self, lane: usize) {
        self.marks.claimed(lane as i32);
        if let Some(own) = &mut self.own {
            own.lanes[lane].fell = i64::MAX;
        }
    }

    pub(super) fn start(&self, lane: usize) -> Start {
        let mut start = self.marks.start(lane as i32);
        if let Some(own) = &self.own {
            let read_to = own.lanes[lane].read_to;
            assert!(own.broken != Broken::NothingButOwn || read_to == start.read_to, "{self:?}");
            start.read_to = read_to;
        }
        start
    }

    pub(super) fn look_from(&self, lane: usize) -> i64 {
        match &self.own {
            Some(own) => own.lanes[lane].read_to.max(own.lanes[lane].settled_to),
            None => self.marks.look_from(lane as i32),
        }
    }

    pub(super) fn looked(&mut self, lane: usize) {
        self.marks.looked(lane as i32);
        if let Some(own) = &mut self.own {
            own.looked(lane);
        }
    }

    pub(super) fn ended(&mut self, basis: &Basis, then: Option<&Own>, end: &LaneEnd) {
        self.marks.ended(basis, end);
        if let Some((own, then)) = self.own.as_mut().zip(then) {
            own.ended(then, end);
        }
    }
}

/// The marks once more, without one rule.
#[derive(Debug, Clone, Hash)]
pub(super) struct Own {
    broken: Broken,
    epoch: u64,
    writers: Writers,
    lanes: [OwnLane; 2],
}

#[derive(Debug, Clone, Copy, Hash)]
struct OwnLane {
    read_to: i64,
    settled_to: i64,
    sweeps: Option<i32>,
    fell: i64,
}

const NEW_LANE: OwnLane = OwnLane { read_to: BEGINNING, settled_to: BEGINNING, sweeps: None, fell: i64::MAX };

impl Own {
    /// `None` for the rules that the world breaks.
    pub(super) fn new(broken: Broken) -> Option<Own> {
        use Broken::{Fall, FellMeanwhile, LastValue, NothingButOwn, Unasked};
        let inside = matches!(broken, Fall | FellMeanwhile | LastValue | NothingButOwn | Unasked);
        inside.then(|| Own { broken, epoch: 0, writers: Writers::default(), lanes: [NEW_LANE; 2] })
    }

    fn forget(&mut self) {
        (self.epoch, self.writers, self.lanes) = (self.epoch + 1, Writers::default(), [NEW_LANE; 2]);
    }

    fn observe(&mut self, sample: &Sample) {
        for floor in self.writers.observe(sample) {
            for lane in self.lanes.iter_mut().filter(|_| self.broken != Broken::Fall) {
                let floor = floor.of(lane.settled_to);
                lane.read_to = lane.read_to.min(floor);
                lane.fell = lane.fell.min(floor);
            }
        }
    }

    /// Rule 4, with what was known when a claim was made.
    fn read_to(&self, reached: i64, settled_to: i64) -> i64 {
        let without = |broken| self.broken == broken;
        let last = match self.writers.last_value() {
            None => BEGINNING,
            Some(_) if without(Broken::LastValue) => i64::MAX,
            Some(last) => last,
        };
        let unasked =
            if without(Broken::Unasked) { Lowest::default() } else { self.writers.lowest_unasked() };
        reached.min(last).min(unasked.of(settled_to))
    }

    fn looked(&mut self, lane: usize) {
        let settled_to = self.lanes[lane].settled_to;
        let to = self.read_to(i64::MAX, settled_to);
        self.lanes[lane].read_to = self.lanes[lane].read_to.max(to);
    }

    fn ended(&mut self, then: &Own, end: &LaneEnd) {
        if then.epoch != self.epoch {
            return;
        }
        let lane = &mut self.lanes[end.lane as usize];
        let swept = lane.sweeps.replace(end.row.sweeps) != Some(end.row.sweeps);
        lane.settled_to = end.row.settled_to;
        let fell = if self.broken == Broken::FellMeanwhile { i64::MAX } else { lane.fell };
        match end.reached {
            Some(reached) => lane.read_to = then.read_to(reached, end.row.settled_to).min(fell),
            None if swept => lane.read_to = BEGINNING,
            None => {}
        }
    }
}
