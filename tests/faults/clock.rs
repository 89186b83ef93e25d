//! Faults of time: the clock of the database jumps, or a month begins for which nobody has made a partition.
//!
//! PostgreSQL runs under libfaketime, which adds to the clock what a file says; its writers and we keep ours. Only
//! the wall clock jumps, as on a real machine: the monotonic one does not.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use pg_outbox::lab::sandbox::{PostgresOptions, PostgresServer};
use serde_json::json;

use super::super::harness::TestDb;
use super::super::harness::database::{as_postgres_user, start_postgres_with};
use super::{Run, Stage};

const HOUR_S: i64 = 3_600;
const DAY_S: i64 = 24 * HOUR_S;
/// An event that is in retry when the clock jumps.
const REFUSED: &str = "no stream takes subject";

/// A PostgreSQL whose clock can be set.
struct Clock {
    postgres: PostgresServer,
    /// Holds the file with what is added to the clock.
    folder: tempfile::TempDir,
}

impl Clock {
    fn start() -> Clock {
        let folder = tempfile::Builder::new().prefix("pg-outbox-clock-").tempdir().unwrap();
        let file = folder.path().join("offset");
        fs::write(&file, "+0").unwrap();
        // The server may run as another user than we do.
        open_to_all(folder.path(), 0o755);
        open_to_all(&file, 0o644);
        let mut launcher = as_postgres_user();
        launcher.extend([
            "env".to_owned(),
            format!("LD_PRELOAD={}", libfaketime().display()),
            format!("FAKETIME_TIMESTAMP_FILE={}", file.display()),
            "FAKETIME_NO_CACHE=1".to_owned(),
            "FAKETIME_DONT_FAKE_MONOTONIC=1".to_owned(),
            "FAKETIME_DISABLE_SHM=1".to_owned(),
        ]);
        let postgres = start_postgres_with(PostgresOptions { launcher, ..PostgresOptions::default() });
        Clock { postgres, folder }
    }

    /// The clock is so many seconds ahead of ours from now on, or behind if negative.
    fn set(&self, ahead_s: i64) {
        // Renamed into its place, as a backend may read it at any moment.
        let (new, file) = (self.folder.path().join("new"), self.folder.path().join("offset"));
        fs::write(&new, format!("{ahead_s:+}")).unwrap();
        open_to_all(&new, 0o644);
        fs::rename(&new, &file).unwrap();
    }
}

fn open_to_all(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Debian's package installs it below a folder that is named for the machine.
fn libfaketime() -> PathBuf {
    let folders = fs::read_dir("/usr/lib").unwrap().flatten().map(|entry| entry.path());
    folders
        .map(|folder| folder.join("faketime/libfaketime.so.1"))
        .find(|library| library.is_file())
        .expect("libfaketime is not installed: tests/run.sh does that, or apt-get install faketime")
}

/// Hours and days forward and back, while some events are in retry.
pub fn jumps(run: &mut Run) {
    let clock = Clock::start();
    let mut stage = Stage::new(TestDb::on(&clock.postgres), run.stream());
    stage.cause = Some(REFUSED);
    stage.config = stage
        .config
        .clone()
        .set("dispatcher.max_attempts", 1_000)
        .set("dispatcher.backoff_initial", "200ms")
        .set("dispatcher.backoff_max", "2s");
    stage.start();
    let subjects = stage.stream.info()["config"]["subjects"].clone();
    let others = json!({"subjects": [stage.stream.subject("others.>")]});
    run.under_load(&mut stage, |run, stage| {
        for _ in 0..run.pick(1, 4) {
            for hours in [run.rng.i64(1..=24), -run.rng.i64(1..=24), 40 * 24, 0] {
                stage.stream.update(&others);
                run.pause(600..=1_200);
                clock.set(hours * HOUR_S);
                let ahead = stage.db.number("SELECT extract(epoch FROM clock_timestamp())::int8") - now_s();
                assert!((ahead - hours * HOUR_S).abs() < 60, "{hours} hours: the clock is {ahead} s ahead");
                stage.stream.update(&json!({"subjects": subjects}));
                run.wait_work(stage, "it publishes again");
                run.pause(200..=800);
            }
        }
    });
    assert!(stage.db.number("SELECT count(*) FROM outboxes WHERE attempts > 1") > 0, "nothing was in retry");
}

/// Midnight passes at the end of a month that has a partition, into one that has none: somebody else has the turn to
/// make partitions, and makes none.
pub fn a_month_begins(run: &mut Run) {
    let clock = Clock::start();
    let db = TestDb::on(&clock.postgres);
    let begins_s = db.number(
        "SELECT extract(epoch FROM date_trunc('month', now() AT TIME ZONE 'UTC' + interval '400 days')
                        AT TIME ZONE 'UTC')::int8",
    );
    let month = |at_s: i64| format!("(to_timestamp({at_s}) AT TIME ZONE 'UTC')::date");
    db.execute(&format!("SELECT create_monthly_partition('outboxes', {})", month(begins_s - DAY_S)));
    clock.set(begins_s - now_s() - 60);
    let mut holder = db.client();
    holder
        .batch_execute("SELECT pg_advisory_lock(1869968484, 'outboxes'::regclass::oid::bigint::bit(32)::int)")
        .unwrap();
    let mut stage = Stage::new(db, run.stream());
    stage.start();
    run.under_load(&mut stage, |run, _| {
        clock.set(begins_s - now_s() - 2);
        run.pause(4_000..=6_000);
    });
    drop(holder);
    let begins = format!("to_timestamp({begins_s})");
    let rows = |of: &str| stage.db.number(&format!("SELECT count(*) FROM {of}"));
    let before = rows(&format!("outboxes WHERE created_at < {begins}"));
    let after = rows(&format!("outboxes_default WHERE created_at >= {begins}"));
    assert!(before > 0 && after > 0, "{before} events before midnight, {after} after it without a partition");
}

fn now_s() -> i64 {
    i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()).unwrap()
}
