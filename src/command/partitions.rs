//! `pg-outbox partitions`: shows, makes and drops the monthly partitions, as the daemon does by itself every ten
//! minutes; for an operator who does not want to wait, wants to see first, or wants a month of long ago.
//!
//! Runs on the main thread, over one connection of its own, beside any number of daemons. Nothing here deletes a
//! pending event or a dead letter, nor single published ones.

use std::io::Write;

use anyhow::{Context, Result, bail, ensure};

use super::options::{Format, Mode, print_json};
use crate::config::Config;
use crate::postgres::{ClaimSettings, Dropped, Partition, PartitionSession, Store};

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PartitionsAction {
    /// Print them, as a table or a JSON array.
    List(Format),
    /// Make what is missing, or one month.
    Create {
        /// `YYYY-MM`.
        month: Option<String>,
        /// Whether to do it.
        mode: Mode,
    },
    /// Drop what is too old.
    Drop {
        /// Whether to do it.
        mode: Mode,
    },
}

/// Does it and prints a line for each partition. False when a partition that should go could not be dropped because
/// its locks were not free.
///
/// # Errors
/// PostgreSQL is out of reach or refuses; the month is none; dropping is asked for and `partitions.retention` is off.
pub fn run(config: &Config, action: &PartitionsAction, out: &mut impl Write) -> Result<bool> {
    let store = Store::new(&config.database, "partitions", ClaimSettings::default())?;
    let mut partitions = store.partitions()?;
    match action {
        PartitionsAction::List(format) => {
            let listed = partitions.list(config.partitions.retention)?;
            match format {
                Format::Table => list(&listed, out)?,
                Format::Json => print_json(&listed, out)?,
            }
        }
        PartitionsAction::Create { month, mode } => {
            let days = match month {
                Some(month) => vec![first_day(month)?],
                None => partitions.missing(config.partitions.premake)?,
            };
            create(&mut partitions, &days, *mode, out)?;
        }
        PartitionsAction::Drop { mode } => return drop(config, &mut partitions, *mode, out),
    }
    Ok(true)
}

fn list(partitions: &[Partition], out: &mut impl Write) -> Result<()> {
    let width = partitions.iter().map(|partition| partition.name.len()).max().unwrap_or(0).max(9);
    writeln!(
        out,
        "{:width$}  {:10}  {:10}  {:>10}  {:>11}  KEPT FOR",
        "PARTITION", "FROM", "TO", "SIZE", "ROWS"
    )?;
    for partition in partitions {
        let Partition { name, from, to, bytes, rows, .. } = partition;
        let bound = |day: &Option<String>| day.clone().unwrap_or_else(|| "-".into());
        let rows = rows.map_or_else(|| "?".to_owned(), |rows| format!("~{rows}"));
        writeln!(
            out,
            "{name:width$}  {:10}  {:10}  {:>10}  {rows:>11}  {}",
            bound(from),
            bound(to),
            size(*bytes),
            kept_for(partition)
        )?;
    }
    Ok(())
}

/// Why a partition stays; `nothing` when the next round drops it.
fn kept_for(partition: &Partition) -> &str {
    match (partition.holds.as_deref(), partition.is_default, partition.is_old) {
        (Some("dead"), _, _) => "dead letters",
        (Some("discarded"), _, _) => "events discarded lately",
        (Some("unread"), false, true) => "pending events, if any: not read so far",
        (Some("unread") | None, true, _) => "events without a partition",
        (Some("unread") | None, false, false) => "its time",
        (Some(_), _, _) => "pending events",
        (None, false, true) => "nothing: to be dropped",
    }
}

fn size(bytes: i64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let mut number = bytes as f64 / 1024.0;
    let mut unit = 0;
    while number >= 1024.0 && unit + 1 < UNITS.len() {
        number /= 1024.0;
        unit += 1;
    }
    format!("{number:.1} {}", UNITS[unit])
}

fn create(
    partitions: &mut PartitionSession,
    days: &[String],
    mode: Mode,
    out: &mut impl Write,
) -> Result<()> {
    if days.is_empty() {
        writeln!(out, "nothing to make: every month has its partition")?;
    }
    for day in days {
        let month = day.get(..7).unwrap_or(day);
        match mode {
            Mode::Dry => writeln!(out, "would make the partition of {month}")?,
            Mode::Real => {
                let name =
                    partitions.create(day).with_context(|| format!("make the partition of {month}"))?;
                writeln!(out, "partition of {month} is there: {name}")?;
            }
        }
    }
    Ok(())
}

fn drop(
    config: &Config,
    partitions: &mut PartitionSession,
    mode: Mode,
    out: &mut impl Write,
) -> Result<bool> {
    let Some(retention) = config.partitions.retention else {
        bail!("partitions.retention is off: no partition is too old");
    };
    let shown = humantime::format_duration(retention);
    let old: Vec<Partition> =
        partitions.list(Some(retention))?.into_iter().filter(|partition| partition.is_old).collect();
    if old.is_empty() {
        writeln!(out, "nothing to drop: no partition is older than {shown} as a whole")?;
    }
    let mut all_done = true;
    for Partition { name, holds, .. } in old {
        let outcome = match (mode, holds.as_deref()) {
            (Mode::Real, None) if partitions.has_fresh(&name, || true)? == Some(true) => Dropped::Pending,
            (Mode::Real, _) => partitions.drop(&name, retention).with_context(|| format!("drop {name}"))?,
            (Mode::Dry, None) => Dropped::Dropped,
            (Mode::Dry, Some("dead")) => Dropped::Dead,
            (Mode::Dry, Some("discarded")) => Dropped::Discarded,
            (Mode::Dry, Some("unread")) => Dropped::Unread,
            (Mode::Dry, Some(_)) => Dropped::Pending,
        };
        all_done &= !matches!(outcome, Dropped::Locked | Dropped::Unread);
        match (outcome, mode) {
            (Dropped::Dropped, Mode::Real) => writeln!(out, "dropped {name}")?,
            (Dropped::Dropped, Mode::Dry) => writeln!(out, "would drop {name}")?,
            (Dropped::Young, _) => writeln!(out, "kept {name}: it is not older than {shown} as a whole")?,
            (Dropped::Pending, _) => writeln!(out, "kept {name}: it has pending events")?,
            (Dropped::Discarded, _) => {
                writeln!(out, "kept {name}: it has events that were discarded less than {shown} ago")?;
            }
            (Dropped::Dead, _) => writeln!(out, "kept {name}: it has dead letters; retry or discard them")?,
            (Dropped::Unread, _) => writeln!(
                out,
                "kept {name}: whether it has pending events is not known yet, as its lanes are not read so far; try again once \
                 pg-outbox has worked for a while"
            )?,
            (Dropped::Locked, _) => writeln!(
                out,
                "kept {name}: its locks were not free, as a transaction that uses the outbox stays open; try again"
            )?,
        }
    }
    Ok(all_done)
}

/// The first day of `YYYY-MM`.
fn first_day(month: &str) -> Result<String> {
    let shape = |(n, byte): (usize, u8)| if n == 4 { byte == b'-' } else { byte.is_ascii_digit() };
    ensure!(
        month.len() == 7 && month.bytes().enumerate().all(shape) && ("01"..="12").contains(&&month[5..]),
        "{month:?} is not a month; write it as 2024-02"
    );
    Ok(format!("{month}-01"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_month_is_year_and_month() {
        assert_eq!(first_day("2024-02").unwrap(), "2024-02-01");
        for month in ["", "2024", "2024-13", "2024-00", "2024-2", "24-02", "2024-02-01", "2024/02", "2024-0é"]
        {
            assert!(first_day(month).is_err(), "{month}");
        }
    }

    #[test]
    fn sizes_are_short() {
        for (bytes, expected) in [
            (0, "0.0 KiB"),
            (1536, "1.5 KiB"),
            (5 << 20, "5.0 MiB"),
            (3 << 40, "3.0 TiB"),
            (5000 << 40, "5000.0 TiB"),
        ] {
            assert_eq!(size(bytes), expected);
        }
    }
}
