//! The greeting of a NATS server, read over a socket of our own: who is there, and whether it has TLS.
//!
//! The `nats` crate waits for it without any limit. Reading it first finds a server that accepts connections and says
//! nothing (stopped, behind a dead proxy, or waiting for TLS before it says a word) before the crate hangs on it, and
//! names the cause. What it says decides how we go on: in clear, the socket is dropped and the crate makes its own;
//! with TLS, the tunnel goes on with this one. Runs on the thread that dials, for a bounded time.

use std::io::{ErrorKind, Read};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Map, Value};

/// Longest greeting, in bytes; it lists the cluster's servers.
const LENGTH_MAX: usize = 256 * 1024;
/// How a greeting begins.
const BEGINNING: &[u8] = b"INFO ";

/// A server that has greeted.
pub(super) struct Greeting {
    pub(super) socket: TcpStream,
    pub(super) info: Map<String, Value>,
}

/// How we go on after a greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encryption {
    Clear,
    Tls,
}

impl Greeting {
    /// What the server and we agree on; `wanted` is ours to say.
    ///
    /// # Errors
    /// We want TLS and the server has none. There is no way back to clear from that: whoever can change a greeting
    /// could ask for it.
    pub(super) fn encryption(&self, wanted: Encryption) -> Result<Encryption> {
        let says = |word: &str| self.info.get(word).and_then(Value::as_bool) == Some(true);
        match (wanted, says("tls_required"), says("tls_available")) {
            (Encryption::Tls, false, false) => {
                bail!("the server offers no TLS, which nats.tls or the tls:// in nats.url wants")
            }
            (Encryption::Tls, ..) | (Encryption::Clear, true, _) => Ok(Encryption::Tls),
            (Encryption::Clear, false, _) => Ok(Encryption::Clear),
        }
    }
}

/// Connects to the first address of a server that greets.
///
/// # Errors
/// What the last address said.
pub(super) fn greet(server: &str, timeout: Duration) -> Result<Greeting> {
    let address: nats::ServerAddress = server.parse()?;
    let mut last = anyhow!("the name resolves to no address");
    for address in address.socket_addrs()? {
        let greeted = TcpStream::connect_timeout(&address, timeout).map_err(anyhow::Error::from);
        match greeted.and_then(|socket| read(socket, timeout)) {
            Ok(greeting) => return Ok(greeting),
            Err(error) => last = error.context(address.to_string()),
        }
    }
    Err(last)
}

fn read(mut socket: TcpStream, timeout: Duration) -> Result<Greeting> {
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(timeout))?;
    let line = read_line(&mut socket, Instant::now() + timeout).map_err(|error| explain(error, timeout))?;
    let info = parse(&line).context("it does not speak the NATS protocol")?;
    Ok(Greeting { socket, info })
}

/// The first line, byte by byte: behind it TLS begins.
fn read_line(socket: &mut impl Read, deadline: Instant) -> std::io::Result<Vec<u8>> {
    let mut line = Vec::with_capacity(1024);
    while !line.ends_with(b"\n") {
        let mut byte = [0];
        socket.read_exact(&mut byte)?;
        line.push(byte[0]);
        let compared = line.len().min(BEGINNING.len());
        if line[..compared] != BEGINNING[..compared] || line.len() > LENGTH_MAX {
            return Err(std::io::Error::new(ErrorKind::InvalidData, "it does not speak the NATS protocol"));
        }
        if Instant::now() > deadline {
            return Err(ErrorKind::TimedOut.into());
        }
    }
    Ok(line)
}

fn parse(line: &[u8]) -> Option<Map<String, Value>> {
    serde_json::from_slice(line.strip_prefix(BEGINNING)?).ok()
}

/// Silence has a cause that its words do not tell.
fn explain(error: std::io::Error, timeout: Duration) -> anyhow::Error {
    let tls_first = "a server that begins with TLS (handshake_first) is not supported";
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => {
            anyhow!("no greeting within {:.1}s; {tls_first}", timeout.as_secs_f64())
        }
        ErrorKind::UnexpectedEof => anyhow!("it closed the connection before it greeted; {tls_first}"),
        _ => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn greeting(text: &str) -> Greeting {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        Greeting { socket, info: parse(text.as_bytes()).unwrap() }
    }

    #[test]
    fn what_is_wanted_is_never_given_up() {
        let cases = [
            ("INFO {}\r\n", Some(Encryption::Clear), None),
            (r#"INFO {"tls_required":true}"#, Some(Encryption::Tls), Some(Encryption::Tls)),
            (r#"INFO {"tls_available":true}"#, Some(Encryption::Clear), Some(Encryption::Tls)),
            (r#"INFO {"tls_required":"yes"}"#, Some(Encryption::Clear), None),
        ];
        for (text, clear, tls) in cases {
            let greeting = greeting(text);
            assert_eq!(greeting.encryption(Encryption::Clear).ok(), clear, "{text}");
            assert_eq!(greeting.encryption(Encryption::Tls).ok(), tls, "{text}");
        }
    }

    #[test]
    fn a_server_that_does_not_greet_is_given_up_with_the_likely_cause() {
        let silent = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let url = format!("nats://{}", silent.local_addr().unwrap());
        let error = format!("{:#}", greet(&url, Duration::from_millis(200)).err().unwrap());
        assert!(error.contains("no greeting within 0.2s") && error.contains("handshake_first"), "{error}");
        let closing = std::thread::spawn(move || drop((silent.accept(), silent.accept())));
        let error = format!("{:#}", greet(&url, Duration::from_secs(10)).err().unwrap());
        closing.join().unwrap();
        assert!(error.contains("closed the connection") || error.contains("reset"), "{error}");
    }

    #[test]
    fn a_greeting_is_one_line_and_nothing_behind_it() {
        let far = Instant::now() + Duration::from_secs(60);
        let mut input: &[u8] = b"INFO {\"a\":1} \r\n\x16\x03";
        let line = read_line(&mut input, far).unwrap();
        assert_eq!(parse(&line).unwrap()["a"], 1);
        assert_eq!(input, b"\x16\x03");
        for bad in [&b"HTTP/1.1 400 Bad Request\r\n"[..], b"INF", b"INFO {", b"", b"\n", b"info {}\r\n"] {
            assert!(read_line(&mut &*bad, far).is_err(), "{bad:?}");
        }
        assert!(parse(b"INFO []\r\n").is_none() && parse(b"INFO {\r\n").is_none());
        let endless = [b"INFO ".as_slice(), &vec![b' '; LENGTH_MAX]].concat();
        assert!(read_line(&mut endless.as_slice(), far).is_err());
        assert!(read_line(&mut &b"INFO {}\r\n"[..], Instant::now() - Duration::from_secs(1)).is_err());
    }
}
