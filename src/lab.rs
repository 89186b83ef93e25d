//! The laboratory: demo and bench, the private servers that both run on, and how they start the daemon as a program.
//!
//! Runs on the main thread of `pg-outbox demo` and `pg-outbox bench`, and in the tests. It may name everything below, and
//! the command line alone names it: nothing in the daemon needs it. It never touches a server that it did not start.

pub mod bench;
pub mod daemon;
pub mod demo;
pub mod sandbox;
