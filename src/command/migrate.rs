//! `pg-outbox migrate`: brings the schema up to date and says what it did.
//!
//! Runs on the main thread, over one connection of its own. The files of `schema/` are built into the program,
//! so that the schema and the statements that use it are of one version. Running it again changes nothing;
//! two at once wait for each other. It never changes an order of events that was chosen before. A table `outboxes` that
//! another program made is refused, unless it is to be adopted.

use std::io::Write;

use anyhow::{Context, Result};

use crate::config::Database;
use crate::postgres::{Adopting, Migrated, Store};

/// What makes events wait for each other, chosen by the first migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OrderingScope {
    /// The metadata field `ordering-key`, else the topic.
    Key,
    /// The topic alone.
    Topic,
    /// Everything: one order over all events.
    All,
}

impl OrderingScope {
    /// Its name in the schema and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            OrderingScope::Key => "key",
            OrderingScope::Topic => "topic",
            OrderingScope::All => "all",
        }
    }
}

/// Applies what is missing and prints a line for each version applied, or one that says that none was; and one more if it
/// put lanes back that somebody had deleted.
/// `order` is only needed by the first migration, where `None` means [`OrderingScope::Key`].
///
/// # Errors
/// PostgreSQL is out of reach, older than 14, or refuses; the schema has another order than the one asked
/// for; `out` cannot be written. A migration that fails leaves nothing behind.
pub fn run(database: &Database, order: Option<OrderingScope>, out: &mut impl Write) -> Result<()> {
    let Migrated { applied, version, mended } =
        Store::migrate(database, order.map(OrderingScope::name)).context("migrate the schema")?;
    for version in &applied {
        writeln!(out, "schema version {version} applied")?;
    }
    if applied.is_empty() {
        writeln!(out, "schema is up to date, at version {version}")?;
    }
    if mended > 0 {
        writeln!(out, "{mended} rows of table outbox_lanes were missing, and are back")?;
    }
    Ok(())
}

/// Makes an outbox of a table that is there, while its writers go on, and prints a line for each step. With
/// [`Adopting::Dry`] only what would be done, with its statements.
///
/// # Errors
/// As [`run`]; the table cannot be adopted, and the text says why and what to do; a lock was not free for two minutes.
/// What is done stays, and the next run goes on from there.
pub fn adopt(
    database: &Database,
    order: Option<OrderingScope>,
    adopting: Adopting,
    out: &mut impl Write,
) -> Result<()> {
    let mut written = Ok(());
    let mut say = |line: &str| {
        if written.is_ok() {
            written = writeln!(out, "{line}").and_then(|()| out.flush());
        }
    };
    let steps = Store::adopt(database, order.map(OrderingScope::name), adopting, &mut say)
        .context("adopt the table")?;
    written?;
    match (adopting, steps) {
        (_, 0) => writeln!(out, "nothing is missing")?,
        (Adopting::Real, _) => {
            writeln!(out, "adopted, in {steps} steps; pg-outbox check says whether all is ready")?;
        }
        (Adopting::Dry, _) => writeln!(out, "{steps} steps; nothing was changed")?,
    }
    Ok(())
}
