//! Publishing: a claim's events to messages, messages to outcomes, outcomes to rows.
//!
//! This folder owns what happens between a claim that is read and one that is settled: making messages, what is in
//! flight, both protocols, the judgement of what NATS did not answer, and the announcement of dead letters. It runs on
//! the worker threads, one claim at a time each; `pg-outbox replay` uses [`Publish`] on its main thread. It may name
//! `nats` for the session that it sends on, `ops` for counters and the worker's pulse, `postgres` for the claim alone,
//! which only `worker.rs` reads and settles, and the floors below. It never chooses lanes, never connects, never sleeps,
//! and never waits for NATS without a deadline. An outage is charged to no event.
//!
//! From the top: `worker.rs` takes a claim through; `flight.rs` publishes it, by `jetstream.rs` or `core.rs`, and then
//! `announce.rs`. Both protocols write into `outcomes.rs` and send within `window.rs` what `message.rs` makes, over the
//! `wire.rs` of the claim. `in_flight.rs`, `batch.rs` and `verdict.rs` are JetStream's, but for what a denial means.
//! `memory.rs` outlives a claim.

mod announce;
mod batch;
mod core;
mod flight;
mod in_flight;
mod jetstream;
mod memory;
mod message;
mod outcomes;
mod verdict;
mod window;
mod wire;
mod worker;

pub use self::flight::{Protocol, Publish};
pub use self::memory::Memory;
pub use self::outcomes::ClaimReport;
pub use self::verdict::NO_ACK;
pub use self::worker::{DrainCount, Finished, Job, READ_ON_EVENTS, ReadSummary, Stage, Worker};
