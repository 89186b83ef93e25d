//! A link: one connection to NATS and everything that belongs to it. Of the service only
//! this file and `login.rs` call the `nats` crate (beside them, `reader.rs` and `streams.rs` do for demo and bench).
//!
//! One writer thread alone publishes and flushes; each *slot* has an inbox of its own, to which answers come as
//! `<nats.inbox_prefix>.<link>.<slot>.<token>`. A link is used until the first sign of trouble, then it is *down*, once and for
//! ever, with the first cause, and everyone who waits on it hears so.
//!
//! The crate would reconnect underneath, but then nobody could say which publishes went out on which connection: a
//! `flush` answers Ok for pongs of the old one, and a fence could pass over publishes that were lost. So its
//! reconnecting is kept from working (see [`LINGER`]), and the keeper dials anew.
//!
//! The crate's `flush`, `publish` and `connect` block without any limit when a server stalls. Here only the writer
//! calls the first two, and a dial runs on a thread of its own. A stuck writer is left behind with its link; it
//! ends when its socket does.
#![allow(deprecated)] // the crate says of itself that it is deprecated

use std::mem;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use crossbeam_channel::{Receiver, Sender, bounded, select};

use super::down::Down;
use super::greeting::Greeting;
use super::login::Login;
use super::patience::Patience;
use super::tunnel::{self, Plan};
use crate::boottime::Boottime;
use crate::event::Event;
use crate::nats::answer;

/// Messages that a session hands to the writer at once, at most. Handed over one by one, each may wake the writer, which
/// then flushes what is a few messages at a time.
pub(super) const CHUNK_MESSAGES: usize = 64;
/// Chunks waiting for a link's writer. Each message is only a reference to an event that a claim holds anyway.
const CHUNKS_MAX: usize = 16;
/// The writer flushes at the latest after so many bytes.
const FLUSH_BYTES: usize = 256 * 1024;
/// Answers one slot may have waiting; a server that sends more than was asked for loses the rest.
const INBOX_MAX: usize = 65_536;
/// Denied subjects one slot may have waiting.
const DENIALS_MAX: usize = 1024;
/// How long the crate waits before it tries to reconnect a link that is down. By then the writer has dropped the
/// connection, which makes the crate give up. Its thread lives that much longer than its link.
const LINGER: Duration = Duration::from_secs(10);

pub(super) struct Link {
    pub(super) id: u64,
    pub(super) server: String,
    pub(super) inbox: String,
    pub(super) outgoing: Sender<Vec<WireMessage>>,
    pub(super) inboxes: Vec<Receiver<Inbound>>,
    pub(super) denials: Vec<Receiver<String>>,
    pub(super) down: Arc<Down>,
    /// The server's `max_payload` in bytes, headers included; the writer keeps it fresh.
    pub(super) max_payload: Arc<AtomicUsize>,
    pub(super) next_token: AtomicU64,
}

/// A message to one of our inboxes.
pub(super) type Inbound = nats::Message;

/// The servers of the cluster, as `host:port`, that the server told the link which received `message`.
pub(super) fn cluster(message: &Inbound) -> Vec<String> {
    message.client.as_ref().map(|client| client.server_info().connect_urls).unwrap_or_default()
}

/// One thing for the writer to publish.
pub(super) struct WireMessage {
    pub(super) subject: String,
    pub(super) reply: Option<String>,
    pub(super) headers: Option<String>,
    pub(super) body: Body,
    /// Not to be written after this: somebody else may have taken the event over.
    pub(super) not_after: Option<NotAfter>,
}

/// When a message is too late, and where the writer says that it dropped one for that.
pub(super) struct NotAfter {
    pub(super) time: Boottime,
    pub(super) dropped: Arc<AtomicBool>,
}

pub(super) enum Body {
    Event(Arc<Event>),
    Bytes(Vec<u8>),
}

impl Body {
    fn bytes(&self) -> &[u8] {
        match self {
            Body::Event(event) => event.payload.as_bytes(),
            Body::Bytes(bytes) => bytes,
        }
    }
}

/// Publishes and flushes for one link; the only thread that does.
struct LinkWriter {
    outgoing: Receiver<Vec<WireMessage>>,
    down: Arc<Down>,
    max_payload: Arc<AtomicUsize>,
    /// Dropped before the connection: dropping unsubscribes.
    _subscriptions: Vec<nats::Subscription>,
    connection: nats::Connection,
}

impl LinkWriter {
    fn run(self) {
        let cause = match self.write() {
            Ok(()) => "link given up".to_string(),
            Err(error) => format!("connection lost: {error}"),
        };
        self.down.set(&cause);
    }

    /// Writes what comes until the link is down; one flush for all that was waiting.
    fn write(&self) -> std::io::Result<()> {
        let mut patience = Patience::default();
        loop {
            let mut next = patience.look(|| self.outgoing.try_recv().ok());
            if next.is_none() {
                next = select! {
                    recv(self.outgoing) -> chunk => match chunk {
                        Ok(chunk) => Some(chunk),
                        Err(_) => return Ok(()),
                    },
                    recv(self.down.ended) -> _ => return Ok(()),
                };
            }
            let mut unflushed = 0;
            while let Some(chunk) = next {
                for message in &chunk {
                    if self.down.is_set() {
                        return Ok(());
                    }
                    unflushed += self.publish(message)?;
                    if unflushed >= FLUSH_BYTES {
                        self.flush()?;
                        unflushed = 0;
                    }
                }
                next = self.outgoing.try_recv().ok();
            }
            self.flush()?;
        }
    }

    fn flush(&self) -> std::io::Result<()> {
        self.connection.flush()?;
        self.max_payload.store(self.connection.max_payload(), Ordering::Relaxed);
        Ok(())
    }

    /// The crate keeps headers in a hash map and writes them in its order. The order matters: nats-server 2.9
    /// takes the first textual match of `Nats-Msg-Id`, so it must come before anything an application wrote.
    /// Hence the whole block goes in as the value of one header; the crate writes values as they are.
    fn publish(&self, message: &WireMessage) -> std::io::Result<usize> {
        if let Some(not_after) = &message.not_after
            && not_after.time.is_past()
        {
            not_after.dropped.store(true, Ordering::Relaxed);
            return Ok(0);
        }
        let headers =
            message.headers.as_deref().and_then(|block| block.split_once(':')).map(|(name, rest)| {
                let mut map = nats::HeaderMap::new();
                map.insert(name, rest);
                map
            });
        let body = message.body.bytes();
        self.connection.publish_with_reply_or_headers(
            &message.subject,
            message.reply.as_deref(),
            headers.as_ref(),
            body,
        )?;
        Ok(body.len() + message.headers.as_ref().map_or(0, String::len) + message.subject.len())
    }
}

/// One attempt to make a link.
pub(super) struct Dial {
    pub(super) server: String,
    pub(super) route: Route,
    pub(super) id: u64,
    pub(super) slots: usize,
    pub(super) login: Login,
    pub(super) name: String,
    /// What the subjects of our inboxes begin with.
    pub(super) inbox_prefix: String,
}

/// How the crate gets there.
pub(super) enum Route {
    /// By itself, in clear.
    Clear,
    /// Through a tunnel to the server that greeted.
    Tunnel(Greeting, Plan),
}

impl Dial {
    pub(super) fn run(mut self) -> Result<Arc<Link>> {
        let down = Arc::new(Down::new());
        let (deny, denials): (Vec<_>, Vec<_>) = (0..self.slots).map(|_| bounded(DENIALS_MAX)).unzip();
        let connection = self.connect(&down, deny)?;
        let inbox = format!("{}.{:032x}", self.inbox_prefix, fastrand::u128(..));
        let mut inboxes = Vec::with_capacity(self.slots);
        let mut subscriptions = Vec::with_capacity(self.slots);
        for slot in 0..self.slots {
            let subscription = connection.subscribe(&format!("{inbox}.{slot}.*"))?;
            subscription.set_message_limits(INBOX_MAX);
            inboxes.push(subscription.receiver().clone());
            subscriptions.push(subscription);
        }
        let max_payload = Arc::new(AtomicUsize::new(connection.max_payload()));
        let (outgoing, to_write) = bounded(CHUNKS_MAX);
        let writer = LinkWriter {
            outgoing: to_write,
            down: down.clone(),
            max_payload: max_payload.clone(),
            _subscriptions: subscriptions,
            connection,
        };
        thread::Builder::new().name("nats-writer".into()).spawn(move || writer.run())?;
        Ok(Arc::new(Link {
            id: self.id,
            server: self.server,
            inbox,
            outgoing,
            inboxes,
            denials,
            down,
            max_payload,
            next_token: AtomicU64::new(0),
        }))
    }

    fn connect(&mut self, down: &Arc<Down>, deny: Vec<Sender<String>>) -> Result<nats::Connection> {
        let Route::Tunnel(greeting, plan) = mem::replace(&mut self.route, Route::Clear) else {
            return Ok(self.options(self.login.options(), down, deny).connect(self.server.as_str())?);
        };
        let tunnel = tunnel::open(greeting, &self.login, &plan, down)?;
        let connected = self.options(nats::Options::new(), down, deny).connect(tunnel.url.as_str());
        // The tunnel knows better what was the matter.
        let cause = |error: std::io::Error| down.cause().map_or_else(|| error.into(), |cause| anyhow!(cause));
        let connection = connected.map_err(cause)?;
        ensure!(tunnel.is_taken(), "the tunnel closed before the connection came to it");
        Ok(connection)
    }

    /// The crate's options, defaults included where they matter.
    fn options(&self, login: nats::Options, down: &Arc<Down>, deny: Vec<Sender<String>>) -> nats::Options {
        let (disconnected, lingering, erring) = (down.clone(), down.clone(), down.clone());
        let last_error = Arc::new(Mutex::new(None::<String>));
        let said = last_error.clone();
        let known = self.login.clone();
        let errors = AtomicU64::new(0);
        login
            .with_name(&self.name)
            .reconnect_buffer_size(0)
            // One attempt: the one that connects. The attempt it leads to after a loss finds nobody (LINGER).
            .max_reconnects(1)
            .reconnect_delay_callback(move |_| if lingering.is_set() { LINGER } else { Duration::ZERO })
            .disconnect_callback(move || {
                let said = last_error.lock().unwrap_or_else(PoisonError::into_inner).take();
                disconnected.set(&said.map_or_else(
                    || "connection lost".to_string(),
                    |error| format!("connection lost: the server said {error:?}"),
                ));
            })
            .error_callback(move |error| {
                let error = error.to_string();
                if let Some(subject) = answer::denied_subject(&error) {
                    for slot in &deny {
                        let _ = slot.try_send(subject.to_string());
                    }
                    return;
                }
                let error = known.hidden_in(&error);
                // A server may say so without end: the 1st, 2nd, 4th, 8th ... is logged.
                let times = errors.fetch_add(1, Ordering::Relaxed) + 1;
                if !erring.is_set() && times.is_power_of_two() {
                    log::warn!("nats says: {error}: times={times}");
                }
                *said.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            })
    }
}
