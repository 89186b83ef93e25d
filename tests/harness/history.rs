//! The judge: what was committed against what arrived.

use std::collections::{HashMap, HashSet};

use super::Stored;

/// Faults of one kind that a verdict shows; it counts all of them.
const SHOWN: usize = 5;

/// An event whose transaction committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// `outboxes.id`.
    pub id: String,
    /// `outboxes.seq`.
    pub seq: i64,
    /// Ordering key.
    pub key: String,
    /// Its number within the key, from 1, without gaps, in the order of `seq`.
    pub n: u64,
}

/// What a workload did.
#[derive(Debug, Default)]
pub struct History {
    /// Events that must arrive.
    pub committed: Vec<Committed>,
    /// How many events were inserted and rolled back: these must not.
    pub rolled_back: usize,
}

/// What is wrong. Each entry is one line for a person to read.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Committed, and did not arrive.
    pub lost: Vec<String>,
    /// Arrived again.
    pub duplicated: Vec<String>,
    /// Arrived for the first time after a later event of its key.
    pub reordered: Vec<String>,
    /// Arrived, and was not committed, or not with this content.
    pub phantom: Vec<String>,
}

impl Verdict {
    /// True if nothing is wrong.
    pub fn is_clean(&self) -> bool {
        *self == Verdict::default()
    }

    /// Fails the test unless nothing is wrong.
    #[track_caller]
    pub fn assert_clean(&self) {
        assert!(self.is_clean(), "{}", self.describe());
    }

    fn describe(&self) -> String {
        let kinds = [
            ("lost", &self.lost),
            ("duplicated", &self.duplicated),
            ("reordered", &self.reordered),
            ("phantom", &self.phantom),
        ];
        let lines = kinds.iter().map(|(kind, faults)| {
            let shown: Vec<&str> = faults.iter().take(SHOWN).map(String::as_str).collect();
            format!("{kind}: {} {}", faults.len(), shown.join("; "))
        });
        lines.collect::<Vec<_>>().join("\n")
    }
}

/// Judges what arrived, in the order in which it did.
///
/// An event is known by its message id, its place by the key and number in its payload, so that neither the
/// sequence numbers of the database nor those of the stream are taken on trust.
pub fn check_history(committed: &[Committed], stored: &[Stored]) -> Verdict {
    let mut verdict = Verdict::default();
    let expected: HashMap<&str, &Committed> =
        committed.iter().map(|event| (event.id.as_str(), event)).collect();
    let mut seen: HashSet<&str> = HashSet::new();
    let mut last_of_key: HashMap<&str, u64> = HashMap::new();
    for message in stored {
        let place = format!("stream seq {} id {}", message.seq, message.msg_id);
        let Some(event) = expected.get(message.msg_id.as_str()) else {
            verdict.phantom.push(format!("{place}: never committed"));
            continue;
        };
        let payload: serde_json::Value = serde_json::from_slice(&message.payload).unwrap_or_default();
        if payload["key"] != event.key.as_str() || payload["n"] != event.n {
            verdict.phantom.push(format!("{place}: {payload}, committed was {event:?}"));
            continue;
        }
        if !seen.insert(&event.id) {
            verdict.duplicated.push(format!("{place}: {} number {} again", event.key, event.n));
            continue;
        }
        let last = last_of_key.entry(&event.key).or_insert(0);
        if event.n < *last {
            verdict.reordered.push(format!("{place}: {} number {} after {last}", event.key, event.n));
        }
        *last = event.n.max(*last);
    }
    let lost = committed.iter().filter(|event| !seen.contains(event.id.as_str()));
    verdict.lost = lost.map(|event| format!("{event:?}")).collect();
    verdict
}
