//! Old snapshots: the drain rate while another session keeps a snapshot from before the events, against without one.
//!
//! Under such a snapshot no version of a row or of an index entry can be cleaned away, so whatever the daemon writes more
//! than once piles up. The session only reads, as a report or a dump does, or it has written elsewhere, and so holds a
//! transaction id as well. The curves of the first round come with it.

use anyhow::Result;

use super::drain::{self, Drain, HeldSnapshot};
use super::run::BenchRun;
use super::testbed::Outbox;

/// Drains the same backlog under each, round after round.
pub(super) fn run(bench: &mut BenchRun, outbox: &Outbox) -> Result<()> {
    let [_, _, million, _] = bench.scale.growth;
    for round in 1..=bench.scale.rounds {
        for (name, label, held) in [
            ("snapshot.none", "no old snapshot", HeldSnapshot::None),
            ("snapshot.reads", "old snapshot, read-only", HeldSnapshot::ReadOnly),
            ("snapshot.writes", "old snapshot, has written", HeldSnapshot::Written),
        ] {
            let drain = Drain { pending: million, held, ..Drain::usual(bench, name) };
            let curve = drain::on_empty(bench, outbox, round, drain)?;
            if round == 1 {
                bench.curves.push((label.to_owned(), curve));
            }
        }
    }
    Ok(())
}
