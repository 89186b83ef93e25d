//! The service: wires the threads together, supervises them, and drains them.
//!
//! ```text
//!   wake-up ──wake──▸ claimer ──jobs──▸ worker-0..n ──▸ publisher (nats, writer) ──▸ NATS
//!                        ▴                  │
//!                        └───────free───────┘         janitor, sleep-lock, upkeep, http
//! ```
//!
//! Every channel is bounded. A thread that ends before it is told to, by error or panic, is a failure of the
//! service: [`Service::failure`] receives its name and cause, and whoever runs the service ends it. Stopping has
//! an order: the claimer first, which hangs up on the workers; they finish their claims within
//! `dispatcher.shutdown_grace`; http last, so that probes are answered to the end. What is not finished then is
//! rolled back by PostgreSQL when the process and with it the connection ends.

use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use crate::claim::claimer::Claimer;
use crate::claim::wakeup::{Doze, Sleeper, Wakeup};
use crate::config::live::{Live, Settings};
use crate::config::{Changes, Config, OnDead};
use crate::nats::{Keeper, Publisher};
use crate::ops::backlog::Janitor;
use crate::ops::health::{Health, Heartbeat};
use crate::ops::http::Http;
use crate::ops::metrics::Metrics;
use crate::ops::recent::Waiting;
use crate::ops::upkeep::Upkeep;
use crate::postgres::{ClaimSettings, Store, UPKEEP_STEP};
use crate::publish::flight::{Publish, Unanswered, Unsettled};
use crate::publish::worker::{DrainCount, Finished, Job, Worker};

/// The running service.
///
/// ```no_run
/// use pg_outbox::{config::Config, service::Service};
///
/// # fn main() -> anyhow::Result<()> {
/// let config = Config::load("/etc/pg-outbox/config.yaml".as_ref())?;
/// let service = Service::start(config)?;
/// assert!(service.health().live().ok);
/// // ... until it is time to go, or until a thread fails:
/// if let Ok(failure) = service.failure().recv_timeout(std::time::Duration::from_secs(3600)) {
///     eprintln!("{failure:#}");
/// }
/// println!("{}", service.stop());
/// # Ok(())
/// # }
/// ```
pub struct Service {
    /// What is in force.
    config: Config,
    live: Live,
    store: Store,
    health: Health,
    metrics: Metrics,
    draining: Arc<AtomicBool>,
    drain: Arc<DrainCount>,
    shutdown_grace: Duration,
    /// Dropped to stop claimer, wake-up, sleep lock, janitor, upkeep and keeper.
    stop: Sender<Infallible>,
    /// Dropped last, to stop http.
    stop_http: Sender<Infallible>,
    /// Each is disconnected when that worker has ended.
    workers: Vec<Receiver<Infallible>>,
    threads: Threads,
}

/// What stopping did; prints as the service's last log line.
#[derive(Debug, Clone, Copy)]
pub struct Stopped {
    /// Events settled after the stop.
    pub drained: usize,
    /// Events released after the stop.
    pub released: usize,
    /// How long it took.
    pub took: Duration,
    /// Workers that were still at it when the grace was over; their claims are rolled back.
    pub cut_off: usize,
}

impl std::fmt::Display for Stopped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Stopped { drained, released, took, cut_off } = self;
        write!(f, "stopped: drained={drained} released={released} took={:.1}s", took.as_secs_f64())?;
        if *cut_off > 0 { write!(f, " cut_off={cut_off} (grace was over)") } else { Ok(()) }
    }
}

impl Service {
    /// Starts every thread and returns at once; connecting goes on behind, see [`Service::health`].
    ///
    /// # Errors
    /// When the DSN cannot be read, the HTTP port cannot be bound, or a thread cannot be started.
    pub fn start(config: Config) -> Result<Service> {
        let parts = Parts::new(&config)?;
        let (stop_http, http_stopped) = bounded(0);
        let (stop, stopped) = bounded(0);
        let mut threads = Threads::default();
        let waiting = Waiting::default();
        parts.start_http(&mut threads, &waiting, http_stopped)?;
        let (publisher, keeper) = parts.publisher();
        parts.start_keeper(&mut threads, keeper, &stopped)?;
        let (jobs, jobs_to_do) = bounded(config.dispatcher.workers);
        let (free, freed) = bounded(config.dispatcher.workers);
        let publish = Arc::new(parts.publish(publisher.clone()));
        let workers = parts.start_workers(&mut threads, &publish, &jobs_to_do, &free)?;
        if config.database.listen {
            parts.start_wakeups(&mut threads, &stopped)?;
        }
        parts.start_upkeep(&mut threads, waiting, &stopped)?;
        let claimer = parts.claimer(publisher, jobs, freed);
        threads.spawn("claimer", move || claimer.run(&stopped))?;
        let Parts { live, store, health, metrics, draining, drain, .. } = parts;
        let shutdown_grace = config.dispatcher.shutdown_grace;
        Ok(Service {
            config,
            live,
            store,
            health,
            metrics,
            draining,
            drain,
            shutdown_grace,
            stop,
            stop_http,
            workers,
            threads,
        })
    }

    /// Puts in force what can change while running, from the next claim on, and says what that is and what
    /// takes a restart: topic map, allowed headers, batch size, attempts and backoff change. The level of the log
    /// is compared as well, but it belongs to the whole process: who started logging sets it.
    ///
    /// Cannot fail: a `Config` is valid, so a bad file never comes here.
    pub fn reload(&mut self, config: &Config) -> Changes {
        let changes = self.config.take_live(config);
        self.store.allow_backoff(self.config.dispatcher.backoff_max);
        self.live.set(Settings::of(&self.config));
        changes
    }

    /// What the probes show.
    pub fn health(&self) -> &Health {
        &self.health
    }

    /// The counters and gauges.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Receives when a thread has ended before it was told to: its name and cause.
    pub fn failure(&self) -> &Receiver<anyhow::Error> {
        &self.threads.failed
    }

    /// Stops claiming, lets the workers finish within the grace, and ends the threads.
    pub fn stop(self) -> Stopped {
        let started = Instant::now();
        self.health.draining();
        self.draining.store(true, Ordering::Relaxed);
        self.threads.stopping.store(true, Ordering::Relaxed);
        drop(self.stop);
        let grace_over = started + self.shutdown_grace;
        let has_ended = |worker: &Receiver<Infallible>| {
            worker.recv_deadline(grace_over) == Err(RecvTimeoutError::Disconnected)
        };
        let cut_off = self.workers.iter().filter(|worker| !has_ended(worker)).count();
        drop(self.stop_http);
        Stopped {
            drained: self.drain.drained.load(Ordering::Relaxed),
            released: self.drain.released.load(Ordering::Relaxed),
            took: started.elapsed(),
            cut_off,
        }
    }
}

/// What the threads have in common while they are started.
struct Parts<'a> {
    config: &'a Config,
    live: Live,
    store: Store,
    health: Health,
    metrics: Metrics,
    doze: Doze,
    draining: Arc<AtomicBool>,
    drain: Arc<DrainCount>,
    failed_settles: Arc<AtomicU32>,
    /// Bytes of events that one claim may hold.
    max_claim_bytes: usize,
    /// After so long without a beat a thread counts as stuck.
    stuck: Duration,
}

impl<'a> Parts<'a> {
    fn new(config: &'a Config) -> Result<Parts<'a>> {
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
            doze: Doze::default(),
            draining: Arc::default(),
            drain: Arc::default(),
            failed_settles: Arc::default(),
            max_claim_bytes,
            // Between two beats a thread may also wait for a connection, and once more right after.
            stuck: config.longest_claim() + 2 * database.connect_timeout + dispatcher.stuck_after,
        })
    }

    fn heartbeat(&self, thread: &str) -> Heartbeat {
        self.health.thread(thread, self.stuck)
    }

    fn start_http(
        &self,
        threads: &mut Threads,
        waiting: &Waiting,
        stopped: Receiver<Infallible>,
    ) -> Result<()> {
        let Config { metrics: http, dispatcher, .. } = self.config;
        if !http.enabled {
            return Ok(());
        }
        let (health, metrics) = (self.health.clone(), self.metrics.clone());
        let http = Http::bind(http, &dispatcher.instance_id, health, metrics, waiting.clone())?;
        threads.spawn("http", move || http.run(&stopped)).map(drop)
    }

    fn publisher(&self) -> (Publisher, Keeper) {
        let Config { nats, dispatcher, .. } = self.config;
        let (health, metrics) = (self.health.clone(), self.metrics.clone());
        Publisher::new(nats.clone(), &dispatcher.instance_id, dispatcher.workers, health, metrics)
    }

    fn start_keeper(
        &self,
        threads: &mut Threads,
        keeper: Keeper,
        stopped: &Receiver<Infallible>,
    ) -> Result<()> {
        let (live, sent_again_within) = (self.live.clone(), self.config.sent_again_within());
        let stopped = stopped.clone();
        threads.spawn("nats", move || keeper.run(&live, sent_again_within, &stopped)).map(drop)
    }

    fn publish(&self, publisher: Publisher) -> Publish {
        let Config { nats, ordering, dispatcher, .. } = self.config;
        Publish {
            publisher,
            live: self.live.clone(),
            ordered: ordering.enabled,
            jetstream: nats.jetstream.enabled,
            stream: nats.jetstream.stream_name.clone(),
            batches: nats.jetstream.atomic_batches,
            ack_timeout: nats.ack_timeout,
            workers: dispatcher.workers,
            draining: self.draining.clone(),
            unanswered: Unanswered::default(),
            unsettled: Unsettled::default(),
            metrics: self.metrics.clone(),
        }
    }

    /// Returns what disconnects when a worker has ended, for each.
    fn start_workers(
        &self,
        threads: &mut Threads,
        publish: &Arc<Publish>,
        jobs: &Receiver<Job>,
        free: &Sender<Finished>,
    ) -> Result<Vec<Receiver<Infallible>>> {
        let mut ends = Vec::with_capacity(self.config.dispatcher.workers);
        for slot in 0..self.config.dispatcher.workers {
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
            ends.push(threads.spawn(&name, move || worker.run())?);
        }
        Ok(ends)
    }

    fn start_wakeups(&self, threads: &mut Threads, stopped: &Receiver<Infallible>) -> Result<()> {
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
        let (stop_wakeup, stop_sleeper) = (stopped.clone(), stopped.clone());
        threads.spawn("wake-up", move || wakeup.run(&stop_wakeup))?;
        threads.spawn("sleep-lock", move || sleeper.run(&stop_sleeper)).map(drop)
    }

    fn start_upkeep(
        &self,
        threads: &mut Threads,
        waiting: Waiting,
        stopped: &Receiver<Infallible>,
    ) -> Result<()> {
        let janitor = Janitor {
            store: self.store.clone(),
            heartbeat: self.heartbeat("janitor"),
            metrics: self.metrics.clone(),
            waiting,
        };
        let upkeep = Upkeep {
            store: self.store.clone(),
            live: self.live.clone(),
            heartbeat: self.health.thread("upkeep", self.stuck + UPKEEP_STEP),
            metrics: self.metrics.clone(),
        };
        let (stop_janitor, stop_upkeep) = (stopped.clone(), stopped.clone());
        threads.spawn("janitor", move || janitor.run(&stop_janitor))?;
        threads.spawn("upkeep", move || upkeep.run(&stop_upkeep)).map(drop)
    }

    fn claimer(&self, publisher: Publisher, jobs: Sender<Job>, free: Receiver<Finished>) -> Claimer {
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
            health: self.health.clone(),
            heartbeat: self.heartbeat("claimer"),
            metrics: self.metrics.clone(),
        }
    }
}

/// The threads of a service, each with a name.
struct Threads {
    /// Set before the threads are told to end: from then on an end is no failure.
    stopping: Arc<AtomicBool>,
    failed: Receiver<anyhow::Error>,
    fail: Sender<anyhow::Error>,
}

impl Default for Threads {
    fn default() -> Threads {
        // The first failure ends the service; later ones have nowhere to go.
        let (fail, failed) = bounded(1);
        Threads { stopping: Arc::new(AtomicBool::new(false)), failed, fail }
    }
}

impl Threads {
    /// The one way in which a thread of the service is started. Returns what disconnects when it has ended.
    ///
    /// It is not joined: `JoinHandle::join` knows no deadline, and `is_finished` still says no while a thread that has
    /// nothing left to do is on its way out.
    fn spawn(
        &mut self,
        name: &str,
        run: impl FnOnce() -> Result<()> + Send + 'static,
    ) -> Result<Receiver<Infallible>> {
        let (alive, ended) = bounded::<Infallible>(0);
        let (fail, stopping, thread_name) = (self.fail.clone(), self.stopping.clone(), name.to_string());
        thread::Builder::new()
            .name(name.to_string())
            .spawn(move || {
                let cause = match catch_unwind(AssertUnwindSafe(run)) {
                    Ok(Ok(())) => anyhow!("it returned"),
                    Ok(Err(error)) => error,
                    Err(panic) => anyhow!("it panicked: {}", panic_text(panic.as_ref())),
                };
                if !stopping.load(Ordering::Relaxed) {
                    let _ = fail.try_send(cause.context(format!("thread {thread_name} ended early")));
                }
                drop(alive);
            })
            .with_context(|| format!("start thread {name}"))?;
        Ok(ended)
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
