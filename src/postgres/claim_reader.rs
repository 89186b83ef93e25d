//! How a claim reads the events of its lanes: where each lane's read begins and ends, and what waits.
//!
//! A worker has it, within the claim's transaction (`claim_read.rs`). Each lane's read begins at its marks and ends at a limit
//! or at the lane's end (`lane/marks.rs`). What holds events back is asked after the lock and within it, so that it cannot change
//! meanwhile: the read says whether anything in these lanes may, and only then are due retries read, and keys looked up. Where
//! a writer that was asked for is over at the read's snapshot, the read is made again from below its events.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use postgres::Row;
use postgres::types::ToSql;
use uuid::Uuid;

use super::claim_settings::{ClaimLimits, ClaimSettings};
use super::query::Query;
use super::timestamptz::Timestamptz;
use super::transaction::Transaction;
use super::{StoreError, StoreInner, read_all, usize_of};
use crate::event::Event;
use crate::lane::marks::{BEGINNING, Basis, LaneRow, LeftOut, Start};
use crate::lane::writers::ServerLife;

/// Entries of a lane's index that one read walks over at most: some 25 ms where all of them are published.
const WALK_ENTRIES: i64 = 10_000;
/// Events in retry of a lane that one read looks at, at most.
const RETRY_ENTRIES: i64 = 10_000;

pub(super) const READ: Query =
    query!("read", INT4_ARRAY, INT8_ARRAY, INT4, INT8, INT8, INT8, INT8_ARRAY, BOOL, BOOL);
const READ_RETRIES: Query =
    query!("read_retries", INT4_ARRAY, INT8, INT4, INT8, INT8, INT8, BOOL, BOOL, BOOL);
const HELD_KEYS: Query = query!("held_keys", INT8_ARRAY, BOOL);

/// Whether a read may begin with an event that alone is larger than what a claim may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Large {
    /// It may, and then is all that the read gives.
    Alone,
    /// It may not: [`Claim::too_large`] says where it is.
    Refused,
}

/// An event without its texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// `outboxes.id`.
    pub id: Uuid,
    /// `outboxes.seq`.
    pub seq: i64,
    pub(super) created_at: i64,
    pub(super) attempts: i32,
}

/// A locked lane, and how far it was read.
pub(super) struct ClaimLane {
    pub(super) lane: i32,
    pub(super) locked: LaneRow,
    /// Its shared mark may be written again.
    pub(super) may_mark: bool,
    /// Where the next read begins.
    from: i64,
    /// The end of what was read; `i64::MAX` when that is the lane's end.
    pub(super) end: i64,
    /// A limit ended the read, or what was left out may go now.
    pub(super) more: bool,
    /// Its first event is alone larger than what a claim may hold.
    large: bool,
    pub(super) left_out: LeftOut,
    /// The first event left out that could not be remembered.
    pub(super) pinned: Option<i64>,
}

impl ClaimLane {
    pub(super) fn new(lane: i32, locked: LaneRow, may_mark: bool) -> ClaimLane {
        ClaimLane {
            lane,
            locked,
            may_mark,
            from: BEGINNING,
            end: BEGINNING,
            more: false,
            large: false,
            left_out: LeftOut::default(),
            pinned: None,
        }
    }
}

/// Reads the events of a claim's lanes.
pub(super) struct Reader {
    shared: Arc<StoreInner>,
    pub(super) lanes: Vec<ClaimLane>,
    pub(super) basis: Arc<Basis>,
    /// The file of the sequence that marks count for.
    pub(super) sequence_file: i64,
    limits: ClaimLimits,
    /// Something in these lanes may hold events back.
    held: bool,
}

impl Reader {
    pub(super) fn new(
        shared: Arc<StoreInner>,
        lanes: Vec<(ClaimLane, Start)>,
        basis: Arc<Basis>,
        server: ServerLife,
        limits: ClaimLimits,
    ) -> Reader {
        let begin = |(mut lane, start): (ClaimLane, Start)| {
            lane.from = start.from(lane.locked);
            if start.holds(lane.locked) {
                lane.left_out = LeftOut::clone(&start.left_out);
            }
            lane
        };
        let lanes = lanes.into_iter().map(begin).collect();
        Reader { shared, lanes, basis, sequence_file: server.sequence_file, limits, held: false }
    }

    /// The lane whose first event is too large to be read beside others.
    pub(super) fn too_large(&self) -> Option<i32> {
        self.lanes.iter().find(|lane| lane.large).map(|lane| lane.lane)
    }

    /// Of the keys of which events were left out, some may be free by now: the read begins below these events.
    pub(super) fn begin_where_keys_are_free(
        &mut self,
        transaction: &mut Transaction,
    ) -> Result<(), StoreError> {
        let keys: Vec<i64> = self.lanes.iter().flat_map(|lane| lane.left_out.keys()).collect();
        if keys.is_empty() {
            return Ok(());
        }
        let held = held_keys(transaction, &self.shared.settings, &keys)?;
        for lane in &mut self.lanes {
            for key in lane.left_out.keys() {
                if held.contains_key(&key) {
                    continue;
                }
                if let Some(first) = lane.left_out.free(key) {
                    lane.from = lane.from.min(first.saturating_sub(1));
                }
            }
        }
        Ok(())
    }

    /// Reads on where the read before has ended, if that loses no order: nothing is held back, every lane was read up to a
    /// limit that is an event, and nobody whose end the read cannot see may still commit below that. `None` if it may not.
    pub(super) fn read_on(
        &mut self,
        transaction: &mut Transaction,
    ) -> Result<Option<Vec<Event>>, StoreError> {
        if self.held {
            return Ok(None);
        }
        let in_order = |lane: &ClaimLane| {
            let settled_to = lane.locked.settled_to;
            lane.left_out.is_empty() && !lane.large && self.basis.read_on(lane.end, settled_to) >= lane.end
        };
        let (cut, done): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.lanes).into_iter().partition(|lane| lane.more && in_order(lane));
        self.lanes = cut;
        let before: Vec<i64> = self.lanes.iter().map(|lane| lane.end).collect();
        for lane in &mut self.lanes {
            lane.from = lane.end;
        }
        let asked = self.to_ask();
        let events = if self.lanes.is_empty() {
            None
        } else {
            let (rows, over) = self.query(transaction, Large::Refused, &asked)?;
            if over.is_empty() { Some(self.take_in(rows)) } else { None }
        };
        let events = if self.held { None } else { events };
        if events.is_none() {
            for (lane, end) in self.lanes.iter_mut().zip(before) {
                (lane.end, lane.more) = (end, true);
            }
        }
        self.lanes.extend(done);
        Ok(events)
    }

    /// Reads the events of the lanes, in the order of lanes and seq.
    pub(super) fn read(
        &mut self,
        transaction: &mut Transaction,
        large: Large,
    ) -> Result<Vec<Event>, StoreError> {
        let mut over_before: HashSet<u64> = HashSet::new();
        let mut events = loop {
            let mut asked = self.to_ask();
            asked.retain(|xid| !over_before.contains(xid));
            let (rows, over) = self.query(transaction, large, &asked)?;
            if over.is_empty() {
                break self.take_in(rows);
            }
            for lane in &mut self.lanes {
                lane.from = self.basis.again(&over, lane.locked.settled_to, lane.from);
            }
            over_before.extend(over);
        };
        if self.held {
            self.hold_back(transaction, large, &mut events)?;
        }
        // Within a lane the retries came last; a key's events go out in seq order.
        events.sort_by_key(|event| (event.lane, event.seq));
        Ok(events)
    }

    /// The writers whose end matters to a read that begins where these lanes' do.
    fn to_ask(&self) -> Vec<u64> {
        let lanes: Vec<_> = self.lanes.iter().map(|lane| (lane.locked.settled_to, lane.from)).collect();
        self.basis.to_ask(&lanes)
    }

    /// Asks for the lanes' events, and which of the `asked` writers are over.
    fn query(
        &mut self,
        transaction: &mut Transaction,
        large: Large,
        asked: &[u64],
    ) -> Result<(Vec<ReadRow>, Vec<u64>), StoreError> {
        let settings = &self.shared.settings;
        let lanes: Vec<i32> = self.lanes.iter().map(|lane| lane.lane).collect();
        let from: Vec<i64> = self.lanes.iter().map(|lane| lane.from).collect();
        let asked: Vec<i64> = asked.iter().map(|&xid| xid.cast_signed()).collect();
        let (event_bytes, alone) = (self.event_bytes(), large == Large::Alone);
        let params: &[&(dyn ToSql + Sync)] = &[
            &lanes,
            &from,
            &self.limits.events.max(1),
            &WALK_ENTRIES,
            &settings.max_claim_bytes,
            &event_bytes,
            &asked,
            &(settings.ordered && settings.block_on_dead),
            &alone,
        ];
        let (held, over) = (Cell::new(false), Cell::new(None::<Vec<i64>>));
        let budget = Budget::new(settings, self.limits);
        let rows = transaction.query_each(&READ, params, |row| {
            held.set(row.try_get(12)?);
            over.set(row.try_get(13)?);
            budget.take_in(row, false)
        })?;
        self.held |= held.get();
        let over = over.take().unwrap_or_default();
        Ok((rows, over.into_iter().map(i64::cast_unsigned).collect()))
    }

    fn event_bytes(&self) -> Option<i64> {
        self.limits.event_bytes.map(|bytes| i64::try_from(bytes).unwrap_or(i64::MAX))
    }

    /// Takes the events out of what was read, and notes of each lane where its read has ended.
    fn take_in(&mut self, rows: Vec<ReadRow>) -> Vec<Event> {
        let mut events = Vec::new();
        let mut rows = rows.into_iter().peekable();
        let (max_events, lanes) = (usize_of(self.limits.events.max(1)), self.lanes.len());
        for (turn, lane) in self.lanes.iter_mut().enumerate() {
            // The share is that of `read.sql`: the first lanes take what does not divide.
            let share = (max_events + lanes - turn - 1) / lanes;
            let (mut count, mut end) = (0, None);
            lane.large = false;
            // The rows come in the order of the lanes.
            while let Some(row) = rows.next_if(|row| row.lane == lane.lane) {
                count += 1;
                match row.found {
                    Found::Nothing => {}
                    Found::Event(event) => {
                        end = (count >= share).then_some(event.seq).or(end);
                        if end.is_none_or(|end| end >= event.seq) {
                            events.push(*event);
                        }
                    }
                    Found::EndOfWalk(seq) => end = end.or(Some(seq)),
                    Found::Cut(seq) => {
                        lane.large |= count == 1 && row.alone_too_large;
                        end = end.or(Some(seq.saturating_sub(1)));
                    }
                }
            }
            lane.end = end.unwrap_or(i64::MAX);
            lane.more = end.is_some();
        }
        events
    }

    /// Adds the due retries of these lanes to `events`, and takes out what waits behind a retry or a dead letter.
    fn hold_back(
        &mut self,
        transaction: &mut Transaction,
        large: Large,
        events: &mut Vec<Event>,
    ) -> Result<(), StoreError> {
        if self.shared.settings.ordered {
            let keys: HashSet<i64> = events.iter().map(|event| event.key_hash).collect();
            let keys: Vec<i64> = keys.into_iter().collect();
            let held = held_keys(transaction, &self.shared.settings, &keys)?;
            let waits = |event: &Event| held.get(&event.key_hash).is_some_and(|&holding| holding < event.seq);
            for event in events.extract_if(.., |event| waits(event)) {
                self.leave_out(&event);
            }
        }
        let retries = self.read_retries(transaction, large)?;
        let share = (usize_of(self.limits.events.max(1)) / self.lanes.len()).max(1);
        for lane in &mut self.lanes {
            let of_lane = retries.iter().filter(|event| event.lane == lane.lane).count();
            // What waited behind them may go next.
            lane.more |= of_lane > 0 && (!lane.left_out.is_empty() || lane.pinned.is_some());
            lane.more |= of_lane >= share;
        }
        events.extend(retries);
        Ok(())
    }

    fn leave_out(&mut self, event: &Event) {
        let Some(lane) = self.lanes.iter_mut().find(|lane| lane.lane == event.lane) else { return };
        if !lane.left_out.remember(event.key_hash, event.seq) {
            lane.pinned = Some(lane.pinned.map_or(event.seq, |pinned| pinned.min(event.seq)));
        }
    }

    /// The due retries of these lanes that nothing holds back, each with all that is ahead of it in its key.
    fn read_retries(&self, transaction: &mut Transaction, large: Large) -> Result<Vec<Event>, StoreError> {
        let settings = &self.shared.settings;
        let lanes: Vec<i32> = self.lanes.iter().map(|lane| lane.lane).collect();
        let (event_bytes, alone) = (self.event_bytes(), large == Large::Alone);
        let params: &[&(dyn ToSql + Sync)] = &[
            &lanes,
            &RETRY_ENTRIES,
            &self.limits.events.max(1),
            &self.shared.backoff_max_ms.load(Ordering::Relaxed),
            &settings.max_claim_bytes,
            &event_bytes,
            &settings.ordered,
            &(settings.ordered && settings.block_on_dead),
            &alone,
        ];
        let budget = Budget::new(settings, self.limits);
        let rows = transaction.query_each(&READ_RETRIES, params, |row| {
            Ok((budget.take_in(row, true)?, row.try_get::<_, Option<i64>>(12)?))
        })?;
        let mut taken = HashSet::new();
        let mut events = Vec::new();
        for (row, behind) in rows {
            if let Found::Event(event) = row.found
                && behind.is_none_or(|behind| taken.contains(&behind))
            {
                taken.insert(event.seq);
                events.push(*event);
            }
        }
        Ok(events)
    }
}

/// Which of these keys are held, each with the first event that holds it: one in retry or, where such block, dead.
pub(super) fn held_keys(
    transaction: &mut Transaction,
    settings: &ClaimSettings,
    keys: &[i64],
) -> Result<HashMap<i64, i64>, StoreError> {
    if keys.is_empty() || !settings.ordered {
        return Ok(HashMap::new());
    }
    let rows = transaction.query(&HELD_KEYS, &[&keys, &settings.block_on_dead])?;
    Ok(read_all(&rows, |row| Ok((row.try_get(0)?, row.try_get(1)?)))?.into_iter().collect())
}

/// One row of what is read.
struct ReadRow {
    lane: i32,
    found: Found,
    /// Where it is a [`Found::Cut`]: the event is larger than what a claim may hold, whatever else it holds.
    alone_too_large: bool,
}

/// What a row says of its lane.
enum Found {
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
struct Budget {
    bytes: usize,
    taken: Cell<usize>,
    is_used_up: Cell<bool>,
    event_bytes: Option<usize>,
}

impl Budget {
    fn new(settings: &ClaimSettings, limits: ClaimLimits) -> Budget {
        Budget {
            bytes: usize::try_from(settings.max_claim_bytes).unwrap_or(0),
            taken: Cell::new(0),
            is_used_up: Cell::new(false),
            event_bytes: limits.event_bytes,
        }
    }

    /// Takes in a row of what is read; a larger event than can be a message has been left where it is.
    fn take_in(&self, row: &Row, in_retry: bool) -> Result<ReadRow, postgres::Error> {
        let lane = row.try_get(0)?;
        let seq: Option<i64> = row.try_get(3)?;
        let cut = |seq, alone_too_large| Ok(ReadRow { lane, found: Found::Cut(seq), alone_too_large });
        let Some(seq) = seq else {
            return Ok(ReadRow { lane, found: Found::Nothing, alone_too_large: false });
        };
        if !row.try_get::<_, bool>(8)? {
            return Ok(ReadRow { lane, found: Found::EndOfWalk(seq), alone_too_large: false });
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
        Ok(ReadRow { lane, found: Found::Event(Box::new(event)), alone_too_large: false })
    }
}
