//! Cost: how many statements an event takes, and what a daemon with nothing to do takes of its machine and asks of the
//! database. (CPU, WAL and memory come with every drain.)

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::drain::{self, Drain};
use super::events::empty;
use super::process;
use super::run::BenchRun;
use super::testbed::{Outbox, Statements};
use crate::nats::streams::Batches;

/// Time for the daemon to fall asleep.
const SETTLE_DOWN: Duration = Duration::from_secs(4);

/// Notes statements an event and what an idle daemon takes, round after round.
pub(super) fn run(bench: &mut BenchRun, outbox: &Outbox) -> Result<()> {
    if !bench.testbed.counts_statements() {
        bench.omitted.push("statements: pg_stat_statements is not at hand".into());
    }
    for round in 1..=bench.scale.rounds {
        if bench.testbed.counts_statements() {
            let statements = Statements::Counted;
            drain::on_empty(bench, outbox, round, Drain { statements, ..Drain::usual(bench, "cost.best") })?;
            drain::on_empty(
                bench,
                outbox,
                round,
                Drain { statements, batch: 100, ..Drain::usual(bench, "cost.100") },
            )?;
        }
        bench.say(round, "idle");
        idle(bench, outbox)?;
    }
    Ok(())
}

/// Notes CPU and statements of an idle daemon.
fn idle(bench: &mut BenchRun, outbox: &Outbox) -> Result<()> {
    let mut session = outbox.session()?;
    empty(&mut session)?;
    bench.testbed.fresh_stream(Batches::None)?;
    let options = bench.daemon_options(Statements::Counted);
    let daemon = bench.testbed.start_daemon(outbox, options)?;
    sleep(SETTLE_DOWN.min(2 * bench.scale.idle));
    let counts = bench.testbed.counts_statements();
    if counts {
        session.run("SELECT public.pg_stat_statements_reset()")?;
    }
    let (began, before) = (Instant::now(), process::threads_cpu_s(daemon.pid())?);
    sleep(bench.scale.idle);
    let seconds = began.elapsed().as_secs_f64();
    let used = process::threads_cpu_s(daemon.pid())? - before;
    bench.book.note("idle.cpu", used / seconds * 100.0);
    if counts {
        let calls =
            session.number("SELECT coalesce(sum(calls), 0)::bigint FROM public.pg_stat_statements")?;
        bench.book.note("idle.statements", calls as f64 / seconds);
    }
    Ok(())
}
