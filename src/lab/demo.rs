//! `pg-outbox demo`: the whole way of an event on private servers, counted at both ends.
//!
//! Starts a PostgreSQL, a nats-server and this same program as the daemon, between them nothing that a real
//! installation would not have: the schema comes from `pg-outbox migrate`, the stream from `nats.jetstream.create`.
//! Writers ([`WRITERS`] threads, each feeding a `psql`) insert orders and their events in one transaction and roll
//! some of them back. This thread reads the stream and keeps the [`Account`]: it passes only if every event whose
//! COMMIT was answered arrived once, in the order of its customer, and nothing that was rolled back did. Ctrl-C ends
//! it at any time; the sandbox's guards see to it that servers and daemon end and their folders go, however this
//! process ends. It touches nothing outside its folders, and reads no configuration but its own.

mod account;
mod report;
mod traffic;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use self::account::{Account, STREAM};
use self::report::{PROGRESS_TERMINAL, Progress};
use self::traffic::{OrderWriter, WRITERS, WriteTotals};
use crate::command::signals::stop_flag;
use crate::config::NatsAuth;
use crate::lab::daemon::{Daemon, Program};
use crate::lab::numbers::thousands;
use crate::lab::sandbox::{NatsOptions, NatsServer, PostgresOptions, PostgresServer};
use crate::nats::reader::StreamReader;

/// Name of the database.
const DATABASE: &str = "demo";
/// Longest time without any new event before the demo gives up.
const STALL_LIMIT: Duration = Duration::from_secs(30);
/// How long the stream is watched for what should not come, once everything that should has come.
const QUIET: Duration = Duration::from_millis(500);

/// What the demo does.
#[derive(Debug, Clone, Copy)]
pub struct DemoOptions {
    /// Events to commit.
    pub events: u64,
    /// Leave servers and daemon running after the summary, until Ctrl-C.
    pub keep: bool,
}

/// Runs the demo and prints its summary. True if everything that was committed was delivered exactly once, in order,
/// and nothing that was rolled back was.
///
/// # Errors
/// A missing server (with the command that installs it), a server or the daemon that ends early, Ctrl-C.
pub fn run(options: DemoOptions) -> Result<bool> {
    // A second Ctrl-C ends this at once; the guards still clean up behind it.
    let stop = stop_flag()?;
    say("starting a private PostgreSQL and a private nats-server");
    let postgres = PostgresServer::start(&PostgresOptions::default())?;
    let nats = NatsServer::start(&NatsOptions::default())?;
    postgres.create_database(DATABASE)?;
    say("starting the daemon");
    let program = Program::new("demo", &config_yaml(&postgres, &nats))?;
    program.migrate()?;
    let mut daemon = program.run()?;
    sql(
        &postgres,
        "CREATE TABLE orders (id bigserial PRIMARY KEY, customer text NOT NULL, amount int NOT NULL)",
    )?;
    let mut account = Account::default();
    let writers = deliver(options.events, &stop, &postgres, &nats, &mut daemon, &mut account)?;
    let unpublished = sql(&postgres, "SELECT count(*) FROM outboxes WHERE published_at IS NULL")?;
    let report = account.judge(&writers);
    print!("\n{}", report.summary(&writers));
    let mut failures = report.failures();
    if unpublished.trim() != "0" {
        failures.push(format!("{} events are not marked as published", unpublished.trim()));
    }
    if !options.keep && !daemon.drain()? {
        failures.push("the daemon did not stop in order".into());
    }
    if failures.is_empty() {
        say("passed: every committed event was delivered once and in order, and nothing else was");
    } else {
        say(&format!("FAILED: {}\n{}", failures.join(", "), daemon.log_tail()));
    }
    if options.keep {
        keep(&stop, &postgres, &nats, &mut daemon)?;
    }
    Ok(failures.is_empty())
}

/// Writes and reads until everything has arrived, and a moment longer; returns what the writers did.
fn deliver(
    events: u64,
    stop: &Arc<AtomicBool>,
    postgres: &PostgresServer,
    nats: &NatsServer,
    daemon: &mut Daemon,
    account: &mut Account,
) -> Result<WriteTotals> {
    let mut reader = StreamReader::open(&nats.url(), &NatsAuth::None, STREAM)?;
    say(&format!("{WRITERS} writers commit {} events", thousands(events)));
    let committed = Arc::new(AtomicU64::new(0));
    let writers: Vec<JoinHandle<Result<WriteTotals>>> = (0..WRITERS)
        .map(|number| {
            let share = events / WRITERS as u64 + u64::from((number as u64) < events % WRITERS as u64);
            OrderWriter { number, events: share, committed: committed.clone(), stop: stop.clone() }
                .spawn(postgres.psql(DATABASE))
        })
        .collect::<Result<_>>()?;
    let mut progress = Progress::new(events);
    let mut news = Instant::now();
    // Until all have come, or nothing comes any more, or writers gave up.
    let gave_up =
        || writers.iter().all(JoinHandle::is_finished) && committed.load(Ordering::Relaxed) < events;
    while account.delivered < events && news.elapsed() < STALL_LIMIT && !gave_up() {
        if stop.load(Ordering::Relaxed) {
            progress.end(committed.load(Ordering::Relaxed), account.delivered);
            bail!("interrupted: servers, daemon and their data are removed");
        }
        daemon.must_run()?;
        if let Some(message) = reader.next(PROGRESS_TERMINAL)? {
            account.take(&message)?;
            news = Instant::now();
        }
        progress.show(committed.load(Ordering::Relaxed), account.delivered);
    }
    while let Some(message) = reader.next(QUIET)? {
        account.take(&message)?;
    }
    progress.end(committed.load(Ordering::Relaxed), account.delivered);
    let stalled = account.delivered < events && !writers.iter().all(JoinHandle::is_finished);
    ensure!(!stalled, "the writers stall: {}", postgres.log_tail());
    let mut written = WriteTotals::default();
    for writer in writers {
        // A panic there has printed its message already.
        written.add(writer.join().map_err(|_| anyhow::anyhow!("a writer panicked"))??);
    }
    Ok(written)
}

/// Says where everything is, and waits for Ctrl-C.
fn keep(stop: &AtomicBool, postgres: &PostgresServer, nats: &NatsServer, daemon: &mut Daemon) -> Result<()> {
    let dsn = postgres.dsn(DATABASE);
    println!(
        "\nstill running, until Ctrl-C:\n\
         \x20 postgres    psql '{dsn}'\n\
         \x20 nats        {}  (stream {STREAM}, subjects demo.>)\n\
         \x20 daemon      http://{}/  (/ready, /metrics)\n\
         \x20 its log     {}\n\
         an event of your own:\n\
         \x20 psql '{dsn}' -c \"INSERT INTO outboxes (topic, metadata, payload) \
         VALUES ('order.placed', '{{\\\"ordering-key\\\": \\\"you\\\"}}', '{{\\\"hello\\\": 1}}')\"",
        nats.url(),
        daemon.address,
        daemon.log_path().display(),
    );
    while !stop.load(Ordering::Relaxed) {
        daemon.must_run()?;
        sleep(PROGRESS_TERMINAL);
    }
    say("stopping");
    ensure!(daemon.drain()?, "the daemon did not stop in order:\n{}", daemon.log_tail());
    Ok(())
}

fn config_yaml(postgres: &PostgresServer, nats: &NatsServer) -> String {
    format!(
        r#"dispatcher: {{ instance_id: demo, workers: 4 }}
database: {{ dsn: "{}" }}
nats:
  url: "{}"
  jetstream: {{ stream_name: {STREAM}, create: true, subjects: ["demo.>"] }}
  topic_map: {{ ">": "demo.>" }}
logging: {{ level: info, format: text }}
metrics: {{ address: 127.0.0.1, port: 0 }}
"#,
        postgres.dsn(DATABASE),
        nats.url()
    )
}

/// One statement, and what it answers.
fn sql(postgres: &PostgresServer, statement: &str) -> Result<String> {
    let output = postgres.psql(DATABASE).args(["-At", "-c", statement]).output().context("run psql")?;
    ensure!(output.status.success(), "{statement}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn say(line: &str) {
    println!("demo: {line}");
}
