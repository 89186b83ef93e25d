//! A NATS server that lies: a relay in front of a real one, which reads what passes and does not always let it.
//!
//! What it does with a connection is settled when that comes. A relay that tells the truth again does so to new
//! connections; those that were lied to go on until somebody ends them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// Longest time to get rid of a lie that nobody reads.
const WRITE_LIMIT: Duration = Duration::from_secs(5);

/// What the relay does with a connection.
#[derive(Clone)]
pub enum Lie {
    /// Everything passes.
    Truth,
    /// This comes in the place of the greeting, and then nothing more.
    Greeting(Vec<u8>),
    /// When the client publishes its first event, this is said to it, made with the inbox of its first slot and the
    /// number of its subscription. Everything else passes.
    Say(fn(&str, u64) -> Vec<u8>),
    /// No event is passed on, and each is acknowledged with these words.
    Acknowledge(&'static str),
    /// The connection ends in the place of its n-th operation, of either side: or (`half`) in the middle of it.
    /// `n` is a step more after each one that ended so.
    Cut { half: bool, step: usize },
}

pub struct Liar {
    port: u16,
    wire: Arc<Wire>,
}

struct Wire {
    server: u16,
    lie: Mutex<Lie>,
    /// Lies told.
    told: AtomicUsize,
    /// Of [`Lie::Cut`].
    cut_at: AtomicUsize,
    open: Mutex<Vec<TcpStream>>,
    ended: AtomicBool,
}

/// One connection, as both of its directions see it.
struct Talk {
    wire: Arc<Wire>,
    lie: Lie,
    client: Mutex<TcpStream>,
    server: Mutex<TcpStream>,
    /// Operations so far.
    operations: AtomicUsize,
    /// Inbox and number of the first subscription.
    inbox: Mutex<Option<(String, u64)>>,
    said: AtomicBool,
}

impl Liar {
    /// A relay in front of `127.0.0.1:server` that tells the truth. It cuts at the first operation first.
    pub fn to(server: u16) -> Liar {
        let listener =
            TcpListener::bind(("127.0.0.1", pg_outbox::lab::sandbox::free_port().unwrap())).unwrap();
        let port = listener.local_addr().unwrap().port();
        let wire = Arc::new(Wire {
            server,
            lie: Mutex::new(Lie::Truth),
            told: AtomicUsize::new(0),
            cut_at: AtomicUsize::new(1),
            open: Mutex::default(),
            ended: AtomicBool::new(false),
        });
        let accepting = wire.clone();
        thread::spawn(move || accepting.accept(&listener));
        Liar { port, wire }
    }

    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// What new connections get from now on.
    pub fn tell(&self, lie: Lie) {
        *self.wire.lie.lock().unwrap() = lie;
    }

    /// How many lies were told.
    pub fn told(&self) -> usize {
        self.wire.told.load(Ordering::SeqCst)
    }

    /// The operation at which the next connection ends.
    pub fn cut_at(&self) -> usize {
        self.wire.cut_at.load(Ordering::SeqCst)
    }

    pub fn begin_cutting_at(&self, operation: usize) {
        self.wire.cut_at.store(operation, Ordering::SeqCst);
    }

    /// Ends every connection.
    pub fn reset(&self) {
        for stream in self.wire.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.wire.ended.store(true, Ordering::SeqCst);
        self.reset();
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

impl Wire {
    fn accept(self: Arc<Wire>, listener: &TcpListener) {
        for client in listener.incoming() {
            if self.ended.load(Ordering::SeqCst) {
                return;
            }
            let Ok(client) = client else { continue };
            let Ok(server) = TcpStream::connect(("127.0.0.1", self.server)) else { continue };
            client.set_write_timeout(Some(WRITE_LIMIT)).unwrap();
            let streams = [&client, &server].map(|stream| {
                stream.set_nodelay(true).unwrap();
                self.open.lock().unwrap().push(stream.try_clone().unwrap());
                stream.try_clone().unwrap()
            });
            let [from_client, from_server] = streams;
            let talk = Arc::new(Talk {
                wire: self.clone(),
                lie: self.lie.lock().unwrap().clone(),
                client: Mutex::new(client),
                server: Mutex::new(server),
                operations: AtomicUsize::new(0),
                inbox: Mutex::default(),
                said: AtomicBool::new(false),
            });
            let other = talk.clone();
            thread::spawn(move || talk.carry(from_client, Talk::of_client));
            thread::spawn(move || other.carry(from_server, Talk::of_server));
        }
    }
}

impl Talk {
    /// Carries one direction until either end, or the lie, ends it.
    fn carry(&self, from: TcpStream, pass: fn(&Talk, &[u8]) -> std::io::Result<()>) {
        let mut reader = BufReader::new(from);
        while let Some(operation) = read_operation(&mut reader) {
            let passed = self.cut(&operation, pass).unwrap_or_else(|| pass(self, &operation));
            if passed.is_err() {
                break;
            }
        }
        let _ = self.client.lock().unwrap().shutdown(Shutdown::Both);
        let _ = self.server.lock().unwrap().shutdown(Shutdown::Both);
    }

    /// Ends the connection if it is time to.
    fn cut(
        &self,
        operation: &[u8],
        pass: fn(&Talk, &[u8]) -> std::io::Result<()>,
    ) -> Option<std::io::Result<()>> {
        let Lie::Cut { half, step } = self.lie else { return None };
        let at = self.wire.cut_at.load(Ordering::SeqCst);
        if self.operations.fetch_add(1, Ordering::SeqCst) + 1 < at {
            return None;
        }
        if half {
            let _ = pass(self, &operation[..operation.len() / 2]);
        }
        let next = self.wire.cut_at.compare_exchange(at, at + step, Ordering::SeqCst, Ordering::SeqCst);
        self.wire.told.fetch_add(usize::from(next.is_ok()), Ordering::SeqCst);
        Some(Err(std::io::ErrorKind::ConnectionAborted.into()))
    }

    fn of_client(&self, operation: &[u8]) -> std::io::Result<()> {
        let line = String::from_utf8_lossy(operation.split(|byte| *byte == b'\n').next().unwrap_or_default());
        let words: Vec<&str> = line.split_whitespace().collect();
        match (&self.lie, &words[..]) {
            (_, ["SUB", subject, sid]) => {
                let inbox = subject.trim_end_matches(".0.*").to_owned();
                self.inbox.lock().unwrap().get_or_insert((inbox, sid.parse().unwrap()));
            }
            (Lie::Say(say), ["HPUB", ..]) if !self.said.swap(true, Ordering::SeqCst) => {
                let (inbox, sid) = self.inbox.lock().unwrap().clone().unwrap();
                let said = say(&inbox, sid);
                self.wire.told.fetch_add(1, Ordering::SeqCst);
                self.client.lock().unwrap().write_all(&said)?;
            }
            (Lie::Acknowledge(answer), ["HPUB", _, reply, _, _]) => {
                let (inbox, first) = self.inbox.lock().unwrap().clone().unwrap();
                // Subscriptions are numbered as the slots are.
                let slot: u64 = reply[inbox.len() + 1..].split('.').next().unwrap().parse().unwrap();
                let said = format!("MSG {reply} {} {}\r\n{answer}\r\n", first + slot, answer.len());
                self.wire.told.fetch_add(1, Ordering::SeqCst);
                return self.client.lock().unwrap().write_all(said.as_bytes());
            }
            _ => {}
        }
        self.server.lock().unwrap().write_all(operation)
    }

    fn of_server(&self, operation: &[u8]) -> std::io::Result<()> {
        let mut client = self.client.lock().unwrap();
        match &self.lie {
            Lie::Greeting(greeting) if operation.starts_with(b"INFO ") => {
                self.wire.told.fetch_add(1, Ordering::SeqCst);
                client.write_all(greeting)
            }
            Lie::Greeting(_) => Ok(()),
            _ => client.write_all(operation),
        }
    }
}

/// One operation with its payload; `None` at the end.
fn read_operation(reader: &mut impl BufRead) -> Option<Vec<u8>> {
    let mut operation = Vec::new();
    if reader.read_until(b'\n', &mut operation).ok()? == 0 {
        return None;
    }
    let line = String::from_utf8_lossy(&operation).into_owned();
    let mut words = line.split_whitespace();
    if matches!(words.next(), Some("PUB" | "HPUB" | "MSG" | "HMSG")) {
        let bytes: u64 = words.next_back()?.parse().ok()?;
        reader.take(bytes + 2).read_to_end(&mut operation).ok()?;
    }
    Some(operation)
}
