//! The program `pg-outbox`: a command line to an exit code; nothing else.
//!
//! Exit codes: 0 done; 1 it failed, or a check found something; 2 a bad command line (clap's own); 78 (`EX_CONFIG`)
//! the configuration is bad, which systemd must not answer by starting again; 130 cut short by a second signal.

use std::process::ExitCode;

use clap::Parser;
use pg_outbox::cli::{self, Cli};

fn main() -> ExitCode {
    cli::run(&Cli::parse())
}
