//! What JetStream said to a publish or to a question about the stream, read from the bytes of its answer.
//!
//! Pure: bytes in, meaning out. The line that matters runs between a *rejection*, which judges one event, and an
//! *outage*, in which NATS cannot judge any event now. Codes are those of nats-server's `errors.json`
//! (<https://docs.nats.io/reference/jetstream/errors>); a code this file does not know is judged by its HTTP-like
//! status: 5xx and 429 are outages, other ones rejections.

use std::fmt;

use serde::Deserialize;

/// The answer to one publish.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Stored in the stream, by this publish or (`duplicate`) by an earlier one with the same message id.
    Stored {
        /// JetStream had the message already.
        duplicate: bool,
    },
    /// The event was judged and refused; what to do stands in `error`.
    Refused {
        /// NATS's words, with its code.
        error: String,
    },
    /// Nobody listens on the subject at this moment: no stream takes it, or its leader is changing.
    NoResponders,
    /// JetStream cannot take events now.
    Outage {
        /// NATS's words, with its code.
        cause: String,
    },
}

/// Stream not found.
const STREAM_NOT_FOUND: u32 = 10059;
/// Storing failed: limits of the whole stream, or of one subject.
const STORE_FAILED: u32 = 10077;
/// Resource limits exceeded for the account.
const ACCOUNT_RESOURCES_EXCEEDED: u32 = 10002;

/// An earlier copy of the message is on its way through the cluster, and nobody knows yet whether it will be stored:
/// as after a publish that a leader without quorum took and could not acknowledge. Asked again later, the answer is an
/// ack with `duplicate: true`, or the message is stored.
const DUPLICATE_IN_PROCESS: u32 = 10158;

#[derive(Deserialize)]
struct PublishAck {
    error: Option<ApiError>,
    stream: Option<String>,
    /// From 1.
    #[serde(default)]
    seq: u64,
    #[serde(default)]
    duplicate: bool,
}

#[derive(Deserialize)]
struct ApiError {
    #[serde(default)]
    code: u32,
    #[serde(default)]
    err_code: u32,
    #[serde(default)]
    description: String,
}

impl ApiError {
    fn text(&self) -> String {
        format!("{} ({})", self.description, self.err_code)
    }

    /// Whether the error says that JetStream cannot judge events now.
    fn is_outage(&self) -> bool {
        match self.err_code {
            // Both limits have this one code; only its words tell which it was.
            STORE_FAILED => !self.description.contains("per subject"),
            STREAM_NOT_FOUND | ACCOUNT_RESOURCES_EXCEEDED | DUPLICATE_IN_PROCESS => true,
            _ => self.code >= 500 || self.code == 429,
        }
    }
}

/// Reads the answer to a publish into the stream `expected`.
///
/// `None` when the bytes are no answer of JetStream's at all: then nothing was heard, and the ack times out.
pub fn publish_answer(body: &[u8], no_responders: bool, expected: &str) -> Option<Answer> {
    if no_responders {
        return Some(Answer::NoResponders);
    }
    let ack: PublishAck = serde_json::from_slice(body).ok()?;
    Some(match ack {
        PublishAck { error: Some(error), .. } if error.is_outage() => Answer::Outage { cause: error.text() },
        PublishAck { error: Some(error), .. } => Answer::Refused { error: error.text() },
        // What nats-server before 2.11 says in the place of DUPLICATE_IN_PROCESS. It is no ack: the earlier copy may
        // never be stored.
        PublishAck { stream: Some(_), seq: 0, .. } => {
            Answer::Outage { cause: "an earlier copy of the message is in process".into() }
        }
        PublishAck { stream: Some(stream), duplicate, .. } if stream == expected => {
            Answer::Stored { duplicate }
        }
        PublishAck { stream: Some(stream), .. } => Answer::Refused {
            error: format!(
                "stored in stream {stream} instead of {expected}: give the subject to {expected} alone, \
                 or map the topic elsewhere"
            ),
        },
        PublishAck { stream: None, .. } => return None,
    })
}

/// What we rely on of a stream, from `$JS.API.STREAM.INFO`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StreamFacts {
    /// Subjects the stream takes, with wildcards.
    pub subjects: Vec<String>,
    /// Largest message in bytes; `None` without a limit of the stream's own.
    pub max_msg_size: Option<usize>,
    /// Largest stream in bytes; `None` without a limit.
    pub max_bytes: Option<usize>,
    /// Whether the stream takes atomic batches (nats-server 2.12 and later, `allow_atomic`).
    pub allow_atomic: bool,
    /// How it keeps what it has acknowledged.
    pub keeping: Keeping,
    /// What it holds.
    pub state: StreamState,
}

/// How a stream keeps messages, by its configuration: for `preflight.rs`, which says what of it needs attention.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Keeping {
    /// `file` or `memory`.
    pub storage: String,
    /// `limits`, `interest` or `workqueue`.
    pub retention: String,
    /// What gives way when a limit is reached: `old` messages, or `new` ones, which are refused.
    pub discard: String,
    /// With `new`: the limit of a subject refuses too.
    pub discard_new_per_subject: bool,
    /// Most messages; none with 0 or less, as for the next two.
    pub max_msgs: i64,
    /// Most bytes.
    pub max_bytes: i64,
    /// Most messages of one subject.
    pub max_msgs_per_subject: i64,
    /// Servers that store each message.
    #[serde(rename = "num_replicas")]
    pub replicas: u32,
    /// How long message ids are remembered, in nanoseconds.
    #[serde(rename = "duplicate_window")]
    pub duplicate_window_ns: u64,
    /// `async`: acknowledged before it is written (nats-server 2.12). Empty or `default` otherwise.
    pub persist_mode: String,
}

impl Default for Keeping {
    /// What a server means by a field that it leaves out.
    fn default() -> Keeping {
        Keeping {
            storage: "file".into(),
            retention: "limits".into(),
            discard: "old".into(),
            discard_new_per_subject: false,
            max_msgs: -1,
            max_bytes: -1,
            max_msgs_per_subject: -1,
            replicas: 1,
            duplicate_window_ns: 0,
            persist_mode: String::new(),
        }
    }
}

/// What a stream holds, from the same answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, serde::Serialize)]
pub struct StreamState {
    /// Messages it holds.
    pub messages: u64,
    /// Bytes it holds.
    pub bytes: u64,
    /// Sequence number of its last message: how many it ever stored.
    pub last_seq: u64,
    /// Consumers it has.
    #[serde(default)]
    pub consumer_count: u64,
}

impl StreamFacts {
    /// Whether the stream takes messages on `subject`.
    pub fn takes(&self, subject: &str) -> bool {
        self.subjects.iter().any(|pattern| crate::event::topic_map::matches(pattern, subject))
    }
}

/// Why a stream cannot take events now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamFault {
    /// There is no stream of this name. It could be created.
    Missing {
        /// The name.
        stream: String,
    },
    /// It is there and takes nothing, or nobody knows whether it is there; why, in words for people.
    Unusable(String),
}

impl fmt::Display for StreamFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StreamFault::Missing { stream } => {
                write!(f, "stream {stream} is missing: create it, or set nats.jetstream.create: true")
            }
            StreamFault::Unusable(why) => f.write_str(why),
        }
    }
}

#[derive(Deserialize)]
struct StreamInfo {
    error: Option<ApiError>,
    config: Option<StreamConfig>,
    cluster: Option<Cluster>,
    state: Option<StreamState>,
}

#[derive(Deserialize)]
struct StreamConfig {
    #[serde(default)]
    subjects: Vec<String>,
    #[serde(default)]
    max_msg_size: i64,
    #[serde(default)]
    allow_atomic: bool,
    #[serde(default)]
    sealed: bool,
    #[serde(default)]
    no_ack: bool,
    #[serde(default)]
    allow_msg_counter: bool,
    mirror: Option<serde_json::Value>,
    #[serde(flatten)]
    keeping: Keeping,
}

impl StreamConfig {
    /// Why a stream that is so takes no events from us, whichever they are, if that is so.
    fn cannot(&self) -> Option<&'static str> {
        let reasons = [
            (self.sealed, "is sealed: it takes no messages any more"),
            (self.mirror.is_some(), "is a mirror: publish to the stream that it mirrors"),
            (self.no_ack, "acknowledges nothing (no_ack): set that to false"),
            (
                self.allow_msg_counter,
                "counts (allow_msg_counter) and stores no events: publish to another one",
            ),
        ];
        reasons.into_iter().find(|(holds, _)| *holds).map(|(_, reason)| reason)
    }
}

#[derive(Deserialize)]
struct Cluster {
    #[serde(default)]
    leader: String,
}

/// Reads the answer to `$JS.API.STREAM.INFO.<stream>` (or to `STREAM.CREATE`, which answers alike).
///
/// # Errors
/// Why the stream cannot take events now: it is missing, it has no leader, or JetStream is not there.
pub fn stream_answer(body: &[u8], no_responders: bool, stream: &str) -> Result<StreamFacts, StreamFault> {
    let unusable = |why: String| Err(StreamFault::Unusable(why));
    if no_responders {
        return unusable(format!(
            "JetStream does not answer for stream {stream}: is it enabled on the server and for this account?"
        ));
    }
    let info: StreamInfo = match serde_json::from_slice(body) {
        Ok(info) => info,
        Err(error) => {
            return unusable(format!("cannot read what JetStream says of stream {stream}: {error}"));
        }
    };
    match info {
        StreamInfo { error: Some(error), .. } if error.err_code == STREAM_NOT_FOUND => {
            Err(StreamFault::Missing { stream: stream.to_owned() })
        }
        StreamInfo { error: Some(error), .. } => unusable(format!("stream {stream}: {}", error.text())),
        StreamInfo { cluster: Some(Cluster { leader }), .. } if leader.is_empty() => {
            unusable(format!("stream {stream} has no leader"))
        }
        StreamInfo { config: Some(config), state, .. } => match config.cannot() {
            Some(reason) => unusable(format!("stream {stream} {reason}")),
            None => Ok(facts(config, state.unwrap_or_default())),
        },
        StreamInfo { config: None, .. } => unusable(format!("JetStream says nothing of stream {stream}")),
    }
}

fn facts(config: StreamConfig, state: StreamState) -> StreamFacts {
    let limit = |value: i64| usize::try_from(value).ok().filter(|&limit| limit > 0);
    StreamFacts {
        max_msg_size: limit(config.max_msg_size),
        max_bytes: limit(config.keeping.max_bytes),
        allow_atomic: config.allow_atomic,
        subjects: config.subjects,
        keeping: config.keeping,
        state,
    }
}

/// The subject of a `-ERR 'Permissions Violation for Publish to "subject"'` line, if it is one.
pub fn denied_subject(error: &str) -> Option<&str> {
    let rest = error.split_once("Permissions Violation for Publish to ")?.1;
    rest.trim_start_matches('"').split('"').next().filter(|subject| !subject.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_to_a_publish() {
        let outage = |cause: &str| Some(Answer::Outage { cause: cause.into() });
        let refused = |error: &str| Some(Answer::Refused { error: error.into() });
        let cases: [(&str, Option<Answer>); 14] = [
            (r#"{"stream":"EVENTS","seq":7}"#, Some(Answer::Stored { duplicate: false })),
            (r#"{"stream":"EVENTS","seq":7,"duplicate":true}"#, Some(Answer::Stored { duplicate: true })),
            (
                r#"{"stream":"EVENTS","seq":0,"duplicate":true}"#,
                outage("an earlier copy of the message is in process"),
            ),
            (
                r#"{"error":{"code":409,"err_code":10158,"description":"duplicate message id is in process"},"stream":"EVENTS","seq":0}"#,
                outage("duplicate message id is in process (10158)"),
            ),
            (
                r#"{"stream":"OTHER","seq":7}"#,
                refused(
                    "stored in stream OTHER instead of EVENTS: give the subject to EVENTS alone, \
                     or map the topic elsewhere",
                ),
            ),
            (
                r#"{"error":{"code":400,"err_code":10060,"description":"expected stream does not match"},"stream":"X","seq":0}"#,
                refused("expected stream does not match (10060)"),
            ),
            (
                r#"{"error":{"code":503,"err_code":10077,"description":"maximum messages exceeded"},"stream":"EVENTS","seq":0}"#,
                outage("maximum messages exceeded (10077)"),
            ),
            (
                r#"{"error":{"code":503,"err_code":10077,"description":"maximum messages per subject exceeded"},"stream":"EVENTS","seq":0}"#,
                refused("maximum messages per subject exceeded (10077)"),
            ),
            (
                r#"{"error":{"code":503,"err_code":10076,"description":"jetstream not enabled"}}"#,
                outage("jetstream not enabled (10076)"),
            ),
            (
                r#"{"error":{"code":404,"err_code":10059,"description":"stream not found"}}"#,
                outage("stream not found (10059)"),
            ),
            (
                r#"{"error":{"code":400,"err_code":10002,"description":"resource limits exceeded for account"}}"#,
                outage("resource limits exceeded for account (10002)"),
            ),
            (
                r#"{"error":{"code":429,"err_code":10167,"description":"too many requests"}}"#,
                outage("too many requests (10167)"),
            ),
            ("+OK", None),
            ("{}", None),
        ];
        for (body, expected) in cases {
            assert_eq!(publish_answer(body.as_bytes(), false, "EVENTS"), expected, "{body}");
        }
        assert_eq!(publish_answer(b"", true, "EVENTS"), Some(Answer::NoResponders));
    }

    #[test]
    fn facts_of_a_stream() {
        let body = br#"{"type":"x","config":{"name":"EVENTS","subjects":["app.>"],"max_msg_size":-1,"max_bytes":1000}}"#;
        let facts = stream_answer(body, false, "EVENTS").unwrap();
        assert_eq!((facts.max_msg_size, facts.max_bytes), (None, Some(1000)));
        assert!(facts.takes("app.orders.placed"));
        assert!(!facts.takes("other"));
        assert_eq!(facts.keeping, Keeping { max_bytes: 1000, ..Keeping::default() });
        let body = br#"{"config":{"name":"EVENTS","storage":"memory","num_replicas":3,"duplicate_window":5000000000}}"#;
        let keeping = stream_answer(body, false, "EVENTS").unwrap().keeping;
        assert_eq!(
            (keeping.storage.as_str(), keeping.replicas, keeping.duplicate_window_ns),
            ("memory", 3, 5_000_000_000)
        );
    }

    #[test]
    fn a_stream_that_cannot_take_events_says_why() {
        let cases = [
            (r#"{"error":{"code":404,"err_code":10059,"description":"stream not found"}}"#, "is missing"),
            (r#"{"error":{"code":503,"err_code":10008,"description":"temporarily unavailable"}}"#, "10008"),
            (r#"{"config":{"name":"E","subjects":[]},"cluster":{"name":"c"}}"#, "no leader"),
            (r#"{"config":{"name":"E","sealed":true}}"#, "sealed"),
            (r#"{"config":{"name":"E","mirror":{"name":"O"}}}"#, "mirror"),
            (r#"{"config":{"name":"E","no_ack":true}}"#, "no_ack"),
            (r#"{"config":{"name":"E","allow_msg_counter":true}}"#, "counts"),
            ("nonsense", "cannot read"),
        ];
        for (body, part) in cases {
            let fault = stream_answer(body.as_bytes(), false, "EVENTS").unwrap_err();
            assert!(fault.to_string().contains(part), "{fault}");
            let is_missing = fault == StreamFault::Missing { stream: "EVENTS".into() };
            assert_eq!(is_missing, part == "is missing", "only such a stream can be created: {body}");
        }
        assert!(stream_answer(b"", true, "EVENTS").unwrap_err().to_string().contains("enabled"));
    }

    #[test]
    fn the_subject_of_a_denied_publish() {
        let line = r#"Permissions Violation for Publish to "secret.topic""#;
        assert_eq!(denied_subject(line), Some("secret.topic"));
        assert_eq!(denied_subject(r#"Permissions Violation for Subscription to "_INBOX.x""#), None);
        assert_eq!(denied_subject("Stale Connection"), None);
    }
}
