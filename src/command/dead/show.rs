//! `pg-outbox dead show`: everything that is known of an event, dead or not.
//!
//! It reads and changes nothing. Texts are whole, and such that they cannot steer a terminal; an id that no event has is
//! named on stderr, beside what was found of the others.

use std::collections::HashSet;
use std::io::Write;

use anyhow::Result;
use uuid::Uuid;

use crate::command::options::{Format, print_json};
use crate::command::terminal::harmless;
use crate::postgres::{Store, Whole};

pub(super) fn show(store: &Store, ids: &[Uuid], format: Format, out: &mut impl Write) -> Result<bool> {
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
