//! The configuration: from what is written to what it means.
//!
//! [`Config::load`] reads a YAML file and four environment variables once, at start, on the main thread, and
//! returns either a configuration in which every value is present, checked and fits the others, or all
//! problems at once, each with its line. A reload reads it anew there; the claimer and the workers only ever take what
//! `live.rs` holds for them. The folder may name the ground floor, and it alone names `serde_yaml`. It looks at no other
//! file but those in which secrets stand, and at no server; whether those agree is for `pg-outbox check` and for
//! the connections to find out. Secrets are kept in [`Secret`] and occur in no message. Nothing but the connection string
//! is required.
//!
//! A key is declared once, in its section's file: `dispatcher.rs`, `database.rs`, `nats.rs` or `service.rs`. That
//! one declaration (`key.rs`, `section.rs`) says its default, what it may be, and what a reload does with it
//! (`changes.rs`, `live.rs`); what two keys must be to each other is in `checks.rs`. Below, `yaml.rs` turns text into
//! nodes that know their lines, `reading.rs` takes the keys out and gathers the problems, `values.rs` says what each kind
//! of value may be, `secrets.rs` reads the ones that stand elsewhere, `faults.rs` is what can be wrong. A new key stands
//! beside that in `etc/config.yaml` and in the README's table, and tests say what is missing there.

mod changes;
mod checks;
mod database;
mod dispatcher;
mod faults;
mod key;
pub mod live;
mod nats;
mod nats_urls;
mod reading;
mod secrets;
mod section;
mod service;
mod values;
mod yaml;

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

pub use changes::Changes;
pub use database::{Database, DsnParts, PreparedStatements};
pub use dispatcher::{Dispatcher, OnDead, Ordering};
pub use faults::ConfigError;
pub use key::{KeyFacts, Reload};
pub use nats::{JetStream, Nats, NatsAuth, NatsTls, Storage};
use reading::ConfigReading;
use secrets::Credentials;
pub use secrets::Secret;
pub use service::{HttpEndpoint, LogFormat, Logging, Partitions};

/// The configuration file that is read unless another is named.
pub const DEFAULT_PATH: &str = "/etc/pg-outbox/config.yaml";

/// Largest configuration file, in bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Spare time between the end of a claim's waits and the database ending its transaction.
const IDLE_IN_TRANSACTION_SPARE: Duration = Duration::from_secs(15);

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
    pub metrics: HttpEndpoint,
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
            dispatcher: Dispatcher::read_keys(&reading.section(&root, "dispatcher"), reading),
            ordering: Ordering::read_keys(&reading.section(&root, "ordering"), reading),
            database: Database::read(&reading.section(&root, "database"), reading),
            nats: Nats::read(&reading.section(&root, "nats"), reading),
            partitions: Partitions::read_keys(&reading.section(&root, "partitions"), reading),
            logging: Logging::read_keys(&reading.section(&root, "logging"), reading),
            metrics: HttpEndpoint::read_keys(&reading.section(&root, "metrics"), reading),
        };
        reading.check_keys(node);
        checks::check_together(reading, &config);
        config
    }

    /// Takes over from `new` what can change while running, and says what differs.
    pub fn take_live(&mut self, new: &Config) -> Changes {
        let mut changes = Changes::default();
        let Config { dispatcher, ordering, database, nats, partitions, logging, metrics } = self;
        dispatcher.take_keys(&new.dispatcher, &mut changes);
        ordering.take_keys(&new.ordering, &mut changes);
        database.take_live(&new.database, &mut changes);
        nats.take_live(&new.nats, &mut changes);
        partitions.take_keys(&new.partitions, &mut changes);
        logging.take_keys(&new.logging, &mut changes);
        metrics.take_keys(&new.metrics, &mut changes);
        changes
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

/// Every key there is, in the order in which they are read.
pub fn keys() -> Vec<KeyFacts> {
    let nothing = yaml::Node { id: 0, value: yaml::Value::Null };
    let mut reading = ConfigReading::new(&|_| None, Credentials::of("", |_| None));
    Config::read(&mut reading, &nothing);
    reading.keys().to_vec()
}

#[cfg(test)]
mod tests;
