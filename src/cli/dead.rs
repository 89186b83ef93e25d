//! `pg-outbox dead` on the command line: its four actions and their flags.

use anyhow::Result;
use clap::Subcommand;
use uuid::Uuid;

use super::change::{ChangeFlags, format};
use super::selection::DeadFlags;
use crate::command::dead::{DeadAction, DiscardOptions, MessageId, RetryOptions};

#[derive(Subcommand)]
pub(super) enum DeadCommand {
    /// List them, those that were written first on top.
    List {
        #[command(flatten)]
        select: DeadFlags,
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
        select: DeadFlags,
        #[command(flatten)]
        change: ChangeFlags,
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
        select: DeadFlags,
        #[command(flatten)]
        change: ChangeFlags,
        /// Why, for whoever asks later.
        #[arg(long, value_name = "TEXT")]
        reason: String,
        /// Who does it [default: the user who runs this].
        #[arg(long, value_name = "NAME")]
        by: Option<String>,
    },
}

impl TryFrom<&DeadCommand> for DeadAction {
    type Error = anyhow::Error;

    fn try_from(action: &DeadCommand) -> Result<DeadAction> {
        Ok(match action {
            DeadCommand::List { select, json } => DeadAction::List(select.selection(), format(*json)),
            DeadCommand::Show { ids, json } => DeadAction::Show(ids.clone(), format(*json)),
            DeadCommand::Retry { select, change, new_id, rate } => {
                let message_id = if *new_id { MessageId::Fresh } else { MessageId::Own };
                let retry = RetryOptions { message_id, rate: *rate };
                DeadAction::Retry(select.for_change()?, retry, change.options())
            }
            DeadCommand::Discard { select, change, reason, by } => {
                let discard = DiscardOptions { by: by.clone(), reason: reason.clone() };
                DeadAction::Discard(select.for_change()?, discard, change.options())
            }
        })
    }
}
