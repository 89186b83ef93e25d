//! Bringing the schema up to date.
//!
//! Each migration is one file of `schema/`, which is one transaction and records its version; run again it does nothing.
//! They run on a connection of their own, on the thread of the command, and for as long as they take: limits that a role
//! or a server sets for its usual work are lifted. A migration that fails leaves nothing behind. There is no way back down.

use postgres::Client;
use postgres::error::SqlState;

use super::home::Home;
use super::target::Target;
use super::{Store, StoreError, connect};
use crate::config::Database;

/// The version of the schema that claims know. (Version 1 was never released.)
pub(super) const SCHEMA_VERSION: i32 = 2;
/// The migrations in order; each records its version in `outbox_schema` and does nothing the second time.
pub(super) const MIGRATIONS: &[(i32, &str)] =
    &[(SCHEMA_VERSION, include_str!("../../schema/001_outbox.sql"))];

/// What migrating did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Migrated {
    /// Versions applied now, in order; empty when the schema was up to date.
    pub applied: Vec<i32>,
    /// Version of the schema now.
    pub version: i32,
    /// Rows of `outbox_lanes` that were missing and are back.
    pub mended: i64,
}

impl Store {
    /// Brings the schema up to date over a connection of its own, and puts lanes back that are missing. `order` is what a key
    /// is (`key`, `topic` or `all`), chosen by the first migration; `None` is `key` then, and whatever it is later.
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
        let mend = format!("SELECT {}()", home.qualified("outbox_mend_lanes"));
        let mended = match in_transaction(&mut client, &mend) {
            Ok(mended) => mended,
            // Somebody has the whole table locked. A second run waits for nobody, and the daemon mends lanes as well.
            Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => 0,
            Err(error) => return Err(sql(error)),
        };
        let applied = MIGRATIONS.iter().map(|(version, _)| *version).filter(|version| *version > before);
        Ok(Migrated { applied: applied.collect(), version, mended })
    }
}

/// The number that a statement answers, in a transaction that may write whatever the role's sessions begin with.
fn in_transaction(client: &mut Client, statement: &str) -> Result<i64, postgres::Error> {
    let mut transaction = client.build_transaction().read_only(false).start()?;
    let number = transaction.query_typed_one(statement, &[])?.get(0);
    transaction.commit()?;
    Ok(number)
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

/// Works with the schema that it knows, and with no other: another one may mean something else by the same rows. Every claim
/// asks, in its own transaction.
///
/// # Errors
/// The schema is of another version; the text says what to do.
pub(super) fn check_version(version: i32) -> Result<(), StoreError> {
    let problem = match version {
        SCHEMA_VERSION => return Ok(()),
        ..1 => "the adoption of table outboxes is not done: run `pg-outbox migrate --adopt`".to_owned(),
        1..SCHEMA_VERSION => format!(
            "the schema is of version {version}, from before the first release: stop every pg-outbox that works on it, and run \
             `pg-outbox migrate --adopt`"
        ),
        _ => format!(
            "the schema is of version {version}, and this pg-outbox works with version {SCHEMA_VERSION}: install the pg-outbox \
             that belongs to it; nothing is claimed"
        ),
    };
    Err(StoreError::refused(problem))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_version_of_the_schema_is_refused_with_what_to_do() {
        assert_eq!(check_version(SCHEMA_VERSION), Ok(()));
        for (version, part) in [
            (0, "is not done: run `pg-outbox migrate --adopt`"),
            (1, "stop every pg-outbox"),
            (SCHEMA_VERSION + 1, "install the pg-outbox that belongs to it; nothing is claimed"),
        ] {
            let error = check_version(version).unwrap_err();
            assert!(error.to_string().contains(part) && !error.is_outage(), "{version}: {error}");
        }
        let schema = MIGRATIONS[0].1;
        assert!(schema.contains(&format!("INSERT INTO outbox_schema (version) VALUES ({SCHEMA_VERSION})")));
        assert_eq!(
            schema.matches(&format!("outbox_schema WHERE version = {SCHEMA_VERSION}")).count(),
            schema.matches("outbox_schema WHERE version =").count()
        );
    }
}
