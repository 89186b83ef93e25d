//! `pg-outbox replay`: what was published goes out again, in order, stored again, and out of the way of live events.

use std::collections::HashMap;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use serde_json::{Value, json};

use super::delivery::wait_drained;
use pg_outbox::lab::sandbox::StoreState;

use super::harness::daemon::pg_outbox;
use super::harness::workload::writers_until;
use super::harness::{
    Config, Daemon, Stored, TestDb, TestStream, Workload, check_history, database, secrets, stream,
    wait_until,
};

const LIMIT: Duration = Duration::from_secs(60);

/// The command `pg-outbox replay` with this configuration, which lives as long as what comes with it.
fn command(config: &Config, arguments: &[&str]) -> (Command, tempfile::NamedTempFile) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), config.yaml()).unwrap();
    let program = pg_outbox();
    let mut command = Command::new(program.get_program());
    for (name, value) in program.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.arg("--config").arg(file.path()).arg("replay").args(arguments).stdin(Stdio::null());
    (command, file)
}

fn replay(config: &Config, arguments: &[&str]) -> Output {
    let (mut command, _file) = command(config, arguments);
    let output = command.output().unwrap();
    secrets::assert_none_printed(&output);
    output
}

#[track_caller]
fn replay_json(config: &Config, arguments: &[&str]) -> Value {
    let output = replay(config, &[&["--yes", "--json"], arguments].concat());
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn seq(message: &Stored) -> i64 {
    message.header("Outbox-Seq").unwrap().parse().unwrap()
}

/// Publishes `count` events over `keys` keys and returns when they are settled.
fn publish(db: &TestDb, stream: &TestStream, daemon: &Daemon, count: i64, keys: i64) {
    db.events("order.placed", count, keys);
    wait_drained(db, stream, &[daemon], LIMIT);
}

/// The messages of a replay, each key's seqs in the order in which the stream has them.
fn by_key(messages: &[Stored]) -> HashMap<String, Vec<i64>> {
    let mut keys: HashMap<String, Vec<i64>> = HashMap::new();
    for message in messages {
        keys.entry(message.header("ordering-key").unwrap().to_owned()).or_default().push(seq(message));
    }
    keys
}

#[test]
fn what_was_published_is_stored_again_in_order_within_the_duplicate_window() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream);
    let daemon = Daemon::start(&config);
    publish(&db, &stream, &daemon, 1_200, 7);
    let rows = "SELECT md5(string_agg(o::text, ',' ORDER BY seq)) FROM outboxes o";
    let text = |query: &str| -> String { db.client().query_one(query, &[]).unwrap().get(0) };
    let before = text(rows);
    let first = stream.messages();

    let done = replay_json(&config, &["--all", "--rate", "100000", "--name", "again"]);
    assert_eq!(
        (&done["sent"], &done["complete"], &done["last_seq"]),
        (&1_200.into(), &true.into(), &1_200.into())
    );
    let messages = stream.messages();
    let again = &messages[first.len()..];
    assert_eq!(again.len(), 1_200, "stored, though the stream knows the events' own ids");
    for seqs in by_key(again).values() {
        assert!(seqs.is_sorted(), "{seqs:?}");
    }
    let original: HashMap<i64, &Stored> = first.iter().map(|message| (seq(message), message)).collect();
    for message in again {
        let original = original[&seq(message)];
        assert_eq!(message.msg_id, format!("{}.again", original.msg_id));
        assert_eq!((&message.subject, &message.payload), (&original.subject, &original.payload));
        assert_eq!(message.header("Outbox-Replay"), Some("again"));
        assert_eq!(message.header("Outbox-Attempt"), original.header("Outbox-Attempt"));
    }
    assert_eq!(before, text(rows), "no row changed");

    // The same once more is dropped by the stream, under another name it is not.
    replay_json(&config, &["--all", "--rate", "100000", "--name", "again"]);
    assert_eq!(stream.count(), 2_400);
    replay_json(&config, &["--all", "--rate", "100000"]);
    assert_eq!(stream.count(), 3_600);
}

#[test]
fn a_selection_and_a_prefix_say_what_goes_where() {
    let (db, stream, other) = (database(), stream(), stream());
    let config = Config::new(&db, &stream);
    let daemon = Daemon::start(&config);
    let placed = db.event("order.placed", "a", "{}");
    let paid = db.event("order.paid", "b", "{}");
    let created = db.event("user.created", "a", "{}");
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    drop(daemon);
    let dead = db.event("order.placed", "a", "{}");
    let pending = db.event("order.placed", "a", "{}");
    db.execute(&format!(
        "UPDATE outboxes SET dead_at = now() WHERE seq = {dead};
         UPDATE outboxes SET created_at = now() - interval '40 days' WHERE seq = {created}"
    ));
    let id: String =
        db.client().query_one("SELECT id::text FROM outboxes WHERE seq = $1", &[&paid]).unwrap().get(0);
    let cases: [(&[&str], &[i64]); 9] = [
        (&["--all"], &[placed, paid, created]),
        (&["--topic", "order.*"], &[placed, paid]),
        (&["--key", "a"], &[placed, created]),
        (&["--since", "2h"], &[placed, paid]),
        (&["--until", "2h"], &[created]),
        (&["--all", "--after", "1"], &[paid, created]),
        (&["--all", "--limit", "2"], &[placed, paid]),
        (&[&id], &[paid]),
        (&["--key", "nobody"], &[]),
    ];
    let prefix = format!("{}.again", other.prefix);
    for (selection, expected) in cases {
        let before = other.messages().len();
        let to = ["--prefix", &prefix, "--stream", &other.name];
        let done = replay_json(&config, &[selection, &to].concat());
        assert_eq!(done["sent"], expected.len(), "{selection:?}");
        let seqs: Vec<i64> = other.messages()[before..].iter().map(seq).collect();
        assert_eq!(seqs.len(), expected.len(), "{selection:?}: {seqs:?}");
        assert!(expected.iter().all(|seq| seqs.contains(seq)), "{selection:?}: {seqs:?}");
    }
    assert_eq!(
        stream.count(),
        3,
        "nothing went to the stream of the live events; {pending} is not published"
    );
    assert_eq!(other.messages()[0].subject, format!("{prefix}.{}", stream.subject("order.placed")));
}

#[test]
fn nothing_is_sent_without_a_clear_word() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream);
    let daemon = Daemon::start(&config);
    publish(&db, &stream, &daemon, 3, 3);
    let refused: [(&[&str], i32, &str); 5] = [
        (&["--yes"], 1, "which ones?"),
        (&["--all"], 1, "replay 3 published events: nothing done, as there is no terminal"),
        (&["--all", "--yes", "--name", "a b"], 1, "--name"),
        (&["--all", "--yes", "--prefix", "a.*"], 1, "--prefix"),
        (&["--all", "--yes", "--rate", "0"], 2, "--rate"),
    ];
    for (arguments, code, why) in refused {
        let output = replay(&config, arguments);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {output:?}");
        assert!(stderr(&output).contains(why), "{arguments:?}: {output:?}");
    }
    let output = replay(&config, &["--all", "--dry-run"]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "would replay 3 published events\n");
    assert_eq!(stream.count(), 3);
    let output = replay(&config, &["--all", "--yes", "--prefix", "nowhere"]);
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    assert!(said.contains("is refused: no stream takes subject nowhere."), "{said}");
}

#[test]
fn a_replay_beside_live_events_reorders_and_delays_none() {
    let (db, stream, other) = (database(), stream(), stream());
    let config = Config::new(&db, &stream);
    let daemon = Daemon::start(&config);
    publish(&db, &stream, &daemon, 3_000, 50);
    let old = stream.count();
    let stop = AtomicBool::new(false);
    let workload = Workload { writers: 4, pause: Duration::from_millis(2), ..Workload::default() };
    let prefix = format!("{}.again", other.prefix);
    let (history, done) = thread::scope(|scope| {
        let writing = scope.spawn(|| writers_until(&db.dsn, &workload, &stop));
        let arguments =
            ["--all", "--limit", "3000", "--rate", "1500", "--prefix", &prefix, "--stream", &other.name];
        let done = std::panic::catch_unwind(|| replay_json(&config, &arguments));
        let during = db.published();
        stop.store(true, Ordering::Relaxed);
        let history = writing.join().unwrap();
        assert!(during > 3_000, "live events were published meanwhile");
        (history, done.unwrap())
    });
    assert_eq!(done["sent"], 3_000);
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    let live = &stream.messages()[usize::try_from(old).unwrap()..];
    check_history(&history.committed, live).assert_clean();
    let again = other.messages();
    assert_eq!(again.len(), 3_000);
    assert!(by_key(&again).values().all(|seqs| seqs.is_sorted()));
    assert!(daemon.log_lines("rows changed under the claim").is_empty(), "{}", daemon.log());
}

#[test]
fn a_replay_that_was_cut_short_says_how_to_go_on() {
    let (db, stream, other) = (database(), stream(), stream());
    let config = Config::new(&db, &stream);
    let daemon = Daemon::start(&config);
    publish(&db, &stream, &daemon, 400, 20);
    let prefix = format!("{}.again", other.prefix);
    let to =
        ["--all", "--yes", "--prefix", &prefix, "--stream", &other.name, "--rate", "100", "--name", "n1"];
    let (mut command, _file) = command(&config, &to);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("some of it was sent", LIMIT, &[&other], || other.count() >= 40);
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    secrets::assert_none_printed(&output);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("of 400: name=n1 last_seq="), "{said}");
    let (_, after) = said.split_once("--after ").unwrap();
    let (after, rest) = after.split_once(' ').unwrap();
    assert_eq!(rest, "--name n1\n", "{said}");
    let sent = other.count();
    assert!(sent < 400 && sent == after.parse::<u64>().unwrap(), "{said}: {sent}");
    let done = replay_json(&config, &[&to[..1], &to[2..], &["--after", after]].concat());
    assert_eq!(done["sent"], 400 - sent);
    let again = other.messages();
    assert_eq!(again.len(), 400);
    assert!(by_key(&again).values().all(|seqs| seqs.is_sorted()));
}

#[test]
fn one_replay_at_a_time_and_none_after_a_crash_stays_in_the_way() {
    let (db, stream, other) = (database(), stream(), stream());
    let config = Config::new(&db, &stream);
    let daemon = Daemon::start(&config);
    publish(&db, &stream, &daemon, 300, 20);
    let prefix = format!("{}.again", other.prefix);
    let to = ["--all", "--yes", "--prefix", &prefix, "--stream", &other.name, "--rate", "20", "--name", "n"];
    let (mut command, _file) = command(&config, &to);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_until("it is on its way", LIMIT, &[&other], || other.count() > 0);
    let second = replay(&config, &to);
    assert_eq!(second.status.code(), Some(1), "{second:?}");
    assert!(stderr(&second).contains("somebody else replays this outbox"), "{second:?}");
    // It holds no snapshot that vacuum would wait for, nor any lock on the table.
    let idle = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pg-outbox/replay'
                   AND datname = current_database() AND xact_start IS NOT NULL";
    wait_until("it is between two transactions", LIMIT, &[&db], || db.number(idle) == 0);
    child.kill().unwrap();
    child.wait().unwrap();
    wait_until("its turn is over", LIMIT, &[&db], || {
        let output = replay(&config, &["--all", "--dry-run"]);
        output.status.success()
    });
    let done = replay_json(&config, &[&to[..1], &to[2..6], &["--rate", "100000", "--name", "n"]].concat());
    assert_eq!(done["sent"], 300);
    assert_eq!(other.count(), 300, "what had been sent before the crash was not stored twice");
}

#[test]
fn an_outage_in_the_middle_is_outlasted() {
    let db = database();
    let mut nats = super::harness::start_nats("");
    let stream = TestStream::on(&nats.url(), &json!({}));
    let config = Config::new(&db, &stream).set("nats.ack_timeout", "1s");
    let daemon = Daemon::start(&config);
    publish(&db, &stream, &daemon, 300, 20);
    drop(daemon);
    thread::scope(|scope| {
        let replaying = scope.spawn(|| replay_json(&config, &["--all", "--rate", "100", "--name", "n"]));
        wait_until("some of it was sent", LIMIT, &[&nats], || stream.count() >= 330);
        nats.kill().unwrap();
        nats.start_again(StoreState::Kept).unwrap();
        assert_eq!(replaying.join().unwrap()["sent"], 300);
    });
    let messages = stream.messages();
    assert_eq!(messages.len(), 600);
    assert!(by_key(&messages[300..]).values().all(|seqs| seqs.is_sorted()));
}

#[test]
fn the_rate_is_kept() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream);
    let daemon = Daemon::start(&config);
    publish(&db, &stream, &daemon, 60, 20);
    let started = Instant::now();
    replay_json(&config, &["--all", "--rate", "30"]);
    assert!(started.elapsed() >= Duration::from_millis(1_900), "{:?}", started.elapsed());
}
