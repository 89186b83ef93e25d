//! PostgreSQL connections that break off at every message, in both directions, through a whole claim's life.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::super::delivery::wait_drained;
use super::super::harness::database::shared_postgres;
use super::super::harness::proxy::{Flow, Proxy, Way};
use super::super::harness::{Config, Daemon, TestDb, database, stream, wait_until};
use super::assert_stored_once_and_in_order;

const LIMIT: Duration = Duration::from_secs(120);

/// A proxy that counts the messages of one way, over all connections together, and cuts the connection that is to carry
/// the one whose turn it is: before it, so that it never arrives, nor anything after it.
struct Cutter {
    port: u16,
    counts: Arc<Counts>,
}

struct Counts {
    server: u16,
    way: Way,
    /// Messages until the next cut.
    left: AtomicUsize,
    /// Messages between this cut and the next one. It grows by one, so that each falls on another message.
    stride: AtomicUsize,
    cuts: AtomicUsize,
    ended: AtomicBool,
}

impl Cutter {
    fn before(server: u16, way: Way, first: usize) -> Cutter {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let counts = Arc::new(Counts {
            server,
            way,
            left: AtomicUsize::new(first),
            stride: AtomicUsize::new(first),
            cuts: AtomicUsize::new(0),
            ended: AtomicBool::new(false),
        });
        let accepting = counts.clone();
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if accepting.ended.load(Ordering::Relaxed) {
                    return;
                }
                let server = TcpStream::connect(("127.0.0.1", accepting.server)).unwrap();
                let ways = [
                    (client.try_clone().unwrap(), server.try_clone().unwrap(), Way::ToServer),
                    (server, client, Way::ToClient),
                ];
                for (from, to, way) in ways {
                    let counts = accepting.clone();
                    thread::spawn(move || counts.carry(&from, &to, way));
                }
            }
        });
        Cutter { port, counts }
    }

    fn cuts(&self) -> usize {
        self.counts.cuts.load(Ordering::Relaxed)
    }

    /// No more cuts.
    fn rest(&self) {
        self.counts.left.store(usize::MAX, Ordering::Relaxed);
    }
}

impl Drop for Cutter {
    fn drop(&mut self) {
        self.counts.ended.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

impl Counts {
    /// Carries message by message: a byte for its kind and four for its length, without the former at a client's
    /// beginning (<https://www.postgresql.org/docs/current/protocol-message-formats.html>).
    fn carry(&self, mut from: &TcpStream, mut to: &TcpStream, way: Way) {
        let mut begun = way == Way::ToClient;
        loop {
            let mut message = vec![0; if begun { 5 } else { 4 }];
            if from.read_exact(&mut message[..]).is_err() {
                break;
            }
            let head = message.len();
            let length = u32::from_be_bytes(message[head - 4..].try_into().unwrap()) as usize;
            message.resize(head - 4 + length, 0);
            if from.read_exact(&mut message[head..]).is_err() || (way == self.way && self.is_cut()) {
                break;
            }
            begun = true;
            if to.write_all(&message).is_err() {
                break;
            }
        }
        for end in [from, to] {
            let _ = end.shutdown(Shutdown::Both);
        }
    }

    fn is_cut(&self) -> bool {
        let count = |left: usize| if left == usize::MAX { left } else { left.saturating_sub(1) };
        let before = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| Some(count(left)));
        if before != Ok(1) {
            return false;
        }
        let stride = self.stride.fetch_add(1, Ordering::Relaxed) + 1;
        self.left.store(stride, Ordering::Relaxed);
        self.cuts.fetch_add(1, Ordering::Relaxed);
        true
    }
}

/// From the first message on, each cut falls one message later than the last one, through many claims.
fn survives_cuts(way: Way) {
    const CUTS: usize = 50;
    // So few that the life of a claim is some 50 messages.
    const KEYS: i64 = 4;
    let (db, stream) = (database(), stream());
    let cutter = Cutter::before(shared_postgres().port(), way, 1);
    // Without sslmode the server answers the question for TLS with a byte that is no message.
    let dsn = format!("{}?sslmode=disable", through(&db, cutter.port));
    let config = Config::new(&db, &stream)
        .set("database.dsn", dsn)
        .set("dispatcher.poll_interval", "100ms")
        .set("dispatcher.workers", 2);
    let daemon = Daemon::start(&config);
    let begun = Instant::now();
    wait_until("every message was cut before", LIMIT, &[&daemon, &db], || {
        if db.pending() < KEYS {
            db.events("t", KEYS, KEYS);
        }
        assert_eq!(daemon.get("/health").0, 200, "{}", daemon.log());
        cutter.cuts() >= CUTS
    });
    cutter.rest();
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    println!("{} cuts {way:?} in {:.1?}, {} events", cutter.cuts(), begun.elapsed(), stream.count());
    assert_stored_once_and_in_order(&db, &stream);
    assert_eq!(db.number("SELECT count(*) FROM outboxes WHERE attempts <> 1"), 0);
    assert!(daemon.log_lines("panic").is_empty(), "{}", daemon.log());
}

fn through(db: &TestDb, port: u16) -> String {
    let dsn = db.dsn.replace(&format!(":{}/", shared_postgres().port()), &format!(":{port}/"));
    assert_ne!(dsn, db.dsn, "the daemon goes through the proxy");
    dsn
}

#[test]
fn nothing_is_lost_whatever_message_to_postgres_is_the_last() {
    survives_cuts(Way::ToServer);
}

#[test]
fn nothing_is_lost_whatever_message_from_postgres_is_the_last() {
    survives_cuts(Way::ToClient);
}

/// TCP answers and PostgreSQL does not: the driver waits without a limit, so this is what the watchdog is for.
#[test]
fn a_postgres_that_says_nothing_more_is_noticed_by_the_watchdog() {
    let (db, stream) = (database(), stream());
    let proxy = Proxy::to(shared_postgres().port());
    let config = Config::new(&db, &stream)
        .set("database.dsn", through(&db, proxy.port()))
        .set("database.connect_timeout", "1s")
        .set("nats.ack_timeout", "1s")
        .set("dispatcher.claim_budget", "1s")
        .set("dispatcher.stuck_after", "5s");
    let daemon = Daemon::start(&config);
    daemon.wait_ready();
    proxy.set_both(Flow::Cut);
    db.events("t", 100, 20);
    wait_until("it is not healthy, and says who is stuck", LIMIT, &[&daemon], || {
        let (status, body) = daemon.get("/health");
        status == 503 && body.contains("no progress")
    });
    // What a restart by systemd ends as well: every connection.
    proxy.reset();
    proxy.set_both(Flow::Free);
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    wait_until("it is healthy", LIMIT, &[&daemon], || daemon.get("/health").0 == 200);
    assert_stored_once_and_in_order(&db, &stream);
}
