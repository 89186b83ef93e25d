//! The configuration: from what is written to what it means.
//!
//! [`Config::load`] reads a YAML file and four environment variables once, at start, on the main thread, and
//! returns either a configuration in which every value is present, checked and fits the others, or all
//! problems at once, each with its line. Nothing but the connection string is required. It looks at no other
//! file but those in which secrets stand, and at no server; whether those agree is for `pg-outbox check` and for
//! the connections to find out. Secrets are kept in [`Secret`] and occur in no message. `config/yaml.rs` turns text into nodes that know
//! their lines, `config/reading.rs` takes the keys out and gathers the problems, `config/values.rs` says what
//! each kind of value may be, `config/faults.rs` is what
//! can be wrong, `config/secrets.rs` reads the ones that stand elsewhere, `config/changes.rs` says
//! what a reload may change; the keys, their defaults, ranges and mutual limits are in this file.

mod changes;
mod faults;
pub mod live;
mod reading;
mod secrets;
mod values;
mod yaml;

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::event::topic_map::TopicMap;
use crate::tls::{Check, Roots, Tls};
pub use changes::Changes;
pub use faults::ConfigError;
use reading::{ConfigReading, Section};
use secrets::Credentials;
use values::{NatsUrls, UrlLogin};

/// The configuration file that is read unless another is named.
pub const DEFAULT_PATH: &str = "/etc/pg-outbox/config.yaml";

/// Largest configuration file, in bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Connections that are not the workers': the claimer's next claim, and the gauges and other small reads.
const CONNECTIONS_BESIDE_WORKERS: u32 = 2;

/// Spare time between the end of a claim's waits and the database ending its transaction.
const IDLE_IN_TRANSACTION_SPARE: Duration = Duration::from_secs(15);

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

    /// What somebody said to whom it was told, with `***` in its place. One of fewer than four characters stays: it
    /// would be found in any text.
    pub fn hidden_in(&self, said: &str) -> String {
        if self.0.len() < 4 { said.to_owned() } else { said.replace(&self.0, "***") }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Everything the service needs to know, with defaults filled in and checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// `dispatcher`: how events are claimed and tried.
    pub dispatcher: Dispatcher,
    /// `ordering`: whether keys keep their order, and what a dead letter does to its key.
    pub ordering: Ordering,
    /// `database`: the PostgreSQL that holds the table `outboxes`.
    pub database: Database,
    /// `nats`: where events go.
    pub nats: Nats,
    /// `partitions`: how many are made ahead, and how long events are kept.
    pub partitions: Partitions,
    /// `logging`: what is logged, and how.
    pub logging: Logging,
    /// `metrics`: the HTTP server.
    pub metrics: Metrics,
}

impl Config {
    /// Reads the file at `path` and the environment variables `DATABASE_DSN`, `NATS_URL`,
    /// `DISPATCHER_INSTANCE_ID` and `LOG_LEVEL`, which win over the file unless they are empty.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let name = path.display().to_string();
        let unreadable =
            |why: &dyn fmt::Display| ConfigError { problems: vec![format!("{name}: cannot be read: {why}")] };
        let mut text = String::new();
        // One byte more than allowed tells a file that is too large, and bounds a device.
        File::open(path)
            .and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text))
            .map_err(|error| unreadable(&error))?;
        if text.len() as u64 > MAX_FILE_BYTES {
            return Err(unreadable(&format_args!("it is larger than {MAX_FILE_BYTES} bytes")));
        }
        Config::parse(&text, &name, |variable| {
            std::env::var_os(variable).map(|value| value.to_string_lossy().into_owned())
        })
    }

    /// Makes a configuration of the text of a file; `name` stands for the file in messages, and `environment`
    /// for the process's environment.
    pub fn parse(
        text: &str,
        name: &str,
        environment: impl Fn(&str) -> Option<String>,
    ) -> Result<Config, ConfigError> {
        let root = yaml::parse(text).map_err(|error| ConfigError::of_yaml(name, &error))?;
        let mut reading = ConfigReading::new(&environment, Credentials::of(name, &environment));
        let config = Config::read(&mut reading, &root);
        reading.finish(name, text)?;
        Ok(config)
    }

    fn read(reading: &mut ConfigReading<'_>, node: &yaml::Node) -> Config {
        let root = reading.root(node);
        let config = Config {
            dispatcher: dispatcher(reading, &root),
            ordering: ordering(reading, &root),
            database: database(reading, &root),
            nats: nats(reading, &root),
            partitions: partitions(reading, &root),
            logging: logging(reading, &root),
            metrics: metrics(reading, &root),
        };
        reading.check_keys(node);
        check_together(reading, &config);
        config
    }

    /// The longest that a claim works, its own dues to the database left out: it sends, waits for the last ack, and may
    /// probe twice as long again.
    pub fn longest_claim(&self) -> Duration {
        self.dispatcher.claim_budget + 3 * self.nats.ack_timeout
    }

    /// After this the database ends the transaction of a claim from which nothing is heard, which frees its lanes.
    pub fn idle_in_transaction_timeout(&self) -> Duration {
        self.longest_claim() + IDLE_IN_TRANSACTION_SPARE
    }

    /// After this, at the latest, an event is sent again that the stream stored for an instance which then vanished
    /// with its machine: the database frees its lanes, another instance looks from the beginning, and its claim sends.
    pub fn sent_again_within(&self) -> Duration {
        self.idle_in_transaction_timeout() + self.dispatcher.fallback_interval + self.dispatcher.claim_budget
    }
}

/// How events are claimed and tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dispatcher {
    /// Name of this instance: `application_name`, the `Outbox-Instance` header, logs. 1 to 63 printable ASCII
    /// characters; two instances may share one, but logs and `pg_stat_activity` are then hard to read.
    /// Default: the host name.
    pub instance_id: String,
    /// Events of one claim at most, 1 to 100,000. Default 100.
    pub batch_size: usize,
    /// Attempts that NATS judges before an event is a dead letter, 1 to 1,000,000. Outages do not count. Default 3.
    pub max_attempts: u32,
    /// Time between claims while nothing wakes us up, 10ms to 1h. Default 1s.
    pub poll_interval: Duration,
    /// Longest sleep while notifications do wake us up, 10ms to 1h; at least `poll_interval`. Default 30s.
    pub fallback_interval: Duration,
    /// Worker threads, each with one claim at a time; 1 to 64, as there are 64 lanes to claim. Default 5.
    pub workers: usize,
    /// Time to finish what is in flight after SIGTERM, 0s to 1h; 0s releases everything at once. Default 30s.
    pub shutdown_grace: Duration,
    /// A claim sends for at most this long after its events were read, then settles what it has; 10ms to 5m.
    /// Default 5s.
    pub claim_budget: Duration,
    /// Bytes of events that all claims together may hold, 64 KiB to 64 GiB. Default 64 MiB (written `64MiB`).
    pub max_in_flight_bytes: usize,
    /// Wait before the second attempt, 10ms to 1day; doubles with each further one. Default 1s.
    pub backoff_initial: Duration,
    /// Longest wait between attempts, 10ms to 1day; at least `backoff_initial`. Default 5m.
    pub backoff_max: Duration,
    /// A thread without progress for so long, beyond the waits of a claim and for a connection, counts as stuck:
    /// `/health` fails and the watchdog goes hungry. 1s to 1h. Default 2m.
    pub stuck_after: Duration,
}

/// Order of the events of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
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

/// How PostgreSQL is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Database {
    /// Connection string, URL or key=value; here it only looks like one. Required (or `DATABASE_DSN`).
    pub dsn: Secret,
    /// What dsn and listen_dsn may leave out.
    pub parts: DsnParts,
    /// The schema that holds the outbox, 1 to 63 bytes. Default: where the connection's `search_path` finds it.
    pub schema: Option<String>,
    /// Connections of the pool at most, up to 1,000; at least `workers` + 2. Default 20.
    pub max_connections: u32,
    /// Idle connections kept at most, 0 to `max_connections`. Default 10, or less with fewer connections.
    pub max_idle: u32,
    /// Longest wait for a connection, 10ms to 10m. Default 5s.
    pub connect_timeout: Duration,
    /// LISTEN for new events; false: poll every poll_interval. Default true.
    pub listen: bool,
    /// Connection string for LISTEN alone, around a transaction pooler. Default: dsn.
    pub listen_dsn: Option<Secret>,
    /// Whether statements are prepared once a connection. Default auto.
    pub prepared_statements: PreparedStatements,
    /// Settle with synchronous_commit on. Default false: a PostgreSQL crash then republishes a moment's events.
    pub synchronous_commit: bool,
}

/// Parts of a connection string that may stand beside it, each in a file or a credential of its own. A connection
/// string that has the part keeps its own. Default: none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DsnParts {
    /// `user`.
    pub user: Option<String>,
    /// `password`.
    pub password: Option<Secret>,
    /// `sslrootcert`: file with the CA certificates that the server's must lead to, or `system`.
    pub sslrootcert: Option<PathBuf>,
    /// `sslcert`: file with our certificate.
    pub sslcert: Option<PathBuf>,
    /// `sslkey`: file with its key.
    pub sslkey: Option<PathBuf>,
}

/// Whether statements are prepared once a connection, which a pooler in transaction mode may not carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PreparedStatements {
    /// Where a self-test shows that connections are sessions.
    Auto,
    /// Everywhere: a pooler that is between keeps them.
    Always,
    /// Nowhere.
    Never,
}

/// How NATS is reached, and what events become there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nats {
    /// Servers, at least one: `nats://host:4222` or `tls://host:4222`, the port optional, without userinfo (that
    /// is in `auth`). Written as `url`: one, several with commas between, or a list. Default nats://localhost:4222.
    pub servers: Vec<String>,
    /// Credentials, from the URL's userinfo or their own keys.
    pub auth: NatsAuth,
    /// `tls`: whose certificates count, and our own. With any of it, and with `tls://`, TLS is a must; else it is
    /// used with servers that insist. Default: the system's CA certificates, none of our own.
    pub tls: NatsTls,
    /// First tokens of the subjects on which answers come to us. Default _INBOX.
    pub inbox_prefix: String,
    /// Connection attempts at start, 1 to 1,000,000, then exit 1. Once up, it reconnects for ever. Default 5.
    pub max_retries: u32,
    /// Wait between them, 10ms to 1h. Default 2s.
    pub retry_delay: Duration,
    /// Longest wait for one connection attempt, 10ms to 10m. Default 5s.
    pub connect_timeout: Duration,
    /// Longest wait for an ack, 10ms to 10m. Default 5s.
    pub ack_timeout: Duration,
    /// `Nats-*` headers that metadata may set, in exactly this spelling. Default none.
    pub allow_headers: Vec<String>,
    /// Subject on which dead letters are announced. Default none: they are not.
    pub dead_letter_subject: Option<String>,
    /// The stream.
    pub jetstream: JetStream,
    /// Topics to subjects.
    pub topic_map: TopicMap,
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

/// TLS to NATS; files in PEM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NatsTls {
    /// CA certificates that a server's must lead to. Default: the system's.
    pub ca: Option<PathBuf>,
    /// Our certificate, for servers that ask; only together with its key.
    pub cert: Option<PathBuf>,
    /// Its key.
    pub key: Option<PathBuf>,
}

impl NatsTls {
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

/// The stream, and how to create it. What follows `create` has no effect without `create`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JetStream {
    /// false: core NATS. Default true.
    pub enabled: bool,
    /// The stream every event must land in: no blank and none of `. * > / \`. Default EVENTS.
    pub stream_name: String,
    /// Send long runs of one key as atomic batches where the stream takes them. Default true.
    pub atomic_batches: bool,
    /// Create the stream when it is missing. Default false.
    pub create: bool,
    /// Subjects of a stream we create, wildcards allowed. Required with `create`. Default none.
    pub subjects: Vec<String>,
    /// Storage of a stream we create. Default file.
    pub storage: Storage,
    /// Replicas of a stream we create, 1 to 5. Default 1.
    pub replicas: u32,
    /// Duplicate window of a stream we create, 100ms to 30days. Default 2m.
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

/// How the monthly partitions of the outbox are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partitions {
    /// Months after this one that have their partition, 1 to 120. Default 3.
    pub premake: u32,
    /// Published events older than this are deleted, whole partitions at a time where possible; 1day to 100years, or
    /// `None` (written `off`): they are kept for ever. Default 30days.
    pub retention: Option<Duration>,
}

/// What is logged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Logging {
    /// Level: error, warn, info, debug or trace. Default info.
    pub level: log::LevelFilter,
    /// Format: json or text (plain is the same). Default text.
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metrics {
    /// false: no HTTP server. Default true.
    pub enabled: bool,
    /// Address to listen on. Default 0.0.0.0.
    pub address: IpAddr,
    /// Port; 0 picks a free one. Default 8080.
    pub port: u16,
    /// Path of the metrics; not one of the paths the server has anyway. Default /metrics.
    pub path: String,
}

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3_600);
const DAY: Duration = Duration::from_secs(86_400);

/// Waits that are spent again and again: shorter ones would be a busy loop.
fn up_to(longest: Duration) -> RangeInclusive<Duration> {
    10 * MS..=longest
}

fn dispatcher(reading: &mut ConfigReading<'_>, root: &Section<'_>) -> Dispatcher {
    use values::{count, duration, instance_id, size};
    let section = reading.section(root, "dispatcher");
    let mut value = Keys { reading, section: &section };
    Dispatcher {
        instance_id: value.of("instance_id", host_name(), instance_id),
        batch_size: value.of("batch_size", 100, count(1..=100_000)),
        max_attempts: value.of("max_attempts", 3, count(1..=1_000_000)),
        poll_interval: value.of("poll_interval", SECOND, duration(up_to(HOUR))),
        fallback_interval: value.of("fallback_interval", 30 * SECOND, duration(up_to(HOUR))),
        workers: value.of("workers", 5, count(1..=64)),
        shutdown_grace: value.of("shutdown_grace", 30 * SECOND, duration(Duration::ZERO..=HOUR)),
        claim_budget: value.of("claim_budget", 5 * SECOND, duration(up_to(5 * MINUTE))),
        max_in_flight_bytes: value.of("max_in_flight_bytes", 64 << 20, size(64 << 10..=64 << 30)),
        backoff_initial: value.of("backoff_initial", SECOND, duration(up_to(DAY))),
        backoff_max: value.of("backoff_max", 5 * MINUTE, duration(up_to(DAY))),
        stuck_after: value.of("stuck_after", 2 * MINUTE, duration(SECOND..=HOUR)),
    }
}

fn ordering(reading: &mut ConfigReading<'_>, root: &Section<'_>) -> Ordering {
    use values::{boolean, one_of};
    let section = reading.section(root, "ordering");
    let mut value = Keys { reading, section: &section };
    let on_dead = [("continue", OnDead::Continue), ("block", OnDead::Block)];
    Ordering {
        enabled: value.of("enabled", true, boolean),
        on_dead: value.of("on_dead", OnDead::Continue, one_of("way to treat a key", &on_dead)),
    }
}

fn database(reading: &mut ConfigReading<'_>, root: &Section<'_>) -> Database {
    use PreparedStatements::{Always, Auto, Never};
    use values::{boolean, count, dsn, duration, file, one_of, optional_dsn, schema, secret, user};
    let section = reading.section(root, "database");
    let preparing = [("auto", Auto), ("always", Always), ("never", Never)];
    let mut value = Keys { reading, section: &section };
    let dsn = value.secret("dsn", Secret::new(""), dsn);
    let parts = DsnParts {
        user: value.secret("user", None, user),
        password: value.secret("password", None, secret),
        sslrootcert: value.path("sslrootcert", file),
        sslcert: value.path("sslcert", file),
        sslkey: value.path("sslkey", file),
    };
    let max_connections = value.of("max_connections", 20, count(1..=1_000));
    let database = Database {
        dsn,
        parts,
        schema: value.of("schema", None, schema),
        max_connections,
        max_idle: value.of("max_idle", max_connections.min(10), count(0..=1_000)),
        connect_timeout: value.of("connect_timeout", 5 * SECOND, duration(up_to(10 * MINUTE))),
        listen: value.of("listen", true, boolean),
        listen_dsn: value.secret("listen_dsn", None, optional_dsn),
        prepared_statements: value.of(
            "prepared_statements",
            Auto,
            one_of("way to prepare statements", &preparing),
        ),
        synchronous_commit: value.of("synchronous_commit", false, boolean),
    };
    if !reading.is_given("database.dsn") {
        let text = "missing; write the connection string here or in the environment as DATABASE_DSN";
        reading.missing(&section, "dsn", text.to_owned());
    }
    database
}

fn nats(reading: &mut ConfigReading<'_>, root: &Section<'_>) -> Nats {
    use values::{
        allowed_headers, count, dead_letter_subject, duration, file, inbox_prefix, nats_urls, secret, topics,
        user,
    };
    let section = reading.section(root, "nats");
    let jetstream = jetstream(reading, &section);
    let tls = nats_tls(reading, &section);
    let mut value = Keys { reading, section: &section };
    let localhost = NatsUrls { servers: vec!["nats://localhost:4222".to_owned()], login: None };
    let urls = value.secret("url", localhost, nats_urls);
    let logins = Logins {
        in_url: urls.login,
        user: value.secret("user", None, user),
        password: value.secret("password", None, secret),
        token: value.secret("token", None, secret),
        nkey_file: value.path("nkey_file", file),
        credentials_file: value.path("credentials_file", file),
    };
    Nats {
        servers: urls.servers,
        tls,
        inbox_prefix: value.of("inbox_prefix", "_INBOX".to_owned(), inbox_prefix),
        max_retries: value.of("max_retries", 5, count(1..=1_000_000)),
        retry_delay: value.of("retry_delay", 2 * SECOND, duration(up_to(HOUR))),
        connect_timeout: value.of("connect_timeout", 5 * SECOND, duration(up_to(10 * MINUTE))),
        ack_timeout: value.of("ack_timeout", 5 * SECOND, duration(up_to(10 * MINUTE))),
        allow_headers: value.of("allow_headers", Vec::new(), allowed_headers),
        dead_letter_subject: value.of("dead_letter_subject", None, dead_letter_subject),
        topic_map: value.of("topic_map", TopicMap::default(), topics),
        auth: logins.choose(reading),
        jetstream,
    }
}

fn nats_tls(reading: &mut ConfigReading<'_>, nats: &Section<'_>) -> NatsTls {
    use values::file;
    let section = reading.section(nats, "tls");
    let mut value = Keys { reading, section: &section };
    let tls =
        NatsTls { ca: value.path("ca", file), cert: value.path("cert", file), key: value.path("key", file) };
    if tls.cert.is_some() != tls.key.is_some() {
        let text = "nats.tls.cert and nats.tls.key go together; one of them is missing";
        reading.clash(&["nats.tls.cert", "nats.tls.key"], text.to_owned());
    }
    tls
}

fn jetstream(reading: &mut ConfigReading<'_>, nats: &Section<'_>) -> JetStream {
    use values::{boolean, count, duration, one_of, stream_name, subjects};
    let section = reading.section(nats, "jetstream");
    let mut value = Keys { reading, section: &section };
    let storage = [("file", Storage::File), ("memory", Storage::Memory)];
    JetStream {
        enabled: value.of("enabled", true, boolean),
        stream_name: value.of("stream_name", "EVENTS".to_owned(), stream_name),
        atomic_batches: value.of("atomic_batches", true, boolean),
        create: value.of("create", false, boolean),
        subjects: value.of("subjects", Vec::new(), subjects),
        storage: value.of("storage", Storage::File, one_of("kind of storage", &storage)),
        replicas: value.of("replicas", 1, count(1..=5)),
        duplicate_window: value.of("duplicate_window", 2 * MINUTE, duration(100 * MS..=30 * DAY)),
    }
}

fn partitions(reading: &mut ConfigReading<'_>, root: &Section<'_>) -> Partitions {
    use values::{count, duration_or_off};
    let section = reading.section(root, "partitions");
    let mut value = Keys { reading, section: &section };
    Partitions {
        premake: value.of("premake", 3, count(1..=120)),
        retention: value.of("retention", Some(30 * DAY), duration_or_off(DAY..=36_525 * DAY)),
    }
}

fn logging(reading: &mut ConfigReading<'_>, root: &Section<'_>) -> Logging {
    use log::LevelFilter::{Debug, Error, Info, Trace, Warn};
    use values::one_of;
    let section = reading.section(root, "logging");
    let mut value = Keys { reading, section: &section };
    let levels = [("error", Error), ("warn", Warn), ("info", Info), ("debug", Debug), ("trace", Trace)];
    let formats = [("json", LogFormat::Json), ("text", LogFormat::Text), ("plain", LogFormat::Text)];
    Logging {
        level: value.of("level", Info, one_of("level", &levels)),
        format: value.of("format", LogFormat::Text, one_of("format", &formats)),
    }
}

fn metrics(reading: &mut ConfigReading<'_>, root: &Section<'_>) -> Metrics {
    use values::{address, boolean, count, metrics_path};
    let section = reading.section(root, "metrics");
    let mut value = Keys { reading, section: &section };
    Metrics {
        enabled: value.of("enabled", true, boolean),
        address: value.of("address", IpAddr::V4(Ipv4Addr::UNSPECIFIED), address),
        port: value.of("port", 8080, count(0..=65_535)),
        path: value.of("path", "/metrics".to_owned(), metrics_path),
    }
}

/// The keys of one section, so that the lists above read as tables: key, default, what is allowed.
struct Keys<'r, 'e, 'n> {
    reading: &'r mut ConfigReading<'e>,
    section: &'r Section<'n>,
}

impl Keys<'_, '_, '_> {
    fn of<T, E: Into<faults::Faults>>(
        &mut self,
        name: &str,
        default: T,
        parse: impl FnOnce(&yaml::Node) -> Result<T, E>,
    ) -> T {
        self.reading.value(self.section, name, default, parse)
    }

    /// The same for a value that may stand elsewhere: in a file, or among systemd's credentials.
    fn secret<T, E: Into<faults::Faults>>(
        &mut self,
        name: &str,
        default: T,
        parse: impl FnOnce(&yaml::Node) -> Result<T, E>,
    ) -> T {
        let credentials = self.reading.credentials();
        self.of(name, default, |node| secrets::read(node, &credentials, parse))
    }

    /// The same for a file's path, which may be that of a credential.
    fn path(
        &mut self,
        name: &str,
        parse: impl FnOnce(&yaml::Node) -> Result<Option<PathBuf>, String>,
    ) -> Option<PathBuf> {
        let credentials = self.reading.credentials();
        self.of(name, None, |node| secrets::path(node, &credentials, parse))
    }
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

/// Reports values that are fine each on its own, but not together.
fn check_together(reading: &mut ConfigReading<'_>, config: &Config) {
    let Config { dispatcher, database, nats, .. } = config;
    let shown = humantime::format_duration;

    let workers = u32::try_from(dispatcher.workers).unwrap_or(u32::MAX);
    let needed = workers.saturating_add(CONNECTIONS_BESIDE_WORKERS);
    if database.max_connections < needed {
        let text = format!(
            "max_connections {} is too small for {workers} workers; allowed: at least {needed} (workers + {CONNECTIONS_BESIDE_WORKERS})",
            database.max_connections
        );
        reading.clash(&["database.max_connections", "dispatcher.workers"], text);
    }
    if database.max_idle > database.max_connections {
        let text = format!(
            "max_idle {} is more than max_connections; allowed: 0 to {}",
            database.max_idle, database.max_connections
        );
        reading.clash(&["database.max_idle", "database.max_connections"], text);
    }
    if dispatcher.poll_interval > dispatcher.fallback_interval {
        let text = format!(
            "poll_interval {} is longer than fallback_interval {}; allowed: at most as long",
            shown(dispatcher.poll_interval),
            shown(dispatcher.fallback_interval)
        );
        reading.clash(&["dispatcher.poll_interval", "dispatcher.fallback_interval"], text);
    }
    if dispatcher.backoff_initial > dispatcher.backoff_max {
        let text = format!(
            "backoff_initial {} is longer than backoff_max {}; allowed: at most as long",
            shown(dispatcher.backoff_initial),
            shown(dispatcher.backoff_max)
        );
        reading.clash(&["dispatcher.backoff_initial", "dispatcher.backoff_max"], text);
    }
    if nats.jetstream.create && nats.jetstream.subjects.is_empty() {
        let text = "true, but nats.jetstream.subjects is missing; write the new stream's subjects, such as [\"app.>\"]";
        // The subjects are named first so that a fault in them is not followed by this one.
        reading.clash(&["nats.jetstream.subjects", "nats.jetstream.create"], text.to_owned());
    }
}

/// The host's name, or a name of our own if that one cannot be an instance's.
fn host_name() -> String {
    let system = rustix::system::uname();
    let name = system.nodename().to_string_lossy();
    if values::is_instance_id(&name) { name.into_owned() } else { "pg-outbox".to_owned() }
}

#[cfg(test)]
mod tests;
