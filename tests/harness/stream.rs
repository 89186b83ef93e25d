//! A stream of one's own, and reading it back.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use pg_outbox::lab::sandbox::{NatsOptions, NatsServer};
use serde_json::{Value, json};

use super::wire::{Client, Message};
use super::{Evidence, unique};

/// Names the program of [`current_nats_server`].
const CURRENT_VAR: &str = "PG_OUTBOX_NATS_SERVER_CURRENT";
/// Messages asked for at once when a stream is read back.
const BATCH: u64 = 500;
/// Longest wait for the next message of a stream that holds it.
const READ_LIMIT: Duration = Duration::from_secs(10);
/// Attempts to begin to read a stream back.
const READ_TRIES: usize = 20;
/// Messages of a stream that its evidence shows.
const EVIDENCE_MESSAGES: usize = 10;

/// The nats-server that all tests share. It is never stopped or paused.
pub fn shared_nats() -> &'static NatsServer {
    static NATS: OnceLock<NatsServer> = OnceLock::new();
    NATS.get_or_init(|| {
        NatsServer::start(&NatsOptions::default()).unwrap_or_else(|error| panic!("{error:#}"))
    })
}

/// A current nats-server, beside the one of the distribution: the program that tests/run.sh fetches.
pub fn current_nats_server() -> PathBuf {
    let fetched = concat!(env!("CARGO_MANIFEST_DIR"), "/target/servers/nats-server-2.15.1");
    let program = std::env::var_os(CURRENT_VAR).map_or_else(|| PathBuf::from(fetched), PathBuf::from);
    assert!(
        program.is_file(),
        "no {}: tests/run.sh fetches it, or name one with {CURRENT_VAR}",
        program.display()
    );
    program
}

/// The current nats-server that all tests share. It is never stopped or paused.
pub fn shared_current_nats() -> &'static NatsServer {
    static NATS: OnceLock<NatsServer> = OnceLock::new();
    NATS.get_or_init(current_nats)
}

/// A private server of the current version.
pub fn current_nats() -> NatsServer {
    let options = NatsOptions { program: Some(current_nats_server()), ..NatsOptions::default() };
    NatsServer::start(&options).unwrap_or_else(|error| panic!("{error:#}"))
}

/// A private server, for a test that stops or pauses it; `config` is added to its config file.
pub fn start_nats(config: &str) -> NatsServer {
    let options = NatsOptions { config: config.to_owned(), ..NatsOptions::default() };
    NatsServer::start(&options).unwrap_or_else(|error| panic!("{error:#}"))
}

/// A stream of one's own on the shared server.
pub fn stream() -> TestStream {
    TestStream::on(&shared_nats().url(), &json!({}))
}

/// A stream that takes `<prefix>.>`, with a duplicate window of two minutes.
pub struct TestStream {
    /// URL of its server, or several with commas between.
    pub url: String,
    /// Name of the stream.
    pub name: String,
    /// First token of its subjects.
    pub prefix: String,
}

/// One message of a stream.
#[derive(Debug, Clone)]
pub struct Stored {
    /// Its sequence number in the stream (or the number of its arrival, from a core subscription).
    pub seq: u64,
    /// When the stream stored it, in nanoseconds since 1970; 0 from a core subscription.
    pub at_ns: u64,
    pub subject: String,
    /// The header block as stored, from `NATS/1.0` to its empty line.
    pub headers: String,
    pub payload: Vec<u8>,
    /// `Nats-Msg-Id`; empty if there is none.
    pub msg_id: String,
}

impl Stored {
    /// A message as it came, with its number.
    pub fn new(seq: u64, message: Message) -> Stored {
        let mut stored = Stored {
            seq,
            at_ns: message.reply.as_deref().and_then(stored_at).unwrap_or_default(),
            subject: message.subject,
            headers: message.headers,
            payload: message.payload,
            msg_id: String::new(),
        };
        stored.msg_id = stored.header("Nats-Msg-Id").unwrap_or_default().to_owned();
        stored
    }

    /// The value of a header, by its exact name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .split("\r\n")
            .skip(1)
            .filter_map(|line| line.split_once(':'))
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value.trim_start())
    }

    /// The payload as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.payload).unwrap()
    }
}

impl TestStream {
    /// Makes a stream with a unique name; `settings` override the fields of its configuration.
    pub fn on(url: &str, settings: &Value) -> TestStream {
        let stream = TestStream::named(url);
        stream.create(settings);
        stream
    }

    /// A stream with a unique name that is still to be made.
    pub fn named(url: &str) -> TestStream {
        let name = unique("STREAM");
        TestStream { url: url.to_owned(), prefix: name.to_lowercase(), name }
    }

    /// Makes the stream, again if it was deleted or its server's store emptied.
    pub fn create(&self, settings: &Value) {
        self.client().api(&format!("STREAM.CREATE.{}", self.name), &self.config(settings)).unwrap();
    }

    /// Makes the stream if its server, or a cluster that may have no leader, can do it now.
    pub fn try_create(&self, settings: &Value) -> Option<Value> {
        Client::try_connect(&self.url)?
            .try_api(&format!("STREAM.CREATE.{}", self.name), &self.config(settings))
    }

    fn config(&self, settings: &Value) -> Value {
        let mut config = json!({
            "name": self.name,
            "subjects": [format!("{}.>", self.prefix)],
            "storage": "file",
            "retention": "limits",
            "num_replicas": 1,
            "duplicate_window": 120_000_000_000_u64,
        });
        for (key, value) in settings.as_object().unwrap() {
            config[key] = value.clone();
        }
        config
    }

    /// Changes fields of the stream's configuration.
    pub fn update(&self, settings: &Value) {
        let mut config = self.info()["config"].clone();
        for (key, value) in settings.as_object().unwrap() {
            config[key] = value.clone();
        }
        self.client().api(&format!("STREAM.UPDATE.{}", self.name), &config).unwrap();
    }

    /// Deletes the stream.
    pub fn delete(&self) {
        self.client().api(&format!("STREAM.DELETE.{}", self.name), &Value::Null).unwrap();
    }

    /// What STREAM.INFO answers.
    pub fn info(&self) -> Value {
        self.client().api(&format!("STREAM.INFO.{}", self.name), &Value::Null).unwrap()
    }

    /// The names of all streams of its server.
    pub fn all_streams(&self) -> Vec<String> {
        let answer = self.client().api("STREAM.NAMES", &Value::Null).unwrap();
        let names = answer["streams"].as_array().cloned().unwrap_or_default();
        names.iter().filter_map(Value::as_str).map(str::to_owned).collect()
    }

    /// How many messages it holds.
    pub fn count(&self) -> u64 {
        self.info()["state"]["messages"].as_u64().unwrap()
    }

    /// How many consumers it has: none of ours may stay behind.
    pub fn consumers(&self) -> u64 {
        self.info()["state"]["consumer_count"].as_u64().unwrap()
    }

    /// Subject of a topic under the usual topic map, `">": "<prefix>.>"`.
    pub fn subject(&self, topic: &str) -> String {
        format!("{}.{topic}", self.prefix)
    }

    /// Everything the stream holds now, in its order.
    ///
    /// An ephemeral pull consumer in memory, without acks; how much there is to read is known beforehand, so that
    /// nothing is taken for the end but the end.
    pub fn messages(&self) -> Vec<Stored> {
        let mut client = self.client();
        let info = client.api(&format!("STREAM.INFO.{}", self.name), &Value::Null).unwrap();
        let total = info["state"]["messages"].as_u64().unwrap();
        let last = info["state"]["last_seq"].as_u64().unwrap();
        if total == 0 {
            return Vec::new();
        }
        let request = json!({"stream_name": self.name, "config": {"deliver_policy": "all", "ack_policy": "none",
            "replay_policy": "instant", "inactive_threshold": 60_000_000_000_u64, "mem_storage": true}});
        // A cluster that was without a leader a moment ago may need a few attempts.
        let call = format!("CONSUMER.CREATE.{}", self.name);
        let mut consumer = client.api(&call, &request);
        for _ in 0..READ_TRIES {
            if consumer.is_err() {
                std::thread::sleep(Duration::from_millis(500));
                consumer = client.api(&call, &request);
            }
        }
        let consumer = consumer.unwrap();
        let consumer = consumer["name"].as_str().unwrap().to_owned();
        let read = self.read(&mut client, &consumer, total, last);
        client.api(&format!("CONSUMER.DELETE.{}.{consumer}", self.name), &Value::Null).unwrap();
        read
    }

    fn read(&self, client: &mut Client, consumer: &str, total: u64, last: u64) -> Vec<Stored> {
        let inbox = unique("_INBOX.harness.read.");
        let next = format!("$JS.API.CONSUMER.MSG.NEXT.{}.{consumer}", self.name);
        let subscription = client.subscribe(&inbox);
        let mut read: Vec<Stored> = Vec::new();
        while read.last().is_none_or(|message| message.seq < last) {
            let batch = BATCH.min(total - read.len() as u64);
            let request = json!({"batch": batch, "expires": 9_000_000_000_u64});
            client.publish(&next, &inbox, "", request.to_string().as_bytes());
            for _ in 0..batch {
                let message = client
                    .next(READ_LIMIT)
                    .unwrap_or_else(|| panic!("{}: {} of {total} messages came", self.name, read.len()));
                assert_eq!(message.status(), None, "{}: {}", self.name, message.headers);
                let seq = stream_seq(message.reply.as_deref().unwrap());
                assert!(
                    read.last().is_none_or(|before| before.seq < seq),
                    "{}: read out of order",
                    self.name
                );
                read.push(Stored::new(seq, message));
            }
        }
        client.unsubscribe(subscription);
        read
    }

    fn client(&self) -> Client {
        Client::connect(&self.url)
    }
}

impl Evidence for TestStream {
    fn evidence(&self) -> String {
        let info = self.info();
        let mut lines = vec![format!("--- stream {}: {}", self.name, info["state"])];
        let messages = self.messages();
        let skip = messages.len().saturating_sub(EVIDENCE_MESSAGES);
        for message in &messages[skip..] {
            let payload = String::from_utf8_lossy(&message.payload);
            let short: String = payload.chars().take(120).collect();
            lines.push(format!("  {} {} {} {short}", message.seq, message.subject, message.msg_id));
        }
        lines.join("\n")
    }
}

/// The stream's sequence number in the reply subject of a delivered message:
/// `$JS.ACK.<stream>.<consumer>.<deliveries>.<stream seq>.<consumer seq>.<time>.<pending>`, since nats-server 2.15
/// with two tokens (domain and account) before the stream.
fn stream_seq(reply: &str) -> u64 {
    ack_number(reply, 5).unwrap_or_else(|| panic!("no sequence number in {reply}"))
}

/// The time in such a reply subject.
fn stored_at(reply: &str) -> Option<u64> {
    reply.starts_with("$JS.ACK.").then(|| ack_number(reply, 7))?
}

/// A number in such a reply subject, by its place in the shorter form.
fn ack_number(reply: &str, place: usize) -> Option<u64> {
    let tokens: Vec<&str> = reply.split('.').collect();
    let place = if tokens.len() >= 11 { place + 2 } else { place };
    tokens.get(place)?.parse().ok()
}
