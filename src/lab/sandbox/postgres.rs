//! A private PostgreSQL: one of its own data folder, or a replica that follows another.
//!
//! It runs as the user `postgres` where we are root, whom it refuses. It is spoken to through its own programs.

use std::fs::{self, File};
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use rustix::process::Signal;

use super::server::{POLL, START_LIMIT, ServerProcess, on_a_free_port, on_path, text};
use super::{POSTGRES_BIN_VAR, Stop};

/// Longest time for a replica to take writes after it was told to, in seconds.
const PROMOTE_LIMIT_S: &str = "120";

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
pub struct PostgresServer {
    server: ServerProcess,
    bin: PathBuf,
    user: Option<UnixUser>,
    password: String,
    port: u16,
    arguments: Vec<String>,
    launcher: Vec<String>,
}

impl PostgresServer {
    /// Creates a data folder, starts a server on it and waits until it takes connections.
    ///
    /// An error says what is missing and how to install it, or shows the end of the server's log.
    pub fn start(options: &PostgresOptions) -> Result<PostgresServer> {
        let mut postgres = PostgresServer::prepare(options, random_password()?)?;
        postgres.initdb()?;
        postgres.start_first()?;
        Ok(postgres)
    }

    /// Starts a second server that copies `primary` and goes on to follow it, read-only, by streaming replication.
    ///
    /// An error is as for [`PostgresServer::start`], or what pg_basebackup said.
    pub fn start_replica(primary: &PostgresServer, options: &PostgresOptions) -> Result<PostgresServer> {
        let mut replica = PostgresServer::prepare(options, primary.password.clone())?;
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
            .args(["promote", "--wait", "--timeout", PROMOTE_LIMIT_S, "--silent", "--pgdata"])
            .arg(self.data())
            .stdin(Stdio::null())
            .output()
            .context("run pg_ctl")?;
        ensure!(output.status.success(), "pg_ctl promote: {}{}", text(&output.stdout), text(&output.stderr));
        Ok(())
    }

    /// Everything but the data: folder, user, command line.
    fn prepare(options: &PostgresOptions, password: String) -> Result<PostgresServer> {
        let bin = find_postgres_bin()?;
        let user =
            if rustix::process::geteuid().is_root() { Some(UnixUser::find("postgres")?) } else { None };
        let server = ServerProcess::new("postgres", "QUIT")?;
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
        Ok(PostgresServer { server, bin, user, password, port: 0, arguments, launcher })
    }

    /// The first start, on whatever port is free.
    fn start_first(&mut self) -> Result<()> {
        on_a_free_port("postgres", |port| {
            self.port = port;
            self.start_once()
        })
    }

    /// Starts the server again, on the same port and data, after [`PostgresServer::stop`] or
    /// [`PostgresServer::kill`].
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

impl Drop for PostgresServer {
    fn drop(&mut self) {
        // What an orderly end leaves undone, the guard does.
        let _ = self.server.stop(Signal::QUIT);
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

/// 128 bits from the kernel, in hexadecimal.
fn random_password() -> Result<String> {
    use std::io::Read;
    let mut bytes = [0; 16];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context("read /dev/urandom")?;
    Ok(format!("{:032x}", u128::from_ne_bytes(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
