//! A private PgBouncer in front of a PostgreSQL, as Debian packages it.
//!
//! It lets in whoever has a known name, logs in to the server with that name's password, and keeps few connections to it, so that in transaction
//! mode those are shared. Like the servers of the sandbox it runs as the user `postgres` when we are root, on a port
//! of its own, with a guard beside it.

use std::fs::{self, File};
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use pg_outbox::lab::sandbox::{Guard, PostgresServer, free_port};
use rustix::process::{Pid, Signal};

use super::database::{DISPATCHER, OPERATOR, WRITER, as_postgres_user, as_role};
use super::{Evidence, TestDb};

/// Where Debian's package has it.
const PROGRAM: &str = "/usr/sbin/pgbouncer";
/// Longest wait for it to listen.
const START_LIMIT: Duration = Duration::from_secs(20);
/// Lines of its log that the evidence shows.
const EVIDENCE_LINES: usize = 20;

/// What a client of the pooler has to itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// A connection to the server for as long as a transaction lasts.
    Transaction,
    /// A connection to the server for as long as it stays.
    Session,
}

/// The pooler. Dropping it ends it.
pub struct Pooler {
    port: u16,
    folder: PathBuf,
    server: String,
    child: Option<Child>,
    guard: Guard,
}

impl Pooler {
    /// A pooler of this mode in front of `postgres`, with `connections` to each of its databases at most.
    pub fn to(postgres: &PostgresServer, mode: Mode, connections: usize) -> Pooler {
        assert!(Path::new(PROGRAM).exists(), "no {PROGRAM}: apt-get install pgbouncer");
        let temporary = tempfile::Builder::new().prefix("pg-outbox-pgbouncer-").tempdir().unwrap();
        let guard = Guard::over(temporary.path(), "KILL").unwrap();
        let folder = temporary.keep();
        let dsn = postgres.dsn("x");
        let password = dsn.split([':', '@']).nth(2).unwrap();
        let server =
            format!("[databases]\n* = host=127.0.0.1 port={} pool_size={connections}\n", postgres.port());
        let users: String = [WRITER, DISPATCHER, OPERATOR, "postgres"]
            .map(|user| format!("\"{user}\" \"{password}\"\n"))
            .concat();
        fs::write(folder.join("users.txt"), users).unwrap();
        let mut pooler = Pooler { port: free_port().unwrap(), folder, server, child: None, guard };
        pooler.configure(mode);
        pooler.start_again();
        pooler
    }

    /// Writes its config file, which it reads when it starts or is told to.
    fn configure(&self, mode: Mode) {
        let mode = match mode {
            Mode::Transaction => "transaction",
            Mode::Session => "session",
        };
        let config = format!(
            "{}[pgbouncer]\nlisten_addr=127.0.0.1\nlisten_port={}\nunix_socket_dir=\npool_mode={mode}\nauth_type=trust\nauth_file=users.txt\n\
             max_client_conn=1000\nserver_login_retry=1\nquery_wait_timeout=20\nverbose=0\n",
            self.server, self.port
        );
        fs::write(self.folder.join("pgbouncer.ini"), config).unwrap();
    }

    /// Changes its mode while it runs.
    pub fn change(&self, mode: Mode) {
        self.configure(mode);
        self.signal(Signal::HUP);
    }

    /// Ends it at once, with all connections through it.
    pub fn stop(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        self.guard.watch_nothing().unwrap();
    }

    /// Starts it, on the same port.
    pub fn start_again(&mut self) {
        let log = File::options().create(true).append(true).open(self.folder.join("log")).unwrap();
        let mut line = as_postgres_user();
        line.extend([PROGRAM.to_owned(), "pgbouncer.ini".to_owned()]);
        // The user postgres must be able to read it.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&self.folder, open).unwrap();
        let mut child = Command::new(&line[0])
            .args(&line[1..])
            .current_dir(&self.folder)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.guard.watch(child.id()).unwrap();
        let deadline = Instant::now() + START_LIMIT;
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            let ended = child.try_wait().unwrap();
            assert!(
                ended.is_none() && Instant::now() < deadline,
                "pgbouncer does not listen\n{}",
                self.evidence()
            );
            thread::sleep(Duration::from_millis(10));
        }
        self.child = Some(child);
    }

    /// This database through the pooler, as its dispatcher.
    pub fn dsn(&self, db: &TestDb) -> String {
        as_role(&self.owner_dsn(db), DISPATCHER)
    }

    /// This database through the pooler, as its owner.
    pub fn owner_dsn(&self, db: &TestDb) -> String {
        format!("postgresql://postgres:asked-by-nobody@127.0.0.1:{}/{}", self.port, db.name)
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.as_ref().unwrap().id()).ok().and_then(Pid::from_raw).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Evidence for Pooler {
    fn evidence(&self) -> String {
        let log = fs::read_to_string(self.folder.join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let from = lines.len().saturating_sub(EVIDENCE_LINES);
        format!("--- log of pgbouncer (port {})\n{}", self.port, lines[from..].join("\n"))
    }
}
