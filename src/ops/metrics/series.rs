//! The series: every metric of the service, registered once, at 0.
//!
//! [`Series`] is what `metrics.rs` counts on; its fields are the handles of single series, so that counting never looks one
//! up by its labels. A new metric is a field, an entry in [`Series::new`] and its help here, and a method there. Made
//! once, by the thread that starts the service; from then on every thread may count.

use prometheus::{Gauge, Histogram, IntCounter, IntGauge, Registry};

use super::process::Process;
use super::register::{counter, counters, gauge, gauges, histogram, int_gauge};

/// Upper bounds of the duration histograms, in seconds. An ack within one data centre takes about 1 ms, a
/// claim of 100 pipelined events some milliseconds, a replicated stream on slow disks 10 to 100 ms; the
/// budget of a claim and the ack timeout are 5 s each by default, so that 10 s holds what is still in order
/// and everything above it is a configured longer wait.
pub(super) const SECONDS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// Upper bounds of a claim's events: 1-2-5 steps around the default batch size of 100, so that "claims come
/// back full" shows.
const EVENTS: [f64; 13] =
    [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 99.0, 100.0, 200.0, 500.0, 1_000.0, 2_000.0, 5_000.0];

#[derive(Debug)]
pub(super) struct Series {
    pub(super) registry: Registry,
    pub(super) published: IntCounter,
    pub(super) failed: IntCounter,
    pub(super) attempts_published: IntCounter,
    pub(super) attempts_duplicate: IntCounter,
    pub(super) attempts_retried: IntCounter,
    pub(super) attempts_dead: IntCounter,
    pub(super) attempts_unanswered: IntCounter,
    pub(super) dead_letters: IntCounter,
    pub(super) headers_altered: IntCounter,
    pub(super) last_publish: Gauge,
    pub(super) claims_events: IntCounter,
    pub(super) claims_empty: IntCounter,
    pub(super) claims_error: IntCounter,
    pub(super) claim_events: Histogram,
    pub(super) publish_duration: Histogram,
    pub(super) settle_duration: Histogram,
    pub(super) processing_duration: Histogram,
    pub(super) pending: IntGauge,
    pub(super) retrying: IntGauge,
    pub(super) dead: IntGauge,
    pub(super) lag: Gauge,
    pub(super) last_count: Gauge,
    pub(super) oldest_transaction: Gauge,
    pub(super) ready: IntGauge,
    pub(super) blocked_by_retry: IntGauge,
    pub(super) blocked_by_dead: IntGauge,
    pub(super) partitions_ahead: Gauge,
    pub(super) default_rows: IntGauge,
    pub(super) last_upkeep: Gauge,
    pub(super) deleted_events: IntCounter,
    pub(super) dropped_partitions: IntCounter,
    pub(super) sweep_found: IntCounter,
    pub(super) last_sweep: Gauge,
    pub(super) pool_busy: IntGauge,
    pub(super) pool_idle: IntGauge,
    pub(super) pool_max: IntGauge,
    pub(super) nats_connected: IntGauge,
    pub(super) nats_connects: IntCounter,
    pub(super) outage: IntGauge,
    pub(super) outages: IntCounter,
    pub(super) postgres_errors: IntCounter,
    pub(super) process: Process,
}

impl Series {
    pub(super) fn new() -> Series {
        let registry = Registry::new();
        let r = &registry;
        let attempts = counters(r, "outbox_attempts_total", ATTEMPTS_HELP, "outcome");
        let claims = counters(r, "outbox_claims_total", CLAIMS_HELP, "result");
        let pool = gauges(r, "outbox_pool_connections", POOL_HELP, "state");
        let blocked = gauges(r, "outbox_blocked_keys", BLOCKED_HELP, "by");
        let build = gauges(r, "outbox_build_info", "Always 1; the label is the running version.", "version");
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let durations = |name, help| histogram(r, name, help, &SECONDS);
        Series {
            published: counter(r, "outbox_events_published_total", PUBLISHED_HELP),
            failed: counter(r, "outbox_events_failed_total", "Attempts that ended in a rejection."),
            attempts_published: attempts.with_label_values(&["published"]),
            attempts_duplicate: attempts.with_label_values(&["duplicate"]),
            attempts_retried: attempts.with_label_values(&["retried"]),
            attempts_dead: attempts.with_label_values(&["dead"]),
            attempts_unanswered: attempts.with_label_values(&["unanswered"]),
            dead_letters: counter(r, "outbox_dead_letters_total", "Events that became dead letters."),
            headers_altered: counter(r, "outbox_headers_altered_total", HEADERS_HELP),
            last_publish: gauge(r, "outbox_last_publish_timestamp_seconds", LAST_PUBLISH_HELP),
            claims_events: claims.with_label_values(&["events"]),
            claims_empty: claims.with_label_values(&["empty"]),
            claims_error: claims.with_label_values(&["error"]),
            claim_events: histogram(r, "outbox_claim_events", "Events of a claim that held any.", &EVENTS),
            publish_duration: durations("outbox_publish_duration_seconds", PUBLISH_HELP),
            settle_duration: durations("outbox_settle_duration_seconds", SETTLE_HELP),
            processing_duration: durations("outbox_batch_processing_duration_seconds", CLAIM_HELP),
            pending: int_gauge(r, "outbox_pending_events", PENDING_HELP),
            retrying: int_gauge(r, "outbox_retrying_events", "Events in retry, due or not."),
            dead: int_gauge(r, "outbox_dead_events", "Dead letters in the table."),
            lag: gauge(r, "outbox_lag_seconds", "Age of the oldest pending event; 0 if none is pending."),
            last_count: gauge(r, "outbox_backlog_last_success_timestamp_seconds", COUNT_HELP),
            oldest_transaction: gauge(r, "outbox_oldest_transaction_seconds", OLDEST_HELP),
            ready: int_gauge(r, "outbox_ready", READY_HELP),
            blocked_by_retry: blocked.with_label_values(&["retry"]),
            blocked_by_dead: blocked.with_label_values(&["dead"]),
            partitions_ahead: gauge(r, "outbox_partitions_ahead_days", AHEAD_HELP),
            default_rows: int_gauge(r, "outbox_default_partition_rows", DEFAULT_HELP),
            last_upkeep: gauge(r, "outbox_upkeep_last_success_timestamp_seconds", UPKEEP_HELP),
            deleted_events: counter(r, "outbox_events_deleted_total", DELETED_HELP),
            dropped_partitions: counter(r, "outbox_partitions_dropped_total", DROPPED_HELP),
            sweep_found: counter(r, "outbox_sweep_found_total", SWEEP_FOUND_HELP),
            last_sweep: gauge(r, "outbox_sweep_last_pass_timestamp_seconds", SWEEP_HELP),
            pool_busy: pool.with_label_values(&["busy"]),
            pool_idle: pool.with_label_values(&["idle"]),
            pool_max: int_gauge(r, "outbox_pool_max_connections", POOL_MAX_HELP),
            nats_connected: int_gauge(r, "outbox_nats_connected", "1 while connected to NATS, else 0."),
            nats_connects: counter(r, "outbox_nats_connects_total", CONNECTS_HELP),
            outage: int_gauge(r, "outbox_outage", "1 while NATS cannot judge events, else 0."),
            outages: counter(r, "outbox_outages_total", "Outages that began."),
            postgres_errors: counter(r, "outbox_postgres_errors_total", POSTGRES_HELP),
            process: Process::new(r),
            registry,
        }
    }
}

const PUBLISHED_HELP: &str = "Events acked by NATS, duplicates included.";
const ATTEMPTS_HELP: &str = "Attempts to publish an event, by outcome: published, duplicate (acked, but the \
    stream had it), retried and dead (rejected), unanswered (no ack though NATS answers otherwise).";
const CLAIMS_HELP: &str = "Claims, by what their read found: events, empty (nothing to do), error.";
const HEADERS_HELP: &str = "Events published with a header of their metadata left out or changed.";
const LAST_PUBLISH_HELP: &str = "Unix time of the last ack; 0 if there was none since the start.";
const PUBLISH_HELP: &str = "Time to publish a claim's events, from the first one sent to the last answer.";
const SETTLE_HELP: &str = "Time to settle a claim: write its outcomes and commit.";
const CLAIM_HELP: &str = "Time a claim is held, from its read to its commit.";
const READY_HELP: &str = "1 while an event committed now would be published now, else 0.";
const BLOCKED_HELP: &str = "Keys whose later events wait: for a retry, or (ordering.on_dead: block) for a decision about a dead letter.";
const PENDING_HELP: &str =
    "Events neither published nor dead, as last measured; an estimate when there are many.";
const COUNT_HELP: &str =
    "Unix time at which this instance last counted the backlog; 0 if it has not since the start.";
const OLDEST_HELP: &str = "Age of the oldest transaction that keeps vacuum from the outbox, as far as the role may \
    see; 0 if there is none.";
const AHEAD_HELP: &str =
    "Days from now for which there are partitions without a gap; 0 if this month has none.";
const DEFAULT_HELP: &str =
    "Rows in the DEFAULT partition, where events fall whose month has none; counted up to 100000.";
const UPKEEP_HELP: &str = "Unix time at which this instance last finished a round of upkeep of the partitions; \
    0 if it has not since the start.";
const DELETED_HELP: &str = "Published events deleted one by one as too old, not counting those that went with \
    their partition.";
const DROPPED_HELP: &str = "Partitions dropped as too old.";
const SWEEP_FOUND_HELP: &str = "Events found pending that claims had passed, and would never have come to; of one lane \
    at most 100 at a time are counted, and all that wait behind them are published with them.";
const SWEEP_HELP: &str = "Unix time at which this instance last finished a sweep of all partitions that need one; 0 if it \
    has not since the start.";
const POOL_HELP: &str = "Connections of the PostgreSQL pool, by state.";
const POOL_MAX_HELP: &str = "Connections the PostgreSQL pool may have.";
const CONNECTS_HELP: &str = "Connections made to NATS, the first included.";
const POSTGRES_HELP: &str = "Statements and connections that PostgreSQL refused, and connections that broke.";
