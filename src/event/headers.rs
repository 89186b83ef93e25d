//! The NATS headers of an event: ours, then one for each field of its metadata.
//!
//! Pure, and called once an event by whichever thread publishes it: one string is written from front to end,
//! linear in the metadata, and metadata is neither built into a tree nor walked recursively. What metadata
//! may not do is set `Nats-*` headers (they are commands to the server: `Nats-Rollup` erases a stream) or
//! ours, end its line and begin another, or carry the text of such a header inside a name or value.
//! The last is no pedantry: nats-server 2.9 looks for a header by the first match of its name anywhere in the
//! block, and takes it for absent if that match is not at the beginning of a line. So `X-Nats-Msg-Id: 1`, or
//! the mere words in a value, would switch off deduplication if they came before the real header. For the
//! same reason our own headers come first, `Nats-Msg-Id` ahead of all.
//!
//! A field whose name cannot be a header is left out; a value that cannot stand in a line is changed (a
//! control character becomes a blank, the hyphen in `Nats-` becomes `_`); either way the event still goes, and
//! [`Headers::altered`] says what happened, in bounded space. Values are otherwise sent as they are: clients
//! commonly trim blanks at either end. Names that differ in case alone are all sent, in the metadata's order,
//! as NATS tells them apart.

use std::borrow::Cow;
use std::fmt::{self, Write};

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::event::Event;

/// How many altered fields are named; the rest is only counted.
pub const MAX_NAMED: usize = 8;

/// How much of a field's name is kept for the log, in characters.
const MAX_NAME_CHARS: usize = 64;

/// What a header block takes beside the topic and the metadata, roughly: to allocate once.
const OWN_HEADERS_BYTES: usize = 320;

/// Headers that decide where, and whether, an event is stored, and so are never an application's. The server
/// knows them in this spelling; a prefix ends in `-`.
const NEVER_FROM_METADATA: [&str; 3] = ["Nats-Msg-Id", "Nats-Expected-", "Nats-Batch-"];

/// What follows `Nats-` in headers that command the server at a publish: refused in any case of letters, so
/// that a proxy that normalises names cannot revive them. Spelled exactly, everything after `Nats-` counts.
const PROTOCOL_NAMES: [&[u8]; 8] = [
    b"msg-id",
    b"expected-",
    b"rollup",
    b"ttl",
    b"schedule",
    b"batch-id",
    b"batch-sequence",
    b"batch-commit",
];

/// What follows `Outbox-` in our own headers.
const OWN_NAMES: [&[u8]; 8] =
    [b"seq", b"topic", b"created-at", b"attempt", b"instance", b"replay", b"subject", b"dead-reason"];

/// What the headers of all events have in common.
#[derive(Debug, Clone)]
pub struct HeaderPolicy {
    /// `dispatcher.instance_id`, for `Outbox-Instance`.
    pub instance: String,
    /// The stream that must store the event, for `Nats-Expected-Stream`; `None` over core NATS.
    pub stream: Option<String>,
    /// `nats.allow_headers`: the `Nats-*` headers that metadata may set, spelled exactly like this. Those that
    /// [`can_be_allowed`] refuses have no effect.
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

/// Which fields were left out or changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Altered {
    /// How many fields, at most one for each field of the metadata and each of our headers.
    pub count: usize,
    /// The first [`MAX_NAMED`] of them: the name (escaped, shortened, fit for a log) and the reason.
    pub named: Vec<(String, Reason)>,
}

/// Why a field was left out or changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Left out: the metadata as a whole is JSON, but no object.
    NotAnObject,
    /// Left out from here on: the metadata is no JSON.
    NotJson,
    /// Left out: the name is not a token (RFC 9110, section 5.6.2).
    NotAToken,
    /// Left out: the name is one of `Nats-*` that is not allowed, or of `Outbox-*`.
    Reserved,
    /// Left out: the name has the text of such a name within it.
    NameCarriesHeader,
    /// Left out: the string has an escape that is no character, such as half a surrogate pair.
    NotText,
    /// Changed: control characters became blanks.
    ControlCharacters,
    /// Changed: the value had the text of one of these headers.
    ValueCarriesHeader,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Reason::NotAnObject => "left out: not a JSON object",
            Reason::NotJson => "left out from here on: not JSON",
            Reason::NotAToken => "left out: the name has characters that a header name cannot have",
            Reason::Reserved => "left out: the name is reserved (nats.allow_headers permits some)",
            Reason::NameCarriesHeader => "left out: the name contains a reserved one",
            Reason::NotText => "left out: not valid text",
            Reason::ControlCharacters => "changed: control characters replaced",
            Reason::ValueCarriesHeader => "changed: the value contained a reserved header name",
        })
    }
}

impl fmt::Display for Altered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (name, reason)) in self.named.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{name}: {reason}")?;
        }
        match self.count - self.named.len() {
            0 => Ok(()),
            more => write!(f, "; and {more} more"),
        }
    }
}

impl Altered {
    fn add(&mut self, name: &str, reason: Reason) {
        self.count += 1;
        if self.named.len() < MAX_NAMED {
            self.named.push((name.escape_debug().take(MAX_NAME_CHARS).collect(), reason));
        }
    }
}

impl HeaderPolicy {
    /// The headers of `event`, for its next attempt.
    pub fn build(&self, event: &Event) -> Headers {
        let mut writer = Writer::for_event(event, &self.allow);
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
        let mut writer = Writer::for_event(event, &[]);
        writer.own("Nats-Msg-Id", format_args!("{}.dead.{}", event.id.hyphenated(), death.announced_ms));
        self.describe(&mut writer, event, death.attempts);
        writer.own("Outbox-Subject", death.subject);
        writer.own("Outbox-Dead-Reason", death.reason);
        writer.metadata_of(event);
        Headers { block: writer.block, altered: writer.altered }
    }

    fn describe(&self, writer: &mut Writer, event: &Event, attempt: u32) {
        writer.own("Outbox-Seq", event.seq);
        writer.own("Outbox-Topic", &event.topic);
        writer.own("Outbox-Created-At", Timestamp(event.created_at));
        writer.own("Outbox-Attempt", attempt);
        writer.own("Outbox-Instance", &self.instance);
    }
}

/// Whether `nats.allow_headers` may list `name`. The error says why not.
pub fn can_be_allowed(name: &str) -> Result<(), &'static str> {
    if !is_token(name) {
        return Err("it cannot be a header name");
    }
    if !starts_with(name.as_bytes(), b"nats-") {
        return Err("only Nats-* headers need permission");
    }
    // Beyond its beginning, the name must not hold a second one: it would hide that one's header.
    let never = NEVER_FROM_METADATA.iter().any(|never| starts_with(name.as_bytes(), never.as_bytes()));
    if never || carries_header(&name["nats-".len()..]) {
        return Err("it decides where an event is stored, so metadata never sets it");
    }
    Ok(())
}

/// Writes a header block.
struct Writer<'a> {
    allow: &'a [String],
    block: String,
    altered: Altered,
}

impl<'a> Writer<'a> {
    /// With room for all that the event may need.
    fn for_event(event: &Event, allow: &'a [String]) -> Writer<'a> {
        let metadata = event.metadata.as_ref().map_or(0, String::len);
        let capacity = OWN_HEADERS_BYTES + event.topic.len() + metadata + metadata / 4;
        Writer { allow, block: String::with_capacity(capacity), altered: Altered::default() }
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
        if let Err(reason) = self.may_set(name) {
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

    fn may_set(&self, name: &str) -> Result<(), Reason> {
        if !is_token(name) {
            return Err(Reason::NotAToken);
        }
        if starts_with(name.as_bytes(), b"nats-") {
            let allowed = self.allow.iter().any(|allowed| allowed == name) && can_be_allowed(name).is_ok();
            return if allowed { Ok(()) } else { Err(Reason::Reserved) };
        }
        // All of `Outbox-*`, so that a later version may add headers.
        if starts_with(name.as_bytes(), b"outbox-") {
            return Err(Reason::Reserved);
        }
        if carries_header(name) { Err(Reason::NameCarriesHeader) } else { Ok(()) }
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

impl<'de> Visitor<'de> for &mut Writer<'_> {
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
struct Timestamp(i64);

impl fmt::Display for Timestamp {
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

/// Makes `block` from byte `start` on (a character boundary) safe to stand in a line. Says what it changed.
fn clean(block: &mut String, start: usize) -> Option<Reason> {
    // 0xC2 begins the control characters U+0080 to U+009F, among others.
    let value = &block.as_bytes()[start..];
    let suspect = |(at, byte): (usize, &u8)| match byte {
        0..0x20 | 0x7f | 0xC2 => true,
        b'-' => carries_header_at(value, at),
        _ => false,
    };
    if !value.iter().enumerate().any(suspect) {
        return None;
    }
    let value = block.split_off(start);
    let mut reason = None;
    for (at, c) in value.char_indices() {
        if c.is_control() {
            reason = reason.or(Some(Reason::ControlCharacters));
            block.push(' ');
        } else if c == '-' && carries_header_at(value.as_bytes(), at) {
            reason = Some(Reason::ValueCarriesHeader);
            block.push('_');
        } else {
            block.push(c);
        }
    }
    reason
}

/// Appends `json` without the blanks between its tokens. A loop, as nesting has no limit.
fn push_compact(block: &mut String, json: &str) {
    let (mut in_string, mut escaped) = (false, false);
    let mut copied = 0;
    for (at, byte) in json.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => in_string = !in_string,
            b' ' | b'\n' | b'\r' | b'\t' if !in_string => {
                block.push_str(&json[copied..at]);
                copied = at + 1;
            }
            _ => {}
        }
    }
    block.push_str(&json[copied..]);
}

fn carries_header(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.iter().enumerate().any(|(at, byte)| *byte == b'-' && carries_header_at(bytes, at))
}

/// Whether the hyphen at `hyphen` is the first one of a reserved header's name.
fn carries_header_at(text: &[u8], hyphen: usize) -> bool {
    let (before, after) = (&text[..hyphen], &text[hyphen + 1..]);
    if ends_with(before, b"nats") {
        before.ends_with(b"Nats") || PROTOCOL_NAMES.iter().any(|name| starts_with(after, name))
    } else {
        ends_with(before, b"outbox") && OWN_NAMES.iter().any(|name| starts_with(after, name))
    }
}

/// `str::starts_with`, blind to the case of ASCII letters.
fn starts_with(text: &[u8], start: &[u8]) -> bool {
    text.get(..start.len()).is_some_and(|text| text.eq_ignore_ascii_case(start))
}

/// `str::ends_with`, blind to the case of ASCII letters.
fn ends_with(text: &[u8], end: &[u8]) -> bool {
    text.len().checked_sub(end.len()).is_some_and(|from| text[from..].eq_ignore_ascii_case(end))
}

/// A token of RFC 9110, section 5.6.2: what a header name is made of.
fn is_token(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};
    use uuid::Uuid;

    fn policy() -> HeaderPolicy {
        HeaderPolicy {
            instance: "dispatcher-1".to_owned(),
            stream: Some("EVENTS".to_owned()),
            allow: vec!["Nats-TTL".to_owned(), "Nats-Msg-Id".to_owned()],
            replay: None,
        }
    }

    fn event(metadata: &str) -> Event {
        Event {
            id: Uuid::from_u128(0x0190_5c3e_7a00_7000_8000_0000_0000_0001),
            seq: 81_231,
            created_at: 0,
            topic: "order.placed".to_owned(),
            key: "k".to_owned(),
            lane: 0,
            metadata: Some(metadata.to_owned()),
            payload: "{}".to_owned(),
            attempts: 0,
            in_retry: false,
            unreadable: None,
        }
    }

    const OWN: &str = "Nats-Msg-Id: 01905c3e-7a00-7000-8000-000000000001\r\n\
        Nats-Expected-Stream: EVENTS\r\n\
        Outbox-Seq: 81231\r\n\
        Outbox-Topic: order.placed\r\n\
        Outbox-Created-At: 2000-01-01T00:00:00.000000Z\r\n\
        Outbox-Attempt: 1\r\n\
        Outbox-Instance: dispatcher-1\r\n";

    #[test]
    fn our_headers_come_first_and_then_metadata_in_its_order() {
        let headers = policy().build(&event(r#"{"source": "shop", "a": "1"}"#));
        assert_eq!(headers.block, format!("{OWN}source: shop\r\na: 1\r\n"));
        assert_eq!(headers.altered, Altered::default());

        let again = HeaderPolicy { replay: Some("r1".to_owned()), ..policy() }.build(&event("{}"));
        let own = OWN.replace("0001\r\n", "0001.r1\r\n");
        assert_eq!(again.block, format!("{own}Outbox-Replay: r1\r\n"));

        let bare = HeaderPolicy { stream: None, ..policy() }.build(&Event { metadata: None, ..event("") });
        assert_eq!(bare.block, OWN.replace("Nats-Expected-Stream: EVENTS\r\n", ""));
        assert_eq!(bare.altered.count, 0);
    }

    #[test]
    fn a_field_becomes_a_header() {
        let cases = [
            (r#"{"s": "as it is: ü \" \\ / 😀"}"#, "s: as it is: ü \" \\ / 😀\r\n"),
            (r#"{"s": "\u00e9\ud83d\ude00"}"#, "s: é😀\r\n"),
            (r#"{"s": ""}"#, "s: \r\n"),
            (r#"{"s": " both ends "}"#, "s:  both ends \r\n"),
            (r#"{"n": 42}"#, "n: 42\r\n"),
            (r#"{"n": -0.10000}"#, "n: -0.10000\r\n"),
            (
                r#"{"n": 123456789012345678901234567890.123456789}"#,
                "n: 123456789012345678901234567890.123456789\r\n",
            ),
            (r#"{"n": 1e400}"#, "n: 1e400\r\n"),
            (r#"{"b": true, "c": false}"#, "b: true\r\nc: false\r\n"),
            (r#"{"z": null}"#, ""),
            (
                r#"{"o": {"a": 1, "b": [1, 2, {"c d": "e  f"}]}}"#,
                "o: {\"a\":1,\"b\":[1,2,{\"c d\":\"e  f\"}]}\r\n",
            ),
            (r#"{"o": {"q": "\" : ,\\"}, "p": []}"#, "o: {\"q\":\"\\\" : ,\\\\\"}\r\np: []\r\n"),
            ("{\"o\": [\n\t1 ,\r\n 2 ]}", "o: [1,2]\r\n"),
            (r#"{"Trace": "1", "trace": "2"}"#, "Trace: 1\r\ntrace: 2\r\n"),
            (r#"{"tr\u0061ce": "1"}"#, "trace: 1\r\n"),
            (r#"{"!#$%&'*+-.^_`|~09az": "1"}"#, "!#$%&'*+-.^_`|~09az: 1\r\n"),
            // Words like these are nobody's command.
            (r#"{"source": "nats-bridge, outbox-relay, £5"}"#, "source: nats-bridge, outbox-relay, £5\r\n"),
            (r#"{"x-nats-cluster": "eu"}"#, "x-nats-cluster: eu\r\n"),
            (r#"{"Nats-TTL": "5s"}"#, "Nats-TTL: 5s\r\n"),
            ("{}", ""),
            (" {} ", ""),
        ];
        for (metadata, expected) in cases {
            let headers = policy().build(&event(metadata));
            assert_eq!(headers.block, format!("{OWN}{expected}"), "{metadata}");
            assert_eq!(headers.altered, Altered::default(), "{metadata}");
        }
    }

    #[test]
    fn what_cannot_be_a_header_is_left_out_or_changed() {
        use Reason::*;
        let cases = [
            (r#"{"": "1"}"#, "", "", NotAToken),
            (r#"{"a b": "1"}"#, "", "a b", NotAToken),
            (r#"{"a:b": "1"}"#, "", "a:b", NotAToken),
            (r#"{"ä": "1"}"#, "", "ä", NotAToken),
            (r#"{"a\r\nNats-Rollup": "all"}"#, "", "a\\r\\nNats-Rollup", NotAToken),
            (r#"{"Nats-Msg-Id": "1"}"#, "", "Nats-Msg-Id", Reserved),
            (r#"{"nats-msg-id": "1"}"#, "", "nats-msg-id", Reserved),
            (r#"{"NATS-Anything": "1"}"#, "", "NATS-Anything", Reserved),
            // Allowed, but not in this spelling.
            (r#"{"nats-ttl": "1"}"#, "", "nats-ttl", Reserved),
            (r#"{"Nats-Rollup": "all"}"#, "", "Nats-Rollup", Reserved),
            (r#"{"Outbox-Seq": 1}"#, "", "Outbox-Seq", Reserved),
            (r#"{"outbox-new": 1}"#, "", "outbox-new", Reserved),
            (r#"{"X-Nats-Rollup": "all"}"#, "", "X-Nats-Rollup", NameCarriesHeader),
            (r#"{"x-nats-rollup": "all"}"#, "", "x-nats-rollup", NameCarriesHeader),
            (r#"{"X-Nats-New": "all"}"#, "", "X-Nats-New", NameCarriesHeader),
            (r#"{"My-Outbox-Seq": "1"}"#, "", "My-Outbox-Seq", NameCarriesHeader),
            (r#"{"v": "a\r\nNats-Rollup: all"}"#, "v: a  Nats_Rollup: all\r\n", "v", ValueCarriesHeader),
            (r#"{"v": "Nats-Msg-Id:1"}"#, "v: Nats_Msg-Id:1\r\n", "v", ValueCarriesHeader),
            (r#"{"v": "xNATS-MSG-ID"}"#, "v: xNATS_MSG-ID\r\n", "v", ValueCarriesHeader),
            (r#"{"v": "Nats-"}"#, "v: Nats_\r\n", "v", ValueCarriesHeader),
            (r#"{"v": "é Outbox-Seq: 1"}"#, "v: é Outbox_Seq: 1\r\n", "v", ValueCarriesHeader),
            (r#"{"v": {"Nats-Rollup": "all"}}"#, "v: {\"Nats_Rollup\":\"all\"}\r\n", "v", ValueCarriesHeader),
            (r#"{"v": "a\nb"}"#, "v: a b\r\n", "v", ControlCharacters),
            (r#"{"v": "a\tb\u0001c\u007fd\u0085e"}"#, "v: a b c d e\r\n", "v", ControlCharacters),
            ("{\"v\": \"\u{85}£\"}", "v:  £\r\n", "v", ControlCharacters),
            (r#"{"v": "\ud800"}"#, "", "v", NotText),
            (r#"["a"]"#, "", "metadata", NotAnObject),
            ("null", "", "metadata", NotAnObject),
            (r#""text""#, "", "metadata", NotAnObject),
            ("", "", "metadata", NotAnObject),
            (r#"{"v": "1", "w": }"#, "v: 1\r\n", "metadata", NotJson),
            (r#"{"v": "1"} x"#, "v: 1\r\n", "metadata", NotJson),
        ];
        for (metadata, expected, name, reason) in cases {
            let headers = policy().build(&event(metadata));
            assert_eq!(headers.block, format!("{OWN}{expected}"), "{metadata}");
            let altered = Altered { count: 1, named: vec![(name.to_owned(), reason)] };
            assert_eq!(headers.altered, altered, "{metadata}");
        }
    }

    #[test]
    fn a_topic_cannot_carry_a_header_either() {
        let event = Event { topic: "Nats-Rollup:all\r\n".to_owned(), attempts: u32::MAX, ..event("{}") };
        let headers = policy().build(&event);
        assert!(headers.block.contains("\r\nOutbox-Topic: Nats_Rollup:all  \r\n"), "{}", headers.block);
        assert!(headers.block.contains("\r\nOutbox-Attempt: 4294967295\r\n"), "{}", headers.block);
        assert_eq!(headers.altered.named, [("Outbox-Topic".to_owned(), Reason::ValueCarriesHeader)]);
    }

    #[test]
    fn what_is_altered_is_named_in_bounded_space() {
        let long = "ä".repeat(1_000);
        let fields: Vec<String> = (0..20).map(|n| format!("\"{n} {long}\": 1")).collect();
        let altered = policy().build(&event(&format!("{{{}}}", fields.join(",")))).altered;
        assert_eq!((altered.count, altered.named.len()), (20, MAX_NAMED));
        assert!(altered.named.iter().all(|(name, _)| name.chars().count() == MAX_NAME_CHARS));
        assert!(altered.to_string().ends_with("cannot have; and 12 more"), "{altered}");
    }

    #[test]
    fn some_headers_can_be_allowed_and_some_never() {
        for name in ["Nats-TTL", "Nats-Rollup", "Nats-Schedule", "Nats-Incr", "Nats-Unheard-Of"] {
            assert_eq!(can_be_allowed(name), Ok(()), "{name}");
        }
        let never = "it decides where an event is stored, so metadata never sets it";
        let cases = [
            ("Nats-Msg-Id", never),
            ("nats-msg-id", never),
            ("Nats-Expected-Stream", never),
            ("Nats-Expected-Last-Sequence", never),
            ("Nats-Batch-Commit", never),
            ("Nats-Nats-Rollup", never),
            ("X-Trace", "only Nats-* headers need permission"),
            ("Nats TTL", "it cannot be a header name"),
            ("", "it cannot be a header name"),
        ];
        for (name, why) in cases {
            assert_eq!(can_be_allowed(name), Err(why), "{name}");
        }
    }

    #[test]
    fn a_creation_time_is_printed_whatever_the_row_holds() {
        const DAY: i64 = 86_400_000_000;
        let cases = [
            (0, "2000-01-01T00:00:00.000000Z"),
            (-1, "1999-12-31T23:59:59.999999Z"),
            (59 * DAY, "2000-02-29T00:00:00.000000Z"),
            (60 * DAY, "2000-03-01T00:00:00.000000Z"),
            (365 * DAY, "2000-12-31T00:00:00.000000Z"),
            (-10_957 * DAY, "1970-01-01T00:00:00.000000Z"),
            (762_352_245_678_901, "2024-02-27T12:30:45.678901Z"),
            (252_455_615_999_999_999, "9999-12-31T23:59:59.999999Z"),
            (252_455_616_000_000_000, "+10000-01-01T00:00:00.000000Z"),
            // The ends of timestamptz: 294276-12-31 and 4713-11-24 BC.
            (9_223_371_331_199_999_999, "+294276-12-31T23:59:59.999999Z"),
            (-211_813_488_000_000_000, "-4713-11-24T00:00:00.000000Z"),
            (i64::MAX, "infinity"),
            (i64::MIN, "-infinity"),
        ];
        for (micros, expected) in cases {
            assert_eq!(Timestamp(micros).to_string(), expected, "{micros}");
        }
        let extremes = [i64::MAX - 1, i64::MIN + 1].map(|micros| Timestamp(micros).to_string());
        assert_eq!(extremes[0], "+294277-01-09T04:00:54.775806Z");
    }

    #[test]
    fn deep_nesting_is_flattened_without_recursion() {
        let depth = 100_000;
        let metadata = format!("{{\"deep\": {}1{}}}", "[ ".repeat(depth), " ]".repeat(depth));
        let headers = policy().build(&event(&metadata));
        let expected = format!("{OWN}deep: {}1{}\r\n", "[".repeat(depth), "]".repeat(depth));
        assert!(headers.block == expected);
        assert_eq!(headers.altered.count, 0);
    }

    #[test]
    fn the_time_grows_with_the_number_of_fields_and_no_faster() {
        let build = |fields: usize| {
            let fields: Vec<String> = (0..fields).map(|n| format!("\"Field-{n}\": \"Nats-{n}\"")).collect();
            let event = event(&format!("{{{}}}", fields.join(", ")));
            let began = Instant::now();
            (policy().build(&event), began.elapsed())
        };
        let (headers, took) = build(200_000);
        assert_eq!(headers.block.lines().count(), 7 + 200_000);
        assert_eq!(headers.altered.count, 200_000);
        // Quadratic work would take minutes; linear work takes a fraction of a second in a debug build.
        assert!(took < Duration::from_secs(20), "200,000 fields took {took:?}");
    }

    /// Whatever the metadata: our lines come first and unchanged, each further line is `token: value`, and no
    /// reserved name occurs in them.
    #[test]
    fn no_metadata_forges_a_line() {
        let mut random = fastrand::Rng::with_seed(11);
        let pieces = [
            "Nats-",
            "nats-",
            "Msg-Id",
            "MSG-ID",
            "Rollup",
            "Expected-Stream",
            "Outbox-",
            "Seq",
            ":",
            " ",
            "\\r",
            "\\n",
            "\\u0000",
            "\\u0085",
            "\\\"",
            "\\\\",
            "-",
            "é",
            "😀",
            "a",
            "X-",
            "[",
            "}",
            "\\u004eats-",
        ];
        let mut pick = |limit: usize| -> String {
            (0..random.usize(..limit)).map(|_| pieces[random.usize(..pieces.len())]).collect()
        };
        let policy = HeaderPolicy { allow: vec![], ..policy() };
        for _ in 0..20_000 {
            let (name, value, inner) = (pick(4), pick(8), pick(8));
            let metadata = format!("{{\"{name}\": \"{value}\", \"o\": {{\"{inner}\": [\"{value}\", 1 ]}}}}");
            let headers = policy.build(&event(&metadata));
            let rest = headers.block.strip_prefix(OWN).expect("our headers first");
            for line in rest.split_terminator("\r\n") {
                let (name, value) = line.split_once(": ").expect("a header line");
                assert!(is_token(name), "{metadata} made {line:?}");
                assert!(!value.contains(char::is_control), "{metadata} made {line:?}");
                assert!(!line.contains("Nats-"), "{metadata} made {line:?}");
                let lower = line.to_ascii_lowercase();
                for reserved in ["nats-msg-id", "nats-rollup", "nats-expected-", "outbox-seq"] {
                    assert!(!lower.contains(reserved), "{metadata} made {line:?}");
                }
            }
        }
    }
}
