//! Publishing: a claim's events to messages, messages to outcomes, outcomes to rows.
//!
//! Runs on the worker threads ([`worker`]), one claim at a time each. It names the store for the claim that it reads and
//! settles, the connection to NATS, and what an event is; it never chooses lanes and never connects. Every wait for NATS
//! has a deadline; an outage is charged to no event.

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
pub use self::worker::{DrainCount, Finished, Job, ReadSummary, Stage, Worker};
