//! What values must be to each other: fine each on its own, and wrong together.
//!
//! Pure, on the thread that loads the configuration, once every key is read. A problem is reported at the first of its
//! keys that was written; none is, if one of them is known to be wrong already. What belongs to one section alone and
//! decides what its struct becomes (a login, a certificate with its key) is checked where that section is read.

use super::Config;
use super::reading::ConfigReading;

/// Connections that are not the workers': the claimer's next claim, and the gauges and other small reads.
const CONNECTIONS_BESIDE_WORKERS: u32 = 2;

/// Reports values that are fine each on its own, but not together.
pub(super) fn check_together(reading: &mut ConfigReading<'_>, config: &Config) {
    let Config { dispatcher, database, nats, .. } = config;
    let shown = humantime::format_duration;

    let workers = u32::try_from(dispatcher.workers).unwrap_or(u32::MAX);
    let needed = workers.saturating_add(CONNECTIONS_BESIDE_WORKERS);
    if database.max_connections < needed {
        let text = format!(
            "max_connections {} is too small for {workers} workers; allowed: at least {needed} (workers + {CONNECTIONS_BESIDE_WORKERS})",
            database.max_connections
        );
        reading.clash(&["database.max_connections", "dispatcher.workers"], text);
    }
    if database.max_idle > database.max_connections {
        let text = format!(
            "max_idle {} is more than max_connections; allowed: 0 to {}",
            database.max_idle, database.max_connections
        );
        reading.clash(&["database.max_idle", "database.max_connections"], text);
    }
    if dispatcher.poll_interval > dispatcher.fallback_interval {
        let text = format!(
            "poll_interval {} is longer than fallback_interval {}; allowed: at most as long",
            shown(dispatcher.poll_interval),
            shown(dispatcher.fallback_interval)
        );
        reading.clash(&["dispatcher.poll_interval", "dispatcher.fallback_interval"], text);
    }
    if dispatcher.backoff_initial > dispatcher.backoff_max {
        let text = format!(
            "backoff_initial {} is longer than backoff_max {}; allowed: at most as long",
            shown(dispatcher.backoff_initial),
            shown(dispatcher.backoff_max)
        );
        reading.clash(&["dispatcher.backoff_initial", "dispatcher.backoff_max"], text);
    }
    if nats.jetstream.create && nats.jetstream.subjects.is_empty() {
        let text = "true, but nats.jetstream.subjects is missing; write the new stream's subjects, such as [\"app.>\"]";
        // The subjects are named first so that a fault in them is not followed by this one.
        reading.clash(&["nats.jetstream.subjects", "nats.jetstream.create"], text.to_owned());
    }
}
