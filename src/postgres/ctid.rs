//! Where a version of a row is, on the wire.
//!
//! A settle names the place of each row that it read, so the place comes back as it came: four bytes of block and two of
//! the row within it.

// `BytesMut` is the name that `to_sql_checked!` itself has for what `ToSql` writes to.
use postgres::types::private::BytesMut;
use postgres::types::{FromSql, IsNull, ToSql, Type, accepts, to_sql_checked};

use crate::event::Place;

impl FromSql<'_> for Place {
    fn from_sql(_: &Type, raw: &[u8]) -> Result<Place, Box<dyn std::error::Error + Sync + Send>> {
        let (block, offset) = raw.split_at_checked(4).ok_or("a ctid has six bytes")?;
        Ok(Place {
            block: u32::from_be_bytes(block.try_into()?),
            offset: u16::from_be_bytes(offset.try_into()?),
        })
    }

    accepts!(TID);
}

impl ToSql for Place {
    fn to_sql(
        &self,
        _: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        out.extend_from_slice(&self.block.to_be_bytes());
        out.extend_from_slice(&self.offset.to_be_bytes());
        Ok(IsNull::No)
    }

    accepts!(TID);
    to_sql_checked!();
}
