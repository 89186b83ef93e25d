//! Private servers for `demo`, `bench` and the tests: a PostgreSQL and a nats-server of one's own, on loopback.
//!
//! Each server has a folder below the temp folder with its data, its config and its log, and a port below the
//! kernel's ephemeral range, which it keeps over stops and starts. Nothing of them outlives their owner: beside
//! each server runs a [`Guard`], a small shell that waits for the end of a pipe which only we hold. The kernel
//! closes that pipe however we end (return, panic, a static that is never dropped, Ctrl-C, SIGKILL), and the
//! guard then ends the server and removes the folder. A parent-death signal would not do: it fires when the
//! thread that started the server ends, which in a test is long before the process does, and it removes no
//! folder. The servers are spoken to through their own programs and plain TCP, so this file needs no client crate.
//! Nothing here runs on a thread of its own, and no server that was there before is ever touched.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::process::{Pid, Signal};

/// Names the folder with PostgreSQL's programs (`initdb`, `postgres`, `psql`, `pg_isready`).
pub const POSTGRES_BIN_VAR: &str = "PG_OUTBOX_POSTGRES_BIN";
/// Names the nats-server program.
pub const NATS_SERVER_VAR: &str = "PG_OUTBOX_NATS_SERVER";

/// Longest wait for a server to answer after its start, recovery from a crash included.
const START_LIMIT: Duration = Duration::from_secs(60);
/// Longest wait for a server to end after it was asked to; then it is killed.
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// Time between two looks at something another process does.
const POLL: Duration = Duration::from_millis(20);
/// Ports tried before giving up, when others take each one between our look and the server's bind.
const PORT_TRIES: usize = 10;
/// Lines of a server's log that an error shows.
const LOG_TAIL_LINES: usize = 15;

/// How a server is asked to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// PostgreSQL: a fast shutdown, with a checkpoint. nats-server: SIGTERM.
    Fast,
    /// PostgreSQL: an immediate shutdown, as a crash seen from outside: recovery at the next start. nats-server: SIGKILL.
    Immediate,
}

/// What a private PostgreSQL is started with.
#[derive(Debug, Clone)]
pub struct PostgresOptions {
    /// `fsync`. Default true. Off is much faster and safe against every crash of a process (what it wrote is in
    /// the kernel's cache); only a crash of the machine loses it, and a private server's data is not kept anyway.
    pub fsync: bool,
    /// Further settings, as `name=value`; the last one of a name counts. Default none.
    pub settings: Vec<String>,
    /// A program and its arguments that run the server in their own place, given its command line behind them: to
    /// change what it sees of the machine. It runs as the user that we are and must change to another one itself.
    /// Default none.
    pub launcher: Vec<String>,
}

impl Default for PostgresOptions {
    fn default() -> PostgresOptions {
        PostgresOptions { fsync: true, settings: Vec::new(), launcher: Vec::new() }
    }
}

/// A private PostgreSQL. Dropping it ends the server and removes its data.
///
/// It listens on 127.0.0.1 alone and lets in its superuser `postgres` with a random password. When we are root
/// it runs as the user `postgres`, since PostgreSQL refuses to run as root.
#[derive(Debug)]
pub struct Postgres {
    server: Server,
    bin: PathBuf,
    user: Option<UnixUser>,
    password: String,
    port: u16,
    arguments: Vec<String>,
    launcher: Vec<String>,
}

impl Postgres {
    /// Creates a data folder, starts a server on it and waits until it takes connections.
    ///
    /// An error says what is missing and how to install it, or shows the end of the server's log.
    pub fn start(options: &PostgresOptions) -> Result<Postgres> {
        let mut postgres = Postgres::prepare(options, random_password()?)?;
        postgres.initdb()?;
        postgres.start_first()?;
        Ok(postgres)
    }

    /// Starts a second server that copies `primary` and goes on to follow it, read-only, by streaming replication.
    ///
    /// An error is as for [`Postgres::start`], or what pg_basebackup said.
    pub fn start_replica(primary: &Postgres, options: &PostgresOptions) -> Result<Postgres> {
        let mut replica = Postgres::prepare(options, primary.password.clone())?;
        let output = replica
            .as_server_user("pg_basebackup")
            .args([
                "--checkpoint=fast",
                "--wal-method=stream",
                "--write-recovery-conf",
                "--no-sync",
                "--pgdata",
            ])
            .arg(replica.data())
            .args(["--host=127.0.0.1", "--username=postgres", "--port"])
            .arg(primary.port.to_string())
            .env("PGPASSWORD", &primary.password)
            .stdin(Stdio::null())
            .output()
            .context("run pg_basebackup")?;
        ensure!(output.status.success(), "pg_basebackup: {}", text(&output.stderr));
        replica.start_first()?;
        Ok(replica)
    }

    /// Ends the following of a replica, which takes writes from then on.
    pub fn promote(&self) -> Result<()> {
        let output = self
            .as_server_user("pg_ctl")
            .args(["promote", "--wait", "--silent", "--pgdata"])
            .arg(self.data())
            .stdin(Stdio::null())
            .output()
            .context("run pg_ctl")?;
        ensure!(output.status.success(), "pg_ctl promote: {}{}", text(&output.stdout), text(&output.stderr));
        Ok(())
    }

    /// Everything but the data: folder, user, command line.
    fn prepare(options: &PostgresOptions, password: String) -> Result<Postgres> {
        let bin = find_postgres_bin()?;
        let user =
            if rustix::process::geteuid().is_root() { Some(UnixUser::find("postgres")?) } else { None };
        let server = Server::new("postgres", "QUIT")?;
        if let Some(user) = user {
            chown(&server.folder, Some(user.uid), Some(user.gid))
                .with_context(|| format!("give {} to the user postgres", server.folder.display()))?;
        }
        let mut arguments = vec![
            "listen_addresses=127.0.0.1".to_owned(),
            "unix_socket_directories=".to_owned(),
            "max_connections=300".to_owned(),
            format!("fsync={}", if options.fsync { "on" } else { "off" }),
        ];
        arguments.extend(options.settings.iter().cloned());
        let launcher = options.launcher.clone();
        Ok(Postgres { server, bin, user, password, port: 0, arguments, launcher })
    }

    /// The first start, on whatever port is free.
    fn start_first(&mut self) -> Result<()> {
        for _ in 0..PORT_TRIES {
            self.port = free_port()?;
            if self.start_once()? {
                return Ok(());
            }
        }
        bail!("start postgres: {PORT_TRIES} free ports were taken by others before it could listen")
    }

    /// Starts the server again, on the same port and data, after [`Postgres::stop`] or [`Postgres::kill`].
    pub fn start_again(&mut self) -> Result<()> {
        ensure!(self.server.child.is_none(), "start postgres: it is running");
        ensure!(self.start_once()?, "start postgres: port {} was taken meanwhile", self.port);
        Ok(())
    }

    /// Ends the server and waits until it has ended; its data stays.
    pub fn stop(&mut self, mode: Stop) -> Result<()> {
        let signal = match mode {
            Stop::Fast => Signal::INT,
            Stop::Immediate => Signal::QUIT,
        };
        self.server.stop(signal)
    }

    /// Kills the postmaster with SIGKILL; its children notice and end by themselves a moment later.
    pub fn kill(&mut self) -> Result<()> {
        self.server.stop(Signal::KILL)
    }

    /// Stops the postmaster and all its children with SIGSTOP: connections stay open and nothing answers.
    pub fn pause(&self) -> Result<()> {
        self.server.pause()
    }

    /// Lets a paused server go on.
    pub fn resume(&self) -> Result<()> {
        self.server.resume()
    }

    /// Connection string of a database of this server, with the password.
    pub fn dsn(&self, database: &str) -> String {
        format!("postgresql://postgres:{}@127.0.0.1:{}/{database}", self.password, self.port)
    }

    /// Port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Process id of the postmaster, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.server.pid()
    }

    /// Creates an empty database.
    pub fn create_database(&self, name: &str) -> Result<()> {
        let output = self
            .psql("postgres")
            .args(["-c", &format!("CREATE DATABASE \"{name}\"")])
            .output()
            .with_context(|| format!("create database {name}: run psql"))?;
        ensure!(output.status.success(), "create database {name}: {}", text(&output.stderr));
        Ok(())
    }

    /// A `psql` that is set up to talk to a database of this server: quiet, no user settings, first error ends it.
    pub fn psql(&self, database: &str) -> Command {
        let mut command = Command::new(self.bin.join("psql"));
        command
            .args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-U", "postgres", "-d", database])
            .arg("-p")
            .arg(self.port.to_string())
            .env("PGPASSWORD", &self.password)
            .env("PGAPPNAME", "pg-outbox-sandbox")
            .stdin(Stdio::null());
        command
    }

    /// Everything the server has logged.
    pub fn log(&self) -> String {
        self.server.log()
    }

    /// The last lines of the log.
    pub fn log_tail(&self) -> String {
        self.server.log_tail()
    }

    fn initdb(&self) -> Result<()> {
        let password_file = self.server.folder.join("password");
        fs::write(&password_file, &self.password).context("write the password file of initdb")?;
        // `password` and not scram: over loopback nobody listens in, and an unoptimised client takes a tenth of
        // a second for each scram handshake.
        let output = self
            .as_server_user("initdb")
            .args(["--username=postgres", "--encoding=UTF8", "--locale=C", "--auth=password", "--no-sync"])
            .arg("--pwfile")
            .arg(&password_file)
            .arg("--pgdata")
            .arg(self.data())
            .stdin(Stdio::null())
            .output()
            .context("run initdb")?;
        let folder = self.server.folder.display();
        ensure!(output.status.success(), "initdb in {folder}: {}", text(&output.stderr));
        fs::remove_file(&password_file).context("remove the password file of initdb")
    }

    /// One start on `self.port`: true once it takes connections, false if the port is taken.
    fn start_once(&mut self) -> Result<bool> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let mark = self.server.log().len();
            let mut command = self.server_command();
            command.arg("-D").arg(self.data()).arg("-p").arg(self.port.to_string());
            for setting in &self.arguments {
                command.arg("-c").arg(setting);
            }
            self.server.spawn(&mut command)?;
            if self.wait_ready(deadline)? {
                return Ok(true);
            }
            let said = self.server.log().split_off(mark);
            if said.contains("Address already in use") {
                return Ok(false);
            }
            // After a SIGKILL of the postmaster its children still hold the shared memory for a moment.
            ensure!(
                said.contains("still in use") && Instant::now() < deadline,
                "postgres ended while starting:\n{said}"
            );
            sleep(POLL);
        }
    }

    /// True once the server takes connections, false if it ended.
    fn wait_ready(&mut self, deadline: Instant) -> Result<bool> {
        loop {
            if self.server.exited()?.is_some() {
                return Ok(false);
            }
            let status = Command::new(self.bin.join("pg_isready"))
                .args(["-q", "-t", "2", "-h", "127.0.0.1", "-p", &self.port.to_string()])
                .stdin(Stdio::null())
                .status()
                .context("run pg_isready")?;
            // The second look: it was our server that answered, and not one that took the port.
            if status.success() && self.server.exited()?.is_none() {
                return Ok(true);
            }
            ensure!(Instant::now() < deadline, "postgres does not answer:\n{}", self.server.log_tail());
            sleep(POLL);
        }
    }

    fn server_command(&self) -> Command {
        let Some((launcher, arguments)) = self.launcher.split_first() else {
            return self.as_server_user("postgres");
        };
        let mut command = Command::new(launcher);
        command.args(arguments).arg(self.bin.join("postgres"));
        self.in_its_folder(&mut command);
        command
    }

    fn as_server_user(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin.join(program));
        self.in_its_folder(&mut command);
        if let Some(user) = self.user {
            command.uid(user.uid).gid(user.gid);
        }
        command
    }

    fn in_its_folder(&self, command: &mut Command) {
        // The user postgres may not be able to look into our working directory.
        command.current_dir(&self.server.folder).env("LC_ALL", "C").env("TZ", "UTC");
    }

    fn data(&self) -> PathBuf {
        self.server.folder.join("data")
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // What an orderly end leaves undone, the guard does.
        let _ = self.server.stop(Signal::QUIT);
    }
}

/// What a private nats-server is started with.
#[derive(Debug, Clone, Default)]
pub struct NatsOptions {
    /// The program. Default: `PG_OUTBOX_NATS_SERVER`, else `nats-server` of PATH, /usr/bin or /usr/sbin.
    pub program: Option<PathBuf>,
    /// Text that is added to the config file: users and permissions, `max_payload`, `cluster { ... }`. Default empty.
    /// The file sets `listen`, `server_name` and `jetstream` itself.
    pub config: String,
}

/// What a nats-server finds in its JetStream folder when it starts again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// What it stored before.
    Kept,
    /// Nothing: its streams are gone.
    Emptied,
}

/// A private nats-server with JetStream, on 127.0.0.1 alone. Dropping it ends the server and removes its store.
#[derive(Debug)]
pub struct Nats {
    server: Server,
    program: PathBuf,
    config: String,
    port: u16,
}

impl Nats {
    /// Starts a server and waits until it greets.
    ///
    /// An error says what is missing and how to install it, or shows the end of the server's log.
    pub fn start(options: &NatsOptions) -> Result<Nats> {
        let program = match &options.program {
            Some(program) => program.clone(),
            None => find_nats_server()?,
        };
        let server = Server::new("nats-server", "KILL")?;
        let mut nats = Nats { server, program, config: options.config.clone(), port: 0 };
        for _ in 0..PORT_TRIES {
            nats.port = free_port()?;
            if nats.start_once()? {
                return Ok(nats);
            }
        }
        bail!("start nats-server: {PORT_TRIES} free ports were taken by others before it could listen")
    }

    /// Starts the server again, on the same port, after [`Nats::stop`] or [`Nats::kill`].
    pub fn start_again(&mut self, store: Store) -> Result<()> {
        ensure!(self.server.child.is_none(), "start nats-server: it is running");
        if store == Store::Emptied && self.store().exists() {
            fs::remove_dir_all(self.store()).context("empty the store of nats-server")?;
        }
        ensure!(self.start_once()?, "start nats-server: port {} was taken meanwhile", self.port);
        Ok(())
    }

    /// Ends the server and waits until it has ended; its store stays.
    pub fn stop(&mut self, mode: Stop) -> Result<()> {
        let signal = match mode {
            Stop::Fast => Signal::TERM,
            Stop::Immediate => Signal::KILL,
        };
        self.server.stop(signal)
    }

    /// Kills the server with SIGKILL; what it wrote to its store stays.
    pub fn kill(&mut self) -> Result<()> {
        self.server.stop(Signal::KILL)
    }

    /// Stops the server with SIGSTOP: connections stay open and nothing answers.
    pub fn pause(&self) -> Result<()> {
        self.server.pause()
    }

    /// Lets a paused server go on.
    pub fn resume(&self) -> Result<()> {
        self.server.resume()
    }

    /// URL for clients, without credentials.
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// Port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.server.pid()
    }

    /// Everything the server has logged.
    pub fn log(&self) -> String {
        self.server.log()
    }

    /// The last lines of the log.
    pub fn log_tail(&self) -> String {
        self.server.log_tail()
    }

    /// One start on `self.port`: true once it greets, false if the port is taken.
    fn start_once(&mut self) -> Result<bool> {
        let (port, store) = (self.port, self.store());
        let path = self.server.folder.join("nats.conf");
        let config = format!(
            "listen: 127.0.0.1:{port}\nserver_name: sandbox-{port}\njetstream {{ store_dir: \"{}\" }}\n{}\n",
            store.display(),
            self.config
        );
        fs::write(&path, config).with_context(|| format!("write {}", path.display()))?;
        let mark = self.server.log().len();
        let mut command = Command::new(&self.program);
        command.arg("-c").arg(&path).current_dir(&self.server.folder);
        self.server.spawn(&mut command)?;
        let deadline = Instant::now() + START_LIMIT;
        loop {
            if self.server.exited()?.is_some() {
                let said = self.server.log().split_off(mark);
                ensure!(said.contains("address already in use"), "nats-server ended while starting:\n{said}");
                return Ok(false);
            }
            // The name in the greeting: it is our server that answers, and not one that took the port.
            if greeting(port).is_some_and(|info| info.contains(&format!("\"sandbox-{port}\""))) {
                return Ok(true);
            }
            ensure!(Instant::now() < deadline, "nats-server does not answer:\n{}", self.server.log_tail());
            sleep(POLL);
        }
    }

    fn store(&self) -> PathBuf {
        self.server.folder.join("jetstream")
    }
}

impl Drop for Nats {
    fn drop(&mut self) {
        // What an orderly end leaves undone, the guard does.
        let _ = self.server.stop(Signal::KILL);
    }
}

/// The `INFO` line with which a nats-server greets every connection.
fn greeting(port: u16) -> Option<String> {
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let stream = TcpStream::connect_timeout(&address, Duration::from_secs(1)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(1))).ok()?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).ok()?;
    line.starts_with("INFO ").then_some(line)
}

/// What both servers have in common: a folder, a log in it, a process, and the guard over both.
#[derive(Debug)]
struct Server {
    name: &'static str,
    child: Option<Child>,
    folder: PathBuf,
    guard: Guard,
}

impl Server {
    fn new(name: &'static str, guard_signal: &str) -> Result<Server> {
        let folder = tempfile::Builder::new()
            .prefix(&format!("pg-outbox-{name}-"))
            .tempdir()
            .with_context(|| format!("make a folder for {name}"))?;
        let guard = Guard::over(folder.path(), guard_signal)?;
        // From here on the guard removes it.
        Ok(Server { name, child: None, folder: folder.keep(), guard })
    }

    fn spawn(&mut self, command: &mut Command) -> Result<()> {
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

    fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// The exit status, if the server has ended or was never started.
    fn exited(&mut self) -> Result<Option<ExitStatus>> {
        let Some(child) = &mut self.child else { return Ok(Some(ExitStatus::default())) };
        let status = child.try_wait().with_context(|| format!("wait for {}", self.name))?;
        if status.is_some() {
            self.child = None;
            self.guard.watch_nothing()?;
        }
        Ok(status)
    }

    fn stop(&mut self, signal: Signal) -> Result<()> {
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

    fn pause(&self) -> Result<()> {
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

    fn resume(&self) -> Result<()> {
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

    fn log(&self) -> String {
        fs::read(self.log_path()).map(|bytes| text(&bytes)).unwrap_or_default()
    }

    fn log_tail(&self) -> String {
        tail(&self.log(), LOG_TAIL_LINES)
    }
}

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

/// A user of this machine.
#[derive(Debug, Clone, Copy)]
struct UnixUser {
    uid: u32,
    gid: u32,
}

impl UnixUser {
    fn find(name: &str) -> Result<UnixUser> {
        let passwd = fs::read_to_string("/etc/passwd").context("read /etc/passwd")?;
        UnixUser::parse(&passwd, name).with_context(|| {
            format!(
                "postgres refuses to run as root, and there is no user {name} to run it as: apt-get install postgresql"
            )
        })
    }

    /// Looks `name` up in the text of a passwd(5) file.
    fn parse(passwd: &str, name: &str) -> Option<UnixUser> {
        let line = passwd.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut fields = line.split(':').skip(2);
        Some(UnixUser { uid: fields.next()?.parse().ok()?, gid: fields.next()?.parse().ok()? })
    }
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

fn find_postgres_bin() -> Result<PathBuf> {
    if let Some(bin) = std::env::var_os(POSTGRES_BIN_VAR).map(PathBuf::from) {
        ensure!(bin.join("initdb").is_file(), "{POSTGRES_BIN_VAR}={}: no initdb in it", bin.display());
        return Ok(bin);
    }
    newest_debian_postgres(Path::new("/usr/lib/postgresql")).or_else(|| on_path("initdb")).ok_or_else(|| {
        anyhow!(
            "initdb not found in {POSTGRES_BIN_VAR}, /usr/lib/postgresql/*/bin or PATH: apt-get install postgresql"
        )
    })
}

/// Debian keeps each major version's programs in a folder of its own, off the PATH.
fn newest_debian_postgres(root: &Path) -> Option<PathBuf> {
    fs::read_dir(root)
        .ok()?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|version| root.join(format!("{version}/bin/initdb")).is_file())
        .max()
        .map(|version| root.join(format!("{version}/bin")))
}

fn find_nats_server() -> Result<PathBuf> {
    if let Some(program) = std::env::var_os(NATS_SERVER_VAR).map(PathBuf::from) {
        ensure!(program.is_file(), "{NATS_SERVER_VAR}={}: no such program", program.display());
        return Ok(program);
    }
    on_path("nats-server")
        .or_else(|| {
            ["/usr/bin", "/usr/sbin"].map(PathBuf::from).into_iter().find(|folder| has(folder, "nats-server"))
        })
        .map(|folder| folder.join("nats-server"))
        .ok_or_else(|| {
            anyhow!(
                "nats-server not found in {NATS_SERVER_VAR}, PATH or /usr/sbin: apt-get install nats-server"
            )
        })
}

/// The first folder of PATH that holds `program`.
fn on_path(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).find(|folder| has(folder, program))
}

fn has(folder: &Path, program: &str) -> bool {
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

fn send(pid: u32, signal: Signal) -> Result<()> {
    let target =
        i32::try_from(pid).ok().and_then(Pid::from_raw).with_context(|| format!("process id {pid}"))?;
    rustix::process::kill_process(target, signal).with_context(|| format!("send {signal:?} to process {pid}"))
}

/// For children: one may have ended since we looked.
fn send_if_there(pid: u32, signal: Signal) {
    let _ = send(pid, signal);
}

/// 128 bits from the kernel, in hexadecimal.
fn random_password() -> Result<String> {
    use std::io::Read;
    let mut bytes = [0; 16];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context("read /dev/urandom")?;
    Ok(format!("{:032x}", u128::from_ne_bytes(bytes)))
}

fn tail(log: &str, lines: usize) -> String {
    let skip = log.lines().count().saturating_sub(lines);
    log.lines().skip(skip).collect::<Vec<_>>().join("\n")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guard_ends_the_process_and_removes_the_folder_when_its_owner_is_gone() {
        let folder = tempfile::tempdir().unwrap().keep();
        fs::write(folder.join("data"), "x").unwrap();
        let mut guard = Guard::over(&folder, "TERM").unwrap();
        let mut process = Command::new("sleep").arg("600").spawn().unwrap();
        guard.watch(process.id()).unwrap();
        // Even one that is paused.
        send(process.id(), Signal::STOP).unwrap();
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

    #[test]
    fn users_are_found_by_their_whole_name() {
        let passwd = "root:x:0:0::/root:/bin/sh\npostgres2:x:7:8::/:/bin/sh\npostgres:x:101:104::/:/bin/sh\n";
        let user = UnixUser::parse(passwd, "postgres").unwrap();
        assert_eq!((user.uid, user.gid), (101, 104));
        assert!(UnixUser::parse(passwd, "post").is_none());
    }

    #[test]
    fn the_newest_postgres_is_the_highest_number_and_not_the_last_name() {
        let root = tempfile::tempdir().unwrap();
        for version in ["9", "15", "16", "17-old"] {
            let bin = root.path().join(version).join("bin");
            fs::create_dir_all(&bin).unwrap();
            if version != "16" {
                fs::write(bin.join("initdb"), "").unwrap();
            }
        }
        assert_eq!(newest_debian_postgres(root.path()), Some(root.path().join("15/bin")));
    }

    #[test]
    fn a_tail_is_the_last_lines() {
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc");
        assert_eq!(tail("a\n", 2), "a");
    }
}
