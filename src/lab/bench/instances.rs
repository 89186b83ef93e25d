//! Instances: one backlog drained by one, two and four daemons side by side.

use anyhow::Result;

use super::drain::{self, Drain};
use super::run::BenchRun;
use super::testbed::Outbox;

/// Notes their rates, round after round.
pub(super) fn run(bench: &mut BenchRun, outbox: &Outbox) -> Result<()> {
    for round in 1..=bench.scale.rounds {
        for (name, instances) in [("instances.1", 1), ("instances.2", 2), ("instances.4", 4)] {
            drain::on_empty(bench, outbox, round, Drain { instances, ..Drain::usual(bench, name) })?;
        }
    }
    Ok(())
}
