//! What the bench is asked for: its options, its parts, and how much of everything a run does.

use std::path::PathBuf;
use std::time::Duration;

/// What the bench does.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    /// The configuration whose servers are used; `None` for private ones.
    pub here: Option<PathBuf>,
    /// The parts to run; if empty all, or those that compare when there is something to compare with.
    pub only: Vec<BenchPart>,
    /// Another build of this program, which it is compared with. Not with `here`.
    pub against: Option<PathBuf>,
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
    /// Draining with more pending and more published.
    Growth,
    /// Draining under an old snapshot.
    OldSnapshot,
    /// Rate and latency while a transaction that has inserted an event stays open.
    OpenWriter,
    /// What writers pay.
    Writers,
    /// Several instances.
    Instances,
    /// What relaying costs PostgreSQL, against inserting.
    RelayCost,
    /// This program against another build of it, which must be given.
    Against,
}

impl BenchPart {
    /// All of them, in the order in which they run.
    pub const ALL: [BenchPart; 11] = [
        BenchPart::Limits,
        BenchPart::Drain,
        BenchPart::Latency,
        BenchPart::Cost,
        BenchPart::Growth,
        BenchPart::OldSnapshot,
        BenchPart::OpenWriter,
        BenchPart::Writers,
        BenchPart::Instances,
        BenchPart::RelayCost,
        BenchPart::Against,
    ];
}

impl BenchOptions {
    /// Whether a part is to run.
    pub(super) fn wants(&self, part: BenchPart) -> bool {
        let compares = matches!(part, BenchPart::Against | BenchPart::RelayCost);
        match part {
            BenchPart::Against if self.against.is_none() => false,
            _ if self.only.is_empty() => self.against.is_none() || compares,
            _ => self.only.contains(&part),
        }
    }

    /// Whether a part is to run that drains by the best batch, which then must be found.
    pub(super) fn want_best_batch(&self) -> bool {
        BenchPart::ALL
            .into_iter()
            .any(|part| self.wants(part) && !matches!(part, BenchPart::Against | BenchPart::RelayCost))
    }
}

/// How much of everything.
#[derive(Debug, Clone)]
pub(super) struct Scale {
    pub(super) rounds: usize,
    pub(super) events: u64,
    pub(super) keys: u64,
    pub(super) workers: usize,
    /// Events pending in the growth part, for the figures 10k, 100k, 1m and 5m.
    pub(super) growth: [u64; 4],
    pub(super) published: u64,
    /// Events of each step behind an open writer.
    pub(super) step: u64,
    pub(super) latency: Duration,
    pub(super) writing: Duration,
    pub(super) idle: Duration,
    pub(super) batches: &'static [usize],
}

impl Scale {
    /// What these options ask for.
    pub(super) fn of(options: &BenchOptions) -> Scale {
        let BenchOptions { rounds, events, workers, .. } = *options;
        if options.quick {
            return Scale {
                rounds: rounds.unwrap_or(1),
                events: events.unwrap_or(5_000),
                keys: 1_000,
                workers,
                growth: [1_000, 5_000, 10_000, 20_000],
                published: 20_000,
                step: 1_000,
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
            step: 50_000,
            latency: Duration::from_secs(20),
            writing: Duration::from_secs(5),
            idle: Duration::from_secs(10),
            batches: &[500, 1_000, 2_000, 5_000],
        }
    }
}
