//! The promises that the model checks, after every step as far as that shows them, and by letting a copy come to rest.
//!
//! - **Nothing is lost.** Were all transactions over, and a sample observed, then every fresh event is above the point
//!   where the next claim begins, or is remembered as left out. And at rest a finite number of claims publishes everything.
//! - **Order.** No fresh event is sent before a fresh earlier one of its key that was visible to the read that took it (in
//!   `world.rs`). One in retry may be: when it was first sent the other was not visible, so their transactions overlapped.
//! - **`settled_to`** never passes an event that is fresh, or a number that can still appear; and no claim lets it fall.
//!
//! Rows that were set back by hand count for none of these, but the sweep finds them all.

use std::sync::Arc;

use super::broken::Broken;
use super::claim::Phase;
use super::database::{Disk, Row, State};
use super::world::{Settle, Step, World};
use crate::lane::marks::LeftOut;
use crate::lane::writers::WriterSample as Sample;

impl World {
    pub(super) fn check(&self, step: Step) -> Result<(), String> {
        match step {
            Step::Observe { instance } | Step::News { instance, .. } | Step::Look { instance, .. } => {
                self.check_marks(instance)
            }
            Step::Settle { .. } => self.check_settled_to(),
            Step::CrashServer { .. } => self.check_all(),
            _ => Ok(()),
        }
    }

    pub(super) fn check_all(&self) -> Result<(), String> {
        self.check_settled_to()?;
        (0..self.instances.len()).try_for_each(|instance| self.check_marks(instance))
    }

    fn check_settled_to(&self) -> Result<(), String> {
        for (lane, row) in self.database.lanes().iter().enumerate() {
            let mut fresh = self.database.in_lane(lane).filter(|row| row.is_fresh()).map(|row| row.seq);
            let passed = fresh.find(|seq| *seq <= row.settled_to);
            let passed = passed.or(self.database.to_appear().find(|seq| *seq <= row.settled_to));
            if let Some(seq) = passed {
                return Err(format!("settled_to of lane {lane} is {} and passes {seq}", row.settled_to));
            }
        }
        Ok(())
    }

    /// What the marks of an instance would be if all transactions were over now, and it knew that.
    fn check_marks(&self, instance: usize) -> Result<(), String> {
        let mut then = self.instances[instance].memory().clone();
        let (life, last_value) = (self.database.life, self.database.sequence());
        then.observe(Sample { life, last_value, writers: Vec::new() }, self.scope.broken, &[]);
        for lane in 0..self.scope.lanes {
            let (start, mut row) = (then.start(lane), self.database.lanes()[lane]);
            if self.is_broken(Broken::Sweeps) {
                row.sweeps = 0;
            }
            let from = start.from(row);
            let left_out = if start.holds(row) { start.left_out } else { Arc::default() };
            let first = |row: &Row| LeftOut::clone(&left_out).free(i64::from(row.key));
            let is_lost = |row: &&Row| {
                row.is_fresh() && row.seq <= from && first(row).is_none_or(|first| first > row.seq)
            };
            let lost = self.database.in_lane(lane).find(is_lost).map(|row| row.seq);
            if let Some(seq) = lost.or(self.database.to_appear().find(|seq| *seq <= from)) {
                return Err(format!("{seq} is lost: instance {instance} begins at {from} in lane {lane}"));
            }
        }
        Ok(())
    }

    /// Lets copies come to rest, each with one of the instances alone: all transactions commit, claims are released, a
    /// sample is observed; and then claims publish all there is, and the sweep finds what they do not know of.
    pub(super) fn check_rest(&self) -> Result<(), String> {
        (0..self.instances.len()).try_for_each(|instance| self.clone().rest(instance))
    }

    fn rest(&mut self, instance: usize) -> Result<(), String> {
        for other in (0..self.instances.len()).filter(|other| *other != instance) {
            self.crash_instance(other);
        }
        self.instances[instance].half = None;
        self.instances[instance].claims.retain(|claim| claim.phase != Phase::Taken);
        while let Some(claim) = self.instances[instance].claims.first() {
            let over = claim.phase == Phase::Ended;
            self.step(match over {
                true => Step::News { instance, claim: 0 },
                false => Step::Release { instance, claim: 0 },
            })?;
        }
        for slot in 0..self.scope.slots {
            self.step(Step::Commit { slot, disk: Disk::Waits })?;
        }
        while self.database.prepared() > 0 {
            self.step(Step::CommitPrepared { index: 0 })?;
        }
        if self.instances[instance].sample.is_some() {
            self.step(Step::Observe { instance })?;
        }
        self.step(Step::Sample { instance })?;
        self.step(Step::SampleRest { instance })?;
        self.step(Step::Observe { instance })?;
        for seq in self.rows_that(|row| row.state == State::Dead) {
            self.revive(seq);
        }
        self.claim_until(instance, |row| row.by_hand)?;
        while let Some(seq) = self.rows_that(|row| row.state != State::Published).pop() {
            let key = self.database.row(seq).map_or(0, |row| row.key);
            self.step(Step::Sweep { instance, lane: self.database.lane_of(key) })?;
            self.claim_until(instance, |row| row.seq != seq)?;
        }
        Ok(())
    }

    fn rows_that(&self, is: impl Fn(&Row) -> bool) -> Vec<i64> {
        self.database.rows().iter().filter(|row| is(row)).map(|row| row.seq).collect()
    }

    /// Claims all lanes until everything but these rows is published, and not more often than that can be of use: each
    /// claim walks two entries of each lane, or frees a key.
    fn claim_until(&mut self, instance: usize, but: impl Fn(&Row) -> bool) -> Result<(), String> {
        let lanes = (1 << self.scope.lanes) - 1;
        let mut tries = self.database.rows().len() + 6;
        loop {
            let pending = self.rows_that(|row| !but(row) && row.state != State::Published);
            if pending.is_empty() {
                return Ok(());
            }
            if tries == 0 {
                return Err(format!("at rest {pending:?} are pending for ever"));
            }
            tries -= 1;
            self.step(Step::Take { instance, lanes })?;
            self.step(Step::Lock { instance, claim: 0 })?;
            while let Some(claim) = self.instances[instance].claims.first() {
                let step = match claim.phase {
                    Phase::Read => Step::Settle { instance, claim: 0, how: Settle::ALL },
                    Phase::Ended => Step::News { instance, claim: 0 },
                    _ => Step::Read { instance, claim: 0, bound: 2, due: true },
                };
                self.step(step)?;
            }
        }
    }
}

impl Settle {
    pub(super) const ALL: Settle = Settle {
        sent: usize::MAX,
        failed: 0,
        failed_is: State::Retry,
        marks: true,
        room: true,
        answered: true,
    };
}
