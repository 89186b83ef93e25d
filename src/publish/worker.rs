//! A worker: reads, publishes and settles one claim at a time, all on the claim's own connection.
//!
//! It announces that it is free, receives lanes that the claimer has locked, reads their events, publishes them through
//! its slot of the publisher, and writes the outcomes in the transaction that holds the lanes. The crash windows: before
//! an ack, the event is pending and its lane free as soon as the connection falls; after the ack and before the commit,
//! the event is published again and JetStream drops it by its message id. After a settle that failed, this process
//! remembers what it published and only settles it the next time. Lanes received while the service drains are released
//! unread. Ends when the claimer hangs up.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use crossbeam_channel::{Receiver, Sender};

use crate::boottime::Boottime;
use crate::event::Outcome;
use crate::failpoint;
use crate::lane::marks::Basis;
use crate::ops::health::Heartbeat;
use crate::ops::metrics::Metrics;
use crate::postgres::{Claim, LaneEnd, Large, Locked, Settled, StoreError};
use crate::publish::flight::Publish;
use crate::publish::outcomes::ClaimReport;

/// A claim on its way from the claimer to a worker.
pub struct Job {
    /// What it holds so far.
    pub stage: Stage,
    /// What was known of the cursors before its events are read.
    pub basis: Basis,
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
    pub fn lanes(&self) -> &[i32] {
        match &self.stage {
            Stage::Locked(locked) => &locked.lanes,
            Stage::Read(claim, _) => &claim.lanes,
        }
    }
}

/// A worker is free, and how its last claim ended.
#[derive(Debug, Default)]
pub struct Finished {
    /// What that claim was read on; `None` from a worker that had none yet.
    pub basis: Option<Basis>,
    /// What became of its lanes.
    pub lanes: Vec<LaneEnd>,
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
            let (basis, bytes) = (Some(job.basis), job.bytes);
            finished = Finished { basis, bytes, ..self.work(job) };
        }
    }

    fn work(&self, job: Job) -> Finished {
        let lanes = LaneEnd::unmoved(job.lanes());
        if self.is_draining() {
            return Finished { lanes, database_failed: !release(job), ..Finished::default() };
        }
        let (claim, read_at) = match job.stage {
            Stage::Read(claim, at) => (claim, at),
            Stage::Locked(locked) => match locked.read(Large::Refused) {
                Ok(claim) => (claim, Boottime::now()),
                Err(error) => return Finished { lanes, read: Some(Err(error)), ..Finished::default() },
            },
        };
        let summary = ReadSummary { events: claim.len(), too_large: claim.too_large() };
        let finished = if claim.is_empty() {
            let lanes = if summary.too_large.is_some() { claim.ends([]) } else { lanes };
            Finished { lanes, database_failed: !give_back(&claim.release()), ..Finished::default() }
        } else {
            self.metrics.claimed(summary.events);
            self.publish_and_settle(claim, read_at)
        };
        Finished { read: Some(Ok(summary)), ..finished }
    }

    fn publish_and_settle(&self, mut claim: Claim, read_at: Boottime) -> Finished {
        let events: Vec<_> = claim.take_events().into_iter().map(Arc::new).collect();
        let started = Instant::now();
        let report = self.publish.claim(self.slot, &events, read_at.plus(self.claim_budget));
        let published_in = started.elapsed();
        self.metrics.publish_took(published_in);
        let outcomes = || events.iter().map(AsRef::as_ref).zip(&report.outcomes);
        let untouched = outcomes().filter(|(_, outcome)| **outcome == Outcome::Untouched);
        let lanes = claim.ends(untouched.clone().map(|(event, _)| event));
        let touched = events.len() - untouched.count();
        if touched == 0 {
            return Finished { lanes, database_failed: !give_back(&claim.release()), ..Finished::default() };
        }
        failpoint!("settle.begin");
        let settling = Instant::now();
        let published = || {
            let pairs = events.iter().zip(&report.outcomes);
            pairs.filter(|(_, outcome)| **outcome == Outcome::Published).map(|(event, _)| event.id)
        };
        match claim.settle(outcomes()) {
            Ok(settled) => {
                self.failed_settles.store(0, Ordering::Relaxed);
                self.publish.memory.unsettled.forget(published());
                self.metrics.settle_took(settling.elapsed());
                self.metrics.claim_took(Boottime::now().since(read_at));
                self.count(&settled, &report);
                if self.is_draining() {
                    self.drain.drained.fetch_add(touched, Ordering::Relaxed);
                    self.drain.released.fetch_add(events.len() - touched, Ordering::Relaxed);
                }
                if settled.missed > 0 {
                    log::warn!(
                        "rows changed under the claim: missed={} of {touched}; somebody else settled or deleted them",
                        settled.missed
                    );
                }
                log::debug!(
                    "claim settled: events={} published={} duplicates={} retried={} dead={} publish={published_in:.1?} settle={:.1?}",
                    events.len(),
                    settled.published,
                    report.duplicates,
                    settled.retried,
                    settled.dead,
                    settling.elapsed()
                );
                Finished { lanes, ..Finished::default() }
            }
            Err(error) => {
                self.metrics.postgres_error();
                self.publish.memory.unsettled.remember(published());
                let failures = self.failed_settles.fetch_add(1, Ordering::Relaxed);
                let level = if failures == 0 { log::Level::Error } else { log::Level::Debug };
                log::log!(level, "settle failed, will settle again: events={touched}: {error}");
                Finished { lanes, database_failed: true, ..Finished::default() }
            }
        }
    }

    fn count(&self, settled: &Settled, report: &ClaimReport) {
        self.metrics.published(settled.published, report.duplicates);
        self.metrics.retried(settled.retried.saturating_sub(report.unanswered));
        self.metrics.dead(settled.dead);
        self.metrics.unanswered(report.unanswered);
    }

    fn is_draining(&self) -> bool {
        self.publish.draining.load(Ordering::Relaxed)
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
