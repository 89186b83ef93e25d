//! A bare NATS client, the bench's measure of what publishing alone can do: a socket, no crate, no event.
//!
//! It knows what it needs of the protocol (<https://docs.nats.io/reference/reference-protocols/nats-protocol>):
//! CONNECT, SUB, HPUB, and MSG for the acks. One thread writes ahead of the acks, up to a window; another reads and
//! counts them. It is as fast as a client can be here, so that what the dispatcher reaches is held against the server
//! and not against ourselves. It checks that every message was stored, once. No TLS, no credentials files.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::config::NatsAuth;

/// Longest silence of the server.
const SILENCE: Duration = Duration::from_secs(10);
/// Bytes written at once.
const CHUNK_BYTES: usize = 64 * 1024;

/// A message to publish.
pub struct Message<'a> {
    /// Subject.
    pub subject: &'a str,
    /// Header lines, each ended by CR LF.
    pub headers: &'a str,
    /// Payload.
    pub payload: &'a [u8],
}

/// A connection, with a subscription for acks.
pub struct Raw {
    socket: TcpStream,
    reader: BufReader<TcpStream>,
    inbox: String,
}

impl Raw {
    /// Connects to a server such as `nats://127.0.0.1:4222`.
    ///
    /// # Errors
    /// The server is not there, or wants what this client does not speak.
    pub fn connect(url: &str, auth: &NatsAuth) -> Result<Raw> {
        let address = url.strip_prefix("nats://").with_context(|| format!("{url}: no plain connection"))?;
        let login = match auth {
            NatsAuth::None => String::new(),
            NatsAuth::UserPassword(user, password) => {
                format!(r#","user":{},"pass":{}"#, json(user)?, json(password.expose())?)
            }
            NatsAuth::Token(token) => format!(r#","auth_token":{}"#, json(token.expose())?),
            NatsAuth::CredentialsFile(_) | NatsAuth::NkeyFile(_) => {
                bail!("the bench's bare client signs with no key: log in with a password or a token")
            }
        };
        let socket = TcpStream::connect(address).with_context(|| format!("connect to nats at {address}"))?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(SILENCE))?;
        socket.set_write_timeout(Some(SILENCE))?;
        let reader = BufReader::with_capacity(CHUNK_BYTES, socket.try_clone()?);
        let inbox = format!("_INBOX.{:032x}", fastrand::u128(..));
        let mut raw = Raw { socket, reader, inbox };
        let connect = format!(
            "CONNECT {{\"verbose\":false,\"pedantic\":false,\"headers\":true,\"lang\":\"rust\",\"version\":\"0\"{login}}}\r\n\
             SUB {} 1\r\nPING\r\n",
            raw.inbox
        );
        raw.socket.write_all(connect.as_bytes())?;
        let mut line = String::new();
        while line != "PONG\r\n" {
            line.clear();
            ensure!(raw.reader.read_line(&mut line)? > 0, "nats closed the connection");
            ensure!(!line.starts_with("-ERR"), "nats says {}", line.trim_end());
        }
        Ok(raw)
    }

    /// Publishes all of them, `window` at most without an ack; returns from the first write to the last ack.
    ///
    /// # Errors
    /// A message was refused, was a duplicate, or had no ack.
    pub fn publish_all(&mut self, messages: &[Message], window: usize) -> Result<Duration> {
        let began = Instant::now();
        if window == 1 {
            for message in messages {
                let mut bytes = Vec::with_capacity(2 * message.payload.len() + 512);
                encode(&mut bytes, message, &self.inbox);
                self.socket.write_all(&bytes)?;
                read_ack(&mut self.reader)?;
            }
            return Ok(began.elapsed());
        }
        let Raw { socket, reader, inbox } = self;
        let (acked, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
        let writer = thread::current();
        let read_all = || {
            let read = (1..=messages.len()).try_for_each(|count| {
                read_ack(reader)?;
                acked.store(count, Ordering::Release);
                // Seldom enough to cost nothing, often enough that the window never runs dry.
                if count % (window / 8).max(1) == 0 {
                    writer.unpark();
                }
                Ok(())
            });
            failed.store(read.is_err(), Ordering::Release);
            writer.unpark();
            read
        };
        thread::scope(|scope| {
            let read = scope.spawn(read_all);
            let written = write_all(socket, inbox, messages, window, &acked, &failed);
            let read: Result<()> = match read.join() {
                Ok(read) => read,
                Err(_) => bail!("the reader of acks panicked"),
            };
            read.and(written)
        })?;
        Ok(began.elapsed())
    }
}

fn write_all(
    socket: &mut TcpStream,
    inbox: &str,
    messages: &[Message],
    window: usize,
    acked: &AtomicUsize,
    failed: &AtomicBool,
) -> Result<()> {
    let mut bytes = Vec::with_capacity(2 * CHUNK_BYTES);
    for (sent, message) in messages.iter().enumerate() {
        if bytes.len() >= CHUNK_BYTES || sent - acked.load(Ordering::Acquire) >= window {
            socket.write_all(&bytes)?;
            bytes.clear();
        }
        while sent - acked.load(Ordering::Acquire) >= window {
            if failed.load(Ordering::Acquire) {
                return Ok(());
            }
            thread::park_timeout(SILENCE);
        }
        encode(&mut bytes, message, inbox);
    }
    Ok(socket.write_all(&bytes)?)
}

/// Adds a publish to `bytes`.
fn encode(bytes: &mut Vec<u8>, message: &Message, inbox: &str) {
    let Message { subject, headers, payload } = message;
    let header_bytes = "NATS/1.0\r\n\r\n".len() + headers.len();
    let total = header_bytes + payload.len();
    bytes.extend_from_slice(
        format!("HPUB {subject} {inbox} {header_bytes} {total}\r\nNATS/1.0\r\n").as_bytes(),
    );
    bytes.extend_from_slice(headers.as_bytes());
    bytes.extend_from_slice(b"\r\n");
    bytes.extend_from_slice(payload);
    bytes.extend_from_slice(b"\r\n");
}

/// Reads up to the next ack, and makes sure that it is one.
fn read_ack(reader: &mut impl BufRead) -> Result<()> {
    let (mut line, mut body) = (Vec::with_capacity(128), Vec::with_capacity(128));
    loop {
        line.clear();
        ensure!(reader.read_until(b'\n', &mut line)? > 0, "nats closed the connection");
        let text = std::str::from_utf8(&line).context("not the NATS protocol")?.trim_end();
        let (verb, rest) = text.split_once(' ').unwrap_or((text, ""));
        match verb {
            "MSG" | "HMSG" => {
                let bytes = rest.rsplit(' ').next().and_then(|bytes| bytes.parse::<usize>().ok());
                body.resize(bytes.with_context(|| format!("nats says {text}"))? + 2, 0);
                reader.read_exact(&mut body)?;
                let body = String::from_utf8_lossy(&body);
                let stored = body.starts_with("{\"stream\"") && !body.contains("duplicate");
                ensure!(stored, "not stored: {}", body.trim_end());
                return Ok(());
            }
            // The server asks whether we live. It asks again two minutes later, and closes another two later.
            "PING" | "PONG" | "INFO" | "+OK" => {}
            _ => bail!("nats says {text}"),
        }
    }
}

fn json(text: &str) -> Result<String> {
    Ok(serde_json::to_string(text)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_publish_says_how_long_it_is() {
        let mut bytes = Vec::new();
        encode(&mut bytes, &Message { subject: "a.b", headers: "N: 1\r\n", payload: b"{}" }, "_INBOX.x");
        assert_eq!(
            String::from_utf8(bytes).unwrap(),
            "HPUB a.b _INBOX.x 18 20\r\nNATS/1.0\r\nN: 1\r\n\r\n{}\r\n"
        );
    }

    #[test]
    fn only_a_stored_message_counts() {
        let read = |text: &str| read_ack(&mut text.as_bytes()).is_ok();
        let message = |body: &str| format!("PING\r\nMSG _INBOX.x 1 {}\r\n{body}\r\n", body.len());
        assert!(read(&message("{\"stream\":\"S\", \"seq\":1}")));
        assert!(!read(&message("{\"stream\":\"S\",\"seq\":1,\"duplicate\": true}")));
        assert!(!read(&message("{\"error\":{\"code\":503}}")));
        assert!(!read("HMSG _INBOX.x 1 16 16\r\nNATS/1.0 503\r\n\r\n\r\n"), "nobody takes it");
        assert!(!read("-ERR 'Authorization Violation'\r\n"));
        assert!(!read(""));
    }
}
