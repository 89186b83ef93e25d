//! Log lines on stderr, in the shape that whoever reads stderr can use best.
//!
//! Called once by the service, then used from every thread through the `log` macros. One record is one line,
//! whatever the message holds, and is written with one call. Under systemd (stderr is the journal's stream) a
//! line begins with its priority, `<6>`, and has no time, since the journal has its own; on a terminal or a
//! pipe it begins with the time. Only this crate logs at the configured level; the crates below us at warn at
//! most, and never more than we do. The environment has no say besides `LOG_LEVEL`, which the configuration
//! has already read.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::os::fd::AsFd;
use std::time::SystemTime;

use anyhow::{Context, Result};
use log::{Level, LevelFilter, Record};

use crate::config::{self, LogFormat};

/// Sends the `log` macros to stderr, from now on until the process ends.
///
/// # Errors
/// If this process has a logger already, as a program that embeds the service may.
pub fn init(config: &config::Logging) -> Result<()> {
    let shape = Shape { format: config.format, journal: stderr_is_the_journal() };
    env_logger::Builder::new()
        // Everything of ours passes here; `log::max_level`, which can change later, decides.
        .filter_level(LevelFilter::Warn)
        .filter_module(OURS, LevelFilter::Trace)
        // At warn it repeats every line that it does not understand, as fast as a server sends them.
        .filter_module("nats", LevelFilter::Error)
        .target(env_logger::Target::Stderr)
        .write_style(env_logger::WriteStyle::Never)
        .format(move |out, record| out.write_all(shape.record(record, SystemTime::now()).as_bytes()))
        .try_init()
        .context("start logging")?;
    set_level(config.level);
    Ok(())
}

/// Changes the level while running.
pub fn set_level(level: LevelFilter) {
    log::set_max_level(level);
}

/// Module path of this crate, library and program.
const OURS: &str = "pg_outbox";

/// Bytes of one message at most; the rest is cut. systemd splits a stream into entries after 48 KiB
/// (`LineMax=`) and the second half would be no JSON and have no priority. A byte takes up to six as JSON
/// (`\u001b`).
const MAX_MESSAGE_BYTES: usize = 7_900;

/// What a line looks like.
#[derive(Debug, Clone, Copy)]
struct Shape {
    format: LogFormat,
    /// Stderr is the journal's stream. It reads the prefix `<6>` as the priority and takes it off
    /// (`SyslogLevelPrefix=` is on by default), so it goes before JSON too: a JSON entry then is pure JSON
    /// and still has a priority. A collector at the other end of a pipe would choke on it, and never sees it.
    journal: bool,
}

impl Shape {
    /// One line, its newline included.
    fn record(self, record: &Record<'_>, now: SystemTime) -> String {
        let mut message = record.args().to_string();
        let krate = record.target().split("::").next().unwrap_or_default();
        if krate != OURS {
            message.insert_str(0, &format!("{krate}: "));
        }
        cut(&mut message);
        self.line(record.level(), std::thread::current().name().unwrap_or("unnamed"), &message, now)
    }

    fn line(self, level: Level, thread: &str, message: &str, now: SystemTime) -> String {
        let mut line = String::with_capacity(message.len() + 80);
        if self.journal {
            line.push_str(priority(level));
        }
        let now = humantime::format_rfc3339_millis(now);
        match (self.format, self.journal) {
            (LogFormat::Json, _) => {
                let (ts, level) = (now.to_string(), level.as_str().to_ascii_lowercase());
                let entry = Entry { ts: &ts, level: &level, thread, msg: message };
                line.push_str(&serde_json::to_string(&entry).expect("strings always serialize"));
            }
            (LogFormat::Text, true) => {
                push(&mut line, format_args!("{thread}: "));
                push_on_one_line(&mut line, message);
            }
            (LogFormat::Text, false) => {
                push(&mut line, format_args!("{now} {level:<5} {thread}: "));
                push_on_one_line(&mut line, message);
            }
        }
        line.push('\n');
        line
    }
}

/// One line of JSON; its fields stand in this order.
#[derive(serde::Serialize)]
struct Entry<'a> {
    ts: &'a str,
    level: &'a str,
    thread: &'a str,
    msg: &'a str,
}

/// Priorities of syslog(3), as sd-daemon(3) writes them.
fn priority(level: Level) -> &'static str {
    match level {
        Level::Error => "<3>",
        Level::Warn => "<4>",
        Level::Info => "<6>",
        Level::Debug | Level::Trace => "<7>",
    }
}

/// Shortens `message` to [`MAX_MESSAGE_BYTES`], on a character's boundary, and says so.
fn cut(message: &mut String) {
    if message.len() <= MAX_MESSAGE_BYTES {
        return;
    }
    let whole = message.len();
    let end = (0..=MAX_MESSAGE_BYTES).rev().find(|end| message.is_char_boundary(*end)).unwrap_or(0);
    message.truncate(end);
    push(message, format_args!(" (cut: {whole} bytes)"));
}

/// Control characters would break the line or act on a terminal; they are shown instead.
fn push_on_one_line(line: &mut String, message: &str) {
    for c in message.chars() {
        if c.is_control() || turns_text(c) || matches!(c, '\u{2028}' | '\u{2029}') {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
}

/// Characters that show others in another order than they stand in (UAX #9).
pub fn turns_text(c: char) -> bool {
    matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn push(text: &mut String, args: std::fmt::Arguments<'_>) {
    text.write_fmt(args).expect("writing to a String fails only if a Display does, and these do not");
}

fn stderr_is_the_journal() -> bool {
    let named = std::env::var("JOURNAL_STREAM").ok();
    is_the_journal(io::stderr(), named.as_deref())
}

/// `JOURNAL_STREAM` holds device and inode of the stream that systemd gave us (systemd.exec(5)). It is
/// inherited by children, whose stderr may lead elsewhere, hence the comparison.
fn is_the_journal(stream: impl AsFd, journal_stream: Option<&str>) -> bool {
    let Some((device, inode)) = journal_stream.and_then(|named| named.split_once(':')) else { return false };
    let (Ok(device), Ok(inode)) = (device.parse::<u64>(), inode.parse::<u64>()) else { return false };
    rustix::fs::fstat(stream).is_ok_and(|stat| stat.st_dev == device && stat.st_ino == inode)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    const JSON: Shape = Shape { format: LogFormat::Json, journal: false };
    const JSON_JOURNAL: Shape = Shape { format: LogFormat::Json, journal: true };
    const TEXT: Shape = Shape { format: LogFormat::Text, journal: false };
    const TEXT_JOURNAL: Shape = Shape { format: LogFormat::Text, journal: true };

    fn moment() -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(1_767_323_045_678)
    }

    #[test]
    fn a_line_fits_its_reader() {
        for (shape, level, message, expected) in [
            (TEXT, Level::Info, "started", "2026-01-02T03:04:05.678Z INFO  claimer: started\n"),
            (
                TEXT,
                Level::Error,
                "a\nb\r\u{1b}[2J",
                "2026-01-02T03:04:05.678Z ERROR claimer: a\\nb\\r\\u{1b}[2J\n",
            ),
            (TEXT_JOURNAL, Level::Info, "started", "<6>claimer: started\n"),
            (TEXT_JOURNAL, Level::Error, "bad\n<0>forged", "<3>claimer: bad\\n<0>forged\n"),
            (TEXT_JOURNAL, Level::Warn, "ümlaut \u{2028}", "<4>claimer: ümlaut \\u{2028}\n"),
            (TEXT_JOURNAL, Level::Warn, "a\u{202e}b", "<4>claimer: a\\u{202e}b\n"),
            (TEXT_JOURNAL, Level::Debug, "", "<7>claimer: \n"),
        ] {
            assert_eq!(shape.line(level, "claimer", message, moment()), expected);
        }
    }

    #[test]
    fn json_is_one_valid_object_a_line_whatever_the_message() {
        for message in ["plain", "quote \" backslash \\", "line\nbreak\r\0\u{1b}", "ümlaut 🦀 \u{2028}", ""]
        {
            for (shape, prefix) in [(JSON, ""), (JSON_JOURNAL, "<4>")] {
                let line = shape.line(Level::Warn, "worker-3", message, moment());
                let object = line.strip_prefix(prefix).unwrap().strip_suffix('\n').unwrap();
                assert!(!object.contains('\n'), "{line}");
                let entry: serde_json::Value = serde_json::from_str(object).unwrap();
                assert_eq!(entry["msg"], message);
                assert_eq!(entry["ts"], "2026-01-02T03:04:05.678Z");
                assert_eq!(entry["level"], "warn");
                assert_eq!(entry["thread"], "worker-3");
                assert_eq!(entry.as_object().unwrap().len(), 4);
            }
        }
    }

    #[test]
    fn other_crates_are_named() {
        let record = |target: &str| {
            let args = format_args!("hello").to_owned();
            TEXT_JOURNAL
                .record(&Record::builder().level(Level::Warn).target(target).args(args).build(), moment())
                .split_once(": ")
                .unwrap()
                .1
                .to_string()
        };
        assert_eq!(record("pg_outbox::claim::claimer"), "hello\n");
        assert_eq!(record("nats::connector"), "nats: hello\n");
    }

    #[test]
    fn a_long_message_still_fits_one_journal_entry() {
        for character in ["x", "ü", "\u{1b}", "🦀"] {
            let mut message = character.repeat(60_000);
            let whole = message.len();
            cut(&mut message);
            assert!(message.ends_with(&format!(" (cut: {whole} bytes)")), "{message:.20}");
            for shape in [JSON_JOURNAL, TEXT_JOURNAL] {
                assert!(shape.line(Level::Error, "worker-12", &message, moment()).len() < 48 * 1024);
            }
        }
        let mut short = "x".repeat(MAX_MESSAGE_BYTES);
        cut(&mut short);
        assert_eq!(short.len(), MAX_MESSAGE_BYTES);
    }

    #[test]
    fn the_journal_is_told_by_device_and_inode() {
        let file = tempfile::tempfile().unwrap();
        let stat = rustix::fs::fstat(&file).unwrap();
        let (device, inode) = (stat.st_dev, stat.st_ino);
        for (named, expected) in [
            (Some(format!("{device}:{inode}")), true),
            (Some(format!("{device}:{}", inode + 1)), false),
            (Some(format!("{}:{inode}", device + 1)), false),
            (Some(format!("{inode}")), false),
            (Some("a:b".to_string()), false),
            (None, false),
        ] {
            assert_eq!(is_the_journal(&file, named.as_deref()), expected, "{named:?}");
        }
    }

    /// What a process of its own, since a process has one logger, writes to its stderr.
    fn written_alone(format: &str, journal: bool) -> String {
        let stderr = tempfile::NamedTempFile::new().unwrap();
        let stat = rustix::fs::fstat(&stderr).unwrap();
        let inode = if journal { stat.st_ino } else { stat.st_ino + 1 };
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", THIS_TEST, "--nocapture"])
            .env(ALONE, format)
            .env("JOURNAL_STREAM", format!("{}:{inode}", stat.st_dev))
            .stdout(std::process::Stdio::null())
            .stderr(stderr.reopen().unwrap())
            .status();
        assert!(status.unwrap().success());
        std::fs::read_to_string(stderr.path()).unwrap()
    }

    const ALONE: &str = "PG_OUTBOX_TEST_ALONE";
    /// The test below as the test runner calls it, and its thread.
    const THIS_TEST: &str = "ops::logging::tests::the_level_is_ours_and_can_change";

    fn log_alone(format: LogFormat) {
        init(&config::Logging { format, ..config::Logging::defaults() }).unwrap();
        log::info!("info\nof ours");
        log::debug!("debug of ours");
        log::info!(target: "r2d2::pool", "info of theirs");
        log::warn!(target: "r2d2::pool", "warning of theirs");
        log::warn!(target: "nats::client", "unknown op");
        set_level(LevelFilter::Debug);
        log::debug!("debug of ours at last");
        log::debug!(target: "r2d2::pool", "debug of theirs");
        set_level(LevelFilter::Error);
        log::warn!("too low");
        assert!(init(&config::Logging { format, ..config::Logging::defaults() }).is_err());
    }

    #[test]
    fn the_level_is_ours_and_can_change() {
        match std::env::var(ALONE).as_deref() {
            Ok("text") => return log_alone(LogFormat::Text),
            Ok(_) => return log_alone(LogFormat::Json),
            Err(_) => {}
        }
        let thread = THIS_TEST;
        assert_eq!(
            written_alone("text", true),
            format!(
                "<6>{thread}: info\\nof ours\n<4>{thread}: r2d2: warning of theirs\n<7>{thread}: debug of ours at last\n"
            )
        );
        let text = written_alone("text", false);
        let levels: Vec<_> = text.lines().map(|line| line.split(' ').nth(1).unwrap()).collect();
        assert_eq!(levels, ["INFO", "WARN", "DEBUG"], "{text}");
        for (journal, start) in [(true, "<6>{\"ts\":\"20"), (false, "{\"ts\":\"20")] {
            let json = written_alone("json", journal);
            assert!(json.starts_with(start), "{json}");
            assert_eq!(json.lines().count(), 3, "{json}");
        }
    }
}
