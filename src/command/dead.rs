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

use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use uuid::Uuid;

use super::options::{ChangeOptions, Format, Mode, print_json, print_json_line};
use super::terminal::{agreed, harmless, printable};
use crate::config::Config;
use crate::nats::Publisher;
use crate::ops::health::Health;
use crate::ops::metrics::Metrics;
use crate::postgres::{CHANGE_MAX, ClaimSettings, Letter, LetterChange, Selection, Store, Whole};
use crate::publish;

/// Dead letters of one run at most.
const SELECTED_MAX: i64 = 1_000_000;
/// Dead letters listed unless told otherwise.
const LISTED: i64 = 100;

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
        DeadAction::List(selection, format) => list(&store, selection, *format, out),
        DeadAction::Show(ids, format) => show(&store, ids, *format, out),
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

fn select(store: &Store, selection: &Selection) -> Result<Vec<Letter>> {
    let limit = Some(selection.limit.unwrap_or(SELECTED_MAX).min(SELECTED_MAX));
    Ok(store.dead_letters(&Selection { limit, ..selection.clone() })?)
}

fn list(store: &Store, selection: &Selection, format: Format, out: &mut impl Write) -> Result<bool> {
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

fn show(store: &Store, ids: &[Uuid], format: Format, out: &mut impl Write) -> Result<bool> {
    let events = store.events_by_id(ids)?;
    match format {
        Format::Json => print_json(&events, out)?,
        Format::Table => {
            for (place, event) in events.iter().enumerate() {
                if place > 0 {
                    writeln!(out)?;
                }
                show_event(event, out)?;
            }
        }
    }
    let found: HashSet<&str> = events.iter().map(|event| event.id.as_str()).collect();
    let mut all_found = true;
    for id in ids.iter().map(Uuid::to_string).filter(|id| !found.contains(id.as_str())) {
        eprintln!("no event has the id {id}");
        all_found = false;
    }
    Ok(all_found)
}

fn show_event(event: &Whole, out: &mut impl Write) -> Result<()> {
    let json =
        |value: &Option<Box<serde_json::value::RawValue>>| value.as_ref().map(|value| value.get().to_owned());
    let lines = [
        ("id", Some(event.id.clone())),
        ("seq", Some(event.seq.to_string())),
        ("topic", Some(event.topic.clone())),
        ("key", Some(event.key.clone())),
        ("lane", Some(event.lane.to_string())),
        ("state", Some(event.state.clone())),
        ("created", Some(event.created_at.clone())),
        ("published", event.published_at.clone()),
        ("attempts", Some(event.attempts.to_string())),
        ("error", event.last_error.clone()),
        ("due", event.next_attempt_at.clone()),
        ("died", event.dead_at.clone()),
        ("discarded", event.discarded_at.clone()),
        ("by", event.discarded_by.clone()),
        ("why", event.discard_reason.clone()),
        ("metadata", json(&event.metadata)),
        ("payload", json(&event.payload)),
    ];
    for (name, value) in lines {
        if let Some(value) = value {
            writeln!(out, "{name:10}  {}", harmless(&value))?;
        }
    }
    Ok(())
}

/// A change of dead letters.
struct Changing<'a> {
    /// `retry` and `retried`.
    verb: (&'static str, &'static str),
    change: LetterChange<'a>,
    options: ChangeOptions,
}

/// What was done, as JSON.
#[derive(Serialize)]
struct ChangeReport {
    /// Dead letters that the selection found.
    selected: usize,
    /// Those that were changed, or would be.
    changed: usize,
    /// Those that somebody else decided about meanwhile.
    passed_over: usize,
    dry_run: bool,
    events: Vec<ChangedEvent>,
}

#[derive(Serialize)]
struct ChangedEvent {
    seq: i64,
    id: String,
    topic: String,
    key: String,
    /// Its id from now on, if that is another one.
    #[serde(skip_serializing_if = "Option::is_none")]
    new_id: Option<String>,
}

impl Changing<'_> {
    fn run(
        &self,
        store: &Store,
        selection: &Selection,
        mut letters: Vec<Letter>,
        rate: Option<u32>,
        out: &mut impl Write,
    ) -> Result<bool> {
        let all_named_are_dead = name_others(store, selection, &letters)?;
        let ChangeOptions { mode, consent, format } = self.options;
        let selected = letters.len();
        let what = format!("{} {}", self.verb.0, counted(selected));
        if mode == Mode::Real && !agreed(&what, selected, consent)? {
            eprintln!("nothing done");
            return Ok(false);
        }
        let mut events = Vec::new();
        let started = Instant::now();
        letters.sort_by_key(|letter| (letter.lane, letter.seq));
        for lane in letters.chunk_by(|a, b| a.lane == b.lane) {
            for some in lane.chunks(at_once(rate)) {
                let changed: HashSet<i64> = match mode {
                    Mode::Dry => some.iter().map(|letter| letter.seq).collect(),
                    Mode::Real => store
                        .change_dead(some, self.change)
                        .with_context(|| format!("{} of {selected} were {}", events.len(), self.verb.1))?
                        .into_iter()
                        .collect(),
                };
                for letter in some.iter().filter(|letter| changed.contains(&letter.seq)) {
                    let event = self.done(letter);
                    if format == Format::Table {
                        self.print(&event, out)?;
                    }
                    events.push(event);
                }
                if mode == Mode::Real {
                    sleep(pause(events.len(), rate, started.elapsed()));
                }
            }
        }
        let done = ChangeReport {
            selected,
            changed: events.len(),
            passed_over: selected - events.len(),
            dry_run: mode == Mode::Dry,
            events,
        };
        self.report(&done, out)?;
        Ok(all_named_are_dead)
    }

    fn done(&self, letter: &Letter) -> ChangedEvent {
        let new_id = match self.change {
            LetterChange::Retry(new_ids) => new_ids.get(&letter.id),
            LetterChange::Discard { .. } => None,
        };
        ChangedEvent {
            seq: letter.seq,
            id: letter.id.to_string(),
            topic: letter.topic.clone(),
            key: letter.key.clone(),
            new_id: new_id.map(Uuid::to_string),
        }
    }

    fn print(&self, event: &ChangedEvent, out: &mut impl Write) -> Result<()> {
        let verb = match self.options.mode {
            Mode::Real => self.verb.1.to_owned(),
            Mode::Dry => format!("would {}", self.verb.0),
        };
        let ChangedEvent { seq, id, topic, key, new_id } = event;
        let new_id = new_id.as_ref().map(|id| format!(" new_id={id}")).unwrap_or_default();
        writeln!(
            out,
            "{verb} seq={seq} event={id}{new_id} topic={} key={}",
            printable(topic),
            printable(key)
        )?;
        Ok(())
    }

    fn report(&self, done: &ChangeReport, out: &mut impl Write) -> Result<()> {
        if self.options.format == Format::Json {
            return print_json_line(done, out);
        }
        let ChangeReport { changed, passed_over, .. } = *done;
        match self.options.mode {
            Mode::Dry => writeln!(out, "would {} {}", self.verb.0, counted(changed))?,
            Mode::Real => writeln!(out, "{} {}", self.verb.1, counted(changed))?,
        }
        if passed_over > 0 {
            writeln!(out, "passed over {passed_over}: no dead letters any more, somebody else was quicker")?;
        }
        if i64::try_from(done.selected).is_ok_and(|selected| selected >= SELECTED_MAX) {
            writeln!(out, "there may be more: run it again")?;
        }
        Ok(())
    }
}

/// Names the ids of the selection that are no dead letters. True without any.
fn name_others(store: &Store, selection: &Selection, letters: &[Letter]) -> Result<bool> {
    let Some(ids) = &selection.ids else { return Ok(true) };
    let dead: HashSet<Uuid> = letters.iter().map(|letter| letter.id).collect();
    let others: Vec<Uuid> = ids.iter().copied().filter(|id| !dead.contains(id)).collect();
    if others.is_empty() {
        return Ok(true);
    }
    let events = store.events_by_id(&others)?;
    for id in others {
        let state = events.iter().find(|event| event.id == id.to_string()).map(|event| event.state.as_str());
        match state {
            Some("dead") => eprintln!("{id} is not in this selection"),
            Some(state) => eprintln!("{id} is no dead letter: it is {state}"),
            None => eprintln!("no event has the id {id}"),
        }
    }
    Ok(false)
}

/// A new id for each id there is.
fn fresh_ids(letters: &[Letter]) -> HashMap<Uuid, Uuid> {
    letters.iter().map(|letter| (letter.id, fresh_id())).collect()
}

/// A time-ordered id, as the schema makes them.
fn fresh_id() -> Uuid {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut random = [0; 10];
    fastrand::fill(&mut random);
    uuid::Builder::from_unix_timestamp_millis(u64::try_from(now.as_millis()).unwrap_or(0), &random)
        .into_uuid()
}

/// Why the stream may have an event already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DuplicateCause {
    /// Its last attempt got no ack, which says nothing of whether it was stored.
    Unacked,
    /// Another row with its id was published.
    Copy,
}

/// Whether the stream may have stored the event's message id, and how many seconds ago at least.
fn seen(letter: &Letter) -> Option<(DuplicateCause, f64)> {
    let copy = letter.copy_published.map(|ago| (DuplicateCause::Copy, ago));
    let unacked = letter.error.starts_with(publish::NO_ACK).then_some(letter.dead_for).flatten();
    copy.or(unacked.map(|ago| (DuplicateCause::Unacked, ago)))
}

/// Says how many of these the stream would take for duplicates.
fn warn_of_duplicates(config: &Config, letters: &[Letter]) {
    let suspects: Vec<(DuplicateCause, f64)> = letters.iter().filter_map(seen).collect();
    if !config.nats.jetstream.enabled || suspects.is_empty() {
        return;
    }
    let stream = &config.nats.jetstream.stream_name;
    match duplicate_window(config) {
        Ok(window) => {
            if let Some(text) = warning(&suspects, window, stream) {
                eprintln!("{text}");
            }
        }
        Err(cause) => eprintln!(
            "note: {} of these may be in stream {stream} already, and its duplicate window is not known ({cause}): if it \
             still covers them, they count as published without being stored again; --new-id makes sure",
            suspects.len()
        ),
    }
}

/// What to say of the suspects that the window still covers; `None` if it covers none.
fn warning(suspects: &[(DuplicateCause, f64)], window: Duration, stream: &str) -> Option<String> {
    let covered: Vec<&(DuplicateCause, f64)> =
        suspects.iter().filter(|(_, ago)| *ago < window.as_secs_f64()).collect();
    let youngest = covered.iter().map(|(_, ago)| *ago).reduce(f64::min)?;
    let copies = covered.iter().filter(|(seen, _)| *seen == DuplicateCause::Copy).count();
    let left = Duration::from_secs((window.as_secs_f64() - youngest).ceil().max(1.0) as u64);
    Some(format!(
        "warning: stream {stream} may have {} of these by their message ids ({copies} share theirs with a published \
         event, {} got no ack), and would take them for duplicates for up to {}: they then count as published without \
         being stored again. Wait, or use --new-id",
        covered.len(),
        covered.len() - copies,
        humantime::format_duration(left)
    ))
}

/// The stream's duplicate window, or why it is not known.
fn duplicate_window(config: &Config) -> Result<Duration, String> {
    let instance = format!("{}-dead", config.dispatcher.instance_id);
    let (_, keeper) = Publisher::new(config.nats.clone(), &instance, 1, Health::default(), Metrics::new());
    let survey = keeper.survey().map_err(|error| format!("{error:#}"))?;
    let facts = survey.stream.map_err(|fault| fault.to_string())?;
    Ok(Duration::from_nanos(facts.keeping.duplicate_window_ns))
}

/// The user of the operating system, for the record: `ada@db-host`.
fn who() -> String {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let user = set("SUDO_USER").or_else(|| set("USER")).or_else(|| set("LOGNAME"));
    let user = user.unwrap_or_else(|| format!("uid {}", rustix::process::getuid().as_raw()));
    format!("{user}@{}", rustix::system::uname().nodename().to_string_lossy())
}

fn counted(count: usize) -> String {
    format!("{count} dead letter{}", if count == 1 { "" } else { "s" })
}

/// Events of one transaction at most: a rate is kept from one to the next.
fn at_once(rate: Option<u32>) -> usize {
    rate.map_or(CHANGE_MAX, |rate| usize::try_from(rate).unwrap_or(CHANGE_MAX)).clamp(1, CHANGE_MAX)
}

/// How long to wait after `done` events so as to keep the rate.
fn pause(done: usize, rate: Option<u32>, elapsed: Duration) -> Duration {
    let due = rate.map_or(0.0, |rate| done as f64 / f64::from(rate.max(1)));
    Duration::from_secs_f64(due).saturating_sub(elapsed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_window_still_covers_is_warned_of() {
        let window = Duration::from_secs(120);
        assert_eq!(warning(&[], window, "S"), None);
        assert_eq!(
            warning(&[(DuplicateCause::Unacked, 120.0), (DuplicateCause::Copy, 500.0)], window, "S"),
            None
        );
        let text = warning(
            &[
                (DuplicateCause::Unacked, 20.0),
                (DuplicateCause::Copy, 90.5),
                (DuplicateCause::Unacked, 130.0),
            ],
            window,
            "S",
        )
        .unwrap();
        assert!(text.contains("may have 2 of these") && text.contains("(1 share"), "{text}");
        assert!(text.contains("for up to 1m 40s"), "{text}");
    }

    #[test]
    fn a_rate_is_kept_from_one_transaction_to_the_next() {
        let cases = [
            (None, CHANGE_MAX, 0, Duration::ZERO),
            (Some(10), 10, 10, Duration::from_millis(600)),
            (Some(10), 10, 3, Duration::ZERO),
            (Some(100_000), CHANGE_MAX, 500, Duration::ZERO),
        ];
        for (rate, chunk, done, wait) in cases {
            assert_eq!(at_once(rate), chunk, "{rate:?}");
            assert_eq!(pause(done, rate, Duration::from_millis(400)), wait, "{rate:?} {done}");
        }
    }

    #[test]
    fn fresh_ids_are_new_and_in_the_order_of_time() {
        let (one, other) = (fresh_id(), fresh_id());
        assert_ne!(one, other);
        assert_eq!((one.get_version_num(), one.get_variant()), (7, uuid::Variant::RFC4122));
    }
}
