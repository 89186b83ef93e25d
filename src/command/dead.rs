//! `pg-outbox dead`: lists the dead letters, shows one, tries them again, or discards them.
//!
//! Runs on the main thread, beside any number of daemons and other operators. Retry makes an event a retry that is due
//! at once, ahead of the later events of its key, with no attempt made; discard keeps the row, and who did it, when and
//! why. Both work through the selection lane by lane in small transactions: cut short, what was printed as done is
//! done, and the rest is as it was. An event that somebody else decided about meanwhile is passed over and counted.
//!
//! A stream drops a message whose id it has stored within its duplicate window. A dead letter can be one that it has:
//! its ack was lost, or another row has its id. Such an event would count as published at once and not be stored again;
//! that is said before anything is done, and a fresh id is the way around it.

mod change;
mod list;
mod message_id;
mod show;

use std::collections::HashMap;
use std::io::Write;

use anyhow::{Result, ensure};
use uuid::Uuid;

use self::change::{Changing, select};
use self::message_id::{fresh_ids, warn_of_duplicates};
use super::options::{ChangeOptions, Format};
use crate::config::Config;
use crate::postgres::{ClaimSettings, LetterChange, Selection, Store};

/// What to do.
#[derive(Debug, Clone)]
pub enum DeadAction {
    /// List them.
    List(Selection, Format),
    /// Show events, dead or not, with everything.
    Show(Vec<Uuid>, Format),
    /// Try them again.
    Retry(Selection, RetryOptions, ChangeOptions),
    /// Discard them.
    Discard(Selection, DiscardOptions, ChangeOptions),
}

/// How to try again.
#[derive(Debug, Clone, Copy)]
pub struct RetryOptions {
    /// Under which message id.
    pub message_id: MessageId,
    /// Events a second at most.
    pub rate: Option<u32>,
}

/// Under which message id an event is tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageId {
    /// The one that it has.
    Own,
    /// A new one. Events that share an id go on sharing one.
    Fresh,
}

/// Who discards, and why.
#[derive(Debug, Clone)]
pub struct DiscardOptions {
    /// `None`: the user of the operating system.
    pub by: Option<String>,
    /// Why.
    pub reason: String,
}

/// Does it. False when something that was named is no dead letter, or the answer was no.
///
/// # Errors
/// PostgreSQL is out of reach or refuses; a change of everything was not meant to be one; nobody is there to be asked.
pub fn run(config: &Config, action: &DeadAction, out: &mut impl Write) -> Result<bool> {
    let store = Store::new(&config.database, "dead", ClaimSettings::default())?;
    match action {
        DeadAction::List(selection, format) => list::list(&store, selection, *format, out),
        DeadAction::Show(ids, format) => show::show(&store, ids, *format, out),
        DeadAction::Retry(selection, retry, options) => {
            let letters = select(&store, selection)?;
            let new_ids = match retry.message_id {
                MessageId::Fresh => fresh_ids(&letters),
                MessageId::Own => HashMap::new(),
            };
            if retry.message_id == MessageId::Own {
                warn_of_duplicates(config, &letters);
            }
            let change = LetterChange::Retry(&new_ids);
            Changing { verb: ("retry", "retried"), change, options: *options }
                .run(&store, selection, letters, retry.rate, out)
        }
        DeadAction::Discard(selection, DiscardOptions { by, reason }, options) => {
            ensure!(!reason.trim().is_empty(), "--reason is empty: say why, for whoever asks later");
            let letters = select(&store, selection)?;
            let by = by.clone().unwrap_or_else(who);
            let change = LetterChange::Discard { by: &by, reason };
            Changing { verb: ("discard", "discarded"), change, options: *options }
                .run(&store, selection, letters, None, out)
        }
    }
}

/// The user of the operating system, for the record: `ada@db-host`.
fn who() -> String {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let user = set("SUDO_USER").or_else(|| set("USER")).or_else(|| set("LOGNAME"));
    let user = user.unwrap_or_else(|| format!("uid {}", rustix::process::getuid().as_raw()));
    format!("{user}@{}", rustix::system::uname().nodename().to_string_lossy())
}
