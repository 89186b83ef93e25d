//! What we tell systemd: ready, reloading, stopping, a status line, and that we are alive.
//!
//! The protocol is one datagram a message to the socket named by `NOTIFY_SOCKET` (sd_notify(3)); without that
//! variable every method does nothing. Used by main and the service's supervision. A message never blocks for
//! longer than a second and never fails the service: a lost one is logged. The watchdog
//! (sd_watchdog_enabled(3)) is fed only while every thread makes progress, so that systemd restarts what
//! hangs.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use log::{error, warn};
use rustix::time::{ClockId, clock_gettime};

use crate::ops::health::Verdict;

/// The line to systemd.
#[derive(Debug)]
pub struct Systemd {
    socket: Option<UnixDatagram>,
    watchdog: Option<Duration>,
}

impl Systemd {
    /// The line of this process, as the environment names it; a silent one if systemd did not start us so.
    pub fn from_env() -> Systemd {
        let socket = env::var_os("NOTIFY_SOCKET");
        let variable = |name: &str| env::var(name).ok();
        let watchdog = watchdog(variable("WATCHDOG_USEC").as_deref(), variable("WATCHDOG_PID").as_deref());
        Systemd::new(socket.as_deref(), watchdog)
    }

    /// The line over the socket `name`: a path, or an abstract name after `@`.
    fn new(name: Option<&OsStr>, watchdog: Option<Duration>) -> Systemd {
        let connected = name.map(|name| connect(name).map_err(|cause| (name, cause))).transpose();
        let socket = connected.unwrap_or_else(|(name, cause)| {
            warn!("systemd cannot be told anything: NOTIFY_SOCKET={}: {cause}", name.display());
            None
        });
        Systemd { socket, watchdog }
    }

    /// The service is up. `Type=notify` units count as started from here on.
    pub fn ready(&self) {
        self.send("READY=1");
    }

    /// The configuration is being read again; [`ready`](Systemd::ready) says when that is over, well or not. The
    /// time lets `Type=notify-reload` tell this reload from one that was under way when it asked (sd_notify(3)).
    pub fn reloading(&self) {
        let now = clock_gettime(ClockId::Monotonic);
        let usec = now.tv_sec * 1_000_000 + now.tv_nsec / 1_000;
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={usec}"));
    }

    /// The drain begins.
    pub fn stopping(&self) {
        self.send("STOPPING=1");
    }

    /// The line that `systemctl status` shows.
    pub fn status(&self, text: &str) {
        // A newline would begin another assignment.
        self.send(&format!("STATUS={}", text.replace(['\n', '\r'], " ")));
    }

    /// How often to call [`feed`](Systemd::feed): half of what the unit's `WatchdogSec=` allows, as
    /// sd_watchdog_enabled(3) advises. `None`: no watchdog.
    pub fn watchdog_interval(&self) -> Option<Duration> {
        self.watchdog.map(|allowed| allowed / 2)
    }

    /// Feeds the watchdog if `live` is ok. Otherwise it stays hungry, and systemd restarts us unless the
    /// threads recover before `WatchdogSec=` is over.
    pub fn feed(&self, live: &Verdict) {
        if self.watchdog.is_none() {
            return;
        }
        if live.ok {
            self.send("WATCHDOG=1");
        } else {
            error!("watchdog not fed: {}", live.reasons.join("; "));
        }
    }

    fn send(&self, message: &str) {
        let Some(socket) = &self.socket else { return };
        if let Err(cause) = socket.send(message.as_bytes()) {
            warn!("systemd was not told {message}: {cause}");
        }
    }
}

/// Longest time to wait for room in systemd's queue.
const SEND_TIMEOUT: Duration = Duration::from_secs(1);

fn connect(name: &OsStr) -> io::Result<UnixDatagram> {
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    socket.set_write_timeout(Some(SEND_TIMEOUT))?;
    Ok(socket)
}

/// The time between two feeds at most. `WATCHDOG_PID` names the process that is meant: a child inherits both.
fn watchdog(usec: Option<&str>, pid: Option<&str>) -> Option<Duration> {
    if pid.is_some_and(|pid| pid != std::process::id().to_string()) {
        return None;
    }
    usec?.parse().ok().filter(|usec| *usec > 0).map(Duration::from_micros)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;

    fn verdict(reasons: &[&str]) -> Verdict {
        Verdict { ok: reasons.is_empty(), reasons: reasons.iter().map(ToString::to_string).collect() }
    }

    /// Everything that has arrived at `socket` by now; datagrams over a Unix socket arrive with `send`.
    fn received(socket: &UnixDatagram) -> Vec<String> {
        socket.set_nonblocking(true).unwrap();
        let mut buffer = [0; 4096];
        let mut messages = Vec::new();
        while let Ok(length) = socket.recv(&mut buffer) {
            messages.push(String::from_utf8(buffer[..length].to_vec()).unwrap());
        }
        messages
    }

    fn tell_everything(name: &OsStr) {
        let systemd = Systemd::new(Some(name), Some(Duration::from_secs(60)));
        systemd.status("claims\nREADY=0");
        systemd.ready();
        systemd.feed(&verdict(&[]));
        systemd.feed(&verdict(&["worker-1: no progress for 99s"]));
        systemd.stopping();
    }

    const TOLD: [&str; 4] = ["STATUS=claims READY=0", "READY=1", "WATCHDOG=1", "STOPPING=1"];

    #[test]
    fn systemd_hears_us_over_a_path() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        tell_everything(path.as_os_str());
        assert_eq!(received(&socket), TOLD);
    }

    #[test]
    fn systemd_hears_us_over_an_abstract_name() {
        // No other test process has this name.
        let name = format!("pg-outbox-test-{}-{:016x}", std::process::id(), fastrand::u64(..));
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let socket = UnixDatagram::bind_addr(&address).unwrap();
        tell_everything(&OsString::from(format!("@{name}")));
        assert_eq!(received(&socket), TOLD);
    }

    #[test]
    fn a_lost_or_stuck_systemd_stops_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        tell_everything(path.as_os_str());

        let socket = UnixDatagram::bind(&path).unwrap();
        let systemd = Systemd::new(Some(path.as_os_str()), None);
        // Nobody reads: the queue fills up, and each message then costs SEND_TIMEOUT at most.
        let filler = systemd.socket.as_ref().unwrap();
        filler.set_nonblocking(true).unwrap();
        while filler.send(b"X=1").is_ok() {}
        filler.set_nonblocking(false).unwrap();
        let begun = std::time::Instant::now();
        systemd.ready();
        assert!(begun.elapsed() < SEND_TIMEOUT * 3);
        drop(socket);
        systemd.stopping();
    }

    #[test]
    fn without_a_watchdog_nothing_is_fed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let systemd = Systemd::new(Some(path.as_os_str()), None);
        systemd.feed(&verdict(&[]));
        assert_eq!(systemd.watchdog_interval(), None);
        assert_eq!(received(&socket), [""; 0]);
    }

    #[test]
    fn the_watchdog_is_ours_or_nobodys() {
        let ours = std::process::id().to_string();
        for (usec, pid, expected) in [
            (Some("60000000"), Some(ours.as_str()), Some(30)),
            (Some("60000000"), None, Some(30)),
            (Some("60000000"), Some("1"), None),
            (Some("0"), None, None),
            (Some("soon"), None, None),
            (None, Some(ours.as_str()), None),
            (None, None, None),
        ] {
            let systemd = Systemd::new(None, watchdog(usec, pid));
            assert_eq!(systemd.watchdog_interval(), expected.map(Duration::from_secs), "{usec:?} {pid:?}");
        }
    }
}
