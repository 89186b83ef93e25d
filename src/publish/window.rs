//! How much of a claim may be in flight at once, and until when it may send.
//!
//! Plain values of one claim, on a worker's thread, the same for JetStream and core NATS. A claim sends no longer than
//! its budget and not once the service drains; what was sent is still waited for. Looks at the boot clock and one flag,
//! and never waits.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::boottime::Boottime;

/// Unacknowledged events of all workers together. A stream's leader refuses more than 10,000 waiting messages
/// (nats-server 2.11, `max_buffered_msgs`), and half of that already hides every round trip.
const IN_FLIGHT_MAX: usize = 5_000;

/// What one claim may send.
pub(super) struct Window<'a> {
    /// Events that may be in flight at once, at least 1.
    pub(super) events_max: usize,
    /// Until when the claim may send.
    pub(super) budget: Boottime,
    /// Set when the service drains.
    draining: &'a AtomicBool,
}

impl<'a> Window<'a> {
    /// The share of one of `workers` claims, to be sent until `budget`.
    pub(super) fn of_one(workers: usize, budget: Boottime, draining: &'a AtomicBool) -> Window<'a> {
        Window { events_max: (IN_FLIGHT_MAX / workers).max(1), budget, draining }
    }

    /// Whether anything new may be sent now.
    pub(super) fn is_open(&self) -> bool {
        !self.draining.load(Ordering::Relaxed) && !self.budget.is_past()
    }

    /// How many more events may be sent while `in_flight` are.
    pub(super) fn room(&self, in_flight: usize) -> usize {
        self.events_max.saturating_sub(in_flight)
    }
}
