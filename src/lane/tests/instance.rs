//! An instance of the model: its marks, the sample that it takes, and its claims.
//!
//! Samples are taken beside the claimer's thread; everything else of it happens on that thread, or in a claim.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use super::broken::{Memory, Own};
use super::claim::{Claim, Phase};
use super::search::fingerprint;
use crate::lane::writers::WriterSample as Sample;

#[derive(Debug, Clone)]
pub(super) struct Instance {
    memory: Arc<Memory>,
    /// Of the memory, which is large and changes seldom.
    fingerprint: u64,
    /// Its first half was read.
    pub(super) half: Option<Sample>,
    /// Whole, on its way to the claimer.
    pub(super) sample: Option<Sample>,
    pub(super) claims: Vec<Claim>,
    /// A look found nothing in this lane, which the marks were not told at once.
    pub(super) looked: Option<usize>,
}

impl Instance {
    pub(super) fn new(lanes: usize, own: Option<Own>) -> Instance {
        let memory = Memory::new(lanes, own);
        Instance {
            fingerprint: fingerprint(&memory),
            memory: Arc::new(memory),
            half: None,
            sample: None,
            claims: Vec::new(),
            looked: None,
        }
    }

    pub(super) fn memory(&self) -> &Memory {
        &self.memory
    }

    pub(super) fn change(&mut self, change: impl FnOnce(&mut Memory)) {
        change(Arc::make_mut(&mut self.memory));
        self.fingerprint = fingerprint(&self.memory);
    }

    /// The claimer's thread waits for the answer to a lock: it takes in nothing else.
    pub(super) fn is_busy(&self) -> bool {
        self.claims.iter().any(|claim| claim.phase == Phase::Taken)
    }
}

impl Hash for Instance {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.fingerprint.hash(state);
        self.half.hash(state);
        self.sample.hash(state);
        self.claims.hash(state);
        self.looked.hash(state);
    }
}
