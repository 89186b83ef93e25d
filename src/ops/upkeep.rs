//! Upkeep: makes the partitions of the months to come, and deletes what is older than the retention. The thread
//! `upkeep`, on connections of its own, so that no claim waits for it.
//!
//! A round comes every [`ROUND`], and is done by whichever instance gets the turn (an advisory lock); the others skip
//! it. First the missing partitions are made, which also moves what had fallen into the DEFAULT partition; then those
//! are dropped that are too old as a whole; what is too old in the rest is deleted some blocks at a time, at most half
//! of the time and for at most [`CLEAN_LIMIT`] a round. A pending event or a dead letter is never deleted, and keeps
//! its partition. Whatever fails, locks that are not free included, waits for the next round: the partitions are made
//! months ahead, and writers and claims come first.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::time::{Duration, Instant};

use anyhow::Result;
use crossbeam_channel::{Receiver, TryRecvError, select};

use crate::config::live::Live;
use crate::ops::health::Heartbeat;
use crate::ops::metrics::Metrics;
use crate::postgres::{Dropped, Partition, PartitionSession, Store, StoreError, UpkeepTurn};

/// Time between two rounds.
const ROUND: Duration = Duration::from_secs(600);
/// Time to the next round while PostgreSQL or the schema is not there.
const RETRY: Duration = Duration::from_secs(10);
/// Longest time that a round spends deleting single events.
const CLEAN_LIMIT: Duration = Duration::from_secs(120);
/// Time from the end of one pass over all old events to the next.
const PASS_INTERVAL: Duration = Duration::from_secs(6 * 3_600);
/// Shortest pause between two steps of deleting.
const CLEAN_PAUSE: Duration = Duration::from_millis(10);
/// SQLSTATE of a function that the role may not call.
const NO_PRIVILEGE: &str = "42501";

/// The thread.
pub struct Upkeep {
    /// Where the partitions are.
    pub store: Store,
    /// What is wanted, as of the round's beginning.
    pub live: Live,
    /// Its pulse.
    pub heartbeat: Heartbeat,
    /// Gauges.
    pub metrics: Metrics,
}

/// How far the deleting of single events has come.
#[derive(Default)]
struct Pass {
    /// Partitions that are still to be cleaned, the next one last.
    left: Vec<String>,
    /// Block of the next one to begin with.
    block: i64,
    /// When to begin the next pass.
    next: Option<Instant>,
}

/// Why partitions that are too old were kept, so that it is said once and not every ten minutes.
#[derive(Default)]
struct Kept(BTreeMap<String, Dropped>);

impl Kept {
    /// True when this was not so in the round before.
    fn is_news(&mut self, partition: &str, outcome: Dropped) -> bool {
        self.0.insert(partition.to_owned(), outcome) != Some(outcome)
    }

    /// Forgets partitions that are no more, and those that are not old any more.
    fn forget_all_but(&mut self, listed: &[Partition]) {
        self.0.retain(|name, _| listed.iter().any(|partition| partition.is_old && partition.name == *name));
    }
}

/// What the log says of a partition that stays; nothing of one that is gone or not old enough.
fn why_kept(outcome: Dropped) -> Option<&'static str> {
    match outcome {
        Dropped::Dropped | Dropped::Young => None,
        Dropped::Pending => Some("it has pending events"),
        Dropped::Discarded => Some("it has events that were discarded lately"),
        Dropped::Dead => Some("it has dead letters; retry or discard them"),
        Dropped::Unread => {
            Some("whether it has pending events is not known yet, as its lanes are not read so far")
        }
        Dropped::Locked => Some("its locks were not free; tried again in the next round"),
    }
}

/// Whether there is to be another round.
enum Onward {
    Round,
    Stop,
}

impl Upkeep {
    /// Runs until `stop` fires.
    ///
    /// # Errors
    /// None of its own: what fails is tried again.
    pub fn run(self, stop: &Receiver<Infallible>) -> Result<()> {
        let mut pass = Pass::default();
        let mut kept = Kept::default();
        let mut said = String::new();
        loop {
            self.heartbeat.beat();
            let pause = match self.round(&mut pass, &mut kept, stop) {
                Ok(Onward::Stop) => return Ok(()),
                Ok(Onward::Round) => {
                    said.clear();
                    // Instances that were started together take turns.
                    ROUND.mul_f64(0.9 + 0.2 * fastrand::f64())
                }
                Err(error) => {
                    self.say(&error, &mut said);
                    RETRY
                }
            };
            self.heartbeat.idle();
            select! {
                recv(stop) -> _ => return Ok(()),
                default(pause) => {}
            }
        }
    }

    /// Says once why a round failed. That PostgreSQL is gone, the claimer says.
    fn say(&self, error: &StoreError, said: &mut String) {
        let text = error.to_string();
        if error.is_outage() || *said == text {
            log::debug!("upkeep failed, will retry: next={RETRY:?}: {text}");
            return;
        }
        let hint = match error.sqlstate() {
            Some(NO_PRIVILEGE) => "; grant the service's role EXECUTE on the functions outbox_*partition*",
            _ => "",
        };
        log::warn!("upkeep of the partitions failed, will retry: next={RETRY:?}: {text}{hint}");
        *said = text;
    }

    fn round(
        &self,
        pass: &mut Pass,
        kept: &mut Kept,
        stop: &Receiver<Infallible>,
    ) -> Result<Onward, StoreError> {
        let turn = self.store.upkeep_turn()?;
        let mut partitions = self.store.partitions()?;
        let mut next = Onward::Round;
        if let Some(turn) = turn {
            let live = self.live.now();
            self.create(&mut partitions, live.partitions.premake)?;
            if let Some(retention) = live.partitions.retention {
                self.drop_old(&mut partitions, retention, kept, stop)?;
                next = self.clean(&mut partitions, retention, pass, &turn, stop)?;
            }
            self.metrics.upkeep_done();
        } else {
            log::debug!("upkeep skipped: another instance is at it");
        }
        let state = partitions.state()?;
        self.metrics.partitions(state.days_ahead, state.default_rows.unsigned_abs());
        Ok(next)
    }

    fn create(&self, partitions: &mut PartitionSession, premake: u32) -> Result<(), StoreError> {
        for month in partitions.missing(premake)? {
            self.heartbeat.beat();
            let name = partitions.create(&month)?;
            log::info!("partition made: partition={name}");
        }
        Ok(())
    }

    fn drop_old(
        &self,
        partitions: &mut PartitionSession,
        retention: Duration,
        kept: &mut Kept,
        stop: &Receiver<Infallible>,
    ) -> Result<(), StoreError> {
        let listed = partitions.list(Some(retention))?;
        kept.forget_all_but(&listed);
        for partition in listed.iter().filter(|partition| partition.is_old) {
            self.heartbeat.beat();
            let name = &partition.name;
            let outcome = match partition.holds {
                Some(_) => partitions.drop(name, retention)?,
                None => match partitions.has_fresh(name, || self.goes_on(stop))? {
                    None => return Ok(()),
                    Some(true) => Dropped::Pending,
                    Some(false) => partitions.drop(name, retention)?,
                },
            };
            if outcome == Dropped::Dropped {
                self.metrics.deleted(0, 1);
                log::info!("partition dropped: partition={name} bytes={}", partition.bytes);
            } else if let Some(why) = why_kept(outcome) {
                let level = if kept.is_news(name, outcome) { log::Level::Info } else { log::Level::Debug };
                log::log!(level, "partition kept: partition={name}: {why}");
            }
        }
        Ok(())
    }

    /// Between two steps: it is alive, and not told to stop.
    fn goes_on(&self, stop: &Receiver<Infallible>) -> bool {
        self.heartbeat.beat();
        matches!(stop.try_recv(), Err(TryRecvError::Empty))
    }

    /// Goes on with the pass over the old events, for as long as a round may.
    fn clean(
        &self,
        partitions: &mut PartitionSession,
        retention: Duration,
        pass: &mut Pass,
        turn: &UpkeepTurn,
        stop: &Receiver<Infallible>,
    ) -> Result<Onward, StoreError> {
        let until = Instant::now() + CLEAN_LIMIT;
        if pass.left.is_empty() {
            if pass.next.is_some_and(|next| Instant::now() < next) {
                return Ok(Onward::Round);
            }
            let listed = partitions.list(Some(retention))?;
            let old =
                listed.into_iter().filter(|partition| partition.has_old).map(|partition| partition.name);
            *pass = Pass { left: old.rev().collect(), block: 0, next: None };
        }
        while let Some(name) = pass.left.last() {
            if Instant::now() >= until || !turn.is_ours() {
                return Ok(Onward::Round);
            }
            self.heartbeat.beat();
            let started = Instant::now();
            let cleaned = match partitions.clean(name, pass.block, retention) {
                Ok(cleaned) => cleaned,
                Err(error) => {
                    // It may have been dropped meanwhile; the next pass begins anew.
                    *pass = Pass::default();
                    return Err(error);
                }
            };
            self.metrics.deleted(cleaned.deleted.unsigned_abs(), 0);
            pass.block = cleaned.next_block.unwrap_or(0);
            if cleaned.next_block.is_none() {
                pass.left.pop();
            }
            select! {
                recv(stop) -> _ => return Ok(Onward::Stop),
                default(started.elapsed().max(CLEAN_PAUSE)) => {}
            }
        }
        pass.next = Some(Instant::now() + PASS_INTERVAL);
        Ok(Onward::Round)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn why_a_partition_is_kept_is_said_once() {
        let partition = |name: &str, is_old| Partition {
            name: name.to_owned(),
            from: None,
            to: None,
            is_default: false,
            bytes: 0,
            rows: None,
            holds: None,
            is_old,
            has_old: is_old,
        };
        let mut kept = Kept::default();
        let rounds = [
            (Dropped::Dead, true),
            (Dropped::Dead, false),
            (Dropped::Locked, true),
            (Dropped::Dead, true),
            (Dropped::Dead, false),
        ];
        for (round, (outcome, is_news)) in rounds.into_iter().enumerate() {
            kept.forget_all_but(&[partition("a", true), partition("b", true)]);
            assert_eq!(kept.is_news("a", outcome), is_news, "round {round}");
        }
        assert!(kept.is_news("b", Dropped::Dead), "each partition for itself");
        // A longer retention, then the former one again.
        kept.forget_all_but(&[partition("a", false), partition("b", true)]);
        assert!(kept.is_news("a", Dropped::Dead) && !kept.is_news("b", Dropped::Dead));
    }
}
