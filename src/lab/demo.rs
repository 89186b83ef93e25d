//! `pg-outbox demo`: the whole way of an event on private servers, counted at both ends.
//!
//! Starts a PostgreSQL, a nats-server and this same program as the daemon, between them nothing that a real
//! installation would not have: the schema comes from `pg-outbox migrate`, the stream from `nats.jetstream.create`.
//! Writers ([`WRITERS`] threads, each feeding a `psql`) insert orders and their events in one transaction and roll
//! some of them back. This thread reads the stream and keeps the [`Account`]: it passes only if every event whose
//! COMMIT was answered arrived once, in the order of its customer, and nothing that was rolled back did. Ctrl-C ends
//! it at any time; the sandbox's guards see to it that servers and daemon end and their folders go, however this
//! process ends. It touches nothing outside its folders, and reads no configuration but its own.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, IsTerminal, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::command::signals::stop_flag;
use crate::config::NatsAuth;
use crate::lab::daemon::{Daemon, Program};
use crate::lab::numbers::{percentile, thousands};
use crate::lab::sandbox::{NatsOptions, NatsServer, PostgresOptions, PostgresServer};
use crate::nats::reader::{Stored, StreamReader};

/// Connections that insert at the same time.
const WRITERS: usize = 4;
/// Customers of one writer. A customer's orders are one writer's, so that they have one order in time.
const CUSTOMERS: usize = 25;
/// Events of one order at most.
const MAX_EVENTS: u64 = 3;
/// What happens to an order, in this order: an event each.
const TOPICS: [&str; MAX_EVENTS as usize] = ["order.placed", "order.paid", "order.shipped"];
/// Of a hundred transactions, how many are rolled back.
const ROLLBACK_PERCENT: u8 = 5;
/// Name of the database, and of the stream.
const DATABASE: &str = "demo";
const STREAM: &str = "DEMO";
/// Longest time without any new event before the demo gives up.
const STALL_LIMIT: Duration = Duration::from_secs(30);
/// How long the stream is watched for what should not come, once everything that should has come.
const QUIET: Duration = Duration::from_millis(500);
/// Time between two progress reports on a terminal, and elsewhere.
const PROGRESS_TERMINAL: Duration = Duration::from_millis(200);
const PROGRESS_LINES: Duration = Duration::from_secs(1);
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

/// One writer: a thread that feeds a `psql`, and one that reads what it answers.
struct OrderWriter {
    number: usize,
    /// Events to commit.
    events: u64,
    /// Events whose COMMIT was answered, by all writers.
    committed: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

/// What writers did.
#[derive(Debug, Default)]
struct WriteTotals {
    /// By customer: how many events were committed, numbered from 1.
    events: Vec<(String, u64)>,
    transactions: u64,
    /// Events that were inserted and rolled back.
    rolled_back: u64,
}

impl WriteTotals {
    fn add(&mut self, other: WriteTotals) {
        self.events.extend(other.events);
        self.transactions += other.transactions;
        self.rolled_back += other.rolled_back;
    }

    fn committed(&self) -> u64 {
        self.events.iter().map(|(_, count)| count).sum()
    }
}

impl OrderWriter {
    fn spawn(self, mut psql: Command) -> Result<JoinHandle<Result<WriteTotals>>> {
        psql.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let mut psql = psql.spawn().context("run psql")?;
        let answers = psql.stdout.take().context("psql has no stdout")?;
        let committed = self.committed.clone();
        // Ends with psql, which closes its stdout.
        let counter = thread(&format!("demo-answers-{}", self.number), move || count(answers, &committed))?;
        thread(&format!("demo-writer-{}", self.number), move || self.run(psql, counter))
    }

    /// Feeds psql to the end, waits for it, and compares what it answered with what was asked.
    fn run(self, mut psql: Child, counter: JoinHandle<Result<u64>>) -> Result<WriteTotals> {
        let mut stdin = psql.stdin.take().context("psql has no stdin")?;
        // An error here is psql's end; why, it says itself.
        let written = self.feed(&mut stdin);
        drop(stdin);
        let output = psql.wait_with_output().context("wait for psql")?;
        ensure!(
            output.status.success(),
            "writer {}: {}",
            self.number,
            String::from_utf8_lossy(&output.stderr)
        );
        let written = written.context("write to psql")?;
        let answered = counter.join().map_err(|_| anyhow::anyhow!("a reader of psql panicked"))??;
        ensure!(
            answered == written.committed(),
            "psql answered {answered} of {} commits",
            written.committed()
        );
        Ok(written)
    }

    fn feed(&self, psql: &mut impl Write) -> std::io::Result<WriteTotals> {
        let mut written = WriteTotals {
            events: (0..CUSTOMERS).map(|n| (format!("customer-{}", n * WRITERS + self.number), 0)).collect(),
            ..WriteTotals::default()
        };
        let mut left = self.events;
        while left > 0 && !self.stop.load(Ordering::Relaxed) {
            let count = fastrand::u64(1..=MAX_EVENTS).min(left);
            let (customer, last) = &mut written.events[fastrand::usize(0..CUSTOMERS)];
            let rollback = fastrand::u8(0..100) < ROLLBACK_PERCENT;
            psql.write_all(transaction(customer, *last, count, rollback).as_bytes())?;
            if rollback {
                written.rolled_back += count;
            } else {
                *last += count;
                left -= count;
                written.transactions += 1;
            }
        }
        Ok(written)
    }
}

/// An order and its events in one transaction. psql echoes the number of events once COMMIT was answered.
fn transaction(customer: &str, last: u64, count: u64, rollback: bool) -> String {
    let amount = fastrand::u32(1..1_000);
    let mut script =
        format!("BEGIN;\nINSERT INTO orders (customer, amount) VALUES ('{customer}', {amount});\n");
    for (n, topic) in (last + 1..=last + count).zip(TOPICS) {
        // Infallible: it writes to a String.
        let _ = writeln!(
            script,
            "INSERT INTO outboxes (topic, metadata, payload) VALUES ('{topic}', '{{\"ordering-key\": \"{customer}\"}}', \
             jsonb_build_object('customer', '{customer}', 'n', {n}, 'amount', {amount}, 'rolled_back', {rollback}, \
             'at_us', (extract(epoch FROM clock_timestamp()) * 1000000)::bigint));"
        );
    }
    script += if rollback { "ROLLBACK;\n" } else { "COMMIT;\n" };
    if !rollback {
        let _ = writeln!(script, "\\echo {count}");
    }
    script
}

/// Adds up the numbers that psql echoes, here and for everybody.
fn count(answers: impl Read, committed: &AtomicU64) -> Result<u64> {
    let mut total = 0;
    for line in BufReader::new(answers).lines() {
        let line = line.context("read from psql")?;
        let events: u64 = line.parse().with_context(|| format!("psql answered {line:?}"))?;
        committed.fetch_add(events, Ordering::Relaxed);
        total += events;
    }
    Ok(total)
}

fn thread<T: Send + 'static>(
    name: &str,
    run: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<JoinHandle<Result<T>>> {
    std::thread::Builder::new().name(name.into()).spawn(run).with_context(|| format!("start thread {name}"))
}

/// What an event of the demo says about itself.
#[derive(Debug, Deserialize)]
struct Payload {
    customer: String,
    /// Its number among the customer's committed events, from 1.
    n: u64,
    rolled_back: bool,
    /// When it was inserted, by the database's clock, in microseconds since 1970.
    at_us: i64,
}

/// What has arrived.
#[derive(Debug, Default)]
struct Account {
    /// Different events that were to arrive, as far as they say so themselves.
    delivered: u64,
    duplicates: u64,
    out_of_order: u64,
    rolled_back: u64,
    /// Customer and number of each.
    seen: HashSet<(String, u64)>,
    /// By customer: the highest number so far.
    highest: HashMap<String, u64>,
    latencies_us: Vec<i64>,
    first_insert_us: Option<i64>,
    last_stored_us: i64,
}

impl Account {
    fn take(&mut self, message: &Stored) -> Result<()> {
        let payload = serde_json::from_slice(&message.payload)
            .with_context(|| format!("stream {STREAM}, message {}: not an event of the demo", message.seq))?;
        self.arrived(payload, message.stored_at_ns / 1_000);
        Ok(())
    }

    fn arrived(&mut self, event: Payload, stored_us: i64) {
        if event.rolled_back {
            self.rolled_back += 1;
            return;
        }
        if !self.seen.insert((event.customer.clone(), event.n)) {
            self.duplicates += 1;
            return;
        }
        self.delivered += 1;
        self.latencies_us.push(stored_us - event.at_us);
        self.first_insert_us = Some(self.first_insert_us.map_or(event.at_us, |first| first.min(event.at_us)));
        self.last_stored_us = self.last_stored_us.max(stored_us);
        let highest = self.highest.entry(event.customer).or_insert(0);
        if event.n < *highest {
            self.out_of_order += 1;
        }
        *highest = event.n.max(*highest);
    }

    /// Compares with what the writers committed.
    fn judge(mut self, written: &WriteTotals) -> DeliveryReport {
        let expected: u64 = written.committed();
        let found = written
            .events
            .iter()
            .map(|(customer, count)| {
                (1..=*count).filter(|n| self.seen.contains(&(customer.clone(), *n))).count() as u64
            })
            .sum::<u64>();
        self.latencies_us.sort_unstable();
        let flow_us = self.last_stored_us - self.first_insert_us.unwrap_or(self.last_stored_us);
        DeliveryReport {
            delivered: self.delivered,
            lost: expected - found,
            duplicates: self.duplicates,
            out_of_order: self.out_of_order,
            // What was never written at all counts with what was rolled back.
            uncommitted: self.rolled_back + (self.delivered - found),
            per_second: if flow_us > 0 { self.delivered as f64 * 1e6 / flow_us as f64 } else { 0.0 },
            p50_us: percentile(&self.latencies_us, 50).unwrap_or(0),
            p99_us: percentile(&self.latencies_us, 99).unwrap_or(0),
        }
    }
}

/// What became of the events, which the summary shows.
#[derive(Debug, PartialEq)]
struct DeliveryReport {
    delivered: u64,
    lost: u64,
    duplicates: u64,
    out_of_order: u64,
    uncommitted: u64,
    per_second: f64,
    p50_us: i64,
    p99_us: i64,
}

impl DeliveryReport {
    fn failures(&self) -> Vec<String> {
        let faults = [
            (self.lost, "lost"),
            (self.duplicates, "delivered again"),
            (self.out_of_order, "out of order"),
            (self.uncommitted, "delivered and never committed"),
        ];
        let found = faults.iter().filter(|(count, _)| *count > 0);
        found.map(|(count, fault)| format!("{} {fault}", thousands(*count))).collect()
    }

    fn summary(&self, written: &WriteTotals) -> String {
        let milliseconds = |us: i64| format!("{:.1} ms", us as f64 / 1e3);
        let rows = [
            ("committed", thousands(written.committed())),
            ("in transactions", thousands(written.transactions)),
            ("rolled back", thousands(written.rolled_back)),
            ("delivered", thousands(self.delivered)),
            ("lost", thousands(self.lost)),
            ("duplicates", thousands(self.duplicates)),
            ("out of order per key", thousands(self.out_of_order)),
            ("rolled back, delivered", thousands(self.uncommitted)),
            ("events/s", thousands(self.per_second as u64)),
            ("latency p50", milliseconds(self.p50_us)),
            ("latency p99", milliseconds(self.p99_us)),
        ];
        let mut text = String::new();
        for (name, value) in rows {
            // Infallible: it writes to a String.
            let _ = writeln!(text, "  {name:<24}{value:>12}");
        }
        text += "  (latency: from the INSERT to the stream, with the writers at full speed)\n\n";
        text
    }
}

/// A line that is updated in place on a terminal; elsewhere a new one each second.
struct Progress {
    events: u64,
    on_terminal: bool,
    began: Instant,
    shown: Instant,
}

impl Progress {
    fn new(events: u64) -> Progress {
        let now = Instant::now();
        Progress { events, on_terminal: std::io::stdout().is_terminal(), began: now, shown: now }
    }

    fn show(&mut self, committed: u64, delivered: u64) {
        let every = if self.on_terminal { PROGRESS_TERMINAL } else { PROGRESS_LINES };
        if self.shown.elapsed() >= every {
            self.print(committed, delivered);
        }
    }

    fn end(&mut self, committed: u64, delivered: u64) {
        self.print(committed, delivered);
        if self.on_terminal {
            println!();
        }
    }

    fn print(&mut self, committed: u64, delivered: u64) {
        self.shown = Instant::now();
        let [committed, delivered, events] = [committed, delivered, self.events].map(thousands);
        let line = format!(
            "{:>5.1} s  committed {committed}  delivered {delivered} of {events}",
            self.began.elapsed().as_secs_f64()
        );
        if self.on_terminal {
            print!("\r\x1b[K{line}");
            // A terminal that is gone is no reason to end.
            let _ = std::io::stdout().flush();
        } else {
            println!("{line}");
        }
    }
}

fn say(line: &str) {
    println!("demo: {line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written() -> WriteTotals {
        WriteTotals { events: vec![("a".into(), 3), ("b".into(), 1)], transactions: 3, rolled_back: 1 }
    }

    /// Judges events given as customer, number and rolled back, inserted at 1 s and stored at 2 s.
    fn judge(events: &[(&str, u64, bool)]) -> [u64; 5] {
        let mut account = Account::default();
        for &(customer, n, rolled_back) in events {
            let payload = Payload { customer: customer.into(), n, rolled_back, at_us: 1_000_000 };
            account.arrived(payload, 2_000_000);
        }
        let report = account.judge(&written());
        let faults = [report.lost, report.duplicates, report.out_of_order, report.uncommitted];
        assert_eq!(report.failures().len(), faults.iter().filter(|count| **count > 0).count());
        [report.delivered, faults[0], faults[1], faults[2], faults[3]]
    }

    #[test]
    fn each_planted_fault_is_counted_as_what_it_is() {
        let (a1, a2, a3, b1) = (("a", 1, false), ("a", 2, false), ("a", 3, false), ("b", 1, false));
        assert_eq!(judge(&[a1, a2, b1, a3]), [4, 0, 0, 0, 0]);
        assert_eq!(judge(&[b1, a1, a2, a3]), [4, 0, 0, 0, 0], "customers have no order among each other");
        assert_eq!(judge(&[a1, a2, a3]), [3, 1, 0, 0, 0], "lost");
        assert_eq!(judge(&[a1, a2, b1, a3, a1]), [4, 0, 1, 0, 0], "duplicated");
        assert_eq!(judge(&[a2, a1, b1, a3]), [4, 0, 0, 1, 0], "out of order");
        assert_eq!(judge(&[a1, a2, b1, a3, ("a", 3, true)]), [4, 0, 0, 0, 1], "rolled back");
        assert_eq!(judge(&[a1, a2, b1, a3, ("a", 4, false)]), [5, 0, 0, 0, 1], "never written");
        assert_eq!(
            judge(&[a1, a2, a3, ("c", 1, false)]),
            [4, 1, 0, 0, 1],
            "a stranger does not stand in for b"
        );
    }

    #[test]
    fn the_rate_is_from_the_first_insert_to_the_last_arrival() {
        let mut account = Account::default();
        for (n, at_us, stored_us) in [(1, 1_000_000, 1_500_000), (2, 2_000_000, 3_000_000)] {
            account.arrived(Payload { customer: "a".into(), n, rolled_back: false, at_us }, stored_us);
        }
        let report = account.judge(&WriteTotals { events: vec![("a".into(), 2)], ..WriteTotals::default() });
        assert_eq!((report.per_second, report.p50_us, report.p99_us), (1.0, 500_000, 1_000_000));
    }

    #[test]
    fn a_rolled_back_transaction_is_never_echoed_as_committed() {
        assert!(transaction("c", 0, 2, false).ends_with("COMMIT;\n\\echo 2\n"));
        assert!(transaction("c", 0, 2, true).ends_with("ROLLBACK;\n"));
    }
}
