//! `pg-outbox dead`: what it finds, what it changes and what never, beside daemons at work and other operators.

use std::process::{Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::Value;

use super::delivery::wait_drained;
use super::harness::daemon::pg_outbox;
use super::harness::workload::writers_until;
use super::harness::{
    Config, Daemon, TestDb, Workload, check_history, database, secrets, stream, wait_until,
};

const LIMIT: Duration = Duration::from_secs(60);

/// Runs `pg-outbox dead` to its end, with nobody at a terminal.
fn dead(config: &Config, arguments: &[&str]) -> Output {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), config.yaml()).unwrap();
    pg_outbox().arg("--config").arg(file.path()).arg("dead").args(arguments).output().unwrap()
}

/// The same, when it succeeds: what it printed.
#[track_caller]
fn dead_ok(config: &Config, arguments: &[&str]) -> String {
    let output = dead(config, arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn dead_json(config: &Config, arguments: &[&str]) -> Value {
    serde_json::from_str(&dead_ok(config, arguments)).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Makes dead letters of those events that `which` selects.
fn bury(db: &TestDb, which: &str, error: &str) {
    db.execute(&format!(
        "UPDATE outboxes SET dead_at = now(), attempts = 3, last_error = '{error}', next_attempt_at = NULL WHERE {which}"
    ));
}

fn id_of(db: &TestDb, seq: i64) -> String {
    db.client().query_one("SELECT id::text FROM outboxes WHERE seq = $1", &[&seq]).unwrap().get(0)
}

/// The seqs of the dead letters that a selection lists.
#[track_caller]
fn listed(config: &Config, selection: &[&str]) -> Vec<i64> {
    let letters = dead_json(config, &[&["list", "--json"], selection].concat());
    letters.as_array().unwrap().iter().map(|letter| letter["seq"].as_i64().unwrap()).collect()
}

#[test]
fn a_selection_finds_what_fits_all_of_it() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream);
    let placed = db.event("order.placed", "a", r#"{"secret": 1}"#);
    let paid = db.event("order.paid.late", "b", "{}");
    let other = db.event("user.created", "a", "{}");
    let pending = db.event("order.placed", "a", "{}");
    let published = db.event("order.placed", "a", "{}");
    bury(&db, &format!("seq = {placed}"), "Message TOO large");
    bury(&db, &format!("seq IN ({paid}, {other})"), "no stream takes subject x");
    db.execute(&format!(
        "UPDATE outboxes SET dead_at = now() - interval '3 hours' WHERE seq = {other};
         UPDATE outboxes SET published_at = now() WHERE seq = {published}"
    ));
    let id = id_of(&db, paid);
    let cases: [(&[&str], &[i64]); 13] = [
        (&[], &[placed, paid, other]),
        (&["--topic", "order.*"], &[placed]),
        (&["--topic", "order.>"], &[placed, paid]),
        (&["--topic", "*.created"], &[other]),
        (&["--topic", "order.placed.x"], &[]),
        (&["--key", "a"], &[placed, other]),
        (&["--error", "too LARGE"], &[placed]),
        (&["--error", "no stream", "--key", "a"], &[other]),
        (&["--since", "2h"], &[placed, paid]),
        (&["--until", "2h"], &[other]),
        (&["--since", "2020-01-01", "--until", "2020-01-02T00:00:00Z"], &[]),
        (&["--limit", "2"], &[placed, paid]),
        (&[&id], &[paid]),
    ];
    for (selection, expected) in cases {
        assert_eq!(listed(&config, selection), expected, "{selection:?}");
    }
    let text = dead_ok(&config, &["list", "--limit", "1"]);
    assert!(text.contains("order.placed") && text.contains("Message TOO large"), "{text}");
    assert!(text.contains("... and more") && !text.contains("secret"), "{text}");

    let shown = dead_ok(&config, &["show", &id_of(&db, placed), &id_of(&db, pending)]);
    for part in ["state       dead", "state       pending", r#"payload     {"secret": 1}"#, "died "] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let shown = dead_json(&config, &["show", "--json", &id_of(&db, placed)]);
    assert_eq!((&shown[0]["payload"]["secret"], &shown[0]["key"]), (&1.into(), &"a".into()));
    let unknown = dead(&config, &["show", "00000000-0000-0000-0000-000000000000"]);
    assert_eq!(unknown.status.code(), Some(1));
    assert!(stderr(&unknown).contains("no event has the id"), "{unknown:?}");
}

#[test]
fn nothing_changes_without_a_clear_word() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream);
    db.events("order.placed", 3, 3);
    bury(&db, "true", "refused");
    let before =
        "SELECT count(*) FROM outboxes WHERE dead_at IS NOT NULL AND attempts = 3 AND discarded_at IS NULL";
    let refused: [(&[&str], i32, &str); 6] = [
        (&["retry", "--yes"], 1, "which ones?"),
        (&["discard", "--yes", "--reason", "r", "--limit", "1"], 1, "which ones?"),
        (&["discard", "--all", "--yes", "--reason", " "], 1, "--reason is empty"),
        (&["discard", "--all", "--yes"], 2, "--reason"),
        (&["retry", "--all"], 1, "retry 3 dead letters: nothing done, as there is no terminal"),
        (&["retry", "--topic", "order..x", "--yes"], 2, "empty token"),
    ];
    for (arguments, code, why) in refused {
        let output = dead(&config, arguments);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {output:?}");
        assert!(stderr(&output).contains(why), "{arguments:?}: {output:?}");
        assert_eq!(db.number(before), 3, "{arguments:?}");
    }
    let text = dead_ok(&config, &["retry", "--all", "--dry-run"]);
    assert!(text.contains("would retry seq=1 ") && text.contains("would retry 3 dead letters"), "{text}");
    let done = dead_json(&config, &["discard", "--all", "--dry-run", "--json", "--reason", "r"]);
    assert_eq!((&done["changed"], &done["dry_run"]), (&3.into(), &true.into()));
    assert_eq!(db.number(before), 3);
    // One needs no yes.
    dead_ok(&config, &["retry", "--all", "--limit", "1"]);
    assert_eq!(db.number(before), 2);
}

#[test]
fn somebody_at_a_terminal_is_asked_first() {
    let (db, stream) = (database(), stream());
    db.events("order.placed", 2, 2);
    bury(&db, "true", "refused");
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), Config::new(&db, &stream).yaml()).unwrap();
    let answer = |answer: &str| {
        let program = env!("CARGO_BIN_EXE_pg-outbox");
        let line = format!("{program} --config {} dead discard --all --reason why", file.path().display());
        // util-linux's script gives it a terminal.
        let mut child = std::process::Command::new("script")
            .args(["-qec", &line, "/dev/null"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Write::write_all(child.stdin.as_mut().unwrap(), format!("{answer}\n").as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        secrets::assert_none_printed(&output);
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let discarded = "SELECT count(*) FROM outboxes WHERE discarded_at IS NOT NULL";
    let (code, text) = answer("n");
    assert!(text.contains("discard 2 dead letters? [y/N]") && text.contains("nothing done"), "{text}");
    assert_eq!((code, db.number(discarded)), (Some(1), 0));
    let (code, text) = answer("y");
    assert!(text.contains("discarded 2 dead letters"), "{text}");
    assert_eq!((code, db.number(discarded)), (Some(0), 2));
}

#[test]
fn a_retried_event_goes_ahead_of_its_key_with_its_attempts_reset() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream)
        .set("ordering.on_dead", "block")
        .set("dispatcher.max_attempts", 1)
        .set("dispatcher.fallback_interval", "1h")
        .set("dispatcher.poll_interval", "1h")
        .set_in("nats.topic_map", "order.bad", "nowhere.bad");
    let daemon = Daemon::start(&config);
    daemon.wait_ready();
    let bad = db.event("order.bad", "a", "{}");
    let behind = [db.event("order.placed", "a", "{}"), db.event("order.placed", "a", "{}")];
    db.event("order.placed", "b", "{}");
    wait_until("the other key is through", LIMIT, &[&daemon, &db], || db.published() == 1 && db.dead() == 1);
    wait_until("the blocked key is counted", LIMIT, &[&daemon], || {
        daemon.metric("outbox_blocked_keys{by=\"dead\"}") == 1.0
    });

    daemon.write_config(&config.clone().set_in("nats.topic_map", "order.bad", stream.subject("order.good")));
    daemon.reload();
    wait_until("the reload is done", LIMIT, &[&daemon], || !daemon.log_lines("reloaded:").is_empty());
    assert_eq!(db.published(), 1, "the key still waits");
    dead_ok(&config, &["retry", &id_of(&db, bad)]);
    // It is woken: it would look by itself in an hour.
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    let of_key: Vec<i64> = stream
        .messages()
        .iter()
        .filter_map(|message| message.header("Outbox-Seq")?.parse().ok())
        .filter(|seq| *seq == bad || behind.contains(seq))
        .collect();
    assert_eq!(of_key, [bad, behind[0], behind[1]]);
    assert_eq!(db.number("SELECT max(attempts)::int8 FROM outboxes"), 1, "attempts began anew");
    assert_eq!(db.dead(), 0);
}

#[test]
fn a_discarded_event_lets_its_key_go_on_and_says_who_when_and_why() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream)
        .set("ordering.on_dead", "block")
        .set("dispatcher.fallback_interval", "1h")
        .set("dispatcher.poll_interval", "1h");
    let bad = db.event("order.placed", "a", "{}");
    bury(&db, "true", "refused");
    for _ in 0..3 {
        db.event("order.placed", "a", "{}");
    }
    let daemon = Daemon::start(&config);
    daemon.wait_ready();
    db.event("order.placed", "b", "{}");
    wait_until("the other key is through", LIMIT, &[&daemon, &db], || db.published() == 1);
    let arguments = ["discard", &id_of(&db, bad), "--reason", "customer is gone", "--by", "ada"];
    let text = dead_ok(&config, &arguments);
    assert!(text.contains("discarded 1 dead letter\n"), "{text}");
    wait_until("the key goes on", LIMIT, &[&daemon, &db], || db.published() == 4);
    let kept = "SELECT count(*) FROM outboxes WHERE discarded_by = 'ada' AND discard_reason = 'customer is gone'
                   AND discarded_at > now() - interval '1 minute' AND dead_at IS NOT NULL AND published_at IS NULL
                   AND last_error = 'refused'";
    assert_eq!(db.number(kept), 1);
    assert!(listed(&config, &[]).is_empty(), "it is no dead letter any more");
    wait_until("it counts for nothing", LIMIT, &[&daemon], || {
        daemon.metric("outbox_dead_events") == 0.0 && daemon.metric("outbox_blocked_keys{by=\"dead\"}") == 0.0
    });
    let again = dead(&config, &arguments);
    assert_eq!(again.status.code(), Some(1), "{again:?}");
    assert!(stderr(&again).contains("is no dead letter: it is discarded"), "{again:?}");
    let shown = dead_ok(&config, &["show", &id_of(&db, bad)]);
    assert!(shown.contains("by          ada") && shown.contains("why         customer is gone"), "{shown}");
}

#[test]
fn a_discarded_event_goes_with_the_retention_and_not_before() {
    let db = database();
    db.execute(
        "SELECT create_monthly_partition('outboxes', (now() - interval '100 days')::date);
         INSERT INTO outboxes (created_at, topic, payload, dead_at, discarded_at)
         SELECT now() - interval '100 days', 'order.placed', '{}', now(), now() - interval '1 day' * n
           FROM generate_series(20, 40, 20) n;
         INSERT INTO outboxes (created_at, topic, payload, dead_at) VALUES (now() - interval '100 days', 't', '{}', now())",
    );
    let partition: String = db
        .client()
        .query_one(
            "SELECT 'outboxes_' || to_char((now() - interval '100 days') AT TIME ZONE 'UTC', 'YYYY_MM')",
            &[],
        )
        .unwrap()
        .get(0);
    let drop = || -> String {
        let drop = format!("SELECT outbox_drop_partition('{partition}', '30 days')");
        db.client().query_one(&drop, &[]).unwrap().get(0)
    };
    assert_eq!(drop(), "dead");
    // Two ways to delete single events: the one that was discarded 40 days ago goes, whichever comes first.
    let discarded = "SELECT count(*) FROM outboxes WHERE discarded_at IS NOT NULL";
    assert_eq!(db.number("SELECT cleanup_old_outbox_events(50)"), 0);
    assert_eq!(db.number("SELECT cleanup_old_outbox_events(30)"), 1);
    assert_eq!(
        db.number(&format!("SELECT deleted FROM outbox_clean_partition('{partition}', 0, '30 days')")),
        0
    );
    assert_eq!(db.number(discarded), 1);
    db.execute("UPDATE outboxes SET discarded_at = now() WHERE discarded_at IS NULL");
    assert_eq!(drop(), "discarded");
    db.execute("UPDATE outboxes SET discarded_at = now() - interval '31 days' WHERE topic = 't'");
    assert_eq!(
        db.number(&format!("SELECT deleted FROM outbox_clean_partition('{partition}', 0, '30 days')")),
        1
    );
    assert_eq!(drop(), "discarded", "one of 20 days ago is left");
    db.execute("UPDATE outboxes SET discarded_at = now() - interval '31 days'");
    assert_eq!(drop(), "dropped");
}

#[test]
fn two_operators_at_once_retry_each_event_once() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream);
    db.events("order.placed", 2_000, 40);
    bury(&db, "true", "refused");
    let daemon = Daemon::start(&config);
    daemon.wait_ready();
    let both = thread::scope(|scope| {
        let run = || dead_json(&config, &["retry", "--all", "--yes", "--json"]);
        let operators = [scope.spawn(run), scope.spawn(run)];
        operators.map(|operator| operator.join().unwrap())
    });
    let changed: i64 = both.iter().map(|done| done["changed"].as_i64().unwrap()).sum();
    assert_eq!(changed, 2_000, "nothing was counted twice");
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    let messages = stream.messages();
    assert_eq!(messages.len(), 2_000);
    assert_eq!(
        daemon.metric("outbox_attempts_total{outcome=\"duplicate\"}"),
        0.0,
        "nothing was published twice"
    );
    assert_eq!(db.number("SELECT count(*) FROM outboxes WHERE attempts <> 1"), 0);
    assert!(daemon.log_lines("rows changed under the claim").is_empty(), "{}", daemon.log());
}

#[test]
fn one_discards_while_another_retries_and_each_event_gets_one_of_both() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream).set("database.dsn", db.operator_dsn());
    db.events("order.placed", 1_000, 64);
    bury(&db, "true", "refused");
    let [retried, discarded] = thread::scope(|scope| {
        let retry = scope.spawn(|| dead_json(&config, &["retry", "--all", "--yes", "--json", "--new-id"]));
        let discard =
            scope.spawn(|| dead_json(&config, &["discard", "--all", "--yes", "--json", "--reason", "r"]));
        [retry, discard].map(|operator| operator.join().unwrap()["changed"].as_i64().unwrap())
    });
    assert_eq!(retried + discarded, 1_000);
    let rows = "SELECT count(*) FROM outboxes WHERE next_attempt_at IS NOT NULL AND dead_at IS NULL AND discarded_at IS NULL";
    assert_eq!(db.number(rows), retried);
    let rows = "SELECT count(*) FROM outboxes WHERE next_attempt_at IS NULL AND dead_at IS NOT NULL AND discarded_at IS NOT NULL";
    assert_eq!(db.number(rows), discarded);
}

#[test]
fn a_retry_waits_for_the_claim_that_has_the_lane() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream);
    let seq = db.event("order.placed", "a", "{}");
    bury(&db, "true", "refused");
    let mut claim = db.client();
    claim.batch_execute("BEGIN; SELECT lane FROM outbox_lanes FOR UPDATE").unwrap();
    let id = id_of(&db, seq);
    thread::scope(|scope| {
        let retry = scope.spawn(|| dead_ok(&config, &["retry", &id]));
        wait_until("it waits for the lane", LIMIT, &[&db], || {
            db.number(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pg-outbox/dead'
                        AND datname = current_database() AND wait_event_type = 'Lock'",
            ) == 1
        });
        assert_eq!(db.dead(), 1);
        claim.batch_execute("COMMIT").unwrap();
        assert!(retry.join().unwrap().contains("retried 1 dead letter\n"));
    });
    assert_eq!(db.dead(), 0);
}

#[test]
fn retries_under_load_keep_the_order_of_every_key() {
    let (db, stream) = (database(), stream());
    let mended = Config::new(&db, &stream).set("ordering.on_dead", "block").set("dispatcher.max_attempts", 1);
    let lost = mended.clone().set_in("nats.topic_map", "order.placed", "nowhere.placed");
    let daemon = Daemon::start(&lost);
    daemon.wait_ready();
    let stop = AtomicBool::new(false);
    let workload = Workload {
        writers: 4,
        keys: 60,
        events: 4_000,
        pause: Duration::from_millis(1),
        ..Workload::default()
    };
    let history = thread::scope(|scope| {
        let writing = scope.spawn(|| writers_until(&db.dsn, &workload, &stop));
        let seen = std::panic::catch_unwind(|| {
            wait_until("keys are blocked", LIMIT, &[&daemon, &db], || db.dead() >= 40);
            daemon.write_config(&mended);
            daemon.reload();
            wait_until("the reload is done", LIMIT, &[&daemon], || !daemon.log_lines("reloaded:").is_empty());
            // What was claimed with the old map may still die; in the end nothing is dead.
            wait_until("every dead letter was retried", LIMIT, &[&daemon, &db], || {
                dead_ok(&lost, &["retry", "--all", "--yes"]);
                db.dead() == 0
            });
        });
        stop.store(true, Ordering::Relaxed);
        let history = writing.join().unwrap();
        seen.unwrap();
        history
    });
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    assert!(history.committed.len() > 200, "{}", history.committed.len());
    check_history(&history.committed, &stream.messages()).assert_clean();
}

#[test]
fn the_duplicate_window_swallows_and_a_fresh_id_does_not() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream).set("database.dsn", db.operator_dsn());
    let daemon = Daemon::start(&config);
    let [kept, fresh] = [db.event("order.placed", "a", "1"), db.event("order.placed", "b", "2")];
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    assert_eq!(stream.count(), 2);
    // As if their acks had been lost.
    db.execute(
        "UPDATE outboxes SET published_at = NULL, dead_at = now(), last_error = 'no ack within 5s though server and stream answer'",
    );
    // Another row with the id of the second, in another partition and long published: not ours to change.
    let old_id = id_of(&db, fresh);
    db.execute(&format!(
        "INSERT INTO outboxes (id, created_at, topic, payload, published_at, attempts)
         VALUES ('{old_id}', now() - interval '40 days', 'order.placed', '{{}}', now() - interval '39 days', 1)"
    ));

    let output = dead(&config, &["retry", &id_of(&db, kept)]);
    assert!(output.status.success(), "{output:?}");
    let said = stderr(&output);
    assert!(said.contains("may have 1 of these") && said.contains("--new-id"), "{said}");
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    assert_eq!((db.dead(), stream.count()), (1, 2), "published, as the stream has it, and not stored again");

    let as_dispatcher = dead(&Config::new(&db, &stream), &["retry", &old_id, "--new-id"]);
    assert!(stderr(&as_dispatcher).contains("as outbox_operator may"), "{as_dispatcher:?}");
    let done = dead_json(&config, &["retry", &old_id, "--new-id", "--json"]);
    let new_id = done["events"][0]["new_id"].as_str().unwrap().to_owned();
    assert_ne!(new_id, old_id);
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    let messages = stream.messages();
    assert_eq!(messages.len(), 3, "stored again, within the window");
    let again = messages.last().unwrap();
    assert_eq!((again.msg_id.as_str(), again.payload.as_slice()), (new_id.as_str(), b"2".as_slice()));
    assert_eq!(id_of(&db, fresh), new_id);
    let old = format!(
        "SELECT count(*) FROM outboxes WHERE id = '{old_id}' AND created_at < now() - interval '39 days'"
    );
    assert_eq!(db.number(&old), 1, "the row of the other partition is as it was");
    assert_eq!(daemon.metric("outbox_attempts_total{outcome=\"duplicate\"}"), 1.0);
}

#[test]
fn rows_that_share_an_id_go_on_sharing_one() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream)
        .set("database.dsn", db.operator_dsn())
        .set("nats.url", "nats://127.0.0.1:1");
    db.execute(
        "INSERT INTO outboxes (id, created_at, topic, payload, dead_at, last_error) VALUES
         ('00000000-0000-0000-0000-000000000001', now() - interval '40 days', 'a', '{}', now(), 'no ack within 5s'),
         ('00000000-0000-0000-0000-000000000001', now(), 'b', '{}', now(), 'refused')",
    );
    let id = "00000000-0000-0000-0000-000000000001";
    let output = dead(&config, &["retry", id, "--yes", "--dry-run"]);
    assert!(stderr(&output).contains("its duplicate window is not known"), "{output:?}");
    let done = dead_json(&config, &["retry", id, "--yes", "--json", "--new-id"]);
    assert_eq!(done["changed"], 2);
    assert_eq!(done["events"][0]["new_id"], done["events"][1]["new_id"]);
    assert_eq!(db.number("SELECT count(DISTINCT id) FROM outboxes"), 1);
    assert_eq!(db.number(&format!("SELECT count(*) FROM outboxes WHERE id = '{id}'")), 0);
}

#[test]
fn a_rate_is_kept() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream);
    db.events("order.placed", 30, 5);
    bury(&db, "true", "refused");
    let started = std::time::Instant::now();
    dead_ok(&config, &["retry", "--all", "--yes", "--rate", "20"]);
    assert!(started.elapsed() >= Duration::from_millis(1_400), "{:?}", started.elapsed());
    assert_eq!(db.dead(), 0);
}
