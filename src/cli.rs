//! The command line: what may be written there, and what each flag means for the command that it belongs to.
//!
//! Help, manual pages and shell completions are made of the same definitions. What a value may be is checked here, as
//! far as that needs neither configuration nor server.

mod execute;

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum};
use uuid::Uuid;

pub use self::execute::run;
use crate::command::dead::{DeadAction, DiscardOptions, MessageId, RetryOptions};
use crate::command::filter;
use crate::command::migrate::OrderingScope;
use crate::command::options::{ChangeOptions, Format, Mode};
use crate::command::partitions::PartitionsAction;
use crate::command::replay::ReplayOptions;
use crate::command::terminal::Consent;
use crate::config::DEFAULT_PATH;
use crate::lab::bench::{self, BenchOptions};
use crate::postgres::Selection;

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
    pub(crate) config: PathBuf,
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Run the daemon until SIGTERM or SIGINT (the default).
    Run,
    /// Look at configuration, database, schema and stream; say what is missing and what to do. Changes nothing.
    Check,
    /// Bring the database schema up to date. Safe to repeat.
    Migrate {
        /// What makes events wait for each other; chosen once, by the first migration (then: key).
        #[arg(long, value_enum)]
        order: Option<Order>,
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
        action: Dead,
    },
    /// Send published events again, in order and at a rate, each under a message id of its own.
    Replay(Replay),
    /// List, make and drop the monthly partitions. The daemon does the same by itself.
    Partitions {
        #[command(subcommand)]
        action: Partitions,
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
    Bench(Bench),
    /// Write manual pages and shell completions, for a package.
    #[command(hide = true)]
    Generate {
        /// The folder to write below.
        folder: PathBuf,
    },
}

#[derive(Subcommand)]
pub(crate) enum Dead {
    /// List them, those that were written first on top.
    List {
        #[command(flatten)]
        select: SelectDead,
        /// As JSON, one array.
        #[arg(long)]
        json: bool,
    },
    /// Show events with all that is known of them, dead or not.
    Show {
        /// Ids of the events.
        #[arg(required = true, value_name = "ID")]
        ids: Vec<Uuid>,
        /// As JSON, one array.
        #[arg(long)]
        json: bool,
    },
    /// Try them again: at once, ahead of the later events of their keys, with attempts counted from 0.
    Retry {
        #[command(flatten)]
        select: SelectDead,
        #[command(flatten)]
        change: Change,
        /// Publish under fresh message ids, which no duplicate window knows. The events' ids change.
        #[arg(long)]
        new_id: bool,
        /// Events a second at most.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        rate: Option<u32>,
    },
    /// Discard them: they are not tried again and hold nothing back; the rows stay until the retention ends.
    Discard {
        #[command(flatten)]
        select: SelectDead,
        #[command(flatten)]
        change: Change,
        /// Why, for whoever asks later.
        #[arg(long, value_name = "TEXT")]
        reason: String,
        /// Who does it [default: the user who runs this].
        #[arg(long, value_name = "NAME")]
        by: Option<String>,
    },
}

/// Which events, by what both kinds of selection have; what is given must all fit.
#[derive(Args)]
pub(crate) struct Which {
    /// Ids of the events.
    #[arg(value_name = "ID")]
    ids: Vec<Uuid>,
    /// Of this topic; * stands for one token, a last > for one or more.
    #[arg(long, value_name = "PATTERN", value_parser = filter::topics)]
    topic: Option<String>,
    /// Of this key.
    #[arg(long)]
    key: Option<String>,
    /// So many at most, those that were written first.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i64).range(1..))]
    limit: Option<i64>,
    /// All there are.
    #[arg(long)]
    all: bool,
}

impl Which {
    fn selection(&self, since_ms: Option<i64>, until_ms: Option<i64>, error: Option<&str>) -> Selection {
        let Which { ids, topic, key, limit, all: _ } = self;
        let ids = (!ids.is_empty()).then(|| ids.clone());
        let error = error.map(str::to_owned);
        Selection { ids, topic: topic.clone(), key: key.clone(), since_ms, until_ms, error, limit: *limit }
    }

    /// The selection, unless it is everything and that is not what was said. `filters` are the flags there are.
    fn meant(&self, selection: Selection, filters: &str) -> Result<Selection> {
        let nothing = Selection { limit: self.limit, ..Selection::default() };
        ensure!(self.all || selection != nothing, "which ones? Name ids, {filters}, or say --all");
        Ok(selection)
    }
}

/// Which dead letters.
#[derive(Args)]
pub(crate) struct SelectDead {
    #[command(flatten)]
    which: Which,
    /// Died since: 2h ago, 2026-11-25, or 2026-11-25T07:30:00Z.
    #[arg(long, value_name = "TIME", value_parser = filter::time)]
    since: Option<i64>,
    /// Died before, written in the same way.
    #[arg(long, value_name = "TIME", value_parser = filter::time)]
    until: Option<i64>,
    /// With this text somewhere in the reason, in any case of letters.
    #[arg(long, value_name = "TEXT")]
    error: Option<String>,
}

impl SelectDead {
    fn selection(&self) -> Selection {
        self.which.selection(self.since, self.until, self.error.as_deref())
    }

    /// The same for a change, which of everything must be meant.
    fn for_change(&self) -> Result<Selection> {
        self.which.meant(self.selection(), "--topic, --key, --since, --until or --error")
    }
}

/// Which published events.
#[derive(Args)]
pub(crate) struct SelectPublished {
    #[command(flatten)]
    which: Which,
    /// Written since: 2h ago, 2026-11-25, or 2026-11-25T07:30:00Z.
    #[arg(long, value_name = "TIME", value_parser = filter::time)]
    since: Option<i64>,
    /// Written before, in the same way.
    #[arg(long, value_name = "TIME", value_parser = filter::time)]
    until: Option<i64>,
}

impl SelectPublished {
    /// A replay of everything must be meant.
    fn selection(&self) -> Result<Selection> {
        let selection = self.which.selection(self.since, self.until, None);
        self.which.meant(selection, "--topic, --key, --since or --until")
    }
}

#[derive(Args)]
pub(crate) struct Replay {
    #[command(flatten)]
    select: SelectPublished,
    /// Only those with a seq above this: where an earlier replay stopped.
    #[arg(long, value_name = "SEQ")]
    after: Option<i64>,
    /// Events a second at most.
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..))]
    rate: u32,
    /// Send to subjects below this one.
    #[arg(long, value_name = "SUBJECT")]
    prefix: Option<String>,
    /// Send to this stream instead of nats.jetstream.stream_name.
    #[arg(long, value_name = "NAME")]
    stream: Option<String>,
    /// Name of the replay, a part of its message ids: the same one to go on where it stopped [default: new each time].
    #[arg(long)]
    name: Option<String>,
    #[command(flatten)]
    change: Change,
}

impl TryFrom<&Replay> for ReplayOptions {
    type Error = anyhow::Error;

    fn try_from(asked: &Replay) -> Result<ReplayOptions> {
        let Replay { select, after, rate, prefix, stream, name, change } = asked;
        Ok(ReplayOptions {
            selection: select.selection()?,
            after: *after,
            rate: *rate,
            prefix: prefix.clone(),
            stream: stream.clone(),
            name: name.clone(),
            change: change.how(),
        })
    }
}

/// What to do, and whether to ask.
#[derive(Args)]
pub(crate) struct Change {
    /// Say what would be done, and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Do not ask, whatever the number.
    #[arg(short, long)]
    yes: bool,
    /// Say what was done as JSON, one object.
    #[arg(long)]
    json: bool,
}

impl Change {
    fn how(&self) -> ChangeOptions {
        ChangeOptions {
            mode: if self.dry_run { Mode::Dry } else { Mode::Real },
            consent: if self.yes { Consent::Given } else { Consent::Ask },
            format: format(self.json),
        }
    }
}

pub(crate) fn format(json: bool) -> Format {
    if json { Format::Json } else { Format::Table }
}

impl TryFrom<&Dead> for DeadAction {
    type Error = anyhow::Error;

    fn try_from(action: &Dead) -> Result<DeadAction> {
        Ok(match action {
            Dead::List { select, json } => DeadAction::List(select.selection(), format(*json)),
            Dead::Show { ids, json } => DeadAction::Show(ids.clone(), format(*json)),
            Dead::Retry { select, change, new_id, rate } => {
                let message_id = if *new_id { MessageId::Fresh } else { MessageId::Own };
                let retry = RetryOptions { message_id, rate: *rate };
                DeadAction::Retry(select.for_change()?, retry, change.how())
            }
            Dead::Discard { select, change, reason, by } => {
                let discard = DiscardOptions { by: by.clone(), reason: reason.clone() };
                DeadAction::Discard(select.for_change()?, discard, change.how())
            }
        })
    }
}

#[derive(Subcommand)]
pub(crate) enum Partitions {
    /// Show every partition: its month, its size, and what keeps it from being dropped.
    List {
        /// As JSON, one array.
        #[arg(long)]
        json: bool,
    },
    /// Make the partitions that are missing, up to `partitions.premake` months ahead.
    Create {
        /// Make the partition of this month instead, whether ahead or long ago.
        #[arg(long, value_name = "YYYY-MM")]
        month: Option<String>,
        /// Say what would be made, and change nothing.
        #[arg(long)]
        dry_run: bool,
    },
    /// Drop the partitions that are older than `partitions.retention` as a whole. Pending events and dead letters
    /// keep theirs.
    Drop {
        /// Say what would be dropped, and change nothing.
        #[arg(long)]
        dry_run: bool,
    },
}

impl From<&Partitions> for PartitionsAction {
    fn from(action: &Partitions) -> PartitionsAction {
        let mode = |dry_run| if dry_run { Mode::Dry } else { Mode::Real };
        match action {
            Partitions::List { json: false } => PartitionsAction::List(Format::Table),
            Partitions::List { json: true } => PartitionsAction::List(Format::Json),
            Partitions::Create { month, dry_run } => {
                PartitionsAction::Create { month: month.clone(), mode: mode(*dry_run) }
            }
            Partitions::Drop { dry_run } => PartitionsAction::Drop { mode: mode(*dry_run) },
        }
    }
}

#[derive(Args)]
pub(crate) struct Bench {
    /// Use the configured servers, with a schema and a stream of its own that are removed afterwards.
    #[arg(long)]
    here: bool,
    /// Run this part alone; may be given several times.
    #[arg(long, value_enum, value_name = "PART")]
    only: Vec<Part>,
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

impl Bench {
    /// Its options; `config` is the file that says which servers are meant by `--here`.
    pub(crate) fn options(&self, config: &Path) -> BenchOptions {
        let Bench { here, only, quick, long, rounds, events, workers, json, plot } = self;
        BenchOptions {
            here: here.then(|| config.to_owned()),
            only: only.iter().map(|part| (*part).into()).collect(),
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

/// As [`bench::BenchPart`], for the command line.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Part {
    /// Each server alone: publishing without a database, claims without publishing.
    Limits,
    /// Draining a backlog, by batch size, workers and keys; with CPU, WAL and memory.
    Drain,
    /// From commit to stored in the stream.
    Latency,
    /// Statements an event, and what an idle daemon takes.
    Cost,
    /// Draining with more pending, with many published, and with an old snapshot held.
    Growth,
    /// What 16 writers pay for our trigger.
    Writers,
    /// One, two and four instances.
    Instances,
}

impl From<Part> for bench::BenchPart {
    fn from(part: Part) -> bench::BenchPart {
        match part {
            Part::Limits => bench::BenchPart::Limits,
            Part::Drain => bench::BenchPart::Drain,
            Part::Latency => bench::BenchPart::Latency,
            Part::Cost => bench::BenchPart::Cost,
            Part::Growth => bench::BenchPart::Growth,
            Part::Writers => bench::BenchPart::Writers,
            Part::Instances => bench::BenchPart::Instances,
        }
    }
}

/// As [`OrderingScope`], for the command line.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Order {
    /// The metadata field `ordering-key`, else the topic.
    Key,
    /// The topic alone.
    Topic,
    /// Everything: one order over all events.
    All,
}

impl From<Order> for OrderingScope {
    fn from(order: Order) -> OrderingScope {
        match order {
            Order::Key => OrderingScope::Key,
            Order::Topic => OrderingScope::Topic,
            Order::All => OrderingScope::All,
        }
    }
}
