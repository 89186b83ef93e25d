//! The partitions of the outbox: listing, making, dropping and cleaning them, through the functions of the schema.
//!
//! A [`PartitionSession`] is a connection of its own, outside the pool, so that no claim ever waits for upkeep. Of all
//! that ask for [`Store::upkeep_turn`] at the same time one gets it: the turn is an advisory lock that an otherwise
//! empty transaction holds, and so it works through a transaction pooler too. Every method is one transaction with
//! a limit, and blocks its caller. Whatever is called here in whatever order, no pending event and no dead letter
//! is ever deleted: the functions see to it, under locks.

use std::time::Duration;

use postgres::types::ToSql;
use postgres::{Client, Row};

use super::begin::NO_OTHER_LIMITS;
use super::home::Home;
use super::query::{Query, typed};
use super::{Store, StoreError, connect, first, milliseconds, read_all};

/// Making a partition may move rows, and dropping one tries for its locks; no step takes longer than this.
pub const UPKEEP_STEP: Duration = Duration::from_secs(60);

/// A connection for looking after the partitions.
pub struct PartitionSession {
    client: Client,
    home: Home,
}

/// The turn to keep the partitions up. Dropping it lets others have theirs.
pub struct UpkeepTurn {
    client: Client,
}

/// One partition.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Partition {
    /// Name of its table.
    pub name: String,
    /// First day (UTC) that it takes, as `2024-02-01`; `None` without a bound.
    pub from: Option<String>,
    /// First day (UTC) that it does not take any more; `None` without a bound.
    pub to: Option<String>,
    /// Takes what no other partition takes.
    pub is_default: bool,
    /// Bytes on disk, with indexes.
    pub bytes: i64,
    /// Rows as PostgreSQL estimates them; `None` before its first vacuum.
    pub rows: Option<i64>,
    /// `pending`, `dead` or (newly) `discarded` when it holds such events and therefore stays; `unread` while it is not known
    /// whether it has pending ones; else `None`.
    pub holds: Option<String>,
    /// Older than the retention as a whole.
    pub is_old: bool,
    /// May have events older than the retention.
    pub has_old: bool,
}

/// What the gauges show.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PartitionState {
    /// For how many days from now there are partitions without a gap.
    pub days_ahead: f64,
    /// Rows of the DEFAULT partition, counted up to 100,000.
    pub default_rows: i64,
}

/// What became of the wish to drop a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropped {
    /// It is gone.
    Dropped,
    /// It is not older than the retention as a whole.
    Young,
    /// It holds a pending event.
    Pending,
    /// It holds a dead letter.
    Dead,
    /// Whether it holds a pending event is not known yet: lanes are not read so far.
    Unread,
    /// It holds an event that was discarded less than the retention ago.
    Discarded,
    /// Its locks were not free; nobody was kept waiting for long.
    Locked,
}

/// What one step of cleaning did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cleaned {
    /// Events deleted.
    pub deleted: i64,
    /// Where to go on; `None` at the end of the partition.
    pub next_block: Option<i64>,
}

impl Store {
    /// Connects, outside the pool.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn partitions(&self) -> Result<PartitionSession, StoreError> {
        Ok(PartitionSession { client: connect(&self.shared.target)?, home: self.shared.home.clone() })
    }

    /// Takes the turn to keep the partitions up; `None` while another instance has it.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn upkeep_turn(&self) -> Result<Option<UpkeepTurn>, StoreError> {
        let mut client = connect(&self.shared.target)?;
        // Idle for as long as the round takes; it holds nothing but the lock, no snapshot either.
        begin(&mut client, "SET LOCAL idle_in_transaction_session_timeout = 0", &self.shared.home)?;
        let rows = query(&mut client, &UPKEEP_TURN, &[])?;
        let is_ours = first(&rows, |row| row.try_get(0))?;
        Ok(if is_ours { Some(UpkeepTurn { client }) } else { None })
    }
}

impl UpkeepTurn {
    /// True while the turn is ours, as far as this side of the connection knows.
    pub fn is_ours(&self) -> bool {
        !self.client.is_closed()
    }
}

impl PartitionSession {
    /// All partitions, by month, the DEFAULT partition last. `retention` says which of them are old; `None`: none.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses; among others, the role may not execute the schema's functions (42501).
    pub fn list(&mut self, retention: Option<Duration>) -> Result<Vec<Partition>, StoreError> {
        let rows = self.step(&PARTITIONS, &[&retention.map(seconds)])?;
        read_all(&rows, |row| {
            Ok(Partition {
                name: row.try_get(0)?,
                from: row.try_get(1)?,
                to: row.try_get(2)?,
                is_default: row.try_get(3)?,
                bytes: row.try_get(4)?,
                rows: row.try_get(5)?,
                holds: row.try_get(6)?,
                is_old: row.try_get(7)?,
                has_old: row.try_get(8)?,
            })
        })
    }

    /// How far ahead partitions are made, and what has fallen beside them.
    ///
    /// # Errors
    /// As [`PartitionSession::list`].
    pub fn state(&mut self) -> Result<PartitionState, StoreError> {
        let rows = self.step(&PARTITION_STATE, &[])?;
        first(&rows, |row| Ok(PartitionState { days_ahead: row.try_get(0)?, default_rows: row.try_get(1)? }))
    }

    /// The months that want a partition, each by its first day (`2024-02-01`): this one, `premake` more, and earlier
    /// ones that have events in the DEFAULT partition.
    ///
    /// # Errors
    /// As [`PartitionSession::list`].
    pub fn missing(&mut self, premake: u32) -> Result<Vec<String>, StoreError> {
        let premake = i32::try_from(premake).unwrap_or(i32::MAX);
        let rows = self.step(&MISSING_PARTITIONS, &[&premake])?;
        read_all(&rows, |row| row.try_get(0))
    }

    /// Makes the partition of the month that `day` (`2024-02-01`) lies in, moves into it what has fallen into the
    /// DEFAULT partition, and returns its name. Nothing happens when it is there.
    ///
    /// # Errors
    /// As [`PartitionSession::list`]; locks that were not free in several tries (55P03); more than a minute of work.
    pub fn create(&mut self, day: &str) -> Result<String, StoreError> {
        let rows = self.step(&CREATE_PARTITION, &[&day])?;
        first(&rows, |row| row.try_get(0))
    }

    /// Whether a partition holds an event that is neither published nor dead nor in retry, also one that the marks have
    /// passed and the sweep has not found: [`PartitionSession::drop`] asks under a lock, and so by the marks alone. Reads all
    /// of it, in steps of 16 MB; `go_on` is called before each. `None`: it said no.
    ///
    /// # Errors
    /// As [`PartitionSession::list`]; there is no such partition (42P01).
    pub fn has_fresh(
        &mut self,
        name: &str,
        mut go_on: impl FnMut() -> bool,
    ) -> Result<Option<bool>, StoreError> {
        let mut block = 0;
        while go_on() {
            let rows = self.step(&FRESH_BLOCKS, &[&name, &block])?;
            let (fresh, next): (i64, Option<i64>) =
                first(&rows, |row| Ok((row.try_get(0)?, row.try_get(1)?)))?;
            match next {
                _ if fresh > 0 => return Ok(Some(true)),
                Some(next) => block = next,
                None => return Ok(Some(false)),
            }
        }
        Ok(None)
    }

    /// Drops a partition if it may go. Who calls this has looked whether it has fresh events
    /// ([`PartitionSession::has_fresh`]).
    ///
    /// # Errors
    /// As [`PartitionSession::list`]; there is no such partition (42P01).
    pub fn drop(&mut self, name: &str, retention: Duration) -> Result<Dropped, StoreError> {
        let rows = self.step(&DROP_PARTITION, &[&name, &seconds(retention)])?;
        let outcome: String = first(&rows, |row| row.try_get(0))?;
        match outcome.as_str() {
            "dropped" => Ok(Dropped::Dropped),
            "young" => Ok(Dropped::Young),
            "pending" => Ok(Dropped::Pending),
            "dead" => Ok(Dropped::Dead),
            "unread" => Ok(Dropped::Unread),
            "discarded" => Ok(Dropped::Discarded),
            "locked" => Ok(Dropped::Locked),
            other => Err(StoreError::refused(format!("outbox_drop_partition answered {other:?}"))),
        }
    }

    /// Deletes events older than the retention from some blocks of a partition, from `first_block` on.
    ///
    /// # Errors
    /// As [`PartitionSession::list`]; there is no such partition (42P01); a lock was not free (55P03).
    pub fn clean(
        &mut self,
        name: &str,
        first_block: i64,
        retention: Duration,
    ) -> Result<Cleaned, StoreError> {
        let rows = self.step(&CLEAN_PARTITION, &[&name, &first_block, &seconds(retention)])?;
        first(&rows, |row| Ok(Cleaned { deleted: row.try_get(0)?, next_block: row.try_get(1)? }))
    }

    /// One statement in a transaction with a limit. After an error the connection is of no further use.
    fn step(&mut self, statement: &Query, params: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, StoreError> {
        let timeout = format!("SET LOCAL statement_timeout = {}", milliseconds(UPKEEP_STEP));
        begin(&mut self.client, &timeout, &self.home)?;
        let rows = query(&mut self.client, statement, params)?;
        self.client.batch_execute("COMMIT").map_err(|error| StoreError::from(&error))?;
        Ok(rows)
    }
}

const UPKEEP_TURN: Query = query!("upkeep_turn");
const PARTITIONS: Query = query!("partitions", INT8);
const PARTITION_STATE: Query = query!("partition_state");
const MISSING_PARTITIONS: Query = query!("missing_partitions", INT4);
const CREATE_PARTITION: Query = query!("create_partition", TEXT);
const FRESH_BLOCKS: Query = query!("fresh_blocks", TEXT, INT8);
const DROP_PARTITION: Query = query!("drop_partition", TEXT, INT8);
const CLEAN_PARTITION: Query = query!("clean_partition", TEXT, INT8, INT8);

fn begin(client: &mut Client, setting: &str, home: &Home) -> Result<(), StoreError> {
    client
        .batch_execute(&format!(
            "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; {setting}; SELECT {}{NO_OTHER_LIMITS}",
            home.of_transaction()
        ))
        .map_err(|error| StoreError::from(&error))
}

fn query(
    client: &mut Client,
    statement: &Query,
    params: &[&(dyn ToSql + Sync)],
) -> Result<Vec<Row>, StoreError> {
    client.query_typed(statement.text, &typed(statement, params)).map_err(|error| StoreError::from(&error))
}

fn seconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_secs()).unwrap_or(i64::MAX)
}
