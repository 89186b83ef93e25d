//! The builds that the bench compares: this program, and with `--against` another build of it.
//!
//! Each has a private database, migrated by its own `migrate`, and its own daemons run on it; everything else is shared,
//! so the two are measured by turns, and the one that is not measured has an empty outbox, which leaves nothing for
//! autovacuum to do. Only on private servers: on the configured ones nobody tells what their processes use.

use std::path::Path;

use anyhow::Result;

use super::drain::{self, Drain};
use super::events::empty;
use super::run::BenchRun;
use super::testbed::Outbox;

/// A figure of a build: its name for this program, and for the other build.
pub(super) type BuildFigure = [&'static str; 2];

/// The builds.
pub(super) struct Builds {
    /// This program's, and then the other build's.
    outboxes: Vec<Outbox>,
}

impl Builds {
    /// Migrates a database for each build, and drains it once, which does not count.
    pub(super) fn new(bench: &mut BenchRun, other: Option<&Path>) -> Result<Builds> {
        let this = std::env::current_exe()?;
        let mut outboxes = vec![bench.testbed.private_database("this", &this)?];
        if let Some(other) = other {
            outboxes.push(bench.testbed.private_database("other", other)?);
        }
        for outbox in &outboxes {
            let drain = Drain { batch: 1_000, ..Drain::usual(bench, "warm-up") };
            drain::on_empty(bench, outbox, 1, drain)?;
            empty(&mut outbox.session()?)?;
        }
        Ok(Builds { outboxes })
    }

    /// The builds, numbered as in a [`BuildFigure`], in the order of this round: by turns one and the other is first.
    pub(super) fn in_turn(&self, round: usize) -> Vec<(usize, Outbox)> {
        let mut builds: Vec<(usize, Outbox)> = self.outboxes.iter().cloned().enumerate().collect();
        if round.is_multiple_of(2) {
            builds.reverse();
        }
        builds
    }
}
