//! The NATS headers of an event: ours, then one for each field of its metadata.
//!
//! Pure, and called once an event by whichever thread publishes it: one string is written from front to end,
//! linear in the metadata, and metadata is neither built into a tree nor walked recursively. What may stand in it is
//! the business of [`header_rules`](super::header_rules): every name of the metadata is asked for there, and every
//! value, ours included, is cleaned there. As old servers take the first match of a name anywhere in the block for the
//! header, our own headers come first, `Nats-Msg-Id` ahead of all.
//!
//! Whatever the metadata holds, the event still goes, and [`Headers::altered`] says what was left out or changed.
//! Values are otherwise sent as they are: clients commonly trim blanks at either end. Names that differ in case alone
//! are all sent, in the metadata's order, as NATS tells them apart.

use std::borrow::Cow;
use std::fmt::{self, Write};

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::event::Event;
use crate::event::header_rules::{Altered, Reason, clean, may_set, push_compact};

/// What a header block takes beside the topic and the metadata, roughly: to allocate once.
const OWN_HEADERS_BYTES: usize = 320;

/// What the headers of all events have in common.
#[derive(Debug, Clone)]
pub struct HeaderPolicy {
    /// `dispatcher.instance_id`, for `Outbox-Instance`.
    pub instance: String,
    /// The stream that must store the event, for `Nats-Expected-Stream`; `None` over core NATS.
    pub stream: Option<String>,
    /// `nats.allow_headers`: the `Nats-*` headers that metadata may set, spelled exactly like this. Those that
    /// [`can_be_allowed`](super::header_rules::can_be_allowed) refuses have no effect.
    pub allow: Vec<String>,
    /// The name of a replay: a part of its message ids, so that they are not those of the first time, and a header.
    pub replay: Option<String>,
}

/// What is said of a dead letter where it is announced.
#[derive(Debug, Clone, Copy)]
pub struct Death<'a> {
    /// Attempts that were made.
    pub attempts: u32,
    /// Why the last one failed.
    pub reason: &'a str,
    /// The subject that its topic became.
    pub subject: &'a str,
    /// When it is announced, in milliseconds since 1970.
    pub announced_ms: u128,
}

/// The headers of one event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Headers {
    /// `Name: value` lines, each ended by CR LF, without the `NATS/1.0` line before and the empty one after.
    pub block: String,
    /// What of the metadata was left out or changed.
    pub altered: Altered,
}

impl HeaderPolicy {
    /// The headers of `event`, for its next attempt.
    pub fn build(&self, event: &Event) -> Headers {
        let mut writer = BlockWriter::for_event(event, &self.allow);
        match &self.replay {
            None => writer.own("Nats-Msg-Id", event.id.hyphenated()),
            Some(name) => writer.own("Nats-Msg-Id", format_args!("{}.{name}", event.id.hyphenated())),
        }
        if let Some(stream) = &self.stream {
            writer.own("Nats-Expected-Stream", stream);
        }
        self.describe(&mut writer, event, event.attempts.saturating_add(1));
        if let Some(name) = &self.replay {
            writer.own("Outbox-Replay", name);
        }
        writer.metadata_of(event);
        Headers { block: writer.block, altered: writer.altered }
    }

    /// The headers of the announcement that `event` is dead: those of the event and why it died, without what would
    /// decide where it is stored, and with a message id that begins with the event's and is that of no event.
    pub fn announce(&self, event: &Event, death: &Death) -> Headers {
        let mut writer = BlockWriter::for_event(event, &[]);
        writer.own("Nats-Msg-Id", format_args!("{}.dead.{}", event.id.hyphenated(), death.announced_ms));
        self.describe(&mut writer, event, death.attempts);
        writer.own("Outbox-Subject", death.subject);
        writer.own("Outbox-Dead-Reason", death.reason);
        writer.metadata_of(event);
        Headers { block: writer.block, altered: writer.altered }
    }

    fn describe(&self, writer: &mut BlockWriter, event: &Event, attempt: u32) {
        writer.own("Outbox-Seq", event.seq);
        writer.own("Outbox-Topic", &event.topic);
        writer.own("Outbox-Created-At", CreationTime(event.created_at));
        writer.own("Outbox-Attempt", attempt);
        writer.own("Outbox-Instance", &self.instance);
    }
}

/// Writes a header block.
struct BlockWriter<'a> {
    allow: &'a [String],
    block: String,
    altered: Altered,
}

impl<'a> BlockWriter<'a> {
    /// With room for all that the event may need.
    fn for_event(event: &Event, allow: &'a [String]) -> BlockWriter<'a> {
        let metadata = event.metadata.as_ref().map_or(0, String::len);
        let capacity = OWN_HEADERS_BYTES + event.topic.len() + metadata + metadata / 4;
        BlockWriter { allow, block: String::with_capacity(capacity), altered: Altered::default() }
    }

    fn metadata_of(&mut self, event: &Event) {
        if let Some(metadata) = &event.metadata {
            self.metadata(metadata);
        }
    }

    /// Writes a header of ours. Topics and names of instances and streams are outside input too.
    fn own(&mut self, name: &str, value: impl fmt::Display) {
        self.begin(name);
        let start = self.block.len();
        // Writing to a string does not fail.
        let _ = write!(self.block, "{value}");
        self.end(name, start);
    }

    fn metadata(&mut self, json: &str) {
        let mut deserializer = serde_json::Deserializer::from_str(json);
        let is_object = json.trim_start().starts_with('{');
        if !is_object {
            self.altered.add("metadata", Reason::NotAnObject);
        } else if deserializer.deserialize_map(&mut *self).and_then(|()| deserializer.end()).is_err() {
            // PostgreSQL checks its JSON: this is a column of another type.
            self.altered.add("metadata", Reason::NotJson);
        }
    }

    /// Writes the header of one metadata field; `json` is its value, valid but with blanks as found.
    fn field(&mut self, name: &str, json: &str) {
        if json == "null" {
            return;
        }
        if let Err(reason) = may_set(name, self.allow) {
            self.altered.add(name, reason);
            return;
        }
        let line = self.block.len();
        self.begin(name);
        let start = self.block.len();
        match json.as_bytes().first() {
            Some(b'"') if !json.contains('\\') => self.block.push_str(&json[1..json.len() - 1]),
            Some(b'"') => match serde_json::from_str::<Text<'_>>(json) {
                Ok(text) => self.block.push_str(&text.0),
                Err(_) => {
                    self.block.truncate(line);
                    self.altered.add(name, Reason::NotText);
                    return;
                }
            },
            Some(b'{' | b'[') => push_compact(&mut self.block, json),
            // Numbers stay as PostgreSQL printed them: through a float, 1e400 or 0.1000 would be another.
            _ => self.block.push_str(json),
        }
        self.end(name, start);
    }

    fn begin(&mut self, name: &str) {
        self.block.push_str(name);
        self.block.push_str(": ");
    }

    /// Makes what was written from `start` on safe to stand in a line, and ends the line.
    fn end(&mut self, name: &str, start: usize) {
        if let Some(reason) = clean(&mut self.block, start) {
            self.altered.add(name, reason);
        }
        self.block.push_str("\r\n");
    }
}

impl<'de> Visitor<'de> for &mut BlockWriter<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<(), A::Error> {
        while let Some(name) = fields.next_key::<Text<'de>>()? {
            // Raw: not parsed but skipped over, which serde_json does without recursion.
            let value: &RawValue = fields.next_value()?;
            self.field(&name.0, value.get());
        }
        Ok(())
    }
}

/// A JSON string, copied only if it has escapes.
#[derive(Deserialize)]
#[serde(transparent)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// Microseconds since 2000-01-01 UTC, as PostgreSQL counts, printed by RFC 3339. The RFC ends at the year
/// 9999; later years and those before 1 (astronomical: 1 BC is 0) are printed with their sign, as ISO 8601
/// does.
struct CreationTime(i64);

impl fmt::Display for CreationTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MICROS_PER_SECOND: i64 = 1_000_000;
        const MICROS_PER_DAY: i64 = 86_400 * MICROS_PER_SECOND;
        match self.0 {
            i64::MIN => return f.write_str("-infinity"),
            i64::MAX => return f.write_str("infinity"),
            _ => {}
        }
        let (year, month, day) = civil(self.0.div_euclid(MICROS_PER_DAY));
        let micros = self.0.rem_euclid(MICROS_PER_DAY);
        let seconds = micros / MICROS_PER_SECOND;
        if (0..=9999).contains(&year) {
            write!(f, "{year:04}")?;
        } else {
            write!(f, "{year:+05}")?;
        }
        let (hour, minute, second) = (seconds / 3_600, seconds / 60 % 60, seconds % 60);
        write!(f, "-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.")?;
        write!(f, "{:06}Z", micros % MICROS_PER_SECOND)
    }
}

/// Year, month and day in the proleptic Gregorian calendar of a day counted from 2000-01-01. Howard
/// Hinnant's `civil_from_days` (<https://howardhinnant.github.io/date_algorithms.html>): years begin in March, so that
/// leap days come last, and 400 of them always have 146,097 days.
fn civil(day_since_2000: i64) -> (i64, i64, i64) {
    const DAYS_PER_ERA: i64 = 146_097;
    const MARCH_0000_TO_2000: i64 = 730_425;
    let day = day_since_2000 + MARCH_0000_TO_2000;
    let (era, day) = (day.div_euclid(DAYS_PER_ERA), day.rem_euclid(DAYS_PER_ERA));
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month_from_march = (5 * day + 2) / 153;
    let day_of_month = day - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year + i64::from(month <= 2), month, day_of_month)
}

#[cfg(test)]
mod tests;
