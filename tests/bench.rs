//! The bench, small: every figure that a part promises comes out, is plausible, and nothing is left behind on the
//! configured servers, whether it ends by itself or by Ctrl-C.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::harness::daemon::pg_outbox;
use crate::harness::{Config, TestDb, TestStream, database, secrets, start_nats, wait_until};

const LIMIT: Duration = Duration::from_secs(60);

/// Runs the bench and returns what it printed as JSON.
fn report(command: &mut Command) -> Value {
    let output = command.output().unwrap();
    secrets::assert_none_printed(&output);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && stderr.is_empty(), "it is quiet where there is no terminal: {stderr}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The median of a figure, having made sure that its spread is one.
fn figure(report: &Value, name: &str) -> f64 {
    let figures = report["figures"].as_array().unwrap();
    let figure =
        figures.iter().find(|figure| figure["name"] == name).unwrap_or_else(|| panic!("no {name}: {report}"));
    let [low, median, high] = ["low", "median", "high"].map(|part| figure[part].as_f64().unwrap());
    assert!(low <= median && median <= high && !figure["values"].as_array().unwrap().is_empty(), "{figure}");
    median
}

/// A config file for the servers of this database and this stream.
fn config_file(folder: &Path, db: &TestDb, stream: &TestStream) -> PathBuf {
    let path = folder.join("config.yaml");
    fs::write(&path, Config::new(db, stream).set("database.dsn", db.dsn.as_str()).yaml()).unwrap();
    path
}

/// Whether the bench has something in the database or on the server of the stream.
fn leaves_something(db: &TestDb, stream: &TestStream) -> bool {
    db.number("SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'outbox\\_bench\\_%'") > 0
        || stream.all_streams().iter().any(|name| name.starts_with("outbox_bench_"))
}

#[test]
fn a_quick_bench_measures_what_it_promises() {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    let plot = folder.path().join("plot.svg");
    let temp = folder.path().join("temp");
    fs::create_dir(&temp).unwrap();
    let report = report(
        pg_outbox()
            .args(["bench", "--quick", "--events", "5000", "--workers", "2", "--json", "--plot"])
            .arg(&plot)
            .args(["--only", "drain", "--only", "cost", "--only", "latency", "--only", "writers"])
            .args(["--only", "old-snapshot", "--only", "open-writer"])
            .env("TMPDIR", &temp),
    );
    let rates =
        ["publish.alone", "publish.one", "database.alone", "drain.best", "drain.100", "drain.one_key"];
    let costs =
        ["drain.best.cpu", "drain.best.cpu_postgres", "drain.best.cpu_nats", "drain.best.wal", "idle.cpu"];
    let others = [
        "writers.busy.trigger",
        "writers.asleep.none",
        "latency.half.p99",
        "snapshot.reads",
        "open_writer.last",
        "open_writer.open.p50",
        "open_writer.ended.p50",
    ];
    for name in rates.iter().chain(&costs).chain(&others) {
        assert!(figure(&report, name) > 0.0, "{name}: {report}");
    }
    assert!(figure(&report, "publish.alone") > figure(&report, "publish.one"), "{report}");
    // BEGIN, lock, read, settle, COMMIT for each 100 events; a look now and then; what the start asks.
    let statements = figure(&report, "cost.100.statements");
    assert!((45.0..200.0).contains(&statements), "{report}");
    assert!((1.0..64.0).contains(&figure(&report, "drain.best.memory")), "{report}");
    assert!(figure(&report, "latency.idle.p50") <= figure(&report, "latency.idle.max"), "{report}");
    let goals = report["goals"].as_array().unwrap();
    assert!(goals.iter().all(|goal| goal["reached"].is_boolean() && goal["median"].is_number()), "{report}");
    assert!(goals.len() > 5, "{report}");
    assert!(fs::read_to_string(&plot).unwrap().starts_with("<svg"));
    wait_until("nothing of the bench is left", LIMIT, &[], || fs::read_dir(&temp).unwrap().next().is_none());
}

#[test]
fn a_bench_against_another_build_sets_both_beside_each_other() {
    let this = pg_outbox();
    let report = report(
        pg_outbox()
            .args([
                "bench",
                "--quick",
                "--rounds",
                "2",
                "--events",
                "1000",
                "--workers",
                "2",
                "--json",
                "--against",
            ])
            .arg(this.get_program()),
    );
    for name in ["inserts.cpu", "relay.1000", "relay.100"] {
        assert!(figure(&report, name) > 0.0, "{name}: {report}");
    }
    let compared = report["compared"].as_array().unwrap();
    for name in ["against.1000", "against.100.cpu_postgres", "against.1000.wal", "inserts.cpu", "relay.100"] {
        let row =
            compared.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("no {name}: {report}"));
        for part in ["this", "other", "ratio"] {
            assert!(row[part]["median"].as_f64().unwrap() > 0.0, "{row}");
        }
    }
    assert_eq!(report["goals"].as_array().unwrap().len(), 1, "what inserts cost: {report}");
    assert_eq!(report["setting"]["best_batch"], Value::Null, "nothing else was measured: {report}");
}

#[test]
fn a_bench_on_the_configured_servers_leaves_them_as_they_were() {
    let (db, nats, folder) = (database(), start_nats(""), tempfile::tempdir().unwrap());
    let stream = TestStream::on(&nats.url(), &json!({}));
    db.event("order.placed", "key", "{}");
    let report = report(
        pg_outbox()
            .args([
                "bench",
                "--here",
                "--quick",
                "--events",
                "1000",
                "--json",
                "--only",
                "instances",
                "--config",
            ])
            .arg(config_file(folder.path(), &db, &stream)),
    );
    assert!(figure(&report, "instances.2") > 0.0);
    assert!(!leaves_something(&db, &stream));
    assert_eq!((db.pending(), stream.count()), (1, 0), "the real outbox and its stream");
}

#[test]
fn an_interrupted_bench_takes_away_what_it_made() {
    let (db, nats, folder) = (database(), start_nats(""), tempfile::tempdir().unwrap());
    let stream = TestStream::on(&nats.url(), &json!({}));
    let mut bench = pg_outbox()
        .args(["bench", "--here", "--quick", "--rounds", "1000", "--only", "instances", "--config"])
        .arg(config_file(folder.path(), &db, &stream))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_until("the bench has begun", LIMIT, &[&db], || leaves_something(&db, &stream));
    kill_process(Pid::from_child(&bench), Signal::INT).unwrap();
    wait_until("the bench has ended", LIMIT, &[&db], || bench.try_wait().unwrap().is_some());
    assert_eq!(bench.wait().unwrap().code(), Some(1));
    assert!(!leaves_something(&db, &stream));
}
