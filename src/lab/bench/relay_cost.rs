//! Relay cost: PostgreSQL's processor time for relaying an event, divided by its time for the plain insert of that event.
//!
//! So it says what an application adds to its database by sending its events through an outbox, on whatever machine. The
//! events are inserted as an application does it, by a prepared statement for each and fifty a transaction, without a
//! daemon; then they are drained. With another build to compare, both are divided by what inserts cost into the other
//! build's schema, so that slower inserts make nothing look better; what they cost in each stands beside it.

use std::thread;

use anyhow::{Context, Result};

use super::builds::{BuildFigure, Builds};
use super::drain::Drain;
use super::events::{INSERT_ROW, KeyDistribution, empty, texts};
use super::process;
use super::run::{BenchRun, go_on};
use super::testbed::Outbox;
use super::threads::join_all;

/// Events of a transaction.
const PER_TRANSACTION: usize = 50;
/// Sessions that insert at the same time.
const SESSIONS: usize = 2;
/// Processor seconds for inserting 100,000 events.
const INSERTS: BuildFigure = ["inserts.cpu", "other.inserts.cpu"];
/// The batches of the daemon, with the names of the ratio and of the drain.
const BATCHES: [(usize, BuildFigure, BuildFigure); 2] = [
    (1_000, ["relay.1000", "other.relay.1000"], ["relay.1000.drain", "other.relay.1000.drain"]),
    (100, ["relay.100", "other.relay.100"], ["relay.100.drain", "other.relay.100.drain"]),
];

/// What a build took of PostgreSQL for 100,000 events, in processor seconds.
#[derive(Clone, Copy)]
struct BuildCost {
    inserting: f64,
    relaying: f64,
}

/// Notes it for each build, round after round.
pub(super) fn run(bench: &mut BenchRun, builds: &Builds) -> Result<()> {
    let keys = KeyDistribution::Many(bench.scale.keys);
    let events = texts(&mut bench.testbed.session()?, keys, bench.scale.events)?;
    for round in 1..=bench.scale.rounds {
        for (batch, ratios, drains) in BATCHES {
            let mut costs = Vec::new();
            for (build, outbox) in builds.in_turn(round) {
                let drain = Drain { batch, ..Drain::usual(bench, drains[build]) };
                let cost = measure(bench, &outbox, round, drain, &events)?;
                bench.book.note(INSERTS[build], cost.inserting);
                costs.push((build, cost));
            }
            // The other build's, if there is one.
            let inserting =
                costs.iter().max_by_key(|(build, _)| *build).map_or(f64::NAN, |(_, cost)| cost.inserting);
            for (build, cost) in costs {
                bench.book.note(ratios[build], cost.relaying / inserting);
            }
        }
    }
    Ok(())
}

fn measure(
    bench: &mut BenchRun,
    outbox: &Outbox,
    round: usize,
    drain: Drain,
    events: &[[String; 3]],
) -> Result<BuildCost> {
    bench.go_on()?;
    bench.say(round, drain.name);
    empty(&mut outbox.session()?)?;
    let before = postgres_cpu_s(bench)?;
    insert_all(bench, outbox, events)?;
    let inserting = (postgres_cpu_s(bench)? - before) * 1e5 / bench.scale.events as f64;
    drain.run_loaded(bench, outbox)?;
    empty(&mut outbox.session()?)?;
    let relaying = bench.book.values(&format!("{}.cpu_postgres", drain.name)).last().copied();
    Ok(BuildCost { inserting, relaying: relaying.context("the CPU of PostgreSQL is not known")? })
}

/// Inserts all events, in several sessions at the same time.
fn insert_all(bench: &BenchRun, outbox: &Outbox, events: &[[String; 3]]) -> Result<()> {
    let stop = &bench.stop;
    let insert_share = |first: usize| -> Result<()> {
        let mut session = outbox.session()?.into_row_insert(INSERT_ROW)?;
        for transaction in events.chunks(PER_TRANSACTION).skip(first).step_by(SESSIONS) {
            go_on(stop)?;
            session.insert(transaction)?;
        }
        Ok(())
    };
    let insert_share = &insert_share;
    thread::scope(|scope| {
        join_all((0..SESSIONS).map(|first| scope.spawn(move || insert_share(first))).collect()).map(drop)
    })
}

fn postgres_cpu_s(bench: &BenchRun) -> Result<f64> {
    let (postgres, _) = bench.testbed.pids().context("the servers are not the bench's own")?;
    process::tree_cpu_s(postgres)
}
