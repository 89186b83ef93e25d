//! The HTTP server under real sockets: what it answers, and that no client keeps it from answering another.

use std::convert::Infallible;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use pg_outbox::config;
use pg_outbox::ops::health::{Health, HealthPart};
use pg_outbox::ops::http::{CLIENT_DEADLINE, Http, MAX_CLIENTS, MAX_HEAD_BYTES};
use pg_outbox::ops::metrics::Metrics;
use pg_outbox::ops::recent::Waiting;

/// A running server; stopped when dropped.
struct Server {
    address: SocketAddr,
    health: Health,
    metrics: Metrics,
    stop: Option<Sender<Infallible>>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

impl Server {
    fn start() -> Server {
        let config = config::HttpEndpoint {
            address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            port: 0,
            ..config::HttpEndpoint::defaults()
        };
        let (health, metrics) = (Health::new(), Metrics::new());
        let http =
            Http::bind(&config, "dispatcher-1", health.clone(), metrics.clone(), Waiting::default()).unwrap();
        let address = http.address().unwrap();
        let (stop, stopped) = crossbeam_channel::bounded(0);
        let thread = thread::spawn(move || http.run(&stopped));
        Server { address, health, metrics, stop: Some(stop), thread: Some(thread) }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    fn get(&self, path: &str) -> Answer {
        self.request(&format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n"))
    }

    fn request(&self, request: &str) -> Answer {
        let mut stream = self.connect();
        stream.write_all(request.as_bytes()).unwrap();
        answer(stream)
    }

    /// A probe is answered with 200, and within a second.
    fn assert_probe_is_prompt(&self, meanwhile: &str) {
        let begun = Instant::now();
        assert_eq!(self.get("/health").status, 200, "{meanwhile}");
        assert!(begun.elapsed() < Duration::from_secs(1), "{meanwhile}: {:?}", begun.elapsed());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        let result = self.thread.take().unwrap().join();
        if !thread::panicking() {
            result.unwrap().unwrap();
        }
    }
}

#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }
}

fn answer(mut stream: TcpStream) -> Answer {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no head in {text:?}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { status, head: head.to_ascii_lowercase(), body: body.to_string() }
}

/// Reads until the server closes the connection, by FIN or by RST; how long that took.
fn until_closed(mut stream: TcpStream) -> Duration {
    let begun = Instant::now();
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return begun.elapsed(),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return begun.elapsed(),
            Err(error) => panic!("the server did not close: {error}"),
        }
    }
}

#[test]
fn probes_say_what_is_missing() {
    let server = Server::start();
    for path in ["/health", "/healthz"] {
        let answer = server.get(path);
        assert_eq!((answer.status, answer.body.as_str()), (200, "{\"status\":\"ok\"}\n"));
        assert!(answer.head.contains("content-type: application/json"), "{}", answer.head);
    }
    for part in HealthPart::ALL {
        server.health.set(part, Ok(()));
    }
    server.health.set(HealthPart::Stream, Err("EVENTS is missing".to_string()));
    server.health.outage(Some("no ack within 5s".to_string()));
    for path in ["/ready", "/readyz", "/ready?verbose"] {
        let answer = server.get(path);
        assert_eq!(answer.status, 503);
        assert_eq!(
            answer.json(),
            serde_json::json!({
                "status": "unavailable",
                "reasons": ["stream: EVENTS is missing", "outage for 0s: no ack within 5s"],
            })
        );
    }
    server.health.set(HealthPart::Stream, Ok(()));
    server.health.outage(None);
    assert_eq!(server.get("/ready").status, 200);
    server.health.draining();
    assert_eq!(server.get("/ready").status, 503);
    assert_eq!(server.get("/health").status, 200);

    let worker = server.health.thread("worker-1", Duration::ZERO);
    while server.health.live().ok {
        thread::yield_now();
    }
    let answer = server.get("/health");
    assert_eq!(answer.status, 503);
    assert!(answer.body.contains("worker-1: no progress"), "{}", answer.body);
    worker.idle();
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn metrics_are_in_the_text_format() {
    let server = Server::start();
    server.metrics.published(3, 1);
    let answer = server.get("/metrics");
    assert_eq!(answer.status, 200);
    assert!(answer.head.contains("content-type: text/plain; version=0.0.4"), "{}", answer.head);
    assert!(answer.body.contains("\noutbox_events_published_total 3\n"), "{}", answer.body);
    assert!(answer.head.contains(&format!("content-length: {}", answer.body.len())), "{}", answer.head);
}

#[test]
fn the_status_is_the_same_as_json_and_as_a_page() {
    let server = Server::start();
    server.metrics.published(4711, 0);
    server.health.set(HealthPart::Nats, Err("connection refused".to_string()));
    let status = server.get("/status").json();
    assert_eq!(status["instance"], "dispatcher-1");
    assert_eq!(status["live"]["status"], "ok");
    assert_eq!(status["ready"]["status"], "unavailable");
    assert_eq!(status["events"]["published"], 4711);
    assert_eq!(status["parts"][2], serde_json::json!({"name": "nats", "state": "connection refused"}));
    assert_eq!(status["threads"][0]["name"], "http");
    assert_eq!(status["outage_seconds"], serde_json::Value::Null);
    let page = server.get("/");
    assert!(page.head.contains("content-type: text/html"), "{}", page.head);
    for fact in ["dispatcher-1", "4711", "connection refused", "http"] {
        assert!(page.body.contains(fact), "{fact} is not in {}", page.body);
    }
}

#[test]
fn head_sends_the_head_alone() {
    let server = Server::start();
    let answer = server.request("HEAD /ready HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_eq!((answer.status, answer.body.as_str()), (503, ""));
    assert!(!answer.head.contains("content-length: 0"), "{}", answer.head);
}

#[test]
fn other_paths_and_methods_are_told_what_there_is() {
    let server = Server::start();
    let answer = server.get("/metric");
    assert_eq!(answer.status, 404);
    assert!(answer.body.contains("/metrics") && answer.body.contains("/ready"), "{}", answer.body);
    for method in ["POST", "DELETE", "OPTIONS", "BREW"] {
        let answer = server.request(&format!("{method} /health HTTP/1.1\r\nHost: x\r\n\r\n"));
        assert_eq!(answer.status, 405, "{method}");
        assert!(answer.head.contains("allow: get, head"), "{}", answer.head);
    }
    for nonsense in ["hello\r\n\r\n", "GET /health HTTP/9\r\n\r\n", "\r\n\r\n", "\u{16}\u{3}\u{1}\n\n"] {
        assert_eq!(server.request(nonsense).status, 400, "{nonsense:?}");
    }
    let long = format!("GET /health HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(MAX_HEAD_BYTES));
    assert_eq!(server.request(&long).status, 431);
}

#[test]
fn a_body_is_not_read_and_its_length_not_believed() {
    let server = Server::start();
    for length in ["5", "2000", "99999999999999", "18446744073709551616", "-1"] {
        let request = format!("POST /health HTTP/1.1\r\nContent-Length: {length}\r\n\r\nhello");
        assert_eq!(server.request(&request).status, 405, "{length}");
        let request =
            format!("GET /health HTTP/1.1\r\nContent-Length: {length}\r\nExpect: 100-continue\r\n\r\n");
        assert_eq!(server.request(&request).status, 200, "{length}");
    }
    // The body comes after the answer, as from a client on a slow line: a connection closed by then would be
    // reset.
    let mut stream = server.connect();
    stream.write_all(b"POST /health HTTP/1.1\r\nContent-Length: 60000\r\n\r\n").unwrap();
    assert_eq!(stream.peek(&mut [0]).unwrap(), 1);
    stream.write_all(&[b'x'; 30_000]).unwrap();
    stream.write_all(&[b'x'; 30_000]).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(answer(stream).status, 405);
    server.assert_probe_is_prompt("after large bodies");
}

#[test]
fn a_head_may_come_in_pieces() {
    let server = Server::start();
    let mut stream = server.connect();
    stream.set_nodelay(true).unwrap();
    for byte in b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" {
        stream.write_all(&[*byte]).unwrap();
        thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(answer(stream).status, 200);
}

#[test]
fn slow_and_silent_clients_neither_disturb_nor_stay() {
    let server = Server::start();
    let mut slow = server.connect();
    let silent = server.connect();
    let endless = server.connect();
    let mut sender = endless.try_clone().unwrap();
    let flood = thread::spawn(move || while sender.write_all(&[b'x'; 65_536]).is_ok() {});
    let begun = Instant::now();
    while slow.write_all(b"G").is_ok() {
        server.assert_probe_is_prompt("with a client that sends a byte a second");
        assert!(begun.elapsed() < CLIENT_DEADLINE * 2, "the slow client is still connected");
        thread::sleep(Duration::from_secs(1));
    }
    until_closed(silent);
    until_closed(endless);
    flood.join().unwrap();
    assert!(begun.elapsed() < CLIENT_DEADLINE * 2);
}

#[test]
fn clients_that_never_read_neither_disturb_nor_stay() {
    let server = Server::start();
    let requests = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n".repeat(200);
    let deaf: Vec<TcpStream> = (0..MAX_CLIENTS / 2)
        .map(|_| {
            let mut stream = server.connect();
            stream.write_all(requests.as_bytes()).unwrap();
            stream
        })
        .collect();
    server.assert_probe_is_prompt("with clients that never read");
    thread::sleep(CLIENT_DEADLINE);
    for stream in deaf {
        assert!(until_closed(stream) < Duration::from_secs(2));
    }
}

#[test]
fn two_hundred_clients_leave_room_for_a_probe() {
    let server = Server::start();
    let mut crowd = Vec::new();
    for number in 0..200 {
        let mut stream = server.connect();
        // Some say nothing, some begin a request, some finish one and stay.
        let said: &[u8] = [&b""[..], b"GET /hea", b"GET / HTTP/1.1\r\n\r\n"][number % 3];
        stream.write_all(said).unwrap();
        crowd.push(stream);
        if number % 20 == 19 {
            server.assert_probe_is_prompt(&format!("with {} clients", crowd.len()));
        }
    }
    assert_eq!(server.get("/metrics").status, 200);
    // The first ones had to make room at once, not at their deadline.
    assert!(until_closed(crowd.remove(0)) < Duration::from_secs(1));
}

#[test]
fn a_stop_is_prompt_with_clients_connected() {
    let server = Server::start();
    let (address, client) = (server.address, server.connect());
    let begun = Instant::now();
    drop(server);
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    until_closed(client);
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn a_taken_address_is_named() {
    let server = Server::start();
    let config = config::HttpEndpoint {
        address: server.address.ip(),
        port: server.address.port(),
        ..config::HttpEndpoint::defaults()
    };
    let error =
        Http::bind(&config, "dispatcher-2", Health::new(), Metrics::new(), Waiting::default()).unwrap_err();
    assert!(
        format!("{error:#}").starts_with(&format!("listen on {} for http: ", server.address)),
        "{error:#}"
    );
}

/// Runs in a process of its own, since a lack of file descriptors would hit the other tests too.
#[test]
fn a_lack_of_file_descriptors_passes() {
    const ALONE: &str = "PG_OUTBOX_TEST_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "http::a_lack_of_file_descriptors_passes"])
            .env(ALONE, "1")
            .status();
        assert!(status.unwrap().success());
        return;
    }
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let server = Server::start();
    setrlimit(Resource::Nofile, Rlimit { current: Some(100), ..getrlimit(Resource::Nofile) }).unwrap();
    let mut fillers = Vec::new();
    while let Ok(file) = std::fs::File::open("/dev/null") {
        fillers.push(file);
    }
    // The one descriptor that is free goes to our end of the connection, so the server cannot accept the
    // other.
    fillers.pop().unwrap();
    let mut client = server.connect();
    client.write_all(b"GET /health HTTP/1.1\r\n\r\n").unwrap();
    client.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let error = client.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock, "answered without a descriptor");
    drop(fillers);
    client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    assert_eq!(answer(client).status, 200);
    server.assert_probe_is_prompt("after");
}
