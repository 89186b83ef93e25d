//! Claiming: which lanes next, when to sleep, who woke us.
//!
//! Owns the threads `claimer` ([`claimer`]), `sampler` ([`sampler`]), `wake-up` and `sleep-lock` ([`wakeup`]), and what the claimer knows of the
//! lanes (`search.rs`, `share.rs`). It locks lanes and hands them to workers over a channel. It names the publisher for whether
//! claims may be made, workers for what travels over that channel, and the store for the locks. It reads events only in lanes
//! where a claim has failed, never publishes, and never waits for a worker without listening for the stop.

pub mod claimer;
pub mod sampler;
mod schema;
mod search;
mod share;
mod trouble;
pub mod wakeup;
