//! What operators and their machines see and want kept: health, metrics, HTTP, logging, systemd, the gauges of the
//! backlog, the partitions.
//!
//! Threads of its own: `http` ([`http`]), `janitor` ([`backlog`]) and `upkeep` ([`upkeep`]). The boards ([`health`],
//! [`metrics`]) are written by every thread and never block one. It asks the store and reads the configuration; it names
//! neither NATS nor claims, which report to it, and nothing here is waited for by an event.

pub mod backlog;
pub mod health;
pub mod http;
pub mod logging;
pub mod metrics;
pub mod recent;
pub mod systemd;
pub mod upkeep;
