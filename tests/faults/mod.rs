//! The faults that a year in production brings, each under load, each judged by everything that is left behind.
//!
//! Eight writers commit events of several hundred keys while a fault happens to an instance, to a server, to the
//! network or to the clock. Nobody helps. Within the fault's limit from its end on everything that was committed
//! before must be settled; then the writers stop, and the judge compares what they committed with what the stream
//! stored and what the table says. Every event must be there, in the order of its key; stored twice only where the
//! design admits it: later than the duplicate window, or by a stream that has lost what it had stored.
//!
//! Each fault is an ordinary test, quick by default. `tests/faults.sh` runs them all again and again with
//! `PG_OUTBOX_FAULTS=long`, where outages last a minute. What a fault draws (when, how often, how long) comes from one
//! seed, which is printed; `PG_OUTBOX_FAULTS_SEED` repeats it.
//!
//! Every fault is for both ways of sending (see [`Sending`]): event by event, and, with one hot key for all events, in
//! atomic batches. `PG_OUTBOX_FAULTS_SENDING=batches` chooses the second; some of them stand in [`in_batches`], so that
//! an ordinary run tries both.

mod clock;
mod disk;
mod instances;
mod nats;
mod network;
mod pooler;
mod postgres;

use std::ops::RangeInclusive;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pg_outbox::lab::sandbox::NatsServer;
use serde_json::{Value, json};

use super::harness::stream::{current_nats, shared_current_nats, shared_nats};
use super::harness::workload::{Lingering, writers_until};
use super::harness::{
    Config, Daemon, Evidence, Evident, History, Mode, Stored, TestDb, TestStream, Workload, check_all,
    start_nats, unique, wait_until,
};

/// `long` makes every fault last as long as the issue it stands for does.
const LENGTH_VARIABLE: &str = "PG_OUTBOX_FAULTS";
/// `batches` has events sent in atomic batches.
const SENDING_VARIABLE: &str = "PG_OUTBOX_FAULTS_SENDING";
/// The seed of a run, to repeat it.
const SEED_VARIABLE: &str = "PG_OUTBOX_FAULTS_SEED";
/// Time under load before the fault and after it.
const CALM: Duration = Duration::from_millis(500);
/// Longest time for a server to take connections after the last fault.
const SERVER_LIMIT: Duration = Duration::from_secs(120);
/// Times a fault's limit that a quick run waits.
const QUICK_PATIENCE: u32 = 4;
/// Lines of each instance's log that the evidence shows.
const EVIDENCE_LINES: usize = 60;
/// Duplicate window of a stream that says nothing else.
const WINDOW: Duration = Duration::from_secs(120);

macro_rules! faults {
    ($($name:ident, within $limit_s:literal s, $promise:literal: $happen:expr;)*) => {
        $(
            #[test]
            fn $name() {
                happen::$name(Sending::asked_for());
            }
        )*

        mod happen {
            use super::*;

            $(
                pub fn $name(sending: Sending) {
                    let limit = Duration::from_secs($limit_s);
                    $happen(&mut Run::new(stringify!($name), sending, $promise, limit));
                }
            )*
        }
    };
}

/// Faults that an ordinary run tries with batches, too.
macro_rules! in_batches {
    ($($name:ident)*) => {
        mod in_batches {
            use super::{Sending, happen};

            $(
                #[test]
                fn $name() {
                    happen::$name(Sending::Batches);
                }
            )*
        }
    };
}

faults! {
    killed_after_locking_lanes, within 20 s, "the lanes of a dead instance are free": |run: &mut Run| instances::killed_at(run, "claim.locked", 1..=15);
    killed_after_reading_events, within 20 s, "read is not published": |run: &mut Run| instances::killed_at(run, "claim.read", 1..=15);
    killed_while_publishing, within 20 s, "what was on its way goes again, in order": instances::killed_while_publishing;
    killed_after_acks, within 20 s, "what was acked and not settled is dropped by its id": instances::killed_after_acks;
    killed_before_settling, within 20 s, "a whole claim goes again": |run: &mut Run| instances::killed_at(run, "settle.begin", 1..=15);
    killed_before_committing, within 20 s, "what was written is rolled back, and goes again": |run: &mut Run| instances::killed_at(run, "settle.written", 1..=15);
    killed_after_committing, within 20 s, "what was committed stays": |run: &mut Run| instances::killed_at(run, "settle.committed", 1..=15);
    instances_come_and_go, within 20 s, "up to three of them share the work": instances::come_and_go;
    paused_within_the_duplicate_window, within 30 s, "what a paused instance left open goes once": instances::paused_within_the_window;
    paused_beyond_the_duplicate_window, within 30 s, "first arrivals keep their order": instances::paused_beyond_the_window;

    postgres_stops, within 30 s, "claims end with their connections": postgres::stops;
    postgres_stops_at_once, within 30 s, "a settle that the crash forgot goes again": postgres::stops_at_once;
    a_backend_crashes, within 30 s, "as if all of them did": postgres::a_backend_crashes;
    our_backends_are_terminated, within 20 s, "they are replaced": postgres::our_backends_are_terminated;
    postgres_is_out_of_connections, within 30 s, "it waits for one": postgres::is_out_of_connections;
    a_replica_takes_over, within 40 s, "a read-only server is passed over": postgres::a_replica_takes_over;
    statements_time_out, within 30 s, "an error ends a claim and nothing else": postgres::statements_time_out;
    locks_time_out, within 30 s, "what others set for locks ends no claim": postgres::locks_time_out;
    writers_stay_open, within 30 s, "an open transaction holds nobody up, and its events keep their order": postgres::writers_stay_open;
    transactions_are_prepared, within 30 s, "so does one that outlives the server": postgres::transactions_are_prepared;
    the_disk_is_full, within 30 s, "a settle that cannot be written goes again": disk::is_full;

    behind_a_transaction_pooler, within 60 s, "no claim needs a session": |run: &mut Run| pooler::everything(run, Mode::Transaction);
    behind_a_session_pooler, within 30 s, "a session ends with its connection": |run: &mut Run| pooler::everything(run, Mode::Session);

    nats_stops, within 60 s, "an outage is charged to no event": nats::stops;
    nats_is_killed, within 60 s, "an outage is charged to no event": nats::is_killed;
    nats_stalls, within 60 s, "a server that says nothing is left": nats::stalls;
    nats_starts_with_an_empty_store, within 60 s, "what had no ack is stored by the new stream": nats::starts_empty;
    the_stream_is_deleted, within 60 s, "events wait until it is there again": nats::the_stream_is_deleted;
    the_stream_is_full, within 60 s, "events wait until there is room": nats::the_stream_is_full;
    the_cluster_loses_its_leader, within 60 s, "a leader change reorders nothing": nats::the_leader_is_killed;
    the_cluster_loses_its_quorum, within 90 s, "no leader is an outage": nats::the_quorum_is_lost;

    the_network_to_postgres_is_slow, within 60 s, "slow is not lost": network::slow_to_postgres;
    the_network_to_postgres_is_cut, within 60 s, "what is committed or not is found out": network::postgres_cut;
    postgres_does_not_hear_us, within 60 s, "what is committed or not is found out": network::postgres_does_not_hear;
    we_do_not_hear_postgres, within 60 s, "what is committed or not is found out": network::we_do_not_hear_postgres;
    connections_to_postgres_break, within 30 s, "each ends its claim alone": network::postgres_breaks;
    the_network_to_nats_is_slow, within 60 s, "slow is not lost": network::slow_to_nats;
    the_network_to_nats_is_cut, within 60 s, "what had no ack goes again": network::nats_cut;
    nats_does_not_hear_us, within 60 s, "what had no ack goes again": network::nats_does_not_hear;
    we_do_not_hear_nats, within 60 s, "what had no ack goes again, and is dropped by its id": network::we_do_not_hear_nats;
    acks_come_too_late_for_the_duplicate_window, within 60 s, "first arrivals keep their order": network::acks_beyond_the_window;
    connections_to_nats_break, within 60 s, "what had no ack goes again": network::nats_breaks;

    the_clock_of_postgres_jumps, within 40 s, "a retry far off is due": clock::jumps;
    a_month_begins_without_its_partition, within 30 s, "the default partition takes it": clock::a_month_begins;
}

in_batches! {
    killed_while_publishing
    killed_after_acks
    killed_before_committing
    paused_within_the_duplicate_window
    postgres_stops_at_once
    nats_is_killed
    the_stream_is_full
    we_do_not_hear_nats
    acks_come_too_late_for_the_duplicate_window
}

/// How events go to the stream, and what it takes for that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sending {
    /// One event of a key at a time, of several hundred keys, to the nats-server that tests use.
    Singly,
    /// A single key, in atomic batches, to a current nats-server.
    Batches,
}

impl Sending {
    fn asked_for() -> Sending {
        match std::env::var(SENDING_VARIABLE).as_deref() {
            Err(_) | Ok("singly") => Sending::Singly,
            Ok("batches") => Sending::Batches,
            Ok(other) => panic!("{SENDING_VARIABLE}={other}: singly or batches"),
        }
    }

    /// What the writers do that is different.
    fn workload(self) -> Workload {
        match self {
            Sending::Singly => Workload::default(),
            // Large transactions, as the writers wait for each other for the key, and short runs do not go as batches.
            Sending::Batches => Workload { keys: 1, transaction_max: 50, ..Workload::default() },
        }
    }

    /// How many pauses a writer makes between its transactions. With large ones and a single one, writers are faster
    /// than a debug build that shares its machine with other runs, and what an outage leaves would never be done.
    fn pauses(self) -> u32 {
        match self {
            Sending::Singly => 1,
            Sending::Batches => 4,
        }
    }
}

/// One run of one fault.
pub struct Run {
    name: &'static str,
    /// How events go out.
    pub sending: Sending,
    promise: &'static str,
    /// From the end of the fault until everything committed before is settled, and from the end of each of several
    /// until events go out again. A quick run, which shares its machine with others, has [`QUICK_PATIENCE`] times as
    /// long.
    limit: Duration,
    /// The longest it took so far.
    slowest: Duration,
    seed: u64,
    long: bool,
    /// Draws when, how often and how long.
    pub rng: fastrand::Rng,
}

impl Run {
    fn new(name: &'static str, sending: Sending, promise: &'static str, limit: Duration) -> Run {
        let seed = match std::env::var(SEED_VARIABLE) {
            Ok(seed) => seed.parse().unwrap_or_else(|error| panic!("{SEED_VARIABLE}={seed}: {error}")),
            Err(_) => fastrand::u64(..),
        };
        let long = match std::env::var(LENGTH_VARIABLE).as_deref() {
            Err(_) | Ok("quick") => false,
            Ok("long") => true,
            Ok(other) => panic!("{LENGTH_VARIABLE}={other}: quick or long"),
        };
        println!("fault={name} seed={seed}: to repeat it, {SEED_VARIABLE}={seed}");
        let rng = fastrand::Rng::with_seed(seed);
        Run { name, sending, promise, limit, slowest: Duration::ZERO, seed, long, rng }
    }

    /// `quick` in a quick run, `long` in a long one.
    pub fn pick<T>(&self, quick: T, long: T) -> T {
        if self.long { long } else { quick }
    }

    /// The nats-server that all tests share.
    pub fn nats(&self) -> &'static NatsServer {
        match self.sending {
            Sending::Singly => shared_nats(),
            Sending::Batches => shared_current_nats(),
        }
    }

    /// A nats-server of one's own, to stop, pause or empty it.
    pub fn start_nats(&self) -> NatsServer {
        match self.sending {
            Sending::Singly => start_nats(""),
            Sending::Batches => current_nats(),
        }
    }

    /// A stream on the server that all tests share.
    pub fn stream(&self) -> TestStream {
        self.stream_on(self.nats())
    }

    /// The same, with settings of its own.
    pub fn stream_with(&self, settings: Value) -> TestStream {
        TestStream::on(&self.nats().url(), &self.settings(settings))
    }

    /// A stream on this server.
    pub fn stream_on(&self, nats: &NatsServer) -> TestStream {
        TestStream::on(&nats.url(), &self.settings(json!({})))
    }

    /// These settings, and what batches need of a stream.
    pub fn settings(&self, mut settings: Value) -> Value {
        if self.sending == Sending::Batches {
            settings["allow_atomic"] = json!(true);
        }
        settings
    }

    /// Waits for a time between these, in milliseconds.
    pub fn pause(&mut self, range_ms: RangeInclusive<u64>) {
        thread::sleep(Duration::from_millis(self.rng.u64(range_ms)));
    }

    /// Runs the writers on `stage`, lets the fault happen, waits until the service is back at work, and judges.
    pub fn under_load(&mut self, stage: &mut Stage, fault: impl FnOnce(&mut Run, &mut Stage)) {
        let workload = Workload {
            events: usize::MAX,
            pause: Duration::from_millis(self.pick(20, 40)) * self.sending.pauses(),
            seed: Some(self.seed),
            lingering: stage.lingering.clone(),
            ..self.sending.workload()
        };
        let (stop, dsn) = (AtomicBool::new(false), stage.db.dsn.clone());
        let history = thread::scope(|scope| {
            let writing = scope.spawn(|| writers_until(&dsn, &workload, &stop));
            // Also when the fault fails: the scope waits for the writers.
            let stopping = Stopping(&stop);
            wait_until("the service is at work", SERVER_LIMIT, &[stage], || stage.published() > 100.0);
            thread::sleep(CALM);
            fault(self, stage);
            self.recovered(stage.wait_recovered(self.patience()));
            thread::sleep(CALM);
            drop(stopping);
            writing.join().unwrap()
        });
        stage.wait_settled(self.patience());
        self.judge(stage, &history);
    }

    /// Waits, in the middle of a fault, until the instances publish again.
    pub fn wait_work(&mut self, stage: &Stage, what: &str) {
        let (begun, before) = (Instant::now(), stage.published());
        wait_until(what, self.patience(), &[stage], || stage.published() > before);
        self.recovered(begun.elapsed());
    }

    /// How long it is waited for what the limit is stated for.
    fn patience(&self) -> Duration {
        self.limit * self.pick(QUICK_PATIENCE, 1)
    }

    fn recovered(&mut self, after: Duration) {
        self.slowest = self.slowest.max(after);
    }

    fn judge(&self, stage: &mut Stage, history: &History) {
        let table = stage.db.table();
        stage.end_life();
        let redelivered = stage.redelivered();
        let verdict = check_all(
            history,
            Evident {
                lives: &stage.lives,
                window: stage.window,
                table: &table,
                cause: stage.cause,
                redelivered,
            },
        );
        let batched = stage.stored().filter(|message| message.header("Nats-Batch-Id").is_some()).count();
        // tests/faults.sh reads this line.
        println!(
            "verdict: fault={} sending={:?} limit={}s recovered={:.1}s committed={} batched={batched} redelivered={redelivered} admitted={} faults={} promise={}",
            self.name,
            self.sending,
            self.limit.as_secs(),
            self.slowest.as_secs_f64(),
            history.committed.len(),
            verdict.admitted_duplicates,
            verdict.counts().iter().map(|(_, count)| count).sum::<usize>(),
            self.promise,
        );
        stage.admitted = verdict.admitted_duplicates;
        assert!(
            verdict.is_clean(),
            "{} (seed {}) broke a promise: {}\n{}\n{}",
            self.name,
            self.seed,
            self.promise,
            verdict.describe(),
            stage.evidence()
        );
        let expected = self.sending == Sending::Batches;
        assert_eq!(batched > stage.stored().count() / 4, expected, "{batched} went in batches");
    }
}

/// Stops the writers when it goes.
struct Stopping<'a>(&'a AtomicBool);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What a fault happens to.
pub struct Stage {
    /// Where the writers write.
    pub db: TestDb,
    /// Where the events go.
    pub stream: TestStream,
    /// What instances are started with.
    pub config: Config,
    /// The instances that run.
    pub instances: Vec<Daemon>,
    /// The stream's duplicate window.
    pub window: Duration,
    /// What part of `last_error` shows that NATS had cause to refuse events; `None` if it never had.
    pub cause: Option<&'static str>,
    /// Transactions of the writers that stay open.
    pub lingering: Option<Lingering>,
    /// Duplicates that the judge admitted.
    pub admitted: usize,
    /// What the stream stored before it was emptied.
    lives: Vec<Vec<Stored>>,
}

impl Stage {
    /// Timeouts short enough for a fault of a few seconds to be one.
    pub fn new(db: TestDb, stream: TestStream) -> Stage {
        let config = Config::new(&db, &stream)
            .set("dispatcher.claim_budget", "1s")
            .set("dispatcher.poll_interval", "200ms")
            .set("database.connect_timeout", "2s")
            .set("nats.connect_timeout", "2s")
            .set("nats.ack_timeout", "2s")
            .set("nats.max_retries", 1000)
            .set("nats.retry_delay", "200ms");
        Stage {
            db,
            stream,
            config,
            instances: Vec::new(),
            window: WINDOW,
            cause: None,
            lingering: None,
            admitted: 0,
            lives: Vec::new(),
        }
    }

    /// Starts one more instance.
    pub fn start(&mut self) {
        self.instances.push(Daemon::start(&self.config_of(&unique("instance-"))));
    }

    /// Starts an instance that meets a failpoint; the caller keeps it.
    pub fn start_with_failpoint(&self, name: &str, failpoint: &str) -> Daemon {
        Daemon::spawn(&self.config_of(name).yaml(), |command: &mut Command| {
            command.env("PG_OUTBOX_FAILPOINT", failpoint);
        })
    }

    fn config_of(&self, name: &str) -> Config {
        self.config.clone().set("dispatcher.instance_id", name)
    }

    /// Ends the life of the stream: what it stored so far is kept for the judge, as it is about to be emptied.
    pub fn end_life(&mut self) {
        self.lives.push(self.stream.messages());
    }

    /// What the stream stored in all its lives.
    fn stored(&self) -> impl Iterator<Item = &Stored> {
        self.lives.iter().flatten()
    }

    /// How many events the running instances have published.
    pub fn published(&self) -> f64 {
        self.instances.iter().map(|instance| instance.metric("outbox_events_published_total")).sum()
    }

    /// Waits until all that is committed now is settled; returns how long that took.
    fn wait_recovered(&self, limit: Duration) -> Duration {
        let ended = Instant::now();
        wait_until("postgres takes connections", SERVER_LIMIT, &[self], || self.db.try_client().is_some());
        let last = self.db.number("SELECT coalesce(max(seq), 0) FROM outboxes");
        let open = format!(
            "SELECT count(*) FROM outboxes WHERE published_at IS NULL AND dead_at IS NULL AND seq <= {last}"
        );
        wait_until("what was committed before is settled", limit, &[self], || self.db.number(&open) == 0);
        ended.elapsed()
    }

    fn wait_settled(&self, limit: Duration) {
        wait_until("everything is settled", limit, &[self], || self.db.pending() == 0);
        for instance in &self.instances {
            wait_until("every instance is ready", limit, &[self], || instance.get("/ready").0 == 200);
        }
    }

    /// Acks with `duplicate: true`, by the metrics of the instances that run.
    fn redelivered(&self) -> u64 {
        let name = "outbox_attempts_total{outcome=\"duplicate\"}";
        let sum: f64 = self.instances.iter().map(|instance| instance.metric(name)).sum();
        // A counter: whole and small.
        sum as u64
    }
}

impl Evidence for Stage {
    fn evidence(&self) -> String {
        let mut parts = vec![self.db.evidence()];
        // Its server may be the one that does not answer.
        parts.push(
            catch_unwind(AssertUnwindSafe(|| self.stream.evidence()))
                .unwrap_or_else(|_| format!("--- stream {}: no answer", self.stream.name)),
        );
        for instance in &self.instances {
            let log = instance.log();
            let said: Vec<&str> = log.lines().filter(|line| !line.contains(" DEBUG ")).collect();
            let skip = said.len().saturating_sub(EVIDENCE_LINES);
            parts.push(format!("--- log of pid {} above debug\n{}", instance.pid(), said[skip..].join("\n")));
        }
        parts.join("\n")
    }
}
