//! What a reload changes while the service runs: the values that the claimer and the workers take anew for
//! each claim, the upkeep for each round, and the sweep for each step.
//!
//! Plain data behind one lock that is held for a copy of a pointer. A claim works with what it took when it
//! began, to its end: its events are never split over two topic maps. Everything else of the configuration
//! is fixed at start; the declarations of the keys say which is which.

use std::sync::{Arc, Mutex, PoisonError};

use crate::config::{self, Config};
use crate::event::headers::HeaderPolicy;
use crate::event::retry::Policy;
use crate::event::topic_map::TopicMap;

/// The values that are in force.
#[derive(Debug)]
pub struct Settings {
    /// Events of one claim at most.
    pub batch_size: usize,
    /// Topics to subjects.
    pub topic_map: TopicMap,
    /// How headers are made.
    pub headers: HeaderPolicy,
    /// Subject on which dead letters are announced.
    pub dead_letter_subject: Option<String>,
    /// When events are retried and when they die.
    pub policy: Policy,
    /// How the partitions are kept; for the next round of upkeep, and the next step of the sweep.
    pub partitions: config::Partitions,
}

impl Settings {
    /// The part of a configuration that can change while running.
    pub fn of(config: &Config) -> Settings {
        let Config { dispatcher, nats, partitions, .. } = config;
        Settings {
            batch_size: dispatcher.batch_size,
            topic_map: nats.topic_map.clone(),
            headers: HeaderPolicy {
                instance: dispatcher.instance_id.clone(),
                stream: nats.jetstream.enabled.then(|| nats.jetstream.stream_name.clone()),
                allow: nats.allow_headers.clone(),
                replay: None,
            },
            dead_letter_subject: nats.dead_letter_subject.clone(),
            policy: Policy {
                max_attempts: dispatcher.max_attempts,
                backoff_initial: dispatcher.backoff_initial,
                backoff_max: dispatcher.backoff_max,
            },
            partitions: partitions.clone(),
        }
    }
}

/// Where the settings in force are found. Clones share them.
#[derive(Debug, Clone)]
pub struct Live(Arc<Mutex<Arc<Settings>>>);

impl Live {
    /// Begins with `settings`.
    pub fn new(settings: Settings) -> Live {
        Live(Arc::new(Mutex::new(Arc::new(settings))))
    }

    /// What is in force now. Taken once a claim.
    pub fn now(&self) -> Arc<Settings> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts other settings in force, for every claim that begins from now on.
    pub fn set(&self, settings: Settings) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(settings);
    }
}
