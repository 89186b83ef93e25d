//! The command line: what may be written there, and what each flag means for the command that it belongs to.
//!
//! Help, manual pages and shell completions are made of the same definitions. What a value may be is checked here, as
//! far as that needs neither configuration nor server.

mod bench;
mod change;
mod dead;
mod execute;
mod migrate;
mod partitions;
mod replay;
mod selection;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use self::bench::BenchFlags;
use self::dead::DeadCommand;
pub use self::execute::run;
use self::partitions::PartitionsCommand;
use self::replay::ReplayFlags;
use crate::command::migrate::OrderingScope;
use crate::config::DEFAULT_PATH;

/// What `--help` says after the options.
const ENVIRONMENT_AND_EXIT_CODES: &str = "\
Environment, which wins over the configuration file:
  DATABASE_DSN            database.dsn
  NATS_URL                nats.url
  DISPATCHER_INSTANCE_ID  dispatcher.instance_id
  LOG_LEVEL               logging.level

Exit codes:
  0    done; for run: stopped by a signal, drained
  1    it failed, or check found something
  2    the command line is wrong
  78   the configuration is bad; every problem is named, and nothing was started
  130  cut short by a second signal

Signals to run:
  SIGTERM, SIGINT  drain for up to dispatcher.shutdown_grace, then end; a second one ends at once
  SIGHUP           read the configuration again; a bad one is refused, and the one from before stays";

/// Publishes the events of a PostgreSQL outbox table to NATS: none lost, in order per key, hardly ever twice.
#[derive(Parser)]
#[command(version, propagate_version = true, after_help = ENVIRONMENT_AND_EXIT_CODES)]
pub struct Cli {
    /// The configuration file.
    #[arg(short, long, global = true, value_name = "FILE", default_value = DEFAULT_PATH)]
    config: PathBuf,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Run the daemon until SIGTERM or SIGINT (the default).
    Run,
    /// Look at configuration, database, schema and stream; say what is missing and what to do. Changes nothing.
    Check,
    /// Bring the database schema up to date. Safe to repeat.
    Migrate {
        /// What makes events wait for each other; chosen once, by the first migration (then: key).
        #[arg(long, value_enum)]
        order: Option<OrderingScope>,
        /// Make an outbox of a table `outboxes` that another program made, while its writers go on. Safe to repeat, and
        /// to interrupt.
        #[arg(long)]
        adopt: bool,
        /// Say what adopting would do, with the statements, and change nothing.
        #[arg(long, requires = "adopt")]
        dry_run: bool,
    },
    /// Show what waits, what flows and what is in the way: one screen, asked of both servers.
    Status {
        /// Show it again every two seconds, until Ctrl-C.
        #[arg(long)]
        watch: bool,
        /// As JSON, one object on one line.
        #[arg(long)]
        json: bool,
    },
    /// List dead letters, show them, try them again, or discard them.
    Dead {
        #[command(subcommand)]
        action: DeadCommand,
    },
    /// Send published events again, in order and at a rate, each under a message id of its own.
    Replay(ReplayFlags),
    /// List, make and drop the monthly partitions. The daemon does the same by itself.
    Partitions {
        #[command(subcommand)]
        action: PartitionsCommand,
    },
    /// Try it out: private servers, a writer, the daemon, and a reader that checks what arrives.
    Demo {
        /// Events to commit.
        #[arg(long, default_value_t = 10_000)]
        events: u64,
        /// Leave everything running afterwards, until Ctrl-C.
        #[arg(long)]
        keep: bool,
    },
    /// Measure it: rates, latency, cost and growth, on private servers or on the configured ones.
    Bench(BenchFlags),
    /// Write manual pages and shell completions, for a package.
    #[command(hide = true)]
    Generate {
        /// The folder to write below.
        folder: PathBuf,
    },
}
