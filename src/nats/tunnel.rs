//! TLS to a NATS server, spoken for the `nats` crate, which is led to believe that there is none.
//!
//! The crate's own TLS loses its way when the network is slower than we are. Its socket does not block, and it hands
//! rustls at most the 64 KiB that fit into that library's buffer: with the buffer full a write ends as "failed to
//! write whole buffer", so that a larger message never gets through, and what a flush leaves in the buffer stays there
//! until something else happens on the connection.
//!
//! So the tunnel goes on with the socket on which the server greeted: it shakes hands, and offers the crate a plain
//! connection on loopback with a greeting that says nothing of TLS. One thread carries the bytes both ways, and takes
//! new ones only when the last are on their way: what is in the tunnel is bounded, and whoever writes waits as with
//! any slow connection. The thread ends when either side does, and soon after the link is down.
//!
//! Others on this machine can connect to loopback, too. Only a socket of this very process is let in, and one alone.
//! The crate is told no secret: the tunnel adds the login to CONNECT on its way. So whoever listens on the port
//! later, should the crate try it again, learns nothing.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Map, Value};

use super::down::Down;
use super::greeting::Greeting;
use super::login::Login;
use crate::tls::{Tls, TlsSession, is_failure_of_tls};

/// Bytes taken from either side at once.
const CHUNK_BYTES: usize = 64 * 1024;
/// Longest CONNECT of the crate's, in bytes.
const CONNECT_MAX: usize = 64 * 1024;
/// When one side has ended, the other gets what is left within this.
const LINGER: Duration = Duration::from_secs(10);
/// How often an idle tunnel looks whether its link is down.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// What a tunnel needs to know.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) tls: Tls,
    /// Host name or address that the server's certificate must be for.
    pub(super) name: String,
    /// Longest wait for the handshake, and for the crate.
    pub(super) timeout: Duration,
}

/// An open tunnel.
pub(super) struct Tunnel {
    /// Where the crate is to connect: `nats://127.0.0.1:port`.
    pub(super) url: String,
    taken: Arc<AtomicBool>,
}

impl Tunnel {
    /// Whether it was this tunnel that the crate came to. Else somebody else has the port by now.
    pub(super) fn is_taken(&self) -> bool {
        self.taken.load(Ordering::Acquire)
    }
}

/// Shakes hands with the server that greeted, and waits for the crate on a thread of its own, which then carries the
/// bytes until `down`.
///
/// # Errors
/// The handshake failed, or what it needs is not there.
pub(super) fn open(greeting: Greeting, login: &Login, plan: &Plan, down: &Arc<Down>) -> Result<Tunnel> {
    let Greeting { socket: mut server, info } = greeting;
    let login = login.fields(info.get("nonce").and_then(Value::as_str))?;
    let mut session = TlsSession::new(&plan.tls, &plan.name).map_err(|why| anyhow!(why))?;
    server.set_nonblocking(true)?;
    let said = shake_hands(&mut session, &mut server, plan.timeout).context("TLS")?;
    log::debug!("TLS to nats: {}", session.described());

    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let url = format!("nats://{}", listener.local_addr()?);
    let taken = Arc::new(AtomicBool::new(false));
    let (plan, down, coming) = (plan.clone(), down.clone(), taken.clone());
    thread::Builder::new().name("nats-tls".into()).spawn(move || {
        let carried = accept_own(&listener, plan.timeout).and_then(|mut client| {
            coming.store(true, Ordering::Release);
            drop(listener);
            client.set_read_timeout(Some(plan.timeout))?;
            client.write_all(&without_tls(info))?;
            session.write(&with_login(&mut client, login)?)?;
            let mut carrier = Carrier { server, client, session, to_client: said, down: down.clone() };
            carrier.run()
        });
        if let Err(error) = carried {
            log::debug!("tunnel to nats ended: {error:#}");
        }
    })?;
    Ok(Tunnel { url, taken })
}

/// Shakes hands; returns what the server has said meanwhile.
fn shake_hands(session: &mut TlsSession, server: &mut TcpStream, timeout: Duration) -> Result<Vec<u8>> {
    let deadline = Instant::now() + timeout;
    let mut said = Vec::new();
    loop {
        session.push(server)?;
        if !session.is_shaking_hands() && !session.wants_write() {
            return Ok(said);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), "no handshake within {:.1}s", timeout.as_secs_f64());
        let mut flags = PollFlags::IN;
        flags.set(PollFlags::OUT, session.wants_write());
        wait(&mut [PollFd::new(server, flags)], left)?;
        match session.take(server, &mut said) {
            Ok(true) => {}
            Ok(false) => bail!("the server closed the connection"),
            Err(error) => {
                // The server is told why.
                let _ = session.push(server);
                return Err(error.into());
            }
        }
    }
}

/// The greeting without a word of TLS.
fn without_tls(mut info: Map<String, Value>) -> Vec<u8> {
    for word in ["tls_required", "tls_verify", "tls_available"] {
        info.remove(word);
    }
    format!("INFO {}\r\n", Value::from(info)).into_bytes()
}

/// Reads the crate's CONNECT and adds the login.
fn with_login(client: &mut impl Read, login: Map<String, Value>) -> Result<Vec<u8>> {
    let mut line = Vec::with_capacity(512);
    while !line.ends_with(b"\r\n") {
        ensure!(line.len() < CONNECT_MAX, "no CONNECT came through the tunnel");
        let mut byte = [0];
        client.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    let options = line.strip_prefix(b"CONNECT ").context("no CONNECT came through the tunnel")?;
    let mut options: Map<String, Value> = serde_json::from_slice(options)?;
    options.insert("tls_required".to_owned(), true.into());
    options.extend(login);
    Ok(format!("CONNECT {}\r\n", Value::from(options)).into_bytes())
}

/// The first connection that comes from a socket of this process.
fn accept_own(listener: &TcpListener, timeout: Duration) -> Result<TcpStream> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + timeout;
    loop {
        match listener.accept() {
            Ok((client, peer)) if is_ours(peer, listener.local_addr()?) => {
                client.set_nonblocking(false)?;
                client.set_nodelay(true)?;
                return Ok(client);
            }
            Ok((_, peer)) => log::warn!("a stranger on loopback was sent away: peer={peer}"),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let left = deadline.saturating_duration_since(Instant::now());
                ensure!(!left.is_zero(), "nobody came through the tunnel");
                wait(&mut [PollFd::new(listener, PollFlags::IN)], left)?;
            }
            Err(error) => return Err(error).context("accept"),
        }
    }
}

/// Whether the socket at `peer`, which is connected to `here`, is one of this process.
fn is_ours(peer: SocketAddr, here: SocketAddr) -> bool {
    let table = fs::read_to_string("/proc/self/net/tcp").unwrap_or_default();
    let Some(inode) = inode(&table, peer, here) else { return false };
    let name = format!("socket:[{inode}]");
    let Ok(files) = fs::read_dir("/proc/self/fd") else { return false };
    files.flatten().any(|file| fs::read_link(file.path()).is_ok_and(|to| to.as_path() == Path::new(&name)))
}

/// The inode of the socket from `local` to `remote` in a table such as /proc/net/tcp, as proc(5) has it: the columns
/// are number, local, remote, state, queues, timer, retransmits, user, timeouts, inode; an address is its four bytes as
/// one number in this machine's order.
fn inode(table: &str, local: SocketAddr, remote: SocketAddr) -> Option<u64> {
    let written = |address: SocketAddr| match address.ip() {
        IpAddr::V4(ip) => format!("{:08X}:{:04X}", u32::from_ne_bytes(ip.octets()), address.port()),
        IpAddr::V6(_) => String::new(),
    };
    let (local, remote) = (written(local), written(remote));
    table.lines().skip(1).find_map(|line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let is_it = columns.get(1) == Some(&local.as_str()) && columns.get(2) == Some(&remote.as_str());
        is_it.then(|| columns.get(9)?.parse().ok())?
    })
}

/// Waits until one of them is ready, for `limit` at most.
fn wait(fds: &mut [PollFd<'_>], limit: Duration) -> io::Result<()> {
    let limit = Timespec {
        tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: limit.subsec_nanos().into(),
    };
    match poll(fds, Some(&limit)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Carries the bytes of one tunnel.
struct Carrier {
    server: TcpStream,
    client: TcpStream,
    session: TlsSession,
    /// What the server said and the client has not taken yet.
    to_client: Vec<u8>,
    down: Arc<Down>,
}

/// Whether a side goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Open,
    Ended,
}

impl Carrier {
    fn run(&mut self) -> Result<()> {
        self.client.set_nonblocking(true)?;
        let ended = self.carry();
        if let Err(error) = &ended
            && is_failure_of_tls(error.as_ref())
        {
            // Before the crate sees the end and says less.
            self.down.set(&format!("connection lost: {error:#}"));
        }
        // Whichever side it was, neither goes on.
        let _ = self.server.shutdown(Shutdown::Both);
        let _ = self.client.shutdown(Shutdown::Both);
        ended
    }

    fn carry(&mut self) -> Result<()> {
        let mut chunk = vec![0; CHUNK_BYTES];
        let (mut server, mut client) = (Side::Open, Side::Open);
        let mut deadline: Option<Instant> = None;
        loop {
            self.push_to_client()?;
            self.session.push(&mut self.server).context("TLS")?;
            if server == Side::Open && self.to_client.is_empty() {
                server = self.take_from_server()?;
            }
            if client == Side::Open && !self.session.wants_write() {
                client = self.take_from_client(&mut chunk)?;
            }
            let all_is_said = (server == Side::Ended && self.to_client.is_empty())
                || (client == Side::Ended && !self.session.wants_write());
            if all_is_said {
                return Ok(());
            }
            if server == Side::Ended || client == Side::Ended || self.down.is_set() {
                deadline.get_or_insert_with(|| Instant::now() + LINGER);
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                bail!("it ended with bytes on their way");
            }
            self.wait(server, client, deadline)?;
        }
    }

    /// Waits for what each side is ready to do next; not for what has nowhere to go.
    fn wait(&self, server: Side, client: Side, deadline: Option<Instant>) -> Result<()> {
        let mut from_server = PollFlags::empty();
        from_server.set(PollFlags::IN, server == Side::Open && self.to_client.is_empty());
        from_server.set(PollFlags::OUT, self.session.wants_write());
        let mut from_client = PollFlags::empty();
        from_client.set(PollFlags::IN, client == Side::Open && !self.session.wants_write());
        from_client.set(PollFlags::OUT, !self.to_client.is_empty());
        let mut fds = Vec::with_capacity(2);
        for (socket, flags) in [(&self.server, from_server), (&self.client, from_client)] {
            // A socket that is asked for nothing still tells its end, again and again.
            if !flags.is_empty() {
                fds.push(PollFd::new(socket, flags));
            }
        }
        let left = deadline.map_or(LOOK_EVERY, |deadline| deadline.saturating_duration_since(Instant::now()));
        Ok(wait(&mut fds, left)?)
    }

    fn push_to_client(&mut self) -> Result<()> {
        while !self.to_client.is_empty() {
            match self.client.write(&self.to_client) {
                Ok(written) if written > 0 => drop(self.to_client.drain(..written)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // It went away: that is how a link is given up.
                Ok(_) | Err(_) => self.to_client.clear(),
            }
        }
        Ok(())
    }

    fn take_from_server(&mut self) -> Result<Side> {
        match self.session.take(&mut self.server, &mut self.to_client) {
            Ok(true) => Ok(Side::Open),
            Ok(false) => Ok(Side::Ended),
            Err(error) => {
                // What the server said before is still for the client.
                self.push_to_client()?;
                Err(error).context("TLS")
            }
        }
    }

    fn take_from_client(&mut self, chunk: &mut [u8]) -> Result<Side> {
        match self.client.read(chunk) {
            Ok(0) => {
                self.session.say_goodbye();
                Ok(Side::Ended)
            }
            Ok(bytes) => {
                self.session.write(&chunk[..bytes])?;
                Ok(Side::Open)
            }
            Err(error) if [ErrorKind::WouldBlock, ErrorKind::Interrupted].contains(&error.kind()) => {
                Ok(Side::Open)
            }
            Err(_) => Ok(Side::Ended),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn object(text: &str) -> Map<String, Value> {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn the_greeting_keeps_everything_but_tls() {
        let told = without_tls(object(
            r#"{"server_id":"N","max_payload":1048576,"tls_required":true,"tls_verify":true,"tls_available":true,
             "nonce":"x","connect_urls":["10.0.0.1:4222"]}"#,
        ));
        let told = String::from_utf8(told).unwrap();
        assert!(told.ends_with("}\r\n") && !told.contains("tls"), "{told}");
        let info = object(told.strip_prefix("INFO ").unwrap());
        assert_eq!((&info["max_payload"], &info["nonce"]), (&1_048_576.into(), &"x".into()));
        assert_eq!(info["connect_urls"][0], "10.0.0.1:4222");
    }

    #[test]
    fn the_login_joins_what_the_crate_says_and_the_rest_stays_where_it_is() {
        let mut input: &[u8] =
            b"CONNECT {\"lang\":\"rust\",\"user\":null,\"tls_required\":false}\r\nPING\r\n";
        let line = with_login(&mut input, object(r#"{"user":"u","pass":"p\r\n"}"#)).unwrap();
        assert_eq!(input, b"PING\r\n");
        let line = String::from_utf8(line).unwrap();
        assert_eq!(line.matches("\r\n").count(), 1, "{line}");
        let options = object(line.strip_prefix("CONNECT ").unwrap());
        assert_eq!(
            Value::from(options),
            serde_json::json!({"lang": "rust", "user": "u", "pass": "p\r\n", "tls_required": true})
        );
        for bad in ["PING\r\n", "CONNECT []\r\n", "CONNECT {", ""] {
            assert!(with_login(&mut bad.as_bytes(), Map::new()).is_err(), "{bad}");
        }
        assert!(with_login(&mut vec![b'x'; 2 * CONNECT_MAX].as_slice(), Map::new()).is_err());
    }

    #[test]
    fn only_a_socket_of_this_process_is_let_in() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let here = listener.local_addr().unwrap();
        // Of the same user, and first in the queue.
        let script = format!("exec 3<>/dev/tcp/127.0.0.1/{} && echo there && read -r line <&3", here.port());
        let mut stranger = Command::new("bash").args(["-c", &script]).stdout(Stdio::piped()).spawn().unwrap();
        let mut there = [0; 6];
        stranger.stdout.as_mut().unwrap().read_exact(&mut there).unwrap();
        let own = TcpStream::connect(here).unwrap();
        let accepted = accept_own(&listener, Duration::from_secs(10)).unwrap();
        assert_eq!(accepted.peer_addr().unwrap(), own.local_addr().unwrap());
        // It was sent away, so its read has ended.
        stranger.wait().unwrap();
        assert!(accept_own(&listener, Duration::from_millis(10)).is_err(), "nobody else is there");
    }

    #[test]
    fn a_socket_is_known_by_both_of_its_ends() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
             \x20  0: 0100007F:0001 0100007F:0002 01 00000000:00000000 00:00000000 00000000  1234        0 77 1";
        let at = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        assert_eq!(inode(table, at(1), at(2)), Some(77).filter(|_| cfg!(target_endian = "little")));
        assert_eq!(inode(table, at(2), at(1)), None);
        assert_eq!(inode("", at(1), at(2)), None);
    }
}
