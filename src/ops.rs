//! What operators and their machines see and want kept: health, metrics, HTTP, logging, systemd, the gauges of the
//! backlog, the partitions.
//!
//! Owns the threads `http` ([`http`]), `janitor` ([`backlog`]) and `upkeep` ([`upkeep`]); [`logging`] and [`systemd`] run on
//! whichever thread calls them. The boards ([`health`], [`metrics`], [`recent`]) are written by every thread and never block
//! one. It may name the store, whose questions it asks, and the configuration; `prometheus` is named below [`metrics`] alone
//! and `tiny_http` below [`http`]. It never names NATS, claims or workers, which report to it, and none of them ever waits
//! for one of its threads.

pub mod backlog;
pub mod health;
pub mod http;
pub mod logging;
pub mod metrics;
pub mod recent;
pub mod systemd;
pub mod upkeep;
