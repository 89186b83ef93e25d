//! Against: this program and another build of it, drain by drain and by turns.
//!
//! What is noted of a drain is noted of both: the rate, the processor time of the three, and the WAL. The report shows them
//! beside each other with their ratio, which is taken within each round.

use anyhow::Result;

use super::builds::{BuildFigure, Builds};
use super::drain::{self, Drain};
use super::events::empty;
use super::run::BenchRun;

/// The batches that are compared, and the names of their drains.
const BATCHES: [(usize, BuildFigure); 2] =
    [(1_000, ["against.1000", "other.against.1000"]), (100, ["against.100", "other.against.100"])];

/// Drains with both, round after round.
pub(super) fn run(bench: &mut BenchRun, builds: &Builds) -> Result<()> {
    for round in 1..=bench.scale.rounds {
        for (batch, names) in BATCHES {
            for (build, outbox) in builds.in_turn(round) {
                let drain = Drain { batch, ..Drain::usual(bench, names[build]) };
                drain::on_empty(bench, &outbox, round, drain)?;
                empty(&mut outbox.session()?)?;
            }
        }
    }
    Ok(())
}
