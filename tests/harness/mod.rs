//! What the tests stand on: servers, databases, streams, the built program, a workload and its judge.
//!
//! Everything a test gets here is its own, but for the two shared servers, which start with the first test that
//! needs them. Everything ends with the process that runs the tests, in whatever way it ends: the sandbox's guards
//! see to the servers and to every daemon. Waiting is done by [`wait_until`] alone, with a deadline that explains
//! itself. The judge reads NATS through a small client of its own ([`wire`]), so that it does not share
//! the mistakes of the client crate that the program uses. What a daemon or a command prints is searched for the
//! passwords that tests have planted ([`secrets`]).
#![allow(dead_code, unused_imports, reason = "the verbs are complete, whether or not each has its test yet")]

pub mod browser;
pub mod certificates;
pub mod cluster;
pub mod daemon;
pub mod database;
pub mod history;
pub mod notify;
pub mod pooler;
pub mod proxy;
pub mod secrets;
pub mod stream;
pub mod wire;
pub mod workload;

pub use cluster::Cluster;
pub use daemon::{Config, Daemon};
pub use database::{TestDb, database};
pub use history::{Committed, Evident, History, Row, RowState, Table, Verdict, check_all, check_history};
pub use notify::NotifySocket;
pub use pooler::{Mode, Pooler};
pub use stream::{Stored, TestStream, start_nats, stream};
pub use workload::{Workload, writers};

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pg_outbox::lab::sandbox::{NatsServer, PostgresServer};

/// Time between two looks of [`wait_until`].
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Something that can explain why a wait was in vain.
pub trait Evidence {
    /// Rows, stream state, the end of a log: what someone who looks for the cause wants to see first.
    fn evidence(&self) -> String;
}

impl Evidence for PostgresServer {
    fn evidence(&self) -> String {
        format!("--- log of postgres (port {})\n{}", self.port(), self.log_tail())
    }
}

impl Evidence for NatsServer {
    fn evidence(&self) -> String {
        format!("--- log of nats-server (port {})\n{}", self.port(), self.log_tail())
    }
}

/// Waits until `condition` holds; after `limit` the test fails and prints what the witnesses know.
#[track_caller]
pub fn wait_until(
    what: &str,
    limit: Duration,
    witnesses: &[&dyn Evidence],
    mut condition: impl FnMut() -> bool,
) {
    let deadline = Instant::now() + limit;
    while !condition() {
        if Instant::now() >= deadline {
            let evidence: Vec<String> = witnesses.iter().map(|witness| witness.evidence()).collect();
            panic!("waited {limit:?} in vain until {what}\n{}", evidence.join("\n"));
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// A name that no other test of this run has.
pub fn unique(prefix: &str) -> String {
    static NEXT: AtomicUsize = AtomicUsize::new(1);
    format!("{prefix}{}", NEXT.fetch_add(1, Ordering::Relaxed))
}
