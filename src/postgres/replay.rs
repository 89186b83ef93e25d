//! Published events for whoever wants them sent again: found once, then read page by page.
//!
//! There is no index on what is published, as every settle would pay for it. So one pass over the partitions within the
//! time finds the events and sorts them by `seq`; PostgreSQL keeps that list in a cursor that outlives its transaction,
//! and from then on holds neither a snapshot, which would be in vacuum's way, nor a lock on any event. That takes a
//! session of its own, whose end also ends the turn: of all that replay one outbox, one does at a time (an advisory
//! lock). Events are read whole only when their page's turn comes. Nothing here changes a row.

use postgres::{Client, Row, SimpleQueryMessage};
use uuid::Uuid;

use super::query::{Query, typed};
use super::sessions::{self, Sessions};
use super::timestamptz::Timestamptz;
use super::{STATEMENT_TIMEOUT, Selection, Store, StoreError, Target, connect, read_all};
use crate::config::Secret;
use crate::event::Event;
use crate::event::Place;

/// Whose turn it is to replay. The first half is that of no other lock of ours.
const TAKE_TURN: &str =
    "SELECT pg_try_advisory_lock(1869968485, 'outboxes'::regclass::oid::int8::bit(32)::int4)";

/// A session that has found what to replay.
pub struct FoundPublished {
    client: Client,
    /// How many events were found.
    pub count: u64,
}

/// An event that was found.
#[derive(Debug, Clone)]
pub struct FoundEvent {
    id: Uuid,
    created_at: Timestamptz,
    /// Its place in the order.
    pub seq: i64,
    /// Its topic.
    pub topic: String,
    /// About how many bytes it takes.
    pub bytes: usize,
}

impl Store {
    /// Finds the published events of a selection (whose times are those of the writing) with a `seq` above `after`, over a
    /// session of its own: to `dsn` if given, around a transaction pooler, else to the store's own. `None` while
    /// somebody else replays this outbox.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses, or what is at the other end gives no sessions.
    pub fn find_published(
        &self,
        dsn: Option<&Secret>,
        selection: &Selection,
        after: Option<i64>,
    ) -> Result<Option<FoundPublished>, StoreError> {
        let shared = &self.shared;
        let target = match dsn {
            Some(dsn) => Target::new(dsn, &shared.parts, &shared.instance_id, shared.connect_timeout)?,
            None => shared.target.clone(),
        };
        let (mut client, mut other) = (connect(&target)?, connect(&target)?);
        if sessions::probe(&mut client, &mut other).map_err(lost)? == Sessions::Shared {
            return Err(StoreError::refused(
                "a replay needs a session of its own, which a transaction pooler does not give: set database.listen_dsn to \
                 PostgreSQL itself"
                    .into(),
            ));
        }
        drop(other);
        shared.home.of_session(&mut client).map_err(lost)?;
        client.batch_execute("SET statement_timeout = 0; SET idle_session_timeout = 0").map_err(lost)?;
        if !client.query_typed_one(TAKE_TURN, &[]).map_err(lost)?.get::<_, bool>(0) {
            return Ok(None);
        }
        let Selection { ids, topic, key, since_ms, until_ms, error: _, limit } = selection;
        client.batch_execute("BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY").map_err(lost)?;
        client
            .query_typed(
                REPLAY_FIND.text,
                &typed(&REPLAY_FIND, &[ids, topic, key, since_ms, until_ms, &after, limit]),
            )
            .map_err(lost)?;
        client.batch_execute("COMMIT").map_err(lost)?;
        let moved = client.simple_query("MOVE FORWARD ALL IN replay").map_err(lost)?;
        client.batch_execute("MOVE ABSOLUTE 0 IN replay").map_err(lost)?;
        let count = moved.iter().find_map(|message| match message {
            SimpleQueryMessage::CommandComplete(count) => Some(*count),
            _ => None,
        });
        Ok(Some(FoundPublished { client, count: count.unwrap_or(0) }))
    }

    /// Reads events that were found. Those that were deleted since are missing.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn read_published(&self, found: &[FoundEvent]) -> Result<Vec<Event>, StoreError> {
        let ids: Vec<Uuid> = found.iter().map(|event| event.id).collect();
        let created_at: Vec<Timestamptz> = found.iter().map(|event| event.created_at).collect();
        read_all(&self.read(STATEMENT_TIMEOUT, &REPLAY_READ, &[&ids, &created_at])?, read_event)
    }
}

#[cfg(test)]
impl FoundEvent {
    /// One of so many bytes, for the tests of whoever cuts pages.
    pub fn of_size(bytes: usize) -> FoundEvent {
        FoundEvent { id: Uuid::nil(), created_at: Timestamptz(0), seq: 0, topic: String::new(), bytes }
    }
}

impl FoundPublished {
    /// The next events, `most` at most; none at the end.
    ///
    /// # Errors
    /// The session was lost, and what was found with it.
    pub fn next(&mut self, most: usize) -> Result<Vec<FoundEvent>, StoreError> {
        let rows =
            self.client.query_typed(&format!("FETCH FORWARD {most} FROM replay"), &[]).map_err(lost)?;
        read_all(&rows, |row| {
            Ok(FoundEvent {
                id: row.try_get(0)?,
                created_at: row.try_get(1)?,
                seq: row.try_get(2)?,
                topic: row.try_get(3)?,
                bytes: usize::try_from(row.try_get::<_, i64>(4)?).unwrap_or(0),
            })
        })
    }
}

fn read_event(row: &Row) -> Result<Event, postgres::Error> {
    Ok(Event {
        id: row.try_get(0)?,
        seq: row.try_get(1)?,
        created_at: row.try_get::<_, Timestamptz>(2)?.0,
        topic: row.try_get(3)?,
        key_hash: row.try_get(4)?,
        place: Place::default(),
        lane: row.try_get(5)?,
        // The attempt that published it is the one that its header shows again.
        attempts: u32::try_from(row.try_get::<_, i32>(6)?).unwrap_or(0).saturating_sub(1),
        in_retry: false,
        metadata: row.try_get(7)?,
        payload: row.try_get(8)?,
        unreadable: None,
    })
}

#[allow(clippy::needless_pass_by_value, reason = "the shape that map_err wants")]
fn lost(error: postgres::Error) -> StoreError {
    StoreError::from(&error)
}

const REPLAY_FIND: Query = query!("replay_find", UUID_ARRAY, TEXT, TEXT, INT8, INT8, INT8, INT8);
const REPLAY_READ: Query = query!("replay_read", UUID_ARRAY, TIMESTAMPTZ_ARRAY);
