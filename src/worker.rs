//! A worker: publishes one claim at a time and settles it on the claim's own connection.
//!
//! It announces that it is free, receives a claim, publishes its events through its slot of the publisher, and
//! writes the outcomes in the transaction that holds the lanes. The crash windows: before an ack, the event is
//! pending and its lane free as soon as the connection falls; after the ack and before the commit, the event is
//! published again and JetStream drops it by its message id. After a settle that failed, this process remembers what
//! it published and only settles it the next time. A claim received while the service drains is
//! released untouched. Ends when the claimer hangs up.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use crossbeam_channel::{Receiver, Sender};

use crate::boottime::Boottime;
use crate::cursors::Basis;
use crate::event::Outcome;
use crate::failpoint;
use crate::health::Heartbeat;
use crate::metrics::Metrics;
use crate::publish::{Publish, Report};
use crate::store::{Claim, LaneEnd, Settled};

/// A claim on its way from the claimer to a worker.
pub struct Job {
    /// The locked lanes and their events.
    pub claim: Claim,
    /// When the events had been read; the budget counts from here.
    pub read_at: Boottime,
    /// What was known of the cursors before they were read.
    pub basis: Basis,
    /// Bytes of payload and metadata that they hold.
    pub bytes: usize,
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
    /// Bytes that the claim held.
    pub bytes: usize,
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
            let bytes = job.bytes;
            finished = Finished { bytes, ..self.work(job) };
        }
    }

    fn work(&self, job: Job) -> Finished {
        let Job { mut claim, read_at, basis, bytes: _ } = job;
        let events: Vec<_> = claim.take_events().into_iter().map(Arc::new).collect();
        if self.is_draining() {
            self.drain.released.fetch_add(events.len(), Ordering::Relaxed);
            let lanes = claim.ends(events.iter().map(AsRef::as_ref));
            return Finished { basis: Some(basis), lanes, database_failed: !release(claim), bytes: 0 };
        }
        let started = Instant::now();
        let report = self.publish.claim(self.slot, &events, read_at.plus(self.claim_budget));
        let published_in = started.elapsed();
        self.metrics.publish_took(published_in);
        let outcomes = || events.iter().map(AsRef::as_ref).zip(&report.outcomes);
        let untouched = outcomes().filter(|(_, outcome)| **outcome == Outcome::Untouched);
        let lanes = claim.ends(untouched.clone().map(|(event, _)| event));
        let touched = events.len() - untouched.count();
        if touched == 0 {
            return Finished { basis: Some(basis), lanes, database_failed: !release(claim), bytes: 0 };
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
                self.publish.unsettled.forget(published());
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
                Finished { basis: Some(basis), lanes, database_failed: false, bytes: 0 }
            }
            Err(error) => {
                self.metrics.postgres_error();
                self.publish.unsettled.remember(published());
                let failures = self.failed_settles.fetch_add(1, Ordering::Relaxed);
                let level = if failures == 0 { log::Level::Error } else { log::Level::Debug };
                log::log!(level, "settle failed, will settle again: events={touched}: {error}");
                Finished { basis: Some(basis), lanes, database_failed: true, bytes: 0 }
            }
        }
    }

    fn count(&self, settled: &Settled, report: &Report) {
        self.metrics.published(settled.published, report.duplicates);
        self.metrics.retried(settled.retried.saturating_sub(report.unanswered));
        self.metrics.dead(settled.dead);
        self.metrics.unanswered(report.unanswered);
    }

    fn is_draining(&self) -> bool {
        self.publish.draining.load(Ordering::Relaxed)
    }
}

/// Gives a claim back, and returns whether the database took it. If not, the connection is closed, which does the
/// same.
fn release(claim: Claim) -> bool {
    let released = claim.release();
    if let Err(error) = &released {
        log::debug!("release failed, the connection is closed: {error}");
    }
    released.is_ok()
}
