//! The sweep's statements: looking through the partitions for events that the marks have passed, and setting marks back.
//!
//! A [`SweepSession`] is a connection of its own, outside the pool, so that no claim waits for the sweep. The turn is an
//! advisory lock that an open transaction holds, and so it works through a transaction pooler too; what is asked within it
//! is asked in a savepoint that is rolled back, which lets go of the locks on the tables. A mark is set back in a
//! transaction that holds the lane's lock, as a claim does, after the events were looked at again under that lock. Each
//! method blocks its caller, and has a limit.

use std::time::Duration;

use postgres::types::ToSql;
use postgres::{Client, Row};

use super::begin::begin_change;
use super::home::Home;
use super::query::{Query, typed};
use super::{Store, StoreError, connect, first, read_all};
use crate::lane::ByLane;

/// Longest wait for the claim that has a lane.
const LANE_WAIT: Duration = Duration::from_secs(1);
/// `lock_not_available`.
const LOCK_NOT_AVAILABLE: &str = "55P03";

const SWEEP_TURN: Query = query!("sweep_turn");
const SWEEP_PARTITIONS: Query = query!("sweep_partitions");
const SWEEP_PARTITION: Query = query!("sweep_partition", TEXT, INT8, INT4, INT8_ARRAY, BOOL, BOOL);
const SWEEP_LANE: Query = query!("sweep_lane", INT4, INT8_ARRAY, INT8, BOOL, BOOL, INT4);
const LOCK_LANE: Query = query!("lock_lane", INT4);
const WAKE_DISPATCHERS: Query = query!("wake_dispatchers");

/// A connection for the sweep. After an error it is of no further use.
pub struct SweepSession {
    client: Client,
    home: Home,
    /// Events wait for earlier retries of their key.
    retries_hold: bool,
    /// Events wait for earlier dead letters of their key.
    dead_hold: bool,
}

/// A partition, as the sweep knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SweptPartition {
    /// Name of its table.
    pub name: String,
    /// The same for as long as nothing was written in it; `None` where the server does not count.
    pub written: Option<String>,
}

/// An event that is pending although a mark of its lane has passed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passed {
    /// Its lane.
    pub lane: i32,
    /// Its place in the order.
    pub seq: i64,
    /// Its ordering key.
    pub key_hash: i64,
}

/// What some blocks of a partition hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SweptBlocks {
    /// The first ones of each lane.
    pub passed: Vec<Passed>,
    /// How many events are fresh, passed or not.
    pub fresh: i64,
    /// Where to go on; `None` at the end of the partition.
    pub next_block: Option<i64>,
}

/// What setting a lane's mark back came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetBack {
    /// Every instance begins before these events, once.
    Done {
        /// How many are still there.
        events: i64,
        /// `seq` of the first.
        first: i64,
    },
    /// None of them is still fresh and passed and free to go.
    Nothing,
    /// A claim has the lane.
    Busy,
}

impl Store {
    /// Connects, outside the pool.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn sweep(&self) -> Result<SweepSession, StoreError> {
        let settings = &self.shared.settings;
        Ok(SweepSession {
            client: connect(&self.shared.target)?,
            home: self.shared.home.clone(),
            retries_hold: settings.ordered,
            dead_hold: settings.ordered && settings.block_on_dead,
        })
    }
}

impl SweepSession {
    /// The partitions, in the order of their months.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn partitions(&mut self) -> Result<Vec<SweptPartition>, StoreError> {
        self.begin()?;
        let rows = self.query(&SWEEP_PARTITIONS, &[])?;
        self.batch("COMMIT")?;
        read_all(&rows, |row| Ok(SweptPartition { name: row.try_get(0)?, written: row.try_get(1)? }))
    }

    /// Takes the turn, and returns whether it got it: not while another instance has it. It lasts until
    /// [`SweepSession::end_turn`].
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn take_turn(&mut self) -> Result<bool, StoreError> {
        self.begin()?;
        // It waits between its steps, and holds nothing but the lock, no snapshot either.
        self.batch("SET LOCAL idle_in_transaction_session_timeout = 0")?;
        let rows = self.query(&SWEEP_TURN, &[])?;
        let is_ours: bool = first(&rows, |row| row.try_get(0))?;
        if !is_ours {
            self.batch("ROLLBACK")?;
        }
        Ok(is_ours)
    }

    /// Lets the turn go.
    ///
    /// # Errors
    /// PostgreSQL is out of reach, and the turn is gone as well.
    pub fn end_turn(&mut self) -> Result<(), StoreError> {
        self.batch("COMMIT")
    }

    /// Looks into `blocks` blocks of a partition from `first_block` on, within the turn. `marks` are where this instance's
    /// reads of each lane begin.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses; among others, there is no such partition (42P01), or the role may not execute
    /// the schema's functions (42501).
    pub fn look(
        &mut self,
        partition: &str,
        first_block: i64,
        blocks: i32,
        marks: &ByLane<i64>,
    ) -> Result<SweptBlocks, StoreError> {
        self.batch("SAVEPOINT look")?;
        let (retries_hold, dead_hold) = (self.retries_hold, self.dead_hold);
        let rows = self.query(
            &SWEEP_PARTITION,
            &[&partition, &first_block, &blocks, &&marks[..], &retries_hold, &dead_hold],
        )?;
        self.batch("ROLLBACK TO SAVEPOINT look")?;
        first(&rows, |row| {
            let (lanes, seqs): (Vec<i32>, Vec<i64>) = (row.try_get(0)?, row.try_get(1)?);
            let key_hashes: Vec<i64> = row.try_get(2)?;
            let passed = lanes.into_iter().zip(seqs).zip(key_hashes);
            let passed = passed.map(|((lane, seq), key_hash)| Passed { lane, seq, key_hash }).collect();
            Ok(SweptBlocks { passed, fresh: row.try_get(3)?, next_block: row.try_get(4)? })
        })
    }

    /// Sets the mark of a lane back before the first of the events `seqs` that is still fresh although a mark has passed it, and
    /// wakes all dispatchers. `mark` is where this instance's reads of the lane begin, as long as the lane's count of
    /// sweeps is `sweeps`. Outside the turn.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses: nothing was changed (a lost COMMIT may have happened all the same).
    pub fn set_back(
        &mut self,
        lane: i32,
        seqs: &[i64],
        mark: i64,
        sweeps: i32,
    ) -> Result<SetBack, StoreError> {
        self.begin()?;
        match self.query(&LOCK_LANE, &[&lane]) {
            Err(error) if error.sqlstate() == Some(LOCK_NOT_AVAILABLE) => {
                return self.batch("ROLLBACK").map(|()| SetBack::Busy);
            }
            locked => locked?,
        };
        let (retries_hold, dead_hold) = (self.retries_hold, self.dead_hold);
        let rows = self.query(&SWEEP_LANE, &[&lane, &seqs, &mark, &retries_hold, &dead_hold, &sweeps])?;
        let done =
            read_all(&rows, |row| Ok(SetBack::Done { events: row.try_get(0)?, first: row.try_get(1)? }))?;
        if !done.is_empty() {
            self.query(&WAKE_DISPATCHERS, &[])?;
        }
        self.batch("COMMIT")?;
        Ok(done.first().copied().unwrap_or(SetBack::Nothing))
    }

    /// Wakes all dispatchers, so that they look at who has ended.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn wake(&mut self) -> Result<(), StoreError> {
        self.begin()?;
        self.query(&WAKE_DISPATCHERS, &[])?;
        self.batch("COMMIT")
    }

    fn begin(&mut self) -> Result<(), StoreError> {
        let begin = begin_change(LANE_WAIT, &self.home);
        self.batch(&begin)
    }

    fn batch(&mut self, text: &str) -> Result<(), StoreError> {
        self.client.batch_execute(text).map_err(|error| StoreError::from(&error))
    }

    fn query(&mut self, query: &Query, params: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, StoreError> {
        let rows = self.client.query_typed(query.text, &typed(query, params));
        rows.map_err(|error| StoreError::from(&error))
    }
}
