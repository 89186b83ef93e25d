//! The events of the bench: what is in them, which keys they have, and how they get into an outbox.
//!
//! An event has about 450 bytes of payload and metadata. Loading runs in several sessions at the same time, each on a
//! thread that ends with it; Ctrl-C ends it between two inserts.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::thread;

use anyhow::{Context, Result};

use super::run::go_on;
use super::testbed::Outbox;
use super::threads::join_all;
use crate::postgres::Plain;

/// Sessions that load events, and how many events each inserts at a time.
const LOADERS: usize = 2;
const LOAD_STEP: i64 = 10_000;

/// Which keys the events have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KeyDistribution {
    /// So many, by turns.
    Many(u64),
    /// One.
    One,
    /// Each event its own.
    Each,
}

impl KeyDistribution {
    /// The key of event `n`, as SQL.
    fn sql(self) -> String {
        match self {
            KeyDistribution::Many(keys) => format!("'key-' || n % {keys}"),
            KeyDistribution::One => "'key'".into(),
            KeyDistribution::Each => "'key-' || n".into(),
        }
    }
}

/// A SELECT of `number`, topic, metadata and payload of the events `first` to `last`, which are SQL: of about 450 bytes of
/// payload and metadata each.
fn events_sql(keys: KeyDistribution, number: &str, first: &str, last: &str) -> String {
    format!(
        "SELECT {number} 'order.placed' AS topic,
                jsonb_build_object('ordering-key', {}, 'content-type', 'application/json',
                                   'trace-id', md5(n::text), 'tenant', 'tenant-' || n % 7) AS metadata,
                jsonb_build_object('n', n, 'order', md5((n * 7)::text), 'customer', 'customer-' || n % 1000,
                                   'amount', n % 100000, 'currency', 'EUR', 'lines',
                                   jsonb_build_array(md5((n * 3)::text), md5((n * 5)::text), md5((n * 11)::text)),
                                   'note', repeat('It will be delivered. ', 4)) AS payload
           FROM generate_series({first}::bigint, {last}::bigint) AS n",
        keys.sql()
    )
}

/// An INSERT of events `$1` to `$2`.
pub(super) fn insert_sql(keys: KeyDistribution) -> String {
    format!("INSERT INTO outboxes (topic, metadata, payload) {}", events_sql(keys, "", "$1", "$2"))
}

/// Topic, metadata and payload of events 1 to `count`, as an application has them.
pub(super) fn texts(session: &mut Plain, keys: KeyDistribution, count: u64) -> Result<Vec<[String; 3]>> {
    let events = events_sql(keys, "", "1", &count.to_string());
    let texts = format!("SELECT topic, metadata::text, payload::text FROM ({events}) AS events");
    Ok(session.rows(&texts)?)
}

/// An INSERT of one event out of its [`texts`].
pub(super) const INSERT_ROW: &str = "INSERT INTO outboxes (topic, metadata, payload)
     VALUES ($1, $2::text::jsonb, $3::text::jsonb)";

/// An INSERT of events `$1` to `$2` out of those that [`prepare`] has made.
pub(super) const INSERT_PREPARED: &str = "INSERT INTO outboxes (topic, metadata, payload)
     SELECT topic, metadata, payload FROM prepared_events WHERE n BETWEEN $1 AND $2";

/// Makes events 1 to `count`, and lays them aside. Applications make theirs elsewhere; here that would take as much of
/// the processors as to insert them does.
pub(super) fn prepare(session: &mut Plain, keys: KeyDistribution, count: i64) -> Result<()> {
    let events = events_sql(keys, "n,", "1", &count.to_string());
    for sql in [
        "DROP TABLE IF EXISTS prepared_events",
        &format!("CREATE UNLOGGED TABLE prepared_events AS {events}"),
        "CREATE UNIQUE INDEX ON prepared_events (n)",
        "ANALYZE prepared_events",
    ] {
        session.run(sql)?;
    }
    Ok(())
}

/// Loads events 1 to `count` by `sql`, which is as [`insert_sql`] makes it: in several sessions at the same time, as
/// loading takes longer than draining.
pub(super) fn load(stop: &AtomicBool, outbox: &Outbox, sql: &str, count: u64) -> Result<()> {
    let count = i64::try_from(count).context("so many events")?;
    let next = &AtomicI64::new(1);
    let load_some = || -> Result<()> {
        let mut insert = outbox.session()?.into_insert(sql)?;
        loop {
            go_on(stop)?;
            let first = next.fetch_add(LOAD_STEP, Ordering::Relaxed);
            if first > count {
                return Ok(());
            }
            insert.insert(first, count.min(first + LOAD_STEP - 1))?;
        }
    };
    thread::scope(|scope| {
        let loaders: Vec<_> = (0..LOADERS).map(|_| scope.spawn(load_some)).collect();
        join_all(loaders).map(drop)
    })
}

/// Makes the outbox empty, and what it costs to write to it the same as ever.
pub(super) fn empty(session: &mut Plain) -> Result<()> {
    session.run("TRUNCATE outboxes")?;
    checkpoint(session);
    Ok(())
}

/// Only a superuser may, and nothing depends on it.
fn checkpoint(session: &mut Plain) {
    let _ = session.run("CHECKPOINT");
}
