//! What both private servers have in common: a folder, a log in it, a process, a port, and the guard over them.
//!
//! A server is stopped by a signal and killed if that does not help; paused, it and its children stand still with their
//! connections open.

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal};

use super::guard::Guard;

/// Longest wait for a server to answer after its start, recovery from a crash included.
pub(super) const START_LIMIT: Duration = Duration::from_secs(60);
/// Longest wait for a server to end after it was asked to; then it is killed.
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// Time between two looks at something another process does.
pub(super) const POLL: Duration = Duration::from_millis(20);
/// Ports tried before giving up, when others take each one between our look and the server's bind.
const PORT_TRIES: usize = 10;
/// Lines of a server's log that an error shows.
const LOG_TAIL_LINES: usize = 15;

/// What both servers have in common: a folder, a log in it, a process, and the guard over both.
#[derive(Debug)]
pub(super) struct ServerProcess {
    name: &'static str,
    pub(super) child: Option<Child>,
    pub(super) folder: PathBuf,
    guard: Guard,
}

impl ServerProcess {
    pub(super) fn new(name: &'static str, guard_signal: &str) -> Result<ServerProcess> {
        let folder = tempfile::Builder::new()
            .prefix(&format!("pg-outbox-{name}-"))
            .tempdir()
            .with_context(|| format!("make a folder for {name}"))?;
        let guard = Guard::over(folder.path(), guard_signal)?;
        // From here on the guard removes it.
        Ok(ServerProcess { name, child: None, folder: folder.keep(), guard })
    }

    pub(super) fn spawn(&mut self, command: &mut Command) -> Result<()> {
        let path = self.log_path();
        let log = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("open {}", path.display()))?;
        let child = command
            // A process group of its own: a Ctrl-C on our terminal is for us to act on, in our order.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("share the log file")?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("run {}", command.get_program().display()))?;
        let pid = child.id();
        self.child = Some(child);
        self.guard.watch(pid)
    }

    pub(super) fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// The exit status, if the server has ended or was never started.
    pub(super) fn exited(&mut self) -> Result<Option<ExitStatus>> {
        let Some(child) = &mut self.child else { return Ok(Some(ExitStatus::default())) };
        let status = child.try_wait().with_context(|| format!("wait for {}", self.name))?;
        if status.is_some() {
            self.child = None;
            self.guard.watch_nothing()?;
        }
        Ok(status)
    }

    pub(super) fn stop(&mut self, signal: Signal) -> Result<()> {
        if self.child.is_none() {
            return Ok(());
        }
        self.signal_all(signal)?;
        let deadline = Instant::now() + STOP_LIMIT;
        while self.exited()?.is_none() {
            if Instant::now() > deadline {
                self.signal_all(Signal::KILL)?;
            }
            sleep(POLL);
        }
        Ok(())
    }

    pub(super) fn pause(&self) -> Result<()> {
        let pid = self.running()?;
        // The parent first: then no child can appear while we stop the children.
        send(pid, Signal::STOP)?;
        for child in children(pid)? {
            send_if_there(child, Signal::STOP);
        }
        // The signal is only on its way: on a busy machine a thread may run on for a moment.
        let deadline = Instant::now() + STOP_LIMIT;
        while !stands_still(pid)? {
            ensure!(Instant::now() < deadline, "{} does not stand still after SIGSTOP", self.name);
            sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    pub(super) fn resume(&self) -> Result<()> {
        let pid = self.running()?;
        for child in children(pid)? {
            send_if_there(child, Signal::CONT);
        }
        send(pid, Signal::CONT)
    }

    /// Sends `signal` to the server, and sees to it that a paused one gets to act on it.
    fn signal_all(&self, signal: Signal) -> Result<()> {
        let pid = self.running()?;
        // Listed before: once the server is dead, its children are no longer known as such.
        let children = children(pid)?;
        send(pid, signal)?;
        for child in children {
            send_if_there(child, Signal::CONT);
        }
        send(pid, Signal::CONT)
    }

    fn running(&self) -> Result<u32> {
        self.pid().with_context(|| format!("{} is not running", self.name))
    }

    fn log_path(&self) -> PathBuf {
        self.folder.join("server.log")
    }

    pub(super) fn log(&self) -> String {
        fs::read(self.log_path()).map(|bytes| text(&bytes)).unwrap_or_default()
    }

    pub(super) fn log_tail(&self) -> String {
        tail(&self.log(), LOG_TAIL_LINES)
    }
}

/// Starts a server on whatever port is free: `start` is true once the server answers on its port,
/// false when somebody else has taken it meanwhile.
pub(super) fn on_a_free_port(name: &str, mut start: impl FnMut(u16) -> Result<bool>) -> Result<()> {
    for _ in 0..PORT_TRIES {
        if start(free_port()?)? {
            return Ok(());
        }
    }
    bail!("start {name}: {PORT_TRIES} free ports were taken by others before it could listen")
}

/// A port of 127.0.0.1 that nobody listens on, below the kernel's ephemeral range.
///
/// From that range the kernel picks the local end of outgoing connections: a client that tries to reach a stopped
/// server there can take the port away from it, or connect to itself.
pub fn free_port() -> Result<u16> {
    const LOWEST: u16 = 10_000;
    const TRIES: usize = 1_000;
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let ephemeral = range.split_whitespace().next().and_then(|low| low.parse().ok()).unwrap_or(32_768);
    let highest = if ephemeral > LOWEST + 1_000 { ephemeral } else { u16::MAX };
    for _ in 0..TRIES {
        let port = fastrand::u16(LOWEST..highest);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    bail!("no free port on 127.0.0.1 in {TRIES} tries between {LOWEST} and {highest}")
}

/// The first folder of PATH that holds `program`.
pub(super) fn on_path(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).find(|folder| has(folder, program))
}

pub(super) fn has(folder: &Path, program: &str) -> bool {
    folder.join(program).is_file()
}

/// Direct children of a process, from proc(5). Neither server has grandchildren.
fn children(pid: u32) -> Result<Vec<u32>> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let list = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    list.split_whitespace().map(|child| child.parse().with_context(|| format!("{path}: {child}"))).collect()
}

/// Whether every thread of the process is stopped.
fn stands_still(pid: u32) -> Result<bool> {
    for thread in
        fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("list threads of {pid}"))?
    {
        let stat = fs::read_to_string(thread?.path().join("stat")).unwrap_or_default();
        // The state is the first field behind the name, which is in parentheses and may hold anything.
        let state = stat.rsplit_once(')').map_or("", |(_, fields)| fields.trim_start());
        if !stat.is_empty() && !state.starts_with('T') {
            return Ok(false);
        }
    }
    Ok(true)
}

pub(super) fn send(pid: u32, signal: Signal) -> Result<()> {
    let target =
        i32::try_from(pid).ok().and_then(Pid::from_raw).with_context(|| format!("process id {pid}"))?;
    rustix::process::kill_process(target, signal).with_context(|| format!("send {signal:?} to process {pid}"))
}

/// For children: one may have ended since we looked.
fn send_if_there(pid: u32, signal: Signal) {
    let _ = send(pid, signal);
}

fn tail(log: &str, lines: usize) -> String {
    let skip = log.lines().count().saturating_sub(lines);
    log.lines().skip(skip).collect::<Vec<_>>().join("\n")
}

pub(super) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_is_the_last_lines() {
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc");
        assert_eq!(tail("a\n", 2), "a");
    }
}
