//! Probes, metrics and status over HTTP, on the thread `http`.
//!
//! One thread serves every client, in a `poll` loop over at most [`MAX_CLIENTS`] sockets, none of which can
//! block it: a slow, silent or hostile client costs one place and [`MAX_HEAD_BYTES`], for [`CLIENT_DEADLINE`]
//! at most, and the oldest client makes room when a new one finds the house full. So probes are answered
//! whatever else is connected, and the connections of the service itself keep their file descriptors. One
//! request a connection, GET or HEAD, bodies never read. It asks nobody: what it shows was put into
//! [`Health`], [`Metrics`] and [`Waiting`] by the other threads; between requests it reads the counters every
//! [`recent::STEP`], for the charts of the status page.
//!
//! The only file that names `tiny_http`, for its methods, headers and responses. Its `Server` is not used: it
//! gives every client a thread for as long as the client likes, reads heads without limit, stops for good at
//! the first failing `accept`, and a request with `Content-Length: 99999999999999` makes it allocate that
//! much and abort the process (0.12, `EqualReader::drop`).

use std::convert::Infallible;
use std::io::{self, Cursor, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use crossbeam_channel::{Receiver, TryRecvError};
use log::{info, warn};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;
use tiny_http::{HTTPVersion, Header, Method, Response, StatusCode};

use crate::config;
use crate::ops::health::{self, Facts, Health, ThreadState, Verdict};
use crate::ops::metrics::{Metrics, Totals};
use crate::ops::recent::{self, Columns, Reading, Recent, Waiting};
use crate::postgres::{DeadLetter, Retry};

mod page;

use self::page::StatusPage;

/// Clients at a time.
pub const MAX_CLIENTS: usize = 64;
/// Longest head of a request: request line and headers.
pub const MAX_HEAD_BYTES: usize = 8 * 1024;
/// Time from a client's connect to the last byte of its answer.
pub const CLIENT_DEADLINE: Duration = Duration::from_secs(5);

/// The HTTP server, bound and not yet running.
#[derive(Debug)]
pub struct Http {
    listener: TcpListener,
    pages: Pages,
}

impl Http {
    /// Listens on the configured address; port 0 takes a free one.
    ///
    /// # Errors
    /// If the address is taken or not ours.
    pub fn bind(
        config: &config::Metrics,
        instance: &str,
        health: Health,
        metrics: Metrics,
        waiting: Waiting,
    ) -> Result<Http> {
        let address = SocketAddr::new(config.address, config.port);
        let listener = TcpListener::bind(address).with_context(|| format!("listen on {address} for http"))?;
        listener.set_nonblocking(true).context("make the http listener non-blocking")?;
        let address = listener.local_addr().context("name the http address")?;
        info!("http listening: address={address} path={}", config.path);
        let pages = Pages {
            instance: instance.to_string(),
            metrics_path: config.path.clone(),
            status_page: StatusPage::new(&config.path),
            health,
            metrics,
            waiting,
            recent: Recent::default(),
        };
        Ok(Http { listener, pages })
    }

    /// The address with its real port.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn address(&self) -> Result<SocketAddr> {
        self.listener.local_addr().context("name the http address")
    }

    /// Serves until `stop` fires or its sender is gone; seen within [`TICK`]. Clients are then dropped.
    ///
    /// # Errors
    /// If `poll` fails, which it does only for want of kernel memory.
    pub fn run(mut self, stop: &Receiver<Infallible>) -> Result<()> {
        let heartbeat = self.pages.health.thread("http", HEARTBEAT_LIMIT);
        let mut clients: Vec<Client> = Vec::with_capacity(MAX_CLIENTS);
        let mut accept_after = Instant::now();
        while matches!(stop.try_recv(), Err(TryRecvError::Empty)) {
            heartbeat.beat();
            self.pages.remember(Instant::now());
            let accepting = Instant::now() >= accept_after;
            let (at_the_door, moved) =
                wait(&self.listener, accepting, &clients).context("poll the http sockets")?;
            // Who is inside comes before who is at the door: a client just taken in is served before another
            // one can take its place.
            serve(&mut clients, &moved, &self.pages);
            if at_the_door && let Err(cause) = self.accept(&mut clients) {
                // Out of file descriptors or memory. The socket stays readable, so without a pause this would
                // spin.
                warn!("http accept failed, next try in {ACCEPT_PAUSE:?}: {cause}");
                accept_after = Instant::now() + ACCEPT_PAUSE;
            }
        }
        Ok(())
    }

    /// Takes in who waits at the door, a houseful at most.
    fn accept(&self, clients: &mut Vec<Client>) -> io::Result<()> {
        for _ in 0..MAX_CLIENTS {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(true)?;
                    if clients.len() == MAX_CLIENTS {
                        clients.remove(0);
                    }
                    clients.push(Client::new(stream));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // The client left before we came to it (accept(2) lists these as "like EAGAIN").
                Err(error) if gone(error.kind()) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Longest time in which a stop or a passed deadline is not noticed.
pub const TICK: Duration = Duration::from_millis(200);
/// A round of the loop takes milliseconds, and a tick when nothing happens.
const HEARTBEAT_LIMIT: Duration = Duration::from_secs(10);
/// Pause after a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
/// Time a client has to take its answer and close, once all of it is sent.
const LINGER: Duration = Duration::from_secs(1);

/// Waits for something to happen; says whether at the door, and at which clients, in their order.
fn wait(listener: &TcpListener, accepting: bool, clients: &[Client]) -> io::Result<(bool, Vec<bool>)> {
    let door = if accepting { PollFlags::IN } else { PollFlags::empty() };
    let mut fds: Vec<_> =
        clients.iter().map(|client| PollFd::new(&client.stream, client.waits_for())).collect();
    fds.push(PollFd::new(listener, door));
    let tick = Timespec { tv_sec: 0, tv_nsec: i64::from(TICK.subsec_nanos()) };
    match poll(&mut fds, Some(&tick)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let mut happened: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
    Ok((happened.pop() == Some(true) && accepting, happened))
}

/// Moves every client on that can move, and drops who is done, gone or too late.
fn serve(clients: &mut Vec<Client>, moved: &[bool], pages: &Pages) {
    let now = Instant::now();
    let mut moved = moved.iter();
    clients.retain_mut(|client| {
        let moved = moved.next() == Some(&true);
        now < client.deadline && (!moved || client.step(pages).is_ok_and(|step| step == Step::Stay))
    });
}

/// One connection: reads a head, writes an answer, waits for the client to close.
#[derive(Debug)]
struct Client {
    stream: TcpStream,
    deadline: Instant,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    /// The head so far.
    Head(Vec<u8>),
    /// The rest of the answer.
    Answer(Cursor<Vec<u8>>),
    /// The answer is sent, and our side closed. Closing the rest with unread input, a body for example, would
    /// reset the connection, and the client could lose the answer.
    Linger,
}

#[derive(Debug, PartialEq, Eq)]
enum Step {
    Stay,
    Done,
}

impl Client {
    fn new(stream: TcpStream) -> Client {
        Client { stream, deadline: Instant::now() + CLIENT_DEADLINE, phase: Phase::Head(Vec::new()) }
    }

    fn waits_for(&self) -> PollFlags {
        match self.phase {
            Phase::Head(_) | Phase::Linger => PollFlags::IN,
            Phase::Answer(_) => PollFlags::OUT,
        }
    }

    /// Does what can be done without waiting. An error ends the client.
    fn step(&mut self, pages: &Pages) -> io::Result<Step> {
        match &mut self.phase {
            Phase::Head(head) => {
                let mut chunk = [0; MAX_HEAD_BYTES];
                let before = head.len();
                let room = &mut chunk[..MAX_HEAD_BYTES - before];
                match read(&mut self.stream, room)? {
                    Some(0) => return Ok(Step::Done),
                    Some(length) => head.extend_from_slice(&room[..length]),
                    None => return Ok(Step::Stay),
                }
                let Some(answer) = pages.answer(head, before) else { return Ok(Step::Stay) };
                self.phase = Phase::Answer(Cursor::new(answer));
                // There is room in the socket's buffer for nearly every answer: no need to ask poll first.
                self.write()
            }
            Phase::Answer(_) => self.write(),
            Phase::Linger => match read(&mut self.stream, &mut [0; MAX_HEAD_BYTES])? {
                Some(0) => Ok(Step::Done),
                Some(_) | None => Ok(Step::Stay),
            },
        }
    }

    fn write(&mut self) -> io::Result<Step> {
        let Phase::Answer(answer) = &mut self.phase else { return Ok(Step::Stay) };
        loop {
            let rest = &answer.get_ref()[usize::try_from(answer.position()).unwrap_or(usize::MAX)..];
            if rest.is_empty() {
                break;
            }
            match self.stream.write(rest) {
                Ok(length) => answer.set_position(answer.position() + length as u64),
                Err(error) if waits(error.kind()) => return Ok(Step::Stay),
                Err(error) => return Err(error),
            }
        }
        self.stream.shutdown(std::net::Shutdown::Write)?;
        self.deadline = self.deadline.min(Instant::now() + LINGER);
        self.phase = Phase::Linger;
        Ok(Step::Stay)
    }
}

fn read(stream: &mut TcpStream, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    match stream.read(buffer) {
        Ok(length) => Ok(Some(length)),
        Err(error) if waits(error.kind()) => Ok(None),
        Err(error) => Err(error),
    }
}

fn waits(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn gone(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset | ErrorKind::Interrupted)
}

/// What is behind the paths.
#[derive(Debug)]
struct Pages {
    instance: String,
    metrics_path: String,
    status_page: StatusPage,
    health: Health,
    metrics: Metrics,
    waiting: Waiting,
    recent: Recent,
}

const HTML: &str = "text/html; charset=utf-8";
const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";
/// The text format's own type (prometheus.io, "Exposition formats").
const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";

impl Pages {
    /// The answer to a request of which `head` has been read so far, and was asked about up to `before`;
    /// `None` while more must come.
    fn answer(&self, head: &[u8], before: usize) -> Option<Vec<u8>> {
        let Some(end) = end_of_head(head, before) else {
            let too_long = head.len() >= MAX_HEAD_BYTES;
            return too_long
                .then(|| print(page(431, TEXT, "the head of the request is too long\n"), &Method::Get));
        };
        Some(match request_line(&head[..end]) {
            Some((method @ (Method::Get | Method::Head), path)) => print(self.page(path), &method),
            Some((method, _)) => print(
                page(405, TEXT, "only GET and HEAD are served here\n")
                    .with_header(header("Allow", "GET, HEAD")),
                &method,
            ),
            None => print(page(400, TEXT, "this is not an HTTP/1 request\n"), &Method::Get),
        })
    }

    fn page(&self, path: &str) -> Page {
        match path {
            "/" => {
                let facts = json(&First { status: self.status(), recent: self.recently() });
                page_with_policy(200, HTML, self.status_page.with(&facts), self.status_page.policy())
            }
            "/status" => page(200, JSON, json(&self.status())),
            "/recent" => page(200, JSON, json(&self.recently())),
            "/health" | "/healthz" => probe(&self.health.live()),
            "/ready" | "/readyz" => probe(&self.health.ready()),
            path if path == self.metrics_path => {
                self.metrics.ready(self.health.ready().ok);
                page(200, METRICS, self.metrics.render())
            }
            _ => {
                let known = format!("/ /status /recent /health /ready {}", self.metrics_path);
                page(404, TEXT, format!("nothing here; try {known}\n"))
            }
        }
    }

    /// Takes a reading of the counters when it is time.
    fn remember(&mut self, now: Instant) {
        if !self.recent.is_due(now) {
            return;
        }
        self.recent.take(Reading {
            at: now,
            totals: self.metrics.totals(),
            known: self.waiting.seen().known,
            outage: self.health.facts().outage.is_some(),
            claims: self.metrics.claim_durations(),
            publishes: self.metrics.publish_durations(),
            settles: self.metrics.settle_durations(),
        });
    }

    /// The facts of `/recent`.
    fn recently(&self) -> Recently {
        let (now, seen) = (Instant::now(), self.waiting.seen());
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Recently {
            now_ms: u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX),
            window_seconds: recent::WINDOW.as_secs(),
            step_seconds: recent::STEP.as_secs(),
            counted: seen.known,
            counted_seconds_ago: seen
                .counted
                .map(|counted| now.saturating_duration_since(counted).as_secs_f64()),
            samples: self.recent.columns(now),
            retries: seen.retries,
            dead_letters: seen.dead_letters,
        }
    }

    /// The facts of `/status`.
    fn status(&self) -> Status<'_> {
        let facts = self.health.facts();
        Status {
            instance: &self.instance,
            version: env!("CARGO_PKG_VERSION"),
            uptime_seconds: facts.uptime.as_secs(),
            draining: facts.draining,
            live: probe_body(&health::live(&facts)),
            ready: probe_body(&health::ready(&facts)),
            parts: parts(&facts),
            outage_seconds: facts.outage.as_ref().map(|outage| outage.lasting.as_secs()),
            threads: threads(&facts),
            events: self.metrics.totals(),
        }
    }
}

/// What the status page begins with.
#[derive(Debug, Serialize)]
struct First<'a> {
    status: Status<'a>,
    recent: Recently,
}

/// The last quarter of an hour, and what waits.
#[derive(Debug, Serialize)]
struct Recently {
    /// Unix time now, in milliseconds.
    now_ms: u64,
    /// How far the samples go back at most, and how far they are apart.
    window_seconds: u64,
    step_seconds: u64,
    /// Whether the backlog could be counted when that was last tried.
    counted: bool,
    /// Age of the last count; null if there was none.
    counted_seconds_ago: Option<f64>,
    samples: Columns,
    /// The events in retry that are due first.
    retries: Vec<Retry>,
    /// The newest dead letters.
    dead_letters: Vec<DeadLetter>,
}

/// Everything we know about ourselves.
#[derive(Debug, Serialize)]
struct Status<'a> {
    instance: &'a str,
    version: &'a str,
    uptime_seconds: u64,
    draining: bool,
    live: ProbeBody,
    ready: ProbeBody,
    parts: Vec<PartStatus>,
    /// How long the outage lasts; null if there is none. Its cause is among the reasons of `ready`.
    outage_seconds: Option<u64>,
    threads: Vec<ThreadStatus>,
    events: Totals,
}

/// The body of a probe.
#[derive(Debug, Serialize)]
struct ProbeBody {
    status: &'static str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    reasons: Vec<String>,
}

#[derive(Debug, Serialize)]
struct PartStatus {
    name: String,
    /// `ok`, or what is missing.
    state: String,
}

#[derive(Debug, Serialize)]
struct ThreadStatus {
    name: String,
    state: &'static str,
    /// Time since its last beat, while busy.
    busy_seconds: Option<f64>,
}

fn parts(facts: &Facts) -> Vec<PartStatus> {
    let of = |state: &Result<(), String>| state.clone().err().unwrap_or_else(|| "ok".to_string());
    facts.parts.iter().map(|(part, state)| PartStatus { name: part.to_string(), state: of(state) }).collect()
}

fn threads(facts: &Facts) -> Vec<ThreadStatus> {
    let of = |state: ThreadState| match state {
        ThreadState::Idle => ("idle", None),
        ThreadState::Busy(since) => ("busy", Some(since.as_secs_f64())),
        ThreadState::Ended => ("ended", None),
    };
    let status = |thread: &health::ThreadFacts| {
        let (state, busy_seconds) = of(thread.state);
        ThreadStatus { name: thread.name.clone(), state, busy_seconds }
    };
    facts.threads.iter().map(status).collect()
}

fn probe_body(verdict: &Verdict) -> ProbeBody {
    ProbeBody { status: if verdict.ok { "ok" } else { "unavailable" }, reasons: verdict.reasons.clone() }
}

fn probe(verdict: &Verdict) -> Page {
    page(if verdict.ok { 200 } else { 503 }, JSON, json(&probe_body(verdict)))
}

fn json(value: &impl Serialize) -> String {
    let mut text =
        serde_json::to_string(value).expect("these types have string keys and finite numbers only");
    text.push('\n');
    text
}

type Page = Response<Cursor<Vec<u8>>>;

/// An answer that a browser takes for what it is, and in which nothing runs.
fn page(status: u16, content_type: &str, body: impl Into<String>) -> Page {
    page_with_policy(status, content_type, body, "default-src 'none'; frame-ancestors 'none'")
}

fn page_with_policy(status: u16, content_type: &str, body: impl Into<String>, policy: &str) -> Page {
    let headers = [
        ("Content-Type", content_type),
        ("Server", "pg-outbox"),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        ("Content-Security-Policy", policy),
        ("X-Frame-Options", "DENY"),
        ("Referrer-Policy", "no-referrer"),
        ("Cross-Origin-Resource-Policy", "same-origin"),
        ("Cross-Origin-Opener-Policy", "same-origin"),
    ];
    let page = Response::from_string(body).with_status_code(StatusCode(status));
    headers.into_iter().fold(page, |page, (name, value)| page.with_header(header(name, value)))
}

fn header(name: &str, value: &str) -> Header {
    Header::from_bytes(name, value).expect("our header names and values are ASCII constants")
}

/// The bytes of an answer. It says HTTP/1.0, so that every client knows that the connection closes after it
/// and that nothing is chunked.
fn print(page: Page, method: &Method) -> Vec<u8> {
    let mut bytes = Vec::new();
    let without_body = *method == Method::Head;
    page.raw_print(&mut bytes, HTTPVersion(1, 0), &[], without_body, None)
        .expect("writing to a Vec does not fail");
    bytes
}

/// Length of the head in `bytes`, without the empty line that ends it, if it ends after `before`: a client
/// that sends single bytes does not make us read the whole each time. A lone LF ends a line too (RFC 9112,
/// 2.2).
fn end_of_head(bytes: &[u8], before: usize) -> Option<usize> {
    let ends_here = |at: &usize| bytes[*at..].starts_with(b"\n\r\n") || bytes[*at..].starts_with(b"\n\n");
    (before.saturating_sub(2)..bytes.len()).find(ends_here)
}

/// Method and path of a request; the query is left out. `None` if it is no HTTP/1 request.
fn request_line(head: &[u8]) -> Option<(Method, &str)> {
    let line = head.split(|byte| *byte == b'\n').next()?;
    let line = std::str::from_utf8(line).ok()?.trim_end_matches('\r');
    let mut words = line.split(' ');
    let (method, target, version) = (words.next()?, words.next()?, words.next()?);
    if words.next().is_some() || !version.starts_with("HTTP/1.") || !target.starts_with('/') {
        return None;
    }
    let method = method.parse().ok()?;
    Some((method, target.split('?').next().unwrap_or(target)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_ends_with_an_empty_line() {
        for (bytes, before, expected) in [
            ("", 0, None),
            ("GET / HTTP/1.1\r\n", 0, None),
            ("GET / HTTP/1.1\r\n\r", 0, None),
            ("GET / HTTP/1.1\r\n\r\n", 0, Some(15)),
            ("GET / HTTP/1.1\r\n\r\n", 17, Some(15)),
            ("GET / HTTP/1.0\n\nbody", 0, Some(14)),
            ("GET / HTTP/1.0\n\n", 15, Some(14)),
            ("GET / HTTP/1.1\r\nA: b\r\n\r\nGET", 0, Some(21)),
        ] {
            assert_eq!(end_of_head(bytes.as_bytes(), before), expected, "{bytes:?} {before}");
        }
    }

    #[test]
    fn the_end_of_a_head_is_found_however_it_is_cut() {
        for whole in ["GET / HTTP/1.1\r\nA: b\r\n\r\n", "GET / HTTP/1.1\nA: b\n\n"] {
            for first in 0..whole.len() {
                assert_eq!(end_of_head(&whole.as_bytes()[..first], 0), None, "{whole:?} {first}");
                assert!(end_of_head(whole.as_bytes(), first).is_some(), "{whole:?} {first}");
            }
        }
    }

    #[test]
    fn a_request_line_is_method_path_version() {
        for (line, expected) in [
            ("GET /health HTTP/1.1\r", Some((Method::Get, "/health"))),
            ("HEAD /ready?verbose=1&x=/y HTTP/1.0", Some((Method::Head, "/ready"))),
            ("DELETE / HTTP/1.1\r\nHost: x", Some((Method::Delete, "/"))),
            ("GET /health", None),
            ("GET /health HTTP/2.0", None),
            ("GET  /health HTTP/1.1", None),
            ("GET /a b HTTP/1.1", None),
            ("GET http://x/ HTTP/1.1", None),
            ("\u{16}\u{3}\u{1}", None),
            ("", None),
        ] {
            assert_eq!(request_line(line.as_bytes()), expected, "{line:?}");
        }
        assert_eq!(request_line(b"GET /\xff HTTP/1.1"), None);
    }

    fn pages() -> Pages {
        Pages {
            instance: "a<b".to_string(),
            metrics_path: "/metrics".to_string(),
            status_page: StatusPage::new("/metrics"),
            health: Health::new(),
            metrics: Metrics::new(),
            waiting: Waiting::default(),
            recent: Recent::default(),
        }
    }

    /// A client that is being sent an answer larger than any socket's buffers, and its other end.
    fn client_with_a_large_answer() -> (Client, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut client = Client::new(listener.accept().unwrap().0);
        client.stream.set_nonblocking(true).unwrap();
        client.phase = Phase::Answer(Cursor::new(vec![7; LARGE]));
        (client, peer)
    }

    const LARGE: usize = 64 << 20;

    fn sent(client: &Client) -> u64 {
        if let Phase::Answer(answer) = &client.phase { answer.position() } else { LARGE as u64 }
    }

    #[test]
    fn a_large_answer_goes_out_as_the_client_reads_it() {
        let (client, mut peer) = client_with_a_large_answer();
        let mut clients = vec![client];
        serve(&mut clients, &[true], &pages());
        assert!((1..LARGE as u64).contains(&sent(&clients[0])), "sent {}", sent(&clients[0]));
        let reader = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            peer.read_to_end(&mut bytes).map(|_| bytes)
        });
        while !clients.is_empty() && sent(&clients[0]) < LARGE as u64 {
            serve(&mut clients, &[true], &pages());
        }
        assert!(reader.join().unwrap().unwrap() == vec![7; LARGE]);
    }

    #[test]
    fn a_client_that_does_not_read_blocks_nothing_and_is_dropped_at_its_deadline() {
        let (client, _peer) = client_with_a_large_answer();
        let mut clients = vec![client];
        let begun = Instant::now();
        serve(&mut clients, &[true], &pages());
        serve(&mut clients, &[true], &pages());
        assert!(begun.elapsed() < CLIENT_DEADLINE / 2);
        assert_eq!(clients[0].waits_for(), PollFlags::OUT);
        clients[0].deadline = Instant::now();
        serve(&mut clients, &[false], &pages());
        assert!(clients.is_empty());
    }
}
