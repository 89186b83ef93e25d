//! What this process counts and measures, in Prometheus' terms.
//!
//! With the files below it the only one that names the `prometheus` crate: `metrics/series.rs` says which series there
//! are, `metrics/process.rs` has the process's own figures. Threads call methods in the words of the design; each is a few
//! atomic operations on counters that are held here, never a look-up by label. The registry is our own, so that two
//! services in one process do not mix. Every series exists from the start with 0: an alert on
//! `increase(outbox_dead_letters_total[5m])` would miss the first dead letter of a series that begins with
//! it. Units are base units (seconds, bytes); no label has values that can grow without bound. Nothing here
//! asks PostgreSQL or NATS: gauges are what other threads last said, and only the process's own are read at a
//! scrape.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use prometheus::core::Collector;
use prometheus::{Histogram, IntGauge, TextEncoder};

mod process;
mod register;
mod series;

use self::register::{gauge_value, unix_seconds};
use self::series::Series;

/// All metrics of one service. Clones share them.
#[derive(Debug, Clone)]
pub struct Metrics(Arc<Series>);

/// The backlog, as the janitor last measured it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BacklogGauges {
    /// Events not yet published and not dead, those in retry included.
    pub pending: u64,
    /// Events in retry.
    pub retrying: u64,
    /// Dead letters.
    pub dead: u64,
    /// Age of the oldest pending event; zero if there is none.
    pub lag: Duration,
}

/// The figures of the status page.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Totals {
    /// Events published since the start.
    pub published: u64,
    /// Attempts that ended in a rejection since the start.
    pub failed: u64,
    /// Events that became dead letters since the start.
    pub dead_letters: u64,
    /// Events pending, as last measured.
    pub pending: u64,
    /// Events in retry, as last measured.
    pub retrying: u64,
    /// Dead letters in the table, as last measured.
    pub dead: u64,
    /// Age of the oldest pending event in seconds, as last measured.
    pub lag_seconds: f64,
}

/// How long things took, since the start: a histogram's counts.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Durations {
    /// Upper bound in seconds of each bucket, and how many took at most so long.
    pub buckets: Vec<(f64, u64)>,
    /// How many there were, those above the last bound included.
    pub count: u64,
    /// How long they took together, in seconds.
    pub sum: f64,
}

impl Metrics {
    /// Registers every metric, all at 0.
    pub fn new() -> Metrics {
        Metrics(Arc::new(Series::new()))
    }

    /// `events` were acked and are about to be settled, `duplicates` of them known to the stream already.
    pub fn published(&self, events: u64, duplicates: u64) {
        if events == 0 {
            return;
        }
        self.0.published.inc_by(events);
        self.0.attempts_published.inc_by(events.saturating_sub(duplicates));
        self.0.attempts_duplicate.inc_by(duplicates);
        self.0.last_publish.set(unix_seconds(SystemTime::now()));
    }

    /// `events` were rejected and will be tried again.
    pub fn retried(&self, events: u64) {
        self.0.failed.inc_by(events);
        self.0.attempts_retried.inc_by(events);
    }

    /// `events` were rejected for the last time and became dead letters.
    pub fn dead(&self, events: u64) {
        self.0.failed.inc_by(events);
        self.0.attempts_dead.inc_by(events);
        self.0.dead_letters.inc_by(events);
    }

    /// `events` got no ack although NATS answers otherwise: no rejection yet, they will be tried again.
    pub fn unanswered(&self, events: u64) {
        self.0.attempts_unanswered.inc_by(events);
    }

    /// `events` went out with a header left out or changed.
    pub fn headers_altered(&self, events: u64) {
        self.0.headers_altered.inc_by(events);
    }

    /// A claim was read and holds `events`.
    pub fn claimed(&self, events: usize) {
        if events == 0 {
            self.0.claims_empty.inc();
            return;
        }
        self.0.claims_events.inc();
        self.0.claim_events.observe(events as f64);
    }

    /// A claim could not be read.
    pub fn claim_failed(&self) {
        self.0.claims_error.inc();
    }

    /// Publishing a claim's events took this long, from the first one sent to the last answer.
    pub fn publish_took(&self, took: Duration) {
        self.0.publish_duration.observe(took.as_secs_f64());
    }

    /// Settling a claim took this long, the commit included.
    pub fn settle_took(&self, took: Duration) {
        self.0.settle_duration.observe(took.as_secs_f64());
    }

    /// A claim took this long from its read to its commit.
    pub fn claim_took(&self, took: Duration) {
        self.0.processing_duration.observe(took.as_secs_f64());
    }

    /// The backlog was measured.
    pub fn backlog(&self, backlog: &BacklogGauges) {
        self.0.pending.set(gauge_value(backlog.pending));
        self.0.retrying.set(gauge_value(backlog.retrying));
        self.0.dead.set(gauge_value(backlog.dead));
        self.0.lag.set(backlog.lag.as_secs_f64());
        self.0.last_count.set(unix_seconds(SystemTime::now()));
    }

    /// The oldest transaction that keeps vacuum from the outbox is so old; zero if there is none.
    pub fn oldest_transaction(&self, age: Duration) {
        self.0.oldest_transaction.set(age.as_secs_f64());
    }

    /// Whether an event committed now would be published now.
    pub fn ready(&self, ready: bool) {
        self.0.ready.set(i64::from(ready));
    }

    /// So many keys wait for an event in retry, and so many for a decision about a dead letter.
    pub fn blocked_keys(&self, by_retry: u64, by_dead: u64) {
        self.0.blocked_by_retry.set(gauge_value(by_retry));
        self.0.blocked_by_dead.set(gauge_value(by_dead));
    }

    /// The partitions were looked at: for how many days from now they are made, rows that fell beside them.
    pub fn partitions(&self, days_ahead: f64, default_rows: u64) {
        self.0.partitions_ahead.set(days_ahead);
        self.0.default_rows.set(gauge_value(default_rows));
    }

    /// The sweep found so many events that claims had passed.
    pub fn sweep_found(&self, events: u64) {
        self.0.sweep_found.inc_by(events);
    }

    /// A pass of the sweep was brought to its end.
    pub fn swept(&self) {
        self.0.last_sweep.set(unix_seconds(SystemTime::now()));
    }

    /// A round of upkeep was done.
    pub fn upkeep_done(&self) {
        self.0.last_upkeep.set(unix_seconds(SystemTime::now()));
    }

    /// Published events were deleted one by one, or with their partition (0 events, as they are not counted).
    pub fn deleted(&self, events: u64, partitions: u64) {
        self.0.deleted_events.inc_by(events);
        self.0.dropped_partitions.inc_by(partitions);
    }

    /// Connections of the pool: in use, idle, and how many it may have.
    pub fn pool(&self, busy: u32, idle: u32, max: u32) {
        self.0.pool_busy.set(i64::from(busy));
        self.0.pool_idle.set(i64::from(idle));
        self.0.pool_max.set(i64::from(max));
    }

    /// A connection to NATS was made.
    pub fn nats_connected(&self) {
        self.0.nats_connects.inc();
        self.0.nats_connected.set(1);
    }

    /// The connection to NATS was lost or given up.
    pub fn nats_disconnected(&self) {
        self.0.nats_connected.set(0);
    }

    /// An outage began.
    pub fn outage_began(&self) {
        self.0.outages.inc();
        self.0.outage.set(1);
    }

    /// The outage ended.
    pub fn outage_ended(&self) {
        self.0.outage.set(0);
    }

    /// PostgreSQL refused a statement or a connection, or a connection broke.
    pub fn postgres_error(&self) {
        self.0.postgres_errors.inc();
    }

    /// The figures of the status page.
    pub fn totals(&self) -> Totals {
        let count = |gauge: &IntGauge| u64::try_from(gauge.get()).unwrap_or(0);
        Totals {
            published: self.0.published.get(),
            failed: self.0.failed.get(),
            dead_letters: self.0.dead_letters.get(),
            pending: count(&self.0.pending),
            retrying: count(&self.0.retrying),
            dead: count(&self.0.dead),
            lag_seconds: self.0.lag.get(),
        }
    }

    /// How long claims were held.
    pub fn claim_durations(&self) -> Durations {
        durations(&self.0.processing_duration)
    }

    /// How long publishing a claim's events took.
    pub fn publish_durations(&self) -> Durations {
        durations(&self.0.publish_duration)
    }

    /// How long settling a claim took.
    pub fn settle_durations(&self) -> Durations {
        durations(&self.0.settle_duration)
    }

    /// Everything in Prometheus' text format, version 0.0.4.
    pub fn render(&self) -> String {
        self.0.process.refresh();
        TextEncoder::new()
            .encode_to_string(&self.0.registry.gather())
            .expect("encoding fails only for a metric without a name or samples, and all of ours have both")
    }
}

impl Default for Metrics {
    fn default() -> Metrics {
        Metrics::new()
    }
}

fn durations(histogram: &Histogram) -> Durations {
    // A histogram without labels is one family of one metric.
    let families = histogram.collect();
    let Some(metric) = families.first().and_then(|family| family.get_metric().first()) else {
        return Durations::default();
    };
    let histogram = metric.get_histogram();
    Durations {
        buckets: histogram
            .get_bucket()
            .iter()
            .map(|bucket| (bucket.upper_bound(), bucket.cumulative_count()))
            .collect(),
        count: histogram.get_sample_count(),
        sum: histogram.get_sample_sum(),
    }
}

#[cfg(test)]
mod tests {
    use super::series::SECONDS;
    use super::*;

    /// The value of `series` (name and labels) in the rendered text.
    fn value(metrics: &Metrics, series: &str) -> f64 {
        let text = metrics.render();
        let line = text.lines().find(|line| line.rsplit_once(' ').is_some_and(|(name, _)| name == series));
        line.unwrap_or_else(|| panic!("no {series} in:\n{text}")).rsplit_once(' ').unwrap().1.parse().unwrap()
    }

    #[test]
    fn every_series_exists_from_the_start_with_0() {
        let metrics = Metrics::new();
        for series in [
            "outbox_events_published_total",
            "outbox_events_failed_total",
            "outbox_batch_processing_duration_seconds_count",
            "outbox_pending_events",
            "outbox_lag_seconds",
            "outbox_attempts_total{outcome=\"published\"}",
            "outbox_attempts_total{outcome=\"duplicate\"}",
            "outbox_attempts_total{outcome=\"retried\"}",
            "outbox_attempts_total{outcome=\"dead\"}",
            "outbox_attempts_total{outcome=\"unanswered\"}",
            "outbox_publish_duration_seconds_count",
            "outbox_settle_duration_seconds_count",
            "outbox_claims_total{result=\"events\"}",
            "outbox_claims_total{result=\"empty\"}",
            "outbox_claims_total{result=\"error\"}",
            "outbox_claim_events_count",
            "outbox_retrying_events",
            "outbox_dead_events",
            "outbox_blocked_keys{by=\"retry\"}",
            "outbox_blocked_keys{by=\"dead\"}",
            "outbox_dead_letters_total",
            "outbox_headers_altered_total",
            "outbox_pool_connections{state=\"busy\"}",
            "outbox_pool_connections{state=\"idle\"}",
            "outbox_pool_max_connections",
            "outbox_nats_connected",
            "outbox_nats_connects_total",
            "outbox_outage",
            "outbox_outages_total",
            "outbox_postgres_errors_total",
            "outbox_last_publish_timestamp_seconds",
            "outbox_partitions_ahead_days",
            "outbox_default_partition_rows",
            "outbox_upkeep_last_success_timestamp_seconds",
            "outbox_events_deleted_total",
            "outbox_partitions_dropped_total",
            "outbox_sweep_found_total",
            "outbox_sweep_last_pass_timestamp_seconds",
        ] {
            assert_eq!(value(&metrics, series), 0.0, "{series}");
        }
        assert_eq!(
            value(&metrics, concat!("outbox_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"}")),
            1.0
        );
    }

    #[test]
    fn an_attempt_is_counted_under_one_outcome() {
        let metrics = Metrics::new();
        metrics.published(10, 3);
        metrics.published(0, 0);
        metrics.retried(4);
        metrics.dead(2);
        metrics.unanswered(1);
        for (series, expected) in [
            ("outbox_events_published_total", 10.0),
            ("outbox_events_failed_total", 6.0),
            ("outbox_dead_letters_total", 2.0),
            ("outbox_attempts_total{outcome=\"published\"}", 7.0),
            ("outbox_attempts_total{outcome=\"duplicate\"}", 3.0),
            ("outbox_attempts_total{outcome=\"retried\"}", 4.0),
            ("outbox_attempts_total{outcome=\"dead\"}", 2.0),
            ("outbox_attempts_total{outcome=\"unanswered\"}", 1.0),
        ] {
            assert_eq!(value(&metrics, series), expected, "{series}");
        }
        let now = unix_seconds(SystemTime::now());
        assert!((value(&metrics, "outbox_last_publish_timestamp_seconds") - now).abs() < 60.0);
    }

    #[test]
    fn gauges_say_what_was_last_told() {
        let metrics = Metrics::new();
        metrics.backlog(&BacklogGauges {
            pending: 7,
            retrying: 2,
            dead: 1,
            lag: Duration::from_millis(1500),
        });
        metrics.blocked_keys(5, 6);
        metrics.pool(3, 4, 20);
        metrics.nats_connected();
        metrics.nats_disconnected();
        metrics.nats_connected();
        metrics.outage_began();
        metrics.ready(true);
        metrics.oldest_transaction(Duration::from_millis(90_500));
        for (series, expected) in [
            ("outbox_pending_events", 7.0),
            ("outbox_retrying_events", 2.0),
            ("outbox_dead_events", 1.0),
            ("outbox_blocked_keys{by=\"retry\"}", 5.0),
            ("outbox_blocked_keys{by=\"dead\"}", 6.0),
            ("outbox_lag_seconds", 1.5),
            ("outbox_pool_connections{state=\"busy\"}", 3.0),
            ("outbox_pool_connections{state=\"idle\"}", 4.0),
            ("outbox_pool_max_connections", 20.0),
            ("outbox_nats_connected", 1.0),
            ("outbox_nats_connects_total", 2.0),
            ("outbox_outage", 1.0),
            ("outbox_ready", 1.0),
            ("outbox_oldest_transaction_seconds", 90.5),
        ] {
            assert_eq!(value(&metrics, series), expected, "{series}");
        }
        let now = unix_seconds(SystemTime::now());
        assert!((value(&metrics, "outbox_backlog_last_success_timestamp_seconds") - now).abs() < 60.0);
        metrics.outage_ended();
        metrics.ready(false);
        metrics.backlog(&BacklogGauges::default());
        assert_eq!(value(&metrics, "outbox_outage"), 0.0);
        assert_eq!(value(&metrics, "outbox_ready"), 0.0);
        assert_eq!(value(&metrics, "outbox_outages_total"), 1.0);
        assert_eq!(metrics.totals().pending, 0);
    }

    #[test]
    fn claims_and_their_durations_are_histograms() {
        let metrics = Metrics::new();
        metrics.claimed(0);
        metrics.claimed(100);
        metrics.claimed(99);
        metrics.claim_failed();
        metrics.publish_took(Duration::from_millis(4));
        metrics.settle_took(Duration::from_millis(2));
        metrics.claim_took(Duration::from_millis(20));
        metrics.postgres_error();
        metrics.headers_altered(5);
        for (series, expected) in [
            ("outbox_claims_total{result=\"empty\"}", 1.0),
            ("outbox_claims_total{result=\"events\"}", 2.0),
            ("outbox_claims_total{result=\"error\"}", 1.0),
            ("outbox_claim_events_sum", 199.0),
            ("outbox_claim_events_bucket{le=\"99\"}", 1.0),
            ("outbox_publish_duration_seconds_bucket{le=\"0.0025\"}", 0.0),
            ("outbox_publish_duration_seconds_bucket{le=\"0.005\"}", 1.0),
            ("outbox_settle_duration_seconds_sum", 0.002),
            ("outbox_batch_processing_duration_seconds_bucket{le=\"+Inf\"}", 1.0),
            ("outbox_postgres_errors_total", 1.0),
            ("outbox_headers_altered_total", 5.0),
        ] {
            assert_eq!(value(&metrics, series), expected, "{series}");
        }
        let claims = metrics.claim_durations();
        assert_eq!((claims.count, claims.sum, claims.buckets.len()), (1, 0.02, SECONDS.len()));
        assert_eq!(claims.buckets[3..5], [(0.01, 0), (0.025, 1)]);
        assert_eq!((metrics.publish_durations().sum, metrics.settle_durations().sum), (0.004, 0.002));
    }

    #[test]
    fn the_process_figures_are_real() {
        let metrics = Metrics::new();
        let before = value(&metrics, "process_cpu_seconds_total");
        let mut sum = 0_u64;
        while value(&metrics, "process_cpu_seconds_total") < before + 0.02 {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(value(&metrics, "process_resident_memory_bytes") > 100_000.0);
        assert!(value(&metrics, "process_open_fds") >= 3.0);
        assert!(value(&metrics, "process_max_fds") >= 3.0);
        assert!(value(&metrics, "process_threads") >= 2.0);
        let age = unix_seconds(SystemTime::now()) - value(&metrics, "process_start_time_seconds");
        assert!((-1.0..86_400.0).contains(&age), "started {age}s ago");
    }

    #[test]
    fn help_and_type_stand_before_every_metric() {
        let text = Metrics::new().render();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let name = line.split(['{', ' ']).next().unwrap();
            let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
            let family = family.unwrap_or(name);
            let described = |name: &str| {
                text.contains(&format!("# HELP {name} ")) && text.contains(&format!("# TYPE {name} "))
            };
            assert!(described(name) || described(family), "{line}");
        }
    }
}
