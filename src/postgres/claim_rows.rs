//! What a claim's reads return, row by row, and how many bytes of it a claim may still take in.
//!
//! A worker takes rows in as they come, so that only one at a time stands beside what it holds. The server has cut by the stored
//! size; here it is cut by the text's.

use std::cell::Cell;

use postgres::Row;

use super::claim_settings::{ClaimLimits, ClaimSettings};
use super::timestamptz::Timestamptz;
use crate::event::Event;

/// One row of what is read.
pub(super) struct ReadRow {
    pub(super) lane: i32,
    pub(super) found: Found,
    /// Bytes stored, where it is known.
    pub(super) stored: i64,
    /// It came without its texts, as these are more than its share.
    pub(super) over_share: bool,
    /// Where it is a [`Found::Cut`]: the event is larger than what a claim may hold, whatever else it holds.
    pub(super) alone_too_large: bool,
}

/// What a row says of its lane.
pub(super) enum Found {
    /// There is nothing above the beginning.
    Nothing,
    /// An event.
    Event(Box<Event>),
    /// The read has walked over as many entries as it may, up to this `seq`.
    EndOfWalk(i64),
    /// The event of this `seq` does not fit any more.
    Cut(i64),
}

/// The bytes that a read may still take in: what the server cut by the stored size is cut here by the text's.
pub(super) struct Budget {
    bytes: usize,
    taken: Cell<usize>,
    is_used_up: Cell<bool>,
    event_bytes: Option<usize>,
}

impl Budget {
    pub(super) fn new(settings: &ClaimSettings, limits: ClaimLimits) -> Budget {
        Budget {
            bytes: usize::try_from(settings.max_claim_bytes).unwrap_or(0),
            taken: Cell::new(0),
            is_used_up: Cell::new(false),
            event_bytes: limits.event_bytes,
        }
    }

    /// Takes in a row of what is read; a larger event than can be a message has been left where it is.
    pub(super) fn take_in(&self, row: &Row, in_retry: bool) -> Result<ReadRow, postgres::Error> {
        let lane = row.try_get(0)?;
        let seq: Option<i64> = row.try_get(3)?;
        let row_of =
            |found, alone_too_large| ReadRow { lane, found, stored: 0, over_share: false, alone_too_large };
        let cut = |seq, alone_too_large| Ok(row_of(Found::Cut(seq), alone_too_large));
        let Some(seq) = seq else {
            return Ok(row_of(Found::Nothing, false));
        };
        if !row.try_get::<_, bool>(8)? {
            return Ok(row_of(Found::EndOfWalk(seq), false));
        }
        if self.is_used_up.get() {
            return cut(seq, false);
        }
        let payload: Option<String> = row.try_get(10)?;
        let oversize: Option<i64> = row.try_get(11)?;
        if payload.is_none() && oversize.is_none() && self.event_bytes.is_some() {
            return cut(seq, true);
        }
        let metadata: Option<String> = row.try_get(9)?;
        let bytes = payload.as_ref().map_or(0, String::len) + metadata.as_ref().map_or(0, String::len);
        if self.taken.get() > 0 && self.taken.get() + bytes > self.bytes {
            self.is_used_up.set(true);
            return cut(seq, false);
        }
        self.taken.set(self.taken.get() + bytes);
        let unreadable = oversize.zip(self.event_bytes).map(|(bytes, max)| {
            format!("payload and metadata of {bytes} B are over the server's max_payload of {max} B")
        });
        let event = Event {
            lane,
            place: row.try_get(1)?,
            id: row.try_get(2)?,
            seq,
            created_at: row.try_get::<_, Timestamptz>(4)?.0,
            topic: row.try_get(5)?,
            key_hash: row.try_get(6)?,
            attempts: u32::try_from(row.try_get::<_, i32>(7)?).unwrap_or(0),
            in_retry,
            metadata,
            payload: payload.unwrap_or_default(),
            unreadable,
        };
        Ok(row_of(Found::Event(Box::new(event)), false))
    }
}
