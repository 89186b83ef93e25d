//! What the pool keeps: clients with their prepared statements, and how it makes and judges them.
//!
//! The pool's [`Manager`] stands on those of `r2d2_postgres`. One of these has one configuration and one kind of TLS for
//! all the connections it makes, while a connection of ours may go to any host of the DSN, in clear or over TLS. So
//! [`Target::connect`] makes one of them for each try, and that one connects; the one that succeeded stays with its
//! connection, and says whether the connection is valid and whether it is broken. Ours adds what theirs cannot know: which
//! host is next, which statements are prepared, how old a connection is, and that one is doomed.
//!
//! Connections are made on the threads of the pool, and given back on whichever thread used them. What a statement's error
//! means for a connection is decided in `connection.rs`.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use log::debug;
use postgres::{Client, Statement};
use r2d2::{HandleError, ManageConnection};

use super::StoreError;
use super::query::Query;
use super::target::{Made, Maker, Target};

/// What the pool keeps: a client, its prepared statements, and whether it may be used again. The client is dropped
/// first: a statement that is dropped before its connection would be closed on whatever server process is there.
pub(super) struct PooledClient {
    pub(super) client: Client,
    /// Judges it.
    maker: Maker,
    pub(super) doomed: bool,
    /// How many ages had ended when it was made.
    pub(super) age: u64,
    /// The server process of its first transaction.
    pub(super) served_by: Option<i32>,
    statements: HashMap<&'static str, Statement>,
}

impl PooledClient {
    /// Whether all of these are prepared here.
    pub(super) fn has_prepared(&self, queries: &[&Query]) -> bool {
        queries.iter().all(|query| self.statements.contains_key(query.name))
    }

    pub(super) fn prepared(&mut self, query: &Query) -> Result<Statement, postgres::Error> {
        if let Some(statement) = self.statements.get(query.name) {
            return Ok(statement.clone());
        }
        let statement = self.client.prepare_typed(query.text, query.types)?;
        self.statements.insert(query.name, statement.clone());
        Ok(statement)
    }
}

/// What the pool opens and judges connections with.
pub(super) struct Manager {
    pub(super) target: Target,
    pub(super) age: Arc<AtomicU64>,
}

impl ManageConnection for Manager {
    type Connection = PooledClient;
    type Error = StoreError;

    fn connect(&self) -> Result<PooledClient, StoreError> {
        let age = self.age.load(Ordering::Relaxed);
        let Made { client, maker } = self.target.connect()?;
        Ok(PooledClient { client, maker, doomed: false, age, served_by: None, statements: HashMap::new() })
    }

    fn is_valid(&self, pooled: &mut PooledClient) -> Result<(), StoreError> {
        pooled.maker.is_valid(&mut pooled.client).map_err(|error| StoreError::from(&error))
    }

    fn has_broken(&self, pooled: &mut PooledClient) -> bool {
        pooled.doomed || pooled.maker.has_broken(&mut pooled.client)
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
