//! A private nats-server, with JetStream and whatever else its configuration says. It is spoken to over plain TCP.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use rustix::process::Signal;

use super::server::{POLL, START_LIMIT, ServerProcess, has, on_a_free_port, on_path};
use super::{NATS_SERVER_VAR, Stop};

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
pub enum StoreState {
    /// What it stored before.
    Kept,
    /// Nothing: its streams are gone.
    Emptied,
}

/// A private nats-server with JetStream, on 127.0.0.1 alone. Dropping it ends the server and removes its store.
#[derive(Debug)]
pub struct NatsServer {
    server: ServerProcess,
    program: PathBuf,
    config: String,
    port: u16,
}

impl NatsServer {
    /// Starts a server and waits until it greets.
    ///
    /// An error says what is missing and how to install it, or shows the end of the server's log.
    pub fn start(options: &NatsOptions) -> Result<NatsServer> {
        let program = match &options.program {
            Some(program) => program.clone(),
            None => find_nats_server()?,
        };
        let server = ServerProcess::new("nats-server", "KILL")?;
        let mut nats = NatsServer { server, program, config: options.config.clone(), port: 0 };
        on_a_free_port("nats-server", |port| {
            nats.port = port;
            nats.start_once()
        })?;
        Ok(nats)
    }

    /// Starts the server again, on the same port, after [`NatsServer::stop`] or [`NatsServer::kill`].
    pub fn start_again(&mut self, store: StoreState) -> Result<()> {
        ensure!(self.server.child.is_none(), "start nats-server: it is running");
        if store == StoreState::Emptied && self.store().exists() {
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

impl Drop for NatsServer {
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
