//! A connection on loan from the pool: how statements are run, and when it must not be used again.
//!
//! Every use of a client goes through [`Connection::attempt`]: any error dooms the connection, as nobody knows what state
//! its transaction is in, and it is closed instead of going back. An error that ends a session may have ended all that
//! are as old, and dooms those too. Statements are prepared where connections are sessions (see `sessions.rs`), else sent
//! whole. A connection also knows what its database's encoding can store of a text. It runs on its caller's thread, and
//! blocks it until the server has answered.

use std::ops::DerefMut;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use postgres::Row;
use postgres::fallible_iterator::FallibleIterator;
use postgres::types::ToSql;

use super::pool::{Manager, PooledClient};
use super::query::{Query, typed};
use super::storable::{WIDE_ENCODINGS, Width, storable};
use super::{StoreError, StoreInner, sessions};

/// A connection on loan from the pool. It goes back unless it is doomed or the pool has enough idle ones.
pub(super) struct Connection {
    pub(super) pooled: r2d2::PooledConnection<Manager>,
    pub(super) pool: r2d2::Pool<Manager>,
    pub(super) shared: Arc<StoreInner>,
}

impl Connection {
    /// Begins a transaction by statements of which the last one returns [`super::SERVED_BY`].
    pub(super) fn begin(&mut self, text: &str) -> Result<(), StoreError> {
        let messages = self.attempt(|pooled| pooled.client.simple_query(text))?;
        let now = sessions::last_number(&messages).unwrap_or_default();
        let encoding = sessions::from_the_end(&messages, 2).unwrap_or(WIDE_ENCODINGS[0]);
        self.shared.narrow.store(!WIDE_ENCODINGS.contains(&encoding), Ordering::Relaxed);
        let before = *self.pooled.served_by.get_or_insert(now);
        let moved = self.shared.preparing.moved(before, now);
        self.pooled.doomed |= moved.is_err();
        moved
    }

    pub(super) fn batch(&mut self, text: &str) -> Result<(), StoreError> {
        self.attempt(|pooled| pooled.client.batch_execute(text))
    }

    pub(super) fn query(
        &mut self,
        query: &Query,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, StoreError> {
        let prepares = self.shared.preparing.is_on();
        self.attempt(|pooled| {
            if !prepares {
                return pooled.client.query_typed(query.text, &typed(query, params));
            }
            let statement = pooled.prepared(query)?;
            pooled.client.query(&statement, params)
        })
    }

    /// Like [`Connection::query`], but takes each row in as it comes, so that only one at a time is there as the server
    /// sent it.
    pub(super) fn query_each<T>(
        &mut self,
        query: &Query,
        params: &[&(dyn ToSql + Sync)],
        read: impl Fn(&Row) -> Result<T, postgres::Error>,
    ) -> Result<Vec<T>, StoreError> {
        let prepares = self.shared.preparing.is_on();
        self.attempt(|pooled| {
            let rows = if prepares {
                let statement = pooled.prepared(query)?;
                pooled.client.query_raw(&statement, params.iter().copied())?
            } else {
                pooled.client.query_typed_raw(query.text, typed(query, params))?
            };
            rows.map(|row| read(&row)).collect()
        })
    }

    pub(super) fn execute(
        &mut self,
        query: &Query,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<u64, StoreError> {
        let prepares = self.shared.preparing.is_on();
        self.attempt(|pooled| {
            if !prepares {
                return pooled.client.execute_typed(query.text, &typed(query, params));
            }
            let statement = pooled.prepared(query)?;
            pooled.client.execute(&statement, params)
        })
    }

    /// Every use of the client goes through here: any error dooms the connection.
    pub(super) fn attempt<T>(
        &mut self,
        work: impl FnOnce(&mut PooledClient) -> Result<T, postgres::Error>,
    ) -> Result<T, StoreError> {
        let pooled = self.pooled.deref_mut();
        let result = work(pooled);
        pooled.doomed |= result.is_err();
        let age = pooled.age;
        result.map_err(|error| {
            let error = StoreError::from(&error);
            if error.has_ended_the_session() {
                // It may have ended all that are as old.
                let _ = self.shared.age.compare_exchange(age, age + 1, Ordering::Relaxed, Ordering::Relaxed);
            }
            self.shared.preparing.failed(error)
        })
    }

    /// A text that PostgreSQL takes, of so many characters of `text` at most: a settle that it refuses would be tried for
    /// ever. It stores no NUL, and no character that the database's encoding does not have.
    pub(super) fn storable(&self, text: &str, max_chars: usize) -> String {
        let width = if self.shared.narrow.load(Ordering::Relaxed) { Width::Ascii } else { Width::Any };
        storable(text, max_chars, width)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // r2d2 has no limit on idle connections. Two that return at the same time may both find room.
        self.pooled.doomed |= self.pool.state().idle_connections >= self.shared.max_idle;
    }
}
