//! This program, or another build of it, as a child process, for the demo and the bench: what they show is what an operator would run.
//!
//! A [`Program`] is a config file in a folder of its own; from it `pg-outbox migrate` runs to its end, and `pg-outbox
//! run` becomes a [`Daemon`]. A guard ends the process and removes the folder however this process ends. Variables
//! that would lead the child away from its config file, or make it report to our service manager, are taken from it.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal};

use crate::lab::sandbox::Guard;

/// Longest wait for the daemon to become ready, and to drain at the end.
const DAEMON_LIMIT: Duration = Duration::from_secs(60);
/// Longest wait for an answer of its HTTP server.
const HTTP_LIMIT: Duration = Duration::from_secs(5);
/// Lines of the daemon's log that a failure shows.
const LOG_TAIL_LINES: usize = 20;
/// Would lead the daemon away from its config file, or make it report to our service manager.
const OVERRIDES: [&str; 7] = [
    "DATABASE_DSN",
    "NATS_URL",
    "DISPATCHER_INSTANCE_ID",
    "LOG_LEVEL",
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
];

/// A program, and a config file in a folder of its own.
#[derive(Debug)]
pub struct Program {
    executable: PathBuf,
    folder: PathBuf,
    /// Dropped last, it removes the folder.
    guard: Guard,
}

impl Program {
    /// Writes `yaml` into a new folder, whose name begins with `pg-outbox-<label>-`.
    ///
    /// # Errors
    /// The folder or the file cannot be made.
    pub fn new(label: &str, yaml: &str) -> Result<Program> {
        Program::of(&std::env::current_exe().context("find this program")?, label, yaml)
    }

    /// The same for another build of this program.
    ///
    /// # Errors
    /// As [`Program::new`].
    pub fn of(executable: &Path, label: &str, yaml: &str) -> Result<Program> {
        let prefix = format!("pg-outbox-{label}-");
        let folder = tempfile::Builder::new().prefix(&prefix).tempdir().context("make a folder")?;
        let guard = Guard::over(folder.path(), "KILL")?;
        let program = Program { executable: executable.to_owned(), folder: folder.keep(), guard };
        // It may hold passwords.
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(program.config())
            .and_then(|mut file| file.write_all(yaml.as_bytes()))
            .context("write the daemon's config")?;
        Ok(program)
    }

    /// Runs `pg-outbox migrate`.
    ///
    /// # Errors
    /// What it said.
    pub fn migrate(&self) -> Result<()> {
        let output = self.command("migrate").output().context("run pg-outbox migrate")?;
        ensure!(output.status.success(), "pg-outbox migrate: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// Runs `pg-outbox run`, and waits until it is ready.
    ///
    /// # Errors
    /// It ended, or does not become ready.
    pub fn run(mut self) -> Result<Daemon> {
        let log = File::create(self.folder.join("log")).context("create the daemon's log")?;
        let mut command = self.command("run");
        let child = command.stdout(Stdio::null()).stderr(log).spawn().context("run the daemon")?;
        self.guard.watch(child.id())?;
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut daemon = Daemon { child, address: nowhere, program: self };
        daemon.wait_ready()?;
        Ok(daemon)
    }

    fn config(&self) -> PathBuf {
        self.folder.join("config.yaml")
    }

    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(&self.executable);
        command.arg(name).arg("--config").arg(self.config()).process_group(0).stdin(Stdio::null());
        for name in OVERRIDES {
            command.env_remove(name);
        }
        // As the units have it.
        command.env("GLIBC_TUNABLES", "glibc.malloc.arena_max=2:glibc.malloc.tcache_count=0");
        command
    }
}

/// `pg-outbox run`. Dropping it kills it.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    /// Where its HTTP server listens.
    pub address: SocketAddr,
    /// Dropped after the child has ended.
    program: Program,
}

impl Daemon {
    fn wait_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + DAEMON_LIMIT;
        loop {
            self.must_run()?;
            if let Some(address) = listening(&self.log()) {
                self.address = address;
                if http(address, "/ready").is_ok_and(|answer| answer.contains(" 200 ")) {
                    return Ok(());
                }
            }
            ensure!(Instant::now() < deadline, "the daemon is not ready:\n{}", self.log_tail());
            sleep(Duration::from_millis(20));
        }
    }

    /// An error once it has ended.
    ///
    /// # Errors
    /// It has ended; with the end of its log.
    pub fn must_run(&mut self) -> Result<()> {
        match self.child.try_wait().context("look after the daemon")? {
            None => Ok(()),
            Some(status) => bail!("the daemon ended ({status}):\n{}", self.log_tail()),
        }
    }

    /// The value of a counter or gauge without labels.
    ///
    /// # Errors
    /// It does not answer, or has no such metric.
    pub fn metric(&self, name: &str) -> Result<f64> {
        let answer = http(self.address, "/metrics").context("ask the daemon for its metrics")?;
        let line = answer.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let value = line.with_context(|| format!("the daemon has no metric {name}"))?;
        value.parse().with_context(|| format!("{name} is {value}"))
    }

    /// Events that it has settled as published since it started.
    ///
    /// # Errors
    /// It does not answer.
    pub fn published(&self) -> Result<u64> {
        Ok(self.metric("outbox_events_published_total")? as u64)
    }

    /// Asks it to drain; true if it ended as it should.
    ///
    /// # Errors
    /// The signal cannot be sent.
    pub fn drain(&mut self) -> Result<bool> {
        self.signal(Signal::TERM)?;
        let deadline = Instant::now() + DAEMON_LIMIT;
        loop {
            if let Some(status) = self.child.try_wait().context("wait for the daemon")? {
                return Ok(status.success());
            }
            if Instant::now() > deadline {
                return Ok(false);
            }
            sleep(Duration::from_millis(20));
        }
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// It has ended and was waited for.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.context("process id of the daemon")?;
        rustix::process::kill_process(pid, signal).with_context(|| format!("send {signal:?} to the daemon"))
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The file that it logs to.
    pub fn log_path(&self) -> PathBuf {
        self.program.folder.join("log")
    }

    /// The end of its log.
    pub fn log_tail(&self) -> String {
        let log = self.log();
        let skip = log.lines().count().saturating_sub(LOG_TAIL_LINES);
        let lines: Vec<&str> = log.lines().skip(skip).collect();
        format!("the end of its log:\n{}", lines.join("\n"))
    }

    fn log(&self) -> String {
        fs::read(self.log_path())
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The address in the log line `http listening: address=127.0.0.1:PORT`.
fn listening(log: &str) -> Option<SocketAddr> {
    let (_, rest) = log.split_once("http listening: address=")?;
    rest.split_once(char::is_whitespace)?.0.parse().ok()
}

/// The whole answer to a GET.
fn http(address: SocketAddr, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, HTTP_LIMIT)?;
    stream.set_read_timeout(Some(HTTP_LIMIT))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_read_from_a_whole_line_only() {
        let line = "http listening: address=127.0.0.1:4711 path=/metrics\n";
        assert_eq!(listening(line), Some(SocketAddr::from(([127, 0, 0, 1], 4711))));
        assert_eq!(listening("http listening: address=127.0.0.1:47"), None);
    }
}
