//! Everything between us and NATS, behind one type: the connection, what the stream is, what an answer means, and whether
//! claims may be made now.
//!
//! Owns the threads `nats` (the [`Keeper`], which makes links, probes them, and opens the gate again), `nats-dial` (one attempt
//! to connect), and for each link `nats-writer` and, over TLS, `nats-tls`. Only the files below this one name the `nats` crate
//! and `nkeys`. It may name the boards that operators see, the configuration and an event; it never names the database,
//! claims or workers, which come to it. [`Publisher`] is what the service's threads share: the present link, the stream's facts,
//! and the gate (see `nats/breaker.rs`) that an outage closes. Workers publish through a [`Session`] on the present link. Each
//! wait for NATS has a deadline, but for what the crate does on the writer's and the dial's own threads.

pub mod answer;
pub mod breaker;
mod down;
mod greeting;
mod keeper;
mod link;
mod login;
mod patience;
pub mod preflight;
pub mod raw;
pub mod reader;
mod session;
pub mod streams;
mod tunnel;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

pub use self::keeper::{Keeper, Survey};
use self::link::Link;
pub use self::session::{Heard, NoFence, NotSent, Outgoing, ProbeFailure, Session};
use crate::config;
use crate::nats::answer::{Answer, StreamFacts};
use crate::nats::breaker::{Gate, GateChange, Outage};
use crate::ops::health::Health;
use crate::ops::metrics::Metrics;

/// How fresh the stream's facts must be to judge an event by them.
const FACTS_FRESH: Duration = Duration::from_secs(1);

/// The publishing side of the service. Cheap to clone.
#[derive(Clone)]
pub struct Publisher(Arc<PublisherInner>);

struct PublisherInner {
    settings: config::Nats,
    instance: String,
    slots: usize,
    health: Health,
    metrics: Metrics,
    state: Mutex<State>,
    /// Wakes the keeper when somebody else closed the gate.
    keeper_wake: (Sender<()>, Receiver<()>),
    /// Tells the claimer that the gate lets claims through again.
    gate_opened: (Sender<()>, Receiver<()>),
    links: AtomicU64,
    hanging_dials: Arc<AtomicUsize>,
    /// The warning about a password in clear was given.
    warned: AtomicBool,
    /// Events were stored since the keeper last looked: the link needs no check.
    busy: AtomicBool,
}

struct State {
    gate: Gate,
    link: Option<Arc<Link>>,
    facts: Option<(Instant, Arc<StreamFacts>)>,
}

impl Publisher {
    /// The publisher and its keeper, which does the connecting once it runs.
    ///
    /// `workers` is how many sessions are used at a time; their slots are `0..workers`.
    pub fn new(
        settings: config::Nats,
        instance: &str,
        workers: usize,
        health: Health,
        metrics: Metrics,
    ) -> (Publisher, Keeper) {
        let outage = Outage { cause: "not connected yet".into(), since: Instant::now(), tries: 0 };
        let publisher = Publisher(Arc::new(PublisherInner {
            settings,
            instance: instance.to_string(),
            slots: workers + 1,
            health,
            metrics,
            state: Mutex::new(State {
                gate: Gate::Closed { outage, next_try: Instant::now() },
                link: None,
                facts: None,
            }),
            keeper_wake: bounded(1),
            gate_opened: bounded(1),
            links: AtomicU64::new(0),
            hanging_dials: Arc::new(AtomicUsize::new(0)),
            warned: AtomicBool::new(false),
            busy: AtomicBool::new(false),
        }));
        (publisher.clone(), Keeper::new(publisher))
    }

    /// Whether claims may be made now.
    pub fn lets_through(&self) -> bool {
        self.state().gate.lets_through()
    }

    /// Receives once after the gate has begun to let claims through again. For the claimer alone.
    pub fn gate_opened(&self) -> Receiver<()> {
        self.0.gate_opened.1.clone()
    }

    /// A session on the present link for the worker that owns `slot`.
    ///
    /// # Errors
    /// Why there is no link.
    pub fn session(&self, slot: usize) -> Result<Session, String> {
        let state = self.state();
        match &state.link {
            Some(link) => match link.down.cause() {
                None => Ok(Session::new(link.clone(), slot, self.0.settings.jetstream.clone())),
                Some(cause) => Err(cause),
            },
            None => {
                Err(state.gate.outage().map_or("not connected", |outage| outage.cause.as_str()).to_string())
            }
        }
    }

    /// NATS cannot take events, says `cause`: closes the gate. `in_flight` events were neither stored nor judged.
    pub fn outage(&self, cause: &str, in_flight: usize) {
        self.change(cause, in_flight, |gate| gate.close(cause, Instant::now(), fastrand::f64()));
        let _ = self.0.keeper_wake.0.try_send(());
    }

    /// The link does not answer: it is abandoned, and an outage begins.
    pub fn abandon(&self, session: &Session, cause: &str, in_flight: usize) {
        session.take_down(cause);
        self.outage(cause, in_flight);
    }

    /// Events were stored (or there are none to store): passes the trial after an outage.
    pub fn confirm(&self) {
        self.0.busy.store(true, Ordering::Relaxed);
        self.confirm_idle();
    }

    /// There is nothing to publish: passes the trial as well.
    pub fn confirm_idle(&self) {
        self.change("", 0, |gate| gate.confirm(Instant::now()));
    }

    /// What is known of the stream, at most a moment old or asked anew through `session`.
    ///
    /// # Errors
    /// As [`Session::probe`].
    pub fn fresh_facts(
        &self,
        session: &Session,
        heard: &mut dyn FnMut(u64, Answer),
    ) -> Result<Arc<StreamFacts>, ProbeFailure> {
        if let Some((at, facts)) = &self.state().facts
            && at.elapsed() < FACTS_FRESH
        {
            return Ok(facts.clone());
        }
        let facts = session.probe(Instant::now() + self.0.settings.ack_timeout, heard)?;
        Ok(self.learn(facts))
    }

    /// The server's limit on one message as last heard, in bytes; none while there is no server.
    pub fn max_payload(&self) -> usize {
        let link = self.state().link.clone();
        link.map_or(usize::MAX, |link| link.max_payload.load(Ordering::Relaxed))
    }

    /// Whether messages with this subject come to us.
    pub fn is_inbox(&self, subject: &str) -> bool {
        let below = subject.strip_prefix(self.0.settings.inbox_prefix.as_str());
        below.is_some_and(|below| below.is_empty() || below.starts_with('.'))
    }

    /// The limits of the stream as last heard; `None` in core NATS or before the first answer.
    pub fn facts(&self) -> Option<Arc<StreamFacts>> {
        self.state().facts.as_ref().map(|(_, facts)| facts.clone())
    }

    fn learn(&self, facts: StreamFacts) -> Arc<StreamFacts> {
        let facts = Arc::new(facts);
        self.state().facts = Some((Instant::now(), facts.clone()));
        facts
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change under this lock is one assignment: a panic elsewhere leaves nothing half done.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the gate and says so before anybody else can change it: else the end of an outage could be told
    /// before its beginning, and `/ready` would stay with the beginning.
    fn change(&self, cause: &str, in_flight: usize, change: impl FnOnce(&mut Gate) -> GateChange) {
        let mut state = self.state();
        let change = change(&mut state.gate);
        self.say(&change, cause, in_flight);
    }

    /// Logs a change of the gate and tells health and metrics.
    fn say(&self, change: &GateChange, cause: &str, in_flight: usize) {
        let shared = &self.0;
        let servers = || shared.settings.servers.join(",");
        match change {
            GateChange::None => {}
            GateChange::Begins(next) => {
                log::warn!(
                    "outage begins: cause={cause:?} nats={} in_flight={in_flight} next_try={}",
                    servers(),
                    seconds(*next)
                );
                shared.health.outage(Some(cause.to_string()));
                shared.metrics.outage_began();
            }
            GateChange::GoesOn(next) => {
                log::debug!("outage goes on: cause={cause:?} next_try={}", seconds(*next));
                shared.health.outage(Some(cause.to_string()));
            }
            GateChange::Ends(lasted) => {
                log::info!("outage ends: nats={} lasted={}", servers(), seconds(*lasted));
                shared.health.outage(None);
                shared.metrics.outage_ended();
            }
        }
    }
}

fn seconds(duration: Duration) -> String {
    format!("{:.1}s", duration.as_secs_f64())
}
