//! `pg-outbox bench`: what this program and the two servers can do, on one machine and in one run.
//!
//! Each part measures one thing (a file each below this one). What is compared is measured by turns, round after round,
//! so that a machine that slows down slows both; the tables show medians with their spread, and the goals beside them.
//! The daemon that is measured is this program as a process of its own, configured by a file. Private servers are
//! the default; `--here` takes the configured ones, with a schema and a stream of its own, which are removed at the
//! end. Ctrl-C ends it at any time and removes what it made.

mod book;
mod drain;
mod idle;
mod latency;
mod limits;
mod plot;
mod process;
mod report;
mod testbed;
mod writers;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};

use self::book::Book;
use self::drain::{Drain, HeldSnapshot, KeyDistribution, Point};
use self::latency::Load;
use self::report::{BenchReport, Setting};
use self::testbed::{Outbox, Statements, Testbed};
use self::writers::{DaemonState, Trigger, Writers};
use crate::command::signals::stop_flag;
use crate::nats::streams::Batches;

/// A batch is about as fast as the fastest when it drains at this part of its rate: so much do runs of one batch differ.
const ABOUT_BEST: f64 = 0.9;

/// What the bench does.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    /// The configuration whose servers are used; `None` for private ones.
    pub here: Option<PathBuf>,
    /// The parts to run; all if empty.
    pub only: Vec<BenchPart>,
    /// Seconds instead of an hour: the figures are rough.
    pub quick: bool,
    /// 5 million pending as well.
    pub long: bool,
    /// Rounds, at least 1.
    pub rounds: Option<usize>,
    /// Events of a drain.
    pub events: Option<u64>,
    /// Worker threads of a daemon.
    pub workers: usize,
    /// Print JSON instead of tables.
    pub json: bool,
    /// Where the curves go, as SVG.
    pub plot: Option<PathBuf>,
}

/// A part of the bench.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum BenchPart {
    /// Each server alone.
    Limits,
    /// Draining, by batch, workers and keys.
    Drain,
    /// From commit to stored.
    Latency,
    /// Statements, and the idle daemon. (CPU, WAL and memory come with every drain.)
    Cost,
    /// Draining with more pending, more published, and an old snapshot.
    Growth,
    /// What writers pay.
    Writers,
    /// Several instances.
    Instances,
}

impl BenchPart {
    /// All of them, in the order in which they run.
    pub const ALL: [BenchPart; 7] = [
        BenchPart::Limits,
        BenchPart::Drain,
        BenchPart::Latency,
        BenchPart::Cost,
        BenchPart::Growth,
        BenchPart::Writers,
        BenchPart::Instances,
    ];
}

/// How much of everything.
#[derive(Debug, Clone)]
struct Scale {
    rounds: usize,
    events: u64,
    keys: u64,
    workers: usize,
    /// Events pending in the growth part, for the figures 10k, 100k, 1m and 5m.
    growth: [u64; 4],
    published: u64,
    latency: Duration,
    writing: Duration,
    idle: Duration,
    batches: &'static [usize],
}

impl Scale {
    fn of(options: &BenchOptions) -> Scale {
        let BenchOptions { rounds, events, workers, .. } = *options;
        if options.quick {
            return Scale {
                rounds: rounds.unwrap_or(1),
                events: events.unwrap_or(5_000),
                keys: 1_000,
                workers,
                growth: [1_000, 5_000, 10_000, 20_000],
                published: 20_000,
                latency: Duration::from_secs(1),
                writing: Duration::from_secs(1),
                idle: Duration::from_secs(2),
                batches: &[1_000],
            };
        }
        Scale {
            rounds: rounds.unwrap_or(5),
            events: events.unwrap_or(100_000),
            keys: 1_000,
            workers,
            growth: [10_000, 100_000, 1_000_000, 5_000_000],
            published: 5_000_000,
            latency: Duration::from_secs(20),
            writing: Duration::from_secs(5),
            idle: Duration::from_secs(10),
            batches: &[500, 1_000, 2_000, 5_000],
        }
    }
}

/// A bench under way.
struct Bench {
    scale: Scale,
    testbed: Testbed,
    book: Book,
    best_batch: usize,
    curves: Vec<(String, Vec<Point>)>,
    omitted: Vec<String>,
    progress: ProgressBar,
    stop: Arc<AtomicBool>,
}

/// Runs the bench and prints what it found.
///
/// # Errors
/// A missing server (with the command that installs it), a server or a daemon that fails, a drain that lost or
/// doubled an event, Ctrl-C.
pub fn run(options: &BenchOptions) -> Result<()> {
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
    let mut bench = Bench { scale, testbed, book, best_batch, curves, omitted, progress, stop };
    bench.measure(options)?;
    bench.progress.finish_and_clear();
    let report = bench.report(options)?;
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

impl Bench {
    fn measure(&mut self, options: &BenchOptions) -> Result<()> {
        let wanted = |part: BenchPart| options.only.is_empty() || options.only.contains(&part);
        let outbox = self.testbed.outbox("a")?;
        self.find_best_batch(&outbox)?;
        // What has one measure in common goes in one round.
        if wanted(BenchPart::Limits) || wanted(BenchPart::Drain) {
            for round in 1..=self.scale.rounds {
                self.say(round, "limits");
                limits::run(self, &outbox)?;
                if wanted(BenchPart::Drain) {
                    self.drains(&outbox, round)?;
                }
            }
        }
        for part in BenchPart::ALL.into_iter().filter(|part| wanted(*part)) {
            match part {
                BenchPart::Limits | BenchPart::Drain => {}
                BenchPart::Latency => self.latency(&outbox)?,
                BenchPart::Cost => self.cost(&outbox)?,
                BenchPart::Growth => self.growth(&outbox, options.long)?,
                BenchPart::Writers => self.writers(&outbox)?,
                BenchPart::Instances => self.instances(&outbox)?,
            }
        }
        Ok(())
    }

    /// An error once somebody has asked us to stop.
    fn go_on(&self) -> Result<()> {
        go_on(&self.stop)
    }

    fn say(&self, round: usize, what: &str) {
        self.progress.set_message(format!("round {round} of {}: {what}", self.scale.rounds));
        self.progress.tick();
    }

    /// The drain that the others differ from in one thing.
    fn usual(&self, name: &'static str) -> Drain {
        Drain {
            name,
            pending: self.scale.events,
            keys: KeyDistribution::Many(self.scale.keys),
            workers: self.scale.workers,
            batch: self.best_batch,
            instances: 1,
            batches: Batches::None,
            held: HeldSnapshot::None,
            statements: Statements::Uncounted,
        }
    }

    /// Empties the outbox and drains it.
    fn drain(&mut self, outbox: &Outbox, round: usize, drain: Drain) -> Result<Vec<Point>> {
        self.go_on()?;
        self.say(round, drain.name);
        self.progress.set_length(drain.pending);
        self.progress.set_position(0);
        drain::empty(&mut outbox.session()?)?;
        drain.run(self, outbox)
    }

    /// The smallest batch that is about as fast as the fastest: a larger one only takes more memory. The first drain,
    /// on servers that have just been started, does not count.
    fn find_best_batch(&mut self, outbox: &Outbox) -> Result<()> {
        let mut rates = Vec::new();
        for &batch in self.scale.batches.iter().take(1).chain(self.scale.batches) {
            let tried = Drain { batch, ..self.usual("scan") };
            self.drain(outbox, 1, tried)?;
            rates.push((batch, self.book.values("scan").last().copied().unwrap_or(0.0)));
        }
        let tried = &rates[1..];
        let best = tried.iter().map(|(_, rate)| *rate).fold(0.0, f64::max);
        let about_best = tried.iter().find(|(_, rate)| *rate >= best * ABOUT_BEST);
        self.best_batch = about_best.map_or(self.best_batch, |(batch, _)| *batch);
        Ok(())
    }

    fn drains(&mut self, outbox: &Outbox, round: usize) -> Result<()> {
        let one_key = KeyDistribution::One;
        self.drain(outbox, round, self.usual("drain.best"))?;
        self.drain(outbox, round, Drain { batch: 100, ..self.usual("drain.100") })?;
        if self.takes_batches() {
            let drain =
                Drain { keys: one_key, batches: Batches::Atomic, ..self.usual("drain.one_key_atomic") };
            self.drain(outbox, round, drain)?;
        }
        let few = (self.scale.events / 5).max(1);
        self.drain(outbox, round, Drain { keys: one_key, pending: few, ..self.usual("drain.one_key") })?;
        self.drain(outbox, round, Drain { keys: KeyDistribution::Each, ..self.usual("drain.key_each") })?;
        self.drain(outbox, round, Drain { workers: 1, ..self.usual("drain.best.1") })?;
        self.drain(outbox, round, Drain { workers: 1, batch: 100, ..self.usual("drain.100.1") })?;
        Ok(())
    }

    fn takes_batches(&mut self) -> bool {
        let version = self.testbed.streams().version();
        let takes = takes_batches(&version);
        let why = format!(
            "atomic batches: this is nats-server {version}, and 2.12 was the first to have them \
             (PG_OUTBOX_NATS_SERVER names the program)"
        );
        if !takes && !self.omitted.contains(&why) {
            self.omitted.push(why);
        }
        takes
    }

    fn latency(&mut self, outbox: &Outbox) -> Result<()> {
        let lasts = self.scale.latency;
        let rate =
            ["drain.best", "scan"].iter().find_map(|name| self.book.spread(name)).map(|rate| rate.median);
        let half = rate.context("no drain was measured")? / 2.0;
        for round in 1..=self.scale.rounds {
            for load in [
                Load { name: "latency.idle", rate: 10.0, events: 1, writers: 1, lasts },
                Load { name: "latency.1000", rate: 1_000.0, events: 1, writers: 4, lasts: lasts / 2 },
                Load { name: "latency.half", rate: half, events: 50, writers: 8, lasts: lasts / 2 },
            ] {
                self.go_on()?;
                self.say(round, load.name);
                load.run(self, outbox)?;
            }
        }
        Ok(())
    }

    fn cost(&mut self, outbox: &Outbox) -> Result<()> {
        if !self.testbed.counts_statements() {
            self.omitted.push("statements: pg_stat_statements is not at hand".into());
        }
        for round in 1..=self.scale.rounds {
            if self.testbed.counts_statements() {
                let statements = Statements::Counted;
                self.drain(outbox, round, Drain { statements, ..self.usual("cost.best") })?;
                self.drain(outbox, round, Drain { statements, batch: 100, ..self.usual("cost.100") })?;
            }
            self.say(round, "idle");
            idle::run(self, outbox)?;
        }
        Ok(())
    }

    fn growth(&mut self, outbox: &Outbox, long: bool) -> Result<()> {
        let [ten, hundred, million, five] = self.scale.growth;
        let filled = self.fill_published()?;
        for round in 1..=self.scale.rounds {
            self.drain(outbox, round, Drain { pending: ten, ..self.usual("growth.10k") })?;
            self.drain(outbox, round, Drain { pending: hundred, ..self.usual("growth.100k") })?;
            self.say(round, "growth.published");
            filled.session()?.run("VACUUM outboxes")?;
            Drain { pending: hundred, ..self.usual("growth.published") }.run(self, &filled)?;
            for (name, label, held) in [
                ("growth.1m", "no old snapshot", HeldSnapshot::None),
                ("growth.snapshot_reads", "old snapshot, read-only", HeldSnapshot::ReadOnly),
                ("growth.snapshot_writes", "old snapshot, has written", HeldSnapshot::Written),
            ] {
                let curve =
                    self.drain(outbox, round, Drain { pending: million, held, ..self.usual(name) })?;
                if round == 1 {
                    self.curves.push((label.to_owned(), curve));
                }
            }
        }
        if long {
            let curve = self.drain(outbox, 1, Drain { pending: five, ..self.usual("growth.5m") })?;
            self.curves.push(("5 million".to_owned(), curve));
        }
        Ok(())
    }

    /// An outbox with published events over the last 13 months.
    fn fill_published(&mut self) -> Result<Outbox> {
        self.say(1, "published events");
        let outbox = self.testbed.outbox("published")?;
        let mut session = outbox.session()?;
        let months = 13;
        for ago in 0..months {
            session.run(&format!(
                "SELECT create_monthly_partition('outboxes', (date_trunc('month', now()) - interval '{ago} months')::date)"
            ))?;
        }
        let events = drain::insert_sql(KeyDistribution::Many(self.scale.keys))
            .replace("(topic, metadata, payload)", "(topic, metadata, payload, created_at, published_at, attempts)")
            .replace(
                "FROM generate_series",
                ", date_trunc('month', now()) - (n % 13) * interval '1 month' + interval '1 minute', now(), 1 FROM generate_series",
            );
        drain::load(&self.stop, &outbox, &events, self.scale.published)?;
        session.run("VACUUM ANALYZE outboxes")?;
        Ok(outbox)
    }

    fn writers(&mut self, outbox: &Outbox) -> Result<()> {
        let lasts = self.scale.writing;
        for round in 1..=self.scale.rounds {
            for (name, trigger, daemon) in [
                ("writers.busy.trigger", Trigger::Ours, DaemonState::Busy),
                ("writers.busy.none", Trigger::None, DaemonState::Busy),
                ("writers.asleep.trigger", Trigger::Ours, DaemonState::Asleep),
                ("writers.asleep.none", Trigger::None, DaemonState::Asleep),
            ] {
                self.go_on()?;
                self.say(round, name);
                Writers { name, trigger, daemon }.run(self, outbox, lasts)?;
            }
        }
        Ok(())
    }

    fn instances(&mut self, outbox: &Outbox) -> Result<()> {
        for round in 1..=self.scale.rounds {
            for (name, instances) in [("instances.1", 1), ("instances.2", 2), ("instances.4", 4)] {
                self.drain(outbox, round, Drain { instances, ..self.usual(name) })?;
            }
        }
        Ok(())
    }

    fn report(self, options: &BenchOptions) -> Result<BenchReport> {
        let mut session = self.testbed.session()?;
        let setting = Setting {
            machine: process::machine()?,
            postgres: session.text("SELECT split_part(current_setting('server_version'), ' ', 1)")?,
            nats: self.testbed.streams().version(),
            servers: if options.here.is_none() { "both on this machine" } else { "the configured servers" },
            events: self.scale.events,
            workers: self.scale.workers,
            best_batch: self.best_batch,
            rounds: self.scale.rounds,
            quick: options.quick,
            sizes: [
                ("{10k}", self.scale.growth[0]),
                ("{100k}", self.scale.growth[1]),
                ("{1m}", self.scale.growth[2]),
                ("{5m}", self.scale.growth[3]),
                ("{published}", self.scale.published),
            ],
        };
        Ok(BenchReport { setting, book: self.book, curves: self.curves, omitted: self.omitted })
    }
}

fn go_on(stop: &AtomicBool) -> Result<()> {
    ensure!(!stop.load(Ordering::Relaxed), "interrupted: what the bench had made is removed");
    Ok(())
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
