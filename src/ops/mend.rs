//! Mends the lanes: puts rows of `outbox_lanes` back that somebody deleted while the service runs.
//!
//! An event of a lane without a row is never claimed, and nothing fails. So the claimer raises the [`LaneAlarm`] when a sample of
//! its shows that a lane is missing, and the janitor, whose count shows it too, has the [`Mender`] put it back; the claimer
//! never waits for that. Until then `/ready` says no. The schema has the function, which runs as its owner; of several
//! instances that mend at once each says what it has put back itself. What instances remember of these lanes counts no
//! more then (rule 6 in `lane/marks.rs`).

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::lane::LANES;
use crate::ops::health::{Health, HealthPart};
use crate::postgres::{Store, StoreError};

/// Shortest time from a failure to the next try.
const RETRY: Duration = Duration::from_secs(1);
/// SQLSTATE of a function that the role may not call.
const NO_PRIVILEGE: &str = "42501";

/// Says that lanes are missing. Clones share it.
#[derive(Clone)]
pub struct LaneAlarm {
    raise: Sender<()>,
    raised: Receiver<()>,
}

impl Default for LaneAlarm {
    fn default() -> LaneAlarm {
        let (raise, raised) = bounded(1);
        LaneAlarm { raise, raised }
    }
}

impl LaneAlarm {
    /// Lanes are missing.
    pub fn raise(&self) {
        // Full means that it is raised already.
        let _ = self.raise.try_send(());
    }

    /// Receives when it was raised. For the janitor alone.
    pub fn raised(&self) -> &Receiver<()> {
        &self.raised
    }
}

/// Puts missing lanes back. For one thread.
pub struct Mender {
    store: Store,
    health: Health,
    /// Rows were missing when it last looked, and could not be put back: when that was, and why, which was said.
    failed: Option<(Instant, String)>,
}

impl Mender {
    /// One that has seen nothing missing yet.
    pub fn new(store: Store, health: Health) -> Mender {
        Mender { store, health, failed: None }
    }

    /// Lanes are missing that could not be put back.
    pub fn is_at_it(&self) -> bool {
        self.failed.is_some()
    }

    /// Looks whether rows are missing, and puts them back. Not right after that has failed.
    pub fn mend(&mut self) {
        if self.failed.as_ref().is_some_and(|(at, _)| at.elapsed() < RETRY) {
            return;
        }
        match self.try_to() {
            Ok(()) => self.failed = None,
            Err(error) => self.say(&error),
        }
    }

    fn try_to(&self) -> Result<(), StoreError> {
        let missing = self.store.missing_rows()?;
        let words = missing.words();
        if !words.is_empty() {
            let why = format!("{} are missing, and events wait", words.join(" and "));
            self.health.set(HealthPart::Schema, Err(why));
            let mended = self.store.mend_lanes()?;
            if mended > 0 {
                log::warn!(
                    "lanes mended: {mended} of {LANES} rows of table outbox_lanes were missing, and are back: somebody \
                     deleted them, and their events waited; all that is pending is looked for from the beginning, and \
                     nothing is published twice for that"
                );
            }
            if missing.version {
                log::warn!(
                    "the row of table outbox_schema was missing, and is back: nothing was claimed without it"
                );
            }
        } else if !self.is_at_it() {
            return Ok(());
        }
        self.health.set(HealthPart::Schema, Ok(()));
        Ok(())
    }

    /// Says once why it failed. That PostgreSQL is gone, the claimer says.
    fn say(&mut self, error: &StoreError) {
        let text = error.to_string();
        if error.is_outage() || self.failed.as_ref().is_some_and(|(_, said)| *said == text) {
            log::debug!("mending the lanes failed, will retry: {text}");
        } else {
            let hint = match error.sqlstate() {
                Some(NO_PRIVILEGE) => "; grant the service's role EXECUTE on function outbox_mend_lanes()",
                _ => "",
            };
            log::warn!(
                "rows of table outbox_lanes are missing, and mending failed, will retry: {text}{hint}"
            );
        }
        self.failed = Some((Instant::now(), text));
    }
}
