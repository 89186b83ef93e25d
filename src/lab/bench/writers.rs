//! Writers: what an INSERT costs an application, with our trigger and without it.
//!
//! Sixteen sessions insert as fast as they can, an event a transaction. The daemon is busy with what they write, or
//! it is asleep: stopped in the moment in which it sleeps, so that every transaction notifies, as only the first ones
//! do otherwise.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::process::Signal;

use super::events::{KeyDistribution, empty, insert_sql};
use super::run::BenchRun;
use super::testbed::{Outbox, Statements};
use super::threads::join_all;
use crate::nats::streams::Batches;
use crate::postgres::Plain;

/// Sessions that insert at the same time.
const WRITERS: usize = 16;
/// Time that does not count, in which the daemon gets to work.
const WARM_UP: Duration = Duration::from_millis(500);
/// Longest wait for the daemon to sleep.
const SLEEP_LIMIT: Duration = Duration::from_secs(30);

/// Notes inserts a second under each, round after round.
pub(super) fn run(bench: &mut BenchRun, outbox: &Outbox) -> Result<()> {
    let lasts = bench.scale.writing;
    for round in 1..=bench.scale.rounds {
        for (name, trigger, daemon) in [
            ("writers.busy.trigger", Trigger::Ours, DaemonState::Busy),
            ("writers.busy.none", Trigger::None, DaemonState::Busy),
            ("writers.asleep.trigger", Trigger::Ours, DaemonState::Asleep),
            ("writers.asleep.none", Trigger::None, DaemonState::Asleep),
        ] {
            bench.go_on()?;
            bench.say(round, name);
            Writers { name, trigger, daemon }.run(bench, outbox, lasts)?;
        }
    }
    Ok(())
}

/// Whether our trigger is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trigger {
    /// It is.
    Ours,
    /// It is disabled.
    None,
}

/// What the daemon does meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DaemonState {
    /// It publishes what is written.
    Busy,
    /// It sleeps.
    Asleep,
}

/// Writers to be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Writers {
    /// Of the figure.
    pub(super) name: &'static str,
    /// The trigger.
    pub(super) trigger: Trigger,
    /// The daemon.
    pub(super) daemon: DaemonState,
}

impl Writers {
    /// Writes for `lasts` and notes inserts a second.
    pub(super) fn run(&self, bench: &mut BenchRun, outbox: &Outbox, lasts: Duration) -> Result<()> {
        let mut session = outbox.session()?;
        empty(&mut session)?;
        bench.testbed.fresh_stream(Batches::None)?;
        let word = if self.trigger == Trigger::Ours { "ENABLE" } else { "DISABLE" };
        session.run(&format!("ALTER TABLE outboxes {word} TRIGGER outboxes_notify"))?;
        let written = self.write(bench, outbox, &mut session, lasts);
        session.run("ALTER TABLE outboxes ENABLE TRIGGER outboxes_notify")?;
        bench.book.note(self.name, written?);
        Ok(())
    }

    fn write(&self, bench: &BenchRun, outbox: &Outbox, session: &mut Plain, lasts: Duration) -> Result<f64> {
        let options = bench.daemon_options(Statements::Uncounted);
        let daemon = bench.testbed.start_daemon(outbox, options)?;
        if self.daemon == DaemonState::Asleep {
            if self.trigger == Trigger::Ours {
                await_sleep(bench, session)?;
            }
            daemon.signal(Signal::STOP)?;
        }
        insert_all(outbox, lasts)
    }
}

/// Waits until the sleep lock is held, from which on every writer notifies.
fn await_sleep(bench: &BenchRun, session: &mut Plain) -> Result<()> {
    let deadline = Instant::now() + SLEEP_LIMIT;
    let held = "SELECT count(*) FROM pg_locks
                 WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND granted AND classid = 1869968483
                   AND objid = 'outboxes'::regclass";
    while session.number(held)? == 0 {
        bench.go_on()?;
        ensure!(Instant::now() < deadline, "the daemon does not fall asleep");
        sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Inserts a second, of all writers.
fn insert_all(outbox: &Outbox, lasts: Duration) -> Result<f64> {
    let mut sessions = Vec::new();
    for _ in 0..WRITERS {
        sessions.push(outbox.session()?.into_insert(&insert_sql(KeyDistribution::Many(1_000)))?);
    }
    let (next, stop) = (&AtomicI64::new(1), &AtomicBool::new(false));
    thread::scope(|scope| {
        let threads: Vec<_> = sessions
            .into_iter()
            .map(|mut session| {
                scope.spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        let n = next.fetch_add(1, Ordering::Relaxed);
                        session.insert(n, n)?;
                    }
                    Ok::<(), anyhow::Error>(())
                })
            })
            .collect();
        sleep(WARM_UP.min(lasts));
        let (began, first) = (Instant::now(), next.load(Ordering::Relaxed));
        sleep(lasts);
        let rate = (next.load(Ordering::Relaxed) - first) as f64 / began.elapsed().as_secs_f64();
        stop.store(true, Ordering::Relaxed);
        join_all(threads)?;
        Ok(rate)
    })
}
