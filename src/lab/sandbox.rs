//! Private servers for `demo`, `bench` and the tests: a PostgreSQL and a nats-server of one's own, on loopback.
//!
//! Each server has a folder below the temp folder with its data, its config and its log, and a port below the
//! kernel's ephemeral range, which it keeps over stops and starts. Nothing of them outlives their owner, however that
//! ends: see `sandbox/guard.rs`. They need no client crate. Nothing here runs on a thread of its own, and no server that
//! was there before is ever touched.

mod guard;
mod nats;
mod postgres;
mod server;

pub use self::guard::Guard;
pub use self::nats::{NatsOptions, NatsServer, StoreState};
pub use self::postgres::{PostgresOptions, PostgresServer};
pub use self::server::free_port;

/// Names the folder with PostgreSQL's programs (`initdb`, `postgres`, `psql`, `pg_isready`).
pub const POSTGRES_BIN_VAR: &str = "PG_OUTBOX_POSTGRES_BIN";
/// Names the nats-server program.
pub const NATS_SERVER_VAR: &str = "PG_OUTBOX_NATS_SERVER";

/// How a server is asked to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// PostgreSQL: a fast shutdown, with a checkpoint. nats-server: SIGTERM.
    Fast,
    /// PostgreSQL: an immediate shutdown, as a crash seen from outside: recovery at the next start. nats-server: SIGKILL.
    Immediate,
}
