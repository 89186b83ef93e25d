//! Idle: what a daemon with nothing to do takes of its machine, and asks of the database.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::testbed::{DaemonOptions, Outbox, Statements};
use super::{Bench, drain, process};
use crate::nats::streams::Batches;

/// Time for the daemon to fall asleep.
const SETTLE_DOWN: Duration = Duration::from_secs(4);

/// Notes CPU and statements of an idle daemon.
pub(super) fn run(bench: &mut Bench, outbox: &Outbox) -> Result<()> {
    let mut session = outbox.session()?;
    drain::empty(&mut session)?;
    bench.testbed.fresh_stream(Batches::None)?;
    let options = DaemonOptions {
        workers: bench.scale.workers,
        batch: bench.best_batch,
        number: 0,
        statements: Statements::Counted,
    };
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
