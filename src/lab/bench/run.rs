//! A bench under way: where it works, how much it does, what it has noted, and whether somebody wants it to end.
//!
//! It lives on the main thread; sessions that load events see the flag alone. Every part of the bench gets it, notes its
//! values in the book and leaves the rest to the report.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, ensure};
use indicatif::ProgressBar;

use super::book::Book;
use super::options::Scale;
use super::testbed::{DaemonOptions, Statements, Testbed};

/// A point of a curve: seconds since the first message, and events published until then.
pub(super) type Point = (f64, f64);

/// A bench under way.
pub(super) struct BenchRun {
    pub(super) scale: Scale,
    pub(super) testbed: Testbed,
    pub(super) book: Book,
    pub(super) best_batch: usize,
    pub(super) curves: Vec<(String, Vec<Point>)>,
    pub(super) omitted: Vec<String>,
    pub(super) progress: ProgressBar,
    pub(super) stop: Arc<AtomicBool>,
}

impl BenchRun {
    /// An error once somebody has asked us to stop.
    pub(super) fn go_on(&self) -> Result<()> {
        go_on(&self.stop)
    }

    /// How a daemon of the bench is configured, unless said otherwise.
    pub(super) fn daemon_options(&self, statements: Statements) -> DaemonOptions {
        DaemonOptions { workers: self.scale.workers, batch: self.best_batch, number: 0, statements }
    }

    /// Shows what is being measured.
    pub(super) fn say(&self, round: usize, what: &str) {
        self.progress.set_message(format!("round {round} of {}: {what}", self.scale.rounds));
        self.progress.tick();
    }
}

/// The same for a session that loads events.
pub(super) fn go_on(stop: &AtomicBool) -> Result<()> {
    ensure!(!stop.load(Ordering::Relaxed), "interrupted: what the bench had made is removed");
    Ok(())
}
