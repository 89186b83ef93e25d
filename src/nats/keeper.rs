//! The keeper: the thread that connects, probes, and watches over the gate.
//!
//! While the gate is closed it dials and probes with backoff; while it is open it checks an idle link every few
//! seconds, so that `/ready` tells the truth also when nothing is sent. At the start it tries `nats.max_retries`
//! times and then gives up, which ends the service; later it never gives up.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use crossbeam_channel::{Receiver, bounded, never, select};

use super::greeting::{Encryption, greet};
use super::link::{Dial, Link, Route, cluster};
use super::login::Login;
use super::session::{ProbeFailure, Session};
use super::tunnel::Plan;
use super::{Publisher, PublisherInner, seconds};
use crate::config::live::Live;
use crate::event::topic_map::TopicMap;
use crate::nats::answer::{StreamFacts, StreamFault};
use crate::nats::breaker::Gate;
use crate::nats::preflight::{self, Finding, Needs};
use crate::ops::health::HealthPart;

/// How often the keeper looks at a link that is idle.
const IDLE_CHECK: Duration = Duration::from_secs(5);
/// Times `nats.connect_timeout` that one dial may take: a connect and a greeting for each of a few addresses, the
/// crate's own connect, and the first echo.
const DIAL_WAITS: u32 = 8;
/// Servers that are tried, one after the other, before an attempt to connect has failed.
const DIALS_MAX: usize = 5;
/// Times `nats.ack_timeout` that one check may take: a probe, and creating the stream.
const CHECK_WAITS: u32 = 2;
/// Servers of a cluster that we remember: a server can name any number.
const LEARNT_MAX: usize = 64;
/// Without a beat for so much longer than those, the thread counts as stuck.
const STUCK: Duration = Duration::from_secs(120);
/// Attempts to connect that may hang inside the crate, where nothing can end them. More than this would need
/// that many networks dying in the middle of a handshake; then the process is better started anew.
const HANGING_DIALS_MAX: usize = 16;

/// The thread that connects, probes and watches over the gate.
pub struct Keeper {
    publisher: Publisher,
    /// The servers that the cluster told us of last, beside the configured ones, each with the name that its
    /// certificate must be for.
    learnt: BTreeMap<String, String>,
    /// Counts the attempts to connect: which server is dialled first.
    turn: usize,
    /// What did not fit when the stream was last looked at.
    found: Vec<Finding>,
}

/// What one look at NATS found.
pub struct Survey {
    /// The server that took us: `nats://host:4222`.
    pub server: String,
    /// The stream's facts, or why it cannot take events; empty facts over core NATS.
    pub stream: Result<StreamFacts, StreamFault>,
    /// The server's limit on a message, in bytes.
    pub max_payload: usize,
}

impl Keeper {
    pub(super) fn new(publisher: Publisher) -> Keeper {
        // Instances that start together do not all go to the same server.
        Keeper { publisher, learnt: BTreeMap::new(), turn: fastrand::usize(..1024), found: Vec::new() }
    }

    /// Runs until `stop` fires. What of the stream does not fit `live` and `sent_again_within` (see
    /// [`preflight`]) it says in the log.
    ///
    /// # Errors
    /// When none of the first `nats.max_retries` attempts to connect succeeds, and when too many attempts hang.
    pub fn run(
        mut self,
        live: &Live,
        sent_again_within: Duration,
        stop: &Receiver<Infallible>,
    ) -> Result<()> {
        let settings = &self.shared().settings;
        let lawful =
            DIALS_MAX as u32 * DIAL_WAITS * settings.connect_timeout + CHECK_WAITS * settings.ack_timeout;
        let heartbeat = self.shared().health.thread("nats", lawful + STUCK);
        if !self.first_link(stop)? {
            return Ok(());
        }
        loop {
            heartbeat.beat();
            self.compare(&live.now().topic_map, sent_again_within);
            let (pause, closed) = match &self.publisher.state().gate {
                Gate::Closed { next_try, .. } => (next_try.saturating_duration_since(Instant::now()), true),
                Gate::Open | Gate::Trial { .. } => (IDLE_CHECK, false),
            };
            let link = self.publisher.state().link.clone();
            let ended = link.map_or_else(never, |link| link.down.ended.clone());
            let wake = self.shared().keeper_wake.1.clone();
            select! {
                recv(stop) -> _ => return Ok(()),
                recv(wake) -> _ => continue,
                recv(ended) -> _ => self.lost_link(),
                default(pause) => if closed { self.try_again()? } else { self.check_idle() },
            }
        }
    }

    /// Connects once, to the first configured server that takes us, and asks after the stream, for `check`.
    ///
    /// # Errors
    /// Why no server takes us, or the one that did does not answer.
    pub fn survey(mut self) -> Result<Survey> {
        self.dial()?;
        let slot = self.shared().slots - 1;
        let session = self.publisher.session(slot).map_err(|cause| anyhow!(cause))?;
        let deadline = Instant::now() + self.shared().settings.ack_timeout;
        let stream = match session.probe(deadline, &mut |_, _| {}) {
            Ok(facts) => Ok(facts),
            Err(ProbeFailure::Stream(fault)) => Err(fault),
            Err(ProbeFailure::Link(cause)) => return Err(anyhow!(cause)),
        };
        Ok(Survey { server: session.server().to_string(), stream, max_payload: session.max_payload() })
    }

    fn shared(&self) -> &PublisherInner {
        &self.publisher.0
    }

    /// Connects for the first time, `nats.max_retries` attempts `nats.retry_delay` apart. False: stop fired.
    fn first_link(&mut self, stop: &Receiver<Infallible>) -> Result<bool> {
        let attempts = self.shared().settings.max_retries;
        let delay = self.shared().settings.retry_delay;
        for attempt in 1..=attempts {
            let error = match self.dial() {
                Ok(()) => break,
                Err(error) => error,
            };
            if attempt == attempts {
                return Err(error.context(format!("no connection to nats after {attempts} attempts")));
            }
            log::warn!("not connected: attempt={attempt}/{attempts} next={}: {error:#}", seconds(delay));
            self.shared().health.set(HealthPart::Nats, Err(format!("{error:#}")));
            select! {
                recv(stop) -> _ => return Ok(false),
                default(delay) => {}
            }
        }
        let checked = self.check();
        self.publisher.state().gate = Gate::Open;
        match checked {
            Ok(()) => self.open(),
            Err(failure) => self.report(&failure),
        }
        Ok(true)
    }

    /// The link went down by itself.
    fn lost_link(&mut self) {
        let link = self.publisher.state().link.take();
        let cause = link.and_then(|link| link.down.cause()).unwrap_or_else(|| "connection lost".into());
        self.shared().health.set(HealthPart::Nats, Err(cause.clone()));
        self.shared().metrics.nats_disconnected();
        self.publisher.outage(&cause, 0);
    }

    /// The gate is closed and its wait is over: a new link if need be, and a probe.
    fn try_again(&mut self) -> Result<()> {
        let usable = self.publisher.state().link.as_ref().is_some_and(|link| !link.down.is_set());
        if !usable && let Err(error) = self.dial() {
            let hanging = self.shared().hanging_dials.load(Ordering::Relaxed);
            if hanging > HANGING_DIALS_MAX {
                return Err(error.context(format!("{hanging} attempts to connect to nats hang")));
            }
            let cause = format!("{error:#}");
            self.shared().health.set(HealthPart::Nats, Err(cause.clone()));
            self.publisher.change(&cause, 0, |gate| gate.try_failed(&cause, Instant::now(), fastrand::f64()));
            return Ok(());
        }
        match self.check() {
            Ok(()) => {
                self.publisher.state().gate.try_passed();
                self.open();
            }
            Err(failure) => self.report(&failure),
        }
        Ok(())
    }

    /// The link is idle: is it still there, and the stream? Skipped while acks say so.
    fn check_idle(&mut self) {
        if self.shared().busy.swap(false, Ordering::Relaxed) {
            return;
        }
        if let Err(failure) = self.check() {
            self.report(&failure);
        }
    }

    /// Probes link and stream, creating the stream when it is missing and that is wanted.
    fn check(&self) -> Result<(), ProbeFailure> {
        let shared = self.shared();
        let session = self.publisher.session(shared.slots - 1).map_err(ProbeFailure::Link)?;
        let deadline = || Instant::now() + shared.settings.ack_timeout;
        let mut result = session.probe(deadline(), &mut |_, _| {});
        if let Err(ProbeFailure::Stream(StreamFault::Missing { .. })) = &result
            && shared.settings.jetstream.create
        {
            result = session.create_stream(deadline());
            if result.is_ok() {
                log::info!("stream created: stream={}", shared.settings.jetstream.stream_name);
            }
        }
        let facts = result?;
        if shared.settings.jetstream.enabled {
            self.publisher.learn(facts);
        }
        shared.health.set(HealthPart::Nats, Ok(()));
        shared.health.set(HealthPart::Stream, Ok(()));
        Ok(())
    }

    /// Compares the stream, as last heard of, with what we rely on, and logs what did not use to be so.
    fn compare(&mut self, topic_map: &TopicMap, sent_again_within: Duration) {
        let state = self.publisher.state();
        let (Some(link), Some((_, facts))) = (state.link.clone(), state.facts.clone()) else { return };
        drop(state);
        let needs = Needs {
            stream: &self.shared().settings.jetstream.stream_name,
            topic_map,
            sent_again_within,
            max_payload: link.max_payload.load(Ordering::Relaxed),
        };
        let found = preflight::findings(&facts, needs);
        for finding in found.iter().filter(|finding| !self.found.contains(finding)) {
            match finding {
                Finding::Problem(text) => log::error!("events cannot be published: {text}"),
                Finding::Warning(text) => log::warn!("{text}"),
            }
        }
        self.found = found;
    }

    /// A probe failed: says so, and abandons a link that does not even echo.
    fn report(&self, failure: &ProbeFailure) {
        let cause = &failure.cause();
        match failure {
            ProbeFailure::Link(_) => {
                if let Some(link) = self.publisher.state().link.take() {
                    link.down.set(cause);
                }
                self.shared().health.set(HealthPart::Nats, Err(cause.clone()));
                self.shared().metrics.nats_disconnected();
            }
            ProbeFailure::Stream(_) => {
                // The link echoed, or the stream could not have been judged.
                self.shared().health.set(HealthPart::Nats, Ok(()));
                self.shared().health.set(HealthPart::Stream, Err(cause.clone()));
            }
        }
        self.publisher.change(cause, 0, |gate| gate.try_failed(cause, Instant::now(), fastrand::f64()));
    }

    fn open(&self) {
        let _ = self.shared().gate_opened.0.try_send(());
    }

    /// Connects to the first known server that takes us, of some of them in turn.
    ///
    /// # Errors
    /// What the last one said.
    fn dial(&mut self) -> Result<()> {
        let servers = in_turn(&self.shared().settings.servers, self.learnt.keys(), self.turn);
        self.turn += 1;
        let mut dialled = Err(anyhow!("nats.url names no server"));
        for server in servers {
            dialled = self.dial_to(&server);
            match &dialled {
                Ok(()) => break,
                Err(error) => log::debug!("not connected: {error:#}"),
            }
        }
        dialled
    }

    /// Connects to a server and makes the result the present link.
    fn dial_to(&mut self, server: &str) -> Result<()> {
        let name = self.learnt.get(server).map_or(host(server), String::as_str).to_owned();
        let link = self.dial_server(server, &name).with_context(|| format!("connect to nats at {server}"))?;
        self.meet(&link, &name)?;
        log::info!("connected: nats={} link={}", link.server, link.id);
        self.shared().metrics.nats_connected();
        self.publisher.state().link = Some(link);
        Ok(())
    }

    /// Dials on a thread of its own, which may hang for as long as it likes. Over TLS, the certificate must be for
    /// `name`.
    fn dial_server(&self, server: &str, name: &str) -> Result<Arc<Link>> {
        let shared = &self.publisher.0;
        let timeout = shared.settings.connect_timeout;
        let login = Login::read(&shared.settings.auth)?;
        let greeting = greet(server, timeout)?;
        let tls_wanted = server.starts_with("tls://") || shared.settings.tls.is_given();
        let wanted = if tls_wanted { Encryption::Tls } else { Encryption::Clear };
        let route = match greeting.encryption(wanted)? {
            Encryption::Tls => Route::Tunnel(
                greeting,
                Plan { tls: shared.settings.tls.meaning(), name: name.to_owned(), timeout },
            ),
            Encryption::Clear => {
                self.warn_of_clear(server, &login);
                Route::Clear
            }
        };
        let dial = Dial {
            server: server.to_string(),
            route,
            id: shared.links.fetch_add(1, Ordering::Relaxed),
            slots: shared.slots,
            login,
            name: format!("pg-outbox/{}", shared.instance),
            inbox_prefix: shared.settings.inbox_prefix.clone(),
        };
        let hanging = shared.hanging_dials.clone();
        let (done, result) = bounded(1);
        hanging.fetch_add(1, Ordering::Relaxed);
        let told = dial.login.clone();
        thread::Builder::new().name("nats-dial".into()).spawn(move || {
            let link = dial.run().map_err(|error| anyhow!(told.hidden_in(&format!("{error:#}"))));
            hanging.fetch_sub(1, Ordering::Relaxed);
            // Nobody may be waiting any more: then the link is dropped here.
            let _ = done.send(link);
        })?;
        result.recv_timeout(timeout).map_err(|_| anyhow!("no answer within {}", seconds(timeout)))?
    }

    fn warn_of_clear(&self, server: &str, login: &Login) {
        if login.tells_secret()
            && !is_local(host(server))
            && !self.shared().warned.swap(true, Ordering::Relaxed)
        {
            log::warn!(
                "the password or token crosses the network without TLS: nats={server}; turn TLS on in the server, \
                 and set nats.tls.ca or write tls:// in nats.url"
            );
        }
    }

    /// The first exchange over a new link: it must echo, and it tells which other servers there are. `name` is whose
    /// certificate this one showed.
    fn meet(&mut self, link: &Arc<Link>, name: &str) -> Result<()> {
        let shared = &self.publisher.0;
        let slot = shared.slots - 1;
        let session = Session::new(link.clone(), slot, shared.settings.jetstream.clone());
        let deadline = Instant::now() + shared.settings.connect_timeout;
        let sent = session.echo(deadline);
        let echo = sent.ok().and_then(|_| {
            let wait = deadline.saturating_duration_since(Instant::now());
            link.inboxes[slot].recv_timeout(wait).ok()
        });
        let Some(echo) = echo else {
            let cause = link.down.cause().unwrap_or_else(|| {
                let prefix = &shared.settings.inbox_prefix;
                format!(
                    "our own inbox stays silent: allow this user to subscribe to and publish on {prefix}.>"
                )
            });
            link.down.set(&cause);
            return Err(anyhow!(cause));
        };
        let scheme = if link.server.starts_with("tls://") { "tls" } else { "nats" };
        let told = cluster(&echo);
        if !told.is_empty() {
            let learnt = told.iter().take(LEARNT_MAX).map(|address| {
                let url = format!("{scheme}://{address}");
                let expected = name_of_learnt(host(&url), name).to_owned();
                (url, expected)
            });
            let configured = &self.publisher.0.settings.servers;
            self.learnt = learnt.filter(|(url, _)| !configured.contains(url)).collect();
        }
        Ok(())
    }
}

/// The servers of one attempt to connect, the `turn`-th: a configured one first, whatever others told us, and then of
/// the others those whose turn it is.
fn in_turn<'a>(
    configured: &'a [String],
    learnt: impl Iterator<Item = &'a String>,
    turn: usize,
) -> Vec<String> {
    let Some(first) = configured.get(turn % configured.len().max(1)) else { return Vec::new() };
    let mut others: Vec<&String> =
        configured.iter().chain(learnt).filter(|server| *server != first).collect();
    if !others.is_empty() {
        let done = turn.wrapping_mul(DIALS_MAX - 1) % others.len();
        others.rotate_left(done);
    }
    std::iter::once(first).chain(others).take(DIALS_MAX).cloned().collect()
}

/// The host of `nats://host:port`, an IPv6 address without its brackets.
fn host(url: &str) -> &str {
    let address = url.split_once("://").map_or(url, |(_, address)| address);
    match address.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, _)) => host,
        None => address.split_once(':').map_or(address, |(host, _)| host),
    }
}

/// The name that the certificate of a server must be for of which another server, known as `told_by`, told us.
/// Clusters tell addresses, while certificates are made for names: then all of them have the one that we were given.
fn name_of_learnt<'a>(host: &'a str, told_by: &'a str) -> &'a str {
    let is_address = |name: &str| name.parse::<IpAddr>().is_ok();
    if is_address(host) && !is_address(told_by) { told_by } else { host }
}

/// Nothing that is said to this host leaves the machine.
fn is_local(host: &str) -> bool {
    host.parse::<IpAddr>().map_or(host.eq_ignore_ascii_case("localhost"), |address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_has_one_host() {
        let cases = [
            ("nats://db.example.org:4222", "db.example.org"),
            ("tls://db", "db"),
            ("tls://[::1]:4222", "::1"),
            ("nats://10.0.0.1:1", "10.0.0.1"),
        ];
        for (url, expected) in cases {
            assert_eq!(host(url), expected);
        }
    }

    #[test]
    fn a_server_that_we_learn_of_has_a_certificate_for_a_name() {
        let cases = [
            ("10.0.0.2", "nats.example.org", "nats.example.org"),
            ("10.0.0.2", "10.0.0.1", "10.0.0.2"),
            ("b.example.org", "nats.example.org", "b.example.org"),
            ("b.example.org", "10.0.0.1", "b.example.org"),
            ("fe80::1", "nats.example.org", "nats.example.org"),
        ];
        for (host, told_by, expected) in cases {
            assert_eq!(name_of_learnt(host, told_by), expected);
        }
    }

    #[test]
    fn this_machine_has_a_few_names() {
        assert!(["localhost", "LOCALHOST", "127.0.0.9", "::1"].iter().all(|host| is_local(host)));
        assert!(["db", "10.0.0.1", "127.1", "localhost.example.org"].iter().all(|host| !is_local(host)));
    }

    #[test]
    fn every_server_has_its_turn_and_a_configured_one_is_first() {
        let named = |prefix: &str, count: usize| -> Vec<String> {
            (0..count).map(|number| format!("{prefix}{number}")).collect()
        };
        assert!(in_turn(&[], named("l", 3).iter(), 7).is_empty());
        for (configured, learnt) in [(1, 0), (1, 2), (3, 0), (2, 3), (1, 64), (7, 64)] {
            let (configured, learnt) = (named("c", configured), named("l", learnt));
            let mut missing: Vec<&String> = configured.iter().chain(&learnt).collect();
            for turn in 1_000..1_000 + 64 {
                let servers = in_turn(&configured, learnt.iter(), turn);
                assert_eq!(servers.len(), (configured.len() + learnt.len()).min(DIALS_MAX));
                assert!(configured.contains(&servers[0]), "{servers:?}");
                missing.retain(|server| !servers.contains(server));
            }
            assert!(missing.is_empty(), "{configured:?} {missing:?}");
        }
    }
}
