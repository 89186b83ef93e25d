//! What a single value of the configuration may be: each function here makes one kind of value of a node,
//! or says what is wrong with it and what is allowed.
//!
//! Pure, and called while the configuration is read, on whichever thread that is. No message ever holds a
//! password: connection strings are not shown at all, the userinfo of URLs is cut out, and so is any text
//! that looks as if it held one.

use std::net::{IpAddr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use super::Secret;
use super::faults::Faults;
use super::yaml::{Node, Value};
use crate::event::header_rules;
use crate::event::topic_map::{self, TopicMap};

/// PostgreSQL's own limit on a name, in bytes.
const MAX_NAME: usize = 63;

/// Longest value shown in a message, in characters.
const MAX_SHOWN_CHARS: usize = 60;

/// PostgreSQL cuts an `application_name` off at 63 bytes.
const MAX_INSTANCE_ID: usize = 63;

/// nats-server's own limit (JSMaxNameLen).
const MAX_STREAM_NAME: usize = 255;

/// The paths that are taken.
const OTHER_PATHS: [&str; 7] = ["/", "/status", "/recent", "/health", "/healthz", "/ready", "/readyz"];

const DSN_FORMS: &str = "allowed: postgresql://user:password@host:5432/database, \
    or host=... user=... password=... dbname=...";

const NATS_URL_FORM: &str = "allowed: nats://host:4222 or tls://host:4222";

pub(super) fn boolean(node: &Node) -> Result<bool, String> {
    match &node.value {
        Value::Bool(value) => Ok(*value),
        _ => Err(format!("{} is not a truth value; allowed: true, false", shown(node))),
    }
}

/// A whole number.
pub(super) fn count<T: TryFrom<i128>>(allowed: RangeInclusive<i128>) -> impl Fn(&Node) -> Result<T, String> {
    move |node| {
        let (least, most) = (allowed.start(), allowed.end());
        let problem = |what| format!("{} {what}; allowed: {least} to {most}", shown(node));
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
    }
}

/// A duration such as `500ms`, `30s` or `1m 30s`.
pub(super) fn duration(allowed: RangeInclusive<Duration>) -> impl Fn(&Node) -> Result<Duration, String> {
    move |node| {
        let written =
            |duration: &Duration| humantime::format_duration(*duration).to_string().replace(' ', "");
        let range = format!("allowed: {} to {}", written(allowed.start()), written(allowed.end()));
        let value = match &node.value {
            Value::Number(number) | Value::Text(number) if is_digits(number) => {
                return Err(format!("{number} has no unit; write {number}s for seconds"));
            }
            Value::Number(text) | Value::Text(text) => humantime::parse_duration(text),
            _ => return Err(format!("{} is not a duration; {range}", shown(node))),
        };
        match value {
            Err(_) => Err(format!("{} is not a duration such as 500ms, 30s or 5m; {range}", shown(node))),
            Ok(value) if value < *allowed.start() => Err(format!("{} is too short; {range}", shown(node))),
            Ok(value) if value > *allowed.end() => Err(format!("{} is too long; {range}", shown(node))),
            Ok(value) => Ok(value),
        }
    }
}

/// A duration, or `off` (`None`).
pub(super) fn duration_or_off(
    allowed: RangeInclusive<Duration>,
) -> impl Fn(&Node) -> Result<Option<Duration>, String> {
    let duration = duration(allowed);
    move |node| match &node.value {
        Value::Text(text) if text.eq_ignore_ascii_case("off") => Ok(None),
        _ => duration(node).map(Some).map_err(|problem| problem + ", or off"),
    }
}

/// Bytes, such as `512KiB`.
pub(super) fn size(allowed: RangeInclusive<usize>) -> impl Fn(&Node) -> Result<usize, String> {
    const UNITS: [(&str, usize); 3] = [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)];
    move |node| {
        let written = |bytes: usize| {
            let unit = UNITS.iter().rev().find(|(_, unit)| bytes.is_multiple_of(*unit));
            unit.map_or(format!("{bytes} bytes"), |(name, unit)| format!("{}{name}", bytes / unit))
        };
        let range = format!("allowed: {} to {}", written(*allowed.start()), written(*allowed.end()));
        let text = match &node.value {
            Value::Number(text) | Value::Text(text) => text.trim(),
            _ => return Err(format!("{} is not a size; {range}", shown(node))),
        };
        let unit = UNITS.iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?.trim_end(), unit)));
        let Some((Ok(number), unit)) = unit.map(|(number, unit)| (number.parse::<usize>(), unit)) else {
            return Err(format!("{} is not a size such as 512KiB, 64MiB or 1GiB; {range}", shown(node)));
        };
        match number.checked_mul(*unit) {
            Some(bytes) if allowed.contains(&bytes) => Ok(bytes),
            _ => Err(format!("{} is out of range; {range}", shown(node))),
        }
    }
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

/// One of a few words, in any case of letters.
pub(super) fn one_of<T: Copy>(what: &str, words: &[(&str, T)]) -> impl Fn(&Node) -> Result<T, String> {
    move |node| {
        let word = match &node.value {
            Value::Text(text) => words.iter().find(|(word, _)| word.eq_ignore_ascii_case(text)),
            _ => None,
        };
        word.map(|(_, value)| *value).ok_or_else(|| {
            let allowed: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            format!("{} is not a {what}; allowed: {}", shown(node), allowed.join(", "))
        })
    }
}

/// Text that is not empty.
fn text(node: &Node) -> Result<&str, String> {
    match &node.value {
        Value::Text(text) if text.is_empty() => Err("is empty; allowed: text".to_owned()),
        Value::Text(text) => Ok(text),
        Value::Number(_) | Value::Bool(_) => {
            Err(format!("{0} is not text; write it in quotes: \"{0}\"", shown(node)))
        }
        _ => Err(format!("{} is not text; allowed: text", shown(node))),
    }
}

pub(super) fn instance_id(node: &Node) -> Result<String, String> {
    let id = text(node)?;
    if is_instance_id(id) {
        return Ok(id.to_owned());
    }
    Err(format!(
        "{} is not an instance name; allowed: 1 to {MAX_INSTANCE_ID} printable ASCII characters, no blank at either end",
        shown(node)
    ))
}

/// Whether `id` can be an `application_name` and a header's value.
pub(super) fn is_instance_id(id: &str) -> bool {
    let printable = id.bytes().all(|byte| matches!(byte, b' '..=b'~'));
    printable && !id.is_empty() && id.len() <= MAX_INSTANCE_ID && id.trim() == id
}

/// A PostgreSQL connection string, by its looks: only connecting can judge all of it.
pub(super) fn dsn(node: &Node) -> Result<Secret, String> {
    let Value::Text(dsn) = &node.value else {
        return Err(format!("not a connection string; {DSN_FORMS}"));
    };
    if dsn.trim().is_empty() {
        return Err(format!("is empty; {DSN_FORMS}"));
    }
    let is_url = ["postgresql://", "postgres://"].iter().any(|scheme| {
        dsn.strip_prefix(scheme).is_some_and(|rest| !rest.is_empty() && !rest.contains(char::is_whitespace))
    });
    let is_word = |word: &str| !word.is_empty() && word.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
    let is_key_value = dsn.split_once('=').is_some_and(|(key, _)| is_word(key.trim()));
    if is_url || is_key_value {
        Ok(Secret::new(dsn.as_str()))
    } else {
        Err(format!("not a connection string; {DSN_FORMS}"))
    }
}

pub(super) fn optional_dsn(node: &Node) -> Result<Option<Secret>, String> {
    dsn(node).map(Some)
}

/// A schema's name, as it is. It goes into statements between quotation marks.
pub(super) fn schema(node: &Node) -> Result<Option<String>, String> {
    let name = text(node)?;
    let fits =
        name.len() <= MAX_NAME && !name.contains(['"', '\'', '\\']) && !name.contains(char::is_control);
    if fits {
        return Ok(Some(name.to_owned()));
    }
    Err(format!(
        "{} is not a schema's name; allowed: 1 to {MAX_NAME} bytes, no quotation marks, backslashes or control characters",
        shown(node)
    ))
}

pub(super) fn user(node: &Node) -> Result<Option<String>, String> {
    text(node).map(|user| Some(user.to_owned()))
}

/// A password or token. Never shown, whatever is wrong with it.
pub(super) fn secret(node: &Node) -> Result<Option<Secret>, String> {
    match &node.value {
        Value::Text(text) if !text.is_empty() => Ok(Some(Secret::new(text.as_str()))),
        Value::Text(_) => Err("is empty; allowed: text".to_owned()),
        _ => Err("is not text; write it in quotes".to_owned()),
    }
}

pub(super) fn file(node: &Node) -> Result<Option<PathBuf>, String> {
    text(node).map(|path| Some(PathBuf::from(path)))
}

/// `nats.url`, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NatsUrls {
    /// Without userinfo.
    pub(super) servers: Vec<String>,
    /// What stood before the `@`.
    pub(super) login: Option<UrlLogin>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum UrlLogin {
    UserPassword(String, Secret),
    Token(Secret),
}

/// One URL, several with commas between, or a list.
pub(super) fn nats_urls(node: &Node) -> Result<NatsUrls, Faults> {
    let mut servers = Vec::new();
    let mut logins = Vec::new();
    for (index, text) in texts(node)?.into_iter().enumerate() {
        for url in text.1.split(',') {
            // All of the text is shown, not the piece: a comma may stand within a password.
            let (server, login) = nats_url(url.trim())
                .map_err(|why| text.0.fault(index, format!("{} {why}; {NATS_URL_FORM}", quoted(text.1))))?;
            servers.push(server);
            logins.push(login);
        }
    }
    let login = logins.iter().flatten().next().cloned();
    if logins.iter().flatten().any(|other| Some(other) != login.as_ref()) {
        let why = "its servers have different credentials; allowed: the same for all, once is enough";
        return Err(Faults::from(why.to_owned()));
    }
    Ok(NatsUrls { servers, login })
}

fn nats_url(url: &str) -> Result<(String, Option<UrlLogin>), &'static str> {
    if url.is_empty() {
        return Err("has an empty URL");
    }
    let (scheme, rest) = url.split_once("://").ok_or("is not a URL")?;
    let scheme = scheme.to_ascii_lowercase();
    if scheme != "nats" && scheme != "tls" {
        return Err("has a scheme that is not nats or tls");
    }
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let (userinfo, address) = match rest.rsplit_once('@') {
        Some((userinfo, address)) => (Some(userinfo), address),
        None => (None, rest),
    };
    check_address(address)?;
    Ok((format!("{scheme}://{address}"), userinfo.map(login).transpose()?))
}

/// Host and port, the port optional.
fn check_address(address: &str) -> Result<(), &'static str> {
    if address.contains(['/', '?', '#']) {
        return Err("has more than a host and a port");
    }
    let (host, port) = match address.strip_prefix('[').map(|rest| rest.split_once(']')) {
        Some(Some((host, port))) if host.parse::<Ipv6Addr>().is_ok() => (host, port.strip_prefix(':')),
        Some(_) => return Err("has no valid IPv6 address in its brackets"),
        None => match address.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (address, None),
        },
    };
    let of_name = |b: u8| b.is_ascii_alphanumeric() || b"-_.:".contains(&b);
    if host.is_empty() || !host.bytes().all(of_name) {
        return Err("has no valid host");
    }
    match port.map(str::parse::<u16>) {
        None => Ok(()),
        Some(Ok(port)) if port != 0 => Ok(()),
        Some(_) => Err("has a port that is not 1 to 65535"),
    }
}

fn login(userinfo: &str) -> Result<UrlLogin, &'static str> {
    let login = match userinfo.split_once(':') {
        Some((user, password)) => UrlLogin::UserPassword(decoded(user)?, Secret::new(decoded(password)?)),
        None => UrlLogin::Token(Secret::new(decoded(userinfo)?)),
    };
    match &login {
        UrlLogin::UserPassword(user, _) if user.is_empty() => Err("has no user before the password"),
        UrlLogin::Token(token) if token.expose().is_empty() => Err("has nothing before the @"),
        _ => Ok(login),
    }
}

/// Undoes the percent-encoding of RFC 3986.
fn decoded(text: &str) -> Result<String, &'static str> {
    const BAD: &str = "has a % in its credentials that does not begin an escape such as %40";
    let mut bytes = Vec::with_capacity(text.len());
    let mut pieces = text.split('%');
    bytes.extend_from_slice(pieces.next().unwrap_or_default().as_bytes());
    for piece in pieces {
        let hex = piece.get(..2).filter(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit())).ok_or(BAD)?;
        bytes.push(u8::from_str_radix(hex, 16).map_err(|_| BAD)?);
        bytes.extend_from_slice(&piece.as_bytes()[2..]);
    }
    String::from_utf8(bytes).map_err(|_| BAD)
}

/// nats-server refuses these names, or makes folders of them.
pub(super) fn stream_name(node: &Node) -> Result<String, String> {
    let name = text(node)?;
    let bad = |c: char| c.is_whitespace() || c.is_control() || ".*>/\\".contains(c);
    if name.contains(bad) || name.len() > MAX_STREAM_NAME {
        return Err(format!(
            "{} is not a stream name; allowed: at most {MAX_STREAM_NAME} characters, no blank and none of . * > / \\",
            shown(node)
        ));
    }
    Ok(name.to_owned())
}

/// The first tokens of our inboxes.
pub(super) fn inbox_prefix(node: &Node) -> Result<String, String> {
    subject_of_ours(node, &["$"], "_INBOX_outbox")
}

/// `nats.dead_letter_subject`.
pub(super) fn dead_letter_subject(node: &Node) -> Result<Option<String>, String> {
    subject_of_ours(node, &["$", "_INBOX."], "outbox.dead").map(Some)
}

/// A subject that is none of NATS's own, which begin with one of `reserved`.
fn subject_of_ours(node: &Node, reserved: &[&str], example: &str) -> Result<String, String> {
    let subject = text(node)?;
    let shown = shown(node);
    topic_map::is_literal_subject(subject)
        .map_err(|why| format!("{shown} is not a subject: {why}; allowed: such as {example}"))?;
    if reserved.iter().any(|start| subject.starts_with(start)) {
        return Err(format!("{shown} begins with what is NATS's own; allowed: such as {example}"));
    }
    Ok(subject.to_owned())
}

/// A list of subjects, or one alone.
pub(super) fn subjects(node: &Node) -> Result<Vec<String>, Faults> {
    checked_texts(node, |subject| {
        topic_map::is_pattern(subject).map_err(|why| format!("{} is not a subject: {why}", quoted(subject)))
    })
}

/// `nats.allow_headers`.
pub(super) fn allowed_headers(node: &Node) -> Result<Vec<String>, Faults> {
    checked_texts(node, |name| {
        header_rules::can_be_allowed(name).map_err(|why| format!("{} cannot be allowed: {why}", quoted(name)))
    })
}

pub(super) fn topics(node: &Node) -> Result<TopicMap, Faults> {
    let Value::Map(entries) = &node.value else {
        return Err(format!(
            "{} is not a mapping; allowed: lines such as order.*: app.orders.*",
            shown(node)
        )
        .into());
    };
    let mut faults = Faults::default();
    let mut pairs: Vec<(&Node, &str, &str)> = Vec::new();
    for (key, value) in entries {
        match (text(key), text(value)) {
            (Err(why), _) => faults.add(Some(key.id), format!(".{}", name(key)), format!("its topic {why}")),
            (_, Err(why)) => faults.add(Some(value.id), format!(".{}", name(key)), why),
            // A topic written twice is reported where all keys written twice are.
            (Ok(topic), _) if pairs.iter().any(|(_, known, _)| *known == topic) => {}
            (Ok(topic), Ok(subject)) => pairs.push((key, topic, subject)),
        }
    }
    match TopicMap::new(pairs.iter().map(|(_, topic, subject)| ((*topic).to_owned(), (*subject).to_owned())))
    {
        Ok(map) if faults.is_empty() => return Ok(map),
        Ok(_) => {}
        Err(problems) => {
            for problem in problems {
                let key =
                    pairs.iter().find(|(_, topic, _)| *topic == problem.pattern).map(|(key, _, _)| *key);
                let text = format!("cannot go to {}: {}", quoted(&problem.target), problem.reason);
                faults.add(key.map(|key| key.id), format!(".{}", quoted(&problem.pattern)), text);
            }
        }
    }
    Err(faults)
}

pub(super) fn address(node: &Node) -> Result<IpAddr, String> {
    text(node)?.parse().map_err(|_| {
        format!("{} is not an IP address; allowed: such as 0.0.0.0, 127.0.0.1 or ::", shown(node))
    })
}

pub(super) fn metrics_path(node: &Node) -> Result<String, String> {
    let path = text(node)?;
    if OTHER_PATHS.contains(&path) {
        return Err(format!("{} is taken; allowed: any path but {}", shown(node), OTHER_PATHS.join(" ")));
    }
    if !path.starts_with('/') || !path.bytes().all(|b| b.is_ascii_graphic() && !b"?#%\"".contains(&b)) {
        return Err(format!("{} is not a path; allowed: such as /metrics", shown(node)));
    }
    Ok(path.to_owned())
}

/// Where the texts of [`texts`] came from.
#[derive(Clone, Copy)]
enum Origin {
    Alone,
    Element(usize),
}

impl Origin {
    fn fault(self, index: usize, why: String) -> Faults {
        let mut faults = Faults::default();
        match self {
            Origin::Alone => faults.add(None, String::new(), why),
            Origin::Element(id) => faults.add(Some(id), format!("[{index}]"), why),
        }
        faults
    }
}

/// A text, or a list of texts, none empty.
fn texts(node: &Node) -> Result<Vec<(Origin, &str)>, Faults> {
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

fn checked_texts(node: &Node, check: impl Fn(&str) -> Result<(), String>) -> Result<Vec<String>, Faults> {
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
fn quoted(text: &str) -> String {
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
