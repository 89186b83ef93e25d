//! A command line to its command, and the command's result to an exit code.

use std::io::stdout;
use std::process::ExitCode;

use anyhow::Result;
use clap::CommandFactory;

use super::change::format;
use super::{Cli, Command};
use crate::command::signals::CUT_SHORT;
use crate::command::terminal::harmless;
use crate::command::{check, dead, generate, migrate, partitions, replay, run, status};
use crate::config::{Config, ConfigError};
use crate::lab::bench;
use crate::lab::demo::{self, DemoOptions};
use crate::postgres::Adopting;

const FAILED: u8 = 1;
const BAD_CONFIG: u8 = 78;

/// Does what the command line asks for, and says what went wrong on stderr.
pub fn run(cli: &Cli) -> ExitCode {
    match execute(cli) {
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
            let (order, out) = (*order, &mut stdout());
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
            let repeat = if *watch { status::Repeat::ForEver } else { status::Repeat::Once };
            done(status::run(&config, format(*json), repeat, &mut stdout())?)
        }
        Command::Dead { action } => {
            let action = action.try_into()?;
            let config = Config::load(&cli.config)?;
            done(dead::run(&config, &action, &mut stdout())?)
        }
        Command::Replay(asked) => {
            let replay = asked.try_into()?;
            let config = Config::load(&cli.config)?;
            done(replay::run(&config, &replay, &mut stdout())?)
        }
        Command::Partitions { action } => {
            let config = Config::load(&cli.config)?;
            done(partitions::run(&config, &action.into(), &mut stdout())?)
        }
        Command::Bench(asked) => {
            bench::run(&asked.options(&cli.config))?;
            ExitCode::SUCCESS
        }
        Command::Demo { events, keep } => done(demo::run(DemoOptions { events: *events, keep: *keep })?),
    })
}
