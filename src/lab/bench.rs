//! `pg-outbox bench`: what this program and the two servers can do, on one machine and in one run.
//!
//! Each part measures one thing (a file each below this one). What is compared is measured by turns, round after round,
//! so that a machine that slows down slows both; the tables show medians with their spread, and the goals beside them.
//! The daemon that is measured is this program as a process of its own, configured by a file; `--against` measures another
//! build of it beside. Private servers are
//! the default; `--here` takes the configured ones, with a schema and a stream of its own, which are removed at the
//! end. Ctrl-C ends it at any time and removes what it made.

mod against;
mod book;
mod builds;
mod cost;
mod drain;
mod events;
mod growth;
mod instances;
mod latency;
mod limits;
mod old_snapshot;
mod open_writer;
mod options;
mod plot;
mod process;
mod relay_cost;
mod report;
mod run;
mod testbed;
mod threads;
mod writers;

use anyhow::{Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};

use self::book::Book;
use self::builds::Builds;
use self::options::Scale;
pub use self::options::{BenchOptions, BenchPart};
use self::report::{BenchReport, Setting};
use self::run::BenchRun;
use self::testbed::Testbed;
use crate::command::signals::stop_flag;

/// Runs the bench and prints what it found.
///
/// # Errors
/// A missing server (with the command that installs it), a server or a daemon that fails, a drain that lost or
/// doubled an event, Ctrl-C.
pub fn run(options: &BenchOptions) -> Result<()> {
    let compares = options.against.is_some() || !options.only.contains(&BenchPart::Against);
    ensure!(compares, "--only against: name the other build with --against");
    let stop = stop_flag()?;
    let testbed = match &options.here {
        Some(config) => Testbed::here(config)?,
        None => Testbed::sandbox()?,
    };
    let scale = Scale::of(options);
    let best_batch = scale.batches[0];
    let (book, curves, omitted) = (Book::default(), Vec::new(), Vec::new());
    let progress = ProgressBar::no_length();
    progress.set_style(ProgressStyle::with_template("{elapsed_precise} {msg} {wide_bar} {human_pos}")?);
    let mut bench = BenchRun { scale, testbed, book, best_batch, curves, omitted, progress, stop };
    measure(&mut bench, options)?;
    bench.progress.finish_and_clear();
    let report = report(bench, options)?;
    if let Some(path) = &options.plot {
        plot::write(&report, path)?;
    }
    if options.json {
        println!("{}", report.json());
    } else {
        print!("{}", report.table());
    }
    Ok(())
}

fn measure(bench: &mut BenchRun, options: &BenchOptions) -> Result<()> {
    let wanted = |part: BenchPart| options.wants(part);
    let outbox = bench.testbed.outbox("a")?;
    if options.want_best_batch() {
        drain::find_best_batch(bench, &outbox)?;
    }
    // What has one measure in common goes in one round.
    if wanted(BenchPart::Limits) || wanted(BenchPart::Drain) {
        for round in 1..=bench.scale.rounds {
            bench.say(round, "limits");
            limits::run(bench, &outbox)?;
            if wanted(BenchPart::Drain) {
                drain::run(bench, &outbox, round)?;
            }
        }
    }
    for part in BenchPart::ALL.into_iter().filter(|part| wanted(*part)) {
        match part {
            BenchPart::Limits | BenchPart::Drain => {}
            BenchPart::Latency => latency::run(bench, &outbox)?,
            BenchPart::Cost => cost::run(bench, &outbox)?,
            BenchPart::Growth => growth::run(bench, &outbox, options.long)?,
            BenchPart::OldSnapshot => old_snapshot::run(bench, &outbox)?,
            BenchPart::OpenWriter => open_writer::run(bench, &outbox)?,
            BenchPart::Writers => writers::run(bench, &outbox)?,
            BenchPart::Instances => instances::run(bench, &outbox)?,
            // They have outboxes of their own.
            BenchPart::RelayCost | BenchPart::Against => {}
        }
    }
    compare(bench, options)
}

/// The parts that run on an outbox of each build.
fn compare(bench: &mut BenchRun, options: &BenchOptions) -> Result<()> {
    let [relay_cost, against] = [BenchPart::RelayCost, BenchPart::Against].map(|part| options.wants(part));
    if !relay_cost && !against {
        return Ok(());
    }
    if options.here.is_some() {
        bench.omitted.push("relay cost: what the configured servers use is not known".into());
        return Ok(());
    }
    let builds = Builds::new(bench, options.against.as_deref())?;
    if against {
        against::run(bench, &builds)?;
    }
    if relay_cost {
        relay_cost::run(bench, &builds)?;
    }
    Ok(())
}

fn report(bench: BenchRun, options: &BenchOptions) -> Result<BenchReport> {
    let mut session = bench.testbed.session()?;
    let setting = Setting {
        machine: process::machine()?,
        postgres: session.text("SELECT split_part(current_setting('server_version'), ' ', 1)")?,
        nats: bench.testbed.streams().version(),
        servers: if options.here.is_none() { "both on this machine" } else { "the configured servers" },
        events: bench.scale.events,
        workers: bench.scale.workers,
        best_batch: options.want_best_batch().then_some(bench.best_batch),
        against: options.against.as_ref().map(|other| other.display().to_string()),
        rounds: bench.scale.rounds,
        quick: options.quick,
        sizes: vec![
            ("{10k}", bench.scale.growth[0]),
            ("{100k}", bench.scale.growth[1]),
            ("{1m}", bench.scale.growth[2]),
            ("{5m}", bench.scale.growth[3]),
            ("{published}", bench.scale.published),
            ("{two steps}", 2 * bench.scale.step),
            ("{all steps}", open_writer::STEPS * bench.scale.step),
        ],
    };
    Ok(BenchReport { setting, book: bench.book, curves: bench.curves, omitted: bench.omitted })
}
