//! The commands of the daemon's program, one file a subcommand, with what it prints.
//!
//! Each runs on the main thread, takes plain arguments (the command line's flags are read above) and returns a result that
//! becomes an exit code; none ends the process by itself, but for a second Ctrl-C. `run` is the daemon, whose threads the
//! service starts; every other command works beside any number of daemons, over connections of its own. They may name
//! every floor below, and of their own folder what stands below them all: `connect`, `filter`, `options`, `signals` and
//! `terminal`. They never name each other, write no SQL, and print nothing of an event that could steer a terminal.

pub mod check;
pub mod connect;
pub mod dead;
pub mod filter;
pub mod generate;
pub mod migrate;
pub mod options;
pub mod partitions;
pub mod replay;
pub mod run;
pub mod signals;
pub mod status;
pub mod terminal;
