//! The harness tells the truth: its judge finds planted faults, its workload records what it did.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pg_outbox::sandbox::Stop;
use serde_json::json;

use crate::harness::daemon::{listening, sum_of_samples};
use crate::harness::database::start_postgres;
use crate::harness::wire::{Client, Message};
use crate::harness::workload::writers_until;
use crate::harness::{
    self, Committed, History, Stored, TestDb, Verdict, Workload, check_history, wait_until,
};

fn committed() -> Vec<Committed> {
    let event = |key: &str, n: u64| Committed {
        id: format!("{key}-{n}"),
        seq: i64::try_from(n).unwrap(),
        key: key.to_owned(),
        n,
    };
    vec![event("a", 1), event("a", 2), event("b", 1), event("a", 3), event("b", 2)]
}

fn stored(events: &[Committed]) -> Vec<Stored> {
    let message = |(index, event): (usize, &Committed)| Stored {
        seq: index as u64 + 1,
        subject: "s".to_owned(),
        headers: String::new(),
        payload: json!({"key": event.key, "n": event.n}).to_string().into_bytes(),
        msg_id: event.id.clone(),
    };
    events.iter().enumerate().map(message).collect()
}

fn counts(verdict: &Verdict) -> [usize; 4] {
    [verdict.lost.len(), verdict.duplicated.len(), verdict.reordered.len(), verdict.phantom.len()]
}

#[test]
fn the_judge_finds_each_planted_fault_and_only_that() {
    let events = committed();
    let faultless = stored(&events);
    assert!(check_history(&events, &faultless).is_clean());

    let mut other_key_first = faultless.clone();
    other_key_first.swap(1, 2);
    assert!(check_history(&events, &other_key_first).is_clean(), "keys have no order among each other");

    let mut lost = faultless.clone();
    lost.remove(1);
    assert_eq!(counts(&check_history(&events, &lost)), [1, 0, 0, 0]);

    let mut duplicated = faultless.clone();
    duplicated.push(faultless[0].clone());
    assert_eq!(counts(&check_history(&events, &duplicated)), [0, 1, 0, 0]);

    let mut reordered = faultless.clone();
    reordered.swap(0, 1);
    assert_eq!(counts(&check_history(&events, &reordered)), [0, 0, 1, 0]);

    let mut late = faultless.clone();
    let first = late.remove(0);
    late.push(first);
    assert_eq!(counts(&check_history(&events, &late)), [0, 0, 1, 0]);

    let mut phantom = faultless.clone();
    phantom[4].msg_id = "rolled back".to_owned();
    assert_eq!(counts(&check_history(&events, &phantom)), [1, 0, 0, 1]);

    let mut altered = faultless.clone();
    altered[4].payload = json!({"key": "b", "n": 3}).to_string().into_bytes();
    assert_eq!(counts(&check_history(&events, &altered)), [1, 0, 0, 1]);

    assert_eq!(counts(&check_history(&events, &[])), [5, 0, 0, 0]);
}

#[test]
fn the_workload_records_exactly_what_is_in_the_table() {
    let db = harness::database();
    let workload =
        Workload { writers: 4, keys: 20, events: 400, rollback_percent: 30, ..Workload::default() };
    let history = harness::writers(&db.dsn, &workload);
    assert!(history.rolled_back > 0);
    assert_eq!(history.committed.len(), 400);

    assert_recorded(&db, history);
}

#[test]
fn the_workload_records_the_truth_across_restarts_of_the_database() {
    let mut postgres = start_postgres();
    let db = TestDb::on(&postgres);
    let workload = Workload { writers: 4, keys: 20, events: usize::MAX, ..Workload::default() };
    let stop = AtomicBool::new(false);
    let history = std::thread::scope(|scope| {
        let writers = scope.spawn(|| writers_until(&db.dsn, &workload, &stop));
        for end in [Stop::Immediate, Stop::Fast, Stop::Immediate] {
            let before = db.pending();
            let what = "the writers write";
            wait_until(what, Duration::from_secs(20), &[&postgres], || db.pending() > before + 200);
            postgres.stop(end).unwrap();
            postgres.start_again().unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        writers.join().unwrap()
    });
    assert!(history.committed.len() > 600);
    assert_recorded(&db, history);
}

/// The recorded events are the rows of the table, and their numbers have the order of `seq`.
fn assert_recorded(db: &TestDb, history: History) {
    let rows = db
        .client()
        .query("SELECT id::text, seq, payload->>'key', (payload->>'n')::int8 FROM outboxes ORDER BY seq", &[])
        .unwrap();
    let mut in_table = Vec::new();
    for row in rows {
        let n: i64 = row.get(3);
        in_table.push(Committed {
            id: row.get(0),
            seq: row.get(1),
            key: row.get(2),
            n: u64::try_from(n).unwrap(),
        });
    }
    check_history(&history.committed, &stored(&in_table)).assert_clean();
    let mut recorded = history.committed;
    recorded.sort_by_key(|event| event.seq);
    assert_eq!(recorded, in_table);
}

#[test]
fn a_stream_is_read_back_as_it_was_written() {
    let stream = harness::stream();
    assert!(stream.messages().is_empty());
    let mut client = Client::connect(&stream.url);
    // More than one batch of the reader, and a gap in the middle.
    for n in 1..=1_200 {
        let headers = format!("NATS/1.0\r\nNats-Msg-Id: id-{n}\r\nX: a:b\r\n\r\n");
        client.publish(&stream.subject("order.placed"), "", &headers, n.to_string().as_bytes());
    }
    client.flush();
    client.api(&format!("STREAM.MSG.DELETE.{}", stream.name), &json!({"seq": 700})).unwrap();
    let messages = stream.messages();
    let expected: Vec<u64> = (1..=1_200).filter(|n| *n != 700).collect();
    assert_eq!(messages.iter().map(|message| message.seq).collect::<Vec<_>>(), expected);
    for message in &messages {
        assert_eq!(message.msg_id, format!("id-{}", message.seq));
        assert_eq!(message.header("X"), Some("a:b"));
        assert_eq!(message.payload, message.seq.to_string().as_bytes());
        assert_eq!(message.subject, format!("{}.order.placed", stream.prefix));
    }
    assert_eq!(stream.consumers(), 0);
    // What was published a second time was dropped by its message id.
    client.publish(&stream.subject("order.placed"), "", "NATS/1.0\r\nNats-Msg-Id: id-1\r\n\r\n", b"again");
    client.flush();
    assert_eq!(stream.count(), 1_199);
}

#[test]
fn a_wait_in_vain_shows_the_evidence() {
    let stream = harness::stream();
    let waited = std::panic::catch_unwind(|| {
        wait_until("pigs fly", Duration::from_millis(50), &[&stream], || false);
    });
    let message = *waited.unwrap_err().downcast::<String>().unwrap();
    assert!(message.contains("until pigs fly"), "{message}");
    assert!(message.contains(&format!("stream {}", stream.name)), "{message}");
}

#[test]
fn log_lines_and_metrics_are_found() {
    let line = "2024 INFO http listening: address=127.0.0.1:4711\n";
    assert_eq!(listening(line), Some("127.0.0.1:4711".parse().unwrap()));
    let line = "{\"message\":\"http listening: address=127.0.0.1:4711\"}\n";
    assert_eq!(listening(line), Some("127.0.0.1:4711".parse().unwrap()));
    // Half a line is no address yet.
    assert_eq!(listening("http listening: address=127.0.0.1:47"), None);

    let text = "# TYPE a counter\na{x=\"1\"} 2\na{x=\"2\"} 3\na_b 7\n";
    assert_eq!(sum_of_samples(text, "a"), Some(5.0));
    assert_eq!(sum_of_samples(text, "a{x=\"2\"}"), Some(3.0));
    assert_eq!(sum_of_samples(text, "a_b"), Some(7.0));
    assert_eq!(sum_of_samples(text, "b"), None);
}

#[test]
fn a_stored_header_is_found_by_its_whole_name() {
    let message = Message {
        subject: "s".to_owned(),
        reply: None,
        headers: "NATS/1.0\r\nX-Nats-Msg-Id: wrong\r\nNats-Msg-Id: right\r\n\r\n".to_owned(),
        payload: Vec::new(),
    };
    assert_eq!(Stored::new(1, message).msg_id, "right");
}
