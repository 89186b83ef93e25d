//! Latency: from the moment in which a writer hears that its COMMIT is done to the one in which the stream has stored
//! the event.
//!
//! Both are read from clocks: the writer's and the stream server's, which are one and the same unless the configured
//! servers are elsewhere. The stream is read back after the writers have ended, so that reading takes nothing from what
//! is measured. Writers keep to a timetable; one that is late does not wait, and what was written a second is a figure
//! of its own.

use std::thread::{self, sleep};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::events::{INSERT_PREPARED, KeyDistribution, empty, prepare};
use super::run::BenchRun;
use super::testbed::{Outbox, Statements};
use super::threads::join_all;
use crate::lab::daemon::Daemon;
use crate::lab::numbers::percentile;
use crate::nats::reader::StreamReader;
use crate::nats::streams::Batches;
use crate::postgres::{Insert, Plain};

/// Longest time without progress.
const STALL_LIMIT: Duration = Duration::from_secs(60);
/// Time between two looks at how much is published.
const LOOK: Duration = Duration::from_millis(20);
/// Time for the daemon to fall asleep before the first event.
const SETTLE_DOWN: Duration = Duration::from_secs(2);

/// Notes latencies under every load, round after round.
pub(super) fn run(bench: &mut BenchRun, outbox: &Outbox) -> Result<()> {
    let lasts = bench.scale.latency;
    let rate = ["drain.best", "scan"].iter().find_map(|name| bench.book.spread(name)).map(|rate| rate.median);
    let half = rate.context("no drain was measured")? / 2.0;
    for round in 1..=bench.scale.rounds {
        for load in [
            Load { name: "latency.idle", rate: 10.0, events: 1, writers: 1, lasts },
            Load { name: "latency.1000", rate: 1_000.0, events: 1, writers: 4, lasts: lasts / 2 },
            Load { name: "latency.half", rate: half, events: 50, writers: 8, lasts: lasts / 2 },
        ] {
            bench.go_on()?;
            bench.say(round, load.name);
            load.run(bench, outbox)?;
        }
    }
    Ok(())
}

/// A load to be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    /// Of its figures.
    pub(super) name: &'static str,
    /// Events a second.
    pub(super) rate: f64,
    /// Events of one transaction.
    pub(super) events: i64,
    /// Writers at the same time.
    pub(super) writers: usize,
    /// How long.
    pub(super) lasts: Duration,
}

impl Load {
    /// Writes events at this rate and notes when they were stored.
    pub(super) fn run(&self, bench: &mut BenchRun, outbox: &Outbox) -> Result<()> {
        let mut session = outbox.session()?;
        self.prepare(&mut session)?;
        empty(&mut session)?;
        bench.testbed.fresh_stream(Batches::None)?;
        let options = bench.daemon_options(Statements::Uncounted);
        let mut daemon = bench.testbed.start_daemon(outbox, options)?;
        self.measure(bench, outbox, &mut daemon)?;
        ensure!(daemon.drain()?, "the daemon did not stop in order: {}", daemon.log_tail());
        Ok(())
    }

    /// The same with a daemon that runs, once it sleeps, and with events that [`Load::prepare`] has made.
    pub(super) fn measure(&self, bench: &mut BenchRun, outbox: &Outbox, daemon: &mut Daemon) -> Result<()> {
        sleep(SETTLE_DOWN.min(self.lasts));
        let stored = bench.testbed.streams().messages(bench.testbed.stream()?)?;
        let published = daemon.published()?;
        let began = Instant::now();
        let committed_ns = self.write(outbox)?;
        let seconds = began.elapsed().as_secs_f64();
        await_published(bench, daemon, published + committed_ns.len() as u64)?;
        let mut latencies_ms = self.read_back(bench, stored + 1, &committed_ns)?;
        latencies_ms.sort_by(f64::total_cmp);
        let mut note = |what: &str, value: f64| bench.book.note(&format!("{}.{what}", self.name), value);
        note("rate", committed_ns.len() as f64 / seconds);
        note("p50", percentile(&latencies_ms, 50).unwrap_or(f64::NAN));
        note("p99", percentile(&latencies_ms, 99).unwrap_or(f64::NAN));
        note("max", percentile(&latencies_ms, 100).unwrap_or(f64::NAN));
        Ok(())
    }

    /// Its events.
    pub(super) fn count(&self) -> u64 {
        (self.transactions() * self.events).unsigned_abs()
    }

    /// Makes its events.
    pub(super) fn prepare(&self, session: &mut Plain) -> Result<()> {
        prepare(session, KeyDistribution::Many(1_000), self.transactions() * self.events)
    }

    /// Transactions a second.
    fn per_second(&self) -> f64 {
        self.rate / self.events as f64
    }

    /// Transactions in all.
    fn transactions(&self) -> i64 {
        (self.per_second() * self.lasts.as_secs_f64()).round().max(1.0) as i64
    }

    /// Returns for each event, by its number from 1 on, when its COMMIT was answered, in ns since 1970.
    fn write(&self, outbox: &Outbox) -> Result<Vec<i64>> {
        let (per_second, transactions) = (self.per_second(), self.transactions());
        let mut sessions = Vec::new();
        for _ in 0..self.writers {
            sessions.push(outbox.session()?.into_insert(INSERT_PREPARED)?);
        }
        let began = Instant::now();
        let writers = sessions.len();
        let mut committed: Vec<(i64, i64)> = thread::scope(|scope| {
            let threads: Vec<_> = sessions
                .into_iter()
                .enumerate()
                .map(|(first, session)| {
                    let turns = (0..transactions).skip(first).step_by(writers);
                    scope.spawn(move || self.keep_to(turns, began, per_second, session))
                })
                .collect();
            join_all(threads)
        })?
        .concat();
        committed.sort_unstable();
        let events = usize::try_from(self.events).context("so many events")?;
        Ok(committed.into_iter().flat_map(|(_, at)| std::iter::repeat_n(at, events)).collect())
    }

    fn keep_to(
        &self,
        turns: impl Iterator<Item = i64>,
        began: Instant,
        per_second: f64,
        mut session: Insert,
    ) -> Result<Vec<(i64, i64)>> {
        let mut committed = Vec::new();
        for turn in turns {
            let due = began + Duration::from_secs_f64(turn as f64 / per_second);
            sleep(due.saturating_duration_since(Instant::now()));
            let first = turn * self.events + 1;
            session.insert(first, first + self.events - 1)?;
            let at = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos();
            committed.push((turn, i64::try_from(at)?));
        }
        Ok(committed)
    }

    /// The latency of each event, from the stream's message `first` on.
    fn read_back(&self, bench: &BenchRun, first: u64, committed_ns: &[i64]) -> Result<Vec<f64>> {
        let (url, auth) = bench.testbed.nats();
        let mut reader = StreamReader::open_at(url, auth, bench.testbed.stream()?, first)?;
        let mut latencies_ms = Vec::with_capacity(committed_ns.len());
        while latencies_ms.len() < committed_ns.len() {
            let message = reader.next(STALL_LIMIT)?.context("the stream ends before its last event")?;
            let Numbered { n } = serde_json::from_slice(&message.payload)?;
            let committed = committed_ns.get(n.wrapping_sub(1)).context("an event that nobody wrote")?;
            // The stream may have it a moment before the writer has heard of its COMMIT.
            latencies_ms.push(((message.stored_at_ns - committed) as f64 / 1e6).max(0.0));
        }
        Ok(latencies_ms)
    }
}

/// An event's payload says which one it is.
#[derive(Deserialize)]
struct Numbered {
    n: usize,
}

/// Waits until the daemon has published `total` events since it started.
pub(super) fn await_published(bench: &BenchRun, daemon: &mut Daemon, total: u64) -> Result<()> {
    let (mut published, mut news) = (daemon.published()?, Instant::now());
    while published < total {
        bench.go_on()?;
        daemon.must_run()?;
        ensure!(
            news.elapsed() < STALL_LIMIT,
            "no progress for {STALL_LIMIT:?}: {published} of {total} events"
        );
        sleep(LOOK);
        let now = daemon.published()?;
        if now > published {
            (published, news) = (now, Instant::now());
        }
    }
    Ok(())
}
