//! What a single value of the configuration may be: a [`ValueKind`] makes one of a node, or says what is wrong with it
//! and what is allowed.
//!
//! Here are the kinds that several sections have; one that a section has alone stands with it. Pure but for values that
//! stand elsewhere, and called while the configuration is read, on whichever thread that is. No message ever holds a
//! password: connection strings are not shown at all, the userinfo of URLs is cut out, and so is any text
//! that looks as if it held one.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use super::faults::Faults;
use super::secrets::{self, Credentials, Secret};
use super::yaml::{Node, Value};

/// Longest value shown in a message, in characters.
const MAX_SHOWN_CHARS: usize = 60;

pub(super) const MS: Duration = Duration::from_millis(1);
pub(super) const SECOND: Duration = Duration::from_secs(1);
pub(super) const MINUTE: Duration = Duration::from_secs(60);
pub(super) const HOUR: Duration = Duration::from_secs(3_600);
pub(super) const DAY: Duration = Duration::from_secs(86_400);

/// Waits that are spent again and again: shorter ones would be a busy loop.
pub(super) fn up_to(longest: Duration) -> RangeInclusive<Duration> {
    10 * MS..=longest
}

/// What a key's value may be: how it is read of a node, and what is allowed.
pub(super) struct ValueKind<T> {
    read: ReadNode<T>,
    /// A range or a few words, as messages say them; empty where that takes a sentence.
    pub(super) allowed: String,
}

type ReadNode<T> = Box<dyn Fn(&Node, &Credentials) -> Result<T, Faults>>;

impl<T: 'static> ValueKind<T> {
    fn new<E: Into<Faults>>(allowed: String, read: impl Fn(&Node) -> Result<T, E> + 'static) -> ValueKind<T> {
        ValueKind { read: Box::new(move |node, _| read(node).map_err(Into::into)), allowed }
    }

    pub(super) fn map<U: 'static>(self, make: impl Fn(T) -> U + 'static) -> ValueKind<U> {
        let ValueKind { read, allowed } = self;
        ValueKind { read: Box::new(move |node, credentials| read(node, credentials).map(&make)), allowed }
    }
}

impl<T> ValueKind<T> {
    /// The value of `node`, or all that is wrong with it. `credentials` are for values that stand elsewhere.
    pub(super) fn read(&self, node: &Node, credentials: &Credentials) -> Result<T, Faults> {
        (self.read)(node, credentials)
    }
}

/// A kind of value that one section alone has: what `check` makes of a node.
pub(super) fn checked_by<T: 'static, E: Into<Faults>>(
    check: impl Fn(&Node) -> Result<T, E> + 'static,
) -> ValueKind<T> {
    ValueKind::new(String::new(), check)
}

/// A value that may stand elsewhere: in a file, or among systemd's credentials.
pub(super) fn elsewhere<T: 'static>(kind: ValueKind<T>) -> ValueKind<T> {
    let ValueKind { read, allowed } = kind;
    let read_there = move |node: &Node, credentials: &Credentials| {
        secrets::read(node, credentials, |node| read(node, credentials))
    };
    ValueKind { read: Box::new(read_there), allowed }
}

/// A file's path, which may be that of a credential.
pub(super) fn file() -> ValueKind<PathBuf> {
    let read = |node: &Node, credentials: &Credentials| {
        secrets::path(node, credentials, |node| text(node).map(PathBuf::from))
    };
    ValueKind { read: Box::new(read), allowed: String::new() }
}

pub(super) fn boolean() -> ValueKind<bool> {
    ValueKind::new("true, false".to_owned(), |node| match &node.value {
        Value::Bool(value) => Ok(*value),
        _ => Err(format!("{} is not a truth value; allowed: true, false", shown(node))),
    })
}

/// A whole number.
pub(super) fn count<T: TryFrom<i128> + 'static>(allowed: RangeInclusive<i128>) -> ValueKind<T> {
    let range = format!("{} to {}", allowed.start(), allowed.end());
    ValueKind::new(range.clone(), move |node| {
        let problem = |what| format!("{} {what}; allowed: {range}", shown(node));
        match &node.value {
            Value::Number(number) => {
                let number: i128 = number.parse().map_err(|_| problem("is not a whole number"))?;
                if !allowed.contains(&number) {
                    return Err(problem("is out of range"));
                }
                T::try_from(number).map_err(|_| problem("is out of range"))
            }
            Value::Text(text) if text.parse::<i128>().is_ok() => {
                Err(problem("is text; write the number without quotes"))
            }
            _ => Err(problem("is not a whole number")),
        }
    })
}

/// A duration such as `500ms`, `30s` or `1m 30s`.
pub(super) fn duration(allowed: RangeInclusive<Duration>) -> ValueKind<Duration> {
    let range = written_range(&allowed);
    ValueKind::new(range.clone(), move |node| read_duration(node, &allowed, &range))
}

/// A duration, or `off` (`None`).
pub(super) fn duration_or_off(allowed: RangeInclusive<Duration>) -> ValueKind<Option<Duration>> {
    let range = written_range(&allowed);
    ValueKind::new(format!("{range}, or off"), move |node| match &node.value {
        Value::Text(text) if text.eq_ignore_ascii_case("off") => Ok(None),
        _ => read_duration(node, &allowed, &range).map(Some).map_err(|problem| problem + ", or off"),
    })
}

fn written_range(allowed: &RangeInclusive<Duration>) -> String {
    let written = |duration: &Duration| humantime::format_duration(*duration).to_string().replace(' ', "");
    format!("{} to {}", written(allowed.start()), written(allowed.end()))
}

fn read_duration(node: &Node, allowed: &RangeInclusive<Duration>, range: &str) -> Result<Duration, String> {
    let value = match &node.value {
        Value::Number(number) | Value::Text(number) if is_digits(number) => {
            return Err(format!("{number} has no unit; write {number}s for seconds"));
        }
        Value::Number(text) | Value::Text(text) => humantime::parse_duration(text),
        _ => return Err(format!("{} is not a duration; allowed: {range}", shown(node))),
    };
    let problem = |what| format!("{} {what}; allowed: {range}", shown(node));
    match value {
        Err(_) => Err(problem("is not a duration such as 500ms, 30s or 5m")),
        Ok(value) if value < *allowed.start() => Err(problem("is too short")),
        Ok(value) if value > *allowed.end() => Err(problem("is too long")),
        Ok(value) => Ok(value),
    }
}

/// Bytes, such as `512KiB`.
pub(super) fn size(allowed: RangeInclusive<usize>) -> ValueKind<usize> {
    const UNITS: [(&str, usize); 3] = [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)];
    let written = |bytes: usize| {
        let unit = UNITS.iter().rev().find(|(_, unit)| bytes.is_multiple_of(*unit));
        unit.map_or(format!("{bytes} bytes"), |(name, unit)| format!("{}{name}", bytes / unit))
    };
    let range = format!("{} to {}", written(*allowed.start()), written(*allowed.end()));
    ValueKind::new(range.clone(), move |node| {
        let problem = |what| format!("{} {what}; allowed: {range}", shown(node));
        let text = match &node.value {
            Value::Number(text) | Value::Text(text) => text.trim(),
            _ => return Err(problem("is not a size")),
        };
        let unit = UNITS.iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?.trim_end(), unit)));
        let Some((Ok(number), unit)) = unit.map(|(number, unit)| (number.parse::<usize>(), unit)) else {
            return Err(problem("is not a size such as 512KiB, 64MiB or 1GiB"));
        };
        match number.checked_mul(*unit) {
            Some(bytes) if allowed.contains(&bytes) => Ok(bytes),
            _ => Err(problem("is out of range")),
        }
    })
}

/// One of a few words, in any case of letters.
pub(super) fn one_of<T: Copy + 'static>(
    what: &'static str,
    words: &'static [(&'static str, T)],
) -> ValueKind<T> {
    let allowed = words.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(", ");
    ValueKind::new(allowed.clone(), move |node| {
        let word = match &node.value {
            Value::Text(text) => words.iter().find(|(word, _)| word.eq_ignore_ascii_case(text)),
            _ => None,
        };
        word.map(|(_, value)| *value)
            .ok_or_else(|| format!("{} is not a {what}; allowed: {allowed}", shown(node)))
    })
}

/// Any text but none.
pub(super) fn any_text() -> ValueKind<String> {
    checked_by(|node| text(node).map(str::to_owned))
}

/// A password or token. Never shown, whatever is wrong with it.
pub(super) fn secret() -> ValueKind<Secret> {
    checked_by(|node| match &node.value {
        Value::Text(text) if !text.is_empty() => Ok(Secret::new(text.as_str())),
        Value::Text(_) => Err("is empty; allowed: text".to_owned()),
        _ => Err("is not text; write it in quotes".to_owned()),
    })
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

/// Text that is not empty.
pub(super) fn text(node: &Node) -> Result<&str, String> {
    match &node.value {
        Value::Text(text) if text.is_empty() => Err("is empty; allowed: text".to_owned()),
        Value::Text(text) => Ok(text),
        Value::Number(_) | Value::Bool(_) => {
            Err(format!("{0} is not text; write it in quotes: \"{0}\"", shown(node)))
        }
        _ => Err(format!("{} is not text; allowed: text", shown(node))),
    }
}

/// Where the texts of [`texts`] came from.
#[derive(Clone, Copy)]
pub(super) enum Origin {
    Alone,
    Element(usize),
}

impl Origin {
    pub(super) fn fault(self, index: usize, why: String) -> Faults {
        let mut faults = Faults::default();
        match self {
            Origin::Alone => faults.add(None, String::new(), why),
            Origin::Element(id) => faults.add(Some(id), format!("[{index}]"), why),
        }
        faults
    }
}

/// A text, or a list of texts, none empty.
pub(super) fn texts(node: &Node) -> Result<Vec<(Origin, &str)>, Faults> {
    let Value::List(elements) = &node.value else {
        return Ok(vec![(Origin::Alone, text(node)?)]);
    };
    if elements.is_empty() {
        return Err("the list is empty; leave the key out for its default".to_owned().into());
    }
    let mut faults = Faults::default();
    let mut found = Vec::with_capacity(elements.len());
    for (index, element) in elements.iter().enumerate() {
        match text(element) {
            Ok(text) => found.push((Origin::Element(element.id), text)),
            Err(why) => faults.add(Some(element.id), format!("[{index}]"), why),
        }
    }
    if faults.is_empty() { Ok(found) } else { Err(faults) }
}

pub(super) fn checked_texts(
    node: &Node,
    check: impl Fn(&str) -> Result<(), String>,
) -> Result<Vec<String>, Faults> {
    let found = texts(node)?;
    let mut faults = Faults::default();
    for (index, (origin, text)) in found.iter().enumerate() {
        if let Err(why) = check(text) {
            faults.extend(origin.fault(index, why));
        }
    }
    if !faults.is_empty() {
        return Err(faults);
    }
    Ok(found.into_iter().map(|(_, text)| text.to_owned()).collect())
}

/// A value as messages show it.
pub(super) fn shown(node: &Node) -> String {
    match &node.value {
        Value::Null => "nothing".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => number.clone(),
        Value::Text(text) => quoted(text),
        Value::List(_) => "a list".to_owned(),
        Value::Map(_) => "a mapping".to_owned(),
    }
}

/// A key as messages show it: plain, or in quotes if it is no plain word.
pub(super) fn name(key: &Node) -> String {
    let is_word = |text: &str| {
        !text.is_empty()
            && text.len() <= MAX_SHOWN_CHARS
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
    };
    match &key.value {
        Value::Text(text) if is_word(text) => text.clone(),
        _ => shown(key),
    }
}

/// Text in quotes, with escapes, shortened, and without what may be a password.
pub(super) fn quoted(text: &str) -> String {
    let text = match (text.find("://"), text.rfind('@')) {
        (Some(scheme), Some(at)) if scheme + 3 <= at => {
            format!("{}***{}", &text[..scheme + 3], &text[at..])
        }
        _ if text.to_ascii_lowercase().contains("password") => "***".to_owned(),
        _ => text.to_owned(),
    };
    if text.chars().count() <= MAX_SHOWN_CHARS {
        return format!("{text:?}");
    }
    let beginning: String = text.chars().take(MAX_SHOWN_CHARS).collect();
    format!("{:?}", beginning + "…")
}
