//! The sweep: looks through the partitions for events that are pending although the marks of their lane have passed them.
//!
//! Claims begin at marks (`lane/marks.rs`), and nothing that appears below a mark in an unlawful way would ever be published:
//! a row that somebody set back to pending, one whose `seq` was not drawn here (replication, a restore) or in an earlier
//! transaction than its INSERT, one that was moved to another key. The thread `sweep`, on a connection of its own, reads the
//! partitions some blocks at a time, at the rate of `partitions.sweep_rate`; one instance at a time, by an advisory lock.
//! A partition in which nothing was written since a pass that saw nothing pending in it is skipped.
//!
//! What looks passed need not be: a writer has just ended, and the claimer has not heard of it. So the sweep judges what
//! it found by what the claimer knows a moment later, and leaves out what that remembers as waiting. The rest it looks at
//! again under the lane's lock. What is still there sets the lane's shared mark back, and a count beside it tells every
//! instance to begin there once; so these events are published in the order of their `seq`, whichever was found first.
//! Nothing is ever settled, put into retry or published here, and whatever fails waits for the next pass.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::time::{Duration, Instant};

use anyhow::Result;
use crossbeam_channel::{Receiver, select};

use crate::config::live::Live;
use crate::lane::progress::{LaneProgress, Reached};
use crate::ops::health::{Health, Heartbeat};
use crate::ops::metrics::Metrics;
use crate::postgres::{Passed, SetBack, Store, StoreError, SweepSession, SweptPartition};

/// Time from the end of one pass to the next, and between two looks whether to sweep at all.
const PASS_PAUSE: Duration = Duration::from_secs(10);
/// Time to the next try while another instance has the turn.
const TURN_PAUSE: Duration = Duration::from_secs(30);
/// Blocks of one step at most: some milliseconds.
const STEP_BLOCKS: u32 = 256;
/// A writer's events are visible a moment before its lock is gone, by which the claimer tells writers: never as long as this.
const ENDING: Duration = Duration::from_secs(1);
/// Time between two looks at what the claimer knows.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// SQLSTATE of a function that the role may not call.
const NO_PRIVILEGE: &str = "42501";
/// SQLSTATEs of what passes by itself: a partition that is gone, and one that upkeep has locked.
const PASSES: [&str; 2] = ["42P01", "55P03"];

/// The thread.
pub struct Sweeper {
    /// Where the partitions are.
    pub store: Store,
    /// The rate, as of each step.
    pub live: Live,
    /// How far each lane is read.
    pub progress: LaneProgress,
    /// Nothing is swept while nothing can be published.
    pub health: Health,
    /// Longest time in which the claimer takes a sample, also while it rests.
    pub sampled_within: Duration,
    /// Its pulse.
    pub heartbeat: Heartbeat,
    /// Counters.
    pub metrics: Metrics,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Step,
    Wait(Duration),
    Stop,
}

impl Sweeper {
    /// Runs until `stop` fires.
    ///
    /// # Errors
    /// None of its own: what fails is tried again.
    pub fn run(self, stop: &Receiver<Infallible>) -> Result<()> {
        let mut session = None;
        let mut pass = SweepPass::default();
        let mut said = String::new();
        loop {
            self.heartbeat.beat();
            let pause = match self.step(&mut session, &mut pass, stop) {
                Ok(Next::Stop) => return Ok(()),
                Ok(Next::Step) => continue,
                Ok(Next::Wait(pause)) => pause,
                Err(error) => {
                    self.say(&error, &mut said);
                    session = None;
                    pass.break_off();
                    PASS_PAUSE
                }
            };
            self.heartbeat.idle();
            select! {
                recv(stop) -> _ => return Ok(()),
                default(pause) => {}
            }
        }
    }

    /// Says once why a step failed. That PostgreSQL is gone, the claimer says; what upkeep does with a partition, that.
    fn say(&self, error: &StoreError, said: &mut String) {
        let text = error.to_string();
        if error.is_outage() || error.sqlstate().is_some_and(|code| PASSES.contains(&code)) || *said == text {
            log::debug!("sweep failed, will retry: next={PASS_PAUSE:?}: {text}");
            return;
        }
        let hint = match error.sqlstate() {
            Some(NO_PRIVILEGE) => "; grant the service's role what schema/roles.sql grants",
            _ => "",
        };
        log::warn!("sweep of the partitions failed, will retry: next={PASS_PAUSE:?}: {text}{hint}");
        *said = text;
    }

    /// Looks into some blocks, and judges what is in them. The connection goes while there is nothing to do.
    fn step(
        &self,
        session: &mut Option<SweepSession>,
        pass: &mut SweepPass,
        stop: &Receiver<Infallible>,
    ) -> Result<Next, StoreError> {
        let rate = self.live.now().partitions.sweep_rate;
        if rate == 0 || !self.health.ready().ok {
            *session = None;
            return Ok(Next::Wait(PASS_PAUSE));
        }
        let mut open = match session.take() {
            Some(open) => open,
            None => self.store.sweep()?,
        };
        let begins = pass.left.is_empty();
        if begins && !pass.begin(open.partitions()?) {
            *session = Some(open);
            self.metrics.swept();
            return Ok(Next::Wait(PASS_PAUSE));
        }
        if !open.take_turn()? {
            log::debug!("sweep skipped: another instance is at it");
            pass.break_off();
            return Ok(Next::Wait(TURN_PAUSE.mul_f64(0.9 + 0.2 * fastrand::f64())));
        }
        if begins {
            log::debug!("sweep begins: partitions={}", pass.left.len());
        }
        let Some(partition) = pass.left.last() else { return Ok(Next::Step) };
        let started = Instant::now();
        let blocks = STEP_BLOCKS.min(rate);
        let signed = i32::try_from(blocks).unwrap_or(i32::MAX);
        let found = open.look(&partition.name, pass.block, signed, &self.progress.reached().marks)?;
        let seen_at = Instant::now();
        let is_whole = pass.go_on(found.next_block, found.fresh);
        // The turn stays ours meanwhile, so that no other instance sweeps as well.
        let share = Duration::from_secs(1).mul_f64(f64::from(blocks) / f64::from(rate));
        select! {
            recv(stop) -> _ => return Ok(Next::Stop),
            default(share.saturating_sub(started.elapsed()).max(started.elapsed())) => {}
        }
        open.end_turn()?;
        if !found.passed.is_empty() && self.judge(&mut open, &found.passed, seen_at, stop)? == Next::Stop {
            return Ok(Next::Stop);
        }
        *session = Some(open);
        if !is_whole {
            return Ok(Next::Step);
        }
        log::debug!("sweep is done");
        self.metrics.swept();
        Ok(Next::Wait(PASS_PAUSE))
    }

    /// Sets marks back where what was seen passed at `seen_at` still is once the claimer knows who has ended by then. What
    /// cannot be judged is found again: its partition has something pending, and so is swept in each pass.
    fn judge(
        &self,
        session: &mut SweepSession,
        passed: &[Passed],
        seen_at: Instant,
        stop: &Receiver<Infallible>,
    ) -> Result<Next, StoreError> {
        log::debug!("sweep judges what looks passed: events={}", passed.len());
        let mut woken = false;
        let reached = loop {
            let reached = self.progress.reached();
            if reached.sampled_at.is_some_and(|at| at >= seen_at + ENDING) {
                break reached;
            }
            if seen_at.elapsed() >= self.sampled_within + 2 * ENDING {
                log::debug!("sweep: the claimer has not heard who ended; left to the next pass");
                return Ok(Next::Step);
            }
            if seen_at.elapsed() >= ENDING + LOOK_EVERY && !woken {
                session.wake()?;
                woken = true;
            }
            self.heartbeat.beat();
            select! {
                recv(stop) -> _ => return Ok(Next::Stop),
                default(LOOK_EVERY) => {}
            }
        };
        for (lane, seqs) in by_lane(passed, &reached) {
            self.heartbeat.beat();
            match session.set_back(lane, &seqs, reached.mark(lane), reached.sweeps(lane))? {
                SetBack::Done { events, first } => {
                    self.metrics.sweep_found(events.unsigned_abs());
                    log::warn!(
                        "sweep found events that claims had passed: lane={lane} events={events} first_seq={first}: set back to \
                         pending by hand, inserted with a number from before, or moved; they are published now, in their order"
                    );
                }
                SetBack::Nothing => {}
                SetBack::Busy => log::debug!("sweep: somebody has lane={lane}; left to the next pass"),
            }
        }
        Ok(Next::Step)
    }
}

/// What is to be looked at again, by lane: not what the claimer remembers.
fn by_lane(passed: &[Passed], reached: &Reached) -> BTreeMap<i32, Vec<i64>> {
    let mut lanes: BTreeMap<i32, Vec<i64>> = BTreeMap::new();
    for event in passed.iter().filter(|event| !reached.leaves_out(event.lane, event.key_hash)) {
        lanes.entry(event.lane).or_default().push(event.seq);
    }
    lanes
}

/// How far a pass over the partitions has come, and which partitions need none.
#[derive(Default)]
struct SweepPass {
    /// Partitions that are still to be swept, the next one last.
    left: Vec<SweptPartition>,
    /// Block of the next one to begin with.
    block: i64,
    /// Events that were fresh in it so far.
    fresh: i64,
    /// By name, what says that a partition is as it was when a pass saw nothing pending in it.
    clean: HashMap<String, String>,
}

impl SweepPass {
    /// Begins a pass over those of the partitions that need one; returns whether there are any.
    fn begin(&mut self, listed: Vec<SweptPartition>) -> bool {
        self.clean.retain(|name, _| listed.iter().any(|partition| partition.name == *name));
        let is_clean = |partition: &SweptPartition| {
            partition.written.is_some() && partition.written.as_ref() == self.clean.get(&partition.name)
        };
        self.left = listed.into_iter().rev().filter(|partition| !is_clean(partition)).collect();
        (self.block, self.fresh) = (0, 0);
        !self.left.is_empty()
    }

    /// Some blocks were looked at, in which so many events are fresh; returns whether the pass is over.
    fn go_on(&mut self, next_block: Option<i64>, fresh: i64) -> bool {
        self.fresh += fresh;
        if let Some(block) = next_block {
            self.block = block;
            return false;
        }
        // What was written since it was listed shows in the next list. An event that is still pending may be passed later,
        // by which nothing is written.
        if let Some(SweptPartition { name, written: Some(written) }) = self.left.pop()
            && self.fresh == 0
        {
            self.clean.insert(name, written);
        }
        (self.block, self.fresh) = (0, 0);
        self.left.is_empty()
    }

    /// The pass is not brought to its end; the next one begins anew.
    fn break_off(&mut self) {
        self.left.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(written: [Option<&str>; 2]) -> Vec<SweptPartition> {
        let partition = |(name, written): (&str, Option<&str>)| SweptPartition {
            name: name.into(),
            written: written.map(Into::into),
        };
        ["a", "b"].into_iter().zip(written).map(partition).collect()
    }

    fn next(pass: &SweepPass) -> &str {
        &pass.left.last().unwrap().name
    }

    #[test]
    fn a_partition_without_anything_new_or_pending_is_skipped() {
        let mut pass = SweepPass::default();
        assert!(pass.begin(listed([Some("1"), Some("1")])));
        assert_eq!((next(&pass), pass.block), ("a", 0));
        assert!(!pass.go_on(Some(256), 0));
        assert_eq!((next(&pass), pass.block), ("a", 256));
        assert!(!pass.go_on(None, 0));
        assert_eq!((next(&pass), pass.block), ("b", 0));
        assert!(!pass.go_on(Some(256), 1), "something is pending in b");
        assert!(pass.go_on(None, 0));

        assert!(pass.begin(listed([Some("1"), Some("1")])));
        assert_eq!(next(&pass), "b", "what is pending may be passed later");
        assert!(pass.go_on(None, 0));
        assert!(!pass.begin(listed([Some("1"), Some("1")])), "nothing is left to look for");
        assert!(pass.begin(listed([Some("2"), Some("1")])), "a was written");
        assert_eq!((next(&pass), pass.left.len()), ("a", 1));
        pass.break_off();
        assert!(pass.begin(listed([Some("2"), Some("1")])), "and was not swept since");
        assert!(pass.go_on(None, 0));
        assert!(!pass.begin(listed([Some("2"), Some("1")])));
    }

    #[test]
    fn where_nothing_is_counted_everything_is_swept() {
        let mut pass = SweepPass::default();
        for _ in 0..2 {
            assert!(pass.begin(listed([None, None])));
            assert!(!pass.go_on(None, 0) && pass.go_on(None, 0));
        }
    }
}
