//! Ends a private server and removes its folder when its owner is gone.
//!
//! Beside each server runs a small shell that waits for the end of a pipe which only the owner holds. The kernel closes
//! that pipe however the owner ends (return, panic, a static that is never dropped, Ctrl-C, SIGKILL), and the shell then
//! does what is left. A parent-death signal would not do: it fires when the thread that started the server ends, which in
//! a test is long before the process does, and it removes no folder.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::{Context, Result};

/// Ends a process and removes a folder as soon as its owner is gone, in whatever way it went.
///
/// A shell, in a process group of its own, that reads process ids from a pipe of which we hold the only other
/// end; at its end the last id that came is signalled, killed if need be, and the folder is removed. It leaves
/// one gap: the owner killed in the microseconds between starting the process and telling the guard.
#[derive(Debug)]
pub struct Guard {
    shell: Child,
    pipe: Option<ChildStdin>,
}

/// `$1` is the folder, `$2` the signal to begin with. A paused server must be let go on, or it cannot end; so must
/// its children. A zombie has ended, even if nobody ever waits for it (the first process of a container may not).
const GUARD_SCRIPT: &str = r#"
trap '' HUP INT QUIT TERM
lives() { state=$(cat "/proc/$1/stat") && case "${state##*) }" in Z*) false ;; esac; }
process=0
while read -r line; do process=$line; done
if [ "$process" -gt 0 ]; then
    children=$(cat "/proc/$process/task/$process/children")
    kill "-$2" "$process"
    kill -CONT "$process" $children
    tries=0
    while lives "$process" && [ "$tries" -lt 50 ]; do sleep 0.1; tries=$((tries + 1)); done
    kill -KILL "$process"
fi
rm -rf "$1" || { sleep 1; rm -rf "$1"; }
"#;

impl Guard {
    /// A guard over a folder, and over no process yet. `signal`, as in `kill -SIGNAL`, is what a watched process gets
    /// first; SIGKILL follows 5 s later.
    pub fn over(folder: &Path, signal: &str) -> Result<Guard> {
        let mut shell = Command::new("/bin/sh")
            .args(["-c", GUARD_SCRIPT, "pg-outbox-guard"])
            .arg(folder)
            .arg(signal)
            .process_group(0)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("run /bin/sh as guard")?;
        let pipe = shell.stdin.take();
        Ok(Guard { shell, pipe })
    }

    /// Watches this process from now on, instead of the one before.
    pub fn watch(&mut self, pid: u32) -> Result<()> {
        let pipe = self.pipe.as_mut().context("the guard has no pipe")?;
        writeln!(pipe, "{pid}").context("tell the guard the process")
    }

    /// Watches no process from now on: call it once the one before was waited for, since its id may be given again.
    pub fn watch_nothing(&mut self) -> Result<()> {
        self.watch(0)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        drop(self.pipe.take());
        let _ = self.shell.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rustix::process::{Pid, Signal, kill_process};

    use super::*;

    #[test]
    fn the_guard_ends_the_process_and_removes_the_folder_when_its_owner_is_gone() {
        let folder = tempfile::tempdir().unwrap().keep();
        fs::write(folder.join("data"), "x").unwrap();
        let mut guard = Guard::over(&folder, "TERM").unwrap();
        let mut process = Command::new("sleep").arg("600").spawn().unwrap();
        guard.watch(process.id()).unwrap();
        // Even one that is paused.
        kill_process(Pid::from_child(&process), Signal::STOP).unwrap();
        let reaper = std::thread::spawn(move || process.wait().unwrap());
        drop(guard); // closes the pipe, as the end of the owner would
        assert!(!reaper.join().unwrap().success(), "ended by a signal");
        assert!(!folder.exists());
    }

    #[test]
    fn a_guard_over_nothing_leaves_the_former_process_alone() {
        let folder = tempfile::tempdir().unwrap().keep();
        let mut guard = Guard::over(&folder, "KILL").unwrap();
        let mut process = Command::new("sleep").arg("600").spawn().unwrap();
        guard.watch(process.id()).unwrap();
        guard.watch_nothing().unwrap();
        drop(guard);
        assert!(process.try_wait().unwrap().is_none(), "still running");
        process.kill().unwrap();
        process.wait().unwrap();
    }
}
