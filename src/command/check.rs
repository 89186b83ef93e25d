//! `pg-outbox check`: reads the configuration, looks at both servers, and says line by line what is ready.
//!
//! Runs on the main thread. Changes nothing: it neither adds the schema nor creates the stream. Every line says
//! ok, or what is wrong and what to do; `warn` is for what works and promises less than it could (`preflight.rs`),
//! and changes no exit code. One attempt at each server, without the patience of the daemon.

use std::path::Path;

use anyhow::Result;

use super::connect;
use super::terminal::harmless;
use crate::config::{Config, JetStream, Storage};
use crate::nats::answer::{Keeping, StreamFacts, StreamFault};
use crate::nats::preflight::{self, Finding, Needs};
use crate::postgres::{ClaimSettings, Sessions, Store};

/// `insufficient_privilege`.
const NO_PRIVILEGE: &str = "42501";

/// Checks everything and prints one line each. True when all is ready.
///
/// # Errors
/// A configuration that cannot be read ([`crate::config::ConfigError`]).
pub fn run(path: &Path) -> Result<bool> {
    let config = Config::load(path)?;
    let mut report = CheckReport { ok: true };
    report.line("config", Ok(path.display().to_string()));
    check_database(&config, &mut report);
    check_nats(&config, &mut report);
    Ok(report.ok)
}

struct CheckReport {
    ok: bool,
}

impl CheckReport {
    fn line(&mut self, what: &str, result: Result<String, String>) {
        let what = harmless(what);
        match result {
            Ok(detail) => println!("ok    {what}: {}", harmless(&detail)),
            Err(problem) => {
                self.ok = false;
                println!("FAIL  {what}: {}", harmless(&problem));
            }
        }
    }

    /// Works, but somebody should know.
    fn warning(&self, text: &str) {
        println!("warn  {}", harmless(text));
    }
}

fn check_database(config: &Config, report: &mut CheckReport) {
    let store = match Store::new(&config.database, &config.dispatcher.instance_id, ClaimSettings::default()) {
        Ok(store) => store,
        Err(error) => return report.line("postgres", Err(format!("{error:#}"))),
    };
    match store.server_version() {
        Ok(version) => match store.probe_sessions() {
            Ok(Sessions::Own) => report.line("postgres", Ok(format!("connected, server {version}"))),
            Ok(Sessions::Shared) => {
                let so = store.in_shared_sessions();
                let through = format!("through a transaction pooler: {so}");
                report.line("postgres", Ok(format!("connected, server {version}, {through}")));
            }
            Err(error) => return report.line("postgres", Err(error.to_string())),
        },
        Err(error) => {
            let to_do = "is it running, and database.dsn (or DATABASE_DSN) right?";
            return report.line("postgres", Err(format!("{error}; {to_do}")));
        }
    }
    let schema = store.schema_problems();
    let complete = schema.as_ref().is_ok_and(Vec::is_empty);
    match schema {
        Ok(problems) if problems.is_empty() => report.line("schema", Ok("complete".into())),
        Ok(problems) => {
            for problem in problems {
                report.line("schema", Err(problem));
            }
        }
        Err(error) => {
            let to_do = match error.sqlstate() {
                Some(NO_PRIVILEGE) => {
                    "; as the schema's owner, run schema/roles.sql, of which this role is to be a member"
                }
                _ => "",
            };
            report.line("schema", Err(format!("{error}{to_do}")));
        }
    }
    for hidden in if complete { store.hidden().unwrap_or_default() } else { Vec::new() } {
        report.warning(&hidden);
    }
    // The wake-up needs the table: without it there is nothing to say.
    if config.database.listen && complete {
        match store.wake_up(config.database.listen_dsn.as_ref()) {
            Ok(_) => report.line("wake-up", Ok("LISTEN works".into())),
            Err(error) => {
                report.line("wake-up", Err(format!("{error}; set database.listen: false to poll instead")));
            }
        }
    }
}

fn check_nats(config: &Config, report: &mut CheckReport) {
    let instance = &config.dispatcher.instance_id;
    let (_, keeper) = connect::publisher(&config.nats, instance);
    let survey = match keeper.survey() {
        Ok(survey) => survey,
        Err(error) => {
            let to_do = "is it running, and nats.url (or NATS_URL) and the login right?";
            return report.line("nats", Err(format!("{error:#}; {to_do}")));
        }
    };
    report.line("nats", Ok(format!("connected to {}", survey.server)));
    let jetstream = &config.nats.jetstream;
    let stream = &jetstream.stream_name;
    let facts = match survey.stream {
        _ if !jetstream.enabled => return report.line("stream", Ok("not used: core NATS".into())),
        Ok(facts) => {
            report.line("stream", Ok(format!("{stream} takes {}", facts.subjects.join(", "))));
            facts
        }
        Err(StreamFault::Missing { .. }) if jetstream.create => {
            let subjects = jetstream.subjects.join(", ");
            report.line("stream", Ok(format!("{stream} is missing; run will create it and take {subjects}")));
            to_be_created(jetstream)
        }
        Err(fault) => return report.line("stream", Err(fault.to_string())),
    };
    for target in config.nats.topic_map.targets() {
        report.line("topic map", check_target(target, stream, &facts));
    }
    let needs = Needs {
        stream,
        topic_map: &config.nats.topic_map,
        sent_again_within: config.sent_again_within(),
        max_payload: survey.max_payload,
    };
    for finding in preflight::findings(&facts, needs) {
        match finding {
            Finding::Warning(text) => report.warning(&text),
            // Has its own line above.
            Finding::Problem(_) => {}
        }
    }
}

/// The facts of the stream that `run` will create.
fn to_be_created(jetstream: &JetStream) -> StreamFacts {
    let storage = match jetstream.storage {
        Storage::File => "file",
        Storage::Memory => "memory",
    };
    StreamFacts {
        subjects: jetstream.subjects.clone(),
        keeping: Keeping {
            storage: storage.into(),
            replicas: jetstream.replicas,
            duplicate_window_ns: u64::try_from(jetstream.duplicate_window.as_nanos()).unwrap_or(u64::MAX),
            ..Keeping::default()
        },
        ..StreamFacts::default()
    }
}

fn check_target(target: &str, stream: &str, facts: &StreamFacts) -> Result<String, String> {
    match preflight::outside(target, facts, stream) {
        None => Ok(format!("{target} is in stream {stream}")),
        Some(problem) => Err(problem),
    }
}
