//! `dispatcher` and `ordering`: how events are claimed and tried, and what order a key's events keep.
//!
//! Each section's struct, its keys with their ranges and defaults, and how they are read. Pure, on the thread that loads
//! the configuration, but for the host's name, which is asked for as the default of `instance_id`. What two keys must be
//! to each other is in `checks.rs`; what the values do is for those who take them.

use std::time::Duration;

use super::key::key;
use super::section::section;
use super::values::{
    DAY, HOUR, MINUTE, SECOND, boolean, checked_by, count, duration, one_of, shown, size, text, up_to,
};
use super::yaml::Node;
use crate::lane::LANES;

/// PostgreSQL cuts an `application_name` off at 63 bytes.
const MAX_INSTANCE_ID: usize = 63;

section! {
    /// How events are claimed and tried.
    pub struct Dispatcher = "dispatcher" {
        /// Name of this instance: `application_name`, the `Outbox-Instance` header, logs. 1 to 63 printable ASCII
        /// characters; two instances may share one, but logs and `pg_stat_activity` are then hard to read.
        pub instance_id: String = key(host_name(), checked_by(instance_id)).variable("DISPATCHER_INSTANCE_ID"),
        /// Events of one claim at most.
        pub batch_size: usize = key(100, count(1..=100_000)).live(),
        /// Attempts that NATS judges before an event is a dead letter. Outages do not count.
        pub max_attempts: u32 = key(3, count(1..=1_000_000)).live(),
        /// Time between claims while nothing wakes us up.
        pub poll_interval: Duration = key(SECOND, duration(up_to(HOUR))),
        /// Longest sleep while notifications do wake us up; at least `poll_interval`.
        pub fallback_interval: Duration = key(30 * SECOND, duration(up_to(HOUR))),
        /// Worker threads, each with one claim at a time; no more than there are lanes to claim.
        pub workers: usize = key(5, count(1..=i128::from(LANES))),
        /// Time to finish what is in flight after SIGTERM; 0s releases everything at once.
        pub shutdown_grace: Duration = key(30 * SECOND, duration(Duration::ZERO..=HOUR)),
        /// A claim sends for at most this long after its events were read, then settles what it has.
        pub claim_budget: Duration = key(5 * SECOND, duration(up_to(5 * MINUTE))),
        /// Bytes of events that all claims together may hold. The default is written `64MiB`.
        pub max_in_flight_bytes: usize = key(64 << 20, size(64 << 10..=64 << 30)),
        /// Wait before the second attempt; doubles with each further one.
        pub backoff_initial: Duration = key(SECOND, duration(up_to(DAY))).live(),
        /// Longest wait between attempts; at least `backoff_initial`.
        pub backoff_max: Duration = key(5 * MINUTE, duration(up_to(DAY))).live(),
        /// A thread without progress for so long, beyond the waits of a claim and for a connection, counts as stuck:
        /// `/health` fails and the watchdog goes hungry.
        pub stuck_after: Duration = key(2 * MINUTE, duration(SECOND..=HOUR)),
    }
}

section! {
    /// Order of the events of a key.
    pub struct Ordering = "ordering" {
        /// false gives up order per key for speed.
        pub enabled: bool = key(true, boolean()),
        /// What a dead letter does to later events of its key.
        pub on_dead: OnDead = key(
            OnDead::Continue,
            one_of("way to treat a key", &[("continue", OnDead::Continue), ("block", OnDead::Block)])
        ),
    }
}

/// What a dead letter does to its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnDead {
    /// Later events of the key go on.
    Continue,
    /// The key is held until an operator retries or discards the dead letter.
    Block,
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
