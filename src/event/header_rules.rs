//! What may be a header: which names and values of an event's metadata can stand in a block, and as what.
//!
//! Pure rules over text, each linear in it; no thread of their own, nothing that blocks, and no state. Metadata is
//! outside input and may be hostile. What it may not do is set `Nats-*` headers (they are commands to the server:
//! `Nats-Rollup` erases a stream) or ours, end its line and begin another, or carry the text of such a header inside a
//! name or value.
//! The last is no pedantry: nats-server 2.9 looks for a header by the first match of its name anywhere in the
//! block, and takes it for absent if that match is not at the beginning of a line. So `X-Nats-Msg-Id: 1`, or
//! the mere words in a value, would switch off deduplication if they came before the real header.
//!
//! A field whose name cannot be a header is left out; a value that cannot stand in a line is changed (a
//! control character becomes a blank, the hyphen in `Nats-` becomes `_`); either way the event still goes, and
//! [`Altered`] says what happened, in bounded space.

use std::fmt;

/// How many altered fields are named; the rest is only counted.
pub const MAX_NAMED: usize = 8;

/// How much of a field's name is kept for the log, in characters.
pub(super) const MAX_NAME_CHARS: usize = 64;

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
    /// Counts one more field, and names it while there is room.
    pub(super) fn add(&mut self, name: &str, reason: Reason) {
        self.count += 1;
        if self.named.len() < MAX_NAMED {
            self.named.push((name.escape_debug().take(MAX_NAME_CHARS).collect(), reason));
        }
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

/// Whether metadata may set the header `name`, where `allow` lists the `Nats-*` headers that it may.
pub(super) fn may_set(name: &str, allow: &[String]) -> Result<(), Reason> {
    if !is_token(name) {
        return Err(Reason::NotAToken);
    }
    if starts_with(name.as_bytes(), b"nats-") {
        let allowed = allow.iter().any(|allowed| allowed == name) && can_be_allowed(name).is_ok();
        return if allowed { Ok(()) } else { Err(Reason::Reserved) };
    }
    // All of `Outbox-*`, so that a later version may add headers.
    if starts_with(name.as_bytes(), b"outbox-") {
        return Err(Reason::Reserved);
    }
    if carries_header(name) { Err(Reason::NameCarriesHeader) } else { Ok(()) }
}

/// Makes `block` from byte `start` on (a character boundary) safe to stand in a line. Says what it changed.
pub(super) fn clean(block: &mut String, start: usize) -> Option<Reason> {
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
pub(super) fn push_compact(block: &mut String, json: &str) {
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
pub(super) fn is_token(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn metadata_may_set_what_is_nobody_elses() {
        let allow = ["Nats-TTL".to_owned(), "Nats-Msg-Id".to_owned()];
        let cases = [
            ("source", Ok(())),
            ("x-nats-cluster", Ok(())),
            ("!#$%&'*+-.^_`|~09az", Ok(())),
            ("Nats-TTL", Ok(())),
            ("nats-ttl", Err(Reason::Reserved)),
            ("Nats-Msg-Id", Err(Reason::Reserved)),
            ("Nats-Rollup", Err(Reason::Reserved)),
            ("outbox-new", Err(Reason::Reserved)),
            ("X-Nats-New", Err(Reason::NameCarriesHeader)),
            ("x-nats-rollup", Err(Reason::NameCarriesHeader)),
            ("my-outbox-seq", Err(Reason::NameCarriesHeader)),
            ("", Err(Reason::NotAToken)),
            ("a b", Err(Reason::NotAToken)),
            ("ä", Err(Reason::NotAToken)),
        ];
        for (name, expected) in cases {
            assert_eq!(may_set(name, &allow), expected, "{name}");
        }
    }

    #[test]
    fn a_value_is_changed_no_more_than_it_must_be() {
        let cases = [
            ("as it is: ü £ - 😀", "as it is: ü £ - 😀", None),
            ("nats-bridge", "nats-bridge", None),
            ("", "", None),
            ("a\r\nb\u{85}c\u{7f}", "a  b c ", Some(Reason::ControlCharacters)),
            ("Nats-New", "Nats_New", Some(Reason::ValueCarriesHeader)),
            ("xNATS-MSG-ID nats-new", "xNATS_MSG-ID nats-new", Some(Reason::ValueCarriesHeader)),
            ("\0outbox-seq", " outbox_seq", Some(Reason::ValueCarriesHeader)),
        ];
        for (value, expected, reason) in cases {
            // What stands before is ours, and stays.
            let mut block = format!("Nats-Msg-Id: 1\r\n{value}");
            assert_eq!(clean(&mut block, "Nats-Msg-Id: 1\r\n".len()), reason, "{value:?}");
            assert_eq!(block, format!("Nats-Msg-Id: 1\r\n{expected}"), "{value:?}");
        }
    }
}
