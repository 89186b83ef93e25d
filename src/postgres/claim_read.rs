//! The second statement of a claim: the events of the lanes that it has locked.
//!
//! A worker reads them ([`Locked::read`]), in the transaction that the claimer began, and what it gets is a [`Claim`]. A
//! limit can cut a read short, and a retry or a dead letter can hold a key back; for each lane the read says where it
//! ended and what it passed over. It never leaves a transaction open that has nothing to settle: a read without events
//! rolls it back. Dropping the lanes gives them back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use postgres::Row;
use postgres::types::ToSql;

use super::claim_lanes::LaneRead;
use super::claim_settings::ClaimLimits;
use super::claim_settle::Claim;
use super::query::Query;
use super::server_life::ServerLife;
use super::timestamptz::Timestamptz;
use super::transaction::Transaction;
use super::{StoreError, StoreInner, read_all, usize_of};
use crate::event::Event;
use crate::failpoint;
use crate::lane::marks;

/// The column of what is read that says whether something may hold events back.
const HELD: usize = 10;
pub(super) const READ_ANY: Query = query!(
    "read_any": ["held", "read_before", "read_any", "read_after"],
    INT4_ARRAY, INT4, BOOL, BOOL, INT8, INT8, INT8_ARRAY, INT8, BOOL
);
pub(super) const READ_FRESH: Query = query!(
    "read_fresh": ["held", "read_before", "read_fresh", "read_after", "read_held"],
    INT4_ARRAY, INT4, BOOL, BOOL, INT8, INT8, INT8_ARRAY, INT8, BOOL
);
const LEFT_OUT: Query = query!("left_out", INT4_ARRAY, INT8_ARRAY, INT8_ARRAY, INT8_ARRAY);

/// Lanes locked, in an open transaction; their events are still to be read. Dropping it gives them back.
pub struct Locked {
    pub(super) transaction: Transaction,
    pub(super) shared: Arc<StoreInner>,
    /// Which lanes.
    pub lanes: Vec<i32>,
    /// The server that they are locked on.
    pub server: ServerLife,
    /// Their cursors.
    pub(super) from: Vec<i64>,
    pub(super) limits: ClaimLimits,
}

impl Locked {
    /// Reads events of the lanes, about as many of each lane. A claim that found nothing holds no connection.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses; nothing stays locked.
    pub fn read(self, large: Large) -> Result<Claim, StoreError> {
        let Locked { transaction, shared, lanes, from, limits, .. } = self;
        let mut claim = Claim { transaction, lanes, reads: Vec::new(), events: Vec::new() };
        if claim.lanes.is_empty() {
            return Ok(claim);
        }
        let settings = &shared.settings;
        let backoff_max_ms = shared.backoff_max_ms.load(Ordering::Relaxed);
        let max_events = limits.events.max(1);
        let max_event_bytes = i64::try_from(limits.event_bytes).unwrap_or(i64::MAX);
        let params: &[&(dyn ToSql + Sync)] = &[
            &claim.lanes,
            &max_events,
            &settings.ordered,
            &(settings.ordered && settings.block_on_dead),
            &backoff_max_ms,
            &settings.max_claim_bytes,
            &from,
            &Some(max_event_bytes),
            &(large == Large::Alone),
        ];
        let read = read_events(&mut claim.transaction, &shared.held, params, limits.event_bytes)?;
        if read.is_empty() {
            claim.transaction.roll_back()?;
            return Ok(claim);
        }
        claim.reads = lane_reads(&read, &claim.lanes, usize_of(max_events));
        let held = read.iter().any(|row| row.held);
        claim.events = read.into_iter().filter_map(|row| row.event).collect();
        if held && !claim.events.is_empty() {
            find_left_out(&mut claim, &from)?;
        }
        // Within a lane the retries came first; a key's events go out in seq order.
        claim.events.sort_by_key(|event| (event.lane, event.seq));
        failpoint!("claim.read");
        Ok(claim)
    }

    /// Gives the lanes back.
    ///
    /// # Errors
    /// The connection was lost, which gives them back as well.
    pub fn release(mut self) -> Result<(), StoreError> {
        self.transaction.roll_back()
    }
}

/// Whether a read may begin with an event that alone is larger than what a claim may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Large {
    /// It may, and then is all that the read gives.
    Alone,
    /// It may not: then the claim is of no events, and [`Claim::too_large`] says where it is.
    Refused,
}

/// Finds the first fresh event that each lane's read has passed over.
fn find_left_out(claim: &mut Claim, from: &[i64]) -> Result<(), StoreError> {
    let read_to: Vec<i64> = claim.reads.iter().map(|read| read.read_to).collect();
    let seqs: Vec<i64> = claim.events.iter().map(|event| event.seq).collect();
    let rows = claim.transaction.query(&LEFT_OUT, &[&claim.lanes, &from, &read_to, &seqs])?;
    let left_out: Vec<Option<i64>> = read_all(&rows, |row| row.try_get(1))?;
    for (read, left_out) in claim.reads.iter_mut().zip(left_out) {
        read.left_out = left_out;
    }
    Ok(())
}

/// One row of what is read.
struct ReadRow {
    lane: i32,
    /// `None` in the row that says that bytes cut the lane, or the claim, short.
    event: Option<Event>,
    /// Events may have been passed over, as a retry or a dead letter holds their key.
    held: bool,
}

/// Reads events, by the statement that suits what the last claim `held` back: the short one, which reads nothing and says
/// so where something is in retry or holds its key, or the long one, which reads whatever there is. Within our locks it
/// makes no difference when it is asked: what holds a key of our lanes is changed by nobody else meanwhile.
fn read_events(
    transaction: &mut Transaction,
    held: &AtomicBool,
    params: &[&(dyn ToSql + Sync)],
    max_event_bytes: usize,
) -> Result<Vec<ReadRow>, StoreError> {
    if !held.load(Ordering::Relaxed) {
        // The row that says that nothing was read has no lane.
        let read = transaction.query_each(&READ_FRESH, params, |row| {
            let lane: Option<i32> = row.try_get(0)?;
            lane.map(|_| read_event(row, max_event_bytes)).transpose()
        })?;
        if let Some(read) = read.into_iter().collect() {
            return Ok(read);
        }
    }
    let read = transaction.query_each(&READ_ANY, params, |row| read_event(row, max_event_bytes))?;
    held.store(read.first().is_none_or(|row| row.held), Ordering::Relaxed);
    Ok(read)
}

/// Takes in a row of what is read; a larger event than that can be no message, and has been left where it is.
fn read_event(row: &Row, max_event_bytes: usize) -> Result<ReadRow, postgres::Error> {
    let lane = row.try_get(0)?;
    let held = row.try_get(HELD)?;
    let oversize: Option<i64> = row.try_get(11)?;
    let payload: Option<String> = row.try_get(9)?;
    if payload.is_none() && oversize.is_none() {
        return Ok(ReadRow { lane, event: None, held });
    }
    let unreadable = oversize.map(|bytes| {
        format!("payload and metadata of {bytes} B are over the server's max_payload of {max_event_bytes} B")
    });
    let event = Event {
        lane,
        id: row.try_get(1)?,
        seq: row.try_get(2)?,
        created_at: row.try_get::<_, Timestamptz>(3)?.0,
        topic: row.try_get(4)?,
        key: row.try_get(5)?,
        attempts: u32::try_from(row.try_get::<_, i32>(6)?).unwrap_or(0),
        in_retry: row.try_get(7)?,
        metadata: row.try_get(8)?,
        payload: payload.unwrap_or_default(),
        unreadable,
    };
    Ok(ReadRow { lane, event: Some(event), held })
}

/// How far each of `lanes` was read. A lane's read was cut short when it gave all that its share of `max_events`
/// lets it give (the shares are those of `read_fresh.sql`: the first lanes take what does not divide), or when
/// bytes cut it; when the last row says that bytes cut it, the lanes after its own may not have been read at all.
fn lane_reads(read: &[ReadRow], lanes: &[i32], max_events: usize) -> Vec<LaneRead> {
    let cut_from = read.last().filter(|row| row.event.is_none()).map(|row| row.lane);
    let cut_from = cut_from.and_then(|cut| lanes.iter().position(|lane| *lane == cut));
    let mut reads = Vec::with_capacity(lanes.len());
    let mut rest = read;
    for (turn, &lane) in lanes.iter().enumerate() {
        // The rows come in the order of the lanes.
        let rows;
        (rows, rest) = rest.split_at(rest.iter().take_while(|row| row.lane == lane).count());
        let share = (max_events + lanes.len() - turn - 1) / lanes.len();
        let cut = rows.len() >= share
            || rows.iter().any(|row| row.event.is_none())
            || cut_from.is_some_and(|from| turn >= from);
        let last_fresh = rows.iter().filter_map(|row| row.event.as_ref()).filter(|event| !event.in_retry);
        let last_fresh = last_fresh.map(|event| event.seq).max().unwrap_or(marks::BEGINNING);
        reads.push(LaneRead { lane, read_to: if cut { last_fresh } else { i64::MAX }, left_out: None });
    }
    reads
}
