//! What was measured, by name, and what the goals make of it.
//!
//! A [`Book`] keeps the values of each figure in the order of the rounds. A goal is a figure, or the ratio of two
//! that were measured in the same round, one after the other, so that what slows the machine down slows both; it is
//! reached when the median of the rounds reaches it: a single lucky round proves nothing. Pure.

use std::collections::BTreeMap;

use serde::Serialize;

/// The values of each figure, a value a round.
#[derive(Debug, Default)]
pub(super) struct Book(BTreeMap<String, Vec<f64>>);

impl Book {
    /// Notes a value of a figure.
    pub(super) fn note(&mut self, name: &str, value: f64) {
        self.0.entry(name.to_owned()).or_default().push(value);
    }

    /// All values of a figure; none if it was not measured.
    pub(super) fn values(&self, name: &str) -> &[f64] {
        self.0.get(name).map_or(&[], Vec::as_slice)
    }

    /// The spread of a figure.
    pub(super) fn spread(&self, name: &str) -> Option<Spread> {
        Spread::of(self.values(name).to_vec())
    }

    /// The spread of the other build's figure of this name.
    pub(super) fn other(&self, name: &str) -> Option<Spread> {
        self.spread(&format!("other.{name}"))
    }

    /// The spread of a figure over the other build's, pair by pair.
    pub(super) fn against(&self, name: &str) -> Option<Spread> {
        self.ratio(name, &format!("other.{name}"))
    }

    /// The spread of a ratio, pair by pair.
    pub(super) fn ratio(&self, numerator: &str, denominator: &str) -> Option<Spread> {
        let pairs = self.values(numerator).iter().zip(self.values(denominator));
        Spread::of(pairs.map(|(above, below)| above / below).collect())
    }
}

/// Several values of one thing.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Spread {
    /// The middle one, or between the middle two.
    pub(super) median: f64,
    /// The lowest.
    pub(super) low: f64,
    /// The highest.
    pub(super) high: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Option<Spread> {
        values.retain(|value| value.is_finite());
        values.sort_by(f64::total_cmp);
        let (low, high) = (*values.first()?, *values.last()?);
        let (left, right) = (values[(values.len() - 1) / 2], values[values.len() / 2]);
        Some(Spread { median: left.midpoint(right), low, high })
    }
}

/// What a goal is about.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Of {
    /// A figure.
    Figure(&'static str),
    /// One figure over another.
    Ratio(&'static str, &'static str),
    /// A figure of this program over the same of the other build.
    Against(&'static str),
}

/// How much it should be.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Bound {
    /// So much or more.
    AtLeast(f64),
    /// So much or less.
    AtMost(f64),
}

impl Bound {
    /// The median is as good or better.
    pub(super) fn is_reached(self, spread: Spread) -> bool {
        match self {
            Bound::AtLeast(goal) => spread.median >= goal,
            Bound::AtMost(goal) => spread.median <= goal,
        }
    }
}

/// A goal.
#[derive(Debug, Clone, Copy)]
pub(super) struct Goal {
    /// In words; `{1m}` and the like stand for what that is in this run.
    pub(super) what: &'static str,
    /// What is compared.
    pub(super) of: Of,
    /// With what.
    pub(super) bound: Bound,
}

const fn goal(what: &'static str, of: Of, bound: Bound) -> Goal {
    Goal { what, of, bound }
}

/// All goals, in the order of the table.
pub(super) const GOALS: &[Goal] = &[
    goal(
        "drain, 1,000 keys, best batch / publishing alone",
        Of::Ratio("drain.best", "publish.alone"),
        Bound::AtLeast(0.45),
    ),
    goal("drain at batch 100 / at the best batch", Of::Ratio("drain.100", "drain.best"), Bound::AtLeast(0.7)),
    goal(
        "one key, no atomic batches / publishing one at a time",
        Of::Ratio("drain.one_key", "publish.one"),
        Bound::AtLeast(0.6),
    ),
    goal(
        "one key, atomic batches / 1,000 keys",
        Of::Ratio("drain.one_key_atomic", "drain.best"),
        Bound::AtLeast(0.7),
    ),
    goal("drain, {1m} pending / {100k}", Of::Ratio("growth.1m", "growth.100k"), Bound::AtLeast(0.9)),
    goal(
        "drain, {published} published / none",
        Of::Ratio("growth.published", "growth.100k"),
        Bound::AtLeast(0.9),
    ),
    goal(
        "drain of {1m}, old read-only snapshot / without",
        Of::Ratio("snapshot.reads", "snapshot.none"),
        Bound::AtLeast(0.9),
    ),
    goal(
        "drain of {1m}, old writing transaction / without",
        Of::Ratio("snapshot.writes", "snapshot.none"),
        Bound::AtLeast(0.8),
    ),
    goal(
        "behind an open writer, last {two steps} of {all steps} / first",
        Of::Ratio("open_writer.last", "open_writer.first"),
        Bound::AtLeast(0.9),
    ),
    goal(
        "latency p50, 10 events/s, a writer open / ended",
        Of::Ratio("open_writer.open.p50", "open_writer.ended.p50"),
        Bound::AtMost(1.2),
    ),
    goal(
        "16 writers, with our trigger / without, daemon busy",
        Of::Ratio("writers.busy.trigger", "writers.busy.none"),
        Bound::AtLeast(0.93),
    ),
    goal("two instances / one", Of::Ratio("instances.2", "instances.1"), Bound::AtLeast(0.95)),
    goal("idle: CPU, % of a core", Of::Figure("idle.cpu"), Bound::AtMost(0.5)),
    goal("idle: statements a second", Of::Figure("idle.statements"), Bound::AtMost(3.0)),
    goal(
        "peak memory, {1m} pending / {10k}",
        Of::Ratio("growth.1m.memory", "growth.10k.memory"),
        Bound::AtMost(1.1),
    ),
    goal("peak memory, {1m} pending, MiB", Of::Figure("growth.1m.memory"), Bound::AtMost(64.0)),
    goal("latency, idle, p50, ms", Of::Figure("latency.idle.p50"), Bound::AtMost(1.2)),
    goal("latency, idle, p99, ms", Of::Figure("latency.idle.p99"), Bound::AtMost(3.0)),
    goal("latency, half of the drain rate, p99, ms", Of::Figure("latency.half.p99"), Bound::AtMost(50.0)),
    goal("CPU s per 100,000 events, pg-outbox", Of::Figure("drain.best.cpu"), Bound::AtMost(1.0)),
    goal("inserts: CPU of PostgreSQL / other build", Of::Against("inserts.cpu"), Bound::AtMost(1.05)),
    goal("CPU s per 100,000 events, all three", Of::Figure("drain.best.cpu_all"), Bound::AtMost(4.5)),
];

/// A figure of the table.
#[derive(Debug, Clone, Copy)]
pub(super) struct Figure {
    /// Its name in the book and in the JSON.
    pub(super) name: &'static str,
    /// In words.
    pub(super) what: &'static str,
    /// Of what it counts.
    pub(super) unit: &'static str,
}

const fn figure(name: &'static str, what: &'static str, unit: &'static str) -> Figure {
    Figure { name, what, unit }
}

/// All figures, in the order of the table.
pub(super) const FIGURES: &[Figure] = &[
    figure("publish.alone", "publishing alone, pipelined", "events/s"),
    figure("publish.one", "publishing alone, one at a time", "events/s"),
    figure("database.alone", "claim, read and settle alone", "events/s"),
    figure("drain.best", "drain, 1,000 keys, best batch, all workers", "events/s"),
    figure("drain.100", "drain, 1,000 keys, batch 100, all workers", "events/s"),
    figure("drain.best.1", "drain, 1,000 keys, best batch, 1 worker", "events/s"),
    figure("drain.100.1", "drain, 1,000 keys, batch 100, 1 worker", "events/s"),
    figure("drain.one_key", "drain, one key, no atomic batches", "events/s"),
    figure("drain.one_key_atomic", "drain, one key, atomic batches", "events/s"),
    figure("drain.key_each", "drain, one event a key", "events/s"),
    figure("drain.best.cpu", "best batch: CPU of pg-outbox", "s/100,000"),
    figure("drain.best.cpu_postgres", "best batch: CPU of PostgreSQL", "s/100,000"),
    figure("drain.best.cpu_nats", "best batch: CPU of nats-server", "s/100,000"),
    figure("drain.best.cpu_all", "best batch: CPU of the three", "s/100,000"),
    figure("drain.100.cpu", "batch 100: CPU of pg-outbox", "s/100,000"),
    figure("drain.100.cpu_all", "batch 100: CPU of the three", "s/100,000"),
    figure("drain.best.wal", "best batch: WAL", "B/event"),
    figure("drain.best.memory", "best batch: peak memory", "MiB"),
    figure("cost.best.statements", "best batch: statements", "1/1,000 events"),
    figure("cost.100.statements", "batch 100: statements", "1/1,000 events"),
    figure("idle.cpu", "idle: CPU of pg-outbox", "% of a core"),
    figure("idle.statements", "idle: statements", "1/s"),
    figure("latency.idle.p50", "latency, 10 events/s: p50", "ms"),
    figure("latency.idle.p99", "latency, 10 events/s: p99", "ms"),
    figure("latency.idle.max", "latency, 10 events/s: max", "ms"),
    figure("latency.1000.p50", "latency, 1,000 events/s: p50", "ms"),
    figure("latency.1000.p99", "latency, 1,000 events/s: p99", "ms"),
    figure("latency.1000.max", "latency, 1,000 events/s: max", "ms"),
    figure("latency.half.rate", "half of the drain rate: written", "events/s"),
    figure("latency.half.p50", "latency, half of the drain rate: p50", "ms"),
    figure("latency.half.p99", "latency, half of the drain rate: p99", "ms"),
    figure("latency.half.max", "latency, half of the drain rate: max", "ms"),
    figure("growth.10k", "drain, {10k} pending", "events/s"),
    figure("growth.100k", "drain, {100k} pending", "events/s"),
    figure("growth.1m", "drain, {1m} pending", "events/s"),
    figure("growth.5m", "drain, {5m} pending", "events/s"),
    figure("growth.published", "drain, {100k} pending, {published} published", "events/s"),
    figure("snapshot.none", "drain, {1m}, no old snapshot", "events/s"),
    figure("snapshot.reads", "drain, {1m}, old read-only snapshot", "events/s"),
    figure("snapshot.writes", "drain, {1m}, old writing transaction", "events/s"),
    figure("open_writer.first", "drain behind an open writer, first {two steps}", "events/s"),
    figure("open_writer.last", "drain behind an open writer, last {two steps} of {all steps}", "events/s"),
    figure("open_writer.open.p50", "latency, 10 events/s, a writer open since {all steps}: p50", "ms"),
    figure("open_writer.open.p99", "latency, 10 events/s, a writer open since {all steps}: p99", "ms"),
    figure("open_writer.ended.p50", "latency, 10 events/s, once it has ended: p50", "ms"),
    figure("open_writer.ended.p99", "latency, 10 events/s, once it has ended: p99", "ms"),
    figure("growth.10k.memory", "peak memory, {10k} pending", "MiB"),
    figure("growth.1m.memory", "peak memory, {1m} pending", "MiB"),
    figure("writers.busy.trigger", "16 writers, daemon busy, our trigger", "inserts/s"),
    figure("writers.busy.none", "16 writers, daemon busy, no trigger", "inserts/s"),
    figure("writers.asleep.trigger", "16 writers, daemon asleep, our trigger", "inserts/s"),
    figure("writers.asleep.none", "16 writers, daemon asleep, no trigger", "inserts/s"),
    figure("inserts.cpu", "inserts, 50 a transaction: CPU of PostgreSQL", "s/100,000"),
    figure("relay.1000", "relay cost, batch 1,000", "of inserting"),
    figure("relay.100", "relay cost, batch 100", "of inserting"),
    figure("instances.1", "drain, one instance", "events/s"),
    figure("instances.2", "drain, two instances", "events/s"),
    figure("instances.4", "drain, four instances", "events/s"),
];

/// Figures of this program that stand beside those of another build, in the order of the table.
pub(super) const COMPARED: &[Figure] = &[
    figure("against.1000", "batch 1,000: drain", "events/s"),
    figure("against.1000.cpu_postgres", "batch 1,000: CPU of PostgreSQL", "s/100,000"),
    figure("against.1000.cpu", "batch 1,000: CPU of pg-outbox", "s/100,000"),
    figure("against.1000.cpu_nats", "batch 1,000: CPU of nats-server", "s/100,000"),
    figure("against.1000.cpu_all", "batch 1,000: CPU of the three", "s/100,000"),
    figure("against.1000.wal", "batch 1,000: WAL", "B/event"),
    figure("against.100", "batch 100: drain", "events/s"),
    figure("against.100.cpu_postgres", "batch 100: CPU of PostgreSQL", "s/100,000"),
    figure("against.100.cpu", "batch 100: CPU of pg-outbox", "s/100,000"),
    figure("against.100.cpu_nats", "batch 100: CPU of nats-server", "s/100,000"),
    figure("against.100.cpu_all", "batch 100: CPU of the three", "s/100,000"),
    figure("against.100.wal", "batch 100: WAL", "B/event"),
    figure("inserts.cpu", "inserts, 50 a transaction: CPU of PostgreSQL", "s/100,000"),
    figure("relay.1000", "relay cost, batch 1,000", "of the other's inserting"),
    figure("relay.100", "relay cost, batch 100", "of the other's inserting"),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(values: &[f64]) -> Spread {
        Spread::of(values.to_vec()).unwrap()
    }

    #[test]
    fn a_median_is_in_the_middle_whatever_the_order() {
        assert_eq!(spread(&[3.0, 1.0, 2.0]), Spread { median: 2.0, low: 1.0, high: 3.0 });
        assert_eq!(spread(&[4.0, 1.0]), Spread { median: 2.5, low: 1.0, high: 4.0 });
        assert_eq!(Spread::of(vec![f64::NAN]), None);
        assert_eq!(Spread::of(Vec::new()), None);
    }

    #[test]
    fn a_goal_is_reached_by_the_median_and_not_by_the_best_round() {
        let around = Spread { median: 0.5, low: 0.4, high: 0.6 };
        for (bound, reached) in [
            (Bound::AtLeast(0.3), true),
            (Bound::AtLeast(0.5), true),
            (Bound::AtLeast(0.51), false),
            (Bound::AtLeast(0.6), false),
            (Bound::AtMost(0.7), true),
            (Bound::AtMost(0.5), true),
            (Bound::AtMost(0.49), false),
            (Bound::AtMost(0.4), false),
        ] {
            assert_eq!(bound.is_reached(around), reached, "{bound:?}");
        }
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        let mut book = Book::default();
        for (above, below) in [(10.0, 20.0), (30.0, 40.0), (5.0, 20.0)] {
            book.note("a", above);
            book.note("b", below);
        }
        assert_eq!(book.ratio("a", "b"), Some(Spread { median: 0.5, low: 0.25, high: 0.75 }));
        assert_eq!(book.ratio("a", "c"), None);
        book.note("other.a", 5.0);
        assert_eq!(book.against("a"), Some(Spread { median: 2.0, low: 2.0, high: 2.0 }));
    }

    #[test]
    fn every_goal_is_about_figures_that_are_shown() {
        let known = |name: &str| FIGURES.iter().chain(COMPARED).any(|figure| figure.name == name);
        for goal in GOALS {
            let named = match goal.of {
                Of::Figure(name) | Of::Against(name) => vec![name],
                Of::Ratio(above, below) => vec![above, below],
            };
            assert!(named.iter().all(|name| known(name)), "{goal:?}");
        }
    }
}
