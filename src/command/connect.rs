//! A command's own connection to NATS, beside whatever daemons there are.
//!
//! It has the settings of the daemon, one worker's worth of room, and a name of its own among the server's clients. Its
//! health and metrics are seen by nobody. Nothing is connected before the first call asks something of the server.

use crate::config;
use crate::nats::{Keeper, Publisher};
use crate::ops::health::Health;
use crate::ops::metrics::Metrics;

/// The connection and what keeps it, by the name `instance`.
pub fn publisher(nats: &config::Nats, instance: &str) -> (Publisher, Keeper) {
    Publisher::new(nats.clone(), instance, 1, Health::default(), Metrics::new())
}
