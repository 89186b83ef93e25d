//! Probes, metrics and status over HTTP, on the thread `http`.
//!
//! One thread serves every client, in a `poll` loop over at most [`MAX_CLIENTS`] sockets, none of which can
//! block it: a slow, silent or hostile client costs one place and [`MAX_HEAD_BYTES`], for [`CLIENT_DEADLINE`]
//! at most, and the oldest client makes room when a new one finds the house full. So probes are answered
//! whatever else is connected, and the connections of the service itself keep their file descriptors. One
//! request a connection, GET or HEAD, bodies never read. A client's bytes are the business of `http/connection.rs`,
//! and what it is answered that of `http/pages.rs`.
//!
//! `http/pages.rs` alone names `tiny_http`, for its methods, headers and responses. Its `Server` is not used: it
//! gives every client a thread for as long as the client likes, reads heads without limit, stops for good at
//! the first failing `accept`, and a request with `Content-Length: 99999999999999` makes it allocate that
//! much and abort the process (0.12, `EqualReader::drop`).

use std::convert::Infallible;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use crossbeam_channel::{Receiver, TryRecvError};
use log::{info, warn};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::config;
use crate::ops::health::Health;
use crate::ops::metrics::Metrics;
use crate::ops::recent::{Recent, Waiting};

mod connection;
mod pages;
mod status_page;

pub use self::connection::CLIENT_DEADLINE;
use self::connection::{Client, ClientStep};
pub use self::pages::MAX_HEAD_BYTES;
use self::pages::Pages;
use self::status_page::StatusPage;

/// Clients at a time.
pub const MAX_CLIENTS: usize = 64;

/// The HTTP server, bound and not yet running.
#[derive(Debug)]
pub struct Http {
    listener: TcpListener,
    pages: Pages,
}

impl Http {
    /// Listens on the configured address; port 0 takes a free one.
    ///
    /// # Errors
    /// If the address is taken or not ours.
    pub fn bind(
        config: &config::HttpEndpoint,
        instance: &str,
        health: Health,
        metrics: Metrics,
        waiting: Waiting,
    ) -> Result<Http> {
        let address = SocketAddr::new(config.address, config.port);
        let listener = TcpListener::bind(address).with_context(|| format!("listen on {address} for http"))?;
        listener.set_nonblocking(true).context("make the http listener non-blocking")?;
        let address = listener.local_addr().context("name the http address")?;
        info!("http listening: address={address} path={}", config.path);
        let pages = Pages {
            instance: instance.to_string(),
            metrics_path: config.path.clone(),
            status_page: StatusPage::new(&config.path),
            health,
            metrics,
            waiting,
            recent: Recent::default(),
        };
        Ok(Http { listener, pages })
    }

    /// The address with its real port.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn address(&self) -> Result<SocketAddr> {
        self.listener.local_addr().context("name the http address")
    }

    /// Serves until `stop` fires or its sender is gone; seen within [`TICK`]. Clients are then dropped.
    ///
    /// # Errors
    /// If `poll` fails, which it does only for want of kernel memory.
    pub fn run(mut self, stop: &Receiver<Infallible>) -> Result<()> {
        let heartbeat = self.pages.health.thread("http", HEARTBEAT_LIMIT);
        let mut clients: Vec<Client> = Vec::with_capacity(MAX_CLIENTS);
        let mut accept_after = Instant::now();
        while matches!(stop.try_recv(), Err(TryRecvError::Empty)) {
            heartbeat.beat();
            self.pages.remember(Instant::now());
            let accepting = Instant::now() >= accept_after;
            let (at_the_door, moved) =
                wait(&self.listener, accepting, &clients).context("poll the http sockets")?;
            // Who is inside comes before who is at the door: a client just taken in is served before another
            // one can take its place.
            serve(&mut clients, &moved, &self.pages);
            if at_the_door && let Err(cause) = self.accept(&mut clients) {
                // Out of file descriptors or memory. The socket stays readable, so without a pause this would
                // spin.
                warn!("http accept failed, next try in {ACCEPT_PAUSE:?}: {cause}");
                accept_after = Instant::now() + ACCEPT_PAUSE;
            }
        }
        Ok(())
    }

    /// Takes in who waits at the door, a houseful at most.
    fn accept(&self, clients: &mut Vec<Client>) -> io::Result<()> {
        for _ in 0..MAX_CLIENTS {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(true)?;
                    if clients.len() == MAX_CLIENTS {
                        clients.remove(0);
                    }
                    clients.push(Client::new(stream));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // The client left before we came to it (accept(2) lists these as "like EAGAIN").
                Err(error) if gone(error.kind()) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Longest time in which a stop or a passed deadline is not noticed.
pub const TICK: Duration = Duration::from_millis(200);
/// A round of the loop takes milliseconds, and a tick when nothing happens.
const HEARTBEAT_LIMIT: Duration = Duration::from_secs(10);
/// Pause after a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// Waits for something to happen; says whether at the door, and at which clients, in their order.
fn wait(listener: &TcpListener, accepting: bool, clients: &[Client]) -> io::Result<(bool, Vec<bool>)> {
    let door = if accepting { PollFlags::IN } else { PollFlags::empty() };
    let mut fds: Vec<_> =
        clients.iter().map(|client| PollFd::new(&client.stream, client.waits_for())).collect();
    fds.push(PollFd::new(listener, door));
    let tick = Timespec { tv_sec: 0, tv_nsec: i64::from(TICK.subsec_nanos()) };
    match poll(&mut fds, Some(&tick)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let mut happened: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
    Ok((happened.pop() == Some(true) && accepting, happened))
}

/// Moves every client on that can move, and drops who is done, gone or too late.
fn serve(clients: &mut Vec<Client>, moved: &[bool], pages: &Pages) {
    let now = Instant::now();
    let mut moved = moved.iter();
    clients.retain_mut(|client| {
        let moved = moved.next() == Some(&true);
        now < client.deadline && (!moved || client.step(pages).is_ok_and(|step| step == ClientStep::Stay))
    });
}

fn gone(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset | ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, Read};
    use std::net::TcpStream;

    use super::connection::Phase;
    use super::*;

    fn pages() -> Pages {
        Pages {
            instance: "a<b".to_string(),
            metrics_path: "/metrics".to_string(),
            status_page: StatusPage::new("/metrics"),
            health: Health::new(),
            metrics: Metrics::new(),
            waiting: Waiting::default(),
            recent: Recent::default(),
        }
    }

    /// A client that is being sent an answer larger than any socket's buffers, and its other end.
    fn client_with_a_large_answer() -> (Client, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut client = Client::new(listener.accept().unwrap().0);
        client.stream.set_nonblocking(true).unwrap();
        client.phase = Phase::Answer(Cursor::new(vec![7; LARGE]));
        (client, peer)
    }

    const LARGE: usize = 64 << 20;

    fn sent(client: &Client) -> u64 {
        if let Phase::Answer(answer) = &client.phase { answer.position() } else { LARGE as u64 }
    }

    #[test]
    fn a_large_answer_goes_out_as_the_client_reads_it() {
        let (client, mut peer) = client_with_a_large_answer();
        let mut clients = vec![client];
        serve(&mut clients, &[true], &pages());
        assert!((1..LARGE as u64).contains(&sent(&clients[0])), "sent {}", sent(&clients[0]));
        let reader = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            peer.read_to_end(&mut bytes).map(|_| bytes)
        });
        while !clients.is_empty() && sent(&clients[0]) < LARGE as u64 {
            serve(&mut clients, &[true], &pages());
        }
        assert!(reader.join().unwrap().unwrap() == vec![7; LARGE]);
    }

    #[test]
    fn a_client_that_does_not_read_blocks_nothing_and_is_dropped_at_its_deadline() {
        let (client, _peer) = client_with_a_large_answer();
        let mut clients = vec![client];
        let begun = Instant::now();
        serve(&mut clients, &[true], &pages());
        serve(&mut clients, &[true], &pages());
        assert!(begun.elapsed() < CLIENT_DEADLINE / 2);
        assert_eq!(clients[0].waits_for(), PollFlags::OUT);
        clients[0].deadline = Instant::now();
        serve(&mut clients, &[false], &pages());
        assert!(clients.is_empty());
    }
}
