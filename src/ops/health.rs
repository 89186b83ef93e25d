//! Is this process alive, and can it publish?
//!
//! `Health` is the board on which the threads write what they know: heartbeats (one atomic store each), the
//! state of PostgreSQL, the schema, NATS and the stream, an outage, the drain. Any thread may write and read
//! it; nothing here blocks, does I/O or starts a thread. The two decisions are pure functions of a snapshot
//! ([`Facts`]): [`live`] is about this process alone (a broken NATS is no reason to restart us, which would
//! only add a restart to the outage), [`ready`] about whether an event committed now would be published now.
//! Both name every reason, so that a probe's body says what to look at.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The board. Clones share it.
#[derive(Debug, Clone)]
pub struct Health(Arc<Board>);

/// One thread's line on the board. Dropping it says that the thread has ended.
#[derive(Debug)]
pub struct Heartbeat {
    board: Arc<Board>,
    thread: Arc<Thread>,
}

/// What has to be in place before events can be published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HealthPart {
    /// A connection to PostgreSQL works.
    Postgres,
    /// The tables and functions that this version needs are there.
    Schema,
    /// A connection to NATS works.
    Nats,
    /// The stream exists and takes events (over core NATS: nothing to wait for, set it to `Ok`).
    Stream,
}

/// The board at one moment; input of [`live`] and [`ready`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Time since the board was made, which is when the service started.
    pub uptime: Duration,
    /// Every thread that ever registered, in that order.
    pub threads: Vec<ThreadFacts>,
    /// Every part, in the order of [`HealthPart::ALL`], with the cause if it is missing.
    pub parts: Vec<(HealthPart, Result<(), String>)>,
    /// The outage in which we are.
    pub outage: Option<OutageFacts>,
    /// True from SIGTERM on.
    pub draining: bool,
}

/// One registered thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThreadFacts {
    /// Its name: `worker-3`.
    pub name: String,
    /// Longest time between two beats.
    pub limit: Duration,
    /// What it does.
    pub state: ThreadState,
}

/// What a thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadState {
    /// Waits for work; for ever is fine.
    Idle,
    /// Works; its last beat is this long ago.
    Busy(Duration),
    /// Has ended.
    Ended,
}

/// NATS cannot judge events now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutageFacts {
    /// Why.
    pub cause: String,
    /// For how long now.
    pub lasting: Duration,
}

/// A decision and what speaks against it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// True if there are no reasons.
    pub ok: bool,
    /// What is missing, one sentence fragment each: `nats: connection refused`.
    pub reasons: Vec<String>,
}

impl Health {
    /// An empty board: no threads, no part in place, so not ready.
    pub fn new() -> Health {
        Health(Arc::new(Board {
            started: Instant::now(),
            threads: Mutex::default(),
            parts: Mutex::new(HealthPart::ALL.map(|part| (part, Err(part.initially().to_string())))),
            outage: Mutex::default(),
            draining: AtomicBool::new(false),
        }))
    }

    /// Registers a thread, busy from now on. `limit` is the longest time it may take from one beat to the
    /// next; a thread that rightly blocks for long chooses a limit above that.
    pub fn thread(&self, name: impl Into<String>, limit: Duration) -> Heartbeat {
        let thread = Arc::new(Thread { name: name.into(), limit, beat: AtomicU64::new(self.0.now_ms()) });
        lock(&self.0.threads).push(Arc::clone(&thread));
        Heartbeat { board: Arc::clone(&self.0), thread }
    }

    /// Says that `part` is in place, or why it is not.
    pub fn set(&self, part: HealthPart, state: Result<(), String>) {
        lock(&self.0.parts)[part as usize].1 = state;
    }

    /// An outage begins (or its cause changes), or ends with `None`.
    pub fn outage(&self, cause: Option<String>) {
        let mut outage = lock(&self.0.outage);
        let began = outage.as_ref().map_or_else(Instant::now, |(_, began)| *began);
        *outage = cause.map(|cause| (cause, began));
    }

    /// The service stops: not ready from now on, and threads may end.
    pub fn draining(&self) {
        self.0.draining.store(true, Ordering::Relaxed);
    }

    /// A snapshot.
    pub fn facts(&self) -> Facts {
        let now_ms = self.0.now_ms();
        Facts {
            uptime: self.0.started.elapsed(),
            threads: lock(&self.0.threads).iter().map(|thread| thread.facts(now_ms)).collect(),
            parts: lock(&self.0.parts).to_vec(),
            outage: lock(&self.0.outage)
                .as_ref()
                .map(|(cause, began)| OutageFacts { cause: cause.clone(), lasting: began.elapsed() }),
            draining: self.0.draining.load(Ordering::Relaxed),
        }
    }

    /// [`live`] now.
    pub fn live(&self) -> Verdict {
        live(&self.facts())
    }

    /// [`ready`] now.
    pub fn ready(&self) -> Verdict {
        ready(&self.facts())
    }
}

impl Default for Health {
    fn default() -> Health {
        Health::new()
    }
}

impl Heartbeat {
    /// The thread works and has just made progress.
    pub fn beat(&self) {
        self.thread.beat.store(self.board.now_ms(), Ordering::Relaxed);
    }

    /// The thread waits for work from now on, without a deadline, until its next [`beat`](Heartbeat::beat).
    pub fn idle(&self) {
        self.thread.beat.store(IDLE, Ordering::Relaxed);
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.thread.beat.store(ENDED, Ordering::Relaxed);
    }
}

impl HealthPart {
    /// Every part, in the order in which they come up.
    pub const ALL: [HealthPart; 4] =
        [HealthPart::Postgres, HealthPart::Schema, HealthPart::Nats, HealthPart::Stream];

    fn initially(self) -> &'static str {
        match self {
            HealthPart::Postgres | HealthPart::Nats => "not connected yet",
            HealthPart::Schema | HealthPart::Stream => "not checked yet",
        }
    }
}

impl fmt::Display for HealthPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            HealthPart::Postgres => "postgres",
            HealthPart::Schema => "schema",
            HealthPart::Nats => "nats",
            HealthPart::Stream => "stream",
        })
    }
}

impl Verdict {
    fn of(reasons: Vec<String>) -> Verdict {
        Verdict { ok: reasons.is_empty(), reasons }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.ok { f.write_str("ok") } else { f.write_str(&self.reasons.join("; ")) }
    }
}

/// Does every thread of this process make progress? Nothing outside the process counts.
pub fn live(facts: &Facts) -> Verdict {
    Verdict::of(facts.threads.iter().filter_map(|thread| stuck(thread, facts.draining)).collect())
}

/// Can an event be published now?
pub fn ready(facts: &Facts) -> Verdict {
    let mut reasons = Vec::new();
    if facts.draining {
        reasons.push("draining: the service is stopping".to_string());
    }
    for (part, state) in &facts.parts {
        if let Err(cause) = state {
            reasons.push(format!("{part}: {cause}"));
        }
    }
    if let Some(outage) = &facts.outage {
        reasons.push(format!("outage for {:.0}s: {}", outage.lasting.as_secs_f64(), outage.cause));
    }
    Verdict::of(reasons)
}

/// Why `thread` speaks against the process being alive.
fn stuck(thread: &ThreadFacts, draining: bool) -> Option<String> {
    match thread.state {
        ThreadState::Busy(since) if since > thread.limit => Some(format!(
            "{}: no progress for {:.1}s (limit {:.1}s)",
            thread.name,
            since.as_secs_f64(),
            thread.limit.as_secs_f64()
        )),
        // While draining, threads end one after the other; at any other time the supervisor is about to stop
        // the service because of it.
        ThreadState::Ended if !draining => Some(format!("{}: has ended", thread.name)),
        ThreadState::Idle | ThreadState::Busy(_) | ThreadState::Ended => None,
    }
}

#[derive(Debug)]
struct Board {
    started: Instant,
    threads: Mutex<Vec<Arc<Thread>>>,
    parts: Mutex<[(HealthPart, Result<(), String>); HealthPart::ALL.len()]>,
    outage: Mutex<Option<(String, Instant)>>,
    draining: AtomicBool,
}

#[derive(Debug)]
struct Thread {
    name: String,
    limit: Duration,
    /// Milliseconds from the board's start to the last beat, or `IDLE`, or `ENDED`.
    beat: AtomicU64,
}

const IDLE: u64 = u64::MAX;
const ENDED: u64 = u64::MAX - 1;

impl Board {
    fn now_ms(&self) -> u64 {
        // 500 million years fit below the two marks.
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(ENDED - 1)
    }
}

impl Thread {
    fn facts(&self, now_ms: u64) -> ThreadFacts {
        let state = match self.beat.load(Ordering::Relaxed) {
            IDLE => ThreadState::Idle,
            ENDED => ThreadState::Ended,
            // The beat may be newer than `now_ms`, which was read before it.
            beat_ms => ThreadState::Busy(Duration::from_millis(now_ms.saturating_sub(beat_ms))),
        };
        ThreadFacts { name: self.name.clone(), limit: self.limit, state }
    }
}

/// A panic while one of these locks was held leaves a whole value behind, so the poison says nothing.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts {
            uptime: Duration::from_secs(60),
            threads: Vec::new(),
            parts: HealthPart::ALL.map(|part| (part, Ok(()))).to_vec(),
            outage: None,
            draining: false,
        }
    }

    fn thread(name: &str, state: ThreadState) -> ThreadFacts {
        ThreadFacts { name: name.to_string(), limit: Duration::from_secs(10), state }
    }

    fn busy(ms: u64) -> ThreadState {
        ThreadState::Busy(Duration::from_millis(ms))
    }

    #[test]
    fn live_means_that_every_thread_makes_progress() {
        use ThreadState::{Ended, Idle};
        for (states, draining, expected) in [
            (vec![], false, vec![]),
            (vec![Idle, busy(0), busy(10_000)], false, vec![]),
            (vec![Idle, busy(10_100)], false, vec!["t1: no progress for 10.1s (limit 10.0s)"]),
            (vec![busy(99_000)], true, vec!["t0: no progress for 99.0s (limit 10.0s)"]),
            (vec![Ended, Idle, Ended], false, vec!["t0: has ended", "t2: has ended"]),
            (vec![Ended, Idle], true, vec![]),
        ] {
            let threads =
                states.iter().enumerate().map(|(i, state)| thread(&format!("t{i}"), *state)).collect();
            let verdict = live(&Facts { threads, draining, ..facts() });
            assert_eq!(verdict.reasons, expected, "{states:?} draining={draining}");
            assert_eq!(verdict.ok, expected.is_empty(), "{states:?} draining={draining}");
        }
    }

    #[test]
    fn nothing_outside_the_process_makes_it_less_alive() {
        let outage =
            Some(OutageFacts { cause: "no ack within 5s".to_string(), lasting: Duration::from_secs(900) });
        let parts = HealthPart::ALL.map(|part| (part, Err("gone".to_string()))).to_vec();
        assert!(live(&Facts { outage, parts, ..facts() }).ok);
    }

    #[test]
    fn ready_names_everything_that_is_missing() {
        let missing = |part: HealthPart, cause: &str| {
            let mut parts = facts().parts;
            parts[part as usize].1 = Err(cause.to_string());
            parts
        };
        let outage = OutageFacts { cause: "no ack within 5s".to_string(), lasting: Duration::from_secs(15) };
        for (facts, expected) in [
            (facts(), vec![]),
            (Facts { threads: vec![thread("worker-1", busy(99_000))], ..facts() }, vec![]),
            (
                Facts { parts: missing(HealthPart::Nats, "connection refused"), ..facts() },
                vec!["nats: connection refused"],
            ),
            (
                Facts { parts: missing(HealthPart::Stream, "EVENTS is missing"), ..facts() },
                vec!["stream: EVENTS is missing"],
            ),
            (Facts { outage: Some(outage.clone()), ..facts() }, vec!["outage for 15s: no ack within 5s"]),
            (
                Facts {
                    draining: true,
                    outage: Some(outage),
                    parts: missing(HealthPart::Postgres, "57P01"),
                    ..facts()
                },
                vec![
                    "draining: the service is stopping",
                    "postgres: 57P01",
                    "outage for 15s: no ack within 5s",
                ],
            ),
        ] {
            let verdict = ready(&facts);
            assert_eq!(verdict.reasons, expected);
            assert_eq!(verdict.ok, expected.is_empty());
        }
    }

    #[test]
    fn a_new_board_is_alive_and_not_ready() {
        let health = Health::new();
        assert!(health.live().ok);
        assert_eq!(
            health.ready().reasons,
            [
                "postgres: not connected yet",
                "schema: not checked yet",
                "nats: not connected yet",
                "stream: not checked yet"
            ]
        );
        for part in HealthPart::ALL {
            health.set(part, Ok(()));
        }
        assert!(health.ready().ok);
        health.draining();
        assert!(!health.ready().ok);
    }

    #[test]
    fn a_heartbeat_is_seen_from_another_clone() {
        let health = Health::new();
        let state = |health: &Health| health.facts().threads[0].state;
        let heartbeat = health.clone().thread("worker-1", Duration::from_millis(1));
        while health.live().ok {
            std::thread::yield_now();
        }
        assert!(health.live().reasons[0].starts_with("worker-1: no progress for 0.0s"));
        heartbeat.idle();
        assert_eq!(state(&health), ThreadState::Idle);
        heartbeat.beat();
        assert!(matches!(state(&health), ThreadState::Busy(_)));
        drop(heartbeat);
        assert_eq!(state(&health), ThreadState::Ended);
    }

    #[test]
    fn an_outage_keeps_its_beginning_when_its_cause_changes() {
        let health = Health::new();
        health.outage(Some("first".to_string()));
        let began = lock(&health.0.outage).as_ref().unwrap().1;
        health.outage(Some("second".to_string()));
        assert_eq!(*lock(&health.0.outage), Some(("second".to_string(), began)));
        health.outage(None);
        assert_eq!(health.facts().outage, None);
    }
}
