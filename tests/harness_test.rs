//! The harness tells the truth: its judge finds planted faults, its workload records what it did.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pg_outbox::lab::sandbox::Stop;
use serde_json::json;

use crate::harness::daemon::{Daemon, listening, sum_of_samples};
use crate::harness::database::start_postgres;
use crate::harness::proxy::{Flow, Proxy, Way};
use crate::harness::wire::{Client, Message};
use crate::harness::workload::writers_until;
use crate::harness::{
    self, Committed, Evident, History, Row, RowState, Stored, Table, TestDb, Verdict, Workload, check_all,
    check_history, secrets, wait_until,
};

fn committed() -> Vec<Committed> {
    let event = |key: &str, n: u64| Committed {
        id: format!("{key}-{n}"),
        seq: i64::try_from(n).unwrap(),
        transaction: i64::try_from(n).unwrap(),
        key: key.to_owned(),
        n,
    };
    vec![event("a", 1), event("a", 2), event("b", 1), event("a", 3), event("b", 2)]
}

fn stored(events: &[Committed]) -> Vec<Stored> {
    let message = |(index, event): (usize, &Committed)| Stored {
        seq: index as u64 + 1,
        at_ns: index as u64 * 1_000_000_000,
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

/// The table after every one of these events was published.
fn table(events: &[Committed]) -> Table {
    let row = |event: &Committed| {
        (event.id.clone(), Row { state: RowState::Published, attempts: 1, last_error: None })
    };
    Table { rows: events.iter().map(row).collect(), left_claimed: Vec::new() }
}

/// What the judge says of five events that came and were settled as they should, but for what `plant` did.
fn judged(plant: impl FnOnce(&mut History, &mut Vec<Vec<Stored>>, &mut Table)) -> Verdict {
    let mut history = History { committed: committed(), rolled_back: vec!["gone".to_owned()] };
    let (mut lives, mut table) = (vec![stored(&history.committed)], table(&history.committed));
    plant(&mut history, &mut lives, &mut table);
    let window = Duration::from_secs(10);
    check_all(
        &history,
        Evident { lives: &lives, window, table: &table, cause: Some("too large"), redelivered: 7 },
    )
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
fn the_judge_finds_what_was_settled_wrongly() {
    let verdict = judged(|_, _, _| {});
    assert!(verdict.is_clean());
    assert_eq!(verdict.redelivered, 7, "what the stream dropped is told, and no fault");

    let verdict = judged(|_, lives, _| lives[0][4].msg_id = "gone".to_owned());
    assert_eq!(verdict.counts(), [("lost", 1), ("rolled back", 1)]);

    let verdict = judged(|_, lives, _| lives[0][4].msg_id = "never inserted".to_owned());
    assert_eq!(verdict.counts(), [("lost", 1), ("phantom", 1)]);

    // Settled, and never stored: what a wrong settle does.
    let verdict = judged(|_, lives, _| lives[0].truncate(4));
    assert_eq!(verdict.counts(), [("lost", 1)]);

    let verdict = judged(|_, _, table| drop(table.rows.remove("a-2")));
    assert_eq!(verdict.counts(), [("lost", 1)], "a row must not vanish");

    let verdict = judged(|_, _, table| table.rows.get_mut("a-2").unwrap().state = RowState::Pending);
    assert_eq!(verdict.counts(), [("unsettled", 1)], "stored, and never settled");

    let verdict = judged(|_, _, table| table.left_claimed.push("lane 7 is locked".to_owned()));
    assert_eq!(verdict.counts(), [("left claimed", 1)]);
}

#[test]
fn the_judge_wants_a_cause_for_a_dead_letter_and_for_an_attempt() {
    let bury = |error: &str| Row { state: RowState::Dead, attempts: 3, last_error: Some(error.to_owned()) };
    // a-3 is the last of its key, so nothing else is out of place without it.
    let verdict = judged(|_, lives, table| {
        lives[0].remove(3);
        table.rows.insert("a-3".to_owned(), bury("message is too large"));
    });
    assert!(verdict.is_clean(), "{}", verdict.describe());

    let verdict = judged(|_, lives, table| {
        lives[0].remove(3);
        table.rows.insert("a-3".to_owned(), bury("no ack within 5s"));
    });
    assert_eq!(verdict.counts(), [("lost", 1), ("dead without cause", 1)]);

    let history = History { committed: committed(), rolled_back: Vec::new() };
    let (lives, mut table) = ([stored(&history.committed)], table(&history.committed));
    table.rows.get_mut("b-1").unwrap().attempts = 2;
    let evident =
        Evident { lives: &lives, window: Duration::MAX, table: &table, cause: None, redelivered: 0 };
    assert_eq!(check_all(&history, evident).counts(), [("charged", 1)], "an outage is charged to no event");
}

#[test]
fn the_judge_admits_what_comes_again_after_the_window_and_nothing_sooner() {
    let again = |life: usize, after_s: u64| {
        judged(move |_, lives, _| {
            let mut copy = lives[0][1].clone();
            copy.at_ns += after_s * 1_000_000_000;
            lives.resize(life + 1, Vec::new());
            lives[life].push(copy);
        })
    };
    let within = again(0, 9);
    assert_eq!((within.counts(), within.admitted_duplicates), (vec![("duplicated", 1)], 0));
    let beyond = again(0, 11);
    assert_eq!((beyond.counts(), beyond.admitted_duplicates), (vec![], 1));
    let emptied = again(1, 9);
    assert_eq!((emptied.counts(), emptied.admitted_duplicates), (vec![], 1), "it remembers nothing");
}

#[test]
fn the_judge_does_not_take_a_later_life_of_a_stream_for_order() {
    let verdict = judged(|_, lives, _| {
        // Number 1 of key b comes for the first time after the stream was emptied, number 2 before.
        let first = lives[0].remove(2);
        lives.push(vec![first]);
    });
    assert_eq!(verdict.counts(), [("reordered", 1)]);
}

#[test]
fn a_claim_that_stays_open_is_found_in_the_table() {
    let db = harness::database();
    db.event("order.placed", "k", "{}");
    assert!(db.table().left_claimed.is_empty());
    let mut holder =
        postgres::Client::connect(&format!("{}?application_name=pg-outbox/x", db.dsn), postgres::NoTls);
    let holder = holder.as_mut().unwrap();
    holder.batch_execute("BEGIN; SELECT lane FROM outbox_lanes WHERE lane = 9 FOR UPDATE").unwrap();
    let left = db.table().left_claimed;
    assert_eq!(left.len(), 2, "{left:?}");
    assert!(left[0].contains("lane 9 ") && left[1].contains("pg-outbox/x"), "{left:?}");
}

#[test]
fn the_proxy_carries_delays_holds_back_and_cuts() {
    let nats = harness::stream::shared_nats();
    let proxy = Proxy::to(nats.port());
    let url = format!("nats://127.0.0.1:{}", proxy.port());
    let mut client = Client::connect(&url);
    client.subscribe("echo.proxy");
    let mut say = |text: &str, limit_ms: u64| {
        let begun = Instant::now();
        if !text.is_empty() {
            client.publish("echo.proxy", "", "", text.as_bytes());
        }
        let heard = client.next(Duration::from_millis(limit_ms));
        (heard.map(|message| String::from_utf8(message.payload).unwrap()), begun.elapsed())
    };
    assert_eq!(say("free", 5_000).0.as_deref(), Some("free"));

    proxy.set_both(Flow::Slow(Duration::from_millis(100)));
    let (heard, took) = say("slow", 5_000);
    assert_eq!(heard.as_deref(), Some("slow"));
    assert!(took >= Duration::from_millis(200), "{took:?}");

    for way in [Way::ToServer, Way::ToClient] {
        proxy.set_both(Flow::Free);
        proxy.set(way, Flow::Cut);
        assert_eq!(say("late", 300).0, None, "{way:?}");
        proxy.set(way, Flow::Free);
        assert_eq!(say("", 5_000).0.as_deref(), Some("late"), "{way:?}: held back, not lost");
    }
    proxy.refuse();
    assert!(say("", 5_000).1 < Duration::from_secs(4), "the connection has ended");
    proxy.admit();
    Client::connect(&url).flush();
}

#[test]
fn the_workload_records_exactly_what_is_in_the_table() {
    let db = harness::database();
    let workload =
        Workload { writers: 4, keys: 20, events: 400, rollback_percent: 30, ..Workload::default() };
    let history = harness::writers(&db.dsn, &workload);
    assert!(!history.rolled_back.is_empty());
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
        .query(
            "SELECT id::text, seq, xmin::text::int8, payload->>'key', (payload->>'n')::int8 FROM outboxes ORDER BY seq",
            &[],
        )
        .unwrap();
    let mut in_table = Vec::new();
    for row in rows {
        let n: i64 = row.get(4);
        in_table.push(Committed {
            id: row.get(0),
            seq: row.get(1),
            transaction: row.get(2),
            key: row.get(3),
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

#[test]
fn a_secret_that_is_printed_fails_the_test_and_is_not_shown_again() {
    // Built here, so that it stands in no output before it is planted.
    let secret = ["planted", "for", "this"].join("-");
    secrets::plant_value("url", &format!("nats://a:1,nats://user:{secret}@b:2"));
    for stream in ["1", "2"] {
        let mut command = std::process::Command::new("sh");
        command.args(["-c", "cat - >&$STREAM; exec sleep 600"]).env("STREAM", stream);
        let (input, mut written) = std::io::pipe().unwrap();
        command.stdin(input);
        std::io::Write::write_all(
            &mut written,
            format!("first\nlog in as user:{secret} failed\n").as_bytes(),
        )
        .unwrap();
        drop(written);
        let daemon = Daemon::run(command);
        let printed = || daemon.log() + &daemon.stdout();
        wait_until("it has printed", Duration::from_secs(10), &[], || printed().contains("failed"));
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(daemon))).unwrap_err();
        let said = caught.downcast_ref::<String>().unwrap();
        assert!(said.contains("line 2") && said.contains("log in as user:*** failed"), "{said}");
        assert!(!said.contains(&secret), "{said}");
    }
    assert!(secrets::shown_in("here", "nothing of it").is_none());
}
