//! The flags of whatever changes or sends events: only say it, do not ask, print JSON.

use clap::Args;

use crate::command::options::{ChangeOptions, Format, Mode};
use crate::command::terminal::Consent;

/// What to do, and whether to ask.
#[derive(Args)]
pub(super) struct ChangeFlags {
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

impl ChangeFlags {
    pub(super) fn options(&self) -> ChangeOptions {
        ChangeOptions {
            mode: mode(self.dry_run),
            consent: if self.yes { Consent::Given } else { Consent::Ask },
            format: format(self.json),
        }
    }
}

pub(super) fn format(json: bool) -> Format {
    if json { Format::Json } else { Format::Table }
}

pub(super) fn mode(dry_run: bool) -> Mode {
    if dry_run { Mode::Dry } else { Mode::Real }
}
