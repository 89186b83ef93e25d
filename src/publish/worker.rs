//! A worker: reads, publishes and settles one claim at a time, all on the claim's own connection.
//!
//! It announces that it is free, receives lanes that the claimer has locked, reads their events, publishes them through
//! its slot of the publisher, and writes the outcomes in the transaction that holds the lanes. The crash windows: before
//! an ack, the event is pending and its lane free as soon as the connection falls; after the ack and before the commit,
//! the event is published again and JetStream drops it by its message id. After a settle that failed, this process
//! remembers what it published and only settles it the next time. Lanes received while the service drains are released
//! unread. Ends when the claimer hangs up.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use crossbeam_channel::{Receiver, Sender};
use uuid::Uuid;

use crate::boottime::Boottime;
use crate::event::{Event, EventRow, Outcome};
use crate::failpoint;
use crate::lane::marks::{Basis, LaneEnd};
use crate::ops::health::Heartbeat;
use crate::ops::metrics::Metrics;
use crate::postgres::{Claim, Large, Locked, Settled, StoreError};
use crate::publish::flight::Publish;
use crate::publish::outcomes::ClaimReport;

/// Events after which a claim reads no further: each claim costs PostgreSQL and us some 2 ms whatever it holds, which such a
/// claim shares among many, and other instances wait for its lanes.
pub const READ_ON_EVENTS: usize = 1_000;

/// A claim on its way from the claimer to a worker.
pub struct Job {
    /// What it holds so far.
    pub stage: Stage,
    /// Bytes of payload and metadata that it may hold.
    pub bytes: usize,
}

/// How far the claimer has come with a claim.
pub enum Stage {
    /// Its lanes are locked.
    Locked(Locked),
    /// Its events were read, then; the budget counts from there.
    Read(Claim, Boottime),
}

impl Job {
    /// The lanes that it has.
    pub fn lanes(&self) -> Vec<i32> {
        match &self.stage {
            Stage::Locked(locked) => locked.lanes.clone(),
            Stage::Read(claim, _) => claim.lanes(),
        }
    }
}

/// A worker is free, and how its last claim ended.
#[derive(Debug, Default)]
pub struct Finished {
    /// The lanes that claim had.
    pub lanes: Vec<i32>,
    /// How it ended for them, and the sample that it took along; `None` when nothing was found out.
    pub ends: Option<(Arc<Basis>, Vec<LaneEnd>)>,
    /// The database failed: nothing is known of what it keeps of former settles.
    pub database_failed: bool,
    /// Bytes that the claim might have held.
    pub bytes: usize,
    /// How its events were read; `None` if they were not.
    pub read: Option<Result<ReadSummary, StoreError>>,
}

/// What a worker read.
#[derive(Debug, Clone, Copy)]
pub struct ReadSummary {
    /// How many events.
    pub events: usize,
    /// Of how many keys.
    pub keys: usize,
    /// The lane of an event that is too large to be read beside other claims.
    pub too_large: Option<i32>,
}

/// What the workers did while the service drained.
#[derive(Default)]
pub struct DrainCount {
    /// Events settled after the stop.
    pub drained: AtomicUsize,
    /// Events released after the stop.
    pub released: AtomicUsize,
}

/// One worker thread.
pub struct Worker {
    /// Which session of the publisher is its own.
    pub slot: usize,
    /// Where claims come from.
    pub jobs: Receiver<Job>,
    /// Where it says that it is free.
    pub free: Sender<Finished>,
    /// What it publishes with.
    pub publish: Arc<Publish>,
    /// How long a claim may send.
    pub claim_budget: Duration,
    /// Counters of the drain, shared by all workers.
    pub drain: Arc<DrainCount>,
    /// Settles that failed since the last one that did not; the claimer slows down by it.
    pub failed_settles: Arc<AtomicU32>,
    /// Its pulse.
    pub heartbeat: Heartbeat,
    /// Counters.
    pub metrics: Metrics,
}

impl Worker {
    /// Runs until the claimer hangs up.
    ///
    /// # Errors
    /// None of its own: what fails in a claim is logged and left to the next claim.
    pub fn run(self) -> Result<()> {
        let mut finished = Finished::default();
        loop {
            self.heartbeat.idle();
            // The channel has room for every worker, so this never blocks.
            if self.free.send(finished).is_err() {
                return Ok(());
            }
            let Ok(job) = self.jobs.recv() else { return Ok(()) };
            self.heartbeat.beat();
            let (lanes, bytes) = (job.lanes(), job.bytes);
            finished = Finished { lanes, bytes, ..self.work(job) };
        }
    }

    fn work(&self, job: Job) -> Finished {
        if self.is_draining() {
            return Finished { database_failed: !release(job), ..Finished::default() };
        }
        let (claim, read_at) = match job.stage {
            Stage::Read(claim, at) => (claim, at),
            Stage::Locked(locked) => match locked.read(Large::Refused) {
                Ok(claim) => (claim, Boottime::now()),
                Err(error) => return Finished { read: Some(Err(error)), ..Finished::default() },
            },
        };
        let too_large = claim.too_large();
        if claim.is_empty() {
            // Nothing visible is pending where it read, which the marks may know.
            let ends = Some((claim.basis(), claim.ends([])));
            let database_failed = !give_back(&claim.release());
            let read = Some(Ok(ReadSummary { events: 0, keys: 0, too_large }));
            return Finished { ends, database_failed, read, ..Finished::default() };
        }
        let (done, finished) = self.publish_and_settle(claim, read_at);
        let summary = ReadSummary { events: done.rows.len(), keys: done.keys.len(), too_large };
        Finished { read: Some(Ok(summary)), ..finished }
    }

    /// Publishes what was read, and reads on under the same locks while that is worth it; then settles all of it.
    fn publish_and_settle(&self, mut claim: Claim, read_at: Boottime) -> (Done, Finished) {
        let budget = read_at.plus(self.claim_budget);
        let mut done = Done::default();
        let mut events = claim.take_events();
        loop {
            self.metrics.claimed(events.len());
            let shared: Vec<_> = events.into_iter().map(Arc::new).collect();
            let started = Instant::now();
            let report = self.publish.claim(self.slot, &shared, budget);
            done.published_in += started.elapsed();
            let goes_on = done.take_in(&shared, report);
            if !goes_on || done.rows.len() >= READ_ON_EVENTS || budget.is_past() || self.is_draining() {
                break;
            }
            self.heartbeat.beat();
            // What is published makes room for what comes.
            drop(shared);
            match claim.read_on() {
                Ok(Some(next)) if !next.is_empty() => events = next,
                Ok(_) => break,
                Err(error) => {
                    let finished = self.settle_failed(&done, &error);
                    return (done, finished);
                }
            }
        }
        self.metrics.publish_took(done.published_in);
        let finished = self.settle(claim, read_at, &done);
        (done, finished)
    }

    fn settle(&self, claim: Claim, read_at: Boottime, done: &Done) -> Finished {
        let outcomes = || done.rows.iter().zip(&done.outcomes);
        let untouched = outcomes().filter(|(_, outcome)| **outcome == Outcome::Untouched);
        let mut ends = claim.ends(untouched.clone().map(|(event, _)| event));
        let touched = done.rows.len() - untouched.count();
        if touched == 0 {
            // The marks stay where they are, and the lanes may be claimed again.
            for end in &mut ends {
                end.reached = None;
            }
            let ends = Some((claim.basis(), ends));
            return Finished { ends, database_failed: !give_back(&claim.release()), ..Finished::default() };
        }
        failpoint!("settle.begin");
        let settling = Instant::now();
        let basis = claim.basis();
        match claim.settle(outcomes(), &mut ends) {
            Ok(settled) => {
                self.failed_settles.store(0, Ordering::Relaxed);
                self.publish.memory.unsettled.forget(done.published());
                self.metrics.settle_took(settling.elapsed());
                self.metrics.claim_took(Boottime::now().since(read_at));
                self.count(&settled, done);
                if self.is_draining() {
                    self.drain.drained.fetch_add(touched, Ordering::Relaxed);
                    self.drain.released.fetch_add(done.rows.len() - touched, Ordering::Relaxed);
                }
                if settled.missed > 0 {
                    log::warn!(
                        "rows changed under the claim: missed={} of {touched}; somebody else settled or deleted them",
                        settled.missed
                    );
                }
                log::debug!(
                    "claim settled: events={} published={} duplicates={} retried={} dead={} publish={:.1?} settle={:.1?}",
                    done.rows.len(),
                    settled.published,
                    done.duplicates,
                    settled.retried,
                    settled.dead,
                    done.published_in,
                    settling.elapsed()
                );
                Finished { ends: Some((basis, ends)), ..Finished::default() }
            }
            Err(error) => self.settle_failed(done, &error),
        }
    }

    fn settle_failed(&self, done: &Done, error: &StoreError) -> Finished {
        self.metrics.postgres_error();
        self.publish.memory.unsettled.remember(done.published());
        let failures = self.failed_settles.fetch_add(1, Ordering::Relaxed);
        let level = if failures == 0 { log::Level::Error } else { log::Level::Debug };
        log::log!(level, "settle failed, will settle again: events={}: {error}", done.rows.len());
        Finished { database_failed: true, ..Finished::default() }
    }

    fn count(&self, settled: &Settled, done: &Done) {
        self.metrics.published(settled.published, done.duplicates);
        self.metrics.retried(settled.retried.saturating_sub(done.unanswered));
        self.metrics.dead(settled.dead);
        self.metrics.unanswered(done.unanswered);
    }

    fn is_draining(&self) -> bool {
        self.publish.draining.load(Ordering::Relaxed)
    }
}

/// What was published of a claim and is still to be settled; the events themselves are gone.
#[derive(Default)]
struct Done {
    rows: Vec<EventRow>,
    /// Hashes of their keys.
    keys: HashSet<i64>,
    outcomes: Vec<Outcome>,
    duplicates: u64,
    unanswered: u64,
    published_in: Duration,
}

impl Done {
    /// Takes in what became of some events; returns whether the claim may read on, as all of them were published. (A key of
    /// which one was not must not go on in this claim.)
    fn take_in(&mut self, events: &[Arc<Event>], report: ClaimReport) -> bool {
        let all = report.outcomes.iter().all(|outcome| *outcome == Outcome::Published);
        self.rows.extend(events.iter().map(|event| event.row()));
        self.keys.extend(events.iter().map(|event| event.key_hash));
        self.outcomes.extend(report.outcomes);
        self.duplicates += report.duplicates;
        self.unanswered += report.unanswered;
        all
    }

    fn published(&self) -> impl Iterator<Item = Uuid> {
        let pairs = self.rows.iter().zip(&self.outcomes);
        pairs.filter(|(_, outcome)| **outcome == Outcome::Published).map(|(event, _)| event.id)
    }
}

/// Gives a job's lanes back as they are; returns what [`give_back`] does.
fn release(job: Job) -> bool {
    give_back(&match job.stage {
        Stage::Locked(locked) => locked.release(),
        Stage::Read(claim, _) => claim.release(),
    })
}

/// A claim was given back; returns whether the database took it. If not, the connection is closed, which does the same.
fn give_back(released: &Result<(), StoreError>) -> bool {
    if let Err(error) = released {
        log::debug!("release failed, the connection is closed: {error}");
    }
    released.is_ok()
}
