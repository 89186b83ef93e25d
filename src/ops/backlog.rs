//! The janitor: keeps the gauges of the backlog, of retries, dead letters and blocked keys, of what hinders vacuum, and of
//! the pool; and the lists of the status page.
//!
//! Counting and listing cost the database something, so they never happen at a scrape or at a look at the page: the
//! janitor does each every [`INTERVAL`], and more seldom when it takes long, so that each takes at most a twentieth
//! of the time of one connection. A count also shows whether a lane is missing, which the janitor then mends; under load the
//! claimer sees it sooner, and tells.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use anyhow::Result;
use crossbeam_channel::{Receiver, select};

use crate::lane::progress::LaneProgress;
use crate::ops::health::Heartbeat;
use crate::ops::mend::{LaneAlarm, Mender};
use crate::ops::metrics::{BacklogGauges, Metrics};
use crate::ops::recent::{MAX_LISTED, Waiting};
use crate::postgres::{Store, StoreError};

/// Time between two counts of the backlog, and between two lists.
const INTERVAL: Duration = Duration::from_secs(5);
/// Time between two looks at the pool.
const POOL_INTERVAL: Duration = Duration::from_secs(1);
/// Counting takes at most this part of the time, and so does listing.
const DUTY: u32 = 20;
/// Entries of each lane that a count walks over; what is beyond is estimated.
const COUNT_ENTRIES: i64 = 250;

/// The thread.
pub struct Janitor {
    /// What is counted.
    pub store: Store,
    /// How far each lane is read.
    pub progress: LaneProgress,
    /// The claimer says here that lanes are missing.
    pub lane_alarm: LaneAlarm,
    /// Puts them back.
    pub mender: Mender,
    /// Its pulse.
    pub heartbeat: Heartbeat,
    /// Where the counts go.
    pub metrics: Metrics,
    /// Where the lists go.
    pub waiting: Waiting,
}

impl Janitor {
    /// Runs until `stop` fires.
    ///
    /// # Errors
    /// None of its own: a count that fails is tried again.
    pub fn run(mut self, stop: &Receiver<Infallible>) -> Result<()> {
        let mut next_count = Instant::now();
        let mut next_list = Instant::now();
        let mut next_mend = Instant::now() + INTERVAL;
        loop {
            self.heartbeat.beat();
            if Instant::now() >= next_count {
                let took = self.count();
                next_count = Instant::now() + INTERVAL.max(took * DUTY);
                next_mend = Instant::now() + INTERVAL;
                self.heartbeat.beat();
            }
            if Instant::now() >= next_list {
                let took = self.list();
                next_list = Instant::now() + INTERVAL.max(took * DUTY);
            }
            // Where counts are slow, or fail, the lanes are looked after all the same.
            if self.mender.is_at_it() || Instant::now() >= next_mend {
                self.mender.mend();
                next_mend = Instant::now() + INTERVAL;
            }
            let pool = self.store.pool_state();
            self.metrics.pool(pool.connections - pool.idle, pool.idle, pool.max);
            select! {
                recv(stop) -> _ => return Ok(()),
                recv(self.lane_alarm.raised()) -> _ => self.mender.mend(),
                default(POOL_INTERVAL) => {}
            }
        }
    }

    fn count(&mut self) -> Duration {
        let started = Instant::now();
        match self.store.backlog(&self.progress.reached().counts_from(), COUNT_ENTRIES) {
            Ok(backlog) => {
                if backlog.missing_lanes > 0 {
                    self.mender.mend();
                }
                self.metrics.backlog(&BacklogGauges {
                    pending: backlog.pending.unsigned_abs(),
                    retrying: backlog.retrying.unsigned_abs(),
                    dead: backlog.dead.unsigned_abs(),
                    lag: backlog.lag,
                });
                self.waiting.counted();
            }
            Err(error) => {
                self.waiting.count_failed();
                log::debug!("count failed, will retry: {error}");
            }
        }
        match self.store.blocked_key_counts() {
            Ok((by_retry, by_dead)) => {
                self.metrics.blocked_keys(by_retry.unsigned_abs(), by_dead.unsigned_abs());
            }
            Err(error) => log::debug!("count of blocked keys failed, will retry: {error}"),
        }
        started.elapsed()
    }

    fn list(&self) -> Duration {
        let started = Instant::now();
        if let Err(error) = self.try_list() {
            log::debug!("list failed, will retry: {error}");
        }
        started.elapsed()
    }

    /// Lists only what the last count says is there: mostly there is nothing.
    fn try_list(&self) -> Result<(), StoreError> {
        let totals = self.metrics.totals();
        let most = MAX_LISTED as i64;
        let retries = if totals.retrying > 0 { self.store.next_retries(most)? } else { Vec::new() };
        let dead_letters = if totals.dead > 0 { self.store.newest_dead(most)? } else { Vec::new() };
        self.waiting.listed(retries, dead_letters);
        let oldest = self.store.oldest_transaction()?;
        let age = oldest.map_or(0.0, |oldest| oldest.seconds);
        self.metrics.oldest_transaction(Duration::try_from_secs_f64(age).unwrap_or_default());
        Ok(())
    }
}
