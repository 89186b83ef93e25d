//! Input that nobody should send: rows of every kind, NATS servers and PostgreSQL connections that break off or lie,
//! clients that do not behave.
//!
//! What must hold is the same for all: the pipeline goes on, keys that have nothing to do with it are delivered in a
//! moment, every event ends published or as a dead letter with a reason, and what reaches the stream is read alike by
//! clients that share no code. Rows and clients meet real servers. Only the servers that lie are our own, as a real one
//! does not; a real one takes over from each.

mod http;
mod liar;
mod nats;
mod postgres;
mod properties;
mod rows;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};

use super::harness::{TestDb, TestStream};

/// Stops those who wait for this flag, also when a test fails: its scope waits for them.
struct Stopping<'a>(&'a AtomicBool);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Every row is in the stream, once, and the rows of a key are in their order.
fn assert_stored_once_and_in_order(db: &TestDb, stream: &TestStream) {
    let messages = stream.messages();
    let rows = db.number("SELECT count(*) FROM outboxes WHERE published_at IS NOT NULL");
    assert_eq!((db.dead(), db.pending(), i64::try_from(messages.len()).unwrap()), (0, 0, rows));
    let mut last: HashMap<&str, i64> = HashMap::new();
    for message in &messages {
        let key = message.header("ordering-key").unwrap();
        let seq = message.header("Outbox-Seq").unwrap().parse().unwrap();
        let before = last.insert(key, seq).unwrap_or(0);
        assert!(before < seq, "{key}: {before} before {seq}");
    }
}
