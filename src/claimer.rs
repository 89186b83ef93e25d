//! The claimer: one thread that begins claims and hands each to a worker that is free.
//!
//! It claims only for a free worker and only while the gate is open, so no lane is locked without somebody to
//! publish its events. While claims bring events it claims again at once. An empty claim lets it rest until
//! something may have changed: a wake-up; a worker that finished (its lanes were locked, so events that were
//! committed meanwhile could not be claimed); the next retry that falls due; or the poll. When the events that
//! are left lie in lanes that somebody else has locked, it looks again after `poll_interval`: should that
//! instance die, its lanes come free without any notification.
//!
//! It never gives up on the database: it says once that claims fail, and once that they work again.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use crossbeam_channel::{Receiver, Sender, TryRecvError, select};

use crate::boottime::Boottime;
use crate::health::{Health, Heartbeat, Part};
use crate::metrics::Metrics;
use crate::publisher::Publisher;
use crate::store::{LANES, Store, StoreError};
use crate::worker::Job;

/// First and longest pause between claims that fail.
const TROUBLE_PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// Shortest rest, so that a retry that is due in a moment does not make the claimer spin.
const REST_MIN: Duration = Duration::from_millis(5);

/// The thread.
pub struct Claimer {
    /// Where claims are made.
    pub store: Store,
    /// The gate.
    pub publisher: Publisher,
    /// Where claims go.
    pub jobs: Sender<Job>,
    /// Workers say here that they are free.
    pub free: Receiver<()>,
    /// Wake-ups.
    pub wake: Receiver<()>,
    /// Whether wake-ups can be relied on.
    pub listening: Arc<AtomicBool>,
    /// Settles that failed since the last one that did not.
    pub failed_settles: Arc<AtomicU32>,
    /// Worker threads.
    pub workers: usize,
    /// Events of one claim at most.
    pub batch_size: usize,
    /// Rest without wake-ups.
    pub poll_interval: Duration,
    /// Rest with wake-ups.
    pub fallback_interval: Duration,
    /// Postgres and schema are reported here.
    pub health: Health,
    /// Its pulse.
    pub heartbeat: Heartbeat,
    /// Counters.
    pub metrics: Metrics,
}

/// Why the loop goes on or not.
enum Next {
    Claim,
    Stop,
}

impl Claimer {
    /// Runs until `stop` fires.
    ///
    /// # Errors
    /// None of its own.
    pub fn run(self, stop: &Receiver<Infallible>) -> Result<()> {
        if let Next::Stop = self.await_schema(stop) {
            return Ok(());
        }
        let mut free = 0;
        let mut first_lane = fastrand::i32(0..LANES);
        let mut trouble = Trouble::default();
        loop {
            self.heartbeat.idle();
            if free == 0 {
                select! {
                    recv(stop) -> _ => return Ok(()),
                    recv(self.free) -> _ => free += 1,
                }
            }
            if let Next::Stop = self.await_gate(stop) {
                return Ok(());
            }
            if let Next::Stop = self.await_settles(&mut trouble, stop) {
                return Ok(());
            }
            self.heartbeat.beat();
            // A wake-up before the claim's snapshot is answered by the claim itself.
            let _ = self.wake.try_recv();
            let rest = match self.claim(first_lane) {
                Ok(job) if job.claim.is_empty() => {
                    trouble.over(&self.health);
                    self.rest()
                }
                Ok(job) => {
                    trouble.over(&self.health);
                    first_lane = job.claim.lanes.last().map_or(0, |lane| (lane + 1) % LANES);
                    free -= 1;
                    let more = job.claim.more();
                    if self.jobs.send(job).is_err() {
                        return Ok(());
                    }
                    if more {
                        continue;
                    }
                    // Its worker says when it has finished, and then we look again.
                    self.poll_interval
                }
                Err(error) => {
                    self.metrics.claim_failed();
                    self.metrics.postgres_error();
                    trouble.again(&error, &self.health)
                }
            };
            self.heartbeat.idle();
            select! {
                recv(stop) -> _ => return Ok(()),
                recv(self.wake) -> _ => {}
                recv(self.free) -> _ => free += 1,
                default(rest) => {}
            }
        }
    }

    /// Waits until the schema is there, saying once what is missing.
    fn await_schema(&self, stop: &Receiver<Infallible>) -> Next {
        let mut said = String::new();
        loop {
            self.heartbeat.beat();
            let missing = match self.store.schema_problems() {
                Ok(problems) if problems.is_empty() => {
                    self.health.set(Part::Postgres, Ok(()));
                    self.health.set(Part::Schema, Ok(()));
                    return Next::Claim;
                }
                Ok(problems) => {
                    self.health.set(Part::Postgres, Ok(()));
                    let problems = problems.join("; ");
                    self.health.set(Part::Schema, Err(problems.clone()));
                    format!("schema is not ready: {problems}")
                }
                Err(error) => {
                    self.health.set(Part::Postgres, Err(error.to_string()));
                    format!("postgres is not ready: {error}")
                }
            };
            if said != missing {
                log::warn!("{missing}");
                said = missing;
            }
            select! {
                recv(stop) -> _ => return Next::Stop,
                default(self.poll_interval.min(Duration::from_secs(1))) => {}
            }
        }
    }

    /// Waits while an outage keeps the gate closed.
    fn await_gate(&self, stop: &Receiver<Infallible>) -> Next {
        while !self.publisher.lets_through() {
            select! {
                recv(stop) -> _ => return Next::Stop,
                recv(self.publisher.gate_opened()) -> _ => {}
                default(Duration::from_secs(1)) => {}
            }
        }
        match stop.try_recv() {
            Err(TryRecvError::Empty) => Next::Claim,
            _ => Next::Stop,
        }
    }

    /// Pauses while settles fail, the longer the more of them: what is claimed now can hardly be settled either.
    fn await_settles(&self, trouble: &mut Trouble, stop: &Receiver<Infallible>) -> Next {
        let failures = self.failed_settles.load(Ordering::Relaxed);
        trouble.settles(failures > 0, &self.health);
        if failures == 0 {
            return Next::Claim;
        }
        let pause = TROUBLE_PAUSE.0.saturating_mul(failures).min(TROUBLE_PAUSE.1);
        select! {
            recv(stop) -> _ => Next::Stop,
            default(pause) => Next::Claim,
        }
    }

    fn claim(&self, first_lane: i32) -> Result<Job, StoreError> {
        // Each worker its share of the lanes, so that one claim does not lock what the others could work on.
        let workers = i32::try_from(self.workers).unwrap_or(LANES).clamp(1, LANES);
        let lanes = LANES.div_euclid(workers).max(1);
        let events = i32::try_from(self.batch_size).unwrap_or(i32::MAX);
        let claim = self.store.claim(first_lane, lanes, events)?;
        self.metrics.claimed(claim.len());
        Ok(Job { claim, read_at: Boottime::now() })
    }

    /// How long to rest when there is nothing to claim.
    fn rest(&self) -> Duration {
        let longest =
            if self.listening.load(Ordering::Relaxed) { self.fallback_interval } else { self.poll_interval };
        match self.store.outlook() {
            Ok(outlook) => {
                if !outlook.claims_open {
                    // Nothing to claim, and not because somebody else has it: a trial of the gate is passed.
                    self.publisher.confirm_idle();
                    // Nor is anything left to settle: what could not be, somebody else has settled.
                    self.failed_settles.store(0, Ordering::Relaxed);
                }
                let retry = outlook.next_due.unwrap_or(longest).max(REST_MIN);
                let others = if outlook.claims_open { self.poll_interval } else { longest };
                longest.min(retry).min(others)
            }
            Err(error) => {
                log::debug!("outlook failed: {error}");
                self.poll_interval.min(longest)
            }
        }
    }
}

/// Claims that fail: said once when it begins and once when it ends.
#[derive(Default)]
struct Trouble {
    since: Option<Instant>,
    pause: Duration,
    settles_fail: bool,
}

impl Trouble {
    /// One more failure; returns the pause before the next claim.
    fn again(&mut self, error: &StoreError, health: &Health) -> Duration {
        if self.since.is_none() {
            self.since = Some(Instant::now());
            self.pause = TROUBLE_PAUSE.0;
            log::warn!("claims fail, trying on: {error}");
        } else {
            self.pause = (self.pause * 2).min(TROUBLE_PAUSE.1);
        }
        health.set(Part::Postgres, Err(error.to_string()));
        self.pause
    }

    /// Tells health when settles begin to fail and when they work again.
    fn settles(&mut self, fail: bool, health: &Health) {
        if fail != self.settles_fail {
            self.settles_fail = fail;
            let state = if fail { Err("settles fail; the log says why".into()) } else { Ok(()) };
            health.set(Part::Postgres, state);
        }
    }

    fn over(&mut self, health: &Health) {
        if let Some(since) = self.since.take() {
            log::info!("claims work again: lasted={:.1}s", since.elapsed().as_secs_f64());
            health.set(Part::Postgres, Ok(()));
        }
    }
}
