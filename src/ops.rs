//! What operators and their machines see and want kept: health, metrics, HTTP, logging, systemd, the gauges of the
//! backlog, the partitions, and that no event is forgotten.
//!
//! Owns the threads `http` ([`http`]), `janitor` ([`backlog`], and [`mend`]), `upkeep` ([`upkeep`]) and `sweep` ([`sweep`]);
//! [`logging`] and [`systemd`] run on whichever thread calls them. The boards ([`health`], [`metrics`], [`recent`]) are written by every thread and never block
//! one. It may name the store, whose questions it asks, and the configuration; `prometheus` is named below [`metrics`] alone
//! and `tiny_http` below [`http`]. It never names NATS, claims or workers, which report to it, and none of them ever waits
//! for one of its threads.

pub mod backlog;
pub mod health;
pub mod http;
pub mod logging;
pub mod mend;
pub mod metrics;
pub mod recent;
pub mod sweep;
pub mod systemd;
pub mod upkeep;
