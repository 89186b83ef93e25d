//! The units, and what the program tells systemd over a real datagram socket.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::delivery::wait_drained;
use super::harness::database::start_postgres;
use super::harness::{Config, Daemon, NotifySocket, TestDb, database, stream, wait_until};

const UNITS: [(&str, &str); 2] = [
    ("pg-outbox.service", include_str!("../systemd/pg-outbox.service")),
    ("pg-outbox@.service", include_str!("../systemd/pg-outbox@.service")),
];
/// What a systemd that is older than a setting says about it; the units explain each.
const FOR_NEWER_ONES: [&str; 3] =
    ["service type, ignoring: notify-reload", "'RestartSteps' in section", "'RestartMaxDelaySec' in section"];
/// Highest exposure that `systemd-analyze security` may find, in tenths.
const EXPOSURE_MAX: &str = "15";

/// A folder with the units, whose program is the built one.
fn installed_units() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in UNITS {
        let text = text.replace("/usr/bin/pg-outbox", env!("CARGO_BIN_EXE_pg-outbox"));
        fs::write(folder.path().join(name), text).unwrap();
    }
    folder
}

fn systemd_analyze(folder: &Path, arguments: &[&str], unit: &str) -> std::process::Output {
    Command::new("systemd-analyze")
        .args(arguments)
        .arg(format!("./{unit}"))
        .current_dir(folder)
        .output()
        .expect("systemd-analyze is missing: apt-get install systemd")
}

#[test]
fn the_units_have_no_fault() {
    let folder = installed_units();
    for unit in ["pg-outbox.service", "pg-outbox@orders.service"] {
        let output = systemd_analyze(folder.path(), &["verify", "--man=no"], unit);
        let said = String::from_utf8(output.stderr).unwrap();
        let faults: Vec<&str> =
            said.lines().filter(|line| !FOR_NEWER_ONES.iter().any(|known| line.contains(known))).collect();
        assert!(output.status.success() && faults.is_empty(), "{unit}: {said}");
    }
}

#[test]
fn the_units_give_away_hardly_anything() {
    let folder = installed_units();
    for (unit, _) in UNITS {
        let arguments = ["security", "--offline=yes", "--threshold", EXPOSURE_MAX];
        let output = systemd_analyze(folder.path(), &arguments, unit);
        let table = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(table.contains("Overall exposure level"), "{table}");
        assert!(output.status.success(), "{table}");
    }
}

#[test]
fn the_template_differs_in_names_alone() {
    let settings = |text: &str| -> Vec<String> {
        text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).map(str::to_owned).collect()
    };
    let [(_, single), (_, template)] = UNITS;
    let expected: Vec<String> = settings(single)
        .into_iter()
        .map(|line| match line.split_once('=') {
            Some(("Description", _)) => format!("{line} (%i)"),
            Some(("ExecStart", _)) => line.replace("/config.yaml", "/%i.yaml"),
            Some(("LoadCredential", _)) => line.replace(":pg-outbox.", ":pg-outbox.%i."),
            Some(("EnvironmentFile", _)) => format!("{line}-%i"),
            Some(("SyslogIdentifier", _)) => format!("{line}@%i"),
            _ => line,
        })
        .collect();
    assert_eq!(settings(template), expected);
}

#[test]
fn it_is_started_again_whatever_happens_but_with_a_bad_configuration() {
    let (_, unit) = UNITS[0];
    let setting = |name: &str| {
        let found: Vec<&str> =
            unit.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('=')).collect();
        // Of several the last one holds, where it is understood.
        (*found.last().unwrap_or_else(|| panic!("no {name}"))).to_owned()
    };
    let seconds = |name: &str| setting(name).trim_end_matches('s').parse::<u64>().unwrap();
    assert_eq!((setting("Restart"), seconds("StartLimitIntervalSec")), ("always".to_owned(), 0));
    assert_eq!(setting("RestartPreventExitStatus"), "78");
    assert!(seconds("RestartSec") >= 1 && seconds("RestartMaxDelaySec") > seconds("RestartSec"));
    assert!(seconds("RestartSteps") >= 2, "the pause grows");
    // Type= twice: what an older systemd understands stands first.
    assert!(unit.contains("Type=notify\n") && setting("Type") == "notify-reload");
    assert!(setting("ExecReload").contains("-HUP $MAINPID"));
    let defaults = pg_outbox::config::Config::parse("database: { dsn: 'host=h' }", "", |_| None).unwrap();
    assert!(
        seconds("TimeoutStopSec") > defaults.dispatcher.shutdown_grace.as_secs(),
        "killed before it has drained"
    );
    assert!(seconds("WatchdogSec") > 0);
}

fn monotonic_us() -> i64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec * 1_000_000 + now.tv_nsec / 1_000
}

/// The time in `RELOADING=1`, which systemd compares with the time of its request.
fn reload_time(message: &str) -> i64 {
    message
        .strip_prefix("RELOADING=1\nMONOTONIC_USEC=")
        .unwrap_or_else(|| panic!("{message:?}"))
        .parse()
        .unwrap()
}

#[test]
fn systemd_hears_of_start_progress_reload_and_stop() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream);
    let systemd = NotifySocket::new();
    let mut daemon =
        Daemon::spawn(&config.yaml(), |command| systemd.attach(command, Duration::from_millis(1_000)));
    let told = |message: &str| message.starts_with("READY=1") || message.starts_with("STATUS=");
    assert_eq!(systemd.wait("anything", &daemon, |_| true), "READY=1", "nothing is told before it is up");
    daemon.wait_listening();
    systemd.wait("that it is fed", &daemon, |message| message == "WATCHDOG=1");

    // Too large for any server: a dead letter at once.
    db.execute("INSERT INTO outboxes (topic, payload) VALUES ('big', to_jsonb(repeat('x', 2000000)))");
    db.events("order.placed", 200, 20);
    systemd.wait("a rate", &daemon, |message| {
        message.starts_with("STATUS=ready; rate=") && !message.starts_with("STATUS=ready; rate=0.0/s")
    });
    systemd.wait("of the dead letter", &daemon, |message| {
        message.starts_with("STATUS=") && message.contains("backlog=0 lag=0.0s dead=1")
    });

    let before = monotonic_us();
    daemon.reload();
    let reloading = systemd.wait("of the reload", &daemon, |message| message.starts_with("RELOADING=1"));
    assert!((before..=monotonic_us()).contains(&reload_time(&reloading)), "{reloading}");
    assert_eq!(systemd.wait("what follows", &daemon, told), "READY=1");

    daemon.write_config(&config.set("dispatcher.workers", 0));
    daemon.reload();
    systemd.wait("of the reload", &daemon, |message| message.starts_with("RELOADING=1"));
    assert_eq!(systemd.wait("what follows", &daemon, told), "READY=1", "a refused reload is over as well");
    systemd.wait("that it was refused", &daemon, |message| {
        message.starts_with("STATUS=ready; ") && message.ends_with("reload refused, see the log")
    });

    daemon.term();
    systemd.wait("of the stop", &daemon, |message| message == "STOPPING=1");
    assert_eq!(daemon.wait_exit(Duration::from_secs(30)).code(), Some(0));
    assert_eq!(systemd.next(Duration::from_millis(1)), None, "nothing is told after the stop");
}

#[test]
fn a_stuck_thread_starves_the_watchdog_and_an_outage_does_not() {
    let mut postgres = start_postgres();
    let (db, stream) = (TestDb::on(&postgres), stream());
    let config = Config::new(&db, &stream)
        .set("database.listen", false)
        .set("dispatcher.poll_interval", "100ms")
        .set("dispatcher.claim_budget", "100ms")
        .set("dispatcher.stuck_after", "1s")
        .set("database.connect_timeout", "1s")
        .set("nats.ack_timeout", "500ms");
    let systemd = NotifySocket::new();
    let mut daemon =
        Daemon::spawn(&config.yaml(), |command| systemd.attach(command, Duration::from_millis(400)));
    let fed = |message: &str| message == "WATCHDOG=1";
    daemon.wait_listening();
    daemon.wait_ready();
    db.event("order.placed", "k", "{}");
    wait_drained(&db, &stream, &[&daemon], Duration::from_secs(60));

    postgres.stop(pg_outbox::lab::sandbox::Stop::Fast).unwrap();
    systemd
        .wait("that postgres is gone", &daemon, |message| message.starts_with("STATUS=not ready: postgres"));
    // Twice what counts as stuck.
    let deadline = Instant::now() + Duration::from_secs(8);
    while Instant::now() < deadline {
        systemd.wait("that it is fed", &daemon, fed);
    }
    assert!(daemon.log_lines("watchdog not fed").is_empty(), "{}", daemon.log());
    postgres.start_again().unwrap();
    systemd.wait("that all is well", &daemon, |message| message.starts_with("STATUS=ready;"));

    // Connections stay open and nothing answers: the claimer hangs in a statement.
    postgres.pause().unwrap();
    let stuck = "watchdog not fed: ";
    wait_until("a thread is stuck", Duration::from_secs(60), &[&daemon], || {
        !daemon.log_lines(stuck).is_empty()
    });
    let line = &daemon.log_lines(stuck)[0];
    assert!(line.contains("claimer: no progress for "), "{line}");
    assert_eq!(daemon.get("/health").0, 503);
    while systemd.next(Duration::from_millis(50)).is_some() {}
    let hungry = Instant::now() + Duration::from_secs(2);
    while let Some(message) =
        systemd.next(hungry.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)))
    {
        assert_ne!(message, "WATCHDOG=1", "a stuck thread must starve the watchdog");
    }

    postgres.resume().unwrap();
    systemd.wait("that it is fed again", &daemon, fed);
    db.event("order.placed", "k", "{}");
    wait_drained(&db, &stream, &[&daemon], Duration::from_secs(60));
    daemon.term();
    assert_eq!(daemon.wait_exit(Duration::from_secs(30)).code(), Some(0));
}
