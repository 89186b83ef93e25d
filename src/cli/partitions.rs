//! `pg-outbox partitions` on the command line: its three actions and their flags.

use clap::Subcommand;

use super::change::{format, mode};
use crate::command::partitions::PartitionsAction;

#[derive(Subcommand)]
pub(super) enum PartitionsCommand {
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

impl From<&PartitionsCommand> for PartitionsAction {
    fn from(action: &PartitionsCommand) -> PartitionsAction {
        match action {
            PartitionsCommand::List { json } => PartitionsAction::List(format(*json)),
            PartitionsCommand::Create { month, dry_run } => {
                PartitionsAction::Create { month: month.clone(), mode: mode(*dry_run) }
            }
            PartitionsCommand::Drop { dry_run } => PartitionsAction::Drop { mode: mode(*dry_run) },
        }
    }
}
