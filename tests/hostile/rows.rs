//! Rows of every kind that a table can hold, in a table without our CHECKs, as an adopted one may be.

use std::collections::HashMap;
use std::process::Command;
use std::time::{Duration, Instant};

use pg_outbox::config::NatsAuth;
use pg_outbox::lab::sandbox::{NatsOptions, NatsServer};
use pg_outbox::nats::reader::StreamReader;
use postgres::{Client, NoTls};
use serde_json::json;

use super::super::delivery::wait_drained;
use super::super::harness::database::{migrate, shared_postgres};
use super::super::harness::stream::current_nats_server;
use super::super::harness::{
    Config, Daemon, Stored, TestDb, TestStream, database, start_nats, stream, unique, wait_until,
};

const LIMIT: Duration = Duration::from_secs(180);
/// Events of other keys, and how soon they must be there.
const OTHERS: i64 = 300;
const MOMENT: Duration = Duration::from_secs(10);
/// The same beside rows of which PostgreSQL makes 1 GB of text, which takes it some 5 s each time.
const LONG_MOMENT: Duration = Duration::from_secs(120);

/// What must become of a row.
#[derive(Debug, Clone, Copy)]
enum Expected {
    Published,
    /// Dead, with this in its reason.
    Dead(&'static str),
}
use Expected::{Dead, Published};

/// Values of other columns: all of these are published.
const COLUMNS: &[(&str, &str)] = &[
    ("created_at", "'infinity'"),
    ("created_at", "'-infinity'"),
    ("created_at", "'294276-12-31 23:59:59.999999+00'"),
    ("created_at", "'4713-01-01 00:00:00+00 BC'"),
    ("attempts", "NULL"),
    ("attempts", "2147483647"),
    ("attempts", "-2147483648"),
    ("next_attempt_at", "'infinity'"),
    ("next_attempt_at", "'-infinity'"),
    ("next_attempt_at", "'294276-12-31 23:59:59+00'"),
    ("next_attempt_at", "'4713-01-01 00:00:00+00 BC'"),
    ("last_error", "repeat('x', 1000000)"),
    ("seq", "-1"),
    ("seq", "0"),
    ("seq", "9223372036854775807"),
    ("seq", "-9223372036854775807"),
    ("seq", "5"),
    ("seq", "5"),
    ("id, created_at", "'00000000-0000-0000-0000-000000000000', now()"),
    ("id, created_at", "'00000000-0000-0000-0000-000000000000', now() - interval '1 day'"),
    ("id, created_at", "'00000000-0000-0000-0000-000000000000', 'infinity'"),
    ("id", "'ffffffff-ffff-ffff-ffff-ffffffffffff'"),
];

/// Topics, as SQL.
const TOPICS: &[(&str, Expected)] = &[
    ("'é.ü.😀'", Published),
    ("repeat('x', 255)", Published),
    ("repeat('😀', 255)", Published),
    ("rtrim(repeat('a.', 127), '.')", Published),
    ("'Nats-Msg-Id'", Published),
    ("'Nats-Rollup:all'", Published),
    ("'$JS.API.STREAM.DELETE.X'", Published),
    ("'_INBOX.x'", Published),
    ("'\"}{'", Published),
    ("'-ERR'", Published),
    ("''", Dead("empty token")),
    ("'*'", Dead("wildcard")),
    ("'>'", Dead("wildcard")),
    ("'a.*'", Dead("wildcard")),
    ("'a.>'", Dead("wildcard")),
    ("'>.a'", Dead("not its last")),
    ("'a*b'", Dead("wildcard")),
    ("'.'", Dead("empty token")),
    ("'a..b'", Dead("empty token")),
    ("'a.'", Dead("empty token")),
    ("' '", Dead("blank")),
    ("'a b'", Dead("blank")),
    ("E'a\\r\\nPUB evil 4\\r\\nevil'", Dead("blank or a control")),
    ("E'a\\tb'", Dead("blank")),
    ("E'a\\u0085'", Dead("control")),
    ("E'a\\u00a0b'", Dead("blank")),
    ("E'a\\u2028b'", Dead("blank")),
    ("E'a\\u007fb'", Dead("control")),
];

/// Metadata, as SQL: what cannot be a header is left out, and the rest published. A key is a header too.
const METADATA: &[(&str, Expected)] = &[
    ("NULL", Published),
    ("'null'", Published),
    ("'[]'", Published),
    ("'\"text\"'", Published),
    ("'5'", Published),
    ("'{}'", Published),
    ("'{\"\": \"\"}'", Published),
    ("'{\"ordering-key\": null}'", Published),
    ("'{\"ordering-key\": \"\"}'", Published),
    ("'{\"ordering-key\": {\"deep\": [1]}}'", Published),
    ("jsonb_build_object('ordering-key', repeat('k', 100000))", Dead("over JetStream's limit")),
    ("jsonb_build_object('ordering-key', 1e131071::numeric, 'x', 'short')", Dead("over JetStream's limit")),
    ("'{\"a\\r\\nNats-Msg-Id: x\": 1, \"v\": \"a\\r\\n\\r\\nPUB x 0\\r\\n\\r\\n\"}'", Published),
    (
        "'{\"Nats-Msg-Id\": \"x\", \"nats-msg-id\": \"x\", \"Nats-Rollup\": \"all\", \"Nats-Expected-Last-Sequence\": \"7\"}'",
        Published,
    ),
    (
        "'{\"Nats-Batch-Id\": \"b\", \"Nats-Batch-Commit\": \"1\", \"Nats-TTL\": \"1s\", \"Nats-Schedule\": \"@every 1s\"}'",
        Published,
    ),
    ("'{\"X\": \"Nats-Msg-Id: x\", \"X-Nats-Msg-Id\": \"x\", \"Y\": \"Nats-Expected-Stream:x\"}'", Published),
    ("'{\"NATS/1.0 503\": \"x\", \"Status\": \"503\", \"Description\": \"No Responders\"}'", Published),
    (
        "'{\"a\": \"NATS/1.0\\r\\n\\r\\n\", \"b\": \"\\u0001\\u007f\\u0085\\u2028\", \"c\": \"😀\\ufeff\"}'",
        Published,
    ),
    // Every character of one byte, and some of more, as a name.
    ("(SELECT jsonb_object_agg(chr(n), chr(n) || 'x' || chr(n)) FROM generate_series(1, 400) n)", Published),
    ("(SELECT jsonb_object_agg('X-' || chr(n) || 'Y', chr(n)) FROM generate_series(1, 400) n)", Published),
    // What becomes no header is no matter of size.
    ("(SELECT jsonb_object_agg('null ' || n, NULL) FROM generate_series(1, 10000) n)", Published),
];

/// Rows that are heavy, or that become heavy: payload, metadata.
const HEAVY: &[(&str, &str, Expected)] = &[
    ("(repeat('[', 1000) || repeat(']', 1000))::jsonb", "'{}'", Published),
    ("'{}'", "jsonb_build_object('deep', (repeat('[', 1000) || repeat(']', 1000))::jsonb)", Published),
    ("(SELECT jsonb_agg(chr(n)) FROM generate_series(1, 55295) n)", "'{}'", Published),
    ("to_jsonb(repeat('x', 7000000))", "'{}'", Published),
    ("(SELECT to_jsonb(string_agg(md5(n::text), '')) FROM generate_series(1, 200000) n)", "'{}'", Published),
    (
        "'{}'",
        "(SELECT jsonb_object_agg('Field-' || n, 'Nats-' || n) FROM generate_series(1, 200000) n)",
        Dead("over JetStream's limit of 65535 B"),
    ),
    ("'{}'", "jsonb_build_object('x', repeat('x', 60000000))", Dead("max_payload")),
    ("to_jsonb(repeat('x', 60000000))", "'{}'", Dead("max_payload")),
    // 300 bytes on disk, 131 MB as text.
    ("to_jsonb(array_fill(1e131071::numeric, ARRAY[1000]))", "'{}'", Dead("max_payload")),
    ("'{}'", "jsonb_build_object('x', array_fill(1e131071::numeric, ARRAY[500]))", Dead("max_payload")),
    // More text than PostgreSQL can make of one value.
    ("to_jsonb(array_fill(1e131071::numeric, ARRAY[9000]))", "'{}'", Dead("PostgreSQL cannot hand it over")),
];

/// A table without our CHECKs.
pub(super) fn adopted() -> TestDb {
    let db = database();
    db.execute(
        "ALTER TABLE outboxes DROP CONSTRAINT outboxes_metadata_is_object,
                              DROP CONSTRAINT outboxes_topic_is_literal_subject",
    );
    db
}

/// Inserts one row and, behind it, a good one of the same key.
fn insert(db: &TestDb, columns: &str, values: &str, expected: Expected) -> (i64, Expected) {
    let mut client = db.client();
    let sql = format!(
        "INSERT INTO outboxes ({columns}) VALUES ({values}) RETURNING seq, outbox_key(topic, metadata)"
    );
    let row = client.query_one(&sql, &[]).unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    let (seq, key): (i64, String) = (row.get(0), row.get(1));
    let behind = "INSERT INTO outboxes (topic, metadata, payload)
                  VALUES ('behind', jsonb_build_object('ordering-key', $1::text), '{}')";
    client.execute(behind, &[&key]).unwrap();
    (seq, expected)
}

fn servers() -> [NatsServer; 2] {
    let config = "max_payload: 8MB".to_owned();
    let current = NatsOptions { program: Some(current_nats_server()), config: config.clone() };
    [start_nats(&config), NatsServer::start(&current).unwrap()]
}

#[test]
fn rows_of_every_kind_are_published_or_die_with_a_reason() {
    for nats in servers() {
        let db = adopted();
        let stream = TestStream::on(&nats.url(), &json!({}));
        let mut rows = Vec::new();
        for (number, (column, value)) in COLUMNS.iter().enumerate() {
            let columns = format!("topic, metadata, payload, {column}");
            let values = format!("'col.x', '{{\"ordering-key\": \"c{number}\"}}', '{{}}', {value}");
            rows.push(insert(&db, &columns, &values, Published));
        }
        for (topic, expected) in TOPICS {
            rows.push(insert(&db, "topic, payload", &format!("{topic}, '{{}}'"), *expected));
        }
        for (metadata, expected) in METADATA {
            let values = format!("'meta.x', {metadata}, '{{\"n\": 1.10}}'");
            rows.push(insert(&db, "topic, metadata, payload", &values, *expected));
        }
        judge(&db, &stream, &rows, MOMENT);
    }
}

#[test]
fn rows_of_every_weight_are_published_or_die_with_a_reason() {
    for nats in servers() {
        let db = adopted();
        let stream = TestStream::on(&nats.url(), &json!({}));
        let mut rows = Vec::new();
        for (number, (payload, metadata, expected)) in HEAVY.iter().enumerate() {
            let values =
                format!("'heavy.x', jsonb_set({metadata}, '{{ordering-key}}', '\"h{number}\"'), {payload}");
            rows.push(insert(&db, "topic, metadata, payload", &values, *expected));
        }
        judge(&db, &stream, &rows, LONG_MOMENT);
    }
}

/// Lets the daemon have the rows, together with events of other keys, and looks at what comes of all of them.
fn judge(db: &TestDb, stream: &TestStream, rows: &[(i64, Expected)], moment: Duration) {
    db.events("good.x", OTHERS, 100);
    let config = Config::new(db, stream).set("dispatcher.fallback_interval", "1s");
    let daemon = Daemon::start(&config);
    let begun = Instant::now();
    let good = "SELECT count(*) FROM outboxes WHERE topic = 'good.x' AND published_at IS NOT NULL";
    wait_until("the other keys are published", moment, &[&daemon, db], || db.number(good) == OTHERS);
    println!("other keys after {:.1?}", begun.elapsed());
    wait_drained(db, stream, &[&daemon], LIMIT);
    println!("all rows after {:.1?}", begun.elapsed());
    let mut client = db.client();
    for (seq, expected) in rows {
        let found = client
            .query(
                "SELECT dead_at IS NOT NULL, coalesce(last_error, ''), attempts FROM outboxes WHERE seq = $1",
                &[seq],
            )
            .unwrap();
        for row in found {
            let (dead, error): (bool, String) = (row.get(0), row.get(1));
            match expected {
                Published => assert!(!dead, "{seq}: {error}"),
                Dead(reason) => assert!(dead && error.contains(reason), "{seq}: {reason} {dead} {error}"),
            }
        }
    }
    let behind = "SELECT count(*) FROM outboxes WHERE topic = 'behind' AND published_at IS NULL
                     AND octet_length(outbox_key(topic, metadata)) < 60000";
    assert_eq!(db.number(behind), 0, "a dead letter lets its key go on");
    assert!(daemon.log_lines("outage begins").is_empty(), "{}", daemon.log());
    assert!(daemon.log_lines("panicked").is_empty(), "{}", daemon.log());
    assert_eq!(daemon.get("/ready").0, 200);
    judge_stream(db, stream);
}

/// What is published is in the stream once, on its subject, with its id and its payload, whoever reads it.
pub(super) fn judge_stream(db: &TestDb, stream: &TestStream) {
    let rows = db
        .client()
        .query(
            "SELECT DISTINCT ON (id) id::text, topic, payload::text FROM outboxes
              WHERE published_at IS NOT NULL ORDER BY id, seq",
            &[],
        )
        .unwrap();
    let messages = stream.messages();
    let by_id: HashMap<&str, &Stored> =
        messages.iter().map(|stored| (stored.msg_id.as_str(), stored)).collect();
    assert_eq!((messages.len(), by_id.len()), (rows.len(), rows.len()), "each id once");
    for row in &rows {
        let (id, topic, payload): (&str, &str, &str) = (row.get(0), row.get(1), row.get(2));
        let message = by_id.get(id).unwrap_or_else(|| panic!("{id} {topic} is not in the stream"));
        // Rows with one id are one event, and the stream has any one of them.
        if !id.starts_with("00000000") {
            assert_eq!(message.subject, stream.subject(topic));
        }
        assert!(message.payload == payload.as_bytes(), "{id} {topic}: another payload");
        judge_headers(message, stream);
    }
    let ours: Vec<String> = messages.iter().map(line).collect();
    assert_eq!(ours, read_by_the_crate(stream, messages.len()), "the nats crate reads another stream");
    assert_eq!(ours, read_by_python(stream, messages.len()), "nats-py reads another stream");
}

fn judge_headers(message: &Stored, stream: &TestStream) {
    let ours = format!(
        "NATS/1.0\r\nNats-Msg-Id:{}\r\nNats-Expected-Stream: {}\r\nOutbox-Seq: ",
        message.msg_id, stream.name
    );
    assert!(message.headers.starts_with(&ours), "{}", message.headers);
    let block = message.headers.strip_suffix("\r\n\r\n").unwrap();
    for header in block.split("\r\n").skip(1) {
        let (name, value) = header.split_once(':').unwrap_or_else(|| panic!("{header:?}"));
        assert!(name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b':'), "{header:?}");
        assert!(!value.contains(char::is_control), "{header:?}");
    }
    for command in ["Nats-Msg-Id", "Nats-Expected-", "Nats-Rollup", "Nats-TTL", "Nats-Batch", "Nats-Schedule"]
    {
        let own = usize::from(["Nats-Msg-Id", "Nats-Expected-"].contains(&command));
        assert_eq!(message.headers.matches(command).count(), own, "{}", message.headers);
    }
}

fn line(message: &Stored) -> String {
    format!("{} {} {}", message.subject, message.msg_id, sha256(&message.payload))
}

fn sha256(bytes: &[u8]) -> String {
    use std::io::Write;
    let mut child = Command::new("sha256sum")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap()[..64].to_owned()
}

fn read_by_the_crate(stream: &TestStream, count: usize) -> Vec<String> {
    let mut reader = StreamReader::open(&stream.url, &NatsAuth::None, &stream.name).unwrap();
    let mut next = || reader.next(Duration::from_secs(20)).unwrap().expect("another message");
    let read = |_| {
        let stored = next();
        let id = stored.message_id.unwrap_or_default();
        format!("{} {id} {}", stored.subject, sha256(&stored.payload))
    };
    (0..count).map(read).collect()
}

fn read_by_python(stream: &TestStream, count: usize) -> Vec<String> {
    let root = env!("CARGO_MANIFEST_DIR");
    let output = Command::new("python3")
        .arg(format!("{root}/tests/hostile/read_stream.py"))
        .args([&stream.url, &stream.name, &count.to_string()])
        .env("PYTHONPATH", format!("{root}/target/servers/python"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

/// A database in SQL_ASCII takes any bytes for text, also in JSON.
#[test]
fn a_row_that_is_not_utf8_dies_and_delays_nobody() {
    let postgres = shared_postgres();
    let name = unique("test_");
    let mut admin = Client::connect(&postgres.dsn("postgres"), NoTls).unwrap();
    let create = format!("CREATE DATABASE {name} ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0");
    admin.batch_execute(&create).unwrap();
    let db = TestDb { dsn: postgres.dsn(&name), name };
    let stream = stream();
    migrate(postgres, &db.name);
    let rows = [
        r#"'t', '{"ordering-key": "p"}', E'"\xff"'::jsonb"#,
        r#"'t', E'{"ordering-key": "m", "x": "\xc3("}'::jsonb, '1'"#,
        r#"'t', E'{"ordering-key": "\x80"}'::jsonb, '1'"#,
        r#"E't\xfe', '{"ordering-key": "t"}', '1'"#,
    ];
    for values in rows {
        db.execute(&format!("INSERT INTO outboxes (topic, metadata, payload) VALUES ({values})"));
    }
    db.events("good.x", OTHERS, 100);
    let daemon = Daemon::start(&Config::new(&db, &stream));
    wait_until("nothing is pending", Duration::from_secs(20), &[&daemon], || db.pending() == 0);
    let utf8 = "SELECT count(*) FROM outboxes WHERE last_error LIKE '%cannot hand it over: 22021%' AND dead_at IS NOT NULL";
    assert_eq!(db.number(utf8), 4);
    assert_eq!(stream.count(), u64::try_from(OTHERS).unwrap());
}

/// Keys that somebody has chosen for their hash: they all wait for each other's lane, and nobody else does.
#[test]
fn keys_of_one_lane_delay_no_other_lane() {
    const MANY: i64 = 20_000;
    let (db, stream) = (database(), stream());
    db.execute(&format!(
        "INSERT INTO outboxes (topic, metadata, payload)
         SELECT 'crowd.x', metadata, '{{}}'
           FROM (SELECT jsonb_build_object('ordering-key', 'k' || n) AS metadata FROM generate_series(1, 100 * {MANY}) n) keys
          WHERE outbox_lane('crowd.x', metadata) = 7
          LIMIT {MANY}"
    ));
    assert_eq!(db.pending(), MANY);
    let daemon = Daemon::start(&Config::new(&db, &stream));
    db.events("good.x", OTHERS, 100);
    let others = "SELECT count(*) FROM outboxes WHERE topic = 'good.x' AND outbox_lane(topic, metadata) <> 7";
    assert!(db.number(others) > OTHERS / 2);
    let waiting = format!("{others} AND published_at IS NULL");
    wait_until("the other lanes are published", MOMENT, &[&daemon, &db], || db.number(&waiting) == 0);
    let crowd = db.number("SELECT count(*) FROM outboxes WHERE topic = 'crowd.x' AND published_at IS NULL");
    assert!(crowd > 0, "there was no crowd");
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    assert_eq!(stream.count(), u64::try_from(MANY + OTHERS).unwrap());
}

/// The most memory that a process has had, in bytes.
fn peak_memory(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// What claims may hold in the tests of memory, and what the program takes beside events.
const IN_FLIGHT: u64 = 64 << 20;
const PROGRAM: u64 = 64 << 20;

fn bounded_config(db: &TestDb, stream: &TestStream) -> Config {
    Config::new(db, stream)
        .set("dispatcher.workers", 8)
        .set("database.max_connections", 12)
        .set("dispatcher.max_in_flight_bytes", "64MiB")
        .set("nats.ack_timeout", "60s")
}

/// What is in flight is bounded for all workers together. Beside it stands the event that is being read, in up to four
/// copies: the driver's buffer, which doubles as it grows, the row, and the text.
#[test]
fn memory_is_bounded_whatever_the_payloads() {
    const LARGE: u64 = 60_000_000;
    let db = database();
    let nats = start_nats("max_payload: 64MB\nmax_pending: 256MB");
    let stream = TestStream::on(&nats.url(), &json!({}));
    let config = bounded_config(&db, &stream);
    let daemon = Daemon::start(&config);
    daemon.wait_ready();
    // While the server stands still, every claim stays with its worker.
    nats.pause().unwrap();
    let insert = "INSERT INTO outboxes (topic, metadata, payload)
                  SELECT 'large.x', jsonb_build_object('ordering-key', 'k' || n), to_jsonb(repeat('x', 60000000))
                    FROM generate_series(1, 6) n";
    db.execute(insert);
    // These can be no message: they stay in the database.
    db.execute(&insert.replace("60000000", "120000000").replace("6) n", "2) n"));
    wait_until("nothing more is claimed", LIMIT, &[&daemon, &db], || {
        let claimed = peak_memory(daemon.pid());
        std::thread::sleep(Duration::from_secs(4));
        claimed > LARGE && peak_memory(daemon.pid()) == claimed
    });
    nats.resume().unwrap();
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    let peak = peak_memory(daemon.pid());
    println!("peak {} MB", peak / 1_000_000);
    assert_eq!((db.dead(), db.published()), (2, 6), "{}", daemon.log());
    assert!(peak < IN_FLIGHT + 4 * LARGE + PROGRAM, "{peak} B");
}

/// Workers read at the same time, each its share, row by row: beside what they hold stands no more than a few rows.
#[test]
fn memory_is_bounded_while_every_worker_reads() {
    let db = database();
    let nats = start_nats("max_payload: 8MB\nmax_pending: 256MB");
    let stream = TestStream::on(&nats.url(), &json!({}));
    let config = bounded_config(&db, &stream).set("dispatcher.batch_size", 5_000);
    db.execute(
        "INSERT INTO outboxes (topic, metadata, payload)
         SELECT 'large.x', jsonb_build_object('ordering-key', 'k' || n), to_jsonb(repeat('x', 500000))
           FROM generate_series(1, 600) n",
    );
    let daemon = Daemon::start(&config);
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    let peak = peak_memory(daemon.pid());
    println!("peak {} MB", peak / 1_000_000);
    assert_eq!((db.dead(), db.published()), (0, 600), "{}", daemon.log());
    assert!(peak < IN_FLIGHT + IN_FLIGHT / 2 + PROGRAM, "{peak} B");
}
