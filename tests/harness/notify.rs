//! systemd's side of its protocol with a service: a real datagram socket, and what came over it.

use std::cell::RefCell;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use super::Evidence;

/// The socket that `NOTIFY_SOCKET` names.
pub struct NotifySocket {
    socket: UnixDatagram,
    folder: tempfile::TempDir,
    received: RefCell<Vec<String>>,
}

impl NotifySocket {
    /// Listens for messages, from a process of any user.
    pub fn new() -> NotifySocket {
        let folder = tempfile::tempdir().unwrap();
        std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let path = folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o777)).unwrap();
        NotifySocket { socket, folder, received: RefCell::default() }
    }

    /// Its path.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("notify")
    }

    /// Makes a command talk to us, with a watchdog that wants to be fed twice in `watchdog`.
    pub fn attach(&self, command: &mut Command, watchdog: Duration) {
        command.env("NOTIFY_SOCKET", self.path()).env("WATCHDOG_USEC", watchdog.as_micros().to_string());
    }

    /// The next message; `None` if none comes in time.
    pub fn next(&self, limit: Duration) -> Option<String> {
        self.socket.set_read_timeout(Some(limit)).unwrap();
        let mut buffer = [0; 4096];
        let length = self.socket.recv(&mut buffer).ok()?;
        let message = String::from_utf8(buffer[..length].to_vec()).unwrap();
        self.received.borrow_mut().push(message.clone());
        Some(message)
    }

    /// Reads on until a message that `is_wanted`, and returns it.
    #[track_caller]
    pub fn wait(&self, what: &str, witness: &dyn Evidence, is_wanted: impl Fn(&str) -> bool) -> String {
        let limit = Duration::from_secs(60);
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            match self.next(left) {
                Some(message) if is_wanted(&message) => return message,
                Some(_) => {}
                None => panic!(
                    "waited {limit:?} in vain until systemd hears {what}; it heard {:?}\n{}",
                    self.received.borrow(),
                    witness.evidence()
                ),
            }
        }
    }
}
