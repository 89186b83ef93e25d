//! What claims do, and how much one may have.
//!
//! [`ClaimSettings`] are the same for every claim of a store, and fixed when it is made; [`ClaimLimits`] come with each
//! claim, as the claimer's thread knows how much room there is. Plain data, read by every thread that has a claim; where a
//! limit makes no sense (no lane, no event), the least that does is meant.

use std::time::Duration;

use crate::lane::LANES;

/// What a claim does beyond its limits; the same for every claim of a store.
#[derive(Debug, Clone, Default)]
pub struct ClaimSettings {
    /// true: a settle is on disk when it returns (and wherever else the server's own setting wants it).
    /// false: a crash of PostgreSQL may forget the last moment's settles, whose events are published again.
    pub synchronous_commit: bool,
    /// PostgreSQL ends a claim, and frees its lanes, when nothing was heard of it for this long.
    pub idle_in_transaction_timeout: Duration,
    /// An event waits for the earlier events of its key that are in retry.
    pub ordered: bool,
    /// An event waits for the earlier dead letters of its key. Means nothing unless `ordered`.
    pub block_on_dead: bool,
    /// Longest backoff there is: a retry that is due later than that from now is due, as clocks jump.
    pub backoff_max: Duration,
    /// Bytes of payload and metadata that one claim holds at most; a larger event comes alone.
    pub max_claim_bytes: i64,
}

/// How much a claim may have.
#[derive(Debug, Clone, Copy)]
pub struct ClaimLimits {
    /// Lanes at most.
    pub lanes: i32,
    /// Events of one read at most.
    pub events: i32,
    /// Bytes of payload and metadata that an event has at most: what is larger can be no message, and stays in the
    /// database. `None`: no texts are read at all.
    pub event_bytes: Option<usize>,
}

impl ClaimLimits {
    /// Lanes at most of which each may have an event.
    pub(super) fn max_lanes(&self) -> i32 {
        self.lanes.clamp(1, LANES.min(self.events.max(1)))
    }
}
