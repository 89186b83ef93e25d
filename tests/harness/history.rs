//! The judge: what was committed against what the stream stored and what the table says in the end.
//!
//! An event is known by its message id, its place by the key and number in its payload, so that neither the sequence
//! numbers of the database nor those of the stream are taken on trust. What the design admits is no fault: that a
//! stream stores an event again later than its duplicate window, or after it has lost what it had stored; and that
//! an event comes to the stream again within the window, which drops it (only the metrics know of that).

use std::collections::{HashMap, HashSet};
use std::time::Duration;

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
    /// Its transaction's number, `pg_current_xact_id()`.
    pub transaction: i64,
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
    /// Ids of events that were inserted and rolled back, or whose transaction failed: these must not.
    pub rolled_back: Vec<String>,
}

/// What the database says once everything should be settled.
#[derive(Debug, Clone, Default)]
pub struct Table {
    /// Rows by id.
    pub rows: HashMap<String, Row>,
    /// Lanes that stay locked and claims that stay open, each in words.
    pub left_claimed: Vec<String>,
}

/// A row of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    pub state: RowState,
    pub attempts: i32,
    pub last_error: Option<String>,
}

/// What became of an event, by its row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowState {
    Pending,
    Published,
    Dead,
}

/// Everything there is to judge by.
#[derive(Debug, Clone, Copy)]
pub struct Evident<'a> {
    /// What the stream stored, one part for each of its lives: one that was emptied or made anew begins another.
    pub lives: &'a [Vec<Stored>],
    /// The stream's duplicate window.
    pub window: Duration,
    /// The table.
    pub table: &'a Table,
    /// What part of `last_error` shows that NATS had cause to refuse an event; `None` if it never had.
    pub cause: Option<&'a str>,
    /// Acks with `duplicate: true` that the instances counted.
    pub redelivered: u64,
}

/// What is wrong, each entry a line for a person to read; and how often something came twice that may.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Committed, did not arrive, and is no dead letter that has a cause.
    pub lost: Vec<String>,
    /// Stored again by the same stream within its duplicate window.
    pub duplicated: Vec<String>,
    /// Arrived for the first time after a later event of its key.
    pub reordered: Vec<String>,
    /// Arrived, though its transaction was rolled back.
    pub rolled_back: Vec<String>,
    /// Arrived, and was never inserted, or not with this content.
    pub phantom: Vec<String>,
    /// Neither published nor dead, by its row.
    pub unsettled: Vec<String>,
    /// A dead letter that NATS had no cause to refuse.
    pub dead_without_cause: Vec<String>,
    /// Charged more attempts than one, though NATS had no cause to refuse it.
    pub charged: Vec<String>,
    /// A lane still locked, a claim still open.
    pub left_claimed: Vec<String>,
    /// Stored again later than the duplicate window or by a stream that was emptied, which the design admits.
    pub admitted_duplicates: usize,
    /// Sent again, and dropped by the stream.
    pub redelivered: u64,
}

impl Verdict {
    /// True if nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.kinds().iter().all(|(_, faults)| faults.is_empty())
    }

    /// Fails the test unless nothing is wrong.
    #[track_caller]
    pub fn assert_clean(&self) {
        assert!(self.is_clean(), "{}", self.describe());
    }

    /// How many faults there are of each kind that has any.
    pub fn counts(&self) -> Vec<(&'static str, usize)> {
        let all = self.kinds().map(|(kind, faults)| (kind, faults.len()));
        all.into_iter().filter(|(_, count)| *count > 0).collect()
    }

    /// Each kind of fault that there is, with the first few.
    pub fn describe(&self) -> String {
        let kinds = self.kinds();
        let lines = kinds.iter().filter(|(_, faults)| !faults.is_empty()).map(|(kind, faults)| {
            let shown: Vec<&str> = faults.iter().take(SHOWN).map(String::as_str).collect();
            format!("{kind}: {} {}", faults.len(), shown.join("; "))
        });
        lines.collect::<Vec<_>>().join("\n")
    }

    fn kinds(&self) -> [(&'static str, &Vec<String>); 9] {
        [
            ("lost", &self.lost),
            ("duplicated", &self.duplicated),
            ("reordered", &self.reordered),
            ("rolled back", &self.rolled_back),
            ("phantom", &self.phantom),
            ("unsettled", &self.unsettled),
            ("dead without cause", &self.dead_without_cause),
            ("charged", &self.charged),
            ("left claimed", &self.left_claimed),
        ]
    }
}

/// Judges what arrived alone, in the order in which it did, where nothing may arrive twice.
pub fn check_history(committed: &[Committed], stored: &[Stored]) -> Verdict {
    let history = History { committed: committed.to_vec(), rolled_back: Vec::new() };
    let mut verdict = Verdict::default();
    let seen = check_arrivals(&history, &[stored], Duration::MAX, &mut verdict);
    let lost = committed.iter().filter(|event| !seen.contains(event.id.as_str()));
    verdict.lost = lost.map(|event| format!("{event:?}")).collect();
    verdict
}

/// Judges all of it.
pub fn check_all(history: &History, evident: Evident<'_>) -> Verdict {
    let Evident { lives, window, table, cause, redelivered } = evident;
    let mut verdict = Verdict { redelivered, left_claimed: table.left_claimed.clone(), ..Verdict::default() };
    let lives: Vec<&[Stored]> = lives.iter().map(Vec::as_slice).collect();
    let seen = check_arrivals(history, &lives, window, &mut verdict);
    for event in &history.committed {
        let arrived = seen.contains(event.id.as_str());
        let Some(row) = table.rows.get(&event.id) else {
            verdict.lost.push(format!("{event:?}: its row is gone"));
            continue;
        };
        let error = row.last_error.as_deref().unwrap_or_default();
        let has_cause = cause.is_some_and(|cause| row.state == RowState::Dead && error.contains(cause));
        if !arrived && !has_cause {
            verdict.lost.push(format!("{event:?}: {row:?}"));
        }
        match row.state {
            RowState::Pending => verdict.unsettled.push(format!("{event:?}: {row:?}")),
            RowState::Dead if !has_cause => verdict.dead_without_cause.push(format!("{event:?}: {row:?}")),
            RowState::Published | RowState::Dead => {}
        }
        if cause.is_none() && row.attempts > 1 {
            verdict.charged.push(format!("{event:?}: {row:?}"));
        }
    }
    verdict
}

/// Judges arrivals against each other and against what was committed; returns the ids that came.
fn check_arrivals<'a>(
    history: &'a History,
    lives: &[&[Stored]],
    window: Duration,
    verdict: &mut Verdict,
) -> HashSet<&'a str> {
    let expected: HashMap<&str, &Committed> =
        history.committed.iter().map(|event| (event.id.as_str(), event)).collect();
    let rolled_back: HashSet<&str> = history.rolled_back.iter().map(String::as_str).collect();
    // When each event was stored last, and in which life of the stream.
    let mut last_stored: HashMap<&str, (usize, u64)> = HashMap::new();
    let mut last_of_key: HashMap<&str, u64> = HashMap::new();
    for (life, message) in
        lives.iter().enumerate().flat_map(|(life, stored)| stored.iter().map(move |message| (life, message)))
    {
        let place = format!("stream seq {} id {}", message.seq, message.msg_id);
        let Some(event) = expected.get(message.msg_id.as_str()) else {
            if rolled_back.contains(message.msg_id.as_str()) {
                verdict.rolled_back.push(place);
            } else {
                verdict.phantom.push(format!("{place}: never inserted"));
            }
            continue;
        };
        let payload: serde_json::Value = serde_json::from_slice(&message.payload).unwrap_or_default();
        if payload["key"] != event.key.as_str() || payload["n"] != event.n {
            verdict.phantom.push(format!("{place}: {payload}, committed was {event:?}"));
            continue;
        }
        if let Some((former_life, at_ns)) = last_stored.insert(&event.id, (life, message.at_ns)) {
            let apart = Duration::from_nanos(message.at_ns.saturating_sub(at_ns));
            if former_life == life && apart < window {
                let which = format!("{} number {} again after {apart:?}", event.key, event.n);
                verdict.duplicated.push(format!("{place}: {which}"));
            } else {
                verdict.admitted_duplicates += 1;
            }
            continue;
        }
        let last = last_of_key.entry(&event.key).or_insert(0);
        if event.n < *last {
            verdict.reordered.push(format!("{place}: {} number {} after {last}", event.key, event.n));
        }
        *last = event.n.max(*last);
    }
    last_stored.into_keys().collect()
}
