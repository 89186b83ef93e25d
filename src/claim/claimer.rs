//! The claimer: one thread that begins claims and hands each to a worker that is free.
//!
//! It claims only for a free worker and only while the gate is open, so no lane is locked without somebody to
//! publish its events. It locks lanes, and the worker reads them, so that a claim takes little of this one thread.
//! Where a read has failed, or met an event that is larger than a claim may be, it reads the lane itself: first one
//! event, and then more and more. One look into the lanes feeds the claims that follow: what it found is shared out
//! among the free workers, and a lane that had more than its claim could take goes back to the end of the queue, so
//! that no lane starves. Looks and reads begin at the lanes' cursors (see `lane/marks.rs`); what is known of the lanes is
//! in `search.rs`.
//!
//! When a wake-up ends a rest that was not too short, a few events have come, and somebody waits for them: it tries first to lock their lanes
//! without a look, which is a round trip less ([`Opening::lock_fresh`]). What that does not find, the look does that
//! follows when the worker has finished.
//!
//! An empty look lets it rest until something may have changed: a wake-up; a worker that finished (its lanes were
//! locked, so events that were committed meanwhile could not be claimed); the next retry that falls due; or the
//! poll. While somebody has claims open it looks again soon, after `poll_interval` at the latest: should that
//! instance die, its lanes come free without any notification. Before a long rest it
//! looks once from the beginning of every lane, whatever the cursors say.
//!
//! It never gives up on the database: it says once that claims fail, and once that they work again.

use std::convert::Infallible;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use crossbeam_channel::{Receiver, Sender, TryRecvError, select};

use super::search::{REST_MIN, REWIND_INTERVAL, Search};
use crate::boottime::Boottime;
use crate::claim::wakeup::Doze;
use crate::config::live::Live;
use crate::lane::LANES;
use crate::lane::marks::Basis;
use crate::nats::Publisher;
use crate::ops::health::{Health, HealthPart, Heartbeat};
use crate::ops::metrics::Metrics;
use crate::postgres::{ClaimLimits, Fresh, Head, Large, Locked, Opening, Sessions, Store, StoreError};
use crate::publish::{Finished, Job, Stage};

/// First and longest pause between claims that fail.
const TROUBLE_PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// Writers need not notify any more when claims went on for so long without a rest.
const AWAKE_AFTER: Duration = Duration::from_millis(20);

/// The thread.
pub struct Claimer {
    /// Where claims are made.
    pub store: Store,
    /// The gate.
    pub publisher: Publisher,
    /// Where claims go.
    pub jobs: Sender<Job>,
    /// Workers say here that they are free.
    pub free: Receiver<Finished>,
    /// Wakes it, once it has said that it sleeps.
    pub doze: Doze,
    /// Settles that failed since the last one that did not.
    pub failed_settles: Arc<AtomicU32>,
    /// How many events a claim may have, taken anew for each.
    pub live: Live,
    /// Bytes of events that all claims together may hold, and what one of them holds unless its only event is larger.
    pub max_in_flight_bytes: usize,
    /// See above.
    pub max_claim_bytes: usize,
    /// Rest without wake-ups.
    pub poll_interval: Duration,
    /// Rest with wake-ups.
    pub fallback_interval: Duration,
    /// Postgres and schema are reported here.
    pub health: Health,
    /// Its pulse.
    pub heartbeat: Heartbeat,
    /// Counters.
    pub metrics: Metrics,
}

/// Why the loop goes on or not.
enum Turn {
    Claim,
    Stop,
}

/// What an attempt to claim came to.
enum Attempt {
    /// A claim for a worker.
    Claimed(Box<Job>),
    /// Somebody else has the lanes that were tried, or what was known of them no longer holds: try on.
    Missed,
    /// Somebody else has all lanes that have anything.
    Elsewhere,
    /// No lane has anything that could be claimed now.
    Nothing,
}

impl Claimer {
    /// Runs until `stop` fires.
    ///
    /// # Errors
    /// None of its own.
    pub fn run(self, stop: &Receiver<Infallible>) -> Result<()> {
        if let Turn::Stop = self.await_schema(stop) {
            return Ok(());
        }
        let mut search = Search::new(Instant::now());
        let mut trouble = Trouble::default();
        let mut woken = false;
        loop {
            self.heartbeat.idle();
            if let Turn::Stop = self.await_turn(&mut search, &mut trouble, stop) {
                return Ok(());
            }
            self.heartbeat.beat();
            while let Ok(finished) = self.free.try_recv() {
                search.finished(finished);
            }
            // A wake-up before the look's snapshot is answered by the look itself.
            woken |= self.doze.wake_ups().try_recv().is_ok();
            let rest = match self.attempt_after_news(&mut search, &mut woken, &mut trouble) {
                Ok(Attempt::Claimed(job)) => {
                    if search.sent(&job, Instant::now()) >= AWAKE_AFTER {
                        self.doze.awake();
                    }
                    if self.jobs.send(*job).is_err() {
                        return Ok(());
                    }
                    if mem::take(&mut search.look_at_once) || !search.ready.is_empty() {
                        continue;
                    }
                    self.nap(&mut search)
                }
                Ok(Attempt::Missed) => continue,
                Ok(Attempt::Elsewhere) => {
                    self.doze.awake();
                    self.nap(&mut search)
                }
                Ok(Attempt::Nothing) if search.has_claims() => self.nap(&mut search),
                Ok(Attempt::Nothing)
                    if search.claimed_since_rewind
                        && search.rewind_after(REWIND_INTERVAL, Instant::now()) =>
                {
                    continue;
                }
                Ok(Attempt::Nothing) => self.rest(&mut search),
                Err(error) => self.pause_after(&error, &mut search, &mut trouble),
            };
            self.heartbeat.idle();
            select! {
                recv(stop) -> _ => return Ok(()),
                recv(self.doze.wake_ups()) -> _ => woken = true,
                recv(self.free) -> finished => search.finished(finished.unwrap_or_default()),
                default(rest) => {}
            }
        }
    }

    /// Waits until a worker is free, there is room for its events, and NATS and PostgreSQL take what comes of them.
    fn await_turn(&self, search: &mut Search, trouble: &mut Trouble, stop: &Receiver<Infallible>) -> Turn {
        while search.idle_workers == 0 || search.has_no_room(self.max_in_flight_bytes, self.max_claim_bytes) {
            select! {
                recv(stop) -> _ => return Turn::Stop,
                recv(self.free) -> finished => search.finished(finished.unwrap_or_default()),
            }
        }
        match self.await_gate(stop) {
            Turn::Stop => Turn::Stop,
            Turn::Claim => self.await_settles(trouble, stop),
        }
    }

    /// Waits until the schema is there, saying once what is missing. Learns before what connections are.
    fn await_schema(&self, stop: &Receiver<Infallible>) -> Turn {
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

    /// Waits while an outage keeps the gate closed.
    fn await_gate(&self, stop: &Receiver<Infallible>) -> Turn {
        while !self.publisher.lets_through() {
            self.doze.awake();
            select! {
                recv(stop) -> _ => return Turn::Stop,
                recv(self.publisher.gate_opened()) -> _ => {}
                default(Duration::from_secs(1)) => {}
            }
        }
        match stop.try_recv() {
            Err(TryRecvError::Empty) => Turn::Claim,
            _ => Turn::Stop,
        }
    }

    /// Pauses while settles fail, the longer the more of them: what is claimed now can hardly be settled either.
    fn await_settles(&self, trouble: &mut Trouble, stop: &Receiver<Infallible>) -> Turn {
        let failures = self.failed_settles.load(Ordering::Relaxed);
        trouble.settles(failures > 0, &self.health);
        if failures == 0 {
            return Turn::Claim;
        }
        let pause = TROUBLE_PAUSE.0.saturating_mul(failures).min(TROUBLE_PAUSE.1);
        select! {
            recv(stop) -> _ => Turn::Stop,
            default(pause) => Turn::Claim,
        }
    }

    /// Takes in how workers read what they were given, and claims if that speaks for it.
    fn attempt_after_news(
        &self,
        search: &mut Search,
        woken: &mut bool,
        trouble: &mut Trouble,
    ) -> Result<Attempt, StoreError> {
        let news = search.take_news();
        let worked = news.worked;
        let attempt = match news.failed {
            Some(error) => Err(error),
            None if news.in_vain && search.ready.is_empty() => Ok(Attempt::Elsewhere),
            None => self.attempt(search, mem::take(woken)),
        };
        // Whether a claim works is known once it was read.
        if worked || matches!(attempt, Ok(Attempt::Missed | Attempt::Elsewhere | Attempt::Nothing)) {
            trouble.over(&self.health);
        }
        attempt
    }

    /// A claim failed: nothing that is known of the lanes holds. Returns how long to pause.
    fn pause_after(&self, error: &StoreError, search: &mut Search, trouble: &mut Trouble) -> Duration {
        search.forget();
        self.metrics.claim_failed();
        self.metrics.postgres_error();
        trouble.again(error, &self.health)
    }

    /// Looks for lanes if that is due, and claims a free worker's share of what is known. When it was `woken` from a rest, it
    /// first tries to do without a look.
    fn attempt(&self, search: &mut Search, woken: bool) -> Result<Attempt, StoreError> {
        search.rewind_after(self.fallback_interval, Instant::now());
        // Not before the first claim after a rest, for which somebody waits.
        if search.awake_since.is_some() && search.horizon_is_due(Instant::now()) {
            match self.store.horizon()? {
                Some(reading) => search.cursors.observe(reading),
                None => search.go_without_cursors(),
            }
        }
        let mut opening = self.store.open()?;
        let batch = i32::try_from(self.live.now().batch_size).unwrap_or(i32::MAX);
        if woken && search.has_rested(Instant::now()) {
            let (basis, lanes) = (search.cursors.basis(), search.unclaimed_without_care());
            match opening.lock_fresh(&lanes, self.limits(batch), search.cursors.positions())? {
                Fresh::Locked { locked, more } => {
                    search.look_at_once = more;
                    return Ok(self.locked(search, basis, locked));
                }
                Fresh::Nothing(same) => opening = same,
            }
        }
        let looks = search.look_is_due(Instant::now());
        if looks {
            let basis = search.cursors.basis();
            let found = opening.find(&search.unclaimed(), search.cursors.positions())?;
            search.found(basis, &found);
        }
        let lanes = search.take_share(batch);
        if lanes.is_empty() {
            return Ok(Attempt::Nothing);
        }
        if search.care.is_needed(&lanes) {
            return self.claim_with_care(opening, search, &lanes, batch);
        }
        let basis = search.cursors.basis();
        let locked = opening.lock(&lanes, self.limits(batch), search.cursors.positions())?;
        search.put_back(&lanes, &locked.lanes, batch);
        Ok(self.locked(search, basis, locked))
    }

    /// What became of lanes that were tried to be locked, for a worker to read them.
    fn locked(&self, search: &mut Search, basis: Basis, locked: Locked) -> Attempt {
        Self::missed(search, &locked).unwrap_or_else(|| {
            let stage = Stage::Locked(locked);
            Attempt::Claimed(Box::new(Job { stage, basis, bytes: self.max_claim_bytes }))
        })
    }

    fn limits(&self, events: i32) -> ClaimLimits {
        ClaimLimits { lanes: LANES, events, event_bytes: self.publisher.max_payload() }
    }

    /// Why lanes that were tried, or what was known of them, are no good; `None` if they are. Dropped, they are given
    /// back.
    fn missed(search: &mut Search, locked: &Locked) -> Option<Attempt> {
        if locked.lanes.is_empty() {
            return Some(Self::got_nothing(search));
        }
        if locked.server != search.server {
            // Also the first time. What would be read with the cursors of another life is not read.
            search.forget();
            search.server = locked.server;
            return Some(Attempt::Missed);
        }
        None
    }

    /// Somebody else has, or had, what was tried.
    fn got_nothing(search: &Search) -> Attempt {
        if search.ready.is_empty() { Attempt::Elsewhere } else { Attempt::Missed }
    }

    /// Claims lanes in which a claim has failed, and reads them here.
    fn claim_with_care(
        &self,
        mut opening: Opening,
        search: &mut Search,
        lanes: &[i32],
        batch: i32,
    ) -> Result<Attempt, StoreError> {
        let limits = self.limits(search.care.limit(lanes, batch));
        let basis = search.cursors.basis();
        let positions = *search.cursors.positions();
        // What cannot be read is known by its place alone, before the try and after it.
        let head = match *lanes {
            [lane] if limits.events == 1 => opening.head(lane, &positions)?,
            _ => None,
        };
        let locked = opening.lock(lanes, limits, &positions)?;
        if let Some(missed) = Self::missed(search, &locked) {
            return Ok(missed);
        }
        let claim = match (locked.read(Large::Alone), head) {
            (Ok(claim), _) => claim,
            (Err(error), Some(head)) if error.is_unreadable() => {
                self.bury(lanes[0], search, head, &error)?;
                return Ok(Attempt::Missed);
            }
            (Err(error), _) => return search.claim_failed(lanes, error).map(|()| Attempt::Missed),
        };
        search.care.worked(&claim.lanes, batch);
        if claim.is_empty() {
            return Ok(Self::got_nothing(search));
        }
        let bytes = claim.bytes();
        let stage = Stage::Read(claim, Boottime::now());
        Ok(Attempt::Claimed(Box::new(Job { stage, basis, bytes })))
    }

    /// This event cannot be read, not even alone: makes a dead letter of it, so that the others of its lane go on.
    fn bury(&self, lane: i32, search: &Search, head: Head, error: &StoreError) -> Result<(), StoreError> {
        let reason = format!("PostgreSQL cannot hand it over: {error}");
        if self.store.open()?.bury(lane, search.cursors.positions(), head, &reason)? {
            self.metrics.dead(1);
            log::error!("event is dead: event={} seq={}: {reason}", head.id, head.seq);
        }
        Ok(())
    }

    /// How long to rest while our workers or another instance have claims, if no worker finishes before. New events
    /// may come in lanes that nobody has, and while we do not sleep no writer tells us.
    fn nap(&self, search: &mut Search) -> Duration {
        if self.doze.covered() {
            return self.poll_interval;
        }
        search.nap()
    }

    /// How long to rest when there is nothing to claim. From here on writers wake us.
    fn rest(&self, search: &mut Search) -> Duration {
        search.rests(Instant::now());
        self.doze.asleep();
        let longest = if self.doze.covered() { self.fallback_interval } else { self.poll_interval };
        let longest = longest.min(search.next_rewind(Instant::now()).unwrap_or(longest));
        if let Err(error) = self.store.warm_up() {
            log::debug!("warm-up failed: {error}");
        }
        match self.store.outlook() {
            Ok(outlook) => {
                if !outlook.claims_open {
                    // Nothing to claim, and not because somebody else has it: a trial of the gate is passed.
                    self.publisher.confirm_idle();
                    // Nor is anything left to settle: what could not be, somebody else has settled.
                    self.failed_settles.store(0, Ordering::Relaxed);
                }
                let retry = outlook.next_due.unwrap_or(longest).max(REST_MIN);
                let others = if outlook.claims_open { self.poll_interval } else { longest };
                longest.min(retry).min(others)
            }
            Err(error) => {
                log::debug!("outlook failed: {error}");
                self.poll_interval.min(longest)
            }
        }
    }
}

/// Claims that fail: said once when it begins and once when it ends.
#[derive(Default)]
struct Trouble {
    since: Option<Instant>,
    pause: Duration,
    settles_fail: bool,
}

impl Trouble {
    /// One more failure; returns the pause before the next claim.
    fn again(&mut self, error: &StoreError, health: &Health) -> Duration {
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
    fn settles(&mut self, fail: bool, health: &Health) {
        if fail != self.settles_fail {
            self.settles_fail = fail;
            let state = if fail { Err("settles fail; the log says why".into()) } else { Ok(()) };
            health.set(HealthPart::Postgres, state);
        }
    }

    fn over(&mut self, health: &Health) {
        if let Some(since) = self.since.take() {
            log::info!("claims work again: lasted={:.1}s", since.elapsed().as_secs_f64());
            health.set(HealthPart::Postgres, Ok(()));
        }
    }
}
