//! `pg-outbox status`: one screen of what waits, what flows and what is in the way, asked of both servers directly, so
//! that it works beside any number of daemons and without any.
//!
//! Runs on the main thread. It only reads, and takes no lock that a claim or a writer could meet. What one server does
//! not tell is shown as a problem beside what the other does. Lists are short ([`LIST_MAX`] entries) whatever there is.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

use super::connect;
use super::options::Format;
use super::terminal::printable;
use crate::config::{Config, OnDead};
use crate::lane::LANES;
use crate::nats::answer::StreamState;
use crate::postgres::{
    BlockedKey, ClaimSettings, Instance, OpenTransaction, Partition, PartitionState, Store, StoreError, Topic,
};

/// Entries of a list at most.
const LIST_MAX: i64 = 10;
/// Time between the two looks that rates are made of.
const RATE_INTERVAL: Duration = Duration::from_secs(1);
/// Time from one screen of `--watch` to the next.
const WATCH_INTERVAL: Duration = Duration::from_secs(2);

/// How often.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repeat {
    /// Once.
    Once,
    /// Every two seconds, until the program is ended.
    ForEver,
}

/// Everything that is shown. What could not be learnt is null or empty, with the cause among the problems.
#[derive(Debug, Default, Serialize)]
struct StatusReport {
    problems: Vec<String>,
    events: Option<Events>,
    rates: Rates,
    topics: Vec<Topic>,
    blocked_keys: Vec<BlockedKey>,
    instances: Vec<Instance>,
    lanes_held: i64,
    lanes: i32,
    partitions: Vec<Partition>,
    partition_days_ahead: Option<f64>,
    default_partition_rows: Option<i64>,
    oldest_transaction: Option<OpenTransaction>,
    stream: Option<StreamStatus>,
}

#[derive(Debug, Serialize)]
struct Events {
    pending: i64,
    retrying: i64,
    dead: i64,
    lag_seconds: f64,
}

/// Per second, as measured during one; null where it is not known.
#[derive(Debug, Default, Serialize)]
struct Rates {
    /// Events that writers inserted, rolled back ones included.
    written: Option<f64>,
    /// Messages that the stream stored, whoever sent them.
    stored: Option<f64>,
}

#[derive(Debug, Serialize)]
struct StreamStatus {
    name: String,
    server: String,
    /// Its subjects.
    subjects: Vec<String>,
    #[serde(flatten)]
    state: StreamState,
}

/// Prints what there is. False when some of it could not be learnt.
///
/// # Errors
/// The DSN cannot be read, or `out` cannot be written.
pub fn run(config: &Config, format: Format, repeat: Repeat, out: &mut impl Write) -> Result<bool> {
    let settings = ClaimSettings {
        ordered: config.ordering.enabled,
        block_on_dead: config.ordering.on_dead == OnDead::Block,
        ..ClaimSettings::default()
    };
    let store = Store::new(&config.database, "status", settings)?;
    let is_screen = std::io::stdout().is_terminal();
    loop {
        let started = Instant::now();
        let status = look(config, &store);
        let text = match format {
            Format::Json => serde_json::to_string(&status).context("write JSON")? + "\n",
            Format::Table => screen(&status),
        };
        if repeat == Repeat::ForEver && format == Format::Table && is_screen {
            // To the upper left corner, and everything gone.
            write!(out, "\x1b[H\x1b[2J")?;
        }
        out.write_all(text.as_bytes())?;
        if repeat == Repeat::ForEver && format == Format::Table && !is_screen {
            // In a file, what keeps one look from the next.
            writeln!(out)?;
        }
        out.flush()?;
        if repeat == Repeat::Once {
            return Ok(status.problems.is_empty());
        }
        // The look itself takes a second, for the rates.
        sleep(WATCH_INTERVAL.saturating_sub(started.elapsed()));
    }
}

/// Looks at both servers, twice at what grows.
fn look(config: &Config, store: &Store) -> StatusReport {
    let mut status = StatusReport { lanes: LANES, ..StatusReport::default() };
    let started = Instant::now();
    let (written, stream) = (store.written().ok(), survey(config));
    let stored = stream.as_ref().ok().and_then(|stream| Some(stream.as_ref()?.state.last_seq));
    look_at_database(config, store, &mut status);
    sleep(RATE_INTERVAL.saturating_sub(started.elapsed()));
    let rate = |count: Option<i64>| count.map(|count| count as f64 / started.elapsed().as_secs_f64());
    let written_now = store.written().ok();
    status.rates.written =
        rate(written.zip(written_now).map(|(before, now)| now.saturating_sub(before).max(0)));
    match stream.and_then(|first| if first.is_some() { survey(config) } else { Ok(None) }) {
        Ok(Some(stream)) => {
            let growth = stored.map(|before| stream.state.last_seq.saturating_sub(before));
            status.rates.stored = rate(growth.map(|growth| i64::try_from(growth).unwrap_or(i64::MAX)));
            status.stream = Some(stream);
        }
        Ok(None) => {}
        Err(problem) => status.problems.push(problem),
    }
    status
}

fn look_at_database(config: &Config, store: &Store, status: &mut StatusReport) {
    let mut problems = Vec::new();
    let backlog = known("backlog", store.backlog(&[], 100_000), &mut problems);
    if let Some(backlog) = backlog {
        status.events = Some(Events {
            pending: backlog.pending,
            retrying: backlog.retrying,
            dead: backlog.dead,
            lag_seconds: backlog.lag.as_secs_f64(),
        });
        status.topics = known("topics", store.topics(LIST_MAX), &mut problems).unwrap_or_default();
        status.blocked_keys =
            known("blocked keys", store.blocked_keys(LIST_MAX), &mut problems).unwrap_or_default();
        status.instances = known("instances", store.instances(), &mut problems).unwrap_or_default();
        status.lanes_held = status.instances.iter().map(|instance| instance.lanes).sum();
        status.oldest_transaction =
            known("oldest transaction", store.oldest_transaction(), &mut problems).flatten();
        let partitions = known("partitions", partitions(config, store), &mut problems);
        if let Some((listed, state)) = partitions {
            status.partitions = listed;
            status.partition_days_ahead = Some(state.days_ahead);
            status.default_partition_rows = Some(state.default_rows);
        }
    }
    status.problems.append(&mut problems);
}

fn partitions(config: &Config, store: &Store) -> Result<(Vec<Partition>, PartitionState), StoreError> {
    let mut partitions = store.partitions()?;
    Ok((partitions.list(config.partitions.retention)?, partitions.state()?))
}

/// The value, or its problem among the others.
fn known<T>(what: &str, result: Result<T, StoreError>, problems: &mut Vec<String>) -> Option<T> {
    result.map_err(|error| problems.push(format!("{what}: {error}"))).ok()
}

/// The stream; `Ok(None)` over core NATS.
fn survey(config: &Config) -> Result<Option<StreamStatus>, String> {
    let instance = format!("{}-status", config.dispatcher.instance_id);
    let (_, keeper) = connect::publisher(&config.nats, &instance);
    let survey = keeper.survey().map_err(|error| format!("nats: {error:#}"))?;
    if !config.nats.jetstream.enabled {
        return Ok(None);
    }
    let facts = survey.stream.map_err(|cause| format!("stream: {cause}"))?;
    Ok(Some(StreamStatus {
        name: config.nats.jetstream.stream_name.clone(),
        server: survey.server,
        subjects: facts.subjects,
        state: facts.state,
    }))
}

fn screen(status: &StatusReport) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = lines(status, &mut text).and_then(|()| tables(status, &mut text));
    text
}

/// The problems, and a line for each thing.
fn lines(status: &StatusReport, out: &mut String) -> std::fmt::Result {
    for problem in &status.problems {
        writeln!(out, "FAIL  {problem}")?;
    }
    if let Some(Events { pending, retrying, dead, lag_seconds }) = status.events {
        writeln!(out, "events      pending {pending}, of these in retry {retrying}; dead letters {dead}")?;
        writeln!(out, "lag         {}", age(lag_seconds))?;
    }
    let rate = |rate: Option<f64>| rate.map_or_else(|| "?".into(), |rate| format!("{rate:.0}/s"));
    writeln!(
        out,
        "rates       written {}, stored {}",
        rate(status.rates.written),
        rate(status.rates.stored)
    )?;
    writeln!(out, "lanes       {} of {} held", status.lanes_held, status.lanes)?;
    if let Some(StreamStatus { name, server, subjects, state }) = &status.stream {
        writeln!(
            out,
            "stream      {name} on {server}: {} messages, {} bytes, last {}, {} consumers, takes {}",
            state.messages,
            state.bytes,
            state.last_seq,
            state.consumer_count,
            subjects.join(" ")
        )?;
    }
    match &status.oldest_transaction {
        Some(OpenTransaction { what, application, role, state, seconds }) => writeln!(
            out,
            "vacuum      waits for {what} of {role} ({application}), {state}, open for {}",
            age(*seconds)
        )?,
        None => writeln!(out, "vacuum      nothing in its way")?,
    }
    if let (Some(days), Some(rows)) = (status.partition_days_ahead, status.default_partition_rows) {
        let count = status.partitions.iter().filter(|partition| !partition.is_default).count();
        let old = status.partitions.iter().filter(|partition| partition.is_old).count();
        writeln!(
            out,
            "partitions  {count}, for {days:.0} days ahead; {old} older than the retention; {rows} rows in DEFAULT"
        )?;
    }
    Ok(())
}

/// What there are several of, each kind with a heading; a kind without any is left out.
fn tables(status: &StatusReport, out: &mut String) -> std::fmt::Result {
    if !status.instances.is_empty() {
        writeln!(out, "\n{:32}  {:>11}  {:>5}  {:>5}", "INSTANCE", "CONNECTIONS", "OPEN", "LANES")?;
    }
    for Instance { name, connections, open, lanes } in &status.instances {
        writeln!(out, "{:32}  {connections:>11}  {open:>5}  {lanes:>5}", printable(name))?;
    }
    if !status.topics.is_empty() {
        writeln!(out, "\n{:32}  {:>11}  {:>8}  {:>8}", "TOPIC", "PENDING", "IN RETRY", "DEAD")?;
    }
    for Topic { topic, pending, retrying, dead } in &status.topics {
        writeln!(out, "{:32}  {pending:>11}  {retrying:>8}  {dead:>8}", printable(topic))?;
    }
    if !status.blocked_keys.is_empty() {
        writeln!(out, "\n{:32}  {:>11}  {:>8}  WHY", "BLOCKED KEY", "FROM SEQ", "BY")?;
    }
    for BlockedKey { key, seq, dead, reason, .. } in &status.blocked_keys {
        let by = if *dead { "dead" } else { "retry" };
        writeln!(out, "{:32}  {seq:>11}  {by:>8}  {}", printable(key), printable(reason))?;
    }
    Ok(())
}

fn age(seconds: f64) -> String {
    match seconds {
        seconds if seconds < 120.0 => format!("{seconds:.1} s"),
        seconds if seconds < 7_200.0 => format!("{:.0} min", seconds / 60.0),
        seconds if seconds < 172_800.0 => format!("{:.1} h", seconds / 3_600.0),
        seconds => format!("{:.1} days", seconds / 86_400.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_screen_without_anything_known_says_why() {
        let status =
            StatusReport { problems: vec!["backlog: connection refused".into()], ..StatusReport::default() };
        let text = screen(&status);
        assert!(text.starts_with("FAIL  backlog: connection refused\n"), "{text}");
        assert!(!text.contains("events"), "{text}");
    }
}
