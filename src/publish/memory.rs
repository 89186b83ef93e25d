//! What outlives a claim: which events were silent, and which were published and could not be settled.
//!
//! All workers of a process share one of each, behind a lock that is held for a look. Both live in memory only, so a
//! restart begins anew: an event then gets a few more free tries, or goes out once more, which the stream's deduplication
//! window notices. Both have a limit. Nothing here waits, and nothing talks to NATS or the database.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use uuid::Uuid;

/// Published events whose settle failed that are remembered. More of them are published again, which the stream
/// notices within its duplicate window.
const UNSETTLED_MAX: usize = 100_000;
/// Events whose silence is remembered. More than this are silent only when all are, and then it is an outage.
const UNANSWERED_MAX: usize = 10_000;

/// What the workers of a process remember beyond a claim.
#[derive(Default)]
pub struct Memory {
    /// Events that were not answered, and how often in a row.
    pub(super) unanswered: Unanswered,
    /// Events that were published and could not be settled.
    pub(super) unsettled: Unsettled,
}

/// How often in a row each event got no answer. In memory only: a restart begins to count anew.
#[derive(Default)]
pub(super) struct Unanswered(Mutex<HashMap<Uuid, u32>>);

impl Unanswered {
    /// One more time; returns how often it was now.
    pub(super) fn again(&self, id: Uuid) -> u32 {
        let mut map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if map.len() >= UNANSWERED_MAX && !map.contains_key(&id) {
            return 1;
        }
        let repeats = map.entry(id).or_insert(0);
        *repeats += 1;
        *repeats
    }

    pub(super) fn forget(&self, id: Uuid) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }
}

/// Events that were published, but whose settle failed: the next claim that reads them settles them without
/// publishing them again. So a database that takes reads and no writes (a full disk) does not make the same events
/// go out again and again, beyond the stream's duplicate window. In memory only: a restart forgets them.
#[derive(Default)]
pub(super) struct Unsettled {
    ids: Mutex<HashSet<Uuid>>,
    /// How many there are, so that the usual case costs no lock.
    count: AtomicUsize,
}

impl Unsettled {
    /// These were published, and their settle failed.
    pub(super) fn remember(&self, ids: impl Iterator<Item = Uuid>) {
        let mut set = self.ids.lock().unwrap_or_else(PoisonError::into_inner);
        for id in ids {
            if set.len() < UNSETTLED_MAX {
                set.insert(id);
            }
        }
        self.count.store(set.len(), Ordering::Relaxed);
    }

    /// These are settled.
    pub(super) fn forget(&self, ids: impl Iterator<Item = Uuid>) {
        if self.count.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut set = self.ids.lock().unwrap_or_else(PoisonError::into_inner);
        for id in ids {
            set.remove(&id);
        }
        self.count.store(set.len(), Ordering::Relaxed);
    }

    pub(super) fn contains(&self, id: Uuid) -> bool {
        self.count.load(Ordering::Relaxed) > 0
            && self.ids.lock().unwrap_or_else(PoisonError::into_inner).contains(&id)
    }
}
