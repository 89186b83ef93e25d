//! Drains: events are loaded, daemons start, and the time until nothing is pending is taken.
//!
//! The clock runs from the first message in the stream to the settle of the last event, so the start of a process does
//! not count, and everything an event needs does. Afterwards the outbox and the stream are counted: a run that lost or
//! doubled an event is an error, not a figure. CPU time is that of the whole run, the start included.

use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Result, ensure};

use super::events::{KeyDistribution, empty, insert_sql, load};
use super::process;
use super::run::{BenchRun, Point};
use super::testbed::{DaemonOptions, Outbox, Statements};
use crate::lab::daemon::Daemon;
use crate::nats::streams::Batches;
use crate::postgres::Plain;

/// Time between two looks at how far a drain is.
const LOOK: Duration = Duration::from_millis(20);
/// Longest time without progress.
const STALL_LIMIT: Duration = Duration::from_secs(120);
/// Points of a curve at most, about.
const CURVE_POINTS: u64 = 100;
/// A batch is about as fast as the fastest when it drains at this part of its rate: so much do runs of one batch differ.
const ABOUT_BEST: f64 = 0.9;

/// What some other session does all the while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HeldSnapshot {
    /// Nothing.
    None,
    /// It keeps a snapshot from before the events were loaded, and only reads.
    ReadOnly,
    /// The same, and it has written to a table elsewhere.
    Written,
}

/// A drain to be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Drain {
    /// Of its figures.
    pub(super) name: &'static str,
    /// Events loaded.
    pub(super) pending: u64,
    /// Their keys.
    pub(super) keys: KeyDistribution,
    /// Of each instance.
    pub(super) workers: usize,
    /// Of each claim.
    pub(super) batch: usize,
    /// Daemons side by side.
    pub(super) instances: usize,
    /// Of the stream.
    pub(super) batches: Batches,
    /// What another session does.
    pub(super) held: HeldSnapshot,
    /// Whether statements are counted, which then is the only figure.
    pub(super) statements: Statements,
}

/// The smallest batch that is about as fast as the fastest: a larger one only takes more memory. The first drain,
/// on servers that have just been started, does not count.
pub(super) fn find_best_batch(bench: &mut BenchRun, outbox: &Outbox) -> Result<()> {
    let mut rates = Vec::new();
    for &batch in bench.scale.batches.iter().take(1).chain(bench.scale.batches) {
        let tried = Drain { batch, ..Drain::usual(bench, "scan") };
        on_empty(bench, outbox, 1, tried)?;
        rates.push((batch, bench.book.values("scan").last().copied().unwrap_or(0.0)));
    }
    let tried = &rates[1..];
    let best = tried.iter().map(|(_, rate)| *rate).fold(0.0, f64::max);
    let about_best = tried.iter().find(|(_, rate)| *rate >= best * ABOUT_BEST);
    bench.best_batch = about_best.map_or(bench.best_batch, |(batch, _)| *batch);
    Ok(())
}

/// The drains of one round.
pub(super) fn run(bench: &mut BenchRun, outbox: &Outbox, round: usize) -> Result<()> {
    let one_key = KeyDistribution::One;
    on_empty(bench, outbox, round, Drain::usual(bench, "drain.best"))?;
    on_empty(bench, outbox, round, Drain { batch: 100, ..Drain::usual(bench, "drain.100") })?;
    if takes_atomic_batches(bench) {
        let drain =
            Drain { keys: one_key, batches: Batches::Atomic, ..Drain::usual(bench, "drain.one_key_atomic") };
        on_empty(bench, outbox, round, drain)?;
    }
    let few = (bench.scale.events / 5).max(1);
    on_empty(
        bench,
        outbox,
        round,
        Drain { keys: one_key, pending: few, ..Drain::usual(bench, "drain.one_key") },
    )?;
    on_empty(
        bench,
        outbox,
        round,
        Drain { keys: KeyDistribution::Each, ..Drain::usual(bench, "drain.key_each") },
    )?;
    on_empty(bench, outbox, round, Drain { workers: 1, ..Drain::usual(bench, "drain.best.1") })?;
    on_empty(bench, outbox, round, Drain { workers: 1, batch: 100, ..Drain::usual(bench, "drain.100.1") })?;
    Ok(())
}

/// Empties the outbox and drains it.
pub(super) fn on_empty(
    bench: &mut BenchRun,
    outbox: &Outbox,
    round: usize,
    drain: Drain,
) -> Result<Vec<Point>> {
    bench.go_on()?;
    bench.say(round, drain.name);
    bench.progress.set_length(drain.pending);
    bench.progress.set_position(0);
    empty(&mut outbox.session()?)?;
    drain.run(bench, outbox)
}

impl Drain {
    /// The drain that the others differ from in one thing.
    pub(super) fn usual(bench: &BenchRun, name: &'static str) -> Drain {
        Drain {
            name,
            pending: bench.scale.events,
            keys: KeyDistribution::Many(bench.scale.keys),
            workers: bench.scale.workers,
            batch: bench.best_batch,
            instances: 1,
            batches: Batches::None,
            held: HeldSnapshot::None,
            statements: Statements::Uncounted,
        }
    }

    /// Drains `outbox` and notes what it took under `name` and `name.*`. Returns the curve.
    pub(super) fn run(&self, bench: &mut BenchRun, outbox: &Outbox) -> Result<Vec<Point>> {
        let _held = self.hold(outbox)?;
        load(&bench.stop, outbox, &insert_sql(self.keys), self.pending)?;
        self.run_loaded(bench, outbox)
    }

    /// The same once its events are there.
    pub(super) fn run_loaded(&self, bench: &mut BenchRun, outbox: &Outbox) -> Result<Vec<Point>> {
        let mut session = outbox.session()?;
        bench.testbed.fresh_stream(self.batches)?;
        let wal = "SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint";
        let counted = self.statements == Statements::Counted;
        if counted {
            session.run("SELECT public.pg_stat_statements_reset()")?;
        }
        let before = (Used::by_servers(bench)?, session.number(wal)?);
        let mut daemons = (0..self.instances)
            .map(|number| {
                let Drain { workers, batch, statements, .. } = *self;
                bench.testbed.start_daemon(outbox, DaemonOptions { workers, batch, number, statements })
            })
            .collect::<Result<Vec<_>>>()?;
        let curve = self.follow(bench, &mut daemons)?;
        let seconds = curve.last().map_or(f64::NAN, |(seconds, _)| *seconds);
        let (servers, wal) = (Used::by_servers(bench)?, session.number(wal)? - before.1);
        if counted {
            let calls =
                session.number("SELECT coalesce(sum(calls), 0)::bigint FROM public.pg_stat_statements")?;
            self.note(bench, ".statements", calls as f64 * 1e3 / self.pending as f64);
            return self.finish(bench, &mut session, daemons).map(|()| curve);
        }
        bench.book.note(self.name, self.pending as f64 / seconds);
        let per_100k = 1e5 / self.pending as f64;
        let mut own = 0.0;
        let mut memory: f64 = 0.0;
        for daemon in &daemons {
            own += process::cpu_s(daemon.pid())? * per_100k;
            memory = memory.max(process::peak_memory_mib(daemon.pid())?);
        }
        self.note(bench, ".cpu", own);
        if let (Some(before), Some(after)) = (before.0, servers) {
            let postgres = (after.postgres - before.postgres) * per_100k;
            let nats = (after.nats - before.nats) * per_100k;
            self.note(bench, ".cpu_postgres", postgres);
            self.note(bench, ".cpu_nats", nats);
            self.note(bench, ".cpu_all", own + postgres + nats);
        }
        self.note(bench, ".wal", wal as f64 / self.pending as f64);
        self.note(bench, ".memory", memory);
        self.finish(bench, &mut session, daemons)?;
        Ok(curve)
    }

    fn note(&self, bench: &mut BenchRun, what: &str, value: f64) {
        bench.book.note(&format!("{}{what}", self.name), value);
    }

    /// A session that does what is to be done all the while.
    fn hold(&self, outbox: &Outbox) -> Result<Option<Plain>> {
        if self.held == HeldSnapshot::None {
            return Ok(None);
        }
        let mut session = outbox.session()?;
        if self.held == HeldSnapshot::Written {
            session.run("CREATE TABLE IF NOT EXISTS elsewhere (n int)")?;
        }
        session.run("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")?;
        if self.held == HeldSnapshot::Written {
            session.run("INSERT INTO elsewhere VALUES (1)")?;
        }
        Ok(Some(session))
    }

    /// Waits until all is published.
    fn follow(&self, bench: &BenchRun, daemons: &mut [Daemon]) -> Result<Vec<Point>> {
        let mut seen: Vec<(SystemTime, u64)> = Vec::new();
        let mut news = Instant::now();
        loop {
            let published = published(daemons)?;
            let now = SystemTime::now();
            let last = seen.last().map_or(0, |(_, published)| *published);
            if published >= last + (self.pending / CURVE_POINTS).max(1) || published >= self.pending {
                seen.push((now, published));
                news = Instant::now();
                bench.progress.set_position(published);
            }
            if published >= self.pending {
                break;
            }
            bench.go_on()?;
            daemons.iter_mut().try_for_each(Daemon::must_run)?;
            ensure!(news.elapsed() < STALL_LIMIT, "no progress for {STALL_LIMIT:?}: {published} published");
            sleep(LOOK);
        }
        let first = bench.testbed.streams().first_stored(bench.testbed.stream()?)?;
        let since = |at: SystemTime| at.duration_since(first).map_or(0.0, |since| since.as_secs_f64());
        Ok(seen.into_iter().map(|(at, published)| (since(at), published as f64)).collect())
    }

    /// Stops the daemons and makes sure that nothing is left and nothing came twice.
    fn finish(&self, bench: &BenchRun, session: &mut Plain, daemons: Vec<Daemon>) -> Result<()> {
        for mut daemon in daemons {
            ensure!(daemon.drain()?, "the daemon did not stop in order: {}", daemon.log_tail());
        }
        // By an index, however many are published; one in retry or dead was not counted as published.
        let left = session.number(
            "SELECT count(*) FROM outboxes WHERE published_at IS NULL AND dead_at IS NULL AND next_attempt_at IS NULL",
        )?;
        let stored = bench.testbed.streams().messages(bench.testbed.stream()?)?;
        ensure!(
            left == 0 && stored == self.pending,
            "{}: of {} events {left} are pending, and the stream has {stored}",
            self.name,
            self.pending
        );
        Ok(())
    }
}

/// Events that daemons have settled as published.
fn published(daemons: &[Daemon]) -> Result<u64> {
    daemons.iter().map(Daemon::published).sum()
}

/// Processor seconds of the private servers since they started.
struct Used {
    postgres: f64,
    nats: f64,
}

impl Used {
    fn by_servers(bench: &BenchRun) -> Result<Option<Used>> {
        let Some((postgres, nats)) = bench.testbed.pids() else { return Ok(None) };
        Ok(Some(Used { postgres: process::tree_cpu_s(postgres)?, nats: process::cpu_s(nats)? }))
    }
}

fn takes_atomic_batches(bench: &mut BenchRun) -> bool {
    let version = bench.testbed.streams().version();
    let takes = takes_batches(&version);
    let why = format!(
        "atomic batches: this is nats-server {version}, and 2.12 was the first to have them \
         (PG_OUTBOX_NATS_SERVER names the program)"
    );
    if !takes && !bench.omitted.contains(&why) {
        bench.omitted.push(why);
    }
    takes
}

/// Whether a nats-server of this version can take atomic batches.
fn takes_batches(version: &str) -> bool {
    let mut numbers = version.split('.').map_while(|number| number.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(2), Some(12))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        for (version, takes) in
            [("2.9.10", false), ("2.12.0", true), ("2.15.1-RC.1", true), ("3.0.0", true), ("", false)]
        {
            assert_eq!(takes_batches(version), takes, "{version}");
        }
    }
}
