//! Publishes the events of one claim and says what became of each: the way from a worker to its session and back.
//!
//! A claim is one flight, by the protocol that is configured: `jetstream.rs` or `core.rs`. Both have the same window,
//! the same outcomes and the same lines in the log, and share nothing else. Before, this takes what may change while the
//! service runs (settings, the stream's facts), so that a claim never sees two of them; after, it announces the dead
//! letters and tells the publisher how NATS is. Runs on a worker's thread. Never touches the database, never sleeps, and
//! waits only with a deadline.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use crate::boottime::Boottime;
use crate::config;
use crate::config::live::{Live, Settings};
use crate::event::order::Order;
use crate::event::{Event, Outcome};
use crate::nats::{Publisher, Session};
use crate::ops::metrics::Metrics;
use crate::publish::announce::announce;
use crate::publish::batch::Batching;
use crate::publish::core::CoreFlight;
use crate::publish::jetstream::JetStreamFlight;
use crate::publish::memory::Memory;
use crate::publish::message::{Messages, TargetStream};
use crate::publish::outcomes::{ClaimReport, Landed, Outcomes};
use crate::publish::window::Window;
use crate::publish::wire::Wire;

/// What the workers share to publish their claims.
pub struct Publish {
    /// The connection.
    pub publisher: Publisher,
    /// Topic map, headers and limits, taken anew for each claim.
    pub live: Live,
    /// Whether the events of a key keep their order.
    pub ordered: bool,
    /// JetStream or core NATS.
    pub protocol: Protocol,
    /// Longest wait for an ack.
    pub ack_timeout: Duration,
    /// Worker threads.
    pub workers: usize,
    /// Set when the service drains: nothing new is sent.
    pub draining: Arc<AtomicBool>,
    /// What outlives a claim.
    pub memory: Memory,
    /// Counters.
    pub metrics: Metrics,
}

/// Who stores or takes the events.
pub enum Protocol {
    /// A stream of JetStream acknowledges each.
    JetStream {
        /// The stream's name.
        stream: String,
        /// Whether long runs go as atomic batches where the stream takes them.
        batches: bool,
    },
    /// The server takes them, and acknowledges nothing.
    Core,
}

impl Protocol {
    /// The protocol that a configuration asks for.
    pub fn of(config: &config::JetStream) -> Protocol {
        if config.enabled {
            Protocol::JetStream { stream: config.stream_name.clone(), batches: config.atomic_batches }
        } else {
            Protocol::Core
        }
    }
}

impl Publish {
    /// Publishes `events` until `budget` with the session of `slot`.
    pub fn claim(&self, slot: usize, events: &[Arc<Event>], budget: Boottime) -> ClaimReport {
        let session = match self.publisher.session(slot) {
            Ok(session) => session,
            Err(cause) => {
                self.publisher.outage(&cause, 0);
                return ClaimReport::untouched(events.len());
            }
        };
        let live = self.live.now();
        let Landed { mut outcomes, mut outage, in_flight } = self.fly(&session, &live, events, budget);
        if let Err(cause) = announce(&live, &session, events, outcomes.all_mut()) {
            outage.get_or_insert(cause);
        }
        let report = outcomes.report();
        // A rejection proves nothing of the stream: it may be our own judgement.
        let stored = report.outcomes.contains(&Outcome::Published);
        match outage {
            Some(cause) => self.publisher.outage(&cause, in_flight),
            None if stored => self.publisher.confirm(),
            None => {}
        }
        report
    }

    fn fly<'a>(
        &'a self,
        session: &'a Session,
        live: &'a Settings,
        events: &'a [Arc<Event>],
        budget: Boottime,
    ) -> Landed<'a> {
        let wire = Wire { publisher: &self.publisher, session, ack_timeout: self.ack_timeout };
        let window = Window::of_one(self.workers, budget, &self.draining);
        let outcomes = Outcomes::of(events, live, &self.memory);
        let order = if self.ordered {
            Order::by_key(events.iter().map(AsRef::as_ref))
        } else {
            Order::none(events.len())
        };
        let metrics = &self.metrics;
        match &self.protocol {
            Protocol::JetStream { stream, batches } => {
                let facts = self.publisher.facts();
                let allowed = *batches && facts.as_ref().is_some_and(|facts| facts.allow_atomic);
                let batching = Batching::new(allowed, self.workers, events.len());
                let target = Some(TargetStream { name: stream, facts });
                let messages = Messages { wire, live, stream: target, metrics };
                JetStreamFlight::new(stream, messages, window, order, batching, outcomes).fly()
            }
            Protocol::Core => {
                let messages = Messages { wire, live, stream: None, metrics };
                CoreFlight { messages, window, order, outcomes }.fly()
            }
        }
    }
}
