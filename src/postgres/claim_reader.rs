//! How a claim reads the events of its lanes: where each lane's read begins and ends, and what waits.
//!
//! A worker has it, within the claim's transaction (`claim_read.rs`). Each lane's read begins at its marks and ends at a limit
//! or at the lane's end (`lane/marks.rs`). What holds events back is asked after the lock and within it, so that it cannot change
//! meanwhile: the read says whether anything in these lanes may, and only then are due retries read, and keys looked up. Where
//! a writer that was asked for is over at the read's snapshot, the read is made again from below its events.
//!
//! A read gives each event an equal share of the claim's bytes. Where the first event of a lane takes more, the read is made
//! again, for fewer events. A claim that came back full reads on, in a few of its lanes, where that loses no order.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use postgres::types::ToSql;
use uuid::Uuid;

use super::claim_rows::{Budget, Found, ReadRow};
use super::claim_settings::{ClaimLimits, ClaimSettings};
use super::query::Query;
use super::transaction::Transaction;
use super::{StoreError, StoreInner, read_all, usize_of};
use crate::event::Event;
use crate::lane::ENOUGH_KEYS;
use crate::lane::marks::{BEGINNING, Basis, LaneRow, LeftOut, Start};
use crate::lane::writers::ServerLife;

/// Entries of a lane's index that one read walks over at most: some 25 ms where all of them are published.
const WALK_ENTRIES: i64 = 10_000;
/// Events in retry of a lane that one read looks at, at most.
const RETRY_ENTRIES: i64 = 10_000;

pub(super) const READ: Query =
    query!("read", INT4_ARRAY, INT8_ARRAY, INT4, INT8, INT8, INT8, INT8_ARRAY, BOOL, BOOL, INT8);
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
    /// Keys of the events that the last read gave.
    keys: usize,
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
            keys: 0,
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
    /// Events of one read at most, for which the claim has the bytes.
    events: i32,
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
        let events = limits.events.max(1);
        Reader { shared, lanes, basis, sequence_file: server.sequence_file, limits, events, held: false }
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

    /// Reads on where the read before has ended, in a few of the lanes, if that loses no order: nothing is held back, the lane was
    /// read up to a limit that is an event, and nobody whose end the read cannot see may still commit below that. `None` if
    /// it may not.
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
        let (few, rest) = few_of(cut);
        self.lanes = few;
        let before: Vec<i64> = self.lanes.iter().map(|lane| lane.end).collect();
        for lane in &mut self.lanes {
            lane.from = lane.end;
        }
        // What was large is behind.
        self.events = self.limits.events.max(1);
        let asked = self.to_ask();
        let mut events = None;
        if !self.lanes.is_empty() {
            let (rows, over) = self.query_what_fits(transaction, Large::Refused, &asked)?;
            events = (over.is_empty() && !self.held).then(|| self.take_in(rows));
        }
        if events.is_none() {
            for (lane, end) in self.lanes.iter_mut().zip(before) {
                (lane.end, lane.more) = (end, true);
            }
        }
        self.lanes.extend(done.into_iter().chain(rest));
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
            let (rows, over) = self.query_what_fits(transaction, large, &asked)?;
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

    /// Asks for the lanes' events until a first event that is large has come along, or as few were asked for as may be.
    fn query_what_fits(
        &mut self,
        transaction: &mut Transaction,
        large: Large,
        asked: &[u64],
    ) -> Result<(Vec<ReadRow>, Vec<u64>), StoreError> {
        loop {
            let (rows, over) = self.query(transaction, large, asked)?;
            if !over.is_empty() || !self.takes_fewer(&rows) {
                return Ok((rows, over));
            }
        }
    }

    /// The first event of a lane was left where it is, as it takes more than its share of the claim's bytes: the claim reads again,
    /// fewer events that may be as large. False where it reads as few as it may.
    fn takes_fewer(&mut self, rows: &[ReadRow]) -> bool {
        let fewest = i32::try_from(self.lanes.len()).unwrap_or(i32::MAX).max(1);
        let first_of_lane =
            rows.chunk_by(|row, next| row.lane == next.lane).filter_map(|of_lane| of_lane.first());
        let largest = first_of_lane.filter(|row| row.over_share).map(|row| row.stored).max();
        let Some(largest) = largest.filter(|_| self.events > fewest) else { return false };
        let events = self.shared.settings.max_claim_bytes / largest.max(1);
        self.events = i32::try_from(events).unwrap_or(i32::MAX).clamp(fewest, self.events - 1);
        true
    }

    /// The stored bytes that an event may have to come along: its share of the claim's, all of them where a lane gives but one.
    fn stored_bytes(&self) -> i64 {
        let bytes = self.shared.settings.max_claim_bytes;
        if usize_of(self.events) <= self.lanes.len() { bytes } else { bytes / i64::from(self.events) }
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
        let event_bytes = self.event_bytes();
        let stored_bytes = self.stored_bytes();
        let alone = large == Large::Alone && usize_of(self.events) <= self.lanes.len();
        let params: &[&(dyn ToSql + Sync)] = &[
            &lanes,
            &from,
            &self.events,
            &WALK_ENTRIES,
            &settings.max_claim_bytes,
            &event_bytes,
            &asked,
            &(settings.ordered && settings.block_on_dead),
            &alone,
            &stored_bytes,
        ];
        let (held, over) = (Cell::new(false), Cell::new(None::<Vec<i64>>));
        let budget = Budget::new(settings, self.limits);
        let rows = transaction.query_each(&READ, params, |row| {
            held.set(row.try_get(12)?);
            over.set(row.try_get(13)?);
            let stored = row.try_get::<_, Option<i64>>(14)?.unwrap_or(0);
            let over_share = stored > stored_bytes && !alone;
            Ok(ReadRow { stored, over_share, ..budget.take_in(row, false)? })
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
        let (max_events, lanes) = (usize_of(self.events), self.lanes.len());
        for (turn, lane) in self.lanes.iter_mut().enumerate() {
            // The share is that of `read.sql`: the first lanes take what does not divide.
            let share = (max_events + lanes - turn - 1) / lanes;
            let (mut count, mut end) = (0, None);
            lane.large = false;
            let mut keys = HashSet::new();
            // The rows come in the order of the lanes.
            while let Some(row) = rows.next_if(|row| row.lane == lane.lane) {
                count += 1;
                match row.found {
                    Found::Nothing => {}
                    Found::Event(event) => {
                        // What was cut before stays cut, though what follows it had room.
                        end = end.or((count >= share).then_some(event.seq));
                        if end.is_none_or(|end| end >= event.seq) {
                            keys.insert(event.key_hash);
                            events.push(*event);
                        }
                    }
                    Found::EndOfWalk(seq) => end = end.or(Some(seq)),
                    Found::Cut(seq) => {
                        lane.large |=
                            count == 1 && row.alone_too_large && (!row.over_share || max_events <= lanes);
                        end = end.or(Some(seq.saturating_sub(1)));
                    }
                }
            }
            lane.end = end.unwrap_or(i64::MAX);
            lane.more = end.is_some();
            lane.keys = keys.len();
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

/// The first lanes, as few of them as have keys enough to keep NATS busy, and the others: the fewer lanes are settled at
/// about the same time, the more updates find room on their page.
fn few_of(mut lanes: Vec<ClaimLane>) -> (Vec<ClaimLane>, Vec<ClaimLane>) {
    let mut keys = 0;
    let goes_on = |lane: &&ClaimLane| {
        let before = keys;
        keys += lane.keys;
        before < ENOUGH_KEYS
    };
    let few = lanes.iter().take_while(goes_on).count();
    let rest = lanes.split_off(few);
    (lanes, rest)
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
