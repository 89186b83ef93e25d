//! The commands of the program, one file each. Every one takes plain arguments and returns a result that
//! `main.rs` turns into an exit code; none of them exits by itself.

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
