//! A point in time as PostgreSQL keeps it.
//!
//! The time of an event is a part of its primary key, so what is read must come back exactly. Types for dates round,
//! or refuse what PostgreSQL takes; this one is the server's own number, and says nothing about calendars.

// `BytesMut` is the name that `to_sql_checked!` itself has for what `ToSql` writes to.
use postgres::types::private::BytesMut;
use postgres::types::{FromSql, IsNull, ToSql, Type, accepts, to_sql_checked};

/// `timestamptz` as PostgreSQL keeps it, microseconds since 2000-01-01 UTC, so that what is read comes back
/// exactly: also `infinity`, and years that date types refuse.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timestamptz(pub(super) i64);

impl FromSql<'_> for Timestamptz {
    fn from_sql(_: &Type, raw: &[u8]) -> Result<Timestamptz, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Timestamptz(i64::from_be_bytes(raw.try_into()?)))
    }

    accepts!(TIMESTAMPTZ);
}

impl ToSql for Timestamptz {
    fn to_sql(
        &self,
        _: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        out.extend_from_slice(&self.0.to_be_bytes());
        Ok(IsNull::No)
    }

    accepts!(TIMESTAMPTZ);
    to_sql_checked!();
}
