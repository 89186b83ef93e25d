//! Bringing the schema up to date.
//!
//! Each migration is one file of `schema/`, which is one transaction and records its version; run again it does nothing.
//! They run on a connection of their own, on the thread of the command, and for as long as they take: limits that a role
//! or a server sets for its usual work are lifted. A migration that fails leaves nothing behind. There is no way back down.

use postgres::Client;

use super::home::Home;
use super::target::Target;
use super::{Store, StoreError, connect};
use crate::config::Database;

/// The migrations in order; each records its version in `outbox_schema` and does nothing the second time.
pub(super) const MIGRATIONS: &[(i32, &str)] = &[(1, include_str!("../../schema/001_outbox.sql"))];

/// What migrating did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Migrated {
    /// Versions applied now, in order; empty when the schema was up to date.
    pub applied: Vec<i32>,
    /// Version of the schema now.
    pub version: i32,
}

impl Store {
    /// Brings the schema up to date over a connection of its own. `order` is what a key is (`key`, `topic` or `all`),
    /// chosen by the first migration; `None` is `key` then, and whatever it is later.
    ///
    /// # Errors
    /// PostgreSQL is out of reach, too old (below 14), or refuses; the schema is in another order. Nothing
    /// of a failed migration stays.
    pub fn migrate(database: &Database, order: Option<&str>) -> Result<Migrated, StoreError> {
        let target = Target::new(&database.dsn, &database.parts, "migrate", database.connect_timeout)?;
        let home = Home::new(database.schema.as_deref());
        let mut client = connect(&target)?;
        let before = schema_version(&mut client, &home)?;
        // What to do instead stands in the hint.
        let sql = |error: postgres::Error| {
            let hint = error.as_db_error().and_then(|db| db.hint()).map(|hint| format!("; {hint}"));
            let cause = StoreError::from(&error);
            StoreError { text: format!("{cause}{}", hint.unwrap_or_default()), ..cause }
        };
        let order = order.unwrap_or_default().replace('\'', "''");
        for (_, text) in MIGRATIONS {
            // In one message: the settings belong to the transaction that the file begins, and end with it. They take no
            // snapshot, so that the file may still choose the isolation level. What limits the role's usual work is
            // not meant for this.
            client
                .batch_execute(&format!(
                    "{}SET LOCAL pg_outbox.\"order\" = '{order}'; SET LOCAL statement_timeout = 0; \
                     SET LOCAL lock_timeout = 0; {text}",
                    home.statement_of_transaction()
                ))
                .map_err(sql)?;
        }
        let version = schema_version(&mut client, &home)?;
        let applied = MIGRATIONS.iter().map(|(version, _)| *version).filter(|version| *version > before);
        Ok(Migrated { applied: applied.collect(), version })
    }
}

/// The highest version recorded; 0 before the first migration.
pub(super) fn schema_version(client: &mut Client, home: &Home) -> Result<i32, StoreError> {
    let sql = |error: postgres::Error| StoreError::from(&error);
    let name = home.qualified("outbox_schema");
    let table = format!("SELECT to_regclass('{name}') IS NOT NULL");
    if !client.query_typed_one(&table, &[]).map_err(sql)?.get::<_, bool>(0) {
        return Ok(0);
    }
    let version = format!("SELECT coalesce(max(version), 0) FROM {name}");
    let row = client.query_typed_one(&version, &[]).map_err(sql)?;
    Ok(row.get(0))
}
