//! `pg-outbox run`: the daemon. Signals in, systemd's protocol out; the service does the rest.
//!
//! Runs on the main thread, which starts and ends everything and otherwise waits. SIGTERM and SIGINT stop the
//! service, SIGHUP makes it read its configuration again. A bad file never disturbs a running service: it is
//! refused whole, with the messages that a start would give, and the configuration from before stays in force.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use crossbeam_channel::{Receiver, bounded, select, tick};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::signals;
use crate::config::{Changes, Config};
use crate::ops::health::Verdict;
use crate::ops::logging;
use crate::ops::metrics::Totals;
use crate::ops::systemd::Systemd;
use crate::service::Service;

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
    let signals = signals::channel()?;
    let mut service = Service::start(config)?;
    let systemd = Systemd::from_env();
    systemd.ready();
    let watchdog = systemd.watchdog_interval();
    let status = tick(watchdog.unwrap_or(STATUS_INTERVAL).min(STATUS_INTERVAL));
    let mut line = StatusLine::new();
    systemd.status(&line.next(&service));
    loop {
        select! {
            recv(signals) -> signal => {
                if signal == Ok(SIGHUP) {
                    systemd.reloading();
                    line.refused = !reload(path, &mut service);
                    systemd.ready();
                    systemd.status(&line.next(&service));
                    continue;
                }
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
                systemd.status(&line.next(&service));
            }
        }
    }
}

/// Reads the configuration again and puts in force what can change while running. False: it was refused.
fn reload(path: &Path, service: &mut Service) -> bool {
    let config = match Config::load(path) {
        Ok(config) => config,
        Err(error) => {
            for problem in error.problems() {
                log::error!("reload refused: {problem}");
            }
            log::error!(
                "reload refused: problems={}; the configuration from before stays in force",
                error.problems().len()
            );
            return false;
        }
    };
    let Changes { applied, need_restart } = service.reload(&config);
    logging::set_level(config.logging.level);
    if !need_restart.is_empty() {
        log::warn!(
            "restart needed: {} changed in {} and cannot change while running",
            need_restart.join(", "),
            path.display()
        );
    }
    let changed = if applied.is_empty() { "nothing".to_owned() } else { applied.join(", ") };
    log::info!("reloaded: config={} changed: {changed}", path.display());
    true
}

/// What `systemctl status` shows: how fast events go out, what waits, and what is wrong.
struct StatusLine {
    /// Published until then; the rate is what came since.
    published: u64,
    at: Instant,
    /// The last reload was refused.
    refused: bool,
}

impl StatusLine {
    fn new() -> StatusLine {
        StatusLine { published: 0, at: Instant::now(), refused: false }
    }

    /// The line for the time since the last one.
    fn next(&mut self, service: &Service) -> String {
        let totals = service.metrics().totals();
        let since = self.at.elapsed();
        let rate = totals.published.saturating_sub(self.published) as f64 / since.as_secs_f64().max(0.001);
        (self.published, self.at) = (totals.published, Instant::now());
        status_line(&service.health().ready(), rate, &totals, self.refused)
    }
}

fn status_line(ready: &Verdict, rate: f64, totals: &Totals, refused: bool) -> String {
    let Totals { pending, dead, lag_seconds, .. } = totals;
    let state = if ready.ok { "ready".to_owned() } else { format!("not ready: {ready}") };
    let refused = if refused { "; reload refused, see the log" } else { "" };
    format!("{state}; rate={rate:.1}/s backlog={pending} lag={lag_seconds:.1}s dead={dead}{refused}")
}

/// Drains, unless another signal comes.
fn stop(service: Service, signals: &Receiver<i32>) -> Ended {
    let (done, drained) = bounded(1);
    let drain = std::thread::spawn(move || done.send(service.stop()));
    let ended = loop {
        select! {
            recv(drained) -> stopped => {
                if let Ok(stopped) = stopped {
                    log::info!("{stopped}");
                }
                break Ended::Drained;
            }
            recv(signals) -> signal => {
                if signal == Ok(SIGHUP) {
                    continue;
                }
                log::warn!("stopped at once by a second signal; open claims are rolled back");
                break Ended::CutShort;
            }
        }
    };
    drop(drain);
    ended
}

fn signal_name(signal: Option<i32>) -> &'static str {
    match signal {
        Some(SIGTERM) => "SIGTERM",
        Some(SIGINT) => "SIGINT",
        _ => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_line_says_how_it_goes() {
        let totals = Totals {
            published: 9,
            failed: 0,
            dead_letters: 0,
            pending: 12,
            retrying: 0,
            dead: 3,
            lag_seconds: 1.25,
        };
        let line = |reasons: &[&str], refused| {
            let reasons: Vec<String> = reasons.iter().map(ToString::to_string).collect();
            status_line(&Verdict { ok: reasons.is_empty(), reasons }, 117.96, &totals, refused)
        };
        assert_eq!(line(&[], false), "ready; rate=118.0/s backlog=12 lag=1.2s dead=3");
        assert_eq!(
            line(&["nats: refused"], true),
            "not ready: nats: refused; rate=118.0/s backlog=12 lag=1.2s dead=3; reload refused, see the log"
        );
    }
}
