//! Events that NATS refuses: they back off, die with a reason, and hold up nobody but their own key.

use std::thread;
use std::time::Duration;

use serde_json::json;

use super::delivery::wait_drained;
use super::harness::wire::Client;
use super::harness::{Config, Daemon, TestDb, TestStream, database, start_nats, stream, unique, wait_until};

const LIMIT: Duration = Duration::from_secs(60);

fn dead_letter(db: &TestDb, seq: i64) -> Option<(i32, String)> {
    let row = db
        .client()
        .query_one("SELECT attempts, last_error, dead_at IS NOT NULL FROM outboxes WHERE seq = $1", &[&seq])
        .unwrap();
    row.get::<_, bool>(2).then(|| (row.get(0), row.get(1)))
}

fn quick_backoff(config: Config) -> Config {
    config.set("dispatcher.backoff_initial", "400ms").set("dispatcher.backoff_max", "1s")
}

#[test]
fn a_subject_in_no_stream_dies_with_a_reason_and_delays_no_other_key() {
    let (db, stream) = (database(), stream());
    let config =
        quick_backoff(Config::new(&db, &stream)).set_in("nats.topic_map", "lost.thing", "nowhere.thing");
    let daemon = Daemon::start(&config);
    daemon.wait_ready();
    let bad = db.event("lost.thing", "bad", "{}");
    let behind = db.event("order.placed", "bad", "{}");
    db.events("order.placed", 500, 50);
    wait_until("the other keys are published", Duration::from_secs(5), &[&daemon, &db], || {
        db.published() >= 500
    });
    assert!(dead_letter(&db, bad).is_none(), "it still has attempts left");
    assert_eq!(
        db.number(&format!(
            "SELECT count(*) FROM outboxes WHERE seq = {behind} AND published_at IS NOT NULL"
        )),
        0,
        "the event behind it waits for its key"
    );
    wait_until("it is dead", LIMIT, &[&daemon, &db], || dead_letter(&db, bad).is_some());
    let (attempts, error) = dead_letter(&db, bad).unwrap();
    assert_eq!(attempts, 3);
    assert!(error.contains("no stream takes subject nowhere.thing"), "{error}");
    assert!(error.contains("map the topic"), "it says what to do: {error}");
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    assert_eq!(stream.count(), 501, "a dead letter lets its key go on");
    assert_eq!(daemon.log_lines("publish refused, will retry: event=").len(), 2, "{}", daemon.log());
    assert!(daemon.log_lines("no ack").is_empty(), "it was answered: {}", daemon.log());
    assert_eq!(daemon.log_lines("event is dead").len(), 1, "{}", daemon.log());
    assert_eq!(daemon.metric("outbox_events_failed_total"), 3.0);
    assert!(daemon.log_lines("outage begins").is_empty(), "a rejection is no outage");
}

#[test]
fn an_event_over_the_servers_limit_is_dead_at_once() {
    let db = database();
    let nats = start_nats("max_payload: 64KB");
    let stream = TestStream::on(&nats.url(), &json!({}));
    let daemon = Daemon::start(&Config::new(&db, &stream));
    let big = db.event("order.placed", "big", &json!({ "text": "x".repeat(70_000) }).to_string());
    let next = db.event("order.placed", "big", "{}");
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    let (attempts, error) = dead_letter(&db, big).expect("trying again cannot help");
    assert_eq!(attempts, 1);
    assert!(error.contains("max_payload") && error.contains("65536"), "{error}");
    assert!(dead_letter(&db, next).is_none());
    assert_eq!(stream.count(), 1);
    assert!(daemon.log_lines("connection lost").is_empty(), "the server must never see it");
}

#[test]
fn an_event_over_the_streams_limit_is_dead_at_once() {
    let db = database();
    let stream = stream();
    stream.update(&json!({ "max_msg_size": 1000 }));
    let daemon = Daemon::start(&Config::new(&db, &stream));
    let big = db.event("order.placed", "big", &json!({ "text": "x".repeat(2_000) }).to_string());
    db.event("order.placed", "small", "{}");
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    let (_, error) = dead_letter(&db, big).expect("trying again cannot help");
    assert!(error.contains("max_msg_size of 1000 B"), "{error}");
    assert_eq!(stream.count(), 1);
}

const PERMISSIONS: &str = r#"
authorization {
  users = [
    { user: admin, password: admin }
    { user: outbox, password: "s3cret!", permissions: {
        publish: { allow: ["*.order.>", "_INBOX.>", "$JS.API.STREAM.INFO.*"] }
        subscribe: ["_INBOX.>"] } }
  ]
}
"#;

#[test]
fn a_denied_subject_rejects_that_event_and_nothing_else() {
    for jetstream in [true, false] {
        let db = database();
        let nats = start_nats(PERMISSIONS);
        let admin = nats.url().replace("nats://", "nats://admin:admin@");
        let stream = TestStream::on(&admin, &json!({}));
        let url = nats.url().replace("nats://", "nats://outbox:s3cret!@");
        let config = quick_backoff(Config::new(&db, &stream))
            .set("nats.url", url)
            .set("nats.jetstream.enabled", jetstream);
        let daemon = Daemon::start(&config);
        daemon.wait_ready();
        let bad = db.event("secret.thing", "bad", "{}");
        db.event("order.placed", "bad", "{}");
        db.events("order.placed", 200, 20);
        wait_until("the other keys are published", Duration::from_secs(5), &[&daemon, &db], || {
            db.published() >= 200
        });
        wait_until("it is dead", LIMIT, &[&daemon, &db], || dead_letter(&db, bad).is_some());
        let (attempts, error) = dead_letter(&db, bad).unwrap();
        assert_eq!(attempts, 3);
        assert!(
            error.contains("permission denied to publish to") && error.contains("secret.thing"),
            "{error}"
        );
        wait_drained(&db, &stream, &[&daemon], LIMIT);
        assert_eq!(stream.count(), 201);
        assert!(daemon.log_lines("outage begins").is_empty(), "{}", daemon.log());
        assert!(!daemon.log().contains("s3cret!"), "the password is in the log");
    }
}

#[test]
fn an_event_without_an_ack_is_no_outage() {
    let db = database();
    let stream = stream();
    // Somebody listens on the subject, and no stream takes it: nobody says so, and nobody acknowledges.
    let subject = unique("silence.");
    let mut listener = Client::connect(&stream.url);
    listener.subscribe(&subject);
    listener.flush();
    let config = quick_backoff(Config::new(&db, &stream)).set("nats.ack_timeout", "300ms").set_in(
        "nats.topic_map",
        "silent.thing",
        subject.as_str(),
    );
    let daemon = Daemon::start(&config);
    daemon.wait_ready();
    let silent = db.event("silent.thing", "k", "{}");
    wait_until("it is tried again", LIMIT, &[&daemon, &db], || {
        db.number("SELECT count(*) FROM outboxes WHERE next_attempt_at IS NOT NULL AND attempts = 0") == 1
    });
    wait_until("silence that stays counts as a rejection", LIMIT, &[&daemon, &db], || {
        dead_letter(&db, silent).is_some()
    });
    let (attempts, error) = dead_letter(&db, silent).unwrap();
    assert_eq!(attempts, 3);
    assert!(error.contains("no ack within 0.3s") && error.contains(&subject), "{error}");
    let retries = daemon.log_lines("no ack, will retry: event=");
    let counted: Vec<bool> = retries.iter().map(|line| !line.contains("attempt=0/3")).collect();
    assert_eq!(counted, [false, false, true, true], "two are free: {}", daemon.log());
    assert!(daemon.log_lines("refused").is_empty(), "nobody refused it: {}", daemon.log());
    assert!(daemon.log_lines("outage begins").is_empty(), "{}", daemon.log());
    assert_eq!(daemon.get("/ready").0, 200);
}

#[test]
fn a_stream_that_acknowledges_nothing_is_an_outage() {
    let db = database();
    let stream = stream();
    let config = quick_backoff(Config::new(&db, &stream)).set("nats.ack_timeout", "300ms");
    let daemon = Daemon::start(&config);
    daemon.wait_ready();
    stream.update(&json!({ "no_ack": true }));
    db.events("order.placed", 25, 5);
    wait_until("it says what is the matter", LIMIT, &[&daemon], || {
        let (status, body) = daemon.get("/ready");
        status == 503 && body.contains("no_ack")
    });
    stream.update(&json!({ "no_ack": false }));
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    assert_eq!(stream.count(), 25);
    assert_eq!(db.number("SELECT count(*) FROM outboxes WHERE attempts > 1"), 0);
}

#[test]
fn a_full_stream_is_an_outage_and_ends_when_there_is_room() {
    let db = database();
    let stream = stream();
    stream.update(&json!({ "max_msgs": 10, "discard": "new" }));
    let daemon = Daemon::start(&Config::new(&db, &stream));
    db.events("order.placed", 25, 5);
    wait_until("it says what is the matter", LIMIT, &[&daemon], || {
        let (status, body) = daemon.get("/ready");
        status == 503 && body.contains("maximum messages exceeded")
    });
    assert_eq!(stream.count(), 10);
    thread::sleep(Duration::from_secs(3));
    assert_eq!(daemon.log_lines("outage begins").len(), 1, "one outage is one line: {}", daemon.log());
    assert_eq!(db.number("SELECT count(*) FROM outboxes WHERE attempts > 0 AND published_at IS NULL"), 0);
    stream.update(&json!({ "max_msgs": -1 }));
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    assert_eq!(stream.count(), 25);
    assert_eq!(daemon.log_lines("outage ends").len(), 1, "{}", daemon.log());
}

#[test]
fn a_message_in_the_wrong_stream_never_lands_there() {
    let db = database();
    let stream = stream();
    let other = super::harness::stream();
    let config = quick_backoff(Config::new(&db, &stream)).set("dispatcher.max_attempts", 1).set_in(
        "nats.topic_map",
        "lost.thing",
        other.subject("thing"),
    );
    let daemon = Daemon::start(&config);
    let bad = db.event("lost.thing", "bad", "{}");
    wait_until("it is dead", LIMIT, &[&daemon, &db], || dead_letter(&db, bad).is_some());
    let (_, error) = dead_letter(&db, bad).unwrap();
    assert!(error.contains("10060"), "{error}");
    assert_eq!(other.count(), 0);
}

/// The users of [`a_permission_that_was_given_is_not_denied_by_an_old_denial`], with or without the subject.
fn users_of_a_reload(allow: &str) -> String {
    format!(
        r#"authorization {{ users = [
            {{ user: admin, password: admin }}
            {{ user: outbox, password: "s3cret!", permissions: {{
                publish: {{ allow: [{allow}"*.order.>", "_INBOX.>", "$JS.API.STREAM.INFO.*"] }}
                subscribe: ["_INBOX.>"] }} }} ] }}"#
    )
}

#[test]
fn a_permission_that_was_given_is_not_denied_by_an_old_denial() {
    let db = database();
    let folder = tempfile::tempdir().unwrap();
    let users = folder.path().join("users.conf");
    std::fs::write(&users, users_of_a_reload("")).unwrap();
    // nats-server takes the path of an include from the folder of its config file, also an absolute one.
    let up = "../".repeat(std::env::temp_dir().components().count() + 2);
    let nats = start_nats(&format!("include '{up}{}'", users.display()));
    let admin = nats.url().replace("nats://", "nats://admin:admin@");
    let stream = TestStream::on(&admin, &json!({}));
    let config = quick_backoff(Config::new(&db, &stream))
        .set("nats.url", nats.url().replace("nats://", "nats://outbox:s3cret!@"))
        .set("dispatcher.max_attempts", 1000);
    let daemon = Daemon::start(&config);
    daemon.wait_ready();
    db.event("secret.thing", "bad", "{}");
    wait_until("it was denied twice", LIMIT, &[&daemon, &db], || daemon.log_lines("will retry").len() >= 2);
    std::fs::write(&users, users_of_a_reload("\"*.secret.>\", ")).unwrap();
    let pid = i32::try_from(nats.pid().unwrap()).ok().and_then(rustix::process::Pid::from_raw).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::HUP).unwrap();
    wait_until("the reload is done", LIMIT, &[&nats], || {
        nats.log().contains("Reloaded server configuration")
    });
    // An attempt that was under way meanwhile may still be denied, and one more heard of; later ones may not.
    let denied = daemon.log_lines("will retry").len();
    wait_until("the event is published", LIMIT, &[&daemon, &db, &nats], || db.pending() == 0);
    assert_eq!(
        daemon.log_lines("connected: nats=").len(),
        1,
        "the reload kept the connection: {}",
        daemon.log()
    );
    assert!(daemon.log_lines("will retry").len() <= denied + 1, "{}", daemon.log());
    assert_eq!(stream.count(), 1);
    assert_eq!(
        daemon.metric("outbox_attempts_total{outcome=\"duplicate\"}"),
        0.0,
        "it was stored by the first try that could"
    );
}

#[test]
fn what_comes_to_the_socket_too_late_is_no_attempt() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream)
        .set("dispatcher.claim_budget", "30ms")
        .set("dispatcher.batch_size", 1000)
        .set("nats.ack_timeout", "300ms");
    // 100 kB each: a claim's events are handed over in a moment, and take longer than the budget to be written.
    db.client()
        .batch_execute(
            "INSERT INTO outboxes (topic, metadata, payload)
             SELECT 'order.placed', jsonb_build_object('ordering-key', n),
                    to_jsonb((SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 3200) WHERE n > 0))
             FROM generate_series(1, 400) n",
        )
        .unwrap();
    let daemon = Daemon::start(&config);
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    assert_eq!(stream.count(), 400);
    assert!(daemon.log_lines("will retry").is_empty(), "{}", daemon.log());
    assert_eq!(db.number("SELECT count(*) FROM outboxes WHERE attempts <> 1"), 0);
}
