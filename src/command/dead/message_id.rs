//! The message ids under which dead letters are tried again, and whether the stream may have stored them already.
//!
//! A stream drops a message whose id it has stored within its deduplication window. A dead letter can be one that it has:
//! its ack was lost, or another row has its id. That is said before anything is done; a fresh id is the way around it.
//! Nothing here changes an event.

use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use uuid::Uuid;

use crate::command::connect;
use crate::config::Config;
use crate::postgres::Letter;
use crate::publish;

/// A new id for each id there is.
pub(super) fn fresh_ids(letters: &[Letter]) -> HashMap<Uuid, Uuid> {
    letters.iter().map(|letter| (letter.id, fresh_id())).collect()
}

/// A time-ordered id, as the schema makes them.
fn fresh_id() -> Uuid {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut random = [0; 10];
    fastrand::fill(&mut random);
    uuid::Builder::from_unix_timestamp_millis(u64::try_from(now.as_millis()).unwrap_or(0), &random)
        .into_uuid()
}

/// Why the stream may have an event already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DuplicateCause {
    /// Its last attempt got no ack, which says nothing of whether it was stored.
    Unacked,
    /// Another row with its id was published.
    Copy,
}

/// Whether the stream may have stored the event's message id, and how many seconds ago at least.
fn seen(letter: &Letter) -> Option<(DuplicateCause, f64)> {
    let copy = letter.copy_published.map(|ago| (DuplicateCause::Copy, ago));
    let unacked = letter.error.starts_with(publish::NO_ACK).then_some(letter.dead_for).flatten();
    copy.or(unacked.map(|ago| (DuplicateCause::Unacked, ago)))
}

/// Says how many of these the stream would take for duplicates.
pub(super) fn warn_of_duplicates(config: &Config, letters: &[Letter]) {
    let suspects: Vec<(DuplicateCause, f64)> = letters.iter().filter_map(seen).collect();
    if !config.nats.jetstream.enabled || suspects.is_empty() {
        return;
    }
    let stream = &config.nats.jetstream.stream_name;
    match duplicate_window(config) {
        Ok(window) => {
            if let Some(text) = warning(&suspects, window, stream) {
                eprintln!("{text}");
            }
        }
        Err(cause) => eprintln!(
            "note: {} of these may be in stream {stream} already, and its duplicate window is not known ({cause}): if it \
             still covers them, they count as published without being stored again; --new-id makes sure",
            suspects.len()
        ),
    }
}

/// What to say of the suspects that the window still covers; `None` if it covers none.
fn warning(suspects: &[(DuplicateCause, f64)], window: Duration, stream: &str) -> Option<String> {
    let covered: Vec<&(DuplicateCause, f64)> =
        suspects.iter().filter(|(_, ago)| *ago < window.as_secs_f64()).collect();
    let youngest = covered.iter().map(|(_, ago)| *ago).reduce(f64::min)?;
    let copies = covered.iter().filter(|(seen, _)| *seen == DuplicateCause::Copy).count();
    let left = Duration::from_secs((window.as_secs_f64() - youngest).ceil().max(1.0) as u64);
    Some(format!(
        "warning: stream {stream} may have {} of these by their message ids ({copies} share theirs with a published \
         event, {} got no ack), and would take them for duplicates for up to {}: they then count as published without \
         being stored again. Wait, or use --new-id",
        covered.len(),
        covered.len() - copies,
        humantime::format_duration(left)
    ))
}

/// The stream's duplicate window, or why it is not known.
fn duplicate_window(config: &Config) -> Result<Duration, String> {
    let instance = format!("{}-dead", config.dispatcher.instance_id);
    let (_, keeper) = connect::publisher(&config.nats, &instance);
    let survey = keeper.survey().map_err(|error| format!("{error:#}"))?;
    let facts = survey.stream.map_err(|fault| fault.to_string())?;
    Ok(Duration::from_nanos(facts.keeping.duplicate_window_ns))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_window_still_covers_is_warned_of() {
        let window = Duration::from_secs(120);
        assert_eq!(warning(&[], window, "S"), None);
        assert_eq!(
            warning(&[(DuplicateCause::Unacked, 120.0), (DuplicateCause::Copy, 500.0)], window, "S"),
            None
        );
        let text = warning(
            &[
                (DuplicateCause::Unacked, 20.0),
                (DuplicateCause::Copy, 90.5),
                (DuplicateCause::Unacked, 130.0),
            ],
            window,
            "S",
        )
        .unwrap();
        assert!(text.contains("may have 2 of these") && text.contains("(1 share"), "{text}");
        assert!(text.contains("for up to 1m 40s"), "{text}");
    }

    #[test]
    fn fresh_ids_are_new_and_in_the_order_of_time() {
        let (one, other) = (fresh_id(), fresh_id());
        assert_ne!(one, other);
        assert_eq!((one.get_version_num(), one.get_variant()), (7, uuid::Variant::RFC4122));
    }
}
