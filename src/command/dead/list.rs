//! `pg-outbox dead list`: a line for each dead letter, those that were written first on top.
//!
//! It reads and changes nothing. What events say is shown so that it cannot steer a terminal, and cut to fit; as JSON it
//! is whole. A hundred are listed unless told otherwise, and that there are more is said.

use std::io::Write;

use anyhow::Result;

use crate::command::options::{Format, print_json};
use crate::command::terminal::printable;
use crate::postgres::{Letter, Selection, Store};

/// Dead letters listed unless told otherwise.
const LISTED: i64 = 100;

pub(super) fn list(
    store: &Store,
    selection: &Selection,
    format: Format,
    out: &mut impl Write,
) -> Result<bool> {
    let limit = selection.limit.unwrap_or(LISTED);
    // One more, to know whether there is one.
    let selection = Selection { limit: Some(limit.saturating_add(1)), ..selection.clone() };
    let mut letters = store.dead_letters(&selection)?;
    let more = letters.len() > usize::try_from(limit).unwrap_or(usize::MAX);
    if more {
        letters.pop();
    }
    match format {
        Format::Json => print_json(&letters, out)?,
        Format::Table => {
            table(&letters, out)?;
            if more {
                writeln!(out, "... and more: --limit shows them")?;
            }
        }
    }
    Ok(true)
}

fn table(letters: &[Letter], out: &mut impl Write) -> Result<()> {
    if letters.is_empty() {
        writeln!(out, "no dead letters")?;
        return Ok(());
    }
    writeln!(
        out,
        "{:>10}  {:36}  {:24}  {:20}  {:>8}  {:20}  WHY",
        "SEQ", "ID", "TOPIC", "KEY", "ATTEMPTS", "DIED"
    )?;
    for Letter { seq, id, topic, key, attempts, dead_at, error, .. } in letters {
        writeln!(
            out,
            "{seq:>10}  {id}  {:24}  {:20}  {attempts:>8}  {dead_at:20}  {}",
            printable(topic),
            printable(key),
            printable(error)
        )?;
    }
    Ok(())
}
