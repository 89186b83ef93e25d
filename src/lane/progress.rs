//! How far each lane is read, for the threads that count what is left, or look for what was passed.
//!
//! The claimer writes it, and the others read it; neither waits for the other longer than for a copy. What a reader sees may be a
//! moment old, which is as good for a count; who judges by it asks when the sample was taken that it knows.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::marks::{BEGINNING, LeftOut, Marks};
use super::{ByLane, LANES, by_lane};

/// Where the next read of each lane begins. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct LaneProgress(Arc<Mutex<Reached>>);

/// What the claimer knew of all lanes at one moment.
#[derive(Debug, Clone)]
pub struct Reached {
    /// By lane: no event at or below it waits, but for what is in retry, dead or left out.
    pub marks: ByLane<i64>,
    /// Every writer whose events were visible before then, and which had ended, is taken into account. `None` before the first sample.
    pub sampled_at: Option<Instant>,
    left_out: ByLane<Arc<LeftOut>>,
    sweeps: ByLane<i32>,
}

impl Default for Reached {
    fn default() -> Reached {
        let left_out = std::array::from_fn(|_| Arc::default());
        Reached { marks: by_lane(BEGINNING), sampled_at: None, left_out, sweeps: by_lane(-1) }
    }
}

impl Reached {
    /// The lane's mark.
    pub fn mark(&self, lane: i32) -> i64 {
        usize::try_from(lane).ok().and_then(|lane| self.marks.get(lane)).copied().unwrap_or(BEGINNING)
    }

    /// How often the sweep had found something in the lane when it was claimed last, for which the mark counts; -1 before the first
    /// claim.
    pub fn sweeps(&self, lane: i32) -> i32 {
        usize::try_from(lane).ok().and_then(|lane| self.sweeps.get(lane)).copied().unwrap_or(-1)
    }

    /// By lane, where counting what waits begins: below the mark as well, where events were left out.
    pub fn counts_from(&self) -> Vec<i64> {
        self.marks.iter().zip(&self.left_out).map(|(&mark, left_out)| left_out.before_first(mark)).collect()
    }

    /// Events of this key wait below the mark, and the claimer remembers them.
    pub fn leaves_out(&self, lane: i32, key_hash: i64) -> bool {
        let left_out = usize::try_from(lane).ok().and_then(|lane| self.left_out.get(lane));
        left_out.is_some_and(|left_out| left_out.has(key_hash))
    }
}

impl LaneProgress {
    /// Writes down what the claimer knows now; the last whole sample that it knows was asked for at `sampled_at`.
    pub fn set(&self, marks: &Marks, sampled_at: Option<Instant>) {
        let mut reached = self.lock();
        reached.sampled_at = sampled_at;
        let Reached { marks: at, left_out, sweeps, .. } = &mut *reached;
        for (((lane, at), left_out), sweeps) in (0..LANES).zip(at).zip(left_out).zip(sweeps) {
            *at = marks.look_from(lane);
            *sweeps = marks.look_start(lane).1;
            left_out.clone_from(&marks.start(lane).left_out);
        }
    }

    /// What was written down last.
    pub fn reached(&self) -> Reached {
        self.lock().clone()
    }

    /// Nothing that is done under it can fail half way.
    fn lock(&self) -> MutexGuard<'_, Reached> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lane::marks::{LaneEnd, LaneRow};
    use crate::lane::writers::WriterSample;

    const LANE: i32 = 7;

    /// A claim of the lane has read up to `reached`, but for a key that waits.
    fn claimed(marks: &mut Marks, reached: i64) {
        marks.claimed(LANE);
        let row = LaneRow { settled_to: 10, sweeps: 0 };
        let mut left_out = LeftOut::default();
        assert!(left_out.remember(99, 40));
        let left_out = Arc::new(left_out);
        let end = LaneEnd { lane: LANE, row, reached: Some(reached), left_out, more: false };
        let basis = marks.basis();
        marks.ended(&basis, &end);
    }

    #[test]
    fn what_the_claimer_knows_is_there_for_others() {
        let (progress, now) = (LaneProgress::default(), Instant::now());
        assert_eq!((progress.reached().mark(LANE), progress.reached().sampled_at), (BEGINNING, None));
        let mut marks = Marks::default();
        marks.observe(&WriterSample { last_value: 100, ..WriterSample::default() });
        claimed(&mut marks, 60);
        progress.set(&marks, Some(now));
        let reached = progress.reached();
        assert_eq!((reached.mark(LANE), reached.mark(8), reached.mark(64)), (60, BEGINNING, BEGINNING));
        assert_eq!((reached.sweeps(LANE), reached.sweeps(8), reached.sweeps(64)), (0, -1, -1));
        assert_eq!(reached.counts_from()[LANE as usize], 39, "what was left out waits as well");
        assert!(reached.leaves_out(LANE, 99) && !reached.leaves_out(LANE, 98) && !reached.leaves_out(8, 99));
        assert_eq!(reached.sampled_at, Some(now));
    }
}
