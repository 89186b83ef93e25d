//! What events may rely on whose transactions stay open: they are published soon after they commit, in order per key, and
//! while they are open nobody else waits, whatever way the number was drawn and the row was written.

use std::time::{Duration, Instant};

use pg_outbox::lab::sandbox::{PostgresOptions, PostgresServer, Stop};

use crate::delivery::wait_drained;
use crate::harness::database::start_postgres_with;
use crate::harness::{Config, Daemon, TestDb, TestStream, database, stream, wait_until};

const LIMIT: Duration = Duration::from_secs(60);
/// An event is in the stream so soon after its transaction has committed, on a machine that has much else to do.
const SOON: Duration = Duration::from_secs(10);

/// The numbers `n` in the payloads of one key's messages, in the order of the stream.
fn of_key(stream: &TestStream, key: &str) -> Vec<i64> {
    let is_of = |message: &crate::harness::Stored| message.header("ordering-key") == Some(key);
    stream
        .messages()
        .iter()
        .filter(|message| is_of(message))
        .map(|message| message.json()["n"].as_i64().unwrap())
        .collect()
}

fn insert(key: &str, n: i64) -> String {
    format!(
        "INSERT INTO outboxes (topic, metadata, payload)
         VALUES ('order.placed', '{{\"ordering-key\": \"{key}\"}}', '{{\"n\": {n}}}');"
    )
}

fn wait_for(stream: &TestStream, db: &TestDb, daemon: &Daemon, key: &str, expected: &[i64]) {
    wait_until(&format!("{key} is {expected:?}"), SOON, &[daemon, db, stream], || {
        of_key(stream, key) == expected
    });
}

#[test]
fn a_transaction_that_stays_open_holds_nobody_up_and_its_events_come_when_it_ends() {
    let (db, stream) = (database(), stream());
    let daemon = Daemon::start(&Config::new(&db, &stream));
    daemon.wait_ready();
    let mut batch = db.client();
    batch.batch_execute(&format!("BEGIN; {}", insert("held", 1))).unwrap();
    // Longer than several samples, and across many claims of every lane.
    for _ in 0..10 {
        db.events("order.placed", 2_000, 500);
        wait_until("the others are published", LIMIT, &[&daemon, &db], || db.pending() == 0);
    }
    db.execute(&insert("held", 2));
    wait_for(&stream, &db, &daemon, "held", &[2]);
    batch.batch_execute(&format!("{} COMMIT", insert("held", 3))).unwrap();
    wait_for(&stream, &db, &daemon, "held", &[2, 1, 3]);
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    assert_eq!(stream.count(), 20_003);
}

#[test]
fn what_a_writer_commits_is_not_overtaken_by_what_is_written_after_it() {
    let (db, stream) = (database(), stream());
    let daemon = Daemon::start(&Config::new(&db, &stream));
    daemon.wait_ready();
    let expected: Vec<i64> = (1..=60).collect();
    for round in 0..30 {
        let (first, second) = (2 * round + 1, 2 * round + 2);
        // The number is drawn long before the event after it, and both are visible together.
        let mut early = db.client();
        early.batch_execute(&format!("BEGIN; {}", insert("k", first))).unwrap();
        db.events("order.placed", 200, 100);
        std::thread::sleep(Duration::from_millis(10 * u64::try_from(round % 5).unwrap()));
        early.batch_execute("COMMIT").unwrap();
        db.execute(&insert("k", second));
    }
    wait_for(&stream, &db, &daemon, "k", &expected);
}

#[test]
fn every_way_of_drawing_a_number_is_seen() {
    let (db, stream) = (database(), stream());
    let daemon = Daemon::start(&Config::new(&db, &stream));
    daemon.wait_ready();
    let partition: String =
        db.client().query_one("SELECT to_char(now(), '\"outboxes_\"YYYY\"_\"MM')", &[]).unwrap().get(0);
    let ways = [
        // Drawn well before the row is written.
        (
            "SELECT nextval('outboxes_seq_seq') AS seq INTO TEMP drawn".to_owned(),
            "INSERT INTO outboxes (seq, topic, metadata, payload)
             SELECT seq, 'order.placed', '{\"ordering-key\": \"KEY\"}', '{\"n\": 1}' FROM drawn; DROP TABLE drawn;"
                .to_owned(),
        ),
        // In a savepoint that is rolled back to, and once more.
        (
            format!("SAVEPOINT one; {} ROLLBACK TO one;", insert("KEY", 7)),
            format!("SAVEPOINT two; {} RELEASE two;", insert("KEY", 1)),
        ),
        // Straight into the partition, past the trigger.
        (
            format!(
                "INSERT INTO {partition} (topic, metadata, payload)
                 VALUES ('order.placed', '{{\"ordering-key\": \"KEY\"}}', '{{\"n\": 1}}')"
            ),
            String::new(),
        ),
        (format!("SET LOCAL session_replication_role = replica; {}", insert("KEY", 1)), String::new()),
        (
            "INSERT INTO outboxes (topic, metadata, payload)
             SELECT 'order.placed', '{\"ordering-key\": \"KEY\"}', '{\"n\": 1}' FROM generate_series(1, 1)"
                .to_owned(),
            String::new(),
        ),
    ];
    for (turn, (begin, end)) in ways.iter().enumerate() {
        let key = format!("way-{turn}");
        let mut writer = db.client();
        writer.batch_execute(&format!("BEGIN; {}", begin.replace("KEY", &key))).unwrap();
        // Time for two samples, and numbers above the writer's that are read and settled.
        db.events("order.placed", 500, 100);
        wait_until("the others are published", LIMIT, &[&daemon, &db], || db.pending() == 0);
        std::thread::sleep(Duration::from_millis(600));
        db.events("order.placed", 500, 100);
        wait_until("the others are published", LIMIT, &[&daemon, &db], || db.pending() == 0);
        writer.batch_execute(&format!("{} COMMIT", end.replace("KEY", &key))).unwrap();
        wait_for(&stream, &db, &daemon, &key, &[1]);
    }
}

#[test]
fn a_prepared_transaction_is_waited_for_over_restarts_of_daemon_and_server() {
    let mut postgres = start_postgres_with(PostgresOptions {
        settings: vec!["max_prepared_transactions=20".into()],
        ..PostgresOptions::default()
    });
    let (db, stream) = (TestDb::on(&postgres), stream());
    // Who notifies cannot prepare.
    db.execute("ALTER TABLE outboxes DISABLE TRIGGER outboxes_notify");
    let config = Config::new(&db, &stream).set("dispatcher.poll_interval", "200ms");
    let mut daemon = Daemon::start(&config);
    daemon.wait_ready();
    let prepare = |name: &str, n: i64| {
        db.client()
            .batch_execute(&format!("BEGIN; {} PREPARE TRANSACTION '{name}'", insert("k", n)))
            .unwrap();
    };
    let load = |daemon: &Daemon| {
        db.events("order.placed", 1_000, 200);
        wait_until("the others are published", LIMIT, &[daemon, &db], || db.pending() == 0);
    };
    prepare("one", 1);
    load(&daemon);
    prepare("two", 2);
    load(&daemon);
    db.execute("COMMIT PREPARED 'one'");
    wait_for(&stream, &db, &daemon, "k", &[1]);
    daemon.kill();
    let daemon = Daemon::start(&config);
    load(&daemon);
    prepare("three", 3);
    load(&daemon);
    postgres.stop(Stop::Fast).unwrap();
    postgres.start_again().unwrap();
    load(&daemon);
    db.execute("COMMIT PREPARED 'two'");
    wait_for(&stream, &db, &daemon, "k", &[1, 2]);
    load(&daemon);
    db.execute("ROLLBACK PREPARED 'three'");
    prepare("four", 4);
    db.execute("COMMIT PREPARED 'four'");
    wait_for(&stream, &db, &daemon, "k", &[1, 2, 4]);
}

#[test]
fn four_hundred_writers_that_sit_idle_cost_nobody_his_turn() {
    let postgres = start_postgres_with(PostgresOptions {
        settings: vec!["max_connections=520".into()],
        ..PostgresOptions::default()
    });
    let (db, stream) = (TestDb::on(&postgres), stream());
    let daemon = Daemon::start(&Config::new(&db, &stream));
    daemon.wait_ready();
    let mut idle: Vec<_> = (0..400).map(|_| db.client()).collect();
    for (n, client) in idle.iter_mut().enumerate() {
        client.batch_execute(&format!("BEGIN; {}", insert("idle", n as i64))).unwrap();
    }
    let started = Instant::now();
    for _ in 0..5 {
        db.events("order.placed", 4_000, 500);
        wait_until("the others are published", LIMIT, &[&daemon, &db], || db.pending() == 0);
    }
    println!("20,000 events beside 400 open writers: {:?}", started.elapsed());
    for client in &mut idle {
        client.batch_execute("COMMIT").unwrap();
    }
    wait_until("theirs are published", LIMIT, &[&daemon, &db], || of_key(&stream, "idle").len() == 400);
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    assert_eq!(stream.count(), 20_400);
}

#[test]
fn a_deep_drain_keeps_its_updates_on_their_pages() {
    // Of its own: a transaction that another test keeps open keeps old versions in every database.
    let postgres = PostgresServer::start(&PostgresOptions::default()).unwrap();
    let (db, stream) = (TestDb::on(&postgres), stream());
    db.execute(
        "SELECT create_monthly_partition('outboxes', (now() - n * interval '1 month')::date)
           FROM generate_series(1, 2) n;
         INSERT INTO outboxes (created_at, topic, metadata, payload)
         SELECT now() - (n % 3) * interval '1 month', 'order.placed', jsonb_build_object('ordering-key', 'k' || n % 1000),
                jsonb_build_object('n', n, 'filler', repeat(md5(n::text), 10))
           FROM generate_series(1, 60000) n",
    );
    let daemon = Daemon::start(&Config::new(&db, &stream));
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    drop(daemon);
    let counts = "SELECT sum(n_tup_upd)::bigint, sum(n_tup_hot_upd)::bigint FROM pg_stat_user_tables
                   WHERE relname LIKE 'outboxes\\_%'";
    let mut updates = (0, 0);
    wait_until("the statistics have arrived", LIMIT, &[&db], || {
        let row = db.client().query_one(counts, &[]).unwrap();
        updates = (row.get::<_, i64>(0), row.get::<_, i64>(1));
        updates.0 >= 60_000
    });
    println!("updates {} of which heap-only {}", updates.0, updates.1);
    assert!(updates.1 * 100 >= updates.0 * 95, "{} of {} updates were heap-only", updates.1, updates.0);
}
