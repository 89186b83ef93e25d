//! `pg-outbox dead retry` and `discard`: the selection lane by lane, in small transactions, at the rate that was asked for.
//!
//! Runs on the main thread, beside daemons and other operators. Cut short, what was printed as done is done, and the rest
//! is as it was. An event that somebody else decided about meanwhile is passed over and counted, never changed twice.

use std::collections::HashSet;
use std::io::Write;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;
use uuid::Uuid;

use crate::command::options::{ChangeOptions, Format, Mode, print_json_line};
use crate::command::terminal::{agreed, printable};
use crate::postgres::{CHANGE_MAX, Letter, LetterChange, Selection, Store};

/// Dead letters of one run at most.
const SELECTED_MAX: i64 = 1_000_000;

/// The dead letters of a selection.
pub(super) fn select(store: &Store, selection: &Selection) -> Result<Vec<Letter>> {
    let limit = Some(selection.limit.unwrap_or(SELECTED_MAX).min(SELECTED_MAX));
    Ok(store.dead_letters(&Selection { limit, ..selection.clone() })?)
}

/// A change of dead letters.
pub(super) struct Changing<'a> {
    /// `retry` and `retried`.
    pub(super) verb: (&'static str, &'static str),
    pub(super) change: LetterChange<'a>,
    pub(super) options: ChangeOptions,
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
    /// Changes them and says so. False when something that was named is no dead letter, or the answer was no.
    pub(super) fn run(
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
}
