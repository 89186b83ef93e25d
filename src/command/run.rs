//! `pg-outbox run`: the daemon. Signals in, systemd's protocol out; the service does the rest.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use crossbeam_channel::{Receiver, bounded, select, tick};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::config::Config;
use crate::logging;
use crate::service::Service;
use crate::systemd::Systemd;

/// Signals that may wait to be read.
const SIGNALS_MAX: usize = 8;
/// How often the status line is renewed when no watchdog asks for more.
const STATUS_INTERVAL: Duration = Duration::from_secs(10);

/// How the daemon ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Stopped by a signal, drained.
    Drained,
    /// A second signal came while draining.
    CutShort,
    /// A thread failed; the log says which and why.
    Failed,
}

/// Runs the service until a signal stops it.
///
/// # Errors
/// A bad configuration ([`crate::config::ConfigError`]), or what [`Service::start`] says.
pub fn run(path: &Path) -> Result<Ended> {
    let config = Config::load(path)?;
    logging::init(&config.logging)?;
    std::panic::set_hook(Box::new(|panic| log::error!("panic: {panic}")));
    log::info!("starting: version={} config={}", env!("CARGO_PKG_VERSION"), path.display());
    let signals = signals()?;
    let service = Service::start(config)?;
    let systemd = Systemd::from_env();
    systemd.ready();
    let watchdog = systemd.watchdog_interval();
    let status = tick(watchdog.unwrap_or(STATUS_INTERVAL).min(STATUS_INTERVAL));
    loop {
        select! {
            recv(signals) -> signal => {
                log::info!("stopping: signal={}", signal_name(signal.ok()));
                systemd.stopping();
                return Ok(stop(service, &signals));
            }
            recv(service.failure()) -> failure => {
                let failure = failure.unwrap_or_else(|_| anyhow::anyhow!("every thread ended"));
                systemd.stopping();
                log::error!("failed: {failure:#}");
                return Ok(Ended::Failed);
            }
            recv(status) -> _ => {
                systemd.feed(&service.health().live());
                systemd.status(&format!("ready: {}", service.health().ready()));
            }
        }
    }
}

/// Drains, unless another signal comes.
fn stop(service: Service, signals: &Receiver<i32>) -> Ended {
    let (done, drained) = bounded(1);
    let drain = std::thread::spawn(move || done.send(service.stop()));
    let ended = select! {
        recv(drained) -> stopped => {
            if let Ok(stopped) = stopped {
                log::info!("{stopped}");
            }
            Ended::Drained
        }
        recv(signals) -> _ => {
            log::warn!("stopped at once by a second signal; open claims are rolled back");
            Ended::CutShort
        }
    };
    drop(drain);
    ended
}

/// SIGTERM and SIGINT as a channel.
fn signals() -> Result<Receiver<i32>> {
    let mut source = Signals::new([SIGTERM, SIGINT])?;
    let (send, signals) = bounded(SIGNALS_MAX);
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        for signal in source.forever() {
            let _ = send.try_send(signal);
        }
    })?;
    Ok(signals)
}

fn signal_name(signal: Option<i32>) -> &'static str {
    match signal {
        Some(SIGTERM) => "SIGTERM",
        Some(SIGINT) => "SIGINT",
        _ => "unknown",
    }
}
