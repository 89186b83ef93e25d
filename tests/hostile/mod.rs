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
mod rows;

use std::sync::atomic::{AtomicBool, Ordering};

/// Stops those who wait for this flag, also when a test fails: its scope waits for them.
struct Stopping<'a>(&'a AtomicBool);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
