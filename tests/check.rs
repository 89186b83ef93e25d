//! The commands around the daemon, before anything runs: `check` in good and bad worlds, `migrate` again, a bad
//! configuration, and a `--help` that suffices.
//!
//! Each test runs the built program and looks at its lines and its exit code.

use std::path::Path;
use std::time::Duration;

use pg_outbox::lab::sandbox::StoreState;
use serde_json::{Value, json};

use super::harness::daemon::pg_outbox;
use super::harness::database::{shared_postgres, start_postgres};
use super::harness::stream::{current_nats, shared_nats};
use super::harness::{Config, Daemon, TestDb, TestStream, database, start_nats, stream, unique, wait_until};

const LIMIT: Duration = Duration::from_secs(30);

/// What a command printed, and its exit code.
struct Ran {
    stdout: String,
    stderr: String,
    code: Option<i32>,
}

fn run(arguments: &[&str], config: Option<&str>) -> Ran {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.yaml");
    let mut command = pg_outbox();
    command.args(arguments);
    if let Some(text) = config {
        std::fs::write(&file, text).unwrap();
        command.arg("--config").arg(&file);
    }
    let output = command.output().unwrap();
    Ran {
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
        code: output.status.code(),
    }
}

/// Runs `check` and returns its lines as (ok, what, detail), without warnings, having made sure that the exit code
/// fits them.
fn check(config: &Config) -> Vec<(bool, String, String)> {
    let ran = run(&["check"], Some(&config.yaml()));
    let lines: Vec<_> = ran
        .stdout
        .lines()
        .filter(|line| !line.starts_with("warn  "))
        .map(|line| {
            let (verdict, rest) = line.split_at(6);
            let (what, detail) = rest.split_once(": ").unwrap_or_else(|| panic!("{line}"));
            let ok = match verdict {
                "ok    " => true,
                "FAIL  " => false,
                _ => panic!("neither ok nor FAIL: {line}"),
            };
            (ok, what.to_owned(), detail.to_owned())
        })
        .collect();
    let all_ok = lines.iter().all(|(ok, ..)| *ok);
    assert_eq!(ran.code, Some(i32::from(!all_ok)), "{}{}", ran.stdout, ran.stderr);
    lines
}

/// The warnings of `check`, which change no exit code.
fn warnings(config: &Config) -> Vec<String> {
    let ran = run(&["check"], Some(&config.yaml()));
    assert_eq!(ran.code, Some(0), "{}{}", ran.stdout, ran.stderr);
    ran.stdout.lines().filter_map(|line| line.strip_prefix("warn  ")).map(str::to_owned).collect()
}

/// The only line about `what`.
#[track_caller]
fn line<'a>(lines: &'a [(bool, String, String)], what: &str) -> (bool, &'a str) {
    let found: Vec<_> = lines.iter().filter(|(_, about, _)| about == what).collect();
    assert_eq!(found.len(), 1, "{what}: {lines:?}");
    (found[0].0, &found[0].2)
}

/// Asserts that this line fails with all of these parts, and that no other line does.
#[track_caller]
fn only_failure(lines: &[(bool, String, String)], what: &str, parts: &[&str]) {
    let failed: Vec<&str> = lines.iter().filter(|(ok, ..)| !ok).map(|(_, what, _)| what.as_str()).collect();
    assert_eq!(failed, [what], "{lines:?}");
    let (_, detail) = line(lines, what);
    for part in parts {
        assert!(detail.contains(part), "no {part:?} in: {detail}");
    }
}

#[test]
fn check_of_a_good_world_says_ok_line_by_line() {
    let (db, stream) = (database(), stream());
    let lines = check(&Config::new(&db, &stream));
    let about: Vec<&str> = lines.iter().map(|(_, what, _)| what.as_str()).collect();
    assert_eq!(about, ["config", "postgres", "schema", "wake-up", "nats", "stream", "topic map"]);
    assert!(lines.iter().all(|(ok, ..)| *ok), "{lines:?}");
    assert!(line(&lines, "stream").1.contains(&stream.name), "{lines:?}");
    assert_eq!(stream.consumers(), 0, "it leaves nothing behind");
}

#[test]
fn check_over_core_nats_wants_no_stream() {
    let (db, stream) = (database(), stream());
    stream.delete();
    let lines = check(&Config::new(&db, &stream).set("nats.jetstream.enabled", false));
    assert_eq!(line(&lines, "stream"), (true, "not used: core NATS"));
}

#[test]
fn check_names_a_missing_schema_once_and_the_command() {
    let stream = stream();
    let db = TestDb::without_schema(shared_postgres());
    let lines = check(&Config::new(&db, &stream));
    let failed: Vec<&str> =
        lines.iter().filter(|(ok, ..)| !ok).map(|(_, _, detail)| detail.as_str()).collect();
    assert_eq!(
        failed,
        [
            "table outboxes is missing; run `pg-outbox migrate`",
            "table outbox_lanes is missing; run `pg-outbox migrate`",
            "table outbox_schema is missing; run `pg-outbox migrate`"
        ]
    );
}

#[test]
fn check_names_what_a_schema_lacks() {
    let (db, stream) = (database(), stream());
    db.execute("DROP INDEX outboxes_retry_by_key");
    let lines = check(&Config::new(&db, &stream));
    only_failure(&lines, "schema", &["index outboxes_retry_by_key is missing", "pg-outbox migrate"]);
}

#[test]
fn check_names_a_missing_stream() {
    let (db, stream) = (database(), stream());
    stream.delete();
    let config = Config::new(&db, &stream);
    let lines = check(&config);
    assert!(line(&lines, "nats").0, "the server is there: {lines:?}");
    only_failure(&lines, "stream", &[&stream.name, "is missing", "nats.jetstream.create"]);

    let config = config
        .set("nats.jetstream.create", true)
        .set("nats.jetstream.subjects", vec![format!("{}.>", stream.prefix)]);
    let lines = check(&config);
    assert!(line(&lines, "stream").0, "the daemon will create it: {lines:?}");
    assert!(line(&lines, "topic map").0, "{lines:?}");
    let lines = check(&config.set("nats.jetstream.create", false));
    assert!(!line(&lines, "stream").0, "the check has not created it: {lines:?}");
}

#[test]
fn check_names_a_mapped_subject_outside_the_stream() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream).set_in("nats.topic_map", "lost.*", "elsewhere.*");
    let lines = check(&config);
    let of_map: Vec<_> = lines.iter().filter(|(_, what, _)| what == "topic map").collect();
    assert_eq!(of_map.len(), 2, "{lines:?}");
    let failed: Vec<_> = of_map.iter().filter(|(ok, ..)| !ok).collect();
    assert_eq!(failed.len(), 1, "{lines:?}");
    assert!(failed[0].2.starts_with("elsewhere.* is not in stream"), "{lines:?}");
    assert!(failed[0].2.contains("map the topic elsewhere"), "it says what to do: {lines:?}");
}

#[test]
fn check_names_a_database_that_is_down_and_looks_at_nats_all_the_same() {
    let mut postgres = start_postgres();
    let db = TestDb::on(&postgres);
    let stream = stream();
    postgres.kill().unwrap();
    let lines = check(&Config::new(&db, &stream).set("database.connect_timeout", "1s"));
    only_failure(&lines, "postgres", &["refused", "database.dsn"]);
    assert!(line(&lines, "stream").0, "{lines:?}");
}

#[test]
fn check_names_a_wrong_password_and_shows_none() {
    let (db, stream) = (database(), stream());
    let dsn = db.dispatcher_dsn();
    let (_, host) = dsn.split_once('@').unwrap();
    let dsn = format!("postgresql://postgres:hunter2@{host}");
    let config = Config::new(&db, &stream).set("database.dsn", dsn).set("database.connect_timeout", "1s");
    let lines = check(&config);
    only_failure(&lines, "postgres", &["28P01", "password authentication failed", "database.dsn"]);
    assert!(!format!("{lines:?}").contains("hunter2"), "{lines:?}");
}

#[test]
fn check_names_a_nats_that_is_down() {
    let (db, stream) = (database(), stream());
    let mut nats = start_nats("");
    let url = nats.url();
    nats.kill().unwrap();
    let config = Config::new(&db, &stream).set("nats.url", url.as_str());
    let lines = check(&config);
    only_failure(&lines, "nats", &[&url, "refused", "nats.url"]);

    let config = config.set("nats.url", format!("{url},{}", shared_nats().url()));
    let lines = check(&config);
    assert!(lines.iter().all(|(ok, ..)| *ok), "another server of the list is there: {lines:?}");
}

#[test]
fn check_names_a_login_that_nats_refuses_and_a_question_that_it_denies() {
    let users = r#"
authorization {
  users = [
    { user: admin, password: admin }
    { user: outbox, password: "s3cret!", permissions: {
        publish: { allow: ["app.>", "_INBOX.>"] }
        subscribe: ["_INBOX.>"] } }
  ]
}
"#;
    let db = database();
    let nats = start_nats(users);
    let admin = nats.url().replace("nats://", "nats://admin:admin@");
    let stream = TestStream::on(&admin, &json!({}));
    let config = Config::new(&db, &stream).set("nats.ack_timeout", "2s");

    let wrong = nats.url().replace("nats://", "nats://outbox:hunter2@");
    let lines = check(&config.clone().set("nats.url", wrong));
    only_failure(&lines, "nats", &["uthorization", "login"]);
    assert!(!format!("{lines:?}").contains("hunter2"), "{lines:?}");

    let restricted = nats.url().replace("nats://", "nats://outbox:s3cret!@");
    let lines = check(&config.set("nats.url", restricted));
    let question = format!("$JS.API.STREAM.INFO.{}", stream.name);
    only_failure(&lines, "stream", &["permission denied", &question, "allow it"]);
}

#[test]
fn check_warns_of_a_stream_that_keeps_less_than_it_could() {
    let db = database();
    let warned = |nats: &str, settings: Value| {
        let stream = TestStream::on(nats, &settings);
        (warnings(&Config::new(&db, &stream)), stream)
    };
    let (found, stream) = warned(&shared_nats().url(), json!({}));
    assert_eq!(found.len(), 1, "the server has one replica: {found:?}");
    assert!(found[0].starts_with(&format!("stream {}: one replica", stream.name)), "{found:?}");
    let current = current_nats();
    let cases = [
        (json!({"duplicate_window": 60_000_000_000_u64}), "duplicate_window is 1m"),
        (json!({"max_msgs": 1_000}), "max_msgs 1000 it drops"),
        (json!({"max_msgs": 1_000, "max_bytes": 1_000_000}), "max_msgs 1000, max_bytes 1000000 it drops"),
        (json!({"max_msg_size": 2_000}), "max_msg_size is 2000 B"),
        (json!({"retention": "interest"}), "retention is interest"),
        (
            json!({"discard": "new", "discard_new_per_subject": true, "max_msgs_per_subject": 5}),
            "holds 5 messages",
        ),
        (json!({"storage": "memory"}), "memory of one server"),
        (json!({"persist_mode": "async"}), "persist_mode async"),
    ];
    for (settings, expected) in cases {
        for nats in [shared_nats().url(), current.url()] {
            // Only a current server knows it; the older one leaves it out.
            if settings.get("persist_mode").is_some() && nats != current.url() {
                continue;
            }
            let (mut found, _) = warned(&nats, settings.clone());
            found.retain(|warning| !warning.contains("one replica"));
            assert!(found.len() == 1 && found[0].contains(expected), "{settings}: {found:?}");
        }
    }
}

#[test]
fn check_fails_for_a_stream_that_takes_no_events() {
    let db = database();
    let nats = current_nats();
    let failed = |stream: &TestStream, part: &str| {
        only_failure(&check(&Config::new(&db, stream)), "stream", &[&stream.name, part]);
    };
    let sealed = TestStream::on(&nats.url(), &json!({}));
    sealed.update(&json!({"sealed": true}));
    failed(&sealed, "sealed");
    let mirror = TestStream::on(
        &nats.url(),
        &json!({"subjects": [], "mirror": {"name": sealed.name}, "duplicate_window": 0}),
    );
    failed(&mirror, "mirror");
    failed(&TestStream::on(&nats.url(), &json!({"no_ack": true})), "no_ack");
    failed(&TestStream::on(&nats.url(), &json!({"allow_msg_counter": true})), "allow_msg_counter");
}

#[test]
fn run_says_once_what_does_not_fit_and_again_what_is_new_after_a_reconnect() {
    let mut nats = start_nats("");
    let (db, stream) = (database(), TestStream::on(&nats.url(), &json!({})));
    let config = Config::new(&db, &stream).set_in("nats.topic_map", "lost.*", "elsewhere.*");
    let daemon = Daemon::start(&config);
    let wait = |text: &str| {
        wait_until(text, LIMIT, &[&daemon], || !daemon.log_lines(text).is_empty());
    };
    wait("one replica");
    wait("events cannot be published: elsewhere.* is not in stream");
    nats.kill().unwrap();
    nats.start_again(StoreState::Kept).unwrap();
    stream.update(&json!({"duplicate_window": 1_000_000_000_u64}));
    wait("duplicate_window is 1s");
    wait_until("it is ready", LIMIT, &[&daemon], || daemon.get("/ready").0 == 200);
    for once in ["one replica", "elsewhere.* is not in stream", "duplicate_window is 1s"] {
        assert_eq!(daemon.log_lines(once).len(), 1, "{once}: {}", daemon.log());
    }
}

#[test]
fn migrating_twice_says_so_and_changes_nothing() {
    let stream = stream();
    let db = TestDb::without_schema(shared_postgres());
    let config = Config::new(&db, &stream).set("database.dsn", db.dsn.as_str());
    let first = run(&["migrate"], Some(&config.yaml()));
    assert_eq!(
        (first.stdout.as_str(), first.code),
        ("schema version 2 applied\n", Some(0)),
        "{}",
        first.stderr
    );
    let count = "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace";
    let relations = db.number(count);
    let second = run(&["migrate"], Some(&config.yaml()));
    assert_eq!((second.stdout.as_str(), second.code), ("schema is up to date, at version 2\n", Some(0)));
    assert_eq!(db.number(count), relations);
    assert!(check(&config).iter().all(|(ok, ..)| *ok));
    let other = run(&["migrate", "--order", "topic"], Some(&config.yaml()));
    assert_eq!(other.code, Some(1), "{}", other.stdout);
    assert!(other.stderr.contains("events are ordered by \"key\" here"), "{}", other.stderr);
}

#[test]
fn a_bad_config_is_told_as_a_whole_and_starts_nothing() {
    let (db, stream) = (database(), stream());
    let name = unique("never-");
    let config = Config::new(&db, &stream)
        .set("dispatcher.instance_id", name.as_str())
        .set("dispatcher.workers", 0)
        .set("dispatcher.bach_size", 10)
        .set("nats.ack_timeout", 5)
        .set_in("nats.topic_map", "a.*.*", "b.*");
    for command in ["run", "check", "migrate"] {
        let ran = run(&[command], Some(&config.yaml()));
        assert_eq!(ran.code, Some(78), "{command}: {}", ran.stderr);
        assert_eq!(ran.stdout, "", "{command}");
        assert_eq!(ran.stderr.lines().count(), 4, "{command}: one problem a line: {}", ran.stderr);
        for key in ["dispatcher.workers: 0", "dispatcher.bach_size: unknown", "nats.ack_timeout: 5", "a.*.*"]
        {
            assert!(ran.stderr.contains(key), "{command}: {key}: {}", ran.stderr);
        }
        assert!(!ran.stderr.contains("listening"), "{command}: {}", ran.stderr);
    }
    let missing = run(&["check", "--config", "/nowhere/config.yaml"], None);
    assert_eq!(missing.code, Some(78), "{}", missing.stderr);
    assert!(missing.stderr.contains("/nowhere/config.yaml: cannot be read"), "{}", missing.stderr);
}

#[test]
fn help_suffices() {
    let help = run(&["--help"], None);
    assert_eq!(help.code, Some(0), "{}", help.stderr);
    let needed = [
        "run",
        "check",
        "migrate",
        "demo",
        "--config",
        "/etc/pg-outbox/config.yaml",
        "DATABASE_DSN",
        "NATS_URL",
        "DISPATCHER_INSTANCE_ID",
        "LOG_LEVEL",
        "Exit codes",
        "78",
        "130",
        "SIGTERM",
    ];
    for part in needed {
        assert!(help.stdout.contains(part), "no {part} in\n{}", help.stdout);
    }
    for line in help.stdout.lines() {
        assert!(line.chars().count() <= 120, "too long for a terminal: {line}");
    }
    assert!(run(&["check", "--help"], None).stdout.contains("Changes nothing"));
    let unit =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd/pg-outbox.service"));
    assert!(
        unit.unwrap().contains("RestartPreventExitStatus=78"),
        "what the help says of 78 is what the unit does"
    );
    assert_eq!(run(&["bogus"], None).code, Some(2));
}

/// Names on the servers are others' words.
#[test]
fn what_servers_say_cannot_steer_a_terminal() {
    let (db, url) = (database(), shared_nats().url());
    let named = TestStream::named(&url);
    let stream = TestStream::on(&url, &json!({"subjects": [format!("{}.\u{1b}[2J.>", named.prefix)]}));
    let ran = run(&["check"], Some(&Config::new(&db, &stream).yaml()));
    assert!(ran.stdout.contains("\u{fffd}[2J.>"), "{}", ran.stdout);
    let nowhere = db.dsn.replace(&format!("/{}", db.name), "/%1B[2J");
    assert_ne!(nowhere, db.dsn);
    let failed = run(&["migrate"], Some(&Config::new(&db, &stream).set("database.dsn", nowhere).yaml()));
    assert!(failed.stderr.contains("\"\u{fffd}[2J\" does not exist"), "{}", failed.stderr);
    for text in [ran.stdout, ran.stderr, failed.stdout, failed.stderr] {
        assert!(!text.contains('\u{1b}'), "{text:?}");
    }
}
