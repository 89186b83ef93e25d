//! A session: one slot's use of one link, for the length of a claim or a probe.
//!
//! It hands messages to the link's writer, in chunks, and hears what comes back, always with a deadline. What is
//! published waits in the session until a chunk is full or [`Session::hand_over`] is called: whoever waits for an answer
//! calls that first. Acks that arrive for a claim long settled carry a token that nobody waits for; the one who hears
//! them drops them.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crossbeam_channel::{Receiver, Select, TrySendError, select};

use super::link::{Body, CHUNK_MESSAGES, Inbound, Link, NotAfter, WireMessage};
use super::patience::Patience;
use crate::boottime::Boottime;
use crate::config;
use crate::event::Event;
use crate::nats::answer::{self, Answer, StreamFacts, StreamFault};

/// One message on its way to the writer.
pub struct Outgoing {
    /// Subject to publish to.
    pub subject: String,
    /// Header lines as `event/headers.rs` builds them: `Nats-Msg-Id` first, each line ended by CR LF.
    pub headers: String,
    /// The event whose payload is sent.
    pub event: Arc<Event>,
}

/// What a session hears.
#[derive(Debug)]
pub enum Heard {
    /// The answer to the publish with this token.
    Answer(u64, Answer),
    /// Our own message with this token came back: everything sent before it on this link was processed.
    Echo(u64),
    /// What JetStream says of the stream, asked with this token.
    Stream(u64, Result<StreamFacts, StreamFault>),
    /// The server denied a publish to this subject.
    Denied(String),
    /// The link is gone, and why.
    Down(String),
    /// Nothing until the deadline.
    Silence,
}

/// Why a message was not handed over.
#[derive(Debug)]
pub enum NotSent {
    /// The writer does not take it until the deadline: the server has stalled.
    Stuck,
    /// The link is gone, and why.
    Down(String),
}

impl NotSent {
    /// The cause, for the log and `/ready`.
    pub fn cause(self) -> String {
        match self {
            NotSent::Stuck => "the server takes nothing from us".into(),
            NotSent::Down(cause) => cause,
        }
    }
}

/// Why a fence does not stand.
#[derive(Debug)]
pub enum NoFence {
    /// It did not come back in time: whether the server has stalled, nobody knows.
    Silence,
    /// The link is gone or takes nothing, and why.
    Lost(String),
}

/// Why a probe failed.
#[derive(Debug)]
pub enum ProbeFailure {
    /// Not even our own message came back: the link is stuck or gone.
    Link(String),
    /// The server answers, but the stream cannot take events.
    Stream(StreamFault),
}

impl ProbeFailure {
    /// The cause, for the log and `/ready`.
    pub fn cause(&self) -> String {
        match self {
            ProbeFailure::Link(cause) => cause.clone(),
            ProbeFailure::Stream(fault) => fault.to_string(),
        }
    }
}

/// One slot's use of one link, for the length of a claim.
pub struct Session {
    link: Arc<Link>,
    slot: usize,
    jetstream: config::JetStream,
    /// Published, and not yet handed to the writer.
    chunk: RefCell<Vec<WireMessage>>,
    /// Set by the writer when it came to a message of this session too late.
    dropped: Arc<AtomicBool>,
    /// Of its waits for answers.
    patience: Cell<Patience>,
}

/// Kinds of tokens: what is asked with them.
const PUBLISH: char = 'p';
const ECHO: char = 'e';
const STREAM: char = 's';

impl Session {
    pub(super) fn new(link: Arc<Link>, slot: usize, jetstream: config::JetStream) -> Session {
        // The server names no message in a denial, so every slot is told of every one. What was denied before
        // this session sent anything says nothing of what it will send: the permission may be there by now.
        while link.denials[slot].try_recv().is_ok() {}
        Session {
            link,
            slot,
            jetstream,
            chunk: RefCell::default(),
            dropped: Arc::default(),
            patience: Cell::default(),
        }
    }

    /// Takes the link down: nobody uses it any more.
    pub(super) fn take_down(&self, cause: &str) {
        self.link.down.set(cause);
    }

    /// The server of the link.
    pub(super) fn server(&self) -> &str {
        &self.link.server
    }

    /// Publishes an event with the next chunk and returns the token that its answer will carry.
    ///
    /// The writer drops a message that it comes to after `not_after`, as after a pause of this process: somebody
    /// else may have taken the event over by then. Its answer then never comes. In core NATS no answer comes
    /// anyway, a later [`Session::echo`] tells that the message was received, and so none is dropped.
    ///
    /// # Errors
    /// See [`NotSent`].
    pub fn publish(&self, message: Outgoing, not_after: Boottime, deadline: Instant) -> Result<u64, NotSent> {
        let token = self.token();
        let reply = self.jetstream.enabled.then(|| self.reply(PUBLISH, token));
        let not_after = self.jetstream.enabled.then(|| self.not_after(not_after));
        let Outgoing { subject, headers, event } = message;
        self.add(
            WireMessage { subject, reply, headers: Some(headers), body: Body::Event(event), not_after },
            deadline,
        )?;
        Ok(token)
    }

    /// Publishes a message of an atomic batch that is not its last: it has no answer of its own.
    ///
    /// # Errors
    /// See [`NotSent`].
    pub fn publish_part(
        &self,
        message: Outgoing,
        not_after: Boottime,
        deadline: Instant,
    ) -> Result<(), NotSent> {
        let Outgoing { subject, headers, event } = message;
        let (headers, body) = (Some(headers), Body::Event(event));
        let not_after = Some(self.not_after(not_after));
        self.add(WireMessage { subject, reply: None, headers, body, not_after }, deadline)
    }

    /// Sends a message to our own inbox; it comes back as [`Heard::Echo`] after the server has processed
    /// everything that this link sent before.
    ///
    /// # Errors
    /// See [`NotSent`].
    pub fn echo(&self, deadline: Instant) -> Result<u64, NotSent> {
        let token = self.token();
        let subject = self.reply(ECHO, token);
        self.add(
            WireMessage {
                subject,
                reply: None,
                headers: None,
                body: Body::Bytes(Vec::new()),
                not_after: None,
            },
            deadline,
        )?;
        self.hand_over(deadline)?;
        Ok(token)
    }

    /// Waits until the server has processed everything that this link sent before; returns the subjects that it denied
    /// meanwhile. Answers to publishes are dropped.
    ///
    /// # Errors
    /// See [`NoFence`].
    pub fn fence(&self, deadline: Instant) -> Result<Vec<String>, NoFence> {
        let fence = self.echo(deadline).map_err(|not_sent| NoFence::Lost(not_sent.cause()))?;
        let mut denied = Vec::new();
        let mut wait = deadline;
        let mut echoed = false;
        loop {
            match self.hear(wait) {
                Heard::Echo(token) if token == fence => {
                    // A denial is told before the echo, on another channel: take what is there, then be done.
                    echoed = true;
                    wait = Instant::now();
                }
                Heard::Denied(subject) => denied.push(subject),
                Heard::Down(cause) => return Err(NoFence::Lost(cause)),
                Heard::Silence if echoed => return Ok(denied),
                Heard::Silence => return Err(NoFence::Silence),
                Heard::Echo(_) | Heard::Answer(..) | Heard::Stream(..) => {}
            }
        }
    }

    /// Hands what is published to the writer.
    ///
    /// # Errors
    /// See [`NotSent`].
    pub fn hand_over(&self, deadline: Instant) -> Result<(), NotSent> {
        let link = &self.link;
        let chunk = self.chunk.take();
        if chunk.is_empty() {
            return Ok(());
        }
        // The common case without a look at the clock.
        let chunk = match link.outgoing.try_send(chunk) {
            Ok(()) => return Ok(()),
            Err(TrySendError::Full(chunk) | TrySendError::Disconnected(chunk)) => chunk,
        };
        let down = || NotSent::Down(link.down.cause().unwrap_or_else(|| "connection lost".into()));
        select! {
            send(link.outgoing, chunk) -> sent => sent.map_err(|_| down()),
            recv(link.down.ended) -> _ => Err(down()),
            default(deadline.saturating_duration_since(Instant::now())) => Err(NotSent::Stuck),
        }
    }

    /// Waits for the next answer, until `deadline`.
    pub fn hear(&self, deadline: Instant) -> Heard {
        loop {
            // An answer is there more often than not, and costs little to take where nobody has to wait for it.
            let inbox = &self.link.inboxes[self.slot];
            let there = inbox.try_recv().ok().or_else(|| self.watch(inbox, deadline));
            let heard = there.map_or_else(|| self.wait(deadline), |message| self.read(&message));
            match heard {
                // An echo may have come back over a connection that the crate has made underneath, after this
                // link lost its own: that proves nothing, and the link is marked down before such a connection.
                Some(Heard::Echo(token)) => {
                    return self.link.down.cause().map_or(Heard::Echo(token), Heard::Down);
                }
                Some(heard) => return heard,
                None => {}
            }
        }
    }

    /// An answer that comes in a moment, unless the deadline has passed.
    fn watch(&self, inbox: &Receiver<Inbound>, deadline: Instant) -> Option<Inbound> {
        if deadline <= Instant::now() {
            return None;
        }
        let mut patience = self.patience.get();
        let message = patience.look(|| inbox.try_recv().ok());
        self.patience.set(patience);
        message
    }

    /// The next thing that comes; `None` for what means nothing. Does not wait at all once the deadline has passed.
    fn wait(&self, deadline: Instant) -> Option<Heard> {
        let link = &self.link;
        let (answers, denials, ended) =
            (&link.inboxes[self.slot], &link.denials[self.slot], &link.down.ended);
        let mut select = Select::new();
        let (answer, denial) = (select.recv(answers), select.recv(denials));
        select.recv(ended);
        let wait = deadline.saturating_duration_since(Instant::now());
        let happened =
            if wait.is_zero() { select.try_select().ok() } else { select.select_timeout(wait).ok() };
        let Some(happened) = happened else { return Some(Heard::Silence) };
        match happened.index() {
            index if index == answer => happened.recv(answers).ok().and_then(|message| self.read(&message)),
            index if index == denial => happened.recv(denials).ok().map(Heard::Denied),
            _ => {
                // It only ever ends.
                let _ = happened.recv(ended);
                Some(Heard::Down(link.down.cause().unwrap_or_else(|| "connection lost".into())))
            }
        }
    }

    /// Asks the server and the stream whether they are there; hears answers to publishes meanwhile.
    ///
    /// In core NATS only the server is asked, and the facts are empty.
    ///
    /// # Errors
    /// See [`ProbeFailure`].
    pub fn probe(
        &self,
        deadline: Instant,
        heard: &mut dyn FnMut(u64, Answer),
    ) -> Result<StreamFacts, ProbeFailure> {
        let stream = &self.jetstream.stream_name;
        let question = format!("$JS.API.STREAM.INFO.{stream}");
        self.ask(&question, Vec::new(), deadline, heard)
    }

    pub(super) fn create_stream(&self, deadline: Instant) -> Result<StreamFacts, ProbeFailure> {
        let jetstream = &self.jetstream;
        let stream = &jetstream.stream_name;
        let body = serde_json::json!({
            "name": stream,
            "subjects": jetstream.subjects,
            "storage": match jetstream.storage {
                config::Storage::File => "file",
                config::Storage::Memory => "memory",
            },
            "num_replicas": jetstream.replicas,
            "retention": "limits",
            "discard": "old",
            "max_consumers": -1,
            "max_msgs": -1,
            "max_bytes": -1,
            "max_age": 0,
            "duplicate_window": u64::try_from(jetstream.duplicate_window.as_nanos()).unwrap_or(u64::MAX),
        });
        let question = format!("$JS.API.STREAM.CREATE.{stream}");
        self.ask(&question, body.to_string().into_bytes(), deadline, &mut |_, _| {})
    }

    /// Sends a question about the stream and, behind it, an echo. Both must come back until `deadline`.
    fn ask(
        &self,
        question: &str,
        body: Vec<u8>,
        deadline: Instant,
        heard: &mut dyn FnMut(u64, Answer),
    ) -> Result<StreamFacts, ProbeFailure> {
        let not_sent = |reason: NotSent| ProbeFailure::Link(reason.cause());
        let mut facts = None;
        let mut asked = None;
        if self.jetstream.enabled {
            let token = self.token();
            let reply = Some(self.reply(STREAM, token));
            let question = WireMessage {
                subject: question.to_string(),
                reply,
                headers: None,
                body: Body::Bytes(body),
                not_after: None,
            };
            self.add(question, deadline).map_err(not_sent)?;
            asked = Some(token);
        } else {
            facts = Some(Ok(StreamFacts::default()));
        }
        let echo = self.echo(deadline).map_err(not_sent)?;
        let mut echoed = false;
        while !echoed || facts.is_none() {
            match self.hear(deadline) {
                Heard::Echo(token) => echoed |= token == echo,
                Heard::Stream(token, answer) if Some(token) == asked => facts = Some(answer),
                Heard::Answer(token, answer) => heard(token, answer),
                Heard::Denied(subject) if subject == question => {
                    let cause =
                        format!("permission denied to publish to {question}: allow it for this NATS user");
                    facts = Some(Err(StreamFault::Unusable(cause)));
                }
                Heard::Stream(..) | Heard::Denied(_) => {}
                Heard::Down(cause) => return Err(ProbeFailure::Link(cause)),
                Heard::Silence if echoed => {
                    let stream = &self.jetstream.stream_name;
                    let cause = format!("JetStream does not answer for stream {stream}");
                    return Err(ProbeFailure::Stream(StreamFault::Unusable(cause)));
                }
                Heard::Silence => return Err(ProbeFailure::Link("the server does not answer".into())),
            }
        }
        facts.unwrap_or_else(|| Ok(StreamFacts::default())).map_err(ProbeFailure::Stream)
    }

    /// Whether a message of this session came to the socket too late and was dropped: no answer to one that was
    /// published then says nothing, as it may be the one.
    pub fn dropped_any(&self) -> bool {
        self.dropped.load(Ordering::Relaxed)
    }

    /// The server's limit on headers and payload of one message, in bytes.
    pub fn max_payload(&self) -> usize {
        self.link.max_payload.load(Ordering::Relaxed)
    }

    fn not_after(&self, time: Boottime) -> NotAfter {
        NotAfter { time, dropped: self.dropped.clone() }
    }

    fn token(&self) -> u64 {
        self.link.next_token.fetch_add(1, Ordering::Relaxed)
    }

    fn reply(&self, kind: char, token: u64) -> String {
        format!("{}.{}.{kind}{token}", self.link.inbox, self.slot)
    }

    /// Adds a message to the chunk, and hands it over once it is full.
    fn add(&self, message: WireMessage, deadline: Instant) -> Result<(), NotSent> {
        let mut chunk = self.chunk.borrow_mut();
        chunk.push(message);
        let is_full = chunk.len() >= CHUNK_MESSAGES;
        drop(chunk);
        if is_full { self.hand_over(deadline) } else { Ok(()) }
    }

    /// Makes sense of a message to our inbox; `None` for one that we cannot have asked for.
    fn read(&self, message: &Inbound) -> Option<Heard> {
        let (_, token) = message.subject.rsplit_once('.')?;
        let kind = token.chars().next()?;
        let token = token.get(1..)?.parse().ok()?;
        let no_responders = message.is_no_responders();
        let stream = &self.jetstream.stream_name;
        match kind {
            PUBLISH => answer::publish_answer(&message.data, no_responders, stream)
                .map(|answer| Heard::Answer(token, answer)),
            ECHO => Some(Heard::Echo(token)),
            STREAM => Some(Heard::Stream(token, answer::stream_answer(&message.data, no_responders, stream))),
            _ => None,
        }
    }
}
