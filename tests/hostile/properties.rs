//! Rows of any kind, thought up by proptest: any text as a topic, any JSON as metadata and payload.
//!
//! Each case is a few rows that go through the built program to a real server: all of them end, published or dead with a
//! reason, and so do good events of other keys beside them. In the end three clients read the stream. A case that fails
//! is made as small as it goes and printed. tests/fuzz.sh tries many more cases than a test run does.

use std::time::Duration;

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use proptest::test_runner::{Config as Cases, TestCaseError, TestRunner};
use serde_json::{Map, Number, Value, json};

use super::super::delivery::wait_drained;
use super::super::harness::stream::{current_nats, shared_nats};
use super::super::harness::{Config, Daemon, TestDb, TestStream};
use super::rows::{adopted, judge_stream};

/// How many cases are tried, on each server.
const CASES_VARIABLE: &str = "PG_OUTBOX_FUZZ_CASES";
const CASES: u32 = 8;
const ROWS_MAX: usize = 30;
const LIMIT: Duration = Duration::from_secs(60);

/// What has a meaning to a server, to a client, or to us.
const WORDS: &[&str] = &[
    "Nats-Msg-Id",
    "nats-msg-id:",
    "Nats-Rollup",
    "Nats-Expected-Stream: x",
    "Nats-TTL",
    "Nats-",
    "Outbox-Seq",
    "NATS/1.0\r\n\r\n",
    "\r\n",
    "\n",
    "\r",
    ": ",
    "ordering-key",
    "*",
    ">",
    ".",
    "..",
    "a.*",
    "$JS.API.INFO",
    "_INBOX.a",
    "-ERR",
    "+OK",
    "PUB x 0",
    "HPUB",
    "\u{feff}",
    "\u{202e}",
    "\u{7f}",
    "\u{85}",
    "\u{2028}",
    "é",
    "e\u{301}",
    "😀",
    "\\",
    "\"",
    "\\u0000",
    "{{",
    "' OR 1=1 --",
    "$1",
    "%s",
    "Status",
    "503",
    " ",
    "\t",
];

#[derive(Debug, Clone)]
struct Row {
    topic: String,
    metadata: Option<Value>,
    payload: Value,
}

/// Text without U+0000, which PostgreSQL takes in no text.
fn text() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        3 => proptest::sample::select(WORDS).prop_map(str::to_owned),
        2 => "[a-zA-Z0-9_-]{1,8}",
        1 => any::<char>().prop_map(|character| character.to_string()),
    ];
    vec(part, 0..6).prop_map(|parts| parts.concat().replace('\0', ""))
}

/// A topic that is mostly none; four of ten are.
fn topic() -> impl Strategy<Value = String> {
    prop_oneof![3 => text(), 2 => "[a-z]{1,6}(\\.[a-zA-Z0-9$_-]{1,6}){0,4}"]
        .prop_map(|topic| topic.chars().take(255).collect())
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::Bool),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(|number| Number::from_f64(number).map_or(Value::Null, Value::Number)),
        text().prop_map(Value::String),
    ];
    leaf.prop_recursive(6, 60, 8, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..8).prop_map(Value::Array),
            btree_map(text(), inner, 0..8).prop_map(object)
        ]
    })
}

fn object(fields: std::collections::BTreeMap<String, Value>) -> Value {
    Value::Object(fields.into_iter().collect::<Map<String, Value>>())
}

fn row() -> impl Strategy<Value = Row> {
    let metadata = prop_oneof![
        1 => Just(None),
        1 => value().prop_map(Some),
        // All of them in a few keys, so that rows wait for each other.
        4 => (btree_map(text(), value(), 0..8), 0..4).prop_map(|(mut fields, key)| {
            fields.insert("ordering-key".to_owned(), json!(format!("k{key}")));
            Some(object(fields))
        }),
    ];
    (topic(), metadata, value()).prop_map(|(topic, metadata, payload)| Row { topic, metadata, payload })
}

struct Stage {
    db: TestDb,
    stream: TestStream,
    daemon: Daemon,
}

impl Stage {
    fn on(url: &str) -> Stage {
        let (db, stream) = (adopted(), TestStream::on(url, &json!({})));
        let daemon = Daemon::start(&Config::new(&db, &stream).set("logging.level", "info"));
        Stage { db, stream, daemon }
    }

    /// Whether all rows of a case come to an end.
    fn end(&mut self, rows: &[Row]) -> Result<(), TestCaseError> {
        let mut client = self.db.client();
        let insert =
            "INSERT INTO outboxes (topic, metadata, payload) VALUES ($1, $2::text::jsonb, $3::text::jsonb)";
        for row in rows {
            let metadata = row.metadata.as_ref().map(ToString::to_string);
            client.execute(insert, &[&row.topic, &metadata, &row.payload.to_string()])?;
        }
        self.db.events("good", 10, 10);
        wait_drained(&self.db, &self.stream, &[&self.daemon], LIMIT);
        prop_assert!(self.daemon.running(), "{}", self.daemon.log());
        let unexplained =
            "SELECT count(*) FROM outboxes WHERE dead_at IS NOT NULL AND coalesce(last_error, '') = ''";
        prop_assert_eq!(self.db.number(unexplained), 0);
        let good = "SELECT count(*) FROM outboxes WHERE topic = 'good' AND dead_at IS NOT NULL";
        prop_assert_eq!(self.db.number(good), 0);
        Ok(())
    }
}

fn every_row_comes_to_an_end(url: &str) {
    let cases = std::env::var(CASES_VARIABLE).map_or(CASES, |cases| cases.parse().unwrap());
    let mut runner = TestRunner::new(Cases {
        cases,
        max_shrink_iters: 200,
        failure_persistence: None,
        ..Cases::default()
    });
    let stage = std::cell::RefCell::new(Stage::on(url));
    let result = runner.run(&vec(row(), 1..ROWS_MAX), |rows| stage.borrow_mut().end(&rows));
    result.unwrap_or_else(|error| panic!("{error}"));
    let stage = stage.into_inner();
    let (published, dead) = (stage.db.published(), stage.db.dead());
    println!("{cases} cases: {published} rows published, {dead} dead");
    assert!(published > dead / 4 && dead > 0, "the rows are too good, or too bad: {published} {dead}");
    judge_stream(&stage.db, &stage.stream);
}

#[test]
fn any_row_comes_to_an_end_and_is_read_alike() {
    every_row_comes_to_an_end(&shared_nats().url());
}

#[test]
fn any_row_comes_to_an_end_and_is_read_alike_on_a_current_server() {
    let nats = current_nats();
    every_row_comes_to_an_end(&nats.url());
}
