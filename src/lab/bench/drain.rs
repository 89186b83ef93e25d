//! Drains: events are loaded, daemons start, and the time until nothing is pending is taken.
//!
//! The clock runs from the first message in the stream to the settle of the last event, so the start of a process does
//! not count, and everything an event needs does. Afterwards the outbox and the stream are counted: a run that lost or
//! doubled an event is an error, not a figure. CPU time is that of the whole run, the start included.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::thread::{self, sleep};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};

use super::testbed::{DaemonOptions, Outbox, Statements};
use super::{Bench, process};
use crate::lab::daemon::Daemon;
use crate::nats::streams::Batches;
use crate::postgres::Plain;

/// Time between two looks at how far a drain is.
const LOOK: Duration = Duration::from_millis(20);
/// Longest time without progress.
const STALL_LIMIT: Duration = Duration::from_secs(120);
/// Sessions that load events, and how many events each inserts at a time.
const LOADERS: usize = 2;
const LOAD_STEP: i64 = 10_000;
/// Points of a curve at most, about.
const CURVE_POINTS: u64 = 100;

/// Which keys the events have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KeyDistribution {
    /// So many, by turns.
    Many(u64),
    /// One.
    One,
    /// Each event its own.
    Each,
}

impl KeyDistribution {
    /// The key of event `n`, as SQL.
    fn sql(self) -> String {
        match self {
            KeyDistribution::Many(keys) => format!("'key-' || n % {keys}"),
            KeyDistribution::One => "'key'".into(),
            KeyDistribution::Each => "'key-' || n".into(),
        }
    }
}

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

/// A point of a curve: seconds since the first message, and events published until then.
pub(super) type Point = (f64, f64);

/// A SELECT of `number`, topic, metadata and payload of the events `first` to `last`, which are SQL: of about 450 bytes of
/// payload and metadata each.
fn events_sql(keys: KeyDistribution, number: &str, first: &str, last: &str) -> String {
    format!(
        "SELECT {number} 'order.placed' AS topic,
                jsonb_build_object('ordering-key', {}, 'content-type', 'application/json',
                                   'trace-id', md5(n::text), 'tenant', 'tenant-' || n % 7) AS metadata,
                jsonb_build_object('n', n, 'order', md5((n * 7)::text), 'customer', 'customer-' || n % 1000,
                                   'amount', n % 100000, 'currency', 'EUR', 'lines',
                                   jsonb_build_array(md5((n * 3)::text), md5((n * 5)::text), md5((n * 11)::text)),
                                   'note', repeat('It will be delivered. ', 4)) AS payload
           FROM generate_series({first}::bigint, {last}::bigint) AS n",
        keys.sql()
    )
}

/// An INSERT of events `$1` to `$2`.
pub(super) fn insert_sql(keys: KeyDistribution) -> String {
    format!("INSERT INTO outboxes (topic, metadata, payload) {}", events_sql(keys, "", "$1", "$2"))
}

/// An INSERT of events `$1` to `$2` out of those that [`prepare`] has made.
pub(super) const INSERT_PREPARED: &str = "INSERT INTO outboxes (topic, metadata, payload)
     SELECT topic, metadata, payload FROM prepared_events WHERE n BETWEEN $1 AND $2";

/// Makes events 1 to `count`, and lays them aside. Applications make theirs elsewhere; here that would take as much of
/// the processors as to insert them does.
pub(super) fn prepare(session: &mut Plain, keys: KeyDistribution, count: i64) -> Result<()> {
    let events = events_sql(keys, "n,", "1", &count.to_string());
    for sql in [
        "DROP TABLE IF EXISTS prepared_events",
        &format!("CREATE UNLOGGED TABLE prepared_events AS {events}"),
        "CREATE UNIQUE INDEX ON prepared_events (n)",
        "ANALYZE prepared_events",
    ] {
        session.run(sql)?;
    }
    Ok(())
}

/// Loads events 1 to `count` by `sql`, which is as [`insert_sql`] makes it: in several sessions at the same time, as
/// loading takes longer than draining.
pub(super) fn load(stop: &AtomicBool, outbox: &Outbox, sql: &str, count: u64) -> Result<()> {
    let count = i64::try_from(count).context("so many events")?;
    let next = &AtomicI64::new(1);
    let load_some = || -> Result<()> {
        let mut insert = outbox.session()?.into_insert(sql)?;
        loop {
            super::go_on(stop)?;
            let first = next.fetch_add(LOAD_STEP, Ordering::Relaxed);
            if first > count {
                return Ok(());
            }
            insert.insert(first, count.min(first + LOAD_STEP - 1))?;
        }
    };
    thread::scope(|scope| {
        let loaders: Vec<_> = (0..LOADERS).map(|_| scope.spawn(load_some)).collect();
        for loader in loaders {
            match loader.join() {
                Ok(loaded) => loaded?,
                Err(_) => bail!("a session that loads panicked"),
            }
        }
        Ok(())
    })
}

/// Makes the outbox empty, and what it costs to write to it the same as ever.
pub(super) fn empty(session: &mut Plain) -> Result<()> {
    session.run("TRUNCATE outboxes")?;
    checkpoint(session);
    Ok(())
}

/// Only a superuser may, and nothing depends on it.
fn checkpoint(session: &mut Plain) {
    let _ = session.run("CHECKPOINT");
}

impl Drain {
    /// Drains `outbox` and notes what it took under `name` and `name.*`. Returns the curve.
    pub(super) fn run(&self, bench: &mut Bench, outbox: &Outbox) -> Result<Vec<Point>> {
        let mut session = outbox.session()?;
        let _held = self.hold(outbox)?;
        load(&bench.stop, outbox, &insert_sql(self.keys), self.pending)?;
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

    fn note(&self, bench: &mut Bench, what: &str, value: f64) {
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
    fn follow(&self, bench: &Bench, daemons: &mut [Daemon]) -> Result<Vec<Point>> {
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
    fn finish(&self, bench: &Bench, session: &mut Plain, daemons: Vec<Daemon>) -> Result<()> {
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
    let each = daemons.iter().map(|daemon| daemon.metric("outbox_events_published_total"));
    Ok(each.sum::<Result<f64>>()? as u64)
}

/// Processor seconds of the private servers since they started.
struct Used {
    postgres: f64,
    nats: f64,
}

impl Used {
    fn by_servers(bench: &Bench) -> Result<Option<Used>> {
        let Some((postgres, nats)) = bench.testbed.pids() else { return Ok(None) };
        Ok(Some(Used { postgres: process::tree_cpu_s(postgres)?, nats: process::cpu_s(nats)? }))
    }
}
