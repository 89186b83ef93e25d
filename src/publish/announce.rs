//! Announces dead letters on a subject (`nats.dead_letter_subject`), before they are written down as dead.
//!
//! A message for each: the event's payload and headers, with the reason and the subject that it was for, but without
//! what would decide where it is stored. It goes as a core message, so that whoever listens hears it, and any stream
//! that takes the subject stores it; a fence behind it shows that the server has processed it. Only then is the event
//! settled: a crash in between, or a settle that fails, announces it once more, and none is missed. When NATS is lost
//! meanwhile, the event stays as it was before this claim. A server that refuses the subject holds up nothing: that is
//! logged, and the event dies unannounced.
//!
//! What no message can carry (it may be why the event died) is left out: the payload and the metadata of one that is
//! over the server's limits. Runs on a worker's thread, between publishing and settling, and waits with a deadline.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::boottime::Boottime;
use crate::config::live::Settings;
use crate::event::headers::Death;
use crate::event::{Event, Outcome};
use crate::nats::{NoFence, NotSent, Outgoing, Session};

/// Longest wait for the server: what a claim may take beyond its own waits, before the database gives it up.
const PATIENCE: Duration = Duration::from_secs(5);
/// Headers beyond this are over JetStream's limit, or near it.
const HEADERS_MAX: usize = 60_000;
/// What a message has beside its header lines and its payload, generously.
const FRAME: usize = 64;

/// Announces every dead letter among `events`. The outcomes are changed where NATS was lost before the server had
/// processed all of it: those events stay untouched. Waits for the server some seconds at most.
///
/// # Errors
/// NATS was lost, and why.
pub(super) fn announce(
    live: &Settings,
    session: &Session,
    events: &[Arc<Event>],
    outcomes: &mut [Outcome],
) -> Result<(), String> {
    let Some(subject) = &live.dead_letter_subject else { return Ok(()) };
    let messages: Vec<Outgoing> = events
        .iter()
        .zip(&*outcomes)
        .filter_map(|(event, outcome)| match outcome {
            Outcome::Dead { attempts, error } => {
                Some(message(live, subject, event, *attempts, error, session.max_payload()))
            }
            Outcome::Published | Outcome::Retry { .. } | Outcome::Untouched => None,
        })
        .collect();
    if messages.is_empty() {
        return Ok(());
    }
    let announced = send(session, messages, subject);
    if let Err(cause) = &announced {
        log::warn!("dead letters not announced, they stay pending until they are: {cause}");
        outcomes
            .iter_mut()
            .filter(|outcome| matches!(outcome, Outcome::Dead { .. }))
            .for_each(|outcome| *outcome = Outcome::Untouched);
    }
    announced
}

fn message(
    live: &Settings,
    subject: &str,
    event: &Arc<Event>,
    attempts: u32,
    reason: &str,
    max_payload: usize,
) -> Outgoing {
    let announced_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    let was_for = live.topic_map.subject(&event.topic);
    let death = Death { attempts, reason, subject: &was_for, announced_ms };
    let subject = subject.to_owned();
    let headers = live.headers.announce(event, &death).block;
    if headers.len() <= HEADERS_MAX && FRAME + headers.len() + event.payload.len() <= max_payload {
        return Outgoing { subject, headers, event: event.clone() };
    }
    let bare = event.without_content();
    Outgoing { subject, headers: live.headers.announce(&bare, &death).block, event: Arc::new(bare) }
}

/// Sends them all, and a fence behind them.
fn send(session: &Session, messages: Vec<Outgoing>, subject: &str) -> Result<(), String> {
    let deadline = Instant::now() + PATIENCE;
    let not_after = Boottime::now().plus(PATIENCE);
    for message in messages {
        session.publish_part(message, not_after, deadline).map_err(NotSent::cause)?;
    }
    let denied = session.fence(deadline).map_err(|no_fence| match no_fence {
        NoFence::Silence => format!("no fence within {}s", PATIENCE.as_secs()),
        NoFence::Lost(cause) => cause,
    })?;
    if denied.iter().any(|denied| denied == subject) {
        log::error!(
            "dead letters not announced: permission denied to publish to {subject}: allow it for this NATS user, or \
             change nats.dead_letter_subject"
        );
    }
    Ok(())
}
