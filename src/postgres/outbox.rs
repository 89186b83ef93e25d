//! What is asked of the outbox as a whole: what waits in it, how far it can be read, and whether it is all there.
//!
//! The claimer's thread asks for the horizon and the outlook, the thread of the gauges for the backlog, and both the
//! claimer's and commands for the schema. Each is one short transaction that only reads, over a connection of the pool,
//! with a limit on its time. Nothing here locks a lane or changes a row; counting what waits is the only question whose
//! cost grows with the answer.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::begin::begin_reading;
use super::query::Query;
use super::{STATEMENT_TIMEOUT, Store, StoreError, first, read_all};
use crate::lane::LANES;
use crate::lane::marks::{HorizonReading, OpenWriter};

/// The backlog is worth this much and no more.
pub(super) const BACKLOG_TIMEOUT: Duration = Duration::from_secs(10);

const LAST_SEQ: Query = query!("last_seq");
const OPEN_WRITERS: Query = query!("open_writers");
const OUTLOOK: Query = query!("outlook", INT8);
const BACKLOG: Query = query!("backlog");
const SCHEMA_PROBLEMS: Query = query!("schema_problems");
const HIDDEN: Query = query!("hidden");
const MISSING_LANES: Query = query!("missing_lanes");
const SERVER_VERSION: Query = query!("server_version");

/// What waits in the outbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backlog {
    /// Events neither published nor dead, those in retry included.
    pub pending: i64,
    /// Events in retry, due or not.
    pub retrying: i64,
    /// Dead letters.
    pub dead: i64,
    /// Age of the oldest pending event; zero when there is none.
    pub lag: Duration,
}

/// What may make something claimable without any notification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outlook {
    /// Time until the earliest event in retry is due, zero if one is; `None` when no event is in retry.
    pub next_due: Option<Duration>,
    /// Somebody has a claim open. Should it be released, or its instance die, its events are there again.
    pub claims_open: bool,
}

impl Store {
    /// What bounds the cursors, as `lane/marks.rs` wants it read; `None` where events can appear below any bound, as
    /// `seq` does not come from a sequence of its own without a cache.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn horizon(&self) -> Result<Option<HorizonReading>, StoreError> {
        let mut connection = self.begin(&begin_reading(STATEMENT_TIMEOUT, &self.shared.home))?;
        let last_seq: Option<i64> = first(&connection.query(&LAST_SEQ, &[])?, |row| row.try_get(0))?;
        let rows = connection.query(&OPEN_WRITERS, &[])?;
        connection.batch("COMMIT")?;
        let writers =
            read_all(&rows, |row| Ok(OpenWriter { name: row.try_get(0)?, prepared: row.try_get(1)? }))?;
        Ok(last_seq.map(|last_seq| HorizonReading { last_seq, writers: writers.into_iter().collect() }))
    }

    /// What an empty claim may be waiting for.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn outlook(&self) -> Result<Outlook, StoreError> {
        let backoff_max_ms = self.shared.backoff_max_ms.load(Ordering::Relaxed);
        let rows = self.read(STATEMENT_TIMEOUT, &OUTLOOK, &[&backoff_max_ms])?;
        let (due_ms, claims_open): (Option<i64>, bool) =
            first(&rows, |row| Ok((row.try_get(0)?, row.try_get(1)?)))?;
        Ok(Outlook {
            next_due: due_ms.map(|ms| Duration::from_millis(ms.max(0).unsigned_abs())),
            claims_open,
        })
    }

    /// Counts what waits. Costs about 0.2 s of PostgreSQL for a million pending events, more where vacuum
    /// has not been; the server gives up after 10 s.
    ///
    /// # Errors
    /// PostgreSQL is out of reach, refuses, or needed more than 10 s (SQLSTATE 57014).
    pub fn backlog(&self) -> Result<Backlog, StoreError> {
        let rows = self.read(BACKLOG_TIMEOUT, &BACKLOG, &[])?;
        first(&rows, |row| {
            let lag_us: i64 = row.try_get::<_, Option<i64>>(3)?.unwrap_or(0);
            Ok(Backlog {
                pending: row.try_get(0)?,
                retrying: row.try_get(1)?,
                dead: row.try_get(2)?,
                lag: Duration::from_micros(lag_us.max(0).unsigned_abs()),
            })
        })
    }

    /// The server's version as a number: 150004 is 15.4.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn server_version(&self) -> Result<i32, StoreError> {
        let rows = self.read(STATEMENT_TIMEOUT, &SERVER_VERSION, &[])?;
        first(&rows, |row| row.try_get(0))
    }

    /// What the schema lacks, each with the command that adds it; empty when the schema is complete.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn schema_problems(&self) -> Result<Vec<String>, StoreError> {
        let rows = self.read(STATEMENT_TIMEOUT, &SCHEMA_PROBLEMS, &[])?;
        let mut missing: Vec<String> = read_all(&rows, |row| row.try_get(0))?;
        // What a missing table would hold goes without saying.
        let whole = |what: &String| what.starts_with("table ");
        if missing.iter().any(whole) {
            missing.retain(whole);
        } else {
            let rows = self.read(STATEMENT_TIMEOUT, &MISSING_LANES, &[])?;
            let lanes: i64 = first(&rows, |row| row.try_get(0))?;
            if lanes > 0 {
                missing.push(format!("{lanes} of {LANES} rows of table outbox_lanes"));
            }
        }
        Ok(missing.into_iter().map(|what| format!("{what} is missing; run `pg-outbox migrate`")).collect())
    }

    /// What hides events from this role, in words; empty where nothing does.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses; among others, the schema is not there.
    pub fn hidden(&self) -> Result<Vec<String>, StoreError> {
        let tables: Vec<String> =
            read_all(&self.read(STATEMENT_TIMEOUT, &HIDDEN, &[])?, |row| row.try_get(0))?;
        let words = |table: String| {
            format!(
                "row-level security of table {table} may hide rows from this role, and what it hides is not published: \
                 give the role BYPASSRLS, or a policy FOR ALL USING (true)"
            )
        };
        Ok(tables.into_iter().map(words).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sql_has_as_many_lanes() {
        let schema = include_str!("../../schema/001_outbox.sql");
        let last = LANES - 1;
        assert!(schema.contains(&format!("CHECK (lane BETWEEN 0 AND {last})")));
        assert!(
            schema.contains(&format!(
                "INSERT INTO outbox_lanes SELECT lane FROM generate_series(0, {last}) AS"
            ))
        );
        // The lane of a key is the low bits of a byte.
        assert!(schema.contains(&format!("OPERATOR(pg_catalog.&) {last}\n")));
        assert!(LANES.count_ones() == 1 && LANES <= 256, "{last} masks whole lanes of a byte");
        assert!(include_str!("missing_lanes.sql").contains(&format!("SELECT {LANES} - count(*)")));
    }
}
