//! Publishing: a claim's events to messages, messages to outcomes, outcomes to rows.
//!
//! Runs on the worker threads ([`worker`]), one claim at a time each. It names the store for the claim that it reads and
//! settles, the connection to NATS, and what an event is; it never chooses lanes and never connects. Every wait for NATS
//! has a deadline; an outage is charged to no event.

pub mod announce;
pub mod flight;
pub mod memory;
mod message;
mod wire;
pub mod worker;
