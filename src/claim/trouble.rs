//! Claims that fail: what is said of it, and how long the claimer pauses.
//!
//! The claimer's thread alone has it. It is said once that claims fail and once that they work again, however many tries lie
//! between, and health shows it meanwhile. It asks nobody and never sleeps.

use std::time::{Duration, Instant};

use crate::ops::health::{Health, HealthPart};
use crate::postgres::StoreError;

/// First and longest pause between claims that fail.
pub(super) const TROUBLE_PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// Claims that fail: said once when it begins and once when it ends.
#[derive(Default)]
pub(super) struct Trouble {
    since: Option<Instant>,
    pause: Duration,
    settles_fail: bool,
}

impl Trouble {
    /// One more failure; returns the pause before the next claim.
    pub(super) fn again(&mut self, error: &StoreError, health: &Health) -> Duration {
        if self.since.is_none() {
            self.since = Some(Instant::now());
            self.pause = TROUBLE_PAUSE.0;
            log::warn!("claims fail, trying on: {error}");
        } else {
            self.pause = (self.pause * 2).min(TROUBLE_PAUSE.1);
        }
        health.set(HealthPart::Postgres, Err(error.to_string()));
        self.pause
    }

    /// Tells health when settles begin to fail and when they work again.
    pub(super) fn settles(&mut self, fail: bool, health: &Health) {
        if fail != self.settles_fail {
            self.settles_fail = fail;
            let state = if fail { Err("settles fail; the log says why".into()) } else { Ok(()) };
            health.set(HealthPart::Postgres, state);
        }
    }

    pub(super) fn over(&mut self, health: &Health) {
        if let Some(since) = self.since.take() {
            log::info!("claims work again: lasted={:.1}s", since.elapsed().as_secs_f64());
            health.set(HealthPart::Postgres, Ok(()));
        }
    }
}
