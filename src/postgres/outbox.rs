//! What is asked of the outbox as a whole: what waits in it, and whether it is all there.
//!
//! The claimer's thread asks whether others have claims open, the thread of the gauges for the backlog, and both the
//! claimer's and commands for the schema. Each is one short transaction that only reads, over a connection of the pool,
//! with a limit on its time. Nothing here locks a lane or changes a row, but for mending the lanes, which puts missing rows
//! back; counting what waits is the only question whose cost grows with the answer.

use std::time::Duration;

use super::begin::begin_change;
use super::migrate::check_version;
use super::query::Query;
use super::sequence::{SEQUENCE_FAULTS, SequenceFault};
use super::{STATEMENT_TIMEOUT, Store, StoreError, first, read_all};
use crate::lane::LANES;

/// Longest wait for whoever has `outbox_lanes` locked.
const MEND_WAIT: Duration = Duration::from_secs(1);
/// The backlog is worth this much and no more.
pub(super) const BACKLOG_TIMEOUT: Duration = Duration::from_secs(10);

const CLAIMS_OPEN: Query = query!("claims_open");
const BACKLOG: Query = query!("backlog", INT8_ARRAY, INT8);
const SCHEMA_PROBLEMS: Query = query!("schema_problems");
const SCHEMA_VERSION: Query = query!("schema_version");
const HIDDEN: Query = query!("hidden");
const MISSING_ROWS: Query = query!("missing_rows");
const MEND_LANES: Query = query!("mend_lanes");
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
    /// How many lanes have no row: nobody claims the events of those.
    pub missing_lanes: i64,
}

/// Rows that the schema came with, and that somebody has deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MissingRows {
    /// Lanes.
    pub lanes: i64,
    /// The version of the schema.
    pub version: bool,
}

impl MissingRows {
    /// Each kind, in words.
    pub fn words(&self) -> Vec<String> {
        let lanes = (self.lanes > 0).then(|| format!("{} of {LANES} rows of table outbox_lanes", self.lanes));
        let version = self.version.then(|| "the row of table outbox_schema".to_owned());
        lanes.into_iter().chain(version).collect()
    }
}

impl Store {
    /// Whether somebody else has a claim open. Should it be released, or its instance die, its events are there again.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn claims_open(&self) -> Result<bool, StoreError> {
        first(&self.read(STATEMENT_TIMEOUT, &CLAIMS_OPEN, &[])?, |row| row.try_get(0))
    }

    /// Counts what waits, about: exact where no lane has more than `entries` above its mark, estimated beyond. `marks` are
    /// where each lane begins, by lane, as far as this instance knows; empty for where all instances may begin. Costs some
    /// 2 us of PostgreSQL for each entry; the server gives up after 10 s.
    ///
    /// # Errors
    /// PostgreSQL is out of reach, refuses, or needed more than 10 s (SQLSTATE 57014).
    pub fn backlog(&self, marks: &[i64], entries: i64) -> Result<Backlog, StoreError> {
        let rows = self.read(BACKLOG_TIMEOUT, &BACKLOG, &[&marks, &entries])?;
        first(&rows, |row| {
            let lag_us: i64 = row.try_get::<_, Option<i64>>(3)?.unwrap_or(0);
            Ok(Backlog {
                pending: row.try_get(0)?,
                retrying: row.try_get(1)?,
                dead: row.try_get(2)?,
                lag: Duration::from_micros(lag_us.max(0).unsigned_abs()),
                missing_lanes: row.try_get(4)?,
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

    /// What the schema lacks, or what is wrong with it, each with the command that mends it; empty when it is complete. A
    /// schema of another version is one problem.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn schema_problems(&self) -> Result<Vec<String>, StoreError> {
        let rows = self.read(STATEMENT_TIMEOUT, &SCHEMA_PROBLEMS, &[])?;
        let mut missing: Vec<(String, bool)> = read_all(&rows, |row| Ok((row.try_get(0)?, row.try_get(1)?)))?;
        // What a missing table would hold goes without saying.
        let is_table = |(what, _): &(String, bool)| what.starts_with("table ");
        let tables: Vec<(String, bool)> = missing.iter().filter(|what| is_table(what)).cloned().collect();
        if !tables.iter().any(|(what, _)| what.starts_with("table outbox_schema ")) {
            let rows = self.read(STATEMENT_TIMEOUT, &SCHEMA_VERSION, &[])?;
            if let Err(problem) = check_version(first(&rows, |row| row.try_get(0))?) {
                return Ok(vec![problem.to_string()]);
            }
        }
        if tables.is_empty() {
            let rows = self.missing_rows()?.words();
            missing.extend(rows.into_iter().map(|rows| (format!("{rows} is missing"), false)));
            for row in self.read(STATEMENT_TIMEOUT, &SEQUENCE_FAULTS, &[])? {
                missing.push((SequenceFault::read(&row)?.problem(), true));
            }
        } else {
            missing = tables;
        }
        let words = |(what, adopting): (String, bool)| {
            format!("{what}; run `pg-outbox migrate{}`", if adopting { " --adopt" } else { "" })
        };
        Ok(missing.into_iter().map(words).collect())
    }

    /// What is missing of the rows that the schema came with.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn missing_rows(&self) -> Result<MissingRows, StoreError> {
        let rows = self.read(STATEMENT_TIMEOUT, &MISSING_ROWS, &[])?;
        first(&rows, |row| Ok(MissingRows { lanes: row.try_get(0)?, version: row.try_get(1)? }))
    }

    /// Puts missing rows back, wakes all dispatchers, and returns how many lanes were missing; of several that do so at once, each
    /// what it has put back. Every instance then reads these lanes from their beginning.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses, or somebody has the table locked (55P03).
    pub fn mend_lanes(&self) -> Result<i64, StoreError> {
        let mut connection = self.begin(&begin_change(MEND_WAIT, &self.shared.home))?;
        let rows = connection.query(&MEND_LANES, &[])?;
        connection.batch("COMMIT")?;
        first(&rows, |row| row.try_get(0))
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
        // The lane of a key is the low bits of its hash.
        assert!(schema.contains(&format!("OPERATOR(pg_catalog.&) {last})::int\n")));
        assert_eq!(LANES.count_ones(), 1, "{last} masks whole lanes");
        assert!(include_str!("missing_rows.sql").contains(&format!("SELECT {LANES} - count(*),")));
        assert!(schema.contains(&format!("FROM generate_series(0, {last}) AS l(lane)\n")), "what mends them");
    }
}
