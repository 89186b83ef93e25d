//! Through a PgBouncer, in both of its modes: what works as it does without, what cannot, what is said about it, and
//! that nothing is left in sessions that others get next. Faults behind a pooler are in `faults/pooler.rs`.

use std::time::Duration;

use postgres::{Client, NoTls};

use pg_outbox::lab::sandbox::{PostgresOptions, PostgresServer};

use super::delivery::wait_drained;
use super::harness::daemon::pg_outbox;
use super::harness::database::{shared_postgres, start_postgres_with};
use super::harness::{
    Config, Daemon, Mode, Pooler, TestDb, TestStream, Workload, check_history, database, stream, wait_until,
    writers,
};

const LIMIT: Duration = Duration::from_secs(60);
/// An event that is not published within this time waits for a poll.
const SOON: Duration = Duration::from_secs(4);
/// Connections of a pooler to the server: fewer than the instances have.
const FEW: usize = 12;

fn config(db: &TestDb, stream: &TestStream, pooler: &Pooler) -> Config {
    Config::new(db, stream).set("database.dsn", pooler.dsn(db))
}

/// A server that logs what it executes, by what name, and for whom.
fn talkative_postgres() -> PostgresServer {
    let settings = ["log_statement=all", "log_line_prefix=%a "].map(str::to_owned).to_vec();
    start_postgres_with(PostgresOptions { settings, ..PostgresOptions::default() })
}

/// What the server executed for us: of statements that have a name, and of those that have none.
fn executed(postgres: &PostgresServer) -> (usize, usize) {
    let log = postgres.log();
    let ours =
        |what: &str| log.lines().filter(|line| line.starts_with("pg-outbox/") && line.contains(what)).count();
    (ours("LOG:  execute s"), ours("LOG:  execute <unnamed>:"))
}

#[test]
fn two_instances_deliver_through_a_transaction_pooler_and_prepare_nothing() {
    let postgres = talkative_postgres();
    let pooler = Pooler::to(&postgres, Mode::Transaction, FEW);
    let (db, stream) = (TestDb::on(&postgres), stream());
    let dsn = format!("{}?target_session_attrs=primary", pooler.dsn(&db));
    let config = config(&db, &stream, &pooler).set("database.dsn", dsn);
    let [first, second] = Daemon::start_two(&config);
    let history = writers(
        &format!("{}?application_name=writer", pooler.owner_dsn(&db)),
        &Workload { events: 3_000, ..Workload::default() },
    );
    wait_drained(&db, &stream, &[&first, &second], LIMIT);
    check_history(&history.committed, &stream.messages()).assert_clean();
    let (named, unnamed) = executed(&postgres);
    assert!(named == 0 && unnamed > 100, "named={named} unnamed={unnamed}");
    for daemon in [&first, &second] {
        let said = daemon.log_lines("connections share sessions");
        assert_eq!(said.len(), 1, "{}", daemon.log());
        assert!(said[0].contains("statements are not prepared"), "{said:?}");
        assert!(daemon.log_lines("claims fail").is_empty(), "{}", daemon.log());
    }
}

#[test]
fn statements_are_prepared_where_sessions_are_our_own() {
    for through_a_pooler in [false, true] {
        let postgres = talkative_postgres();
        let (db, stream) = (TestDb::on(&postgres), stream());
        let pooler = Pooler::to(&postgres, Mode::Session, 40);
        let mut settings = Config::new(&db, &stream);
        if through_a_pooler {
            settings = config(&db, &stream, &pooler);
        }
        db.events("order.placed", 500, 50);
        let never = Daemon::start(&settings.clone().set("database.prepared_statements", "never"));
        wait_drained(&db, &stream, &[&never], LIMIT);
        drop(never);
        assert_eq!(executed(&postgres).0, 0, "not where that is not wanted");
        let daemon = Daemon::start(&settings);
        db.events("order.placed", 500, 50);
        wait_drained(&db, &stream, &[&daemon], LIMIT);
        assert!(executed(&postgres).0 > 0, "through_a_pooler={through_a_pooler}\n{}", daemon.log());
        assert!(daemon.log_lines("connections share sessions").is_empty(), "{}", daemon.log());
    }
}

#[test]
fn a_pooler_that_changes_its_mode_costs_one_claim() {
    let pooler = Pooler::to(shared_postgres(), Mode::Session, 40);
    let (db, stream) = (database(), stream());
    let settings = config(&db, &stream, &pooler);
    let daemons =
        [Daemon::start(&settings), Daemon::start(&settings.clone().set("dispatcher.instance_id", "other"))];
    db.events("order.placed", 2_000, 50);
    wait_drained(&db, &stream, &[&daemons[0], &daemons[1]], LIMIT);
    pooler.change(Mode::Transaction);
    let history = writers(&db.dsn, &Workload { events: 3_000, ..Workload::default() });
    wait_drained(&db, &stream, &[&daemons[0], &daemons[1]], LIMIT);
    let arrived = stream.messages();
    check_history(&history.committed, &arrived[2_000..]).assert_clean();
    let said = daemons.iter().flat_map(|daemon| daemon.log_lines("statements are not prepared from now on"));
    assert!(said.count() > 0, "it did not notice\n{}", daemons[0].log());
}

#[test]
fn retries_and_dead_letters_pass_through_both_modes() {
    for mode in [Mode::Transaction, Mode::Session] {
        let pooler = Pooler::to(shared_postgres(), mode, 40);
        let (db, stream) = (database(), stream());
        let daemon = Daemon::start(
            &config(&db, &stream, &pooler)
                .set("dispatcher.backoff_initial", "200ms")
                .set("dispatcher.backoff_max", "500ms")
                .set_in("nats.topic_map", "lost.thing", "nowhere.thing"),
        );
        for key in 0..5 {
            let key = format!("k{key}");
            db.event("lost.thing", &key, "{}");
            db.event("order.placed", &key, "{}");
        }
        db.events("order.placed", 500, 50);
        wait_drained(&db, &stream, &[&daemon], LIMIT);
        assert_eq!(db.dead(), 5, "{mode:?}");
        assert_eq!(db.number("SELECT min(attempts)::int8 FROM outboxes WHERE dead_at IS NOT NULL"), 3);
        assert_eq!(stream.count(), 505);
        wait_until("the partitions were looked at", LIMIT, &[&daemon], || {
            daemon.metric("outbox_partitions_ahead_days") > 0.0
        });
    }
}

#[test]
fn listen_through_a_transaction_pooler_is_found_out_and_led_around() {
    let pooler = Pooler::to(shared_postgres(), Mode::Transaction, FEW);
    let (db, stream) = (database(), stream());
    let patient = config(&db, &stream, &pooler)
        .set("dispatcher.poll_interval", "60s")
        .set("dispatcher.fallback_interval", "60s");
    let deaf = Daemon::start(&patient);
    deaf.wait_ready();
    wait_until("it says so", LIMIT, &[&deaf], || deaf.log().contains("no wake-ups, polling instead"));
    let said = deaf.log_lines("no wake-ups, polling instead");
    assert!(said[0].contains("database.listen_dsn"), "{said:?}");
    drop(deaf);
    let hearing = Daemon::start(&patient.set("database.listen_dsn", db.dispatcher_dsn()));
    hearing.wait_ready();
    let asleep = "SELECT count(*) FROM pg_locks
                   WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND granted AND classid = 1869968483
                     AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    for _ in 0..3 {
        wait_until("it sleeps", LIMIT, &[&hearing], || db.number(asleep) == 1);
        db.event("order.placed", "k", "{}");
        wait_until("the event is published", SOON, &[&hearing, &db], || db.pending() == 0);
    }
    assert!(hearing.log_lines("no wake-ups").is_empty(), "{}", hearing.log());
}

#[test]
fn wake_ups_work_through_a_session_pooler() {
    let pooler = Pooler::to(shared_postgres(), Mode::Session, 40);
    let (db, stream) = (database(), stream());
    let daemon = Daemon::start(
        &config(&db, &stream, &pooler)
            .set("dispatcher.poll_interval", "60s")
            .set("dispatcher.fallback_interval", "60s"),
    );
    wait_until("it listens", LIMIT, &[&daemon], || daemon.log().contains("listening for wake-ups"));
    for _ in 0..3 {
        db.event("order.placed", "k", "{}");
        wait_until("the event is published", SOON, &[&daemon, &db], || db.pending() == 0);
    }
}

#[test]
fn a_listen_dsn_that_leads_elsewhere_is_said() {
    let (db, other, stream) = (database(), database(), stream());
    let daemon = Daemon::start(
        &Config::new(&db, &stream)
            .set("database.listen_dsn", other.dispatcher_dsn())
            .set("dispatcher.poll_interval", "200ms")
            .set("dispatcher.fallback_interval", "60s"),
    );
    wait_until("it says so", LIMIT, &[&daemon], || daemon.log().contains("leads to another outbox"));
    db.event("order.placed", "k", "{}");
    wait_until("the event is published all the same", SOON, &[&daemon, &db], || db.pending() == 0);
}

#[test]
fn nothing_is_left_in_a_shared_session() {
    let pooler = Pooler::to(shared_postgres(), Mode::Transaction, FEW);
    let (db, stream) = (TestDb::without_schema(shared_postgres()), stream());
    let settings = config(&db, &stream, &pooler)
        .set("database.dsn", pooler.owner_dsn(&db))
        .set("dispatcher.poll_interval", "200ms")
        .set_in("nats.topic_map", "lost.thing", "nowhere.thing");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.yaml");
    std::fs::write(&file, settings.yaml()).unwrap();
    let run = |arguments: &[&str]| {
        let output = pg_outbox().args(arguments).arg("--config").arg(&file).output().unwrap();
        (
            output.status.success(),
            String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (migrated, said) = run(&["migrate", "--order", "key"]);
    assert!(migrated, "{said}");
    let daemon = Daemon::start(&settings);
    daemon.wait_ready();
    db.event("lost.thing", "k", "{}");
    db.events("order.placed", 500, 50);
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    let (checked, said) = run(&["check"]);
    assert!(!checked && said.contains("database.listen_dsn"), "{said}");
    assert!(said.contains("through a transaction pooler: statements are not prepared"), "{said}");
    let (told, said) = run(&["status"]);
    assert!(told, "{said}");
    daemon.term();
    drop(daemon);

    // As many transactions at once as the pooler has connections: each is in another session.
    let mut sessions: Vec<Client> = Vec::new();
    for _ in 0..FEW {
        let mut client = Client::connect(&pooler.owner_dsn(&db), NoTls).unwrap();
        client.batch_execute("BEGIN").unwrap();
        sessions.push(client);
    }
    let left = "SELECT concat_ws('; ',
                       (SELECT 'prepared ' || min(name) FROM pg_prepared_statements),
                       (SELECT 'set ' || string_agg(name, ', ') FROM pg_settings
                         WHERE source = 'session' AND name NOT IN
                               ('application_name', 'client_encoding', 'DateStyle', 'TimeZone',
                                'standard_conforming_strings')),
                       'order ' || nullif(current_setting('pg_outbox.order', true), ''),
                       (SELECT 'listens to ' || min(channel) FROM pg_listening_channels() AS channel),
                       (SELECT 'holds ' || min(mode) FROM pg_locks
                         WHERE locktype = 'advisory' AND pid = pg_backend_pid()),
                       'temp schema ' || nullif(pg_my_temp_schema(), 0))";
    let mut pids = std::collections::HashSet::new();
    for client in &mut sessions {
        let rows = client.simple_query(&format!("{left}, pg_backend_pid()")).unwrap();
        let row = rows.iter().find_map(|message| match message {
            postgres::SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        });
        let row = row.unwrap();
        assert_eq!(row.get(0), Some(""), "left in a session");
        pids.insert(row.get(1).unwrap().to_owned());
    }
    assert_eq!(pids.len(), FEW);
}
