//! Where the bench works: private servers, or a schema and a stream of its own on the configured ones.
//!
//! Either way an outbox is a schema, made by our own migration and named so that no other has its name (another build of
//! this program gets a database, made by its own), and a run has a stream of its own, since a stream remembers the ids that it has seen. On the configured servers both are removed at
//! the end, also after an error or Ctrl-C; a real outbox is never read or written. (Notifications are the database's,
//! not the schema's: a daemon on the real outbox may look up from its sleep more often than usual.)

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::command::migrate;
use crate::config::{Config, DsnParts, NatsAuth, Secret};
use crate::lab::daemon::{Daemon, Program};
use crate::lab::sandbox::{NatsOptions, NatsServer, PostgresOptions, PostgresServer};
use crate::nats::streams::{Batches, Streams};
use crate::postgres::Plain;

/// Database of the private PostgreSQL.
const DATABASE: &str = "bench";
/// What a server for work is set to, and Debian's is not. Statements are counted in sessions that ask for it.
const SETTINGS: [&str; 4] =
    ["shared_buffers=1GB", "max_wal_size=4GB", "wal_compression=off", "checkpoint_timeout=15min"];
const COUNTING: [&str; 2] = ["shared_preload_libraries=pg_stat_statements", "pg_stat_statements.track=none"];

/// The servers of the bench.
pub(super) struct Testbed {
    /// Sets it apart from whatever else is on the servers: schemas, streams and subjects begin with it.
    name: String,
    dsn: String,
    config: Config,
    schemas: Vec<String>,
    stream: Option<String>,
    streams_made: usize,
    streams: Streams,
    servers: Option<(PostgresServer, NatsServer)>,
    counts_statements: bool,
}

/// An outbox of the bench.
#[derive(Clone)]
pub(super) struct Outbox {
    dsn: String,
    parts: DsnParts,
    /// Statements of sessions with this DSN are counted.
    counted_dsn: Option<String>,
    /// The program whose daemons serve it; `None`: this one.
    executable: Option<PathBuf>,
}

impl Outbox {
    /// Its connection string.
    pub(super) fn dsn(&self) -> Secret {
        Secret::new(self.dsn.clone())
    }

    /// What its connection string does not say.
    pub(super) fn parts(&self) -> DsnParts {
        self.parts.clone()
    }

    /// A session.
    pub(super) fn session(&self) -> Result<Plain> {
        Ok(Plain::connect(&self.dsn(), &self.parts, "bench")?)
    }
}

/// How a daemon of the bench is configured.
#[derive(Debug, Clone, Copy)]
pub(super) struct DaemonOptions {
    /// `dispatcher.workers`.
    pub(super) workers: usize,
    /// `dispatcher.batch_size`.
    pub(super) batch: usize,
    /// Which of several it is.
    pub(super) number: usize,
    /// Its statements are counted, where that is possible.
    pub(super) statements: Statements,
}

/// Whether statements are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Statements {
    /// They are.
    Counted,
    /// They are not, which is faster.
    Uncounted,
}

impl Testbed {
    /// Starts private servers.
    pub(super) fn sandbox() -> Result<Testbed> {
        let options = |counting: &[&str]| PostgresOptions {
            settings: SETTINGS.iter().chain(counting).map(|setting| (*setting).to_owned()).collect(),
            ..PostgresOptions::default()
        };
        // Without the library, which is not in every installation, the server does not start.
        let (postgres, counts) = match PostgresServer::start(&options(&COUNTING)) {
            Ok(postgres) => (postgres, true),
            Err(_) => (PostgresServer::start(&options(&[]))?, false),
        };
        let nats = NatsServer::start(&NatsOptions::default())?;
        postgres.create_database(DATABASE)?;
        let dsn = postgres.dsn(DATABASE);
        let text = format!("database: {{ dsn: \"{dsn}\" }}\nnats: {{ url: \"{}\" }}\n", nats.url());
        let config = Config::parse(&text, "bench", |_| None)?;
        let mut testbed = Testbed::over(config)?;
        testbed.counts_statements = counts;
        if counts {
            Plain::connect(&Secret::new(dsn), &DsnParts::default(), "bench")?
                .run("CREATE EXTENSION pg_stat_statements SCHEMA public")?;
        }
        testbed.servers = Some((postgres, nats));
        Ok(testbed)
    }

    /// Uses the servers of the configuration at `path`.
    pub(super) fn here(path: &Path) -> Result<Testbed> {
        let config = Config::load(path)?;
        let tls =
            config.nats.tls.is_given() || config.nats.servers.iter().any(|url| url.starts_with("tls://"));
        ensure!(!tls, "the bench speaks no TLS to NATS: give it a configuration with a plain nats.url");
        Testbed::over(config)
    }

    fn over(config: Config) -> Result<Testbed> {
        let server = config.nats.servers.first().context("the configuration has no nats.url")?;
        let streams = Streams::connect(server, &config.nats.auth)?;
        let dsn = config.database.listen_dsn.as_ref().unwrap_or(&config.database.dsn).expose().to_owned();
        Ok(Testbed {
            name: format!("outbox_bench_{:08x}", fastrand::u32(..)),
            dsn,
            config,
            schemas: Vec::new(),
            stream: None,
            streams_made: 0,
            streams,
            servers: None,
            counts_statements: false,
        })
    }

    /// Makes an outbox.
    pub(super) fn outbox(&mut self, label: &str) -> Result<Outbox> {
        let schema = format!("{}_{label}", self.name);
        let outbox = Outbox {
            dsn: with_options(&self.dsn, &format!("-csearch_path={schema}")),
            parts: self.config.database.parts.clone(),
            counted_dsn: self.counts_statements.then(|| {
                with_options(&self.dsn, &format!("-csearch_path={schema} -cpg_stat_statements.track=top"))
            }),
            executable: None,
        };
        self.session()?.run(&format!("CREATE SCHEMA {schema}"))?;
        self.schemas.push(schema);
        let mut database = self.config.database.clone();
        database.dsn = outbox.dsn();
        database.schema = None;
        migrate::run(&database, None, &mut std::io::sink())?;
        Ok(outbox)
    }

    /// Makes an outbox in a database of its own on the private server, for another build of this program: migrated by
    /// that program's own `migrate`, as its daemons will be of that program.
    pub(super) fn private_database(&mut self, label: &str, executable: &Path) -> Result<Outbox> {
        let (postgres, _) = self.servers.as_ref().context("only private servers have databases to make")?;
        let name = format!("{}_{label}", self.name);
        postgres.create_database(&name)?;
        let dsn = postgres.dsn(&name);
        let config =
            serde_json::json!({ "database": { "dsn": dsn }, "nats": { "url": self.config.nats.servers } });
        Program::of(executable, "bench", &config.to_string())?
            .migrate()
            .with_context(|| format!("by {}", executable.display()))?;
        let parts = DsnParts::default();
        Ok(Outbox { dsn, parts, counted_dsn: None, executable: Some(executable.to_owned()) })
    }

    /// A session outside all outboxes.
    pub(super) fn session(&self) -> Result<Plain> {
        Ok(Plain::connect(&Secret::new(self.dsn.clone()), &self.config.database.parts, "bench")?)
    }

    /// Makes a new stream in the place of the last one.
    pub(super) fn fresh_stream(&mut self, batches: Batches) -> Result<()> {
        self.remove_stream()?;
        self.streams_made += 1;
        let stream = format!("{}_{}", self.name, self.streams_made);
        self.streams.create(&stream, &self.name, batches)?;
        self.stream = Some(stream);
        Ok(())
    }

    fn remove_stream(&mut self) -> Result<()> {
        self.stream.take().map_or(Ok(()), |stream| self.streams.delete(&stream))
    }

    /// The name of the present stream.
    pub(super) fn stream(&self) -> Result<&str> {
        self.stream.as_deref().context("there is no stream yet")
    }

    /// What every subject of the stream begins with.
    pub(super) fn prefix(&self) -> &str {
        &self.name
    }

    /// The streams' server.
    pub(super) fn streams(&self) -> &Streams {
        &self.streams
    }

    /// Where NATS is, and how to log in.
    pub(super) fn nats(&self) -> (&str, &NatsAuth) {
        (self.config.nats.servers.first().map_or("", String::as_str), &self.config.nats.auth)
    }

    /// Process ids of the private postmaster and nats-server.
    pub(super) fn pids(&self) -> Option<(u32, u32)> {
        let (postgres, nats) = self.servers.as_ref()?;
        Some((postgres.pid()?, nats.pid()?))
    }

    /// Whether statements can be counted.
    pub(super) fn counts_statements(&self) -> bool {
        self.counts_statements
    }

    /// Starts a daemon from `outbox` to the present stream.
    pub(super) fn start_daemon(&self, outbox: &Outbox, options: DaemonOptions) -> Result<Daemon> {
        let yaml = self.yaml(outbox, options)?.to_string();
        match &outbox.executable {
            Some(executable) => Program::of(executable, "bench", &yaml)?.run(),
            None => Program::new("bench", &yaml)?.run(),
        }
    }

    /// The configuration of a daemon. JSON is YAML.
    fn yaml(&self, outbox: &Outbox, options: DaemonOptions) -> Result<serde_json::Value> {
        let DaemonOptions { workers, batch, number, statements } = options;
        let counted = outbox.counted_dsn.as_ref().filter(|_| statements == Statements::Counted);
        let mut nats = serde_json::json!({
            "url": self.config.nats.servers,
            "jetstream": { "stream_name": self.stream()? },
            "topic_map": { ">": format!("{}.>", self.name) },
        });
        match &self.config.nats.auth {
            NatsAuth::None => {}
            NatsAuth::UserPassword(user, password) => {
                nats["user"] = user.as_str().into();
                nats["password"] = password.expose().into();
            }
            NatsAuth::Token(token) => nats["token"] = token.expose().into(),
            NatsAuth::NkeyFile(path) => nats["nkey_file"] = path.to_string_lossy().into(),
            NatsAuth::CredentialsFile(path) => nats["credentials_file"] = path.to_string_lossy().into(),
        }
        Ok(serde_json::json!({
            "dispatcher": { "instance_id": format!("bench-{number}"), "workers": workers, "batch_size": batch },
            "database": { "dsn": counted.unwrap_or(&outbox.dsn), "max_connections": workers + 5 },
            "nats": nats,
            // What stands in old partitions is to stay there.
            "partitions": { "retention": "off" },
            "metrics": { "address": "127.0.0.1", "port": 0 },
        }))
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        if self.servers.is_some() {
            return;
        }
        let removed = self.remove_stream().and_then(|()| {
            let mut session = self.session()?;
            for schema in &self.schemas {
                session.run(&format!("SET client_min_messages = warning; DROP SCHEMA {schema} CASCADE"))?;
            }
            Ok(())
        });
        if let Err(error) = removed {
            eprintln!("bench: something of {}* is left on the servers: {error:#}", self.name);
        }
    }
}

/// The DSN with `options` for the server, which win over others of the same name.
fn with_options(dsn: &str, options: &str) -> String {
    if !dsn.contains("://") {
        return format!("{dsn} options='{options}'");
    }
    let separator = if dsn.contains('?') { '&' } else { '?' };
    format!("{dsn}{separator}options={}", options.replace(' ', "%20").replace('=', "%3D"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_added_to_every_form_of_a_dsn() {
        for (dsn, with) in [
            ("postgresql://u@h/d", "postgresql://u@h/d?options=-ca%3Db%20-cc%3Dd"),
            ("postgresql://u@h/d?x=y", "postgresql://u@h/d?x=y&options=-ca%3Db%20-cc%3Dd"),
            ("host=h user=u", "host=h user=u options='-ca=b -cc=d'"),
        ] {
            assert_eq!(with_options(dsn, "-ca=b -cc=d"), with);
        }
    }
}
