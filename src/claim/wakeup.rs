//! The wake-up: how a claimer that sleeps hears of new events, at no cost to writers while it does not sleep.
//!
//! A transaction that notifies holds a lock of the whole database through its commit, so a busy system must not
//! notify. Hence writers notify only while somebody sleeps, which they see by a lock (see `postgres/wake.rs`):
//!
//! 1. The claimer found nothing and says that it is [`Doze::asleep`].
//! 2. The *sleep lock* thread asks for the lock, alone. From now on every writer that inserts will notify.
//! 3. It is granted when every writer that inserted before has ended. That is itself a wake-up: the claimer looks once
//!    more, and finds their events.
//! 4. It finds nothing and rests. The next writer's notification reaches the *wake-up* thread, which LISTENs on
//!    another connection, and which wakes the claimer.
//! 5. The claimer has something to do for a while and says that it is [`Doze::awake`]; the lock is let go.
//!
//! No commit falls between: a writer that inserts before 2 is found in 3, one that inserts after 2 notifies. The
//! claimer trusts in this only while it is [`Doze::covered`]: LISTENing, and the lock granted. In every other case
//! (a writer that stays open, another instance that has the lock and may let go of it any time, a lost connection,
//! a pooler) it polls at `poll_interval`. A wake-up is a hint, never a promise.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded, select};

use crate::config::Secret;
use crate::ops::health::Heartbeat;
use crate::postgres::{Asked, Listener, SleepLock, Store, StoreError};

/// Longest single wait; stop and a lost lock are noticed at the latest after it.
const WAIT: Duration = Duration::from_millis(500);
/// Pause between attempts to connect.
const RETRY: Duration = Duration::from_secs(2);

/// Whether the claimer sleeps, and whether it would be woken. Cheap to clone.
#[derive(Clone)]
pub struct Doze(Arc<DozeInner>);

struct DozeInner {
    /// Set by the claimer.
    asleep: AtomicBool,
    /// Set by the wake-up thread: notifications reach us.
    listening: AtomicBool,
    /// Set by the sleep lock thread: writers notify.
    granted: AtomicBool,
    /// Set by the sleep lock thread: its session is lost, connect anew.
    lock_lost: AtomicBool,
    /// Tells the sleep lock thread that the claimer fell asleep or awoke; holds one nudge at most.
    nudge: (Sender<()>, Receiver<()>),
    /// Wakes the claimer; holds one wake-up at most.
    wake: (Sender<()>, Receiver<()>),
}

impl Default for Doze {
    fn default() -> Doze {
        Doze(Arc::new(DozeInner {
            asleep: AtomicBool::new(false),
            listening: AtomicBool::new(false),
            granted: AtomicBool::new(false),
            lock_lost: AtomicBool::new(false),
            nudge: bounded(1),
            wake: bounded(1),
        }))
    }
}

impl Doze {
    /// The claimer is about to sleep. Another wake-up comes once every writer notifies.
    pub fn asleep(&self) {
        if !self.0.asleep.swap(true, Ordering::SeqCst) || !self.0.granted.load(Ordering::SeqCst) {
            self.nudge();
        }
    }

    /// The claimer has enough to do: nobody needs to notify.
    pub fn awake(&self) {
        if self.0.asleep.swap(false, Ordering::SeqCst) {
            self.nudge();
        }
    }

    /// True while every event that is committed wakes the claimer. Not once it has said that it is awake, though the lock
    /// that makes writers notify may not be let go yet.
    pub fn covered(&self) -> bool {
        self.is_asleep() && self.0.listening.load(Ordering::SeqCst) && self.0.granted.load(Ordering::SeqCst)
    }

    /// Receives the wake-ups. For the claimer alone.
    pub fn wake_ups(&self) -> &Receiver<()> {
        &self.0.wake.1
    }

    fn is_asleep(&self) -> bool {
        self.0.asleep.load(Ordering::SeqCst)
    }

    fn nudge(&self) {
        // Full means that the thread will look anyway.
        let _ = self.0.nudge.0.try_send(());
    }

    fn wake(&self) {
        // Full means that the claimer is woken already.
        let _ = self.0.wake.0.try_send(());
    }
}

/// The thread that LISTENs.
pub struct Wakeup {
    /// Where the connections come from.
    pub store: Store,
    /// The connection string for both, if it is another one.
    pub dsn: Option<Secret>,
    /// What it shares with the claimer.
    pub doze: Doze,
    /// Where each new session for the sleep lock goes.
    pub locks: Sender<SleepLock>,
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
            match self.store.wake_up(self.dsn.as_ref()) {
                Ok((listener, lock)) => {
                    log::info!("listening for wake-ups: channel=outbox_events");
                    said = false;
                    self.doze.0.lock_lost.store(false, Ordering::SeqCst);
                    self.doze.0.listening.store(true, Ordering::SeqCst);
                    // The thread at the other end takes each new session before long, and ends when we do.
                    let _ = self.locks.send(lock);
                    // For what was committed before.
                    self.doze.wake();
                    self.listen(listener, stop);
                    self.doze.0.listening.store(false, Ordering::SeqCst);
                    self.doze.wake();
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
                Ok(true) => self.doze.wake(),
                Ok(false) => {}
                Err(error) => {
                    log::warn!("wake-ups lost, polling until they are back: {error}");
                    return;
                }
            }
            if self.doze.0.lock_lost.load(Ordering::SeqCst) {
                return;
            }
        }
    }
}

/// The thread that asks for the sleep lock, holds it and lets it go.
pub struct Sleeper {
    /// New sessions.
    pub locks: Receiver<SleepLock>,
    /// What it shares with the claimer.
    pub doze: Doze,
    /// Its pulse.
    pub heartbeat: Heartbeat,
}

impl Sleeper {
    /// Runs until `stop` fires, or, while it waits for the lock, a few seconds longer.
    ///
    /// # Errors
    /// None of its own: the wake-up thread makes a lost connection anew.
    pub fn run(self, stop: &Receiver<Infallible>) -> Result<()> {
        let mut lock: Option<SleepLock> = None;
        loop {
            self.heartbeat.beat();
            select! {
                recv(stop) -> _ => return Ok(()),
                recv(self.locks) -> new => match new {
                    Ok(new) => {
                        self.doze.0.granted.store(false, Ordering::SeqCst);
                        lock = Some(new);
                    }
                    Err(_) => return Ok(()),
                },
                recv(self.doze.0.nudge.1) -> _ => {}
                default(WAIT) => {}
            }
            if let Some(mut session) = lock.take() {
                match self.follow(&mut session) {
                    Ok(()) => lock = Some(session),
                    Err(error) => {
                        log::warn!("wake-ups lost, polling until they are back: {error}");
                        self.doze.0.granted.store(false, Ordering::SeqCst);
                        self.doze.0.lock_lost.store(true, Ordering::SeqCst);
                        self.doze.wake();
                    }
                }
            }
        }
    }

    /// Brings the lock to where the claimer wants it.
    fn follow(&self, session: &mut SleepLock) -> Result<(), StoreError> {
        let granted = &self.doze.0.granted;
        match (self.doze.is_asleep(), granted.load(Ordering::SeqCst)) {
            (true, false) => {
                if session.ask()? == Asked::Granted {
                    granted.store(true, Ordering::SeqCst);
                    self.doze.wake();
                }
                Ok(())
            }
            (false, true) => {
                granted.store(false, Ordering::SeqCst);
                session.let_go()
            }
            (true, true) | (false, false) => session.check(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_awake_is_not_woken_whatever_the_lock_still_does() {
        let doze = Doze::default();
        doze.0.listening.store(true, Ordering::SeqCst);
        doze.0.granted.store(true, Ordering::SeqCst);
        assert!(!doze.covered());
        doze.asleep();
        assert!(doze.covered());
        doze.awake();
        assert!(!doze.covered(), "the lock is about to be let go, and writers will not notify");
    }
}
