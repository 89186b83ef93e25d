//! The built program as an operator runs it: a config file, a process, its log, its endpoints, its exit code.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::ops::{Deref, DerefMut};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use pg_outbox::lab::sandbox::Guard;
use rustix::process::{Pid, Signal};
use serde_yaml::Value;

use super::{Evidence, TestDb, TestStream, secrets, unique, wait_until};

/// Longest wait for the log line that says where the program listens.
const LISTEN_LIMIT: Duration = Duration::from_secs(60);
/// Longest wait for the answer to a request.
const HTTP_LIMIT: Duration = Duration::from_secs(5);
/// Lines of the log that the evidence shows.
const EVIDENCE_LINES: usize = 40;
/// Set in a developer's shell or by a service manager, these would change what the program does.
const CLEARED_VARIABLES: [&str; 10] = [
    "DATABASE_DSN",
    "NATS_URL",
    "DISPATCHER_INSTANCE_ID",
    "LOG_LEVEL",
    "RUST_LOG",
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "CREDENTIALS_DIRECTORY",
    "JOURNAL_STREAM",
];

/// A config file to be.
#[derive(Debug, Clone)]
pub struct Config(Value);

impl Config {
    /// Events of this database, as its dispatcher, into this stream: every topic goes to `<prefix>.<topic>`, logging at debug.
    pub fn new(db: &TestDb, stream: &TestStream) -> Config {
        Config(Value::Mapping(serde_yaml::Mapping::new()))
            .set("dispatcher.instance_id", unique("instance-"))
            .set("dispatcher.workers", 4)
            .set("database.dsn", db.dispatcher_dsn())
            .set("database.max_connections", 10)
            .set("nats.url", stream.url.as_str())
            .set("nats.jetstream.enabled", true)
            .set("nats.jetstream.stream_name", stream.name.as_str())
            .set_in("nats.topic_map", ">", format!("{}.>", stream.prefix))
            .set("logging.level", "debug")
            .set("logging.format", "text")
            .set("metrics.address", "127.0.0.1")
            .set("metrics.port", 0)
    }

    /// Sets a key, named by its path with dots.
    pub fn set(self, path: &str, value: impl Into<Value>) -> Config {
        let (parent, key) = path.rsplit_once('.').unwrap();
        self.set_in(parent, key, value)
    }

    /// Sets a key that has dots of its own, below the section at `path`.
    pub fn set_in(mut self, path: &str, key: &str, value: impl Into<Value>) -> Config {
        let value = value.into();
        if let Some(text) = value.as_str() {
            secrets::plant_value(key, text);
        }
        let mut section = &mut self.0;
        for name in path.split('.') {
            section = section
                .as_mapping_mut()
                .unwrap()
                .entry(name.into())
                .or_insert_with(|| Value::Mapping(serde_yaml::Mapping::new()));
        }
        section.as_mapping_mut().unwrap().insert(key.into(), value);
        self
    }

    /// Removes a key or a section, named by its path with dots.
    pub fn unset(mut self, path: &str) -> Config {
        let (parent, key) = path.rsplit_once('.').unwrap();
        let mut section = &mut self.0;
        for name in parent.split('.') {
            section = section.get_mut(name).unwrap_or_else(|| panic!("{path}: there is no {name}"));
        }
        section.as_mapping_mut().unwrap().remove(key);
        self
    }

    /// The text of the file.
    pub fn yaml(&self) -> String {
        serde_yaml::to_string(&self.0).unwrap()
    }
}

/// A command of the built program, in an environment without our variables.
pub fn pg_outbox() -> Program {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pg-outbox"));
    for name in CLEARED_VARIABLES {
        command.env_remove(name);
    }
    command.stdin(Stdio::null());
    Program(command)
}

/// A command whose output is searched for planted secrets.
pub struct Program(Command);

impl Program {
    pub fn arg(&mut self, argument: impl AsRef<OsStr>) -> &mut Program {
        self.0.arg(argument);
        self
    }

    pub fn args(&mut self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> &mut Program {
        self.0.args(arguments);
        self
    }

    pub fn env(&mut self, name: &str, value: impl AsRef<OsStr>) -> &mut Program {
        self.0.env(name, value);
        self
    }

    /// Runs it to its end.
    #[track_caller]
    pub fn output(&mut self) -> std::io::Result<Output> {
        let output = self.0.output()?;
        secrets::assert_none_printed(&output);
        Ok(output)
    }
}

impl Deref for Program {
    type Target = Command;

    fn deref(&self) -> &Command {
        &self.0
    }
}

impl DerefMut for Program {
    fn deref_mut(&mut self) -> &mut Command {
        &mut self.0
    }
}

/// `pg-outbox run`. Dropping it kills it, and searches what it printed for planted secrets.
pub struct Daemon {
    child: Child,
    guard: Guard,
    folder: PathBuf,
    address: Option<SocketAddr>,
}

impl Daemon {
    /// Runs the program with this config and waits until it listens.
    pub fn start(config: &Config) -> Daemon {
        let mut daemon = Daemon::spawn(&config.yaml(), |_| {});
        daemon.wait_listening();
        daemon
    }

    /// Two instances with this config, `first` and `second` by name, that listen.
    pub fn start_two(config: &Config) -> [Daemon; 2] {
        ["first", "second"].map(|name| Daemon::start(&config.clone().set("dispatcher.instance_id", name)))
    }

    /// Runs the program with this text as its config file, after `adjust` had its way with the command; waits for nothing.
    pub fn spawn(yaml: &str, adjust: impl FnOnce(&mut Command)) -> Daemon {
        let folder = tempfile::Builder::new().prefix("pg-outbox-daemon-").tempdir().unwrap();
        let guard = Guard::over(folder.path(), "KILL").unwrap();
        let folder = folder.keep();
        let config = folder.join("config.yaml");
        fs::write(&config, yaml).unwrap();
        let mut command = pg_outbox();
        command.args(["run", "--config"]).arg(&config);
        adjust(&mut command);
        Daemon::launch(command.0, folder, guard)
    }

    /// Runs `command`, which is the program in some shape, with nothing of ours but its output in files.
    pub fn run(command: Command) -> Daemon {
        let folder = tempfile::Builder::new().prefix("pg-outbox-daemon-").tempdir().unwrap();
        let guard = Guard::over(folder.path(), "KILL").unwrap();
        Daemon::launch(command, folder.keep(), guard)
    }

    fn launch(mut command: Command, folder: PathBuf, mut guard: Guard) -> Daemon {
        command.process_group(0);
        command.stdout(File::create(folder.join("stdout")).unwrap());
        command.stderr(File::create(folder.join("stderr")).unwrap());
        let child = command.spawn().unwrap();
        guard.watch(child.id()).unwrap();
        Daemon { child, guard, folder, address: None }
    }

    /// Waits for the line that says where it listens. It must not end meanwhile.
    pub fn wait_listening(&mut self) {
        let deadline = Instant::now() + LISTEN_LIMIT;
        while self.address.is_none() {
            self.address = listening(&self.log());
            let ended = self.child.try_wait().unwrap();
            assert!(self.address.is_some() || ended.is_none(), "ended with {ended:?}\n{}", self.evidence());
            assert!(Instant::now() < deadline, "does not listen after {LISTEN_LIMIT:?}\n{}", self.evidence());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until `/ready` answers 200.
    #[track_caller]
    pub fn wait_ready(&self) {
        wait_until("the daemon is ready", Duration::from_secs(60), &[self], || self.get("/ready").0 == 200);
    }

    /// Its config file.
    pub fn config(&self) -> PathBuf {
        self.folder.join("config.yaml")
    }

    /// Replaces its config file, which it reads again when told to.
    pub fn write_config(&self, config: &Config) {
        fs::write(self.config(), config.yaml()).unwrap();
    }

    /// Sends SIGTERM.
    pub fn term(&self) {
        self.signal(Signal::TERM);
    }

    /// Sends SIGINT.
    pub fn interrupt(&self) {
        self.signal(Signal::INT);
    }

    /// Sends SIGHUP.
    pub fn reload(&self) {
        self.signal(Signal::HUP);
    }

    /// Kills it with SIGKILL and waits until it is gone.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.guard.watch_nothing().unwrap();
    }

    /// Stops it with SIGSTOP.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// True while it is stopped, by us or by a failpoint.
    pub fn is_paused(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// Waits until it has ended by itself.
    #[track_caller]
    pub fn wait_exit(&mut self, limit: Duration) -> ExitStatus {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                self.guard.watch_nothing().unwrap();
                return status;
            }
            assert!(Instant::now() < deadline, "still runs after {limit:?}\n{}", self.evidence());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// True while it has not ended.
    pub fn running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it logged: its stderr.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.folder.join("stderr")).unwrap()).into_owned()
    }

    /// Its lines of log that contain `part`.
    pub fn log_lines(&self, part: &str) -> Vec<String> {
        self.log().lines().filter(|line| line.contains(part)).map(str::to_owned).collect()
    }

    /// What it printed to stdout.
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.folder.join("stdout")).unwrap()).into_owned()
    }

    /// Status and body of a GET; status 0 and the cause if there is no answer.
    pub fn get(&self, path: &str) -> (u16, String) {
        let address = self.address.expect("wait_listening comes first");
        get(address, path).unwrap_or_else(|error| (0, error.to_string()))
    }

    /// Where this path is.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address.expect("wait_listening comes first"))
    }

    /// The value of a metric: with labels (`name{label="value"}`) of that sample, without the sum over all of them.
    #[track_caller]
    pub fn metric(&self, name: &str) -> f64 {
        let (status, text) = self.get("/metrics");
        assert_eq!(status, 200, "{text}\n{}", self.evidence());
        sum_of_samples(&text, name).unwrap_or_else(|| panic!("no metric {name} in\n{text}"))
    }

    /// Where it shows a planted secret: in its log, on stdout, or to `ps`.
    fn shown_secret(&self) -> Option<String> {
        let command_line = fs::read(format!("/proc/{}/cmdline", self.child.id())).unwrap_or_default();
        let read = |name: &str| fs::read(self.folder.join(name)).unwrap_or_default();
        let places = [
            ("the daemon's log", read("stderr")),
            ("the daemon's stdout", read("stdout")),
            ("the daemon's command line", command_line),
        ];
        places.iter().find_map(|(place, bytes)| secrets::shown_in(place, &String::from_utf8_lossy(bytes)))
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let shown = self.shown_secret();
        let _ = self.child.kill();
        let _ = self.child.wait();
        // What failed first is what the test is told.
        if let Some(found) = shown
            && !std::thread::panicking()
        {
            panic!("{found}");
        }
    }
}

impl Evidence for Daemon {
    fn evidence(&self) -> String {
        let log = self.log();
        let skip = log.lines().count().saturating_sub(EVIDENCE_LINES);
        let lines: Vec<&str> = log.lines().skip(skip).collect();
        format!("--- log of the daemon (pid {})\n{}", self.child.id(), lines.join("\n"))
    }
}

/// The address in `http listening: address=127.0.0.1:PORT`, whatever surrounds it.
pub fn listening(log: &str) -> Option<SocketAddr> {
    let (_, rest) = log.split_once("http listening: address=")?;
    let end = rest.find(|c: char| !(c.is_ascii_digit() || c == '.' || c == ':'))?;
    rest[..end].parse().ok()
}

/// A GET in HTTP/1.0, so that the body ends with the connection.
pub fn get(address: SocketAddr, path: &str) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&address, HTTP_LIMIT)?;
    stream.set_read_timeout(Some(HTTP_LIMIT))?;
    stream.set_write_timeout(Some(HTTP_LIMIT))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    secrets::assert_none_in(&format!("the answer to GET {path}"), &answer);
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    Ok((status, body.to_owned()))
}

/// The sum of the samples called `name` in the Prometheus text format; `None` without any.
pub fn sum_of_samples(text: &str, name: &str) -> Option<f64> {
    let values: Vec<f64> = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.rsplit_once(' '))
        .filter(|(sample, _)| *sample == name || sample.split('{').next() == Some(name))
        .map(|(_, value)| value.parse().unwrap())
        .collect();
    (!values.is_empty()).then(|| values.iter().sum())
}
