//! The demo passes its own judgement, and leaves nothing behind, however it ends.

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::harness::daemon::pg_outbox;
use crate::harness::wait_until;

/// A temp folder for the demo and its servers alone, which the user postgres may enter.
fn temp_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    folder
}

/// Processes that work in a folder or below it.
fn processes_in(folder: &Path) -> Vec<PathBuf> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    processes
        .map(|entry| entry.path())
        .filter(|process| fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd.starts_with(folder)))
        .collect()
}

/// Starts `demo --keep` and reads on until it says that it stays.
fn kept_demo(folder: &Path) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut demo = pg_outbox()
        .args(["demo", "--events", "20", "--keep"])
        .env("TMPDIR", folder)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = BufReader::new(demo.stdout.take().unwrap());
    let mut text = String::new();
    while !text.contains("still running") {
        assert!(stdout.read_line(&mut text).unwrap() > 0, "{text}");
    }
    assert!(!processes_in(folder).is_empty());
    (demo, stdout)
}

fn nothing_left(folder: &Path) {
    wait_until("nothing of the demo is left", Duration::from_secs(15), &[], || {
        processes_in(folder).is_empty() && fs::read_dir(folder).unwrap().next().is_none()
    });
}

#[test]
fn the_demo_delivers_what_was_committed_and_nothing_else() {
    let folder = temp_folder();
    let output = pg_outbox().args(["demo", "--events", "500"]).env("TMPDIR", folder.path()).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    for (name, value) in [("committed", "500"), ("delivered", "500"), ("duplicates", "0"), ("lost", "0")] {
        let line =
            text.lines().find(|line| line.trim_start().starts_with(name)).unwrap_or_else(|| panic!("{text}"));
        assert_eq!(line.split_whitespace().last(), Some(value), "{text}");
    }
    nothing_left(folder.path());
}

#[test]
fn ctrl_c_ends_a_kept_demo_in_order_and_leaves_nothing() {
    let folder = temp_folder();
    let (mut demo, _stdout) = kept_demo(folder.path());
    kill_process(Pid::from_child(&demo), Signal::INT).unwrap();
    assert!(demo.wait().unwrap().success());
    nothing_left(folder.path());
}

#[test]
fn a_killed_demo_leaves_nothing() {
    let folder = temp_folder();
    let (mut demo, _stdout) = kept_demo(folder.path());
    demo.kill().unwrap();
    demo.wait().unwrap();
    nothing_left(folder.path());
}
