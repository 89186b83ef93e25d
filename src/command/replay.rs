//! `pg-outbox replay`: sends published events again, in the order of their `seq`, at a rate that leaves live ones alone.
//!
//! Runs on the main thread, beside any number of daemons, over connections of its own. It takes no lane and changes no
//! row, so no live event ever waits for it but for the two servers' time; the rate bounds that. Events go out as the
//! daemon sends them, keys in flight together and each with one event at a time, page after page; a page is sent to its
//! end before the next one begins.
//!
//! A replay has a name. It is part of each message's id (`<event id>.<name>`), so that the stream's duplicate window,
//! which knows the event's own id, does not swallow it; and it is a header, so that consumers can tell. Cut short in
//! whatever way, a replay is gone on with by `--after` the last `seq` that it told of and the same `--name`: what was
//! sent beyond that goes out again, and within the duplicate window the stream drops it.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::Serialize;

use super::connect;
use super::options::{ChangeOptions, Format, Mode, print_json_line};
use super::signals::stop_flag;
use super::terminal::agreed;
use crate::boottime::Boottime;
use crate::config::Config;
use crate::config::live::{Live, Settings};
use crate::event::retry::Policy;
use crate::event::topic_map;
use crate::event::{Event, Outcome};
use crate::ops::metrics::Metrics;
use crate::postgres::{ClaimSettings, FoundEvent, FoundPublished, Selection, Store};
use crate::publish::{Memory, Protocol, Publish};

/// Events of a page at most.
const PAGE_MAX: usize = 500;
/// Pages a second, so that a rate is kept evenly.
const PAGES_A_SECOND: u32 = 5;
/// Longest time without any event sent before the replay gives up.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pause before NATS is tried again.
const TRY_AGAIN: Duration = Duration::from_secs(1);
/// Time between two lines that say how far it is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// Longest sleep that a signal waits for.
const NAP: Duration = Duration::from_millis(100);
/// Longest name.
const NAME_MAX: usize = 40;

/// What to send again, and how.
#[derive(Debug, Clone)]
pub struct ReplayOptions {
    /// Which published events; times are those at which they were written.
    pub selection: Selection,
    /// Those with a `seq` above this.
    pub after: Option<i64>,
    /// Events a second at most.
    pub rate: u32,
    /// Put before every subject, with a dot between.
    pub prefix: Option<String>,
    /// The stream that must store them; `None`: the configured one.
    pub stream: Option<String>,
    /// Its name; `None`: one that is made of the time.
    pub name: Option<String>,
    /// Whether to do it, whether to ask, how to say what was done.
    pub change: ChangeOptions,
}

/// How far it came.
#[derive(Debug, Default, Serialize)]
struct ReplayProgress {
    name: String,
    /// Published events that the selection found.
    selected: u64,
    /// Those that were sent and acked.
    sent: u64,
    /// Those that were deleted before their turn.
    gone: u64,
    /// Everything that was selected up to here was sent.
    last_seq: Option<i64>,
    /// All of it was sent.
    complete: bool,
    dry_run: bool,
}

/// Sends them. False when it was cut short by a signal or the answer was no.
///
/// # Errors
/// A server is out of reach for a minute, an event is refused, somebody else replays this outbox, nobody is there to be
/// asked. How far it came, and how to go on, is said first.
pub fn run(config: &Config, replay: &ReplayOptions, out: &mut impl Write) -> Result<bool> {
    let name = replay.name.clone().unwrap_or_else(name_of_now);
    check_name(&name)?;
    // The first signal lets the events that are in flight come home.
    let stop = stop_flag()?;
    let store = Store::new(&config.database, "replay", ClaimSettings::default())?;
    let mut found =
        store.find_published(config.database.listen_dsn.as_ref(), &replay.selection, replay.after)?.context(
            "somebody else replays this outbox: one at a time, so that neither gets in the other's way",
        )?;
    let mut done = ReplayProgress { name, selected: found.count, ..ReplayProgress::default() };
    let count = usize::try_from(found.count).unwrap_or(usize::MAX);
    let what = format!("replay {} published event{}", found.count, if count == 1 { "" } else { "s" });
    if replay.change.mode == Mode::Dry {
        done.dry_run = true;
        return report(&done, replay, &what, out).map(|()| true);
    }
    if !agreed(&what, count, replay.change.consent)? {
        eprintln!("nothing done");
        return Ok(false);
    }
    let mut sender = Sender::new(config, replay, &done.name, stop.clone())?;
    let sent = send_all(&store, &mut found, &mut sender, replay.rate, &mut done);
    done.complete = sent.is_ok() && !stop.load(Ordering::Relaxed);
    report(&done, replay, &what, out)?;
    sent?;
    Ok(done.complete)
}

/// Sends page after page, until the end or a signal.
fn send_all(
    store: &Store,
    found: &mut FoundPublished,
    sender: &mut Sender,
    rate: u32,
    done: &mut ReplayProgress,
) -> Result<()> {
    let (started, mut told) = (Instant::now(), Instant::now());
    let most = page_size(rate);
    loop {
        let listed = found.next(most)?;
        if listed.is_empty() {
            return Ok(());
        }
        for page in pages(&listed, sender.max_bytes) {
            let events = store.read_published(page)?;
            done.gone += (page.len() - events.len()) as u64;
            done.sent += events.len() as u64;
            let left = sender.send(events)?;
            done.sent -= left as u64;
            if left > 0 {
                return Ok(());
            }
            done.last_seq = page.last().map(|event| event.seq);
            if told.elapsed() >= PROGRESS_INTERVAL {
                told = Instant::now();
                eprintln!("sent={} of {} last_seq={}", done.sent, done.selected, done.last_seq.unwrap_or(0));
            }
            let due = Duration::from_secs_f64(done.sent as f64 / f64::from(rate.max(1)));
            if sender.rests_until(started + due) {
                return Ok(());
            }
        }
    }
}

/// Sends events through a connection of its own, and makes a new one when that is lost.
struct Sender {
    publish: Publish,
    /// Makes the connection.
    nats: crate::config::Nats,
    instance: String,
    budget: Duration,
    /// Bytes of a page at most.
    max_bytes: usize,
    stop: Arc<AtomicBool>,
}

impl Sender {
    fn new(config: &Config, replay: &ReplayOptions, name: &str, stop: Arc<AtomicBool>) -> Result<Sender> {
        let mut config = config.clone();
        if let Some(stream) = &replay.stream {
            config.nats.jetstream.stream_name.clone_from(stream);
        }
        config.nats.jetstream.atomic_batches = false;
        if let Some(prefix) = &replay.prefix {
            topic_map::is_literal_subject(prefix).map_err(|why| anyhow!("--prefix {prefix}: {why}"))?;
        }
        let mut settings = Settings::of(&config);
        settings.headers.replay = Some(name.to_owned());
        settings.topic_map = settings.topic_map.below(replay.prefix.clone());
        // What is refused is refused: somebody sees it at once.
        settings.policy = Policy { max_attempts: 1, ..settings.policy };
        settings.dead_letter_subject = None;
        let instance = format!("{}-replay", config.dispatcher.instance_id);
        let (publisher, _) = connect::publisher(&config.nats, &instance);
        let publish = Publish {
            publisher,
            live: Live::new(settings),
            ordered: config.ordering.enabled,
            protocol: Protocol::of(&config.nats.jetstream),
            ack_timeout: config.nats.ack_timeout,
            workers: 1,
            draining: stop.clone(),
            memory: Memory::default(),
            metrics: Metrics::new(),
        };
        let mut sender = Sender {
            publish,
            nats: config.nats,
            instance,
            budget: config.dispatcher.claim_budget,
            max_bytes: config.dispatcher.max_in_flight_bytes,
            stop,
        };
        sender.connect()?;
        Ok(sender)
    }

    fn connect(&mut self) -> Result<()> {
        let (publisher, keeper) = connect::publisher(&self.nats, &self.instance);
        keeper.survey()?.stream.map_err(|cause| anyhow!(cause))?;
        self.publish.publisher = publisher;
        Ok(())
    }

    /// Sends a page's events, each again until it is acked; returns how many are left when a signal came.
    fn send(&mut self, events: Vec<Event>) -> Result<usize> {
        let mut left: Vec<Arc<Event>> = events.into_iter().map(Arc::new).collect();
        let mut progress = Instant::now();
        while !left.is_empty() && !self.stop.load(Ordering::Relaxed) {
            let report = self.publish.claim(0, &left, Boottime::now().plus(self.budget));
            let before = left.len();
            let outcomes = left.into_iter().zip(report.outcomes);
            let mut again = Vec::new();
            for (event, outcome) in outcomes {
                match outcome {
                    Outcome::Published => {}
                    Outcome::Dead { error, .. } => {
                        bail!(
                            "event {} seq={} topic={} is refused: {error}",
                            event.id,
                            event.seq,
                            event.topic
                        );
                    }
                    Outcome::Retry { .. } | Outcome::Untouched => again.push(event),
                }
            }
            left = again;
            if left.len() < before {
                progress = Instant::now();
                continue;
            }
            let lost = self.connect();
            if progress.elapsed() > PATIENCE {
                lost?;
                bail!("nothing could be sent for {}s", PATIENCE.as_secs());
            }
            self.rests_until(Instant::now() + TRY_AGAIN);
        }
        Ok(left.len())
    }

    /// Waits until then; true as soon as a signal has come.
    fn rests_until(&self, then: Instant) -> bool {
        while !self.stop.load(Ordering::Relaxed) {
            let wait = then.saturating_duration_since(Instant::now());
            if wait.is_zero() {
                return false;
            }
            sleep(wait.min(NAP));
        }
        true
    }
}

fn report(done: &ReplayProgress, replay: &ReplayOptions, what: &str, out: &mut impl Write) -> Result<()> {
    if replay.change.format == Format::Json {
        return print_json_line(done, out);
    }
    if done.dry_run {
        writeln!(out, "would {what}")?;
        return Ok(());
    }
    let ReplayProgress { name, selected, sent, gone, last_seq, complete, .. } = done;
    let last = last_seq.or(replay.after).map(|seq| seq.to_string());
    let last_seq = last.as_deref().unwrap_or("none");
    writeln!(out, "replayed {sent} of {selected}: name={name} last_seq={last_seq}")?;
    if *gone > 0 {
        writeln!(out, "{gone} were deleted before their turn")?;
    }
    if !complete {
        let after = last.map(|seq| format!("--after {seq} ")).unwrap_or_default();
        writeln!(out, "to go on: the same command with {after}--name {name}")?;
    }
    Ok(())
}

/// A name that no replay had before: the time in seconds, and something random.
fn name_of_now() -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    format!("r{}-{:04x}", now.as_secs(), fastrand::u16(..))
}

/// A name becomes a part of a header's value.
fn check_name(name: &str) -> Result<()> {
    let fits = (1..=NAME_MAX).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    ensure!(fits, "--name {name:?}: 1 to {NAME_MAX} letters, digits, - and _");
    Ok(())
}

/// Events of a page at most: a rate is kept from one page to the next.
fn page_size(rate: u32) -> usize {
    usize::try_from(rate / PAGES_A_SECOND).unwrap_or(PAGE_MAX).clamp(1, PAGE_MAX)
}

/// Cuts a list so that no part takes more than so many bytes; a larger event comes alone.
fn pages(listed: &[FoundEvent], max_bytes: usize) -> Vec<&[FoundEvent]> {
    let mut parts = Vec::new();
    let (mut from, mut bytes) = (0, 0_usize);
    for (place, event) in listed.iter().enumerate() {
        if place > from && bytes.saturating_add(event.bytes) > max_bytes {
            parts.push(&listed[from..place]);
            (from, bytes) = (place, 0);
        }
        bytes = bytes.saturating_add(event.bytes);
    }
    parts.push(&listed[from..]);
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_a_fifth_of_a_second() {
        for (rate, size) in [(1, 1), (9, 1), (10, 2), (1_000, 200), (1_000_000, PAGE_MAX)] {
            assert_eq!(page_size(rate), size, "{rate}");
        }
    }

    #[test]
    fn pages_are_bounded_in_bytes_and_a_large_event_comes_alone() {
        let cases: [(&[usize], &[usize]); 5] = [
            (&[1, 2, 3], &[3]),
            (&[5, 5, 5], &[2, 1]),
            (&[11], &[1]),
            (&[1, 11, 1], &[1, 1, 1]),
            (&[10, 1, 9, 1], &[1, 2, 1]),
        ];
        for (sizes, expected) in cases {
            let listed: Vec<FoundEvent> = sizes.iter().map(|bytes| FoundEvent::of_size(*bytes)).collect();
            let lengths: Vec<usize> = pages(&listed, 10).iter().map(|page| page.len()).collect();
            assert_eq!(lengths, expected, "{sizes:?}");
        }
    }

    #[test]
    fn a_name_is_fit_for_a_header() {
        assert!(check_name(&name_of_now()).is_ok());
        for name in ["", "a b", "a\r\nNats-Rollup: all", "ä", &"x".repeat(41)] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
    }
}
