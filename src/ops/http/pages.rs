//! What is answered: the head of a request to a path, and a path to probes, metrics, facts or the status page.
//!
//! Runs on the thread `http`. It asks nobody: what it shows was put into [`Health`], [`Metrics`] and [`Waiting`] by the other
//! threads, and between requests it reads the counters every [`recent::STEP`], for the charts of the status page. An
//! answer is made whole, in memory; it never reads a body and never touches a socket.

use std::io::Cursor;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use tiny_http::{HTTPVersion, Header, Method, Response, StatusCode};

use super::status_page::StatusPage;
use crate::ops::health::{self, Facts, Health, ThreadState, Verdict};
use crate::ops::metrics::{Metrics, Totals};
use crate::ops::recent::{self, Columns, Counters, Recent, Waiting};
use crate::postgres::{DeadLetter, Retry};

/// Longest head of a request: request line and headers.
pub const MAX_HEAD_BYTES: usize = 8 * 1024;

/// What is behind the paths.
#[derive(Debug)]
pub(super) struct Pages {
    pub(super) instance: String,
    pub(super) metrics_path: String,
    pub(super) status_page: StatusPage,
    pub(super) health: Health,
    pub(super) metrics: Metrics,
    pub(super) waiting: Waiting,
    pub(super) recent: Recent,
}

const HTML: &str = "text/html; charset=utf-8";
const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";
/// The text format's own type (prometheus.io, "Exposition formats").
const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";

impl Pages {
    /// The answer to a request of which `head` has been read so far, and was asked about up to `before`;
    /// `None` while more must come.
    pub(super) fn answer(&self, head: &[u8], before: usize) -> Option<Vec<u8>> {
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
    pub(super) fn remember(&mut self, now: Instant) {
        if !self.recent.is_due(now) {
            return;
        }
        self.recent.take(Counters {
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
    fn status(&self) -> StatusFacts<'_> {
        let facts = self.health.facts();
        StatusFacts {
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
    status: StatusFacts<'a>,
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
struct StatusFacts<'a> {
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
}
