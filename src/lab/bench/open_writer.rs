//! Open writer: one transaction that has inserted one event stays open, as a nightly batch or a leaked session does, while
//! everybody else goes on.
//!
//! Behind it events come in steps, each committed at once and drained before the next; a daemon that looks again at all
//! that was published since that writer began becomes slower from step to step. Then single events are timed with the
//! writer still open, and again once it has ended and its own event is published. It is one daemon all the while. Its
//! first step, before the writer begins, does not count.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::events::{KeyDistribution, empty, insert_sql};
use super::latency::{Load, await_published};
use super::run::{BenchRun, Point};
use super::testbed::{Outbox, Statements};
use crate::lab::daemon::Daemon;
use crate::nats::streams::Batches;
use crate::postgres::Insert;

/// Steps behind the open writer. The first two are compared with the last two.
pub(super) const STEPS: u64 = 20;
/// What the open writer inserts.
const LATE: &str = "BEGIN; INSERT INTO outboxes (topic, metadata, payload)
     VALUES ('order.placed', '{\"ordering-key\": \"late\"}', '{\"n\": 0}')";

/// Notes rates and latencies, round after round.
pub(super) fn run(bench: &mut BenchRun, outbox: &Outbox) -> Result<()> {
    for round in 1..=bench.scale.rounds {
        bench.say(round, "open_writer");
        let curve = run_once(bench, outbox)?;
        if round == 1 {
            bench.curves.push(("behind an open writer".to_owned(), curve));
        }
    }
    Ok(())
}

fn run_once(bench: &mut BenchRun, outbox: &Outbox) -> Result<Vec<Point>> {
    let lasts = bench.scale.latency;
    let single = |name| Load { name, rate: 10.0, events: 1, writers: 1, lasts };
    let (open, ended) = (single("open_writer.open"), single("open_writer.ended"));
    let mut session = outbox.session()?;
    open.prepare(&mut session)?;
    empty(&mut session)?;
    bench.testbed.fresh_stream(Batches::None)?;
    let keys = KeyDistribution::Many(bench.scale.keys);
    let mut steps = Steps {
        insert: outbox.session()?.into_insert(&insert_sql(keys))?,
        size: bench.scale.step,
        inserted: 0,
        daemon: bench.testbed.start_daemon(outbox, bench.daemon_options(Statements::Uncounted))?,
    };
    steps.run(bench)?;
    let mut writer = outbox.session()?;
    writer.run(LATE)?;
    let took = (0..STEPS).map(|_| steps.run(bench)).collect::<Result<Vec<Duration>>>()?;
    let rate = |some: &[Duration]| {
        (some.len() as u64 * steps.size) as f64 / some.iter().sum::<Duration>().as_secs_f64()
    };
    bench.book.note("open_writer.first", rate(&took[..2]));
    bench.book.note("open_writer.last", rate(&took[took.len() - 2..]));
    let curve = curve(&took, steps.size);
    let Steps { inserted, mut daemon, .. } = steps;
    open.measure(bench, outbox, &mut daemon)?;
    let published = daemon.published()?;
    writer.run("COMMIT")?;
    await_published(bench, &mut daemon, published + 1)?;
    ended.measure(bench, outbox, &mut daemon)?;
    ensure!(daemon.drain()?, "the daemon did not stop in order: {}", daemon.log_tail());
    let stored = bench.testbed.streams().messages(bench.testbed.stream()?)?;
    let expected = inserted + 1 + 2 * open.count();
    ensure!(stored == expected, "of {expected} events the stream has {stored}");
    Ok(curve)
}

/// Events behind the open writer, and who publishes them.
struct Steps {
    insert: Insert,
    /// Events of each.
    size: u64,
    inserted: u64,
    daemon: Daemon,
}

impl Steps {
    /// Commits a step's events at once. Returns the time from there until all of them are published.
    fn run(&mut self, bench: &BenchRun) -> Result<Duration> {
        let first = self.inserted + 1;
        self.inserted += self.size;
        self.insert.insert(i64::try_from(first)?, i64::try_from(self.inserted)?)?;
        let committed = Instant::now();
        await_published(bench, &mut self.daemon, self.inserted)?;
        Ok(committed.elapsed())
    }
}

/// How much was published after how many seconds of draining.
fn curve(took: &[Duration], step: u64) -> Vec<Point> {
    let mut at = Duration::ZERO;
    took.iter()
        .zip(1_u64..)
        .map(|(took, number)| {
            at += *took;
            (at.as_secs_f64(), (number * step) as f64)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_adds_up_the_steps() {
        let took = [1, 2, 4].map(Duration::from_secs);
        assert_eq!(curve(&took, 10), [(1.0, 10.0), (3.0, 20.0), (7.0, 30.0)]);
    }
}
