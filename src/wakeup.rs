//! The wake-up thread: LISTENs on a connection of its own and wakes the claimer when an event was committed.
//!
//! A wake-up is a hint, never a promise: the claimer also polls. While the connection is down the claimer is
//! told (through `listening`) to poll at `poll_interval`; after each new LISTEN it is woken once, for what was
//! committed in between.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use crossbeam_channel::{Receiver, Sender, TryRecvError, select};

use crate::config::Secret;
use crate::health::Heartbeat;
use crate::store::{Listener, Store};

/// Longest single wait; stop is noticed at the latest after it.
const WAIT: Duration = Duration::from_millis(500);
/// Pause between attempts to listen.
const RETRY: Duration = Duration::from_secs(2);

/// The thread.
pub struct Wakeup {
    /// Where the connection comes from.
    pub store: Store,
    /// The connection string for LISTEN, if it is another one.
    pub dsn: Option<Secret>,
    /// Wakes the claimer; holds one wake-up at most.
    pub wake: Sender<()>,
    /// Whether notifications reach us; read by the claimer.
    pub listening: Arc<AtomicBool>,
    /// Its pulse.
    pub heartbeat: Heartbeat,
}

impl Wakeup {
    /// Runs until `stop` fires.
    ///
    /// # Errors
    /// None of its own: a lost connection is made anew.
    pub fn run(self, stop: &Receiver<Infallible>) -> Result<()> {
        let mut said = false;
        while stop.try_recv() == Err(TryRecvError::Empty) {
            self.heartbeat.beat();
            match self.store.listener(self.dsn.as_ref()) {
                Ok(listener) => {
                    log::info!("listening for wake-ups: channel=outbox_events");
                    said = false;
                    self.listening.store(true, Ordering::Relaxed);
                    self.wake();
                    self.listen(listener, stop);
                    self.listening.store(false, Ordering::Relaxed);
                    self.wake();
                }
                Err(error) if !said => {
                    said = true;
                    log::warn!("no wake-ups, polling instead: {error}");
                }
                Err(_) => {}
            }
            select! {
                recv(stop) -> _ => {}
                default(RETRY) => {}
            }
        }
        Ok(())
    }

    fn listen(&self, mut listener: Listener, stop: &Receiver<Infallible>) {
        while stop.try_recv() == Err(TryRecvError::Empty) {
            self.heartbeat.beat();
            match listener.wait(WAIT) {
                Ok(true) => self.wake(),
                Ok(false) => {}
                Err(error) => {
                    log::warn!("wake-ups lost, polling until they are back: {error}");
                    return;
                }
            }
        }
    }

    fn wake(&self) {
        // Full means that the claimer is woken already.
        let _ = self.wake.try_send(());
    }
}
