//! HTTP clients of every bad kind at once, at the built program: publishing and probes go on. What each kind gets is in
//! `tests/http.rs`.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::super::delivery::wait_drained;
use super::super::harness::daemon::listening;
use super::super::harness::{
    Config, Daemon, Workload, check_history, database, stream, wait_until, workload::writers_until,
};
use super::Stopping;

const LIMIT: Duration = Duration::from_secs(90);
/// Connections at a time; half as many clients come and go beside them.
const CROWD: usize = 1_000;
/// How long the crowd stays; who is closed comes back.
const CROWDED: Duration = Duration::from_secs(5);
/// A probe is answered within this, on a busy machine.
const PROBE: Duration = Duration::from_secs(4);
const BAD: [&[u8]; 8] = [
    b"",
    b"G",
    b"GET /health",
    b"BREW / HTTP/1.1\r\n\r\n",
    b"DELETE /metrics HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET /../../etc/passwd HTTP/1.1\r\n\r\n",
    b"\0\xff\r\n\r\n",
];

/// One client after another, each with something else to say, some of them endlessly.
fn misbehave(address: SocketAddr, number: usize, stop: &AtomicBool, seen: &AtomicUsize) {
    let mut turn = number;
    while !stop.load(Ordering::Relaxed) {
        let Ok(mut client) = TcpStream::connect_timeout(&address, PROBE) else { continue };
        seen.fetch_add(1, Ordering::Relaxed);
        client.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
        turn += 1;
        let _ = client.write_all(BAD[turn % BAD.len()]);
        while turn.is_multiple_of(3) && !stop.load(Ordering::Relaxed) {
            // A huge header.
            if client.write_all(&[b'x'; 65_536]).is_err() {
                break;
            }
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Lets this process, and what it starts, have as many files open as the system allows it: 1,024 is usual, and few.
fn open_many_files() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
}

#[test]
fn a_thousand_bad_clients_stop_neither_publishing_nor_probes() {
    open_many_files();
    let (db, stream) = (database(), stream());
    let daemon = Daemon::start(&Config::new(&db, &stream));
    daemon.wait_ready();
    let address = listening(&daemon.log()).unwrap();
    let workload = Workload { events: 100_000, pause: Duration::from_millis(20), ..Workload::default() };
    let (stop, seen) = (AtomicBool::new(false), AtomicUsize::new(0));
    let history = thread::scope(|scope| {
        let writing = scope.spawn(|| writers_until(&db.dsn, &workload, &stop));
        let stopping = Stopping(&stop);
        // They only hold a connection; a few threads come and go beside them.
        let silent: Vec<TcpStream> =
            (0..CROWD).map(|_| TcpStream::connect_timeout(&address, PROBE).unwrap()).collect();
        for number in 0..8 {
            let (stop, seen) = (&stop, &seen);
            scope.spawn(move || misbehave(address, number, stop, seen));
        }
        let begun = Instant::now();
        let published = daemon.metric("outbox_events_published_total");
        while begun.elapsed() < CROWDED || seen.load(Ordering::Relaxed) < CROWD / 2 {
            let asked = Instant::now();
            for path in ["/health", "/ready", "/metrics"] {
                assert_eq!(daemon.get(path).0, 200, "{path}");
            }
            assert!(asked.elapsed() < 3 * PROBE, "{:?}", asked.elapsed());
            assert!(begun.elapsed() < LIMIT, "{} clients only", seen.load(Ordering::Relaxed));
        }
        wait_until("publishing goes on", LIMIT, &[&daemon], || {
            daemon.metric("outbox_events_published_total") > published
        });
        drop(silent);
        drop(stopping);
        writing.join().unwrap()
    });
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    check_history(&history.committed, &stream.messages()).assert_clean();
    let log = daemon.log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains(" http: ")).collect();
    assert!(lines.is_empty(), "clients make no log lines: {lines:?}");
}
