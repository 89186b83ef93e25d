//! A small NATS client, from the protocol's page (docs.nats.io/reference/reference-protocols/nats-protocol).
//!
//! It blocks the thread that calls it, never longer than the limit given, and keeps headers as the bytes that came.
//! It does not reconnect: a test that stops a server connects again.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::unique;

/// Longest wait for the answer to a request.
pub const REQUEST_LIMIT: Duration = Duration::from_secs(10);

/// One message as it came.
#[derive(Debug, Clone)]
pub struct Message {
    pub subject: String,
    pub reply: Option<String>,
    /// The header block, from `NATS/1.0` to its empty line; empty without headers.
    pub headers: String,
    pub payload: Vec<u8>,
}

impl Message {
    /// Status of a message of the server's own, such as 503 for a subject without responders.
    pub fn status(&self) -> Option<u16> {
        self.headers.strip_prefix("NATS/1.0 ")?.get(..3)?.parse().ok()
    }
}

/// A connection.
pub struct Client {
    reader: BufReader<TcpStream>,
    subscriptions: u32,
    queue: VecDeque<Message>,
    /// `-ERR` lines so far.
    pub errors: Vec<String>,
}

impl Client {
    /// Connects to `nats://host:port` or `nats://user:password@host:port`, or to the first of several URLs with
    /// commas between at which a server listens.
    pub fn connect(urls: &str) -> Client {
        Client::try_connect(urls).unwrap_or_else(|| panic!("no server listens at {urls}"))
    }

    /// The same; `None` if no server listens.
    pub fn try_connect(urls: &str) -> Option<Client> {
        urls.split(',').find_map(|url| {
            let rest = url.strip_prefix("nats://").unwrap_or(url);
            let (login, address) =
                rest.rsplit_once('@').map_or((None, rest), |(login, address)| (Some(login), address));
            TcpStream::connect(address).ok().map(|stream| Client::greet(stream, login))
        })
    }

    fn greet(stream: TcpStream, login: Option<&str>) -> Client {
        stream.set_nodelay(true).unwrap();
        stream.set_write_timeout(Some(REQUEST_LIMIT)).unwrap();
        stream.set_read_timeout(Some(REQUEST_LIMIT)).unwrap();
        let mut client = Client {
            reader: BufReader::new(stream),
            subscriptions: 0,
            queue: VecDeque::new(),
            errors: Vec::new(),
        };
        assert!(client.line().unwrap().starts_with("INFO "), "a NATS server greets with INFO");
        let mut options = json!({"verbose": false, "pedantic": false, "headers": true, "no_responders": true,
            "lang": "test", "version": "0", "protocol": 1, "name": "harness"});
        if let Some((user, password)) = login.and_then(|login| login.split_once(':')) {
            options["user"] = user.into();
            options["pass"] = password.into();
        }
        client.send(&format!("CONNECT {options}\r\n"));
        client.flush();
        client
    }

    /// Subscribes; messages of all subscriptions come out of [`Client::next`].
    pub fn subscribe(&mut self, subject: &str) -> u32 {
        self.subscriptions += 1;
        self.send(&format!("SUB {subject} {}\r\n", self.subscriptions));
        self.subscriptions
    }

    /// Ends a subscription.
    pub fn unsubscribe(&mut self, subscription: u32) {
        self.send(&format!("UNSUB {subscription}\r\n"));
    }

    /// Publishes, with a header block (`NATS/1.0\r\n...\r\n\r\n`) or, if that is empty, without.
    pub fn publish(&mut self, subject: &str, reply: &str, headers: &str, payload: &[u8]) {
        let line = if headers.is_empty() {
            format!("PUB {subject} {reply} {}\r\n", payload.len())
        } else {
            format!("HPUB {subject} {reply} {} {}\r\n{headers}", headers.len(), headers.len() + payload.len())
        };
        let bytes = [line.as_bytes(), payload, b"\r\n"].concat();
        self.reader.get_mut().write_all(&bytes).unwrap();
    }

    /// Waits until the server has worked off everything that was sent.
    pub fn flush(&mut self) {
        self.send("PING\r\n");
        let deadline = Instant::now() + REQUEST_LIMIT;
        loop {
            match self.read(deadline) {
                Some(Input::Pong) => return,
                Some(Input::Message(message)) => self.queue.push_back(message),
                Some(Input::Other) => {}
                None => panic!("no PONG within {REQUEST_LIMIT:?}: {:?}", self.errors),
            }
        }
    }

    /// The next message, or `None` once `limit` has passed or the connection has ended.
    pub fn next(&mut self, limit: Duration) -> Option<Message> {
        if let Some(message) = self.queue.pop_front() {
            return Some(message);
        }
        let deadline = Instant::now() + limit;
        loop {
            if let Input::Message(message) = self.read(deadline)? {
                return Some(message);
            }
        }
    }

    /// Sends a request and waits for its one answer. Not to be mixed with subscriptions on the same connection.
    pub fn request(&mut self, subject: &str, payload: &[u8]) -> Message {
        let inbox = unique("_INBOX.harness.");
        let subscription = self.subscribe(&inbox);
        self.publish(subject, &inbox, "", payload);
        let answer =
            self.next(REQUEST_LIMIT).unwrap_or_else(|| panic!("no answer to {subject}: {:?}", self.errors));
        self.unsubscribe(subscription);
        assert_eq!(answer.subject, inbox);
        assert_eq!(answer.status(), None, "{subject}: {}", answer.headers.trim_end());
        answer
    }

    /// A request to the JetStream API; the error it answers with, as `Err`.
    pub fn api(&mut self, call: &str, body: &Value) -> Result<Value, Value> {
        let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
        let answer = self.request(&format!("$JS.API.{call}"), &body);
        let answer: Value = serde_json::from_slice(&answer.payload).unwrap();
        match answer.get("error") {
            Some(error) => Err(error.clone()),
            None => Ok(answer),
        }
    }

    /// A request to the JetStream API; `None` for an error or no answer, as from a cluster without a leader.
    pub fn try_api(&mut self, call: &str, body: &Value) -> Option<Value> {
        let inbox = unique("_INBOX.harness.");
        let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
        let subscription = self.subscribe(&inbox);
        self.publish(&format!("$JS.API.{call}"), &inbox, "", &body);
        let answer = self.next(REQUEST_LIMIT)?;
        self.unsubscribe(subscription);
        let answer: Value = serde_json::from_slice(&answer.payload).ok()?;
        answer.get("error").is_none().then_some(answer)
    }

    fn send(&mut self, text: &str) {
        self.reader.get_mut().write_all(text.as_bytes()).unwrap();
    }

    /// One piece of the protocol; `None` at the deadline or the end of the connection.
    fn read(&mut self, deadline: Instant) -> Option<Input> {
        // The socket's limit is for the rest of a message that has begun; for its beginning it is the deadline.
        if self.reader.buffer().is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            self.reader.get_ref().set_read_timeout(Some(left.max(Duration::from_millis(1)))).unwrap();
            let began = self.reader.fill_buf().is_ok_and(|bytes| !bytes.is_empty());
            self.reader.get_ref().set_read_timeout(Some(REQUEST_LIMIT)).unwrap();
            if !began {
                return None;
            }
        }
        let line = self.line()?;
        let mut words = line.split_ascii_whitespace();
        match words.next()? {
            "MSG" => Some(Input::Message(self.message(&words.collect::<Vec<_>>(), false))),
            "HMSG" => Some(Input::Message(self.message(&words.collect::<Vec<_>>(), true))),
            "PONG" => Some(Input::Pong),
            "PING" => {
                self.send("PONG\r\n");
                Some(Input::Other)
            }
            "-ERR" => {
                self.errors.push(line);
                Some(Input::Other)
            }
            _ => Some(Input::Other),
        }
    }

    /// `subject sid [reply] [header bytes] bytes`, and then the bytes.
    fn message(&mut self, words: &[&str], with_headers: bool) -> Message {
        let sizes = if with_headers { 2 } else { 1 };
        let size = |word: &str| word.parse::<usize>().unwrap();
        let total = size(words[words.len() - 1]);
        let header_size = if with_headers { size(words[words.len() - 2]) } else { 0 };
        let reply = (words.len() == 3 + sizes).then(|| words[2].to_owned());
        let mut bytes = vec![0; total + 2];
        self.reader.read_exact(&mut bytes).unwrap();
        bytes.truncate(total);
        let payload = bytes.split_off(header_size);
        Message { subject: words[0].to_owned(), reply, headers: String::from_utf8(bytes).unwrap(), payload }
    }

    fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Ok(0) | Err(_) => None,
            Ok(_) => Some(line.trim_end().to_owned()),
        }
    }
}

enum Input {
    Message(Message),
    Pong,
    Other,
}
