//! pg-outbox publishes the events of a PostgreSQL outbox table to NATS: none lost, in order per key, hardly ever
//! twice, from any number of workers and instances.
//!
//! An application inserts events into `outboxes` in the transaction of its business rows. The **claimer** thread
//! locks lanes (hash buckets of keys) that have pending events, in a transaction that stays open. The claim travels over
//! a channel to a **worker**, which reads the events, publishes them through the one connection to NATS, writes the
//! outcomes in the claim's own transaction, and commits: that frees the lanes. If anything dies on the way, PostgreSQL
//! rolls back and the events are pending again.
//!
//! What always holds: an event is marked published only after NATS acknowledged it; of a key at most one event is
//! in flight anywhere; an outage of NATS is charged to no event; every wait for NATS has a deadline, every channel
//! a limit. (The PostgreSQL driver has no read timeout: a server that answers at TCP level and not at all otherwise
//! holds its callers until the watchdog ends the process.)
//!
//! # The map
//!
//! From the top floor down. A file names files of its own folder and of floors below, never above, nor of another folder
//! on its floor. No files name each other in a circle, but for a face and the files of its folder.
//! `tests/architecture.rs` keeps all that.
//!
//! | floor | | owns |
//! |---|---|---|
//! | 11 | [`cli`] | a command line to a command, its result to an exit code |
//! | 10 | [`lab`] | demo, bench, and the private servers that both run on |
//! | 9 | [`command`] | one file a subcommand, and what it prints |
//! | 8 | [`service`] | wires the threads, supervises, reloads, drains |
//! | 7 | [`claim`] | the claimer thread: which lanes next, when to sleep, who woke it |
//! | 6 | [`publish`] | the worker threads: a claim's events to messages to outcomes |
//! | 5 | [`mod@nats`] | the connection to NATS, and what its answers mean |
//! | 4 | [`ops`] | health, metrics, HTTP, logging, systemd, gauges of the backlog, upkeep and sweep of the partitions |
//! | 3 | [`mod@postgres`] | every statement, the pool, how a server is reached, migration and adoption |
//! | 2 | [`config`] | what is written to what it means, and what a reload changes |
//! | 1 | [`event`] | plain data and pure decisions about one event |
//! | 1 | [`lane`] | plain data and pure decisions about lanes |
//! | 0 | [`tls`], [`boottime`], [`failpoint`](mod@failpoint) | what several floors stand on |

pub mod cli;
pub mod lab;

pub mod command;
pub mod service;

pub mod claim;
pub mod publish;

pub mod nats;
pub mod ops;
pub mod postgres;

pub mod config;

pub mod event;
pub mod lane;

pub mod boottime;
pub mod failpoint;
pub mod tls;
