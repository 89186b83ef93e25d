//! The service: wires the threads together, supervises them, and drains them.
//!
//! ```text
//!   wake-up ──wake──▸ claimer ──jobs──▸ worker-0..n ──▸ publisher (nats, writer) ──▸ NATS
//!                        ▴                  │
//!                        └───────free───────┘         janitor, sleep-lock, upkeep, sweep, http
//! ```
//!
//! [`Service::start`] starts the threads and [`Service::stop`] ends them; both run on the thread that calls them, and the
//! service has none of its own. Every channel is bounded. A thread that ends before it is told to, by error or panic, is a
//! failure of the service: [`Service::failure`] receives its name and cause, and whoever runs the service ends it. Stopping
//! has an order: the claimer first, which hangs up on the workers; they finish their claims within
//! `dispatcher.shutdown_grace`; http last, so that probes are answered to the end. What is not finished then is
//! rolled back by PostgreSQL when the process and with it the connection ends.

mod parts;
mod threads;

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use crossbeam_channel::{Receiver, Sender, bounded};

use crate::config::live::{Live, Settings};
use crate::config::{Changes, Config};
use crate::ops::health::Health;
use crate::ops::metrics::Metrics;
use crate::postgres::Store;
use crate::publish::DrainCount;

use self::parts::Parts;
use self::threads::{Running, Threads};

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
    /// All threads; told to stop, all but http and the workers end by that.
    threads: Threads,
    /// The workers, which end when the claimer hangs up.
    workers: Vec<Running>,
    /// Claimer and sampler, which have connections of their own to give back.
    claiming: Vec<Running>,
    /// Dropped last, to stop http.
    stop_http: Sender<Infallible>,
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

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
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
        let threads = Threads::new();

        let (stop_http, http_stopped) = bounded(0);
        if let Some(http) = parts.http()? {
            threads.spawn("http", move |_| http.run(&http_stopped))?;
        }

        let (publisher, keeper) = parts.publisher();
        let (live, sent_again_within) = (parts.live.clone(), config.sent_again_within());
        threads.spawn("nats", move |stop| keeper.run(&live, sent_again_within, stop))?;

        let (jobs, jobs_to_do) = bounded(config.dispatcher.workers);
        let (free, freed) = bounded(config.dispatcher.workers);
        let mut workers = Vec::with_capacity(config.dispatcher.workers);
        for (name, worker) in parts.workers(publisher.clone(), &jobs_to_do, &free) {
            workers.push(threads.spawn(&name, move |_| worker.run())?);
        }

        if config.database.listen {
            let (wakeup, sleeper) = parts.wakeup();
            threads.spawn("wake-up", move |stop| wakeup.run(stop))?;
            threads.spawn("sleep-lock", move |stop| sleeper.run(stop))?;
        }
        let (janitor, upkeep, sweeper) = (parts.janitor(), parts.upkeep(), parts.sweeper());
        threads.spawn("janitor", move |stop| janitor.run(stop))?;
        threads.spawn("upkeep", move |stop| upkeep.run(stop))?;
        threads.spawn("sweep", move |stop| sweeper.run(stop))?;

        let (samples, sampler) = parts.sampler();
        let mut claiming = vec![threads.spawn("sampler", move |_| sampler.run())?];
        let claimer = parts.claimer(publisher, jobs, freed);
        claiming.push(threads.spawn("claimer", move |stop| claimer.run(samples, stop))?);

        let Parts { live, store, health, metrics, draining, drain, .. } = parts;
        Ok(Service {
            config,
            live,
            store,
            health,
            metrics,
            draining,
            drain,
            threads,
            workers,
            claiming,
            stop_http,
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
        self.threads.failed()
    }

    /// Stops claiming, lets the workers finish within the grace, and ends the threads.
    pub fn stop(self) -> Stopped {
        let started = Instant::now();
        let grace_over = started + self.config.dispatcher.shutdown_grace;
        self.health.draining();
        self.draining.store(true, Ordering::Relaxed);
        self.threads.stop();
        let cut_off = self.workers.iter().filter(|worker| !worker.ends_by(grace_over)).count();
        self.claiming.iter().for_each(|thread| _ = thread.ends_by(grace_over));
        drop(self.stop_http);
        Stopped {
            drained: self.drain.drained.load(Ordering::Relaxed),
            released: self.drain.released.load(Ordering::Relaxed),
            took: started.elapsed(),
            cut_off,
        }
    }
}
