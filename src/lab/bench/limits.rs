//! The limits: what each server does when nothing but its own part is asked of it.
//!
//! The database alone runs the claims of the service, with its statements and settings, and settles every event as
//! published without publishing it. The same events, with the headers that the service gives them, then go to a stream
//! through the barest client that there is: pipelined, and one at a time.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::events::{KeyDistribution, empty, insert_sql, load};
use super::run::BenchRun;
use super::testbed::Outbox;
use super::threads::join_all;
use crate::config::Database;
use crate::event::headers::HeaderPolicy;
use crate::event::{Event, Outcome};
use crate::lane::LANES;
use crate::lane::marks::Marks;
use crate::nats::raw::{Message, Raw};
use crate::nats::streams::Batches;
use crate::postgres::{ClaimLimits, ClaimSettings, Large, Store};

/// Messages without an ack at most: where the service's own limit is, and a stream's is not far.
const WINDOW: usize = 5_000;
/// Of how many the one at a time are.
const ONE_AT_A_TIME: usize = 10_000;

/// Notes all three limits.
pub(super) fn run(bench: &mut BenchRun, outbox: &Outbox) -> Result<()> {
    let scale = &bench.scale;
    let (events, keys, workers, batch) = (scale.events, scale.keys, scale.workers, bench.best_batch);
    empty(&mut outbox.session()?)?;
    load(&bench.stop, outbox, &insert_sql(KeyDistribution::Many(keys)), events)?;
    let (took, events) = database_alone(outbox, workers, batch)?;
    ensure!(events.len() as u64 == bench.scale.events, "claims found {} events", events.len());
    bench.book.note("database.alone", events.len() as f64 / took.as_secs_f64());
    for (name, window, count) in
        [("publish.alone", WINDOW, events.len()), ("publish.one", 1, ONE_AT_A_TIME.min(events.len()))]
    {
        bench.go_on()?;
        bench.testbed.fresh_stream(Batches::None)?;
        let took = publish_alone(bench, &events[..count], window)?;
        bench.book.note(name, count as f64 / took.as_secs_f64());
    }
    Ok(())
}

fn publish_alone(bench: &BenchRun, events: &[Event], window: usize) -> Result<Duration> {
    let policy = HeaderPolicy {
        instance: "bench-0".into(),
        stream: Some(bench.testbed.stream()?.to_owned()),
        allow: Vec::new(),
        replay: None,
    };
    let made: Vec<(String, String)> = events
        .iter()
        .map(|event| (format!("{}.{}", bench.testbed.prefix(), event.topic), policy.build(event).block))
        .collect();
    let messages: Vec<Message> = events
        .iter()
        .zip(&made)
        .map(|(event, (subject, headers))| Message { subject, headers, payload: event.payload.as_bytes() })
        .collect();
    let (url, auth) = bench.testbed.nats();
    Raw::connect(url, auth)?.publish_all(&messages, window)
}

/// Claims and settles everything, each thread its own lanes; returns the time and the events.
fn database_alone(outbox: &Outbox, threads: usize, batch: usize) -> Result<(Duration, Vec<Event>)> {
    let settings = ClaimSettings {
        synchronous_commit: false,
        idle_in_transaction_timeout: Duration::from_secs(60),
        ordered: true,
        block_on_dead: false,
        backoff_max: Duration::from_secs(300),
        max_claim_bytes: 16 << 20,
    };
    let database = Database {
        max_connections: u32::try_from(threads.max(2)).unwrap_or(u32::MAX),
        max_idle: u32::try_from(threads).unwrap_or(u32::MAX),
        connect_timeout: Duration::from_secs(10),
        listen: false,
        ..Database::defaults(outbox.dsn(), outbox.parts())
    };
    let store = Store::new(&database, "bench", settings)?;
    // Statements are prepared once a connection.
    store.probe_sessions()?;
    let shares: Vec<Vec<i32>> = (0..threads)
        .map(|share| {
            (0..LANES)
                .filter(|&lane| usize::try_from(lane).is_ok_and(|lane| lane % threads == share))
                .collect()
        })
        .collect();
    let began = Instant::now();
    let events = thread::scope(|scope| {
        let threads: Vec<_> =
            shares.iter().map(|lanes| scope.spawn(|| claim_all(&store, lanes, batch))).collect();
        join_all(threads)
    })?;
    Ok((began.elapsed(), events.into_iter().flatten().collect()))
}

/// Claims and settles these lanes to their ends, each claim from the marks of the one before, as nobody else does.
fn claim_all(store: &Store, lanes: &[i32], batch: usize) -> Result<Vec<Event>> {
    let events = i32::try_from(batch).unwrap_or(i32::MAX);
    let limits = ClaimLimits { lanes: LANES, events, event_bytes: Some(usize::MAX) };
    let mut marks = Marks::default();
    marks.observe(&store.sample()?.sample);
    let mut all = Vec::new();
    loop {
        let mut claim = store.open()?.lock(lanes, limits, &marks)?.read(Large::Alone)?;
        if claim.is_empty() {
            return Ok(all);
        }
        let events = claim.take_events();
        let rows: Vec<_> = events.iter().map(Event::row).collect();
        let (basis, mut ends) = (claim.basis(), claim.ends([]));
        let settled = claim.settle(rows.iter().map(|row| (row, &Outcome::Published)), &mut ends)?;
        ends.iter().for_each(|end| marks.ended(&basis, end));
        ensure!(settled.missed == 0, "{} events were settled by somebody else", settled.missed);
        all.extend(events);
    }
}
