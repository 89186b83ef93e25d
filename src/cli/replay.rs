//! `pg-outbox replay` on the command line.

use anyhow::Result;
use clap::Args;

use super::change::ChangeFlags;
use super::selection::PublishedFlags;
use crate::command::replay::ReplayOptions;

#[derive(Args)]
pub(super) struct ReplayFlags {
    #[command(flatten)]
    select: PublishedFlags,
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
    change: ChangeFlags,
}

impl TryFrom<&ReplayFlags> for ReplayOptions {
    type Error = anyhow::Error;

    fn try_from(asked: &ReplayFlags) -> Result<ReplayOptions> {
        let ReplayFlags { select, after, rate, prefix, stream, name, change } = asked;
        Ok(ReplayOptions {
            selection: select.selection()?,
            after: *after,
            rate: *rate,
            prefix: prefix.clone(),
            stream: stream.clone(),
            name: name.clone(),
            change: change.options(),
        })
    }
}
