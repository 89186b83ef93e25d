//! What the claimer waits for before its first claim: the schema, and what connections are.
//!
//! It runs on the claimer's thread, says once what is missing, and keeps the health of PostgreSQL and of the schema up to date
//! meanwhile.

use std::convert::Infallible;
use std::time::Duration;

use crossbeam_channel::{Receiver, select};

use super::claimer::{Claimer, Turn};
use crate::ops::health::HealthPart;
use crate::postgres::{Sessions, StoreError};

impl Claimer {
    /// Waits until the schema is there, saying once what is missing. Learns before what connections are.
    pub(super) fn await_schema(&self, stop: &Receiver<Infallible>) -> Turn {
        let mut said = String::new();
        let mut sessions = None;
        loop {
            self.heartbeat.beat();
            let missing = match self.schema_problems(&mut sessions) {
                Ok(problems) if problems.is_empty() => {
                    self.health.set(HealthPart::Postgres, Ok(()));
                    self.health.set(HealthPart::Schema, Ok(()));
                    for hidden in self.store.hidden().unwrap_or_default() {
                        log::warn!("{hidden}");
                    }
                    return Turn::Claim;
                }
                Ok(problems) => {
                    self.health.set(HealthPart::Postgres, Ok(()));
                    let problems = problems.join("; ");
                    self.health.set(HealthPart::Schema, Err(problems.clone()));
                    format!("schema is not ready: {problems}")
                }
                Err(error) => {
                    self.health.set(HealthPart::Postgres, Err(error.to_string()));
                    format!("postgres is not ready: {error}")
                }
            };
            if said != missing {
                log::warn!("{missing}");
                said = missing;
            }
            select! {
                recv(stop) -> _ => return Turn::Stop,
                default(self.poll_interval.min(Duration::from_secs(1))) => {}
            }
        }
    }

    /// What the schema lacks; the first time, what connections are as well.
    fn schema_problems(&self, sessions: &mut Option<Sessions>) -> Result<Vec<String>, StoreError> {
        if sessions.is_none() {
            *sessions = Some(self.store.probe_sessions()?);
            if *sessions == Some(Sessions::Shared) {
                let so = self.store.in_shared_sessions();
                log::info!("connections share sessions, as behind a transaction pooler: {so}");
            }
        }
        self.store.schema_problems()
    }
}
