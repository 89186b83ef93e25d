//! One event: a row of `outboxes` as a claim reads it, what became of it, and every decision about one event alone.
//!
//! Plain data that travels between the threads, and pure functions of it: which event of a claim may go next, topic to
//! subject, metadata to headers, what becomes of a failed one. The payload is read once from the row and written once to
//! the socket; nothing in between looks into it. No thread of its own, nothing that blocks, no clock; it names no other
//! folder of the program, and no database, server or configuration.

pub mod header_rules;
pub mod headers;
pub mod order;
pub mod retry;
pub mod topic_map;

use uuid::Uuid;

/// One pending row of `outboxes`, read under the lock of its lane.
#[derive(Debug)]
pub struct Event {
    /// Where the row was read.
    pub place: Place,
    /// `outboxes.id`; goes out as `Nats-Msg-Id`.
    pub id: Uuid,
    /// `outboxes.seq`: the order of events within a key.
    pub seq: i64,
    /// `outboxes.created_at` in microseconds since 2000-01-01 UTC, PostgreSQL's own representation:
    /// exact, and total over everything a row can hold (`-infinity` and `infinity` are the extremes of i64).
    pub created_at: i64,
    /// `outboxes.topic`: what the row says; the topic map makes a subject of it.
    pub topic: String,
    /// A hash of the ordering key, which is `metadata->>'ordering-key'`, else the topic (or what `migrate --order` chose).
    /// Two keys of one hash wait for each other, which costs nothing but a moment.
    pub key_hash: i64,
    /// The lane of the key, 0 to 63.
    pub lane: i32,
    /// `outboxes.metadata` as JSON text; `None` for SQL NULL.
    pub metadata: Option<String>,
    /// `outboxes.payload` as JSON text, byte for byte as PostgreSQL prints it.
    pub payload: String,
    /// Attempts that NATS judged so far.
    pub attempts: u32,
    /// True for an event in retry: `next_attempt_at` is set.
    pub in_retry: bool,
    /// Why this event can be no message, if that was found when it was read. Payload and metadata may then be missing.
    pub unreadable: Option<String>,
}

impl Event {
    /// The same event without payload and metadata, for where they have no room.
    pub fn without_content(&self) -> Event {
        let Event { place, id, seq, created_at, key_hash, lane, attempts, in_retry, .. } = *self;
        let (topic, unreadable) = (self.topic.clone(), self.unreadable.clone());
        let (metadata, payload) = (None, String::new());
        Event {
            place,
            id,
            seq,
            created_at,
            topic,
            key_hash,
            lane,
            metadata,
            payload,
            attempts,
            in_retry,
            unreadable,
        }
    }

    /// What settling needs of it.
    pub fn row(&self) -> EventRow {
        let Event { place, id, seq, created_at, lane, in_retry, .. } = *self;
        EventRow { place, id, seq, created_at, lane, in_retry }
    }

    /// Bytes this event holds in memory, for the limit on what claims may hold together.
    pub fn size(&self) -> usize {
        size_of::<Event>()
            + self.topic.len()
            + self.metadata.as_ref().map_or(0, String::len)
            + self.payload.len()
    }
}

/// The row of an event, without what it says.
#[derive(Debug, Clone, Copy)]
pub struct EventRow {
    /// Where it was read.
    pub place: Place,
    /// `outboxes.id`.
    pub id: Uuid,
    /// `outboxes.seq`.
    pub seq: i64,
    /// `outboxes.created_at`, as in [`Event`].
    pub created_at: i64,
    /// The lane of its key.
    pub lane: i32,
    /// It was in retry.
    pub in_retry: bool,
}

/// Where a version of a row is in its table, PostgreSQL's `ctid`. An update gives the row another place.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Place {
    /// The block.
    pub block: u32,
    /// The row within it, from 1 on.
    pub offset: u16,
}

/// What publishing made of one event of a claim; settling writes it to the row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Stored in the stream (or, over core NATS, received by the server).
    Published,
    /// NATS, or we for it, judged the event; it is tried again after `delay_ms` milliseconds.
    Retry {
        /// Attempts including this one.
        attempts: u32,
        /// Milliseconds until the next attempt, counted by the database's clock from the settle.
        delay_ms: i64,
        /// Why, in words that say what to do; becomes `last_error`.
        error: String,
    },
    /// The event will not be tried again: a dead letter.
    Dead {
        /// Attempts including this one.
        attempts: u32,
        /// Why, in words that say what to do; becomes `last_error`.
        error: String,
    },
    /// Not attempted, or not judged: the row stays as it is.
    Untouched,
}
