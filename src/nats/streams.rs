//! Makes streams of the bench's own and removes them: what an operator would do with the NATS tools.
//!
//! Over a connection of its own. Not part of the service, which creates one stream at most and removes none.
#![allow(deprecated)] // as in link.rs

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow};

use super::login::Login;
use crate::config::NatsAuth;

/// Longest wait for an answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Whether a stream takes atomic batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Batches {
    /// It does.
    Atomic,
    /// It does not.
    None,
}

/// A connection to a server whose streams are made and removed.
pub struct Streams {
    connection: nats::Connection,
}

impl Streams {
    /// Connects.
    ///
    /// # Errors
    /// The server is not there.
    pub fn connect(url: &str, auth: &NatsAuth) -> Result<Streams> {
        let connection = Login::read(auth)?
            .options()
            .with_name("pg-outbox bench")
            .connect(url)
            .with_context(|| format!("connect to nats at {url}"))?;
        let streams = Streams { connection };
        streams.ask("$JS.API.INFO", "")?;
        Ok(streams)
    }

    /// The server's version, `2.9.10`; empty if it does not say.
    pub fn version(&self) -> String {
        let answer = self.connection.request_timeout("$JS.API.INFO", "", ANSWER_LIMIT).ok();
        answer.and_then(|answer| answer.client.map(|client| client.server_info().version)).unwrap_or_default()
    }

    /// Makes a stream on disk, without limits, for the subjects below `prefix`.
    ///
    /// # Errors
    /// The server refuses.
    pub fn create(&self, stream: &str, prefix: &str, batches: Batches) -> Result<()> {
        let mut config = serde_json::json!({
            "name": stream,
            "subjects": [format!("{prefix}.>")],
            "storage": "file",
            "num_replicas": 1,
            "retention": "limits",
            "discard": "old",
            "max_consumers": -1,
            "max_msgs": -1,
            "max_bytes": -1,
            "max_age": 0,
            "duplicate_window": 120_000_000_000_u64,
        });
        if batches == Batches::Atomic {
            config["allow_atomic"] = true.into();
        }
        self.ask(&format!("$JS.API.STREAM.CREATE.{stream}"), &config.to_string()).map(|_| ())
    }

    /// Removes a stream with all that it holds.
    ///
    /// # Errors
    /// There is none, or the server refuses.
    pub fn delete(&self, stream: &str) -> Result<()> {
        self.ask(&format!("$JS.API.STREAM.DELETE.{stream}"), "").map(|_| ())
    }

    /// How many messages the stream has.
    ///
    /// # Errors
    /// There is no stream.
    pub fn messages(&self, stream: &str) -> Result<u64> {
        let info = self.ask(&format!("$JS.API.STREAM.INFO.{stream}"), "")?;
        info["state"]["messages"].as_u64().context("a stream's info without messages")
    }

    /// When the stream stored its first message, by the server's clock.
    ///
    /// # Errors
    /// There is no stream, or nothing in it.
    pub fn first_stored(&self, stream: &str) -> Result<SystemTime> {
        let info = self.ask(&format!("$JS.API.STREAM.INFO.{stream}"), "")?;
        let first = info["state"]["first_ts"].as_str().context("a stream's info without first_ts")?;
        humantime::parse_rfc3339(first).with_context(|| format!("read the time {first}"))
    }

    fn ask(&self, subject: &str, question: &str) -> Result<serde_json::Value> {
        let answer = self
            .connection
            .request_timeout(subject, question, ANSWER_LIMIT)
            .with_context(|| format!("ask {subject}"))?;
        let answer: serde_json::Value = serde_json::from_slice(&answer.data)?;
        match answer.get("error") {
            None => Ok(answer),
            Some(error) => Err(anyhow!("{subject}: {error}")),
        }
    }
}
