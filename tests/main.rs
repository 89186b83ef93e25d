//! The integration tests: one binary, over a real PostgreSQL and a real nats-server.
//!
//! Each test has a database and a stream of its own on servers that all tests share, so that they run side by
//! side; a test that stops or pauses a server starts a private one. They run the built program with a config file
//! and look at what an operator sees. A missing server fails the test with the command that installs it.
#![allow(unreachable_pub, reason = "nothing of a test binary can be reached from outside")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on must end, and says where")]

mod adopt;
mod announce;
mod architecture;
mod batches;
mod bench;
mod check;
mod claim;
mod containers;
mod cost;
mod counting;
mod dead;
mod delivery;
mod demo;
mod dependencies;
mod faults;
mod former;
mod harness;
mod harness_test;
mod home;
mod hostile;
mod http;
mod lanes;
mod monitoring;
mod nats_tls;
mod open_writers;
mod outages;
mod package;
mod page;
mod partitions;
mod pooler;
mod postgres_tls;
mod readme;
mod rejections;
mod reload;
mod replay;
mod roles;
mod sandbox;
mod schema;
mod settings;
mod shape;
mod status;
mod sweep;
mod systemd;
mod wakeup;
