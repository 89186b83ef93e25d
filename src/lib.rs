//! pg-outbox publishes the events of a PostgreSQL outbox table to NATS: none lost, in order per key, hardly ever
//! twice, from any number of workers and instances.
//!
//! # The map
//!
//! An application inserts events into `outboxes` in the transaction of its business rows. The **claimer** thread
//! locks lanes (hash buckets of keys) that have pending events, in a transaction that stays open. The claim travels over
//! a channel to a **worker**, which reads the events, publishes them through the one connection to NATS, writes the
//! outcomes in the claim's own transaction, and commits: that frees the lanes. If anything dies on the way, PostgreSQL rolls back and the events are pending again.
//!
//! What always holds: an event is marked published only after NATS acknowledged it; of a key at most one event is
//! in flight anywhere; an outage of NATS is charged to no event; every wait for NATS has a deadline, every channel
//! a limit. (The PostgreSQL driver has no read timeout: a server that answers at TCP level and not at all otherwise
//! holds its callers until the watchdog ends the process.)
//!
//! # In reading order
//!
//! [`event`] what travels · [`lane`] what is settled · [`order`] which event may go next · [`retry`] what becomes of a failed one ·
//! [`topic_map`] topic to subject · [`headers`] metadata to headers · [`answer`] what JetStream says ·
//! [`preflight`] what of a stream does not fit · [`adoption`] what a foreign table lacks · [`outage`] the gate · [`health`] live and ready · [`live`] what a
//! reload changes. These are plain data and pure decisions. [`tls`] is what both servers' connections have in common.
//! Then [`mod@postgres`] (all of PostgreSQL), [`publisher`] (all of NATS), [`metrics`], [`recent`]; the threads [`claimer`],
//! [`worker`] with [`publish`] and [`announce`], [`wakeup`], [`janitor`], [`upkeep`], [`http`]; [`service`], which starts, supervises and
//! drains them; and the [`command`]s. [`failpoint`](mod@failpoint) names the steps of a claim at which the tests kill
//! the process.

pub mod boottime;
pub mod claim;
pub mod command;
pub mod config;
pub mod event;
pub mod failpoint;
pub mod lab;
pub mod lane;
pub mod nats;
pub mod ops;
pub mod postgres;
pub mod publish;
pub mod service;
pub mod tls;
