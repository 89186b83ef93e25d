//! Which life of a PostgreSQL server a claim was made in.
//!
//! Every claim reads it with its lanes, in the claimer's thread, and the claimer compares it with the one before: what a
//! server is known to have settled says nothing about another server, nor about the same one after a crash. Plain data,
//! read from a row; it decides nothing and asks nothing itself.

use postgres::Row;

use super::timestamptz::Timestamptz;

/// One life of a server: another one may have forgotten what was settled in this one, as settles need not have been
/// on disk when it crashed, nor have reached the standby that took over. Two different lives are never equal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ServerLife {
    /// When the server was started; microseconds since 2000-01-01 UTC.
    started: i64,
    /// When its statistics began: also at every recovery from a crash of one of its processes.
    recovered: i64,
}

impl ServerLife {
    pub(super) fn read(row: &Row) -> Result<ServerLife, postgres::Error> {
        let recovered: Option<Timestamptz> = row.try_get(2)?;
        Ok(ServerLife {
            started: row.try_get::<_, Timestamptz>(1)?.0,
            recovered: recovered.map_or(0, |Timestamptz(at)| at),
        })
    }
}
