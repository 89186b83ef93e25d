//! Plain sessions, for the bench: they load events, write some at a pace, and hold a snapshot open.
//!
//! Outside the pool, without a claim's settings, and nothing of the service uses them. What they run is the bench's
//! own text; errors are the store's.

use std::time::Duration;

use postgres::{Client, Statement};

use super::{DsnParts, Secret, StoreError, Target, connect};

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A session.
pub struct Plain {
    client: Client,
}

/// A session with one prepared INSERT.
pub struct Insert {
    client: Client,
    statement: Statement,
}

/// A session with one prepared INSERT of a row.
pub struct RowInsert {
    client: Client,
    statement: Statement,
}

impl Plain {
    /// Connects, with what the DSN does not say from `parts`; `name` is what `pg_stat_activity` shows behind `pg-outbox/`.
    ///
    /// # Errors
    /// The DSN is malformed, or PostgreSQL is out of reach or refuses.
    pub fn connect(dsn: &Secret, parts: &DsnParts, name: &str) -> Result<Plain, StoreError> {
        Ok(Plain { client: connect(&Target::new(dsn, parts, name, CONNECT_TIMEOUT)?)? })
    }

    /// Runs statements, separated by semicolons.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn run(&mut self, sql: &str) -> Result<(), StoreError> {
        self.client.batch_execute(sql).map_err(|error| StoreError::from(&error))
    }

    /// The one `bigint` that a statement returns.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses, or returns something else.
    pub fn number(&mut self, sql: &str) -> Result<i64, StoreError> {
        let row = self.client.query_one(sql, &[]).map_err(|error| StoreError::from(&error))?;
        row.try_get(0).map_err(|error| StoreError::from(&error))
    }

    /// The one `text` that a statement returns.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses, or returns something else.
    pub fn text(&mut self, sql: &str) -> Result<String, StoreError> {
        let row = self.client.query_one(sql, &[]).map_err(|error| StoreError::from(&error))?;
        row.try_get(0).map_err(|error| StoreError::from(&error))
    }

    /// Rows of three columns of type `text`.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses, or returns something else.
    pub fn rows(&mut self, sql: &str) -> Result<Vec<[String; 3]>, StoreError> {
        let rows = self.client.query(sql, &[]).map_err(|error| StoreError::from(&error))?;
        rows.iter()
            .map(|row| Ok([row.try_get(0)?, row.try_get(1)?, row.try_get(2)?]))
            .collect::<Result<_, postgres::Error>>()
            .map_err(|error| StoreError::from(&error))
    }

    /// Makes this session one that repeats `sql`, an INSERT of one row with three parameters of type `text`.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn into_row_insert(mut self, sql: &str) -> Result<RowInsert, StoreError> {
        let statement = self.client.prepare(sql).map_err(|error| StoreError::from(&error))?;
        Ok(RowInsert { client: self.client, statement })
    }

    /// Makes this session one that repeats `sql`, an INSERT with the parameters `$1 bigint` and `$2 bigint`.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn into_insert(mut self, sql: &str) -> Result<Insert, StoreError> {
        let statement = self.client.prepare(sql).map_err(|error| StoreError::from(&error))?;
        Ok(Insert { client: self.client, statement })
    }
}

impl Insert {
    /// Runs the INSERT as a transaction of its own; when this returns, it is committed.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn insert(&mut self, first: i64, last: i64) -> Result<(), StoreError> {
        self.client
            .execute(&self.statement, &[&first, &last])
            .map(|_| ())
            .map_err(|error| StoreError::from(&error))
    }
}

impl RowInsert {
    /// Inserts rows, a statement each, in one transaction; when this returns, it is committed.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn insert(&mut self, rows: &[[String; 3]]) -> Result<(), StoreError> {
        let mut insert = || -> Result<(), postgres::Error> {
            let mut transaction = self.client.transaction()?;
            for [first, second, third] in rows {
                transaction.execute(&self.statement, &[first, second, third])?;
            }
            transaction.commit()
        };
        insert().map_err(|error| StoreError::from(&error))
    }
}
