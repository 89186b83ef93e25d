//! `dispatcher` and `ordering`: how events are claimed and tried, and what order a key's events keep.
//!
//! Each section's struct, its keys with their ranges and defaults, and how they are read. Pure, on the thread that loads
//! the configuration, but for the host's name, which is asked for as the default of `instance_id`. What two keys must be
//! to each other is in `checks.rs`; what the values do is for those who take them.

use std::time::Duration;

use super::reading::{ConfigReading, Section};
use super::section::Keys;
use super::values::{DAY, HOUR, MINUTE, SECOND, boolean, count, duration, one_of, shown, size, text, up_to};
use super::yaml::Node;
use crate::lane::LANES;

/// PostgreSQL cuts an `application_name` off at 63 bytes.
const MAX_INSTANCE_ID: usize = 63;

/// How events are claimed and tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dispatcher {
    /// Name of this instance: `application_name`, the `Outbox-Instance` header, logs. 1 to 63 printable ASCII
    /// characters; two instances may share one, but logs and `pg_stat_activity` are then hard to read.
    /// Default: the host name.
    pub instance_id: String,
    /// Events of one claim at most, 1 to 100,000. Default 100.
    pub batch_size: usize,
    /// Attempts that NATS judges before an event is a dead letter, 1 to 1,000,000. Outages do not count. Default 3.
    pub max_attempts: u32,
    /// Time between claims while nothing wakes us up, 10ms to 1h. Default 1s.
    pub poll_interval: Duration,
    /// Longest sleep while notifications do wake us up, 10ms to 1h; at least `poll_interval`. Default 30s.
    pub fallback_interval: Duration,
    /// Worker threads, each with one claim at a time; 1 to 64, as there are 64 lanes to claim. Default 5.
    pub workers: usize,
    /// Time to finish what is in flight after SIGTERM, 0s to 1h; 0s releases everything at once. Default 30s.
    pub shutdown_grace: Duration,
    /// A claim sends for at most this long after its events were read, then settles what it has; 10ms to 5m.
    /// Default 5s.
    pub claim_budget: Duration,
    /// Bytes of events that all claims together may hold, 64 KiB to 64 GiB. Default 64 MiB (written `64MiB`).
    pub max_in_flight_bytes: usize,
    /// Wait before the second attempt, 10ms to 1day; doubles with each further one. Default 1s.
    pub backoff_initial: Duration,
    /// Longest wait between attempts, 10ms to 1day; at least `backoff_initial`. Default 5m.
    pub backoff_max: Duration,
    /// A thread without progress for so long, beyond the waits of a claim and for a connection, counts as stuck:
    /// `/health` fails and the watchdog goes hungry. 1s to 1h. Default 2m.
    pub stuck_after: Duration,
}

/// Order of the events of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ordering {
    /// false gives up order per key for speed. Default true.
    pub enabled: bool,
    /// What a dead letter does to later events of its key. Default continue.
    pub on_dead: OnDead,
}

/// What a dead letter does to its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnDead {
    /// Later events of the key go on.
    Continue,
    /// The key is held until an operator retries or discards the dead letter.
    Block,
}

pub(super) fn dispatcher(reading: &mut ConfigReading<'_>, root: &Section<'_>) -> Dispatcher {
    let section = reading.section(root, "dispatcher");
    let mut value = Keys { reading, section: &section };
    Dispatcher {
        instance_id: value.of("instance_id", host_name(), instance_id),
        batch_size: value.of("batch_size", 100, count(1..=100_000)),
        max_attempts: value.of("max_attempts", 3, count(1..=1_000_000)),
        poll_interval: value.of("poll_interval", SECOND, duration(up_to(HOUR))),
        fallback_interval: value.of("fallback_interval", 30 * SECOND, duration(up_to(HOUR))),
        workers: value.of("workers", 5, count(1..=i128::from(LANES))),
        shutdown_grace: value.of("shutdown_grace", 30 * SECOND, duration(Duration::ZERO..=HOUR)),
        claim_budget: value.of("claim_budget", 5 * SECOND, duration(up_to(5 * MINUTE))),
        max_in_flight_bytes: value.of("max_in_flight_bytes", 64 << 20, size(64 << 10..=64 << 30)),
        backoff_initial: value.of("backoff_initial", SECOND, duration(up_to(DAY))),
        backoff_max: value.of("backoff_max", 5 * MINUTE, duration(up_to(DAY))),
        stuck_after: value.of("stuck_after", 2 * MINUTE, duration(SECOND..=HOUR)),
    }
}

pub(super) fn ordering(reading: &mut ConfigReading<'_>, root: &Section<'_>) -> Ordering {
    let section = reading.section(root, "ordering");
    let mut value = Keys { reading, section: &section };
    let on_dead = [("continue", OnDead::Continue), ("block", OnDead::Block)];
    Ordering {
        enabled: value.of("enabled", true, boolean),
        on_dead: value.of("on_dead", OnDead::Continue, one_of("way to treat a key", &on_dead)),
    }
}

/// The host's name, or a name of our own if that one cannot be an instance's.
fn host_name() -> String {
    let system = rustix::system::uname();
    let name = system.nodename().to_string_lossy();
    if is_instance_id(&name) { name.into_owned() } else { "pg-outbox".to_owned() }
}

fn instance_id(node: &Node) -> Result<String, String> {
    let id = text(node)?;
    if is_instance_id(id) {
        return Ok(id.to_owned());
    }
    Err(format!(
        "{} is not an instance name; allowed: 1 to {MAX_INSTANCE_ID} printable ASCII characters, no blank at either end",
        shown(node)
    ))
}

/// Whether `id` can be an `application_name` and a header's value.
fn is_instance_id(id: &str) -> bool {
    let printable = id.bytes().all(|byte| matches!(byte, b' '..=b'~'));
    printable && !id.is_empty() && id.len() <= MAX_INSTANCE_ID && id.trim() == id
}
