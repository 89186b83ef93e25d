//! The end of a link, which everyone who has to do with it shares.
//!
//! A link goes down once and for ever, with the first cause that anybody gives: the writer, the keeper, a session, the crate's
//! callbacks and the tunnel may all be the first. Whoever waits for something of the link also waits on `ended`. Any
//! thread may take a link down; nothing here blocks.

use std::convert::Infallible;
use std::sync::{Mutex, PoisonError};

use crossbeam_channel::{Receiver, Sender, bounded};

/// The end of a link: set once, with its cause, and heard by everyone who waits on `ended`.
pub(super) struct Down {
    cause: Mutex<Option<String>>,
    /// Dropped when the link goes down, which is what `ended` receives.
    alive: Mutex<Option<Sender<Infallible>>>,
    pub(super) ended: Receiver<Infallible>,
}

impl Down {
    pub(super) fn new() -> Down {
        let (alive, ended) = bounded(0);
        Down { cause: Mutex::new(None), alive: Mutex::new(Some(alive)), ended }
    }

    /// Takes the link down; the first cause stays.
    pub(super) fn set(&self, cause: &str) {
        let mut first = self.cause.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert_with(|| cause.to_string());
        drop(first);
        self.alive.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    pub(super) fn cause(&self) -> Option<String> {
        self.cause.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn is_set(&self) -> bool {
        self.cause.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }
}
