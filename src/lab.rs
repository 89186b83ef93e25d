//! The laboratory: demo, bench, the private servers that both run on, and how they start the daemon as a program.
//!
//! It runs on the main thread of `pg-outbox demo` and `pg-outbox bench`, with threads of its own for writers and sessions
//! that end before the command does, and in the tests. It may name every floor below; the command line alone names it,
//! and nothing in the daemon needs it. It never touches a server that it did not start, but for `bench --here`, which
//! works in a schema and a stream of its own and removes both.

pub mod bench;
pub mod daemon;
pub mod demo;
mod numbers;
pub mod sandbox;
