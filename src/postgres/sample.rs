//! A sample of the open writers, as `lane/writers.rs` wants it taken.
//!
//! Two statements in one transaction, in a fixed order: first the server's life and L, then who holds the lock on the
//! sequence. Runs on the thread `sampler`. What fails half way is no sample, and the caller keeps the one before.

use postgres::Row;

use super::begin::begin_reading;
use super::query::Query;
use super::timestamptz::Timestamptz;
use super::{STATEMENT_TIMEOUT, Store, StoreError, first, read_all};
use crate::lane::LANES;
use crate::lane::marks::{KeptMarks, Marks};
use crate::lane::writers::{OpenWriter, ServerLife, WriterSample};

/// Stands for the version of a schema that does not say it.
const NO_VERSION: i32 = 0;

const SAMPLE: Query = query!("sample");
const OPEN_WRITERS: Query = query!("open_writers");
const KEEP_MARKS: Query =
    query!("keep_marks", INT4_ARRAY, INT8_ARRAY, INT4_ARRAY, INT8, TIMESTAMPTZ, TIMESTAMPTZ);

impl ServerLife {
    /// From the three columns that begin at `column`.
    pub(super) fn read(row: &Row, column: usize) -> Result<ServerLife, postgres::Error> {
        let recovered: Option<Timestamptz> = row.try_get(column + 1)?;
        Ok(ServerLife {
            started: row.try_get::<_, Timestamptz>(column)?.0,
            recovered: recovered.map_or(0, |Timestamptz(at)| at),
            sequence_file: row.try_get(column + 2)?,
        })
    }
}

/// What a sample is taken of, and what else is seen on the way.
#[derive(Debug, Clone)]
pub struct Sampled {
    /// The sample.
    pub sample: WriterSample,
    /// Rows are missing that the schema came with: a lane's, whose events would never be claimed, or its version.
    pub misses_rows: bool,
}

impl Store {
    /// Writes the shared marks that have risen, of lanes that nobody has claimed; returns how many lanes those were.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses.
    pub fn keep_marks(&self, marks: &Marks) -> Result<u64, StoreError> {
        let Some(kept) = marks.to_keep() else { return Ok(0) };
        let KeptMarks { life, lanes, marks, sweeps } = kept;
        let recovered = (life.recovered != 0).then_some(Timestamptz(life.recovered));
        let mut connection = self.begin(&self.shared.begin_claim)?;
        let kept = connection.execute(
            &KEEP_MARKS,
            &[&lanes, &marks, &sweeps, &life.sequence_file, &Timestamptz(life.started), &recovered],
        )?;
        connection.batch("COMMIT")?;
        Ok(kept)
    }

    /// Takes a sample.
    ///
    /// # Errors
    /// PostgreSQL is out of reach or refuses, or the schema is of another version.
    pub fn sample(&self) -> Result<Sampled, StoreError> {
        let mut connection = self.begin(&begin_reading(STATEMENT_TIMEOUT, &self.shared.home))?;
        let rows = connection.query(&SAMPLE, &[])?;
        let (life, last_value, version, lanes, next_xid) = first(&rows, |row| {
            let life = ServerLife::read(row, 0)?;
            Ok((life, row.try_get(3)?, row.try_get(4)?, row.try_get::<_, i64>(5)?, row.try_get(6)?))
        })?;
        let rows = connection.query(&OPEN_WRITERS, &[])?;
        connection.batch("COMMIT")?;
        let misses_rows = lanes < i64::from(LANES) || version == NO_VERSION;
        if version != NO_VERSION {
            super::migrate::check_version(version)?;
        }
        let writers = read_all(&rows, |row| {
            let xid: Option<i64> = row.try_get(1)?;
            Ok(OpenWriter { name: row.try_get(0)?, xid: xid.map(|xid| whole_xid(xid, next_xid)) })
        })?;
        Ok(Sampled { sample: WriterSample { life, last_value, writers }, misses_rows })
    }
}

/// The 64 bits of a transaction id of which 32 are known, and which is near the next one to be given out.
///
/// A transaction id wraps every 2^32 transactions, and no running one is further than 2^31 from the next
/// (<https://www.postgresql.org/docs/current/routine-vacuuming.html#VACUUM-FOR-WRAPAROUND>).
fn whole_xid(low: i64, next: i64) -> u64 {
    let distance = (low as u32).wrapping_sub(next as u32) as i32;
    next.saturating_add(i64::from(distance)).max(0) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_upper_half_of_a_transaction_id_is_that_of_its_time() {
        let epoch = 1_i64 << 32;
        for (low, next, whole) in [
            (700, 746, 700),
            (746, 746, 746),
            (747, 746, 747),
            (epoch - 1, epoch + 3, (epoch - 1) as u64),
            (3, epoch + 5, (epoch + 3) as u64),
            (4, epoch - 2, (epoch + 4) as u64),
            (5, 7 * epoch + 9, (7 * epoch + 5) as u64),
        ] {
            assert_eq!(whole_xid(low, next), whole, "{low} {next}");
        }
    }
}
