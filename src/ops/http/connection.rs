//! A client of the HTTP server: its bytes, one step at a time, and none of them waited for.
//!
//! A client is in one of three phases: it sends the head of its request, it is sent the answer, and it is given a moment to
//! take that and close. It costs one socket, [`MAX_HEAD_BYTES`] and its answer. What the bytes of the head mean, and what is
//! answered, `pages.rs` says. Runs on the thread `http`, which calls [`Client::step`] when the socket is ready, and drops a
//! client at its deadline.

use std::io::{self, Cursor, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use super::pages::{MAX_HEAD_BYTES, Pages};

/// Time from a client's connect to the last byte of its answer.
pub const CLIENT_DEADLINE: Duration = Duration::from_secs(5);
/// Time a client has to take its answer and close, once all of it is sent.
const LINGER: Duration = Duration::from_secs(1);

/// One connection: reads a head, writes an answer, waits for the client to close.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) stream: TcpStream,
    pub(super) deadline: Instant,
    pub(super) phase: Phase,
}

#[derive(Debug)]
pub(super) enum Phase {
    /// The head so far.
    Head(Vec<u8>),
    /// The rest of the answer.
    Answer(Cursor<Vec<u8>>),
    /// The answer is sent, and our side closed. Closing the rest with unread input, a body for example, would
    /// reset the connection, and the client could lose the answer.
    Linger,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum ClientStep {
    Stay,
    Done,
}

impl Client {
    pub(super) fn new(stream: TcpStream) -> Client {
        Client { stream, deadline: Instant::now() + CLIENT_DEADLINE, phase: Phase::Head(Vec::new()) }
    }

    pub(super) fn waits_for(&self) -> PollFlags {
        match self.phase {
            Phase::Head(_) | Phase::Linger => PollFlags::IN,
            Phase::Answer(_) => PollFlags::OUT,
        }
    }

    /// Does what can be done without waiting. An error ends the client.
    pub(super) fn step(&mut self, pages: &Pages) -> io::Result<ClientStep> {
        match &mut self.phase {
            Phase::Head(head) => {
                let mut chunk = [0; MAX_HEAD_BYTES];
                let before = head.len();
                let room = &mut chunk[..MAX_HEAD_BYTES - before];
                match read(&mut self.stream, room)? {
                    Some(0) => return Ok(ClientStep::Done),
                    Some(length) => head.extend_from_slice(&room[..length]),
                    None => return Ok(ClientStep::Stay),
                }
                let Some(answer) = pages.answer(head, before) else { return Ok(ClientStep::Stay) };
                self.phase = Phase::Answer(Cursor::new(answer));
                // There is room in the socket's buffer for nearly every answer: no need to ask poll first.
                self.write()
            }
            Phase::Answer(_) => self.write(),
            Phase::Linger => match read(&mut self.stream, &mut [0; MAX_HEAD_BYTES])? {
                Some(0) => Ok(ClientStep::Done),
                Some(_) | None => Ok(ClientStep::Stay),
            },
        }
    }

    fn write(&mut self) -> io::Result<ClientStep> {
        let Phase::Answer(answer) = &mut self.phase else { return Ok(ClientStep::Stay) };
        loop {
            let rest = &answer.get_ref()[usize::try_from(answer.position()).unwrap_or(usize::MAX)..];
            if rest.is_empty() {
                break;
            }
            match self.stream.write(rest) {
                Ok(length) => answer.set_position(answer.position() + length as u64),
                Err(error) if waits(error.kind()) => return Ok(ClientStep::Stay),
                Err(error) => return Err(error),
            }
        }
        self.stream.shutdown(std::net::Shutdown::Write)?;
        self.deadline = self.deadline.min(Instant::now() + LINGER);
        self.phase = Phase::Linger;
        Ok(ClientStep::Stay)
    }
}

fn read(stream: &mut TcpStream, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    match stream.read(buffer) {
        Ok(length) => Ok(Some(length)),
        Err(error) if waits(error.kind()) => Ok(None),
        Err(error) => Err(error),
    }
}

fn waits(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
