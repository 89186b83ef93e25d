//! What the threads of the service are made of: the things they share, and how each is put together from them and the
//! configuration.
//!
//! [`Parts`] lives while the service starts, on the thread that starts it. A method makes one thread's struct and starts
//! nothing: `service.rs` does that. Of the shared things every thread gets a clone. Nothing here connects to anything; only
//! [`Parts::http`] takes something of the machine, its port.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::time::Duration;

use anyhow::Result;
use crossbeam_channel::{Receiver, Sender, bounded};

use crate::claim::claimer::Claimer;
use crate::claim::sampler::{Sampler, Samples};
use crate::claim::wakeup::{Doze, Sleeper, Wakeup};
use crate::config::live::{Live, Settings};
use crate::config::{Config, OnDead};
use crate::lane::progress::LaneProgress;
use crate::nats::{Keeper, Publisher};
use crate::ops::backlog::Janitor;
use crate::ops::health::{Health, Heartbeat};
use crate::ops::http::Http;
use crate::ops::mend::{LaneAlarm, Mender};
use crate::ops::metrics::Metrics;
use crate::ops::recent::Waiting;
use crate::ops::sweep::Sweeper;
use crate::ops::upkeep::Upkeep;
use crate::postgres::{ClaimSettings, Store, UPKEEP_STEP};
use crate::publish::{DrainCount, Finished, Job, Memory, Protocol, Publish, Worker};

/// What the threads have in common while they are started.
pub(super) struct Parts<'a> {
    config: &'a Config,
    pub(super) live: Live,
    pub(super) store: Store,
    pub(super) health: Health,
    pub(super) metrics: Metrics,
    waiting: Waiting,
    doze: Doze,
    progress: LaneProgress,
    lane_alarm: LaneAlarm,
    pub(super) draining: Arc<AtomicBool>,
    pub(super) drain: Arc<DrainCount>,
    failed_settles: Arc<AtomicU32>,
    /// Bytes of events that one claim may hold.
    max_claim_bytes: usize,
    /// After so long without a beat a thread counts as stuck.
    stuck: Duration,
}

impl<'a> Parts<'a> {
    /// # Errors
    /// The DSN cannot be read.
    pub(super) fn new(config: &'a Config) -> Result<Parts<'a>> {
        let Config { dispatcher, ordering, database, .. } = config;
        let max_claim_bytes = dispatcher.max_in_flight_bytes / dispatcher.workers;
        let settings = ClaimSettings {
            synchronous_commit: database.synchronous_commit,
            idle_in_transaction_timeout: config.idle_in_transaction_timeout(),
            ordered: ordering.enabled,
            block_on_dead: ordering.on_dead == OnDead::Block,
            backoff_max: dispatcher.backoff_max,
            max_claim_bytes: i64::try_from(max_claim_bytes).unwrap_or(i64::MAX),
        };
        Ok(Parts {
            config,
            live: Live::new(Settings::of(config)),
            store: Store::new(database, &dispatcher.instance_id, settings)?,
            health: Health::default(),
            metrics: Metrics::new(),
            waiting: Waiting::default(),
            doze: Doze::default(),
            progress: LaneProgress::default(),
            lane_alarm: LaneAlarm::default(),
            draining: Arc::default(),
            drain: Arc::default(),
            failed_settles: Arc::default(),
            max_claim_bytes,
            // Between two beats a thread may also wait for a connection, and once more right after.
            stuck: config.longest_claim() + 2 * database.connect_timeout + dispatcher.stuck_after,
        })
    }

    /// The HTTP server, unless it is switched off.
    ///
    /// # Errors
    /// The port cannot be bound.
    pub(super) fn http(&self) -> Result<Option<Http>> {
        let Config { metrics: http, dispatcher, .. } = self.config;
        if !http.enabled {
            return Ok(None);
        }
        let (health, metrics, waiting) = (self.health.clone(), self.metrics.clone(), self.waiting.clone());
        Http::bind(http, &dispatcher.instance_id, health, metrics, waiting).map(Some)
    }

    pub(super) fn publisher(&self) -> (Publisher, Keeper) {
        let Config { nats, dispatcher, .. } = self.config;
        let (health, metrics) = (self.health.clone(), self.metrics.clone());
        Publisher::new(nats.clone(), &dispatcher.instance_id, dispatcher.workers, health, metrics)
    }

    /// Every worker with its thread's name. They take claims from `jobs` and say in `free` that they can.
    pub(super) fn workers(
        &self,
        publisher: Publisher,
        jobs: &Receiver<Job>,
        free: &Sender<Finished>,
    ) -> Vec<(String, Worker)> {
        let publish = Arc::new(self.publish(publisher));
        let worker = |slot| {
            let name = format!("worker-{slot}");
            let worker = Worker {
                slot,
                jobs: jobs.clone(),
                free: free.clone(),
                publish: publish.clone(),
                claim_budget: self.config.dispatcher.claim_budget,
                drain: self.drain.clone(),
                failed_settles: self.failed_settles.clone(),
                heartbeat: self.heartbeat(&name),
                metrics: self.metrics.clone(),
            };
            (name, worker)
        };
        (0..self.config.dispatcher.workers).map(worker).collect()
    }

    fn publish(&self, publisher: Publisher) -> Publish {
        let Config { nats, ordering, dispatcher, .. } = self.config;
        Publish {
            publisher,
            live: self.live.clone(),
            ordered: ordering.enabled,
            protocol: Protocol::of(&nats.jetstream),
            ack_timeout: nats.ack_timeout,
            workers: dispatcher.workers,
            draining: self.draining.clone(),
            memory: Memory::default(),
            metrics: self.metrics.clone(),
        }
    }

    /// The two threads that let the claimer sleep.
    pub(super) fn wakeup(&self) -> (Wakeup, Sleeper) {
        let (locks, new_locks) = bounded(1);
        let wakeup = Wakeup {
            store: self.store.clone(),
            dsn: self.config.database.listen_dsn.clone(),
            doze: self.doze.clone(),
            locks,
            heartbeat: self.heartbeat("wake-up"),
        };
        let sleeper =
            Sleeper { locks: new_locks, doze: self.doze.clone(), heartbeat: self.heartbeat("sleep-lock") };
        (wakeup, sleeper)
    }

    pub(super) fn janitor(&self) -> Janitor {
        Janitor {
            store: self.store.clone(),
            progress: self.progress.clone(),
            lane_alarm: self.lane_alarm.clone(),
            mender: Mender::new(self.store.clone(), self.health.clone()),
            heartbeat: self.heartbeat("janitor"),
            metrics: self.metrics.clone(),
            waiting: self.waiting.clone(),
        }
    }

    pub(super) fn upkeep(&self) -> Upkeep {
        Upkeep {
            store: self.store.clone(),
            live: self.live.clone(),
            heartbeat: self.health.thread("upkeep", self.stuck + UPKEEP_STEP),
            metrics: self.metrics.clone(),
        }
    }

    pub(super) fn sweeper(&self) -> Sweeper {
        Sweeper {
            store: self.store.clone(),
            live: self.live.clone(),
            progress: self.progress.clone(),
            health: self.health.clone(),
            sampled_within: self.config.dispatcher.fallback_interval,
            heartbeat: self.health.thread("sweep", self.stuck + UPKEEP_STEP),
            metrics: self.metrics.clone(),
        }
    }

    /// The thread that looks after the open writers, and what the claimer asks it with.
    pub(super) fn sampler(&self) -> (Samples, Sampler) {
        let (ours, asked, samples) = Samples::new();
        let heartbeat = self.heartbeat("sampler");
        (ours, Sampler { store: self.store.clone(), asked, samples, heartbeat })
    }

    pub(super) fn claimer(
        &self,
        publisher: Publisher,
        jobs: Sender<Job>,
        free: Receiver<Finished>,
    ) -> Claimer {
        let dispatcher = &self.config.dispatcher;
        Claimer {
            store: self.store.clone(),
            publisher,
            jobs,
            free,
            doze: self.doze.clone(),
            failed_settles: self.failed_settles.clone(),
            live: self.live.clone(),
            max_in_flight_bytes: dispatcher.max_in_flight_bytes,
            max_claim_bytes: self.max_claim_bytes,
            poll_interval: dispatcher.poll_interval,
            fallback_interval: dispatcher.fallback_interval,
            progress: self.progress.clone(),
            lane_alarm: self.lane_alarm.clone(),
            health: self.health.clone(),
            heartbeat: self.heartbeat("claimer"),
            metrics: self.metrics.clone(),
        }
    }

    fn heartbeat(&self, thread: &str) -> Heartbeat {
        self.health.thread(thread, self.stuck)
    }
}
