//! Reads a stream back, message by message: how the demo checks what arrived, and the bench when.
//!
//! An ephemeral push consumer over a connection of its own. It acknowledges, though nothing is ever sent again, because
//! that paces the server: one that sends half a million messages at once closes the connection of whoever is slower.
//! Not part of the service: nothing the daemon runs reads a stream.
#![allow(deprecated)] // as in the file above

use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use super::login::Login;
use crate::config::NatsAuth;

/// Messages on their way at most, and how many one acknowledgement covers.
const PACE: (u64, u64) = (10_000, 1_000);
/// After this the server would send again what was not acknowledged; nobody reads for so long.
const ACK_WAIT: Duration = Duration::from_secs(24 * 3600);

/// A message as it is stored.
#[derive(Debug, Clone)]
pub struct Stored {
    /// Its sequence in the stream.
    pub seq: u64,
    /// Its subject.
    pub subject: String,
    /// `Nats-Msg-Id`, which is the event's id.
    pub message_id: Option<String>,
    /// Its payload.
    pub payload: Vec<u8>,
    /// When the stream stored it, in nanoseconds since 1970.
    pub stored_at_ns: i64,
}

/// A consumer of one stream.
pub struct StreamReader {
    subscription: nats::Subscription,
    /// Messages read.
    read: u64,
    /// Dropped last: the subscription needs it.
    connection: nats::Connection,
}

impl StreamReader {
    /// Connects to `url` and begins to read `stream` at its first message.
    ///
    /// # Errors
    /// When the server or the stream is not there.
    pub fn open(url: &str, auth: &NatsAuth, stream: &str) -> Result<StreamReader> {
        StreamReader::open_at(url, auth, stream, 1)
    }

    /// The same, beginning at the message with this sequence, or at the one that will have it.
    ///
    /// # Errors
    /// When the server or the stream is not there.
    pub fn open_at(url: &str, auth: &NatsAuth, stream: &str, first: u64) -> Result<StreamReader> {
        let connection = Login::read(auth)?
            .options()
            .with_name("pg-outbox reader")
            .connect(url)
            .with_context(|| format!("connect to nats at {url}"))?;
        let inbox = connection.new_inbox();
        let subscription = connection.subscribe(&inbox)?;
        let consumer = serde_json::json!({
            "stream_name": stream,
            "config": {
                "deliver_subject": inbox,
                "deliver_policy": "by_start_sequence",
                "opt_start_seq": first,
                "ack_policy": "all",
                "ack_wait": u64::try_from(ACK_WAIT.as_nanos())?,
                "max_ack_pending": PACE.0,
                "replay_policy": "instant",
            },
        });
        let answer = connection
            .request_timeout(
                &format!("$JS.API.CONSUMER.CREATE.{stream}"),
                consumer.to_string(),
                Duration::from_secs(5),
            )
            .with_context(|| format!("read stream {stream}"))?;
        let answer: serde_json::Value = serde_json::from_slice(&answer.data)?;
        match answer.get("error") {
            None => Ok(StreamReader { subscription, read: 0, connection }),
            Some(error) => Err(anyhow!("read stream {stream}: {error}")),
        }
    }

    /// The next message; `None` when none comes within `timeout`.
    ///
    /// # Errors
    /// When a message cannot be one of a stream's, or the connection is lost.
    pub fn next(&mut self, timeout: Duration) -> Result<Option<Stored>> {
        let Ok(message) = self.subscription.receiver().recv_timeout(timeout) else { return Ok(None) };
        // $JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<time>.<pending>, with two more
        // tokens (domain and account) in front of the stream on newer servers' longer form.
        let reply = message.reply.as_deref().context("a message without reply is not a stream's")?;
        self.read += 1;
        if self.read.is_multiple_of(PACE.1) {
            self.connection.publish(reply, "+ACK")?;
        }
        let tokens: Vec<&str> = reply.split('.').collect();
        let first = if tokens.len() > 9 { 4 } else { 2 };
        let number = |index: usize| -> Result<i64> {
            tokens
                .get(first + index)
                .and_then(|token| token.parse().ok())
                .with_context(|| format!("cannot read {reply}"))
        };
        let message_id = message.headers.as_ref().and_then(|headers| headers.get("Nats-Msg-Id").cloned());
        Ok(Some(Stored {
            seq: u64::try_from(number(3)?)?,
            stored_at_ns: number(5)?,
            subject: message.subject,
            message_id,
            payload: message.data,
        }))
    }
}
