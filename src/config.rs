//! The configuration.
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// A value that must not be printed: `Debug` and `Display` show `***`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a value.
    pub fn new(value: impl Into<String>) -> Secret {
        Secret(value.into())
    }
    /// The value itself, for the one place that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}
impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Everything the service needs to know, with defaults filled in and checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// `dispatcher:`
    pub dispatcher: Dispatcher,
    /// `ordering:`
    pub ordering: Ordering,
    /// `database:`
    pub database: Database,
    /// `nats:`
    pub nats: Nats,
    /// `logging:`
    pub logging: Logging,
    /// `metrics:`
    pub metrics: Metrics,
}

/// How events are claimed and tried.
#[derive(Debug, Clone)]
pub struct Dispatcher {
    /// Name of this instance: `application_name`, the `Outbox-Instance` header, logs. Default: the host name.
    pub instance_id: String,
    /// Events of one claim at most. Default 100.
    pub batch_size: usize,
    /// Attempts that NATS judges before an event is a dead letter. Default 3.
    pub max_attempts: u32,
    /// Time between claims while nothing wakes us up. Default 1s.
    pub poll_interval: Duration,
    /// Longest sleep while notifications do wake us up. Default 30s.
    pub fallback_interval: Duration,
    /// Worker threads, each with one claim at a time. Default 5.
    pub workers: usize,
    /// Time to finish what is in flight after SIGTERM. Default 30s.
    pub shutdown_grace: Duration,
    /// A claim sends for at most this long after its events were read, then settles what it has. Default 5s.
    pub claim_budget: Duration,
    /// Bytes of events that all claims together may hold. Default 64 MiB (written `64MiB`).
    pub max_in_flight_bytes: usize,
    /// Wait before the second attempt; doubles with each further one. Default 1s.
    pub backoff_initial: Duration,
    /// Longest wait between attempts. Default 5m.
    pub backoff_max: Duration,
}

/// Order.
#[derive(Debug, Clone)]
pub struct Ordering {
    /// false gives up order per key for speed. Default true.
    pub enabled: bool,
    /// What a dead letter does to later events of its key. Default continue.
    pub on_dead: OnDead,
}

/// What a dead letter does to its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnDead {
    /// Later events of the key go on.
    Continue,
    /// The key is held until an operator retries or discards the dead letter.
    Block,
}

/// PostgreSQL.
#[derive(Debug, Clone)]
pub struct Database {
    /// Connection string, URL or key=value. Required (or `DATABASE_DSN`).
    pub dsn: Secret,
    /// Connections of the pool at most. Default 20; at least workers + 2.
    pub max_connections: u32,
    /// Idle connections kept at most. Default 10.
    pub max_idle: u32,
    /// Longest wait for a connection. Default 5s.
    pub connect_timeout: Duration,
    /// LISTEN for new events; false: poll every poll_interval. Default true.
    pub listen: bool,
    /// Connection string for LISTEN alone, around a transaction pooler. Default: dsn.
    pub listen_dsn: Option<Secret>,
    /// Settle with synchronous_commit on. Default false: a PostgreSQL crash then republishes a moment's events.
    pub synchronous_commit: bool,
}

/// NATS.
#[derive(Debug, Clone)]
pub struct Nats {
    /// Servers, one URL or several, comma-separated, without userinfo (that is in `auth`). Default nats://localhost:4222.
    pub servers: Vec<String>,
    /// Credentials, from the URL's userinfo or their own keys.
    pub auth: NatsAuth,
    /// Connection attempts at start, then exit 1. Default 5.
    pub max_retries: u32,
    /// Wait between them. Default 2s.
    pub retry_delay: Duration,
    /// Longest wait for one connection attempt. Default 5s.
    pub connect_timeout: Duration,
    /// Longest wait for an ack. Default 5s.
    pub ack_timeout: Duration,
    /// `Nats-*` headers that metadata may set. Default none.
    pub allow_headers: Vec<String>,
    /// JetStream.
    pub jetstream: JetStream,
    /// Topics to subjects.
    pub topic_map: crate::topic_map::TopicMap,
}

/// How we authenticate to NATS.
#[derive(Debug, Clone)]
pub enum NatsAuth {
    /// Not at all.
    None,
    /// User and password.
    UserPassword(String, Secret),
    /// Token.
    Token(Secret),
    /// A `.creds` file (JWT and nkey seed).
    CredentialsFile(PathBuf),
}

/// JetStream.
#[derive(Debug, Clone)]
pub struct JetStream {
    /// false: core NATS. Default true.
    pub enabled: bool,
    /// The stream every event must land in. Default EVENTS.
    pub stream_name: String,
    /// Create the stream when it is missing. Default false.
    pub create: bool,
    /// Subjects of a stream we create. Required with `create`.
    pub subjects: Vec<String>,
    /// Storage of a stream we create. Default file.
    pub storage: Storage,
    /// Replicas of a stream we create, 1 to 5. Default 1.
    pub replicas: u32,
    /// Duplicate window of a stream we create. Default 2m.
    pub duplicate_window: Duration,
}

/// Where JetStream keeps a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// On disk.
    File,
    /// In memory.
    Memory,
}

/// Logging.
#[derive(Debug, Clone)]
pub struct Logging {
    /// Level. Default info.
    pub level: log::LevelFilter,
    /// Format. Default text.
    pub format: LogFormat,
}

/// How a log line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// Plain text.
    Text,
}

/// The HTTP server: probes, metrics, status.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// false: no HTTP server. Default true.
    pub enabled: bool,
    /// Address to listen on. Default 0.0.0.0.
    pub address: std::net::IpAddr,
    /// Port; 0 picks a free one. Default 8080.
    pub port: u16,
    /// Path of the metrics. Default /metrics.
    pub path: String,
}
