//! Growth: whether the drain rate stays as more is pending and as more is published.
//!
//! Peak memory comes with it, and with the largest backlog, which takes minutes and wants to be asked for, its curve.

use anyhow::Result;

use super::drain::{self, Drain};
use super::events::{self, KeyDistribution};
use super::run::BenchRun;
use super::testbed::Outbox;

/// What is drawn and compared, round after round. `long` drains the largest backlog as well.
pub(super) fn run(bench: &mut BenchRun, outbox: &Outbox, long: bool) -> Result<()> {
    let [ten, hundred, million, five] = bench.scale.growth;
    let filled = fill_published(bench)?;
    for round in 1..=bench.scale.rounds {
        drain::on_empty(bench, outbox, round, Drain { pending: ten, ..Drain::usual(bench, "growth.10k") })?;
        drain::on_empty(
            bench,
            outbox,
            round,
            Drain { pending: hundred, ..Drain::usual(bench, "growth.100k") },
        )?;
        bench.say(round, "growth.published");
        filled.session()?.run("VACUUM outboxes")?;
        Drain { pending: hundred, ..Drain::usual(bench, "growth.published") }.run(bench, &filled)?;
        drain::on_empty(
            bench,
            outbox,
            round,
            Drain { pending: million, ..Drain::usual(bench, "growth.1m") },
        )?;
    }
    if long {
        let curve =
            drain::on_empty(bench, outbox, 1, Drain { pending: five, ..Drain::usual(bench, "growth.5m") })?;
        bench.curves.push(("5 million".to_owned(), curve));
    }
    Ok(())
}

/// An outbox with published events over the last 13 months.
fn fill_published(bench: &mut BenchRun) -> Result<Outbox> {
    bench.say(1, "published events");
    let outbox = bench.testbed.outbox("published")?;
    let mut session = outbox.session()?;
    let months = 13;
    for ago in 0..months {
        session.run(&format!(
            "SELECT create_monthly_partition('outboxes', (date_trunc('month', now()) - interval '{ago} months')::date)"
        ))?;
    }
    let events = events::insert_sql(KeyDistribution::Many(bench.scale.keys))
        .replace("(topic, metadata, payload)", "(topic, metadata, payload, created_at, published_at, attempts)")
        .replace(
            "FROM generate_series",
            ", date_trunc('month', now()) - (n % 13) * interval '1 month' + interval '1 minute', now(), 1 FROM generate_series",
        );
    events::load(&bench.stop, &outbox, &events, bench.scale.published)?;
    session.run("VACUUM ANALYZE outboxes")?;
    Ok(outbox)
}
