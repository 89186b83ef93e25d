//! Atomic batches: which run of a key's events goes as one, how it is sent, and when its events go one by one instead.
//!
//! Where the stream takes them, a batch is stored whole or not at all, so the order of its events holds though they are
//! in flight together. Whatever answer a batch gets but "stored", its events are sent again one by one, and the answers
//! to those are what counts: a batch that was stored although its answer was lost is told by `duplicate: true`, and only
//! the event at fault is refused. Part of a JetStream flight, on a worker's thread; waits only until the deadline that
//! it is given, for the server to take the messages.

use std::time::Instant;

use uuid::Uuid;

use crate::boottime::Boottime;
use crate::event::order::Order;
use crate::event::retry::Failure;
use crate::failpoint;
use crate::nats::{NotSent, Outgoing};
use crate::publish::in_flight::{InFlight, Run};
use crate::publish::message::Messages;
use crate::publish::outcomes::Outcomes;

/// Shortest run of a key that is worth a batch, and the longest that a server takes.
const BATCH_EVENTS: (usize, usize) = (8, 1_000);
/// Batches open at once, of all workers together. A stream takes 50, a server 1,000 (nats-server 2.12).
const BATCHES_OPEN_MAX: usize = 40;

/// Which of a claim's events may go in batches.
pub(super) struct Batching {
    /// Batches that the claim may have open at once; 0 where none is allowed.
    open_max: usize,
    /// Events that go out one by one, as a batch with them was not stored.
    singly: Vec<bool>,
}

impl Batching {
    /// For a claim of `events` events, by one of `workers`. `allowed` says that the configuration wants batches and the
    /// stream takes them.
    pub(super) fn new(allowed: bool, workers: usize, events: usize) -> Batching {
        let open_max = if allowed { (BATCHES_OPEN_MAX / workers).max(1) } else { 0 };
        Batching { open_max, singly: vec![false; events] }
    }

    /// The run that begins with `first`: a batch where that is possible and worth it, else the event alone. It has at
    /// most `room` events.
    pub(super) fn run_from(
        &self,
        first: usize,
        order: &Order,
        outcomes: &Outcomes<'_>,
        in_flight: &InFlight,
        room: usize,
    ) -> Run {
        let (shortest, longest) = BATCH_EVENTS;
        if self.open_max == 0 || in_flight.batches() >= self.open_max {
            return Run::alone(first);
        }
        let events: Vec<usize> = std::iter::successors(Some(first), |&index| order.successor(index))
            .take_while(|&index| !self.singly[index] && !outcomes.is_unsettled(index))
            .take(longest.min(room))
            .collect();
        let batch = (events.len() >= shortest).then(|| Run::of(events)).flatten();
        batch.unwrap_or_else(|| Run::alone(first))
    }

    /// The events of a batch that was not stored, or of which nobody knows: each for itself from now on.
    pub(super) fn send_singly(&mut self, run: &Run, order: &mut Order) {
        for &index in run.events() {
            self.singly[index] = true;
        }
        order.put_back(run.first());
    }
}

/// Sends a run as one batch and returns the token of its answer. `None`, with nothing sent, where an event can never be a
/// message, or not with what a batch adds to its headers: sent one by one, its turn will come.
///
/// # Errors
/// See [`NotSent`]; a part may have been sent, which the server drops without the rest.
pub(super) fn send(
    run: &Run,
    messages: &Messages<'_>,
    outcomes: &Outcomes<'_>,
    budget: Boottime,
    deadline: Instant,
) -> Result<Option<u64>, NotSent> {
    let made: Result<Vec<Outgoing>, Failure> =
        run.events().iter().map(|&index| messages.make(outcomes.event(index))).collect();
    let Ok(mut parts) = made else { return Ok(None) };
    let batch = Uuid::from_u64_pair(fastrand::u64(..), fastrand::u64(..)).simple();
    let last = parts.len();
    for (place, part) in (1..).zip(&mut parts) {
        let commit = if place == last { "Nats-Batch-Commit: 1\r\n" } else { "" };
        part.headers =
            format!("Nats-Batch-Id: {batch}\r\nNats-Batch-Sequence: {place}\r\n{commit}{}", part.headers);
        // The server would close the connection, whenever they are sent as a batch.
        if !messages.fits(part) {
            return Ok(None);
        }
    }
    let Some(commit) = parts.pop() else { return Ok(None) };
    let session = messages.wire.session;
    for part in parts {
        session.publish_part(part, budget, deadline)?;
        failpoint!("publish.part");
    }
    session.publish(commit, budget, deadline).map(Some)
}
