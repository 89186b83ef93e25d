//! A deadline that also counts the time in which the machine slept.
//!
//! A claim's budget must end where the database's `idle_in_transaction_session_timeout` would have freed its
//! lanes, whatever happened to this machine in between. `Instant` stands still while a machine is suspended;
//! `CLOCK_BOOTTIME` does not. A plain value that any thread may keep and hand on; it never waits.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// A point on `CLOCK_BOOTTIME`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Boottime(Duration);

impl Boottime {
    /// Now.
    pub fn now() -> Boottime {
        let time = clock_gettime(ClockId::Boottime);
        let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
        Boottime(Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0)))
    }

    /// This point and so much later.
    pub fn plus(self, duration: Duration) -> Boottime {
        Boottime(self.0.saturating_add(duration))
    }

    /// Whether the point lies behind us.
    pub fn is_past(self) -> bool {
        Boottime::now() >= self
    }

    /// Time from `earlier` to this point; zero if it lies before.
    pub fn since(self, earlier: Boottime) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}
