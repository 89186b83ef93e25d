//! The sampler: one thread that takes a sample of the open writers whenever the claimer asks for one.
//!
//! It has a thread and a connection of its own, so that no claim waits for a sample. Asked or not, it never takes more of the
//! database's time than a [`SHARE`] of it: with 400 open transactions a sample costs some 5 ms. A sample that failed is none;
//! the claimer goes on with the one before, and asks again. The thread ends when the claimer hangs up.

use std::time::{Duration, Instant};

use anyhow::Result;
use crossbeam_channel::{Receiver, Sender, bounded};

use crate::ops::health::Heartbeat;
use crate::postgres::{Sampled, Store, StoreError};

/// Shortest and longest time between two samples while claims are made.
const PACE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(250));
/// A sample may take one part of so many of the time.
const SHARE: u32 = 25;

/// The thread.
pub struct Sampler {
    /// Where the writers are.
    pub store: Store,
    /// Somebody wants a sample.
    pub asked: Receiver<()>,
    /// Where samples go.
    pub samples: Sender<Result<Sampled, StoreError>>,
    /// Its pulse.
    pub heartbeat: Heartbeat,
}

impl Sampler {
    /// Runs until the claimer hangs up.
    ///
    /// # Errors
    /// None of its own.
    pub fn run(self) -> Result<()> {
        loop {
            self.heartbeat.idle();
            if self.asked.recv().is_err() {
                return Ok(());
            }
            self.heartbeat.beat();
            if self.samples.send(self.store.sample()).is_err() {
                return Ok(());
            }
        }
    }
}

/// The claimer's end: asks for samples, one at a time.
pub struct Samples {
    ask: Sender<()>,
    taken: Receiver<Result<Sampled, StoreError>>,
    /// When the one that is under way was asked for.
    asked_at: Option<Instant>,
    /// When the next may be asked for.
    next_at: Option<Instant>,
}

impl Samples {
    /// The claimer's end, and what a [`Sampler`] needs of the other.
    pub fn new() -> (Samples, Receiver<()>, Sender<Result<Sampled, StoreError>>) {
        let (ask, asked) = bounded(1);
        let (samples, taken) = bounded(1);
        (Samples { ask, taken, asked_at: None, next_at: None }, asked, samples)
    }

    /// Where samples come, for a `select!`.
    pub fn taken(&self) -> &Receiver<Result<Sampled, StoreError>> {
        &self.taken
    }

    /// Asks for a sample, unless one is under way or it is too early; returns whether it did.
    pub fn ask(&mut self, now: Instant) -> bool {
        let may = self.asked_at.is_none() && self.next_at.is_none_or(|at| at <= now);
        let asks = may && self.ask.try_send(()).is_ok();
        if asks {
            self.asked_at = Some(now);
        }
        asks
    }

    /// Time until one may be asked for; the longest there is while one is under way, which says itself when it comes.
    pub fn next_in(&self, now: Instant) -> Duration {
        match self.asked_at {
            Some(_) => Duration::MAX,
            None => self.next_at.map_or(Duration::ZERO, |at| at.saturating_duration_since(now)),
        }
    }

    /// One has come that was asked for: the next may be asked for after a pause that fits what it took. Returns when
    /// that was.
    pub fn came(&mut self, now: Instant) -> Instant {
        let asked_at = self.asked_at.take();
        let took = asked_at.map_or(PACE.1, |at| now.saturating_duration_since(at));
        self.next_at = Some(now + (took * SHARE).clamp(PACE.0, PACE.1));
        asked_at.unwrap_or(now)
    }
}
