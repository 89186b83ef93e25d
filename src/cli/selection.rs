//! The flags that say which events are meant: dead letters or published ones.
//!
//! What is given must all fit. A change of everything must be said: without a filter and without `--all` nothing is
//! selected, and an error says so.

use anyhow::{Result, ensure};
use clap::Args;
use uuid::Uuid;

use crate::command::filter;
use crate::postgres::Selection;

/// Which events, by what both kinds of selection have; what is given must all fit.
#[derive(Args)]
pub(super) struct SelectionFlags {
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

impl SelectionFlags {
    fn selection(&self, since_ms: Option<i64>, until_ms: Option<i64>, error: Option<&str>) -> Selection {
        let SelectionFlags { ids, topic, key, limit, all: _ } = self;
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
pub(super) struct DeadFlags {
    #[command(flatten)]
    which: SelectionFlags,
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

impl DeadFlags {
    pub(super) fn selection(&self) -> Selection {
        self.which.selection(self.since, self.until, self.error.as_deref())
    }

    /// The same for a change, which of everything must be meant.
    pub(super) fn for_change(&self) -> Result<Selection> {
        self.which.meant(self.selection(), "--topic, --key, --since, --until or --error")
    }
}

/// Which published events.
#[derive(Args)]
pub(super) struct PublishedFlags {
    #[command(flatten)]
    which: SelectionFlags,
    /// Written since: 2h ago, 2026-11-25, or 2026-11-25T07:30:00Z.
    #[arg(long, value_name = "TIME", value_parser = filter::time)]
    since: Option<i64>,
    /// Written before, in the same way.
    #[arg(long, value_name = "TIME", value_parser = filter::time)]
    until: Option<i64>,
}

impl PublishedFlags {
    /// A replay of everything must be meant.
    pub(super) fn selection(&self) -> Result<Selection> {
        let selection = self.which.selection(self.since, self.until, None);
        self.which.meant(selection, "--topic, --key, --since or --until")
    }
}
