//! pg-outbox: publishes the events of a PostgreSQL outbox table to NATS.
pub mod command;
pub mod config;
pub mod event;
pub mod health;
pub mod http;
pub mod logging;
pub mod metrics;
pub mod systemd;
pub mod headers;
pub mod retry;
pub mod sandbox;
pub mod store;
pub mod topic_map;
