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
use crossbeam_channel::{Receiver, Sender, bounded};

use crate::claimer::Claimer;
use crate::config::{Changes, Config, OnDead};
use crate::health::Health;
use crate::http::Http;
use crate::janitor::Janitor;
use crate::live::{Live, Settings};
use crate::metrics::Metrics;
use crate::publish::{Publish, Unanswered, Unsettled};
use crate::publisher::Publisher;
use crate::recent::Waiting;
use crate::store::{ClaimSettings, Store, UPKEEP_STEP};
use crate::upkeep::Upkeep;
use crate::wakeup::{Doze, Sleeper, Wakeup};
use crate::worker::{DrainCount, Worker};

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
    /// Disconnected when every worker has ended.
    workers_done: Receiver<Infallible>,
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
        let health = Health::default();
        let metrics = Metrics::new();
        let Config { dispatcher, ordering, database, nats, metrics: http, partitions: _, logging: _ } =
            config.clone();
        let live = Live::new(Settings::of(&config));
        let workers = dispatcher.workers;
        let max_claim_bytes = dispatcher.max_in_flight_bytes / workers;
        // Between two beats a thread may also wait for a connection, and once more right after.
        let stuck = config.longest_claim() + 2 * database.connect_timeout + dispatcher.stuck_after;
        let store = Store::new(
            &database,
            &dispatcher.instance_id,
            ClaimSettings {
                synchronous_commit: database.synchronous_commit,
                idle_in_transaction_timeout: config.idle_in_transaction_timeout(),
                ordered: ordering.enabled,
                block_on_dead: ordering.on_dead == OnDead::Block,
                backoff_max: dispatcher.backoff_max,
                max_claim_bytes: i64::try_from(max_claim_bytes).unwrap_or(i64::MAX),
            },
        )?;
        let waiting = Waiting::default();
        let http = if http.enabled {
            let (health, metrics) = (health.clone(), metrics.clone());
            Some(Http::bind(&http, &dispatcher.instance_id, health, metrics, waiting.clone())?)
        } else {
            None
        };
        let (stop, stopped) = bounded(0);
        let (stop_http, http_stopped) = bounded(0);
        let (working, workers_done) = bounded::<Infallible>(0);
        let (jobs, jobs_to_do) = bounded(workers);
        let (free, freed) = bounded(workers);
        let doze = Doze::default();
        let draining = Arc::new(AtomicBool::new(false));
        let drain = Arc::new(DrainCount::default());
        let failed_settles = Arc::new(AtomicU32::new(0));
        let (publisher, keeper) =
            Publisher::new(nats.clone(), &dispatcher.instance_id, workers, health.clone(), metrics.clone());
        let publish = Arc::new(Publish {
            publisher: publisher.clone(),
            live: live.clone(),
            ordered: ordering.enabled,
            jetstream: nats.jetstream.enabled,
            stream: nats.jetstream.stream_name,
            batches: nats.jetstream.atomic_batches,
            ack_timeout: nats.ack_timeout,
            workers,
            draining: draining.clone(),
            unanswered: Unanswered::default(),
            unsettled: Unsettled::default(),
            metrics: metrics.clone(),
        });

        let mut threads = Threads::default();
        if let Some(http) = http {
            threads.spawn("http", move || http.run(&http_stopped))?;
        }
        let stop_keeper = stopped.clone();
        let (keeper_live, sent_again_within) = (live.clone(), config.sent_again_within());
        threads.spawn("nats", move || keeper.run(&keeper_live, sent_again_within, &stop_keeper))?;
        for slot in 0..workers {
            let name = format!("worker-{slot}");
            let worker = Worker {
                slot,
                jobs: jobs_to_do.clone(),
                free: free.clone(),
                publish: publish.clone(),
                claim_budget: dispatcher.claim_budget,
                drain: drain.clone(),
                failed_settles: failed_settles.clone(),
                heartbeat: health.thread(&name, stuck),
                metrics: metrics.clone(),
            };
            let working = working.clone();
            threads.spawn(&name, move || {
                let _working = working;
                worker.run()
            })?;
        }
        drop(working);
        if database.listen {
            let (locks, new_locks) = bounded(1);
            let wakeup = Wakeup {
                store: store.clone(),
                dsn: database.listen_dsn,
                doze: doze.clone(),
                locks,
                heartbeat: health.thread("wake-up", stuck),
            };
            let sleeper = Sleeper {
                locks: new_locks,
                doze: doze.clone(),
                heartbeat: health.thread("sleep-lock", stuck),
            };
            let (stop, stop_sleeper) = (stopped.clone(), stopped.clone());
            threads.spawn("wake-up", move || wakeup.run(&stop))?;
            threads.spawn("sleep-lock", move || sleeper.run(&stop_sleeper))?;
        }
        let janitor = Janitor {
            store: store.clone(),
            heartbeat: health.thread("janitor", stuck),
            metrics: metrics.clone(),
            waiting,
        };
        let stop_janitor = stopped.clone();
        threads.spawn("janitor", move || janitor.run(&stop_janitor))?;
        let upkeep = Upkeep {
            store: store.clone(),
            live: live.clone(),
            heartbeat: health.thread("upkeep", stuck + UPKEEP_STEP),
            metrics: metrics.clone(),
        };
        let stop_upkeep = stopped.clone();
        threads.spawn("upkeep", move || upkeep.run(&stop_upkeep))?;
        let service_store = store.clone();
        let claimer = Claimer {
            store,
            publisher,
            jobs,
            free: freed,
            doze,
            failed_settles,
            live: live.clone(),
            max_in_flight_bytes: dispatcher.max_in_flight_bytes,
            max_claim_bytes,
            poll_interval: dispatcher.poll_interval,
            fallback_interval: dispatcher.fallback_interval,
            health: health.clone(),
            heartbeat: health.thread("claimer", stuck),
            metrics: metrics.clone(),
        };
        threads.spawn("claimer", move || claimer.run(&stopped))?;
        Ok(Service {
            config,
            live,
            store: service_store,
            health,
            metrics,
            draining,
            drain,
            shutdown_grace: dispatcher.shutdown_grace,
            stop,
            stop_http,
            workers_done,
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
        // Ends by itself when the last worker has ended and dropped its side.
        let _ = self.workers_done.recv_deadline(started + self.shutdown_grace);
        let cut_off = self.threads.running("worker-");
        drop(self.stop_http);
        Stopped {
            drained: self.drain.drained.load(Ordering::Relaxed),
            released: self.drain.released.load(Ordering::Relaxed),
            took: started.elapsed(),
            cut_off,
        }
    }
}

/// The threads of a service, each with a name.
struct Threads {
    /// Set before the threads are told to end: from then on an end is no failure.
    stopping: Arc<AtomicBool>,
    failed: Receiver<anyhow::Error>,
    fail: Sender<anyhow::Error>,
    handles: Vec<thread::JoinHandle<()>>,
}

impl Default for Threads {
    fn default() -> Threads {
        // The first failure ends the service; later ones have nowhere to go.
        let (fail, failed) = bounded(1);
        Threads { stopping: Arc::new(AtomicBool::new(false)), failed, fail, handles: Vec::new() }
    }
}

impl Threads {
    /// The one way in which a thread of the service is started.
    fn spawn(&mut self, name: &str, run: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
        let (fail, stopping, thread_name) = (self.fail.clone(), self.stopping.clone(), name.to_string());
        let handle = thread::Builder::new()
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
            })
            .with_context(|| format!("start thread {name}"))?;
        self.handles.push(handle);
        Ok(())
    }

    /// How many threads whose name begins with `prefix` are still running.
    fn running(&self, prefix: &str) -> usize {
        let named = |handle: &&thread::JoinHandle<()>| {
            handle.thread().name().is_some_and(|name| name.starts_with(prefix))
        };
        self.handles.iter().filter(named).filter(|handle| !handle.is_finished()).count()
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
