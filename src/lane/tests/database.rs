//! The database of the model: committed rows, the rows of `outbox_lanes`, prepared transactions, the sequence, and the
//! open transactions of writers, in slots.
//!
//! Committed is visible at once, and only then is the lock on the sequence gone. What a crash may undo is a suffix of the
//! commits: settles and the mark that was written with them are always lost together. Left out: partitions, snapshots that
//! outlive a statement, and savepoints (a sample names the top transaction, so they never show).

use crate::lane::marks::LaneRow;
use crate::lane::writers::{OpenWriter, ServerLife};

/// The names of the keys; key `k` is in lane `k % lanes`.
pub(super) const KEYS: [&str; 4] = ["k0", "k1", "k2", "k3"];
/// Commits that a failover to an asynchronous standby may undo.
const HISTORY_MAX: usize = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum State {
    Fresh,
    Retry,
    Published,
    Dead,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Row {
    pub(super) seq: i64,
    pub(super) key: u8,
    pub(super) state: State,
    /// Set back to pending by hand: only the sweep finds it.
    pub(super) by_hand: bool,
}

impl Row {
    /// Nothing but the protocol finds it.
    pub(super) fn is_fresh(&self) -> bool {
        self.state == State::Fresh && !self.by_hand
    }
}

/// A writer's transaction, which holds the lock on the sequence.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Transaction {
    slot: usize,
    number: u32,
    pub(super) xid: Option<u64>,
    prepared: bool,
    /// Numbers without a row so far.
    pub(super) unused: Vec<i64>,
    pub(super) draws: usize,
    pub(super) rows: Vec<Row>,
}

impl Transaction {
    pub(super) fn as_sampled(&self) -> OpenWriter {
        let name = match self.xid {
            Some(xid) if self.prepared => format!("-1/{xid}"),
            _ => format!("{}/{}", self.slot, self.number),
        };
        OpenWriter { name, xid: self.xid }
    }

    /// Numbers that it may still commit.
    fn numbers(&self) -> impl Iterator<Item = i64> {
        self.unused.iter().copied().chain(self.rows.iter().map(|row| row.seq))
    }
}

/// What is on disk, or will be, unless the server crashes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Stored {
    rows: Vec<Row>,
    lanes: Vec<LaneRow>,
    prepared: Vec<Transaction>,
    sequence: i64,
    next_xid: u64,
}

impl Stored {
    /// The highest number that it knows of.
    fn highest(&self) -> i64 {
        let committed = self.rows.iter().map(|row| row.seq);
        let prepared = self.prepared.iter().flat_map(Transaction::numbers);
        let marks = self.lanes.iter().map(|lane| lane.settled_to);
        committed.chain(prepared).chain(marks).fold(0, i64::max)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Database {
    now: Stored,
    /// After each of the last commits, if the run has crashes; and whether a crash can lead back there.
    history: Vec<(Stored, bool)>,
    keeps_history: bool,
    pub(super) slots: Vec<Option<Transaction>>,
    begun: Vec<u32>,
    pub(super) life: ServerLife,
}

impl Database {
    pub(super) fn new(lanes: usize, slots: usize, keeps_history: bool) -> Database {
        let lanes = vec![LaneRow::default(); lanes];
        let now = Stored { rows: Vec::new(), lanes, prepared: Vec::new(), sequence: 0, next_xid: 700 };
        let mut new = Database {
            now,
            history: Vec::new(),
            keeps_history,
            slots: vec![None; slots],
            begun: vec![0; slots],
            life: ServerLife::default(),
        };
        new.committed(Disk::Waits);
        new
    }

    pub(super) fn rows(&self) -> &[Row] {
        &self.now.rows
    }

    pub(super) fn row(&mut self, seq: i64) -> Option<&mut Row> {
        self.now.rows.iter_mut().find(|row| row.seq == seq)
    }

    pub(super) fn lane_of(&self, key: u8) -> usize {
        usize::from(key) % self.now.lanes.len()
    }

    pub(super) fn in_lane(&self, lane: usize) -> impl Iterator<Item = &Row> {
        self.now.rows.iter().filter(move |row| self.lane_of(row.key) == lane)
    }

    pub(super) fn lanes(&self) -> &[LaneRow] {
        &self.now.lanes
    }

    pub(super) fn lane(&mut self, lane: usize) -> &mut LaneRow {
        &mut self.now.lanes[lane]
    }

    pub(super) fn sequence(&self) -> i64 {
        self.now.sequence
    }

    pub(super) fn prepared(&self) -> usize {
        self.now.prepared.len()
    }

    pub(super) fn begun(&self, slot: usize) -> u32 {
        self.begun[slot]
    }

    /// All who hold the lock on the sequence.
    pub(super) fn open(&self) -> impl Iterator<Item = &Transaction> {
        self.slots.iter().flatten().chain(&self.now.prepared)
    }

    /// Numbers that can still appear.
    pub(super) fn to_appear(&self) -> impl Iterator<Item = i64> {
        self.open().flat_map(Transaction::numbers)
    }

    /// What `pg_visible_in_snapshot` says of a transaction at a snapshot taken now.
    pub(super) fn is_over(&self, xid: u64) -> bool {
        self.open().all(|transaction| transaction.xid != Some(xid))
    }

    /// Something of the key, numbered below `seq`, holds what follows.
    pub(super) fn is_held(&self, key: u8, seq: i64, dead_blocks: bool) -> bool {
        let holds = |state| state == State::Retry || (dead_blocks && state == State::Dead);
        self.now.rows.iter().any(|row| row.key == key && row.seq < seq && holds(row.state))
    }

    /// A transaction takes the lock on the sequence.
    pub(super) fn begin(&mut self, slot: usize) {
        self.begun[slot] += 1;
        let number = self.begun[slot];
        let (unused, rows) = (Vec::new(), Vec::new());
        self.slots[slot] =
            Some(Transaction { slot, number, xid: None, prepared: false, unused, draws: 0, rows });
    }

    pub(super) fn draw(&mut self, slot: usize) {
        self.now.sequence += 1;
        if let Some(transaction) = &mut self.slots[slot] {
            transaction.unused.push(self.now.sequence);
            transaction.draws += 1;
        }
    }

    pub(super) fn get_xid(&mut self, slot: usize) {
        if let Some(transaction) = &mut self.slots[slot]
            && transaction.xid.is_none()
        {
            transaction.xid = Some(self.now.next_xid);
            self.now.next_xid += 1;
        }
    }

    pub(super) fn insert(&mut self, slot: usize, key: u8) {
        self.get_xid(slot);
        if let Some(transaction) = &mut self.slots[slot] {
            let seq = transaction.unused.remove(0);
            transaction.rows.push(Row { seq, key, state: State::Fresh, by_hand: false });
        }
    }

    pub(super) fn abort(&mut self, slot: usize) {
        self.slots[slot] = None;
    }

    pub(super) fn commit(&mut self, slot: usize, disk: Disk) {
        if let Some(transaction) = self.slots[slot].take() {
            self.appear(transaction, disk);
        }
    }

    pub(super) fn prepare(&mut self, slot: usize) {
        if let Some(transaction) = self.slots[slot].take() {
            self.now.prepared.push(Transaction { prepared: true, ..transaction });
            self.committed(Disk::Waits);
        }
    }

    pub(super) fn commit_prepared(&mut self, index: usize) {
        let transaction = self.now.prepared.remove(index);
        self.appear(transaction, Disk::Waits);
    }

    pub(super) fn abort_prepared(&mut self, index: usize) {
        self.now.prepared.remove(index);
        self.committed(Disk::Waits);
    }

    fn appear(&mut self, transaction: Transaction, disk: Disk) {
        self.now.rows.extend(transaction.rows);
        self.now.rows.sort_by_key(|row| row.seq);
        self.committed(disk);
    }

    /// A commit, whatever it was of.
    pub(super) fn committed(&mut self, disk: Disk) {
        if !self.keeps_history {
            return;
        }
        if disk == Disk::Waits {
            self.history.iter_mut().for_each(|(_, reachable)| *reachable = false);
        }
        self.history.push((self.now.clone(), true));
        let first = self.history.len().saturating_sub(HISTORY_MAX);
        self.history.drain(..first);
    }

    /// The server begins anew, without its last `lost` commits, as far as they were not on disk yet; a standby that takes
    /// over may lack those, too. Numbers that nobody committed may be drawn again.
    pub(super) fn crash(&mut self, lost: usize, fails_over: bool, sequence: Sequence) {
        let mut states = self.history.iter().rev().filter(|(_, reachable)| *reachable || fails_over);
        let state = states.nth(lost).or(self.history.last()).map(|(state, _)| state.clone());
        let former = self.now.sequence;
        self.now = state.unwrap_or_else(|| self.now.clone());
        self.now.sequence = match sequence {
            Sequence::GoesOn => former.max(self.now.sequence),
            Sequence::GoesBack => self.now.highest(),
        };
        self.slots.fill(None);
        self.begun.fill(0);
        self.history.clear();
        self.committed(Disk::Waits);
        if fails_over {
            self.life.started += 1;
        } else {
            self.life.recovered += 1;
        }
    }
}

/// Whether a commit is on disk when it is answered, and with it all before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Disk {
    Waits,
    Later,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Sequence {
    GoesOn,
    GoesBack,
}
