//! The open transaction of a claim.
//!
//! It is begun by the claimer's thread, travels with the claim to a worker, and holds the connection, and with it the
//! locks on the lanes, for as long as it is there. It ends once, by a commit or by a rollback, and dropping it rolls it
//! back, whatever became of its owner. A statement asked of it after its end is an error, never a statement outside of a
//! transaction. It never begins one: `Store::open` does.

use log::debug;
use postgres::Row;
use postgres::types::ToSql;

use super::StoreError;
use super::connection::Connection;
use super::query::Query;

/// An open transaction; dropping it rolls it back. `None` once it has ended.
pub(super) struct Transaction(pub(super) Option<Connection>);

impl Transaction {
    pub(super) fn query(
        &mut self,
        query: &Query,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, StoreError> {
        match self.0.as_mut() {
            Some(connection) => connection.query(query, params),
            None => Err(StoreError::outage("the claim has ended".into())),
        }
    }

    pub(super) fn query_each<T>(
        &mut self,
        query: &Query,
        params: &[&(dyn ToSql + Sync)],
        read: impl Fn(&Row) -> Result<T, postgres::Error>,
    ) -> Result<Vec<T>, StoreError> {
        match self.0.as_mut() {
            Some(connection) => connection.query_each(query, params, read),
            None => Err(StoreError::outage("the claim has ended".into())),
        }
    }

    pub(super) fn roll_back(&mut self) -> Result<(), StoreError> {
        self.0.take().map_or(Ok(()), |mut connection| connection.batch("ROLLBACK"))
    }
}

impl Drop for Transaction {
    fn drop(&mut self) {
        if let Err(error) = self.roll_back() {
            debug!("rollback of a dropped claim failed; its connection is closed: {error}");
        }
    }
}
