//! What the pool keeps and hands out: connections, their prepared statements, and when one must not be used again.
//!
//! Every use of a client goes through [`Connection::attempt`]: any error dooms the connection, as nobody knows what state
//! its transaction is in, and it is closed instead of going back. A connection also knows what its database's encoding
//! can store of a text.
//!
//! The pool's [`Manager`] stands on those of `r2d2_postgres`. One of these has one configuration and one kind of TLS for
//! all the connections it makes, while a connection of ours may go to any host of the DSN, in clear or over TLS. So
//! [`Target::connect`] makes one of them for each try, and that one connects; the one that succeeded stays with its
//! connection, and says whether the connection is valid and whether it is broken. Ours adds what theirs cannot know: which
//! host is next, which statements are prepared, how old a connection is, and that one is doomed.

use std::collections::HashMap;
use std::ops::DerefMut;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use log::debug;
// The name that `to_sql_checked!` itself has for what `ToSql` writes to.
use postgres::fallible_iterator::FallibleIterator;
use postgres::types::private::BytesMut;
use postgres::types::{FromSql, IsNull, ToSql, Type, accepts, to_sql_checked};
use postgres::{Client, Row, Statement};
use r2d2::{HandleError, ManageConnection};

use super::target::{Made, Maker, Target};
use super::{Shared, StoreError, sessions};

/// Encodings that take any character of ours. (SQL_ASCII takes any bytes.)
const WIDE_ENCODINGS: [&str; 2] = ["UTF8", "SQL_ASCII"];

/// A statement of `postgres/*.sql`, prepared once a connection where connections are sessions.
pub(super) struct Query {
    pub(super) name: &'static str,
    pub(super) text: &'static str,
    /// Of `$1`, `$2`, ...
    pub(super) types: &'static [Type],
}

/// A connection on loan from the pool. It goes back unless it is doomed or the pool has enough idle ones.
pub(super) struct Connection {
    pub(super) pooled: r2d2::PooledConnection<Manager>,
    pub(super) pool: r2d2::Pool<Manager>,
    pub(super) shared: Arc<Shared>,
}

impl Connection {
    /// Begins a transaction by statements of which the last one returns [`super::SERVED_BY`].
    pub(super) fn begin(&mut self, text: &str) -> Result<(), StoreError> {
        let messages = self.attempt(|session| session.client.simple_query(text))?;
        let now = sessions::last_number(&messages).unwrap_or_default();
        let encoding = sessions::from_the_end(&messages, 2).unwrap_or(WIDE_ENCODINGS[0]);
        self.shared.narrow.store(!WIDE_ENCODINGS.contains(&encoding), Ordering::Relaxed);
        let before = *self.pooled.served_by.get_or_insert(now);
        let moved = self.shared.preparing.moved(before, now);
        self.pooled.doomed |= moved.is_err();
        moved
    }

    pub(super) fn batch(&mut self, text: &str) -> Result<(), StoreError> {
        self.attempt(|session| session.client.batch_execute(text))
    }

    pub(super) fn query(
        &mut self,
        query: &Query,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, StoreError> {
        let prepares = self.shared.preparing.is_on();
        self.attempt(|session| {
            if !prepares {
                return session.client.query_typed(query.text, &typed(query, params));
            }
            let statement = session.prepared(query)?;
            session.client.query(&statement, params)
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
        self.attempt(|session| {
            let rows = if prepares {
                let statement = session.prepared(query)?;
                session.client.query_raw(&statement, params.iter().copied())?
            } else {
                session.client.query_typed_raw(query.text, typed(query, params))?
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
        self.attempt(|session| {
            if !prepares {
                return session.client.execute_typed(query.text, &typed(query, params));
            }
            let statement = session.prepared(query)?;
            session.client.execute(&statement, params)
        })
    }

    /// Every use of the client goes through here: any error dooms the connection.
    pub(super) fn attempt<T>(
        &mut self,
        work: impl FnOnce(&mut Session) -> Result<T, postgres::Error>,
    ) -> Result<T, StoreError> {
        let session = self.pooled.deref_mut();
        let result = work(session);
        session.doomed |= result.is_err();
        let age = session.age;
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

/// What the pool keeps: a client, its prepared statements, and whether it may be used again. The client is dropped
/// first: a statement that is dropped before its connection would be closed on whatever server process is there.
pub(super) struct Session {
    pub(super) client: Client,
    /// Judges it.
    maker: Maker,
    pub(super) doomed: bool,
    /// How many ages had ended when it was made.
    pub(super) age: u64,
    /// The server process of its first transaction.
    served_by: Option<i32>,
    statements: HashMap<&'static str, Statement>,
}

impl Session {
    /// Whether all of these are prepared here.
    pub(super) fn has_prepared(&self, queries: &[&Query]) -> bool {
        queries.iter().all(|query| self.statements.contains_key(query.name))
    }

    fn prepared(&mut self, query: &Query) -> Result<Statement, postgres::Error> {
        if let Some(statement) = self.statements.get(query.name) {
            return Ok(statement.clone());
        }
        let statement = self.client.prepare_typed(query.text, query.types)?;
        self.statements.insert(query.name, statement.clone());
        Ok(statement)
    }
}

/// The parameters of a statement, each with its type.
pub(super) fn typed<'p>(
    query: &Query,
    params: &[&'p (dyn ToSql + Sync)],
) -> Vec<(&'p (dyn ToSql + Sync), Type)> {
    params.iter().copied().zip(query.types.iter().cloned()).collect()
}

/// What the pool opens and judges connections with.
pub(super) struct Manager {
    pub(super) target: Target,
    pub(super) age: Arc<AtomicU64>,
}

impl ManageConnection for Manager {
    type Connection = Session;
    type Error = StoreError;

    fn connect(&self) -> Result<Session, StoreError> {
        let age = self.age.load(Ordering::Relaxed);
        let Made { client, maker } = self.target.connect()?;
        Ok(Session { client, maker, doomed: false, age, served_by: None, statements: HashMap::new() })
    }

    fn is_valid(&self, session: &mut Session) -> Result<(), StoreError> {
        session.maker.is_valid(&mut session.client).map_err(|error| StoreError::from(&error))
    }

    fn has_broken(&self, session: &mut Session) -> bool {
        session.doomed || session.maker.has_broken(&mut session.client)
    }
}

/// The caller who waits for a connection reports why there is none, once; r2d2 would at every try.
#[derive(Debug)]
pub(super) struct LogAtDebug;

impl HandleError<StoreError> for LogAtDebug {
    fn handle_error(&self, error: StoreError) {
        debug!("connect to postgres failed, will try again: {error}");
    }
}

/// `timestamptz` as PostgreSQL keeps it, microseconds since 2000-01-01 UTC, so that what is read comes back
/// exactly: also `infinity`, and years that date types refuse.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timestamp(pub(super) i64);

impl FromSql<'_> for Timestamp {
    fn from_sql(_: &Type, raw: &[u8]) -> Result<Timestamp, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Timestamp(i64::from_be_bytes(raw.try_into()?)))
    }

    accepts!(TIMESTAMPTZ);
}

impl ToSql for Timestamp {
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

/// Which characters a database has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Width {
    Any,
    /// These at least.
    Ascii,
}

fn storable(text: &str, max_chars: usize, width: Width) -> String {
    let mut stored = String::with_capacity(text.len());
    for c in text.chars().take(max_chars) {
        match width {
            _ if c == '\0' => stored.push('?'),
            Width::Ascii if !c.is_ascii() => stored.extend(c.escape_unicode()),
            Width::Any | Width::Ascii => stored.push(c),
        }
    }
    stored
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_texts_can_be_stored() {
        assert_eq!(storable("a\0b", 3, Width::Any), "a?b");
        assert_eq!(storable("a\0ä中", 4, Width::Ascii), "a?\\u{e4}\\u{4e2d}");
        assert_eq!(storable(&"ä".repeat(5_000), 2_000, Width::Any).chars().count(), 2_000);
    }
}
