//! Publishes the events of one claim and says what became of each: the loop between a worker and its session.
//!
//! Keys are in flight together, each with one event at a time (`event/order.rs`); answers come back in any order and
//! each frees its key's next event. Sending stops at the claim's budget, at the first sign of an outage, and when
//! the service drains; what was sent is still waited for, each event `ack_timeout` long. What then has no answer
//! is judged by a probe: if the server and the stream answer, this event alone is *unanswered*; if not, it is an
//! outage, and nothing is charged to any event.
//!
//! Where the stream takes atomic batches, a long run of one key's events goes as one: stored whole or not at all, so
//! their order holds though they are in flight together. Whatever answer a batch gets but "stored", its events are
//! sent again one by one, and the answers to those are what counts: a batch that was stored although its answer was
//! lost is told by `duplicate: true`, and only the event at fault is refused.
//!
//! Core NATS acknowledges nothing. There a round of events is sent, then a fence: our own message, which comes
//! back after the server has processed all that went before it on the same connection. Only then are they settled.
//!
//! Runs on a worker's thread. Never touches the database, never sleeps, and waits only with a deadline.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::boottime::Boottime;
use crate::config::live::{Live, Settings};
use crate::event::order::Order;
use crate::event::retry::{self, Failure};
use crate::event::{Event, Outcome};
use crate::failpoint;
use crate::nats::answer::{Answer, StreamFacts};
use crate::nats::{Heard, NoFence, NotSent, Outgoing, ProbeFailure, Publisher, Session};
use crate::ops::metrics::Metrics;
use crate::publish::announce::announce;
use crate::publish::memory::{Unanswered, Unsettled};
use crate::publish::message::{Messages, TargetStream};
use crate::publish::wire::Wire;

/// Unacknowledged events of all workers together. A stream's leader refuses more than 10,000 waiting messages
/// (nats-server 2.11, `max_buffered_msgs`), and half of that already hides every round trip.
const IN_FLIGHT_MAX: usize = 5_000;
/// Shortest run of a key that is worth a batch, and the longest that a server takes.
const BATCH_EVENTS: (usize, usize) = (8, 1_000);
/// Batches open at once, of all workers together. A stream takes 50, a server 1,000 (nats-server 2.12).
const BATCHES_OPEN_MAX: usize = 40;
/// How the reason begins for an event that nobody answered: whether it was stored, nobody knows.
pub const NO_ACK: &str = "no ack within ";

/// What the workers share to publish their claims.
pub struct Publish {
    /// The connection.
    pub publisher: Publisher,
    /// Topic map, headers and limits, taken anew for each claim.
    pub live: Live,
    /// Whether the events of a key keep their order.
    pub ordered: bool,
    /// JetStream or core NATS.
    pub jetstream: bool,
    /// The stream, for messages.
    pub stream: String,
    /// Whether long runs go as atomic batches where the stream takes them.
    pub batches: bool,
    /// Longest wait for an ack.
    pub ack_timeout: Duration,
    /// Worker threads.
    pub workers: usize,
    /// Set when the service drains: nothing new is sent.
    pub draining: Arc<AtomicBool>,
    /// Events that were not answered, and how often in a row.
    pub unanswered: Unanswered,
    /// Events that were published and could not be settled.
    pub unsettled: Unsettled,
    /// Counters.
    pub metrics: Metrics,
}

/// What became of a claim's events.
#[derive(Debug)]
pub struct Report {
    /// One outcome for each event, in the claim's order.
    pub outcomes: Vec<Outcome>,
    /// How many of the published ones JetStream had already.
    pub duplicates: u64,
    /// Silent events that were put into retry without being charged an attempt.
    pub unanswered: u64,
}

impl Publish {
    /// Publishes `events`, which were read when `budget` began, with the session of `slot`.
    pub fn claim(&self, slot: usize, events: &[Arc<Event>], budget: Boottime) -> Report {
        let untouched =
            || Report { outcomes: vec![Outcome::Untouched; events.len()], duplicates: 0, unanswered: 0 };
        let session = match self.publisher.session(slot) {
            Ok(session) => session,
            Err(cause) => {
                self.publisher.outage(&cause, 0);
                return untouched();
            }
        };
        let live = self.live.now();
        let mut flight = Flight::new(self, &live, &session, events, budget);
        if self.jetstream {
            flight.fly();
        } else {
            flight.fly_in_rounds();
        }
        flight.announce_the_dead();
        flight.land()
    }
}

/// One claim on its way through one session.
struct Flight<'a> {
    publish: &'a Publish,
    live: &'a Settings,
    session: &'a Session,
    messages: Messages<'a>,
    events: &'a [Arc<Event>],
    budget: Boottime,
    window: usize,
    facts: Option<Arc<StreamFacts>>,
    order: Order,
    outcomes: Vec<Outcome>,
    /// Events that go out one by one, as a batch with them was not stored.
    singly: Vec<bool>,
    /// Token to run, for what was sent and not answered.
    in_flight: HashMap<u64, Run>,
    /// How many events that are.
    events_in_flight: usize,
    /// The same in the order of sending, with the time at which the wait for each ends.
    waits: VecDeque<(Instant, u64)>,
    /// Sent, and not answered in time.
    silent: HashMap<u64, Run>,
    /// Answered by "nobody takes this subject".
    unrouted: Vec<usize>,
    duplicates: u64,
    unanswered: u64,
    outage: Option<String>,
}

/// Events of one key that wait for one answer: one event, or a batch of them.
#[derive(Debug, Clone)]
struct Run {
    /// By index, each the successor of the one before. Never empty.
    events: Vec<usize>,
}

impl Run {
    fn first(&self) -> usize {
        self.events[0]
    }

    fn last(&self) -> usize {
        self.events[self.events.len() - 1]
    }

    fn is_batch(&self) -> bool {
        self.events.len() > 1
    }
}

impl<'a> Flight<'a> {
    fn new(
        publish: &'a Publish,
        live: &'a Settings,
        session: &'a Session,
        events: &'a [Arc<Event>],
        budget: Boottime,
    ) -> Flight<'a> {
        let order = if publish.ordered {
            Order::by_key(events.iter().map(AsRef::as_ref))
        } else {
            Order::none(events.len())
        };
        let facts = publish.publisher.facts();
        let wire = Wire { publisher: &publish.publisher, session, ack_timeout: publish.ack_timeout };
        let stream = publish.jetstream.then(|| TargetStream { name: &publish.stream, facts: facts.clone() });
        Flight {
            publish,
            live,
            session,
            messages: Messages { wire, live, stream, metrics: &publish.metrics },
            events,
            budget,
            window: (IN_FLIGHT_MAX / publish.workers).max(1),
            facts,
            order,
            outcomes: vec![Outcome::Untouched; events.len()],
            singly: vec![false; events.len()],
            in_flight: HashMap::new(),
            events_in_flight: 0,
            waits: VecDeque::new(),
            silent: HashMap::new(),
            unrouted: Vec::new(),
            duplicates: 0,
            unanswered: 0,
            outage: None,
        }
    }

    /// JetStream: sends what is ready, hears what comes, until nothing is in flight and nothing may be sent.
    fn fly(&mut self) {
        loop {
            self.send_ready();
            let Some(&(deadline, _)) = self.waits.front() else { break };
            let mut heard = self.session.hear(deadline);
            // All that is there already, before sending again: one answer is seldom alone.
            while self.take(heard) {
                heard = self.session.hear(Instant::now());
            }
            while self.waits.front().is_some_and(|(_, token)| !self.in_flight.contains_key(token)) {
                self.waits.pop_front();
            }
        }
        if self.outage.is_none() && (!self.silent.is_empty() || !self.unrouted.is_empty()) {
            self.judge_the_rest();
        }
    }

    fn may_send(&self) -> bool {
        self.outage.is_none()
            && self.silent.is_empty()
            && !self.publish.draining.load(Ordering::Relaxed)
            && !self.budget.is_past()
    }

    /// Sends what is ready, in as few pieces as can be.
    fn send_ready(&mut self) {
        let before = self.waits.len();
        let mut result = Ok(());
        while self.events_in_flight < self.window && self.may_send() && result.is_ok() {
            let Some(index) = self.order.next_ready() else { break };
            if !self.is_published(index) {
                result = self.send_from(index);
            }
        }
        let deadline = self.messages.wire.deadline();
        match result.and_then(|()| self.session.hand_over(deadline)) {
            Ok(()) => {
                for _ in before..self.waits.len() {
                    failpoint!("publish.sent");
                }
            }
            Err(not_sent) => self.outage = Some(not_sent.cause()),
        }
    }

    /// Publishes an event, or the batch that begins with it.
    fn send_from(&mut self, index: usize) -> Result<(), NotSent> {
        let run = self.batch_from(index);
        let deadline = self.messages.wire.deadline();
        let sent =
            if run.is_batch() { self.send_batch(&run, deadline) } else { self.send_event(index, deadline) };
        if let Some(token) = sent? {
            self.events_in_flight += run.events.len();
            self.in_flight.insert(token, run);
            self.waits.push_back((deadline, token));
        }
        Ok(())
    }

    /// True for an event that an earlier claim published and could not settle: nothing is left to do but that.
    fn is_published(&mut self, index: usize) -> bool {
        let known = self.publish.unsettled.contains(self.events[index].id);
        if known {
            self.published(index);
            self.order.stored(index);
        }
        known
    }

    /// The run that begins with `first`: a batch where that is possible and worth it, else the event alone.
    fn batch_from(&self, first: usize) -> Run {
        let alone = Run { events: vec![first] };
        let (shortest, longest) = BATCH_EVENTS;
        let open = self.in_flight.values().filter(|run| run.is_batch()).count();
        if !self.publish.batches
            || !self.facts.as_ref().is_some_and(|facts| facts.allow_atomic)
            || open >= (BATCHES_OPEN_MAX / self.publish.workers).max(1)
        {
            return alone;
        }
        let room = longest.min(self.window - self.events_in_flight);
        let events: Vec<usize> = std::iter::successors(Some(first), |&index| self.order.successor(index))
            .take_while(|&index| {
                !self.singly[index] && !self.publish.unsettled.contains(self.events[index].id)
            })
            .take(room)
            .collect();
        if events.len() >= shortest { Run { events } } else { alone }
    }

    fn send_event(&mut self, index: usize, deadline: Instant) -> Result<Option<u64>, NotSent> {
        match self.prepare(index) {
            Some(message) => self.session.publish(message, self.budget, deadline).map(Some),
            None => Ok(None),
        }
    }

    /// Sends a run as one batch. An event that can never be a message, or not with what a batch adds to its headers,
    /// sends them all one by one: its turn will come.
    fn send_batch(&mut self, run: &Run, deadline: Instant) -> Result<Option<u64>, NotSent> {
        let messages: Result<Vec<Outgoing>, Failure> =
            run.events.iter().map(|&index| self.messages.make(&self.events[index])).collect();
        let Ok(mut messages) = messages else {
            self.send_singly(run);
            return Ok(None);
        };
        let batch = Uuid::from_u64_pair(fastrand::u64(..), fastrand::u64(..)).simple();
        let last = messages.len();
        for (place, message) in (1..).zip(&mut messages) {
            let commit = if place == last { "Nats-Batch-Commit: 1\r\n" } else { "" };
            message.headers = format!(
                "Nats-Batch-Id: {batch}\r\nNats-Batch-Sequence: {place}\r\n{commit}{}",
                message.headers
            );
            // The server would close the connection, whenever they are sent as a batch.
            if !self.messages.fits(message) {
                self.send_singly(run);
                return Ok(None);
            }
        }
        let Some(commit) = messages.pop() else { return Ok(None) };
        for message in messages {
            self.session.publish_part(message, self.budget, deadline)?;
            failpoint!("publish.part");
        }
        self.session.publish(commit, self.budget, deadline).map(Some)
    }

    /// The events of a batch that was not stored, or of which nobody knows: each for itself from now on.
    fn send_singly(&mut self, run: &Run) {
        for &index in &run.events {
            self.singly[index] = true;
        }
        self.order.put_back(run.first());
    }

    /// The message of an event; `None` when the event can never be one, which is then its outcome.
    fn prepare(&mut self, index: usize) -> Option<Outgoing> {
        match self.messages.make(&self.events[index]) {
            Ok(message) => Some(message),
            Err(failure) => {
                self.fail(index, &failure);
                None
            }
        }
    }

    /// Takes in what was heard. False when there is nothing more to hear now.
    fn take(&mut self, heard: Heard) -> bool {
        match heard {
            Heard::Answer(token, answer) => {
                // An unknown token answers a claim that was settled before.
                if let Some(run) = self.in_flight.remove(&token) {
                    failpoint!("publish.acked");
                    self.events_in_flight -= run.events.len();
                    self.answered(&run, answer);
                }
            }
            Heard::Denied(subject) => self.denied(&subject),
            Heard::Down(cause) => {
                self.outage.get_or_insert(cause);
                self.waits.clear();
                return false;
            }
            Heard::Silence => {
                self.give_up_waiting();
                return false;
            }
            Heard::Echo(_) | Heard::Stream(..) => {}
        }
        true
    }

    fn answered(&mut self, run: &Run, answer: Answer) {
        let index = run.first();
        match answer {
            Answer::Stored { duplicate } => {
                for &index in &run.events {
                    self.published(index);
                }
                self.duplicates += u64::from(duplicate);
                self.order.stored(run.last());
            }
            // No error of a batch says which event it means, nor that none was stored.
            Answer::Refused { .. } | Answer::Outage { .. } if run.is_batch() => self.send_singly(run),
            Answer::Refused { error } => self.fail(index, &Failure::Rejected { error }),
            Answer::NoResponders => self.unrouted.push(index),
            Answer::Outage { cause } => {
                self.outage.get_or_insert(cause);
            }
        }
    }

    fn published(&mut self, index: usize) {
        self.outcomes[index] = Outcome::Published;
        if self.events[index].in_retry {
            self.publish.unanswered.forget(self.events[index].id);
        }
    }

    /// The server denied `subject`: every event in flight to it is rejected.
    fn denied(&mut self, subject: &str) {
        let is_denied = |&index: &usize| self.live.topic_map.subject(&self.events[index].topic) == subject;
        let denied = |run: &Run| run.events.iter().any(is_denied);
        let tokens: Vec<u64> =
            self.in_flight.iter().filter(|(_, run)| denied(run)).map(|(&token, _)| token).collect();
        for token in tokens {
            let Some(run) = self.in_flight.remove(&token) else { continue };
            self.events_in_flight -= run.events.len();
            if run.is_batch() {
                self.send_singly(&run);
            } else {
                self.fail(run.first(), &denial(subject));
            }
        }
    }

    /// The wait for everything whose time has passed is over.
    fn give_up_waiting(&mut self) {
        let now = Instant::now();
        while let Some(&(deadline, token)) = self.waits.front()
            && deadline <= now
        {
            self.waits.pop_front();
            if let Some(run) = self.in_flight.remove(&token) {
                self.events_in_flight -= run.events.len();
                self.silent.insert(token, run);
            }
        }
    }

    /// Judges what was not answered, or answered by nobody, with the help of a probe.
    fn judge_the_rest(&mut self) {
        let publisher = &self.publish.publisher;
        let mut late = Vec::new();
        let mut hear = |token, answer| late.push((token, answer));
        let probed = if self.silent.is_empty() {
            publisher.fresh_facts(self.session, &mut hear)
        } else {
            let deadline = self.messages.wire.deadline();
            self.session.probe(deadline, &mut hear).map(Arc::new)
        };
        for (token, answer) in late {
            if let Some(run) = self.silent.remove(&token) {
                self.answered(&run, answer);
            }
        }
        match probed {
            Ok(facts) => {
                let silent = std::mem::take(&mut self.silent);
                if !self.session.dropped_any() {
                    for run in silent.into_values() {
                        self.stayed_silent(run.first());
                    }
                }
                for index in std::mem::take(&mut self.unrouted) {
                    self.nobody_takes(index, &facts);
                }
            }
            Err(failure) => {
                let waited = if self.silent.is_empty() {
                    String::new()
                } else {
                    format!("no ack within {}; ", self.messages.wire.patience())
                };
                let cause = format!("{waited}{}", failure.cause());
                if matches!(failure, ProbeFailure::Link(_)) {
                    publisher.abandon(self.session, &cause, self.silent.len());
                }
                self.outage.get_or_insert(cause);
            }
        }
    }

    fn stayed_silent(&mut self, index: usize) {
        let event = &self.events[index];
        let failure = Failure::Unanswered {
            error: format!(
                "{NO_ACK}{} though server and stream answer: is {} a subject of the stream, or does \
                 somebody else take it?",
                self.messages.wire.patience(),
                self.live.topic_map.subject(&event.topic)
            ),
            repeats: self.publish.unanswered.again(event.id),
        };
        self.fail(index, &failure);
        let charged = |attempts: u32| attempts > self.events[index].attempts;
        if matches!(self.outcomes[index], Outcome::Retry { attempts, .. } if !charged(attempts)) {
            self.unanswered += 1;
        }
    }

    fn nobody_takes(&mut self, index: usize, facts: &StreamFacts) {
        let subject = self.live.topic_map.subject(&self.events[index].topic);
        let stream = &self.publish.stream;
        if facts.takes(&subject) {
            self.outage.get_or_insert(format!(
                "stream {stream} takes {subject} but nobody answers: a leader change?"
            ));
        } else {
            let error = format!(
                "no stream takes subject {subject}: add it to stream {stream} or map the topic to one that it takes"
            );
            self.fail(index, &Failure::Rejected { error });
        }
    }

    /// Core NATS: rounds of publishes, each closed by a fence.
    ///
    /// In a round a key's events go out together as long as their subject is the same: the connection keeps their
    /// order, and if it breaks, it loses a tail of them. Where the subject changes, the fence must tell first
    /// whether the server denied the former one.
    fn fly_in_rounds(&mut self) {
        loop {
            let round = self.send_round();
            if round.is_empty() || self.outage.is_some() {
                return;
            }
            match self.fence() {
                Ok(denied) => self.settle_round(&round, &denied),
                Err(cause) => {
                    self.outage.get_or_insert(cause);
                    return;
                }
            }
        }
    }

    /// Sends the next events of every key; each run is of one key and one subject.
    fn send_round(&mut self) -> Vec<Vec<usize>> {
        let mut round: Vec<Vec<usize>> = Vec::new();
        let mut sent = 0;
        while sent < self.window && self.may_send() {
            let Some(first) = self.order.next_ready() else { break };
            if self.is_published(first) {
                continue;
            }
            let mut run: Vec<usize> = Vec::new();
            let mut next = Some(first);
            while let Some(index) = next
                && sent < self.window
                && self.events[index].topic == self.events[first].topic
                && !self.publish.unsettled.contains(self.events[index].id)
            {
                let Some(message) = self.prepare(index) else { break };
                let deadline = self.messages.wire.deadline();
                if let Err(not_sent) = self.session.publish(message, self.budget, deadline) {
                    self.outage = Some(not_sent.cause());
                    return round;
                }
                run.push(index);
                sent += 1;
                next = self.order.successor(index);
            }
            if !run.is_empty() {
                round.push(run);
            }
        }
        round
    }

    /// Waits until the server has processed all that was sent; returns the subjects that it denied.
    fn fence(&mut self) -> Result<Vec<String>, String> {
        let deadline = self.messages.wire.deadline();
        self.session.fence(deadline).map_err(|no_fence| match no_fence {
            NoFence::Silence => {
                let cause = format!("no fence within {}", self.messages.wire.patience());
                self.publish.publisher.abandon(self.session, &cause, 0);
                cause
            }
            NoFence::Lost(cause) => cause,
        })
    }

    fn settle_round(&mut self, round: &[Vec<usize>], denied: &[String]) {
        for run in round {
            let (Some(&first), Some(&last)) = (run.first(), run.last()) else { continue };
            let subject = self.live.topic_map.subject(&self.events[first].topic);
            if denied.iter().any(|denied| *denied == subject) {
                self.fail(first, &denial(&subject));
                continue;
            }
            for &index in run {
                self.published(index);
            }
            // The run may have ended at an event that can never be sent: its key goes no further in this claim.
            let goes_on = |next: usize| self.outcomes[next] == Outcome::Untouched;
            if self.order.successor(last).is_none_or(goes_on) {
                self.order.stored(last);
            }
        }
    }

    /// Tells of the events that died, if anybody wants to know.
    fn announce_the_dead(&mut self) {
        let announced = announce(self.live, self.session, self.events, &mut self.outcomes);
        if let Err(cause) = announced {
            self.outage.get_or_insert(cause);
        }
    }

    /// Decides and logs what becomes of an event that failed.
    fn fail(&mut self, index: usize, failure: &Failure) {
        let event = &self.events[index];
        let policy = &self.live.policy;
        let outcome = retry::decide(failure, event.attempts, policy, fastrand::f64());
        let subject = self.live.topic_map.subject(&event.topic);
        let which = format!("event={} seq={} topic={} subject={subject}", event.id, event.seq, event.topic);
        let max = policy.max_attempts;
        match &outcome {
            Outcome::Retry { attempts, delay_ms, error } => {
                let next = Duration::from_millis(u64::try_from(*delay_ms).unwrap_or(0)).as_secs_f64();
                log::warn!(
                    "publish refused, will retry: {which} attempt={attempts}/{max} next={next:.1}s: {error}"
                );
            }
            Outcome::Dead { attempts, error } => {
                log::error!("event is dead: {which} attempts={attempts}/{max}: {error}");
                self.publish.unanswered.forget(event.id);
            }
            Outcome::Published | Outcome::Untouched => {}
        }
        self.outcomes[index] = outcome;
    }

    /// Ends the flight: tells the publisher how NATS is, and reports.
    fn land(self) -> Report {
        let publisher = &self.publish.publisher;
        // A rejection proves nothing of the stream: it may be our own judgement.
        let stored = self.outcomes.contains(&Outcome::Published);
        match &self.outage {
            Some(cause) => publisher.outage(cause, self.events_in_flight + self.silent.len()),
            None if stored => publisher.confirm(),
            None => {}
        }
        Report { outcomes: self.outcomes, duplicates: self.duplicates, unanswered: self.unanswered }
    }
}

fn denial(subject: &str) -> Failure {
    Failure::Rejected {
        error: format!(
            "permission denied to publish to {subject}: allow it for this NATS user, or map the topic elsewhere"
        ),
    }
}
