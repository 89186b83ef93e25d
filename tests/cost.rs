//! What an event costs the database, in numbers that do not depend on the machine: statements, round trips, WAL.
//! Should one of these fail after a change that is worth it, change the number; they are here so that nobody makes
//! it slower without noticing.

use std::thread;
use std::time::{Duration, Instant};

use pg_outbox::lab::sandbox::{PostgresOptions, PostgresServer};

use super::harness::{Config, Daemon, TestDb, stream, wait_until};

const LIMIT: Duration = Duration::from_secs(60);
const EVENTS: i64 = 20_000;
const BATCH: i64 = 500;

/// A server that counts statements, and does nothing of its own meanwhile.
fn counting_postgres() -> PostgresServer {
    let settings = [
        "shared_preload_libraries=pg_stat_statements",
        "pg_stat_statements.track_utility=on",
        "pg_stat_statements.track_planning=on",
        "autovacuum=off",
        "full_page_writes=off",
        "wal_writer_delay=10s",
    ];
    let settings = settings.map(str::to_owned).to_vec();
    PostgresServer::start(&PostgresOptions { fsync: false, settings, ..PostgresOptions::default() })
        .unwrap_or_else(|error| panic!("{error:#}"))
}

fn counted(postgres: &PostgresServer) -> TestDb {
    let db = TestDb::on(postgres);
    db.execute("CREATE EXTENSION pg_stat_statements");
    db
}

/// Statements that others than the test sent to this database since they were counted last.
fn statements(db: &TestDb) -> i64 {
    statements_called(db, 1)
}

/// The same of those statements alone that were each called so many times or more.
fn statements_called(db: &TestDb, times: i64) -> i64 {
    let sum = db.number(&format!(
        "SELECT coalesce(sum(calls), 0)::int8 FROM pg_stat_statements
          WHERE toplevel AND dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
            AND query !~ 'pg_stat_statements|count.*FROM outboxes WHERE published_at IS NU?L?L?'
            AND calls >= {times}",
    ));
    db.execute("SELECT pg_stat_statements_reset()");
    sum
}

#[test]
fn a_drain_costs_what_it_should() {
    let (postgres, stream) = (counting_postgres(), stream());
    let db = counted(&postgres);
    db.events("order.placed", EVENTS, 1_000);
    statements(&db);
    let wal = || db.number("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::int8");
    let (before, started) = (wal(), Instant::now());
    let daemon = Daemon::start(
        &Config::new(&db, &stream).set("dispatcher.batch_size", BATCH).set("dispatcher.workers", 1),
    );
    wait_until("nothing is pending", LIMIT, &[&daemon, &db], || {
        daemon.metric("outbox_events_published_total") == EVENTS as f64
    });
    let (wal, seconds) = (wal() - before, started.elapsed().as_secs().cast_signed());
    // BEGIN, settings, lock, read, settle, COMMIT. What else a daemon asks goes by the clock, not by the claim: at its
    // start, looks, gauges, samples. Each of these is called less often than there are claims, but they begin,
    // set and commit, too. One statement more a claim would be 40 more.
    let (claims, statements) = (EVENTS / BATCH, statements_called(&db, EVENTS / BATCH));
    println!("statements: {statements} for {claims} claims in {seconds} s; WAL: {} B an event", wal / EVENTS);
    assert!(
        statements < claims * 6 + 60 + seconds * 25,
        "{statements} statements for {claims} claims in {seconds} s"
    );
    assert!(wal / EVENTS < 450, "{} B of WAL an event", wal / EVENTS);
}

#[test]
fn who_is_woken_claims_without_a_look() {
    let (postgres, stream) = (counting_postgres(), stream());
    let db = counted(&postgres);
    db.events("order.placed", 1_000, 100);
    let daemon = Daemon::start(&Config::new(&db, &stream));
    wait_until("nothing is pending", LIMIT, &[&daemon, &db], || db.pending() == 0);
    thread::sleep(Duration::from_secs(3));
    let calls = |statement: &str| {
        db.number(&format!(
            "SELECT coalesce(sum(calls), 0)::int8 FROM pg_stat_statements
              WHERE query !~ 'pg_stat_statements' AND query ~ '{statement}'"
        ))
    };
    statements(&db);
    let events = 20;
    for n in 0..events {
        db.event("order.placed", &n.to_string(), "{}");
        wait_until("nothing is pending", LIMIT, &[&daemon, &db], || db.pending() == 0);
        thread::sleep(Duration::from_millis(50));
    }
    let (woken, looked) = (calls("LIMIT \\$3::int. AS found"), calls("unnest.*AS l.lane, turn"));
    println!("{events} events, {woken} searches without a look, {looked} claims after a look");
    assert!(woken >= events * 3 / 4, "{woken} of {events} events were found without a look");
    assert!(looked <= events / 4, "{looked} of {events} claims followed a look");
}

#[test]
fn the_first_event_finds_its_claim_planned() {
    let (postgres, stream) = (counting_postgres(), stream());
    let db = counted(&postgres);
    let daemon = Daemon::start(&Config::new(&db, &stream));
    daemon.wait_ready();
    thread::sleep(Duration::from_secs(3));
    statements(&db);
    db.event("order.placed", "k", "{}");
    wait_until("nothing is pending", LIMIT, &[&daemon, &db], || db.pending() == 0);
    let counted = db
        .client()
        .query_one(
            "SELECT sum(calls)::int8, sum(plans)::int8 FROM pg_stat_statements
              WHERE query ~ 'SKIP LOCKED|AS bound|UPDATE outboxes' AND query !~ 'pg_stat_statements'",
            &[],
        )
        .unwrap();
    let (calls, plans): (i64, i64) = (counted.get(0), counted.get(1));
    assert!(calls >= 3, "{calls}: it is locked, read and settled");
    assert_eq!(plans, 0, "plans were made while it waited");
}

#[test]
fn an_idle_daemon_leaves_the_database_alone() {
    let (postgres, stream) = (counting_postgres(), stream());
    let db = counted(&postgres);
    db.events("order.placed", 1_000, 100);
    let daemon = Daemon::start(&Config::new(&db, &stream));
    wait_until("nothing is pending", LIMIT, &[&daemon, &db], || db.pending() == 0);
    // What follows the last event: a sample, a look, the sleep lock, and a pass of the sweep.
    thread::sleep(Duration::from_secs(25));
    statements(&db);
    let seconds = 10;
    thread::sleep(Duration::from_secs(seconds));
    let statements = statements(&db);
    println!("{statements} statements in {seconds} s");
    assert!(statements < 5 * i64::try_from(seconds).unwrap(), "{statements} statements in {seconds} s");
}
