//! Rows of outbox_lanes that somebody deletes while the service runs: noticed, said, put back, and nothing is lost by it.

use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use pg_outbox::command::migrate;

use crate::claim::settings_for;
use crate::delivery::wait_drained;
use crate::harness::workload::writers_until;
use crate::harness::{
    Config, Daemon, TestDb, TestStream, Workload, check_history, database, stream, wait_until,
};

const LIMIT: Duration = Duration::from_secs(60);
const MENDED: &str = "lanes mended: ";

fn config(db: &TestDb, stream: &TestStream) -> Config {
    // What the mending does, the sweep must not do for it.
    Config::new(db, stream).set("partitions.sweep_rate", 0)
}

fn missing(db: &TestDb) -> i64 {
    64 - db.number("SELECT count(*) FROM outbox_lanes")
}

#[track_caller]
fn wait_mended(db: &TestDb, daemons: &[&Daemon], limit: Duration) {
    let mut witnesses: Vec<&dyn crate::harness::Evidence> = vec![db];
    witnesses.extend(daemons.iter().map(|daemon| *daemon as &dyn crate::harness::Evidence));
    wait_until("the lanes are mended", limit, &witnesses, || missing(db) == 0);
}

#[test]
fn a_lane_that_is_deleted_at_rest_comes_back_and_its_events_go_on() {
    let (db, stream) = (database(), stream());
    let daemon = Daemon::start(&config(&db, &stream));
    daemon.wait_ready();
    db.events("order.placed", 100, 10);
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    let lane = "lane = outbox_lane('order.placed', '{\"ordering-key\": \"k3\"}')";
    // An event that no mark of this life would let anybody find, and that nobody looks for.
    db.execute(&format!(
        "UPDATE outboxes SET published_at = NULL, id = gen_random_uuid() WHERE seq = 13;
         DELETE FROM outbox_lanes WHERE {lane}"
    ));
    db.event("order.placed", "k3", "{}");
    let deleted = Instant::now();
    wait_mended(&db, &[&daemon], Duration::from_secs(8));
    wait_drained(&db, &stream, &[&daemon], Duration::from_secs(4));
    assert!(deleted.elapsed() < Duration::from_secs(10), "{:?}", deleted.elapsed());
    let lines = daemon.log_lines(MENDED);
    assert!(lines.len() == 1 && lines[0].contains("WARN") && lines[0].contains("1 of 64 rows"), "{lines:?}");
    assert_eq!(stream.messages().len(), 102);
    let order: Vec<_> = stream.messages()[100..]
        .iter()
        .map(|message| message.header("Outbox-Seq").unwrap().to_owned())
        .collect();
    assert_eq!(order, ["13", "101"], "the lane was read from its beginning");
    daemon.wait_ready();
}

#[test]
fn lanes_that_cannot_be_mended_are_a_reason_not_to_be_ready() {
    let (db, stream) = (database(), stream());
    db.execute("REVOKE EXECUTE ON FUNCTION outbox_mend_lanes() FROM outbox_dispatcher");
    let daemon = Daemon::start(&config(&db, &stream));
    daemon.wait_ready();
    db.execute("DELETE FROM outbox_lanes WHERE lane BETWEEN 10 AND 14");
    wait_until("it is not ready", Duration::from_secs(8), &[&daemon], || daemon.get("/ready").0 == 503);
    let reason = daemon.get("/ready").1;
    assert!(reason.contains("schema: 5 of 64 rows of table outbox_lanes are missing"), "{reason}");
    wait_until("it says what to grant", LIMIT, &[&daemon], || {
        !daemon.log_lines("grant the service's role EXECUTE on function outbox_mend_lanes()").is_empty()
    });
    db.execute("GRANT EXECUTE ON FUNCTION outbox_mend_lanes() TO outbox_dispatcher");
    wait_mended(&db, &[&daemon], Duration::from_secs(8));
    daemon.wait_ready();
    assert_eq!(daemon.log_lines("mending failed, will retry").len(), 1, "{}", daemon.log());
    assert!(daemon.log_lines(MENDED)[0].contains("5 of 64 rows"));
}

/// Again and again, all of them or some, with two instances at work.
#[test]
fn lanes_emptied_under_load_lose_nothing_and_no_order() {
    let (db, stream) = (database(), stream());
    let config = config(&db, &stream);
    let [first, second] = Daemon::start_two(&config);
    for daemon in [&first, &second] {
        daemon.wait_ready();
    }
    let workload = Workload { events: 20_000, pause: Duration::from_millis(2), ..Workload::default() };
    let stop = AtomicBool::new(false);
    let mut gone = 0;
    let history = thread::scope(|scope| {
        let writing = scope.spawn(|| writers_until(&db.dsn, &workload, &stop));
        for round in 0..6 {
            let published = db.published();
            wait_until("events are published", LIMIT, &[&db, &first, &second], || {
                db.published() > published + 200
            });
            let mut client = db.client();
            let emptied = Instant::now();
            let deleted = match round % 3 {
                0 => client.execute("TRUNCATE outbox_lanes", &[]).map(|_| 64),
                1 => client.execute("DELETE FROM outbox_lanes WHERE lane % 5 = 0", &[]),
                _ => client.execute("DELETE FROM outbox_lanes", &[]),
            };
            gone += deleted.unwrap();
            let waited = emptied.elapsed();
            wait_mended(&db, &[&first, &second], Duration::from_secs(8));
            eprintln!(
                "round {round}: locks were waited for {waited:.1?}, mended after {:.1?}",
                emptied.elapsed()
            );
        }
        writing.join().unwrap()
    });
    wait_drained(&db, &stream, &[&first, &second], LIMIT);
    check_history(&history.committed, &stream.messages()).assert_clean();
    let said: Vec<String> = [&first, &second].iter().flat_map(|daemon| daemon.log_lines(MENDED)).collect();
    let rows =
        |line: &String| line.split(MENDED).nth(1).unwrap().split(' ').next().unwrap().parse::<u64>().unwrap();
    assert_eq!(said.iter().map(rows).sum::<u64>(), gone, "each row is told of once: {said:?}");
}

#[test]
fn a_cleaner_of_test_databases_does_no_harm() {
    let (db, stream) = (database(), stream());
    let daemon = Daemon::start(&config(&db, &stream));
    daemon.wait_ready();
    for restart in ["RESTART IDENTITY", "CONTINUE IDENTITY"] {
        db.events("order.placed", 200, 10);
        wait_drained(&db, &stream, &[&daemon], LIMIT);
        // It takes locks in an order of its own, and may meet claims in a deadlock.
        let truncate = format!("TRUNCATE outboxes, outbox_lanes, outbox_schema {restart} CASCADE");
        wait_until("it has the locks", LIMIT, &[&db], || db.client().batch_execute(&truncate).is_ok());
        db.events("order.placed", 100, 10);
        wait_mended(&db, &[&daemon], Duration::from_secs(8));
        wait_drained(&db, &stream, &[&daemon], LIMIT);
        assert_eq!(db.published(), 100);
        assert_eq!(db.number("SELECT version::int8 FROM outbox_schema"), 2);
    }
    assert_eq!(stream.messages().len(), 600);
}

#[test]
fn a_start_and_migrate_mend_what_is_missing() {
    let (db, stream) = (database(), stream());
    db.execute("DELETE FROM outbox_lanes WHERE lane > 60; TRUNCATE outbox_schema");
    db.events("order.placed", 100, 50);
    let mut out = Vec::new();
    migrate::run(&settings_for(&db.dsn), None, &mut out).unwrap();
    assert_eq!(missing(&db), 0);
    assert_eq!(db.number("SELECT version::int8 FROM outbox_schema"), 2);
    db.execute("DELETE FROM outbox_lanes WHERE lane > 60");
    migrate::run(&settings_for(&db.dsn), None, &mut out).unwrap();
    let said = String::from_utf8(out).unwrap();
    assert!(
        said.ends_with(
            "schema is up to date, at version 2\n3 rows of table outbox_lanes were missing, and are back\n"
        ),
        "{said}"
    );

    db.execute("TRUNCATE outbox_lanes");
    let daemon = Daemon::start(&config(&db, &stream));
    daemon.wait_ready();
    wait_drained(&db, &stream, &[&daemon], LIMIT);
}
