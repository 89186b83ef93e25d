//! A network that can be slow, cut, or cut in one direction: a TCP proxy in front of a server.
//!
//! One thread accepts, two threads a connection carry its bytes. What a cut holds back is not lost, as TCP would
//! send it again: it arrives when the network is back, unless either end has given up by then. A proxy never closes
//! a connection by itself; [`Proxy::reset`] does, as a router does that has forgotten what it knew.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// Bytes carried at once; also what a slow network delays together.
const CHUNK_BYTES: usize = 8 * 1024;

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// What we say.
    ToServer,
    /// What the server says.
    ToClient,
}

/// How one way is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// Bytes pass.
    Free,
    /// Bytes pass after so long, one chunk after another.
    Slow(Duration),
    /// Nothing passes.
    Cut,
}

/// The proxy. Dropping it ends every connection through it.
pub struct Proxy {
    port: u16,
    wire: Arc<Wire>,
}

struct Wire {
    server: u16,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    to_server: Flow,
    to_client: Flow,
    /// Both ends of every connection.
    open: Vec<TcpStream>,
    /// New connections are closed at once.
    refusing: bool,
    ended: bool,
}

impl Proxy {
    /// A proxy on a port of its own in front of `127.0.0.1:server`, with both ways free.
    pub fn to(server: u16) -> Proxy {
        let listener =
            TcpListener::bind(("127.0.0.1", pg_outbox::lab::sandbox::free_port().unwrap())).unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = State {
            to_server: Flow::Free,
            to_client: Flow::Free,
            open: Vec::new(),
            refusing: false,
            ended: false,
        };
        let wire = Arc::new(Wire { server, state: Mutex::new(state), changed: Condvar::new() });
        let accepting = wire.clone();
        thread::spawn(move || accepting.accept(&listener));
        Proxy { port, wire }
    }

    /// Its port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Sets how one way is from now on, for connections old and new.
    pub fn set(&self, way: Way, flow: Flow) {
        self.wire.change(|state| match way {
            Way::ToServer => state.to_server = flow,
            Way::ToClient => state.to_client = flow,
        });
    }

    /// Sets both ways.
    pub fn set_both(&self, flow: Flow) {
        self.set(Way::ToServer, flow);
        self.set(Way::ToClient, flow);
    }

    /// Closes every connection; what was on its way is lost.
    pub fn reset(&self) {
        self.wire.change(|state| {
            for stream in state.open.drain(..) {
                let _ = stream.shutdown(Shutdown::Both);
            }
        });
    }

    /// Closes every connection, and new ones at once, until [`Proxy::admit`].
    pub fn refuse(&self) {
        self.wire.change(|state| state.refusing = true);
        self.reset();
    }

    /// Takes connections again.
    pub fn admit(&self) {
        self.wire.change(|state| state.refusing = false);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.wire.change(|state| state.ended = true);
        self.reset();
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

impl Wire {
    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    fn accept(self: Arc<Wire>, listener: &TcpListener) {
        for client in listener.incoming() {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            if state.ended {
                return;
            }
            let Ok(client) = client else { continue };
            if state.refusing {
                continue;
            }
            let Ok(server) = TcpStream::connect(("127.0.0.1", self.server)) else { continue };
            for stream in [&client, &server] {
                stream.set_nodelay(true).unwrap();
                state.open.push(stream.try_clone().unwrap());
            }
            drop(state);
            let (from_client, from_server) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            for (from, to, way) in
                [(from_client, server, Way::ToServer), (from_server, client, Way::ToClient)]
            {
                let wire = self.clone();
                thread::spawn(move || wire.carry(from, to, way));
            }
        }
    }

    /// Carries one way of one connection until either end closes it.
    fn carry(&self, mut from: TcpStream, mut to: TcpStream, way: Way) {
        let mut chunk = [0; CHUNK_BYTES];
        while let Ok(bytes @ 1..) = from.read(&mut chunk) {
            self.pass(way);
            if to.write_all(&chunk[..bytes]).is_err() {
                break;
            }
        }
        // The end of a connection is news too, and a cut holds it back like any other.
        self.pass(way);
        let _ = to.shutdown(Shutdown::Write);
        let _ = from.shutdown(Shutdown::Read);
    }

    /// Waits for as long as the way holds a chunk back.
    fn pass(&self, way: Way) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let flow = |state: &State| match way {
            Way::ToServer => state.to_server,
            Way::ToClient => state.to_client,
        };
        let state = self
            .changed
            .wait_while(state, |state| flow(state) == Flow::Cut && !state.ended)
            .unwrap_or_else(PoisonError::into_inner);
        let flow = flow(&state);
        drop(state);
        if let Flow::Slow(delay) = flow {
            thread::sleep(delay);
        }
    }
}
