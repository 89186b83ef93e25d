//! The janitor: keeps the gauges of the backlog, of retries and dead letters, and of the pool.
//!
//! Counting costs the database something, so it never happens at a scrape: the janitor counts every
//! [`COUNT_INTERVAL`], and more seldom when counting takes long, so that it takes at most a twentieth of the time
//! of one connection.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use anyhow::Result;
use crossbeam_channel::{Receiver, select};

use crate::health::Heartbeat;
use crate::metrics::{Backlog, Metrics};
use crate::store::Store;

/// Time between two counts of the backlog.
const COUNT_INTERVAL: Duration = Duration::from_secs(5);
/// Time between two looks at the pool.
const POOL_INTERVAL: Duration = Duration::from_secs(1);
/// Counting takes at most this part of the time.
const DUTY: u32 = 20;

/// The thread.
pub struct Janitor {
    /// What is counted.
    pub store: Store,
    /// Its pulse.
    pub heartbeat: Heartbeat,
    /// Where the counts go.
    pub metrics: Metrics,
}

impl Janitor {
    /// Runs until `stop` fires.
    ///
    /// # Errors
    /// None of its own: a count that fails is tried again.
    pub fn run(self, stop: &Receiver<Infallible>) -> Result<()> {
        let mut next_count = Instant::now();
        loop {
            self.heartbeat.beat();
            if Instant::now() >= next_count {
                let took = self.count();
                next_count = Instant::now() + COUNT_INTERVAL.max(took * DUTY);
            }
            let pool = self.store.pool_state();
            self.metrics.pool(pool.connections - pool.idle, pool.idle, pool.max);
            select! {
                recv(stop) -> _ => return Ok(()),
                default(POOL_INTERVAL) => {}
            }
        }
    }

    fn count(&self) -> Duration {
        let started = Instant::now();
        match self.store.backlog() {
            Ok(backlog) => self.metrics.backlog(&Backlog {
                pending: backlog.pending.unsigned_abs(),
                retrying: backlog.retrying.unsigned_abs(),
                dead: backlog.dead.unsigned_abs(),
                lag: backlog.lag,
            }),
            Err(error) => log::debug!("count failed, will retry: {error}"),
        }
        started.elapsed()
    }
}
