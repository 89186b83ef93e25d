//! What of a stream does not fit what we promise, each with what to do about it.
//!
//! A stream that can take no event at all (missing, sealed, a mirror) is an outage, see `answer.rs`. Here it is about
//! streams that take events and break a promise later: they forget an event id before we would send it again, drop
//! old messages to make room, or acknowledge what is not safe yet. `pg-outbox check` prints the findings; the keeper
//! logs each once, when it is first found, at a start or after a reconnect. What is left out on purpose: `max_age`,
//! `republish` and subject transforms, which somebody chose and which take nothing back that was promised.
//!
//! Pure: facts in, findings out.

use std::time::Duration;

use crate::event::topic_map::{self, TopicMap};
use crate::nats::answer::{Keeping, StreamFacts};

/// What the configuration asks of the stream.
#[derive(Debug, Clone, Copy)]
pub struct Needs<'a> {
    /// The stream's name, for messages.
    pub stream: &'a str,
    /// Where topics go.
    pub topic_map: &'a TopicMap,
    /// After this an event that the stream has stored is sent again at the latest, as long as neither server is away:
    /// [`crate::config::Config::sent_again_within`].
    pub sent_again_within: Duration,
    /// The server's own limit on a message, in bytes.
    pub max_payload: usize,
}

/// Something that does not fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// Events that there may be cannot be published.
    Problem(String),
    /// Everything is published, but a promise is weaker than it could be.
    Warning(String),
}

/// Everything that does not fit: first the subjects, then the stream.
pub fn findings(facts: &StreamFacts, needs: Needs<'_>) -> Vec<Finding> {
    let outside = needs.topic_map.targets().filter_map(|target| outside(target, facts, needs.stream));
    let kept = [
        forgets_ids(&facts.keeping, needs.sent_again_within),
        drops_old(&facts.keeping),
        wants_consumers(&facts.keeping),
        refuses_by_subject(&facts.keeping),
        refuses_large(facts.max_msg_size, needs.max_payload),
        acknowledges_early(&facts.keeping),
    ];
    let warning = |text: String| Finding::Warning(format!("stream {}: {text}", needs.stream));
    outside.map(Finding::Problem).chain(kept.into_iter().flatten().map(warning)).collect()
}

/// A subject of the topic map that the stream does not take.
pub fn outside(target: &str, facts: &StreamFacts, stream: &str) -> Option<String> {
    let takes = facts.subjects.iter().any(|subject| topic_map::contains(subject, target));
    (!takes).then(|| {
        format!(
            "{target} is not in stream {stream}: add it to the stream's subjects or map the topic elsewhere"
        )
    })
}

fn forgets_ids(keeping: &Keeping, sent_again_within: Duration) -> Option<String> {
    let window = Duration::from_nanos(keeping.duplicate_window_ns);
    let shown = |duration: Duration| humantime::format_duration(duration).to_string();
    (window < sent_again_within).then(|| {
        format!(
            "duplicate_window is {}, but what an instance leaves open when it dies is sent again up to {} later, \
             and then stored twice: make it longer than that and than the outages that you expect",
            shown(window),
            shown(sent_again_within)
        )
    })
}

fn drops_old(keeping: &Keeping) -> Option<String> {
    let limits = [
        ("max_msgs", keeping.max_msgs),
        ("max_bytes", keeping.max_bytes),
        ("max_msgs_per_subject", keeping.max_msgs_per_subject),
    ];
    let set: Vec<String> = limits
        .iter()
        .filter(|(_, limit)| *limit > 0)
        .map(|(name, limit)| format!("{name} {limit}"))
        .collect();
    (keeping.discard == "old" && !set.is_empty()).then(|| {
        format!(
            "at {} it drops its oldest events without a word, read or not: discard new makes pg-outbox wait for \
             room instead",
            set.join(", ")
        )
    })
}

fn wants_consumers(keeping: &Keeping) -> Option<String> {
    (keeping.retention == "interest").then(|| {
        "retention is interest: an event is acknowledged and dropped while there is no consumer for it; limits \
         keeps it"
            .into()
    })
}

fn refuses_by_subject(keeping: &Keeping) -> Option<String> {
    let limit = keeping.max_msgs_per_subject;
    (keeping.discard == "new" && keeping.discard_new_per_subject && limit > 0).then(|| {
        format!(
            "a subject that holds {limit} messages (max_msgs_per_subject) refuses the next one, which becomes a \
             dead letter: unset discard_new_per_subject or the limit"
        )
    })
}

fn refuses_large(max_msg_size: Option<usize>, max_payload: usize) -> Option<String> {
    max_msg_size.filter(|size| *size < max_payload).map(|size| {
        format!(
            "max_msg_size is {size} B: a larger event is a dead letter at once; the server itself would take \
             {max_payload} B"
        )
    })
}

fn acknowledges_early(keeping: &Keeping) -> Option<String> {
    if keeping.storage == "memory" {
        return Some(match keeping.replicas {
            0 | 1 => {
                "it keeps acknowledged events in the memory of one server, gone when that restarts: use \
                      storage file"
                    .into()
            }
            replicas => format!(
                "it keeps acknowledged events in memory, gone when all {replicas} servers restart: use storage file"
            ),
        });
    }
    if keeping.persist_mode == "async" {
        return Some(
            "it acknowledges events before it writes them (persist_mode async): a crash of the server loses \
             acknowledged ones"
                .into(),
        );
    }
    (keeping.replicas < 2).then(|| {
        "one replica: an acknowledged event is on one server, and on its disk only after its sync_interval (2m \
         unless set); a power cut or a lost disk takes it. Three replicas, or sync_interval: always, keep it"
            .into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX_PAYLOAD: usize = 1_048_576;

    /// A stream with which all is well.
    fn fine() -> StreamFacts {
        StreamFacts {
            subjects: vec!["app.>".into()],
            keeping: Keeping { replicas: 3, duplicate_window_ns: 120_000_000_000, ..Keeping::default() },
            ..StreamFacts::default()
        }
    }

    fn find(facts: &StreamFacts, targets: &[(&str, &str)]) -> Vec<Finding> {
        let entries = targets.iter().map(|(topic, target)| ((*topic).to_owned(), (*target).to_owned()));
        let topic_map = TopicMap::new(entries).unwrap();
        let needs = Needs {
            stream: "EVENTS",
            topic_map: &topic_map,
            sent_again_within: Duration::from_secs(70),
            max_payload: MAX_PAYLOAD,
        };
        findings(facts, needs)
    }

    #[test]
    fn what_does_not_fit_is_said_and_nothing_else() {
        type Change = fn(&mut StreamFacts);
        let cases: [(Change, Option<&str>); 18] = [
            (|_| {}, None),
            (|facts| facts.keeping.duplicate_window_ns = 70_000_000_000, None),
            (|facts| facts.keeping.duplicate_window_ns = 69_999_999_999, Some("up to 1m 10s later")),
            (|facts| facts.keeping.duplicate_window_ns = 0, Some("duplicate_window is 0s")),
            (|facts| facts.keeping.max_msgs = 10, Some("at max_msgs 10 it drops")),
            (|facts| facts.keeping.max_bytes = 10, Some("at max_bytes 10 it drops")),
            (|facts| facts.keeping.max_msgs_per_subject = 1, Some("at max_msgs_per_subject 1 it drops")),
            (|facts| (facts.keeping.max_msgs, facts.keeping.discard) = (10, "new".into()), None),
            (|facts| facts.keeping.max_msgs = 0, None),
            (|facts| facts.keeping.retention = "interest".into(), Some("no consumer for it")),
            (|facts| facts.keeping.retention = "workqueue".into(), None),
            (
                |facts| {
                    facts.keeping.max_msgs_per_subject = 5;
                    facts.keeping.discard = "new".into();
                    facts.keeping.discard_new_per_subject = true;
                },
                Some("a subject that holds 5 messages"),
            ),
            (|facts| facts.max_msg_size = Some(MAX_PAYLOAD), None),
            (|facts| facts.max_msg_size = Some(2_000), Some("max_msg_size is 2000 B")),
            (|facts| facts.keeping.replicas = 1, Some("one replica")),
            (|facts| facts.keeping.persist_mode = "async".into(), Some("persist_mode async")),
            (|facts| facts.keeping.storage = "memory".into(), Some("all 3 servers")),
            (
                |facts| (facts.keeping.storage, facts.keeping.replicas) = ("memory".into(), 1),
                Some("memory of one server"),
            ),
        ];
        for (number, (change, expected)) in cases.into_iter().enumerate() {
            let mut facts = fine();
            change(&mut facts);
            let found = find(&facts, &[]);
            match (found.as_slice(), expected) {
                ([], None) => {}
                ([Finding::Warning(text)], Some(part)) if text.contains(part) => {
                    assert!(text.starts_with("stream EVENTS: "), "{text}");
                }
                _ => panic!("case {number}: {expected:?} was expected, found {found:?}"),
            }
        }
    }

    #[test]
    fn a_subject_outside_the_stream_is_a_problem() {
        let found = find(&fine(), &[("a.*", "app.a.*"), ("b", "other.b"), ("c.>", "app.>")]);
        assert_eq!(found.len(), 1);
        assert!(
            matches!(&found[0], Finding::Problem(text) if text.starts_with("other.b is not in stream EVENTS"))
        );
    }
}
