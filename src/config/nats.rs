//! `nats` with `nats.tls` and `nats.jetstream`: how NATS is reached, and what events become there.
//!
//! Each section's struct, its keys with their ranges and defaults, and how they are read; of the ways to log in it
//! makes the one that counts. What `nats.url` may be is in `nats_urls.rs`. Pure but for the files in which secrets stand,
//! on the thread that loads the configuration. It connects to nothing: what a server takes is found out in `nats/`.

use std::path::PathBuf;
use std::time::Duration;

use super::changes::Changes;
use super::faults::Faults;
use super::key::{Reload, key, optional};
use super::nats_urls::{NatsUrls, UrlLogin, nats_urls};
use super::reading::{ConfigReading, Section};
use super::secrets::Secret;
use super::section::section;
use super::values::{
    DAY, HOUR, MINUTE, MS, SECOND, any_text, boolean, checked_by, checked_texts, count, duration, elsewhere,
    file, name, one_of, quoted, secret, shown, text, up_to,
};
use super::yaml::{Node, Value};
use crate::event::header_rules;
use crate::event::topic_map::{self, TopicMap};
use crate::tls::{Check, Roots, Tls};

/// nats-server's own limit (JSMaxNameLen).
const MAX_STREAM_NAME: usize = 255;

section! {
    /// How NATS is reached, and what events become there.
    pub struct Nats = "nats" {
        /// First tokens of the subjects on which answers come to us.
        pub inbox_prefix: String = key("_INBOX".to_owned(), checked_by(inbox_prefix)),
        /// Connection attempts at start, then exit 1. Once up, it reconnects for ever.
        pub max_retries: u32 = key(5, count(1..=1_000_000)),
        /// Wait between them.
        pub retry_delay: Duration = key(2 * SECOND, duration(up_to(HOUR))),
        /// Longest wait for one connection attempt.
        pub connect_timeout: Duration = key(5 * SECOND, duration(up_to(10 * MINUTE))),
        /// Longest wait for an ack.
        pub ack_timeout: Duration = key(5 * SECOND, duration(up_to(10 * MINUTE))),
        /// `Nats-*` headers that metadata may set, in exactly this spelling.
        pub allow_headers: Vec<String> = key(Vec::new(), checked_by(allowed_headers)).live(),
        /// Subject on which dead letters are announced. Default: they are not.
        pub dead_letter_subject: Option<String> = optional(checked_by(dead_letter_subject)).live(),
        /// Topics to subjects.
        pub topic_map: TopicMap = key(TopicMap::default(), checked_by(topics)).live(),
    }
    with {
        /// Servers, at least one: `nats://host:4222` or `tls://host:4222`, the port optional, without userinfo (that
        /// is in `auth`). Written as `url`: one, several with commas between, or a list. Default nats://localhost:4222.
        pub servers: Vec<String>,
        /// Credentials, from the URL's userinfo or their own keys.
        pub auth: NatsAuth,
        /// `tls`: whose certificates count, and our own. With any of it, and with `tls://`, TLS is a must; else it is
        /// used with servers that insist. Default: the system's CA certificates, none of our own.
        pub tls: NatsTls,
        /// The stream.
        pub jetstream: JetStream,
    }
}

impl Nats {
    pub(super) fn read(section: &Section<'_>, reading: &mut ConfigReading<'_>) -> Nats {
        let jetstream = JetStream::read_keys(&reading.section(section, "jetstream"), reading);
        let tls = NatsTls::read(&reading.section(section, "tls"), reading);
        let localhost = NatsUrls { servers: vec!["nats://localhost:4222".to_owned()], login: None };
        let url = key(localhost, elsewhere(checked_by(nats_urls))).variable("NATS_URL");
        let url = reading.value(section, "url", url);
        let auth = Logins::read(url.login, section, reading).choose(reading);
        Nats::read_keys(section, reading, url.servers, auth, tls, jetstream)
    }

    pub(super) fn take_live(&mut self, new: &Nats, changes: &mut Changes) {
        changes.compare("nats.url", Reload::NeedsRestart, &mut self.servers, &new.servers);
        changes.compare("nats credentials", Reload::NeedsRestart, &mut self.auth, &new.auth);
        self.take_keys(new, changes);
        self.tls.take_keys(&new.tls, changes);
        self.jetstream.take_keys(&new.jetstream, changes);
    }
}

/// How we authenticate to NATS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NatsAuth {
    /// Not at all.
    None,
    /// User and password.
    UserPassword(String, Secret),
    /// Token.
    Token(Secret),
    /// A file with the seed of an nkey.
    NkeyFile(PathBuf),
    /// A `.creds` file (JWT and nkey seed).
    CredentialsFile(PathBuf),
}

section! {
    /// TLS to NATS; files in PEM.
    #[derive(Default)]
    pub struct NatsTls = "nats.tls" {
        /// CA certificates that a server's must lead to. Default: the system's.
        pub ca: Option<PathBuf> = optional(file()),
        /// Our certificate, for servers that ask; only together with its key.
        pub cert: Option<PathBuf> = optional(file()),
        /// Its key.
        pub key: Option<PathBuf> = optional(file()),
    }
}

impl NatsTls {
    fn read(section: &Section<'_>, reading: &mut ConfigReading<'_>) -> NatsTls {
        let tls = NatsTls::read_keys(section, reading);
        if tls.cert.is_some() != tls.key.is_some() {
            let text = "nats.tls.cert and nats.tls.key go together; one of them is missing";
            reading.clash(&["nats.tls.cert", "nats.tls.key"], text.to_owned());
        }
        tls
    }

    /// Whether anything of it is written.
    pub fn is_given(&self) -> bool {
        *self != NatsTls::default()
    }

    /// What is asked of a server: always a valid certificate for its name.
    pub fn meaning(&self) -> Tls {
        Tls {
            check: Check::ChainAndName,
            roots: self.ca.clone().map_or(Roots::System, Roots::File),
            identity: self.cert.clone().zip(self.key.clone()),
        }
    }
}

section! {
    /// The stream, and how to create it. What follows `create` has no effect without `create`.
    pub struct JetStream = "nats.jetstream" {
        /// false: core NATS.
        pub enabled: bool = key(true, boolean()),
        /// The stream every event must land in: no blank and none of `. * > / \`.
        pub stream_name: String = key("EVENTS".to_owned(), checked_by(stream_name)),
        /// Send long runs of one key as atomic batches where the stream takes them.
        pub atomic_batches: bool = key(true, boolean()),
        /// Create the stream when it is missing.
        pub create: bool = key(false, boolean()),
        /// Subjects of a stream we create, wildcards allowed. Required with `create`.
        pub subjects: Vec<String> = key(Vec::new(), checked_by(subjects)),
        /// Storage of a stream we create.
        pub storage: Storage = key(
            Storage::File,
            one_of("kind of storage", &[("file", Storage::File), ("memory", Storage::Memory)])
        ),
        /// Replicas of a stream we create.
        pub replicas: u32 = key(1, count(1..=5)),
        /// Duplicate window of a stream we create.
        pub duplicate_window: Duration = key(2 * MINUTE, duration(100 * MS..=30 * DAY)),
    }
}

/// Where JetStream keeps a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// On disk.
    File,
    /// In memory.
    Memory,
}

/// The ways to log in to NATS that are written; one is allowed.
struct Logins {
    in_url: Option<UrlLogin>,
    user: Option<String>,
    password: Option<Secret>,
    token: Option<Secret>,
    nkey_file: Option<PathBuf>,
    credentials_file: Option<PathBuf>,
}

impl Logins {
    fn read(in_url: Option<UrlLogin>, section: &Section<'_>, reading: &mut ConfigReading<'_>) -> Logins {
        Logins {
            in_url,
            user: reading.value(section, "user", optional(elsewhere(any_text()))),
            password: reading.value(section, "password", optional(elsewhere(secret()))),
            token: reading.value(section, "token", optional(elsewhere(secret()))),
            nkey_file: reading.value(section, "nkey_file", optional(file())),
            credentials_file: reading.value(section, "credentials_file", optional(file())),
        }
    }

    fn choose(self, reading: &mut ConfigReading<'_>) -> NatsAuth {
        let ways = [
            (self.in_url.is_some(), "nats.url"),
            (self.token.is_some(), "nats.token"),
            (self.nkey_file.is_some(), "nats.nkey_file"),
            (self.credentials_file.is_some(), "nats.credentials_file"),
            (self.user.is_some() || self.password.is_some(), "nats.user and nats.password"),
        ];
        let given: Vec<&str> = ways.iter().filter(|(given, _)| *given).map(|(_, key)| *key).collect();
        if given.len() > 1 {
            let keys =
                ["nats.token", "nats.nkey_file", "nats.credentials_file", "nats.password", "nats.user"];
            reading.clash(&keys, format!("more than one way to log in ({}); keep one", given.join(", ")));
            return NatsAuth::None;
        }
        match self {
            Logins { in_url: Some(UrlLogin::UserPassword(user, password)), .. } => {
                NatsAuth::UserPassword(user, password)
            }
            Logins { in_url: Some(UrlLogin::Token(token)), .. } | Logins { token: Some(token), .. } => {
                NatsAuth::Token(token)
            }
            Logins { nkey_file: Some(path), .. } => NatsAuth::NkeyFile(path),
            Logins { credentials_file: Some(path), .. } => NatsAuth::CredentialsFile(path),
            Logins { user: Some(user), password: Some(password), .. } => {
                NatsAuth::UserPassword(user, password)
            }
            Logins { user: None, password: None, .. } => NatsAuth::None,
            _ => {
                if !(reading.is_given("nats.user") && reading.is_given("nats.password")) {
                    let text = "nats.user and nats.password go together; one of them is missing";
                    reading.clash(&["nats.user", "nats.password"], text.to_owned());
                }
                NatsAuth::None
            }
        }
    }
}

/// nats-server refuses these names, or makes folders of them.
fn stream_name(node: &Node) -> Result<String, String> {
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
fn inbox_prefix(node: &Node) -> Result<String, String> {
    subject_of_ours(node, &["$"], "_INBOX_outbox")
}

/// `nats.dead_letter_subject`.
fn dead_letter_subject(node: &Node) -> Result<String, String> {
    subject_of_ours(node, &["$", "_INBOX."], "outbox.dead")
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
fn subjects(node: &Node) -> Result<Vec<String>, Faults> {
    checked_texts(node, |subject| {
        topic_map::is_pattern(subject).map_err(|why| format!("{} is not a subject: {why}", quoted(subject)))
    })
}

/// `nats.allow_headers`.
fn allowed_headers(node: &Node) -> Result<Vec<String>, Faults> {
    checked_texts(node, |name| {
        header_rules::can_be_allowed(name).map_err(|why| format!("{} cannot be allowed: {why}", quoted(name)))
    })
}

fn topics(node: &Node) -> Result<TopicMap, Faults> {
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
