//! pg-outbox: publishes the events of a PostgreSQL outbox table to NATS.

pub mod answer;
pub mod boottime;
pub mod command;
pub mod config;
pub mod event;
pub mod headers;
pub mod health;
pub mod http;
pub mod logging;
pub mod metrics;
pub mod order;
pub mod outage;
pub mod publish;
pub mod publisher;
pub mod retry;
pub mod sandbox;
pub mod store;
pub mod systemd;
pub mod topic_map;
