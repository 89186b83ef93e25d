//! Dead letters that are announced: what the message says, that none is missed, and that nobody waits for it for long.

use std::time::Duration;

use serde_json::json;

use super::delivery::wait_drained;
use super::harness::wire::Client;
use super::harness::{Config, Daemon, TestStream, database, start_nats, stream, unique, wait_until};

const LIMIT: Duration = Duration::from_secs(60);

/// Events of topic `gone` become what is reserved for NATS itself: they die at once, without a word to the server.
fn burying(config: Config) -> Config {
    config.set("nats.dead_letter_subject", "dead").set_in("nats.topic_map", "gone", "$x.gone")
}

#[test]
fn a_dead_letter_is_told_to_listeners_and_streams() {
    let (db, stream) = (database(), stream());
    let subject = unique("dead.");
    let letters = TestStream::on(&stream.url, &json!({ "subjects": [subject] }));
    let mut listener = Client::connect(&stream.url);
    listener.subscribe(&subject);
    listener.flush();
    let config = Config::new(&db, &stream)
        .set("dispatcher.backoff_initial", "100ms")
        .set("dispatcher.backoff_max", "100ms")
        .set("nats.allow_headers", vec!["Nats-TTL"])
        .set("nats.dead_letter_subject", subject.as_str())
        .set_in("nats.topic_map", "lost.thing", "nowhere.thing");
    let daemon = Daemon::start(&config);
    let lost = db.event_with(
        "lost.thing",
        r#"{"ordering-key": "k", "Trace": "t1", "Nats-TTL": "1s"}"#,
        r#"{"a": 1}"#,
    );
    db.events("order.placed", 100, 10);
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    let heard = listener.next(LIMIT).expect("a listener hears of it");
    assert_eq!(heard.payload, br#"{"a": 1}"#);
    let stored = letters.messages();
    assert_eq!((db.dead(), stored.len()), (1, 1));
    let letter = &stored[0];
    let id: String =
        db.client().query_one("SELECT id::text FROM outboxes WHERE seq = $1", &[&lost]).unwrap().get(0);
    assert!(letter.msg_id.starts_with(&format!("{id}.dead.")), "{}", letter.msg_id);
    let seq = lost.to_string();
    for (name, value) in [
        ("Outbox-Seq", seq.as_str()),
        ("Outbox-Topic", "lost.thing"),
        ("Outbox-Subject", "nowhere.thing"),
        ("Outbox-Attempt", "3"),
        ("Trace", "t1"),
        ("ordering-key", "k"),
    ] {
        assert_eq!(letter.header(name), Some(value), "{name}");
    }
    let reason = letter.header("Outbox-Dead-Reason").unwrap();
    assert!(reason.starts_with("no stream takes subject nowhere.thing"), "{reason}");
    // What commands the server is for the event alone.
    assert_eq!((letter.header("Nats-TTL"), letter.header("Nats-Expected-Stream")), (None, None));
}

#[test]
fn one_that_no_message_can_hold_is_announced_without_its_content() {
    let db = database();
    let nats = start_nats("max_payload: 64KB");
    let stream = TestStream::on(&nats.url(), &json!({}));
    let letters = TestStream::on(&nats.url(), &json!({ "subjects": ["dead"] }));
    let daemon = Daemon::start(&Config::new(&db, &stream).set("nats.dead_letter_subject", "dead"));
    db.event("order.placed", "k", &json!({ "text": "x".repeat(70_000) }).to_string());
    let metadata = json!({ "ordering-key": "k", "long": "y".repeat(66_000) }).to_string();
    db.event_with("order.placed", &metadata, "{}");
    wait_until("both are dead", LIMIT, &[&daemon, &db], || db.dead() == 2);
    let stored = letters.messages();
    assert_eq!(stored.len(), 2);
    for letter in stored {
        assert!(letter.payload.is_empty() && letter.header("ordering-key").is_none(), "{letter:?}");
        assert!(letter.header("Outbox-Dead-Reason").unwrap().contains("max_payload"), "{letter:?}");
    }
    assert!(daemon.log_lines("connection lost").is_empty(), "{}", daemon.log());
}

#[test]
fn none_is_missed_while_nats_is_away() {
    let db = database();
    let nats = start_nats("");
    let stream = TestStream::on(&nats.url(), &json!({}));
    let letters = TestStream::on(&nats.url(), &json!({ "subjects": ["dead"] }));
    let daemon = Daemon::start(&burying(Config::new(&db, &stream)));
    daemon.wait_ready();
    nats.pause().unwrap();
    db.event("gone", "k", "1");
    wait_until("the server's silence is noticed", LIMIT, &[&daemon], || {
        !daemon.log_lines("dead letters not announced").is_empty()
    });
    assert_eq!((db.dead(), db.pending()), (0, 1));
    nats.resume().unwrap();
    wait_until("it is dead", LIMIT, &[&daemon, &db], || db.dead() == 1);
    // The first try may have reached the server after all.
    let stored = letters.messages();
    assert!((1..=2).contains(&stored.len()), "{stored:?}");
    assert!(stored.iter().all(|letter| letter.payload == b"1"));
}

#[test]
fn a_server_that_refuses_the_subject_holds_up_nobody() {
    let db = database();
    let nats = start_nats(
        "authorization {
           users = [
             { user: admin, password: admin }
             { user: outbox, password: outbox, permissions: { publish: { deny: dead } } }
           ]
         }",
    );
    let address = nats.url().replace("nats://", "");
    let stream = TestStream::on(&format!("nats://admin:admin@{address}"), &json!({}));
    let config = Config::new(&db, &stream).set("nats.url", format!("nats://outbox:outbox@{address}"));
    let daemon = Daemon::start(&burying(config));
    db.event("gone", "k", "1");
    db.events("order.placed", 100, 10);
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    assert_eq!(db.dead(), 1);
    assert_eq!(daemon.log_lines("permission denied to publish to dead").len(), 1, "{}", daemon.log());
    assert!(daemon.log_lines("outage begins").is_empty(), "{}", daemon.log());
}
