//! Makes the messages of one claim: an event's subject and headers, and whether the message fits server and stream.
//!
//! Runs on a worker's thread, just before sending. The topic map and the header policy are those that the claim took
//! when it began; the limits are those that server and stream told last. What cannot become a message now never can,
//! so the reason is [`Failure::Hopeless`] and the event dies of it. A server closes the connection on a message over
//! its limit, so none may get that far. Sends nothing, never waits, and never looks into the payload.

use std::borrow::Cow;
use std::sync::Arc;

use crate::config::live::Settings;
use crate::event::Event;
use crate::event::retry::Failure;
use crate::event::topic_map;
use crate::nats::Outgoing;
use crate::nats::answer::StreamFacts;
use crate::ops::metrics::Metrics;
use crate::publish::wire::Wire;

/// A message's headers, first line included: JetStream's limit is 65,535 bytes (error 10097).
const HEADERS_MAX: usize = 65_535;
/// `NATS/1.0` CR LF before the header lines and CR LF behind them.
const HEADERS_FRAME: usize = 12;

/// What the events of one claim become messages by.
pub(super) struct Messages<'a> {
    /// The connection that they are for.
    pub(super) wire: Wire<'a>,
    /// Topic map and header policy.
    pub(super) live: &'a Settings,
    /// The stream that stores them; `None` in core NATS.
    pub(super) stream: Option<TargetStream<'a>>,
    /// Counts the headers that were left out or changed.
    pub(super) metrics: &'a Metrics,
}

/// The stream that messages are for.
pub(super) struct TargetStream<'a> {
    /// Its name.
    pub(super) name: &'a str,
    /// Its limits when the claim began; `None` before the first answer.
    pub(super) facts: Option<Arc<StreamFacts>>,
}

impl Messages<'_> {
    /// Makes a message of an event, or says why it can never be one.
    pub(super) fn make(&self, event: &Arc<Event>) -> Result<Outgoing, Failure> {
        self.try_to_make(event).map_err(|error| Failure::Hopeless { error })
    }

    /// Whether the server takes a message of this size. It closes the connection otherwise.
    pub(super) fn fits(&self, message: &Outgoing) -> bool {
        bytes(message) <= self.wire.session.max_payload()
    }

    fn try_to_make(&self, event: &Arc<Event>) -> Result<Outgoing, String> {
        if let Some(reason) = &event.unreadable {
            return Err(reason.clone());
        }
        let subject = self.subject(event)?.into_owned();
        let headers = self.live.headers.build(event);
        if headers.altered.count > 0 {
            self.metrics.headers_altered(1);
            log::warn!("metadata changed: event={} seq={} {}", event.id, event.seq, headers.altered);
        }
        let message = Outgoing { subject, headers: headers.block, event: event.clone() };
        self.check_size(&message)?;
        Ok(message)
    }

    /// The subject of an event, if it may be published to.
    fn subject<'e>(&'e self, event: &'e Event) -> Result<Cow<'e, str>, String> {
        let subject = self.live.topic_map.subject(&event.topic);
        if let Err(reason) = topic_map::is_literal_subject(&subject) {
            return Err(format!("subject {subject:?} cannot be published to: {reason}"));
        }
        // $JS, $SYS and the like command the server; an inbox is somebody's, perhaps our own.
        if subject.starts_with('$')
            || subject.starts_with("_INBOX.")
            || self.wire.publisher.is_inbox(&subject)
        {
            return Err(format!("subject {subject:?} is reserved for NATS itself: map the topic elsewhere"));
        }
        Ok(subject)
    }

    fn check_size(&self, message: &Outgoing) -> Result<(), String> {
        let (bytes, max_payload) = (bytes(message), self.wire.session.max_payload());
        if bytes > max_payload {
            return Err(format!("message of {bytes} B is over the server's max_payload of {max_payload} B"));
        }
        let Some(stream) = &self.stream else { return Ok(()) };
        let header_bytes = HEADERS_FRAME + message.headers.len();
        if header_bytes > HEADERS_MAX {
            return Err(format!(
                "metadata makes {header_bytes} B of headers, over JetStream's limit of {HEADERS_MAX} B"
            ));
        }
        let Some(facts) = &stream.facts else { return Ok(()) };
        for (limit, name) in [(facts.max_msg_size, "max_msg_size"), (facts.max_bytes, "max_bytes")] {
            if let Some(limit) = limit.filter(|&limit| bytes > limit) {
                let stream = stream.name;
                return Err(format!("message of {bytes} B is over stream {stream}'s {name} of {limit} B"));
            }
        }
        Ok(())
    }
}

/// What a message counts towards a limit: its headers with their frame, and its payload.
fn bytes(message: &Outgoing) -> usize {
    HEADERS_FRAME + message.headers.len() + message.event.payload.len()
}
