//! Claiming: which lanes next, when to sleep, who woke us.
//!
//! Threads: `claimer` ([`claimer`]), `wake-up` and `sleep-lock` ([`wakeup`]). It locks lanes and hands them to workers
//! over a channel; it names workers for what travels over it, and the store for the locks. It never reads an event, never
//! publishes, and never waits for a worker without a limit.

pub mod claimer;
mod search;
pub mod wakeup;
