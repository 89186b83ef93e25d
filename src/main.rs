//! The program `pg-outbox`: flags to a command, its result to an exit code; nothing else.
//!
//! Exit codes: 0 done; 1 it failed, or a check found something; 2 a bad command line (clap's own); 78 (`EX_CONFIG`)
//! the configuration is bad, which systemd must not answer by starting again; 130 cut short by a second signal.

mod cli;

use std::process::ExitCode;

use anyhow::Result;
use clap::{CommandFactory, Parser};
use pg_outbox::command::terminal::harmless;
use pg_outbox::command::{check, dead, generate, migrate, partitions, replay, run, status};
use pg_outbox::config::{Config, ConfigError};
use pg_outbox::lab::bench;
use pg_outbox::lab::demo::{self, DemoOptions};
use pg_outbox::postgres::Adopting;

use self::cli::{Cli, Command, format};

const FAILED: u8 = 1;
const BAD_CONFIG: u8 = 78;
const CUT_SHORT: u8 = 130;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match execute(&cli) {
        Ok(code) => code,
        Err(error) => {
            // Words of a server's may be in it; a configuration has a line for each problem.
            let lines: Vec<String> = format!("{error:#}").lines().map(harmless).collect();
            eprintln!("pg-outbox: {}", lines.join("\n"));
            if error.is::<ConfigError>() { BAD_CONFIG.into() } else { FAILED.into() }
        }
    }
}

fn execute(cli: &Cli) -> Result<ExitCode> {
    let done = |ok: bool| if ok { ExitCode::SUCCESS } else { FAILED.into() };
    Ok(match cli.command.as_ref().unwrap_or(&Command::Run) {
        Command::Run => match run::run(&cli.config)? {
            run::Ended::Drained => ExitCode::SUCCESS,
            run::Ended::CutShort => CUT_SHORT.into(),
            run::Ended::Failed => FAILED.into(),
        },
        Command::Check => done(check::run(&cli.config)?),
        Command::Migrate { order, adopt, dry_run } => {
            let config = Config::load(&cli.config)?;
            let (order, out) = (order.map(Into::into), &mut std::io::stdout());
            match (adopt, dry_run) {
                (false, _) => migrate::run(&config.database, order, out)?,
                (true, false) => migrate::adopt(&config.database, order, Adopting::Real, out)?,
                (true, true) => migrate::adopt(&config.database, order, Adopting::Dry, out)?,
            }
            ExitCode::SUCCESS
        }
        Command::Generate { folder } => {
            generate::run(Cli::command(), folder)?;
            ExitCode::SUCCESS
        }
        Command::Status { watch, json } => {
            let config = Config::load(&cli.config)?;
            let times = if *watch { status::Times::ForEver } else { status::Times::Once };
            done(status::run(&config, format(*json), times, &mut std::io::stdout())?)
        }
        Command::Dead { action } => {
            let action = action.try_into()?;
            let config = Config::load(&cli.config)?;
            done(dead::run(&config, &action, &mut std::io::stdout())?)
        }
        Command::Replay(asked) => {
            let replay = asked.try_into()?;
            let config = Config::load(&cli.config)?;
            done(replay::run(&config, &replay, &mut std::io::stdout())?)
        }
        Command::Partitions { action } => {
            let config = Config::load(&cli.config)?;
            done(partitions::run(&config, &action.into(), &mut std::io::stdout())?)
        }
        Command::Bench(asked) => {
            bench::run(&asked.options(&cli.config))?;
            ExitCode::SUCCESS
        }
        Command::Demo { events, keep } => done(demo::run(DemoOptions { events: *events, keep: *keep })?),
    })
}
