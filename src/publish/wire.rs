//! The connection as one claim uses it: the worker's session, whose it is, and how long an answer may take.
//!
//! Lives on a worker's thread for the length of a claim, shared by everything that sends or waits in it. It holds
//! borrowed parts and no state of its own. Every wait for NATS in a claim gets its deadline here; none is without.

use std::time::{Duration, Instant};

use crate::nats::{Publisher, Session};

/// One claim's use of the connection.
#[derive(Clone, Copy)]
pub(super) struct Wire<'a> {
    /// Whose session it is, and who is told of an outage.
    pub(super) publisher: &'a Publisher,
    /// The worker's session on the present link.
    pub(super) session: &'a Session,
    /// Longest wait for an answer, and for the server to take what we send.
    pub(super) ack_timeout: Duration,
}

impl Wire<'_> {
    /// When the wait ends for what is sent now.
    pub(super) fn deadline(&self) -> Instant {
        Instant::now() + self.ack_timeout
    }

    /// The longest wait, as texts say it: `5s`.
    pub(super) fn patience(&self) -> String {
        format!("{}s", self.ack_timeout.as_secs_f64())
    }
}
