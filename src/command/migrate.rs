//! `pg-outbox migrate`: brings the schema up to date and says what it did.
//!
//! Runs on the main thread, over one connection of its own. The files of `schema/` are built into the program,
//! so that the schema and the statements that use it are of one version. Running it again changes nothing;
//! two at once wait for each other. It never changes an order of events that was chosen before.

use std::io::Write;

use anyhow::{Context, Result};

use crate::config::Database;
use crate::store::{Migrated, Store};

/// What makes events wait for each other, chosen by the first migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The metadata field `ordering-key`, else the topic.
    Key,
    /// The topic alone.
    Topic,
    /// Everything: one order over all events.
    All,
}

impl Order {
    fn name(self) -> &'static str {
        match self {
            Order::Key => "key",
            Order::Topic => "topic",
            Order::All => "all",
        }
    }
}

/// Applies what is missing and prints a line for each version applied, or one that says that none was.
/// `order` is only needed by the first migration, where `None` means [`Order::Key`].
///
/// # Errors
/// PostgreSQL is out of reach, older than 14, or refuses; the schema has another order than the one asked
/// for; `out` cannot be written. A migration that fails leaves nothing behind.
pub fn run(database: &Database, order: Option<Order>, out: &mut impl Write) -> Result<()> {
    let Migrated { applied, version } =
        Store::migrate(database, order.map(Order::name)).context("migrate the schema")?;
    for version in &applied {
        writeln!(out, "schema version {version} applied")?;
    }
    if applied.is_empty() {
        writeln!(out, "schema is up to date, at version {version}")?;
    }
    Ok(())
}
