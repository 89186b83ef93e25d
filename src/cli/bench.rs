//! `pg-outbox bench` on the command line, and the names and words of its parts.

use std::path::{Path, PathBuf};

use clap::builder::PossibleValue;
use clap::{Args, ValueEnum};

use crate::lab::bench::{BenchOptions, BenchPart};

#[derive(Args)]
pub(super) struct BenchFlags {
    /// Use the configured servers, with a schema and a stream of its own that are removed afterwards.
    #[arg(long)]
    here: bool,
    /// Run this part alone; may be given several times.
    #[arg(long, value_enum, value_name = "PART")]
    only: Vec<BenchPart>,
    /// Compare with another build of this program, by turns: drains, and what relaying costs. Runs these parts alone, unless
    /// --only says which.
    #[arg(long, value_name = "PROGRAM", conflicts_with = "here")]
    against: Option<PathBuf>,
    /// Small and short: half a minute, and rough figures.
    #[arg(long)]
    quick: bool,
    /// Also drain 5 million events.
    #[arg(long)]
    long: bool,
    /// Rounds; the tables show their median and spread [default: 5, with --quick 1].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    rounds: Option<u16>,
    /// Events of a drain [default: 100000, with --quick 5000].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1_000..))]
    events: Option<u64>,
    /// Worker threads of the daemon.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=64))]
    workers: u16,
    /// Print JSON, one object.
    #[arg(long)]
    json: bool,
    /// Draw the growth curves, as SVG.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

impl BenchFlags {
    /// Its options; `config` is the file that says which servers are meant by `--here`.
    pub(super) fn options(&self, config: &Path) -> BenchOptions {
        let BenchFlags { here, only, against, quick, long, rounds, events, workers, json, plot } = self;
        BenchOptions {
            here: here.then(|| config.to_owned()),
            only: only.clone(),
            against: against.clone(),
            quick: *quick,
            long: *long,
            rounds: rounds.map(usize::from),
            events: *events,
            workers: usize::from(*workers),
            json: *json,
            plot: plot.clone(),
        }
    }
}

impl ValueEnum for BenchPart {
    fn value_variants<'a>() -> &'a [BenchPart] {
        &BenchPart::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let (name, help) = match self {
            BenchPart::Limits => {
                ("limits", "Each server alone: publishing without a database, claims without publishing")
            }
            BenchPart::Drain => {
                ("drain", "Draining a backlog, by batch size, workers and keys; with CPU, WAL and memory")
            }
            BenchPart::Latency => ("latency", "From commit to stored in the stream"),
            BenchPart::Cost => ("cost", "Statements an event, and what an idle daemon takes"),
            BenchPart::Growth => ("growth", "Draining with more pending, and with many published"),
            BenchPart::OldSnapshot => {
                ("old-snapshot", "Draining while another session holds an old snapshot")
            }
            BenchPart::OpenWriter => {
                ("open-writer", "Rate and latency while a transaction that has inserted an event stays open")
            }
            BenchPart::Writers => ("writers", "What 16 writers pay for our trigger"),
            BenchPart::Instances => ("instances", "One, two and four instances"),
            BenchPart::RelayCost => {
                ("relay-cost", "What relaying an event costs PostgreSQL, against inserting it")
            }
            BenchPart::Against => ("against", "Drains of this program and of the one that --against names"),
        };
        Some(PossibleValue::new(name).help(help))
    }
}
