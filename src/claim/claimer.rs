//! The claimer: one thread that begins claims and hands each to a worker that is free.
//!
//! It claims only for a free worker and only while the gate is open, so no lane is locked without somebody to
//! publish its events. It locks lanes, and the worker reads them, so that a claim takes little of this one thread.
//! Where a read has failed, or met an event that is larger than a claim may be, it reads the lane itself: first one
//! event, and then more and more. One look into the lanes feeds the claims that follow: what it found is shared out
//! among the free workers, and a lane that had more than its claim could take goes back to the end of the queue, so
//! that no lane starves. Looks and reads begin at the lanes' marks (see `lane/marks.rs`); what is known of the lanes is
//! in `search.rs`.
//!
//! When a wake-up ends a rest that was not too short, a few events have come, and somebody waits for them: it tries first to lock their lanes
//! without a look, which is a round trip less ([`Opening::lock_newest`]). What that does not find, the look does that
//! follows when the worker has finished.
//!
//! An empty look lets it rest until something may have changed: a wake-up; a worker that finished (its lanes were
//! locked, so events that were committed meanwhile could not be claimed); the next retry that falls due; or the
//! poll. While somebody has claims open it looks again soon, after `poll_interval` at the latest: should that
//! instance die, its lanes come free without any notification.
//!
//! It never gives up on the database: it says once that claims fail, and once that they work again.

use std::convert::Infallible;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use crossbeam_channel::{Receiver, Sender, TryRecvError, select};

use super::sampler::Samples;
use super::search::{REST_MIN, Search};
use super::trouble::{TROUBLE_PAUSE, Trouble};
use crate::boottime::Boottime;
use crate::claim::wakeup::Doze;
use crate::config::live::Live;
use crate::lane::LANES;
use crate::lane::progress::LaneProgress;
use crate::nats::Publisher;
use crate::ops::health::{Health, Heartbeat};
use crate::ops::mend::LaneAlarm;
use crate::ops::metrics::Metrics;
use crate::postgres::{ClaimLimits, Head, Large, Locked, Newest, Opening, Sampled, Store, StoreError};
use crate::publish::{Finished, Job, Stage};

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
    /// Where it says how far each lane is read.
    pub progress: LaneProgress,
    /// Where it says that lanes are missing.
    pub lane_alarm: LaneAlarm,
    /// Postgres and schema are reported here.
    pub health: Health,
    /// Its pulse.
    pub heartbeat: Heartbeat,
    /// Counters.
    pub metrics: Metrics,
}

/// Why the loop goes on or not.
pub(super) enum Turn {
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
    pub fn run(self, mut samples: Samples, stop: &Receiver<Infallible>) -> Result<()> {
        if let Turn::Stop = self.await_schema(stop) {
            return Ok(());
        }
        let mut search = Search::new();
        self.claim(&mut search, &mut samples, stop);
        self.keep_marks(search);
        Ok(())
    }

    /// Claims until `stop` fires.
    fn claim(&self, search: &mut Search, samples: &mut Samples, stop: &Receiver<Infallible>) {
        let mut trouble = Trouble::default();
        let mut woken = false;
        loop {
            self.heartbeat.idle();
            if let Turn::Stop = self.await_turn(search, &mut trouble, stop) {
                return;
            }
            self.heartbeat.beat();
            while let Ok(finished) = self.free.try_recv() {
                search.finished(finished);
            }
            if let Ok(sampled) = samples.taken().try_recv() {
                self.observe(search, samples, sampled);
            }
            self.progress.set(&search.marks, search.sampled_at);
            // A wake-up before the look's snapshot is answered by the look itself.
            woken |= self.doze.wake_ups().try_recv().is_ok();
            search.wants_sample &= !samples.ask(Instant::now());
            let rest = match self.attempt_after_news(search, &mut woken, &mut trouble) {
                Ok(Attempt::Claimed(job)) => {
                    if search.sent(&job, Instant::now()) >= AWAKE_AFTER {
                        self.doze.awake();
                    }
                    if self.jobs.send(*job).is_err() {
                        return;
                    }
                    if mem::take(&mut search.look_at_once) || !search.ready.is_empty() {
                        continue;
                    }
                    self.nap(search)
                }
                Ok(Attempt::Missed) => continue,
                Ok(Attempt::Elsewhere) => {
                    self.doze.awake();
                    self.nap(search)
                }
                Ok(Attempt::Nothing) if search.has_claims() => self.nap(search),
                Ok(Attempt::Nothing) => self.rest(search),
                Err(error) => self.pause_after(&error, search, &mut trouble),
            };
            let rest = if search.wants_sample { samples.next_in(Instant::now()).min(rest) } else { rest };
            self.heartbeat.idle();
            let until = Instant::now() + rest;
            let mut goes_on = false;
            while !goes_on {
                goes_on = true;
                select! {
                    recv(stop) -> _ => return,
                    recv(self.doze.wake_ups()) -> _ => (woken, search.wants_sample) = (true, true),
                    recv(self.free) -> finished => search.finished(finished.unwrap_or_default()),
                    recv(samples.taken()) -> sampled => if let Ok(sampled) = sampled {
                        goes_on = self.observe(search, samples, sampled);
                    },
                    // What nobody wakes us for: a writer that has ended shows in a sample.
                    default(until.saturating_duration_since(Instant::now())) => search.wants_sample = true,
                }
            }
        }
    }

    /// Hangs up on the workers, hears how their last claims end, and writes how far the lanes are settled: the next start begins
    /// there instead of where claims have written it last.
    fn keep_marks(self, mut search: Search) {
        let Claimer { store, jobs, free, heartbeat, .. } = self;
        drop(jobs);
        heartbeat.idle();
        free.iter().for_each(|finished| search.finished(finished));
        match store.keep_marks(&search.marks) {
            Ok(lanes) => log::debug!("marks kept: lanes={lanes}"),
            Err(error) => log::debug!("marks not kept, the next start begins further back: {error}"),
        }
    }

    /// A sample has come, or failed; returns whether it lets events be found that a look before it need not have found.
    fn observe(
        &self,
        search: &mut Search,
        samples: &mut Samples,
        sampled: Result<Sampled, StoreError>,
    ) -> bool {
        let asked_at = samples.came(Instant::now());
        match sampled {
            Ok(sampled) => {
                if sampled.misses_rows {
                    self.lane_alarm.raise();
                }
                let news = search.sampled(&sampled.sample, asked_at);
                self.progress.set(&search.marks, search.sampled_at);
                news
            }
            Err(error) => {
                log::debug!("sample of the writers failed, the one before is kept: {error}");
                false
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
        search.look_anew();
        self.metrics.claim_failed();
        self.metrics.postgres_error();
        trouble.again(error, &self.health)
    }

    /// Looks for lanes if that is due, and claims a free worker's share of what is known. When it was `woken` from a rest, it
    /// first tries to do without a look.
    fn attempt(&self, search: &mut Search, woken: bool) -> Result<Attempt, StoreError> {
        let mut opening = self.store.open()?;
        let batch = i32::try_from(self.live.now().batch_size).unwrap_or(i32::MAX);
        if woken && search.has_rested(Instant::now()) {
            let lanes = search.unclaimed_without_care();
            match opening.lock_newest(&lanes, self.limits(batch), &search.marks)? {
                Newest::Locked { locked, more } => {
                    search.look_at_once = more;
                    return Ok(self.locked(search, locked));
                }
                Newest::Nothing(same) => opening = same,
            }
        }
        if search.look_is_due(Instant::now()) && !self.look(search, &mut opening)? {
            return Ok(Attempt::Missed);
        }
        let lanes = search.take_share(batch);
        if lanes.is_empty() {
            return Ok(Attempt::Nothing);
        }
        if search.care.is_needed(&lanes) {
            return self.claim_with_care(opening, search, &lanes, batch);
        }
        let locked = opening.lock(&lanes, self.limits(batch), &search.marks)?;
        search.put_back(&lanes, &locked.lanes, batch);
        Ok(self.locked(search, locked))
    }

    /// Looks into the lanes that are not ours now, and of which nothing is known: for fresh events, for keys that are free again, and for retries that are due.
    /// False when another server answered than the one that the marks belong to.
    fn look(&self, search: &mut Search, opening: &mut Opening) -> Result<bool, StoreError> {
        let lanes = search.unknown();
        if lanes.is_empty() {
            return Ok(true);
        }
        let looked = opening.look(&lanes, &search.marks)?;
        if looked.server.is_some_and(|server| search.marks.is_other_life(server)) {
            search.forget();
            return Ok(false);
        }
        search.looked(&looked);
        let left_out: Vec<(i32, Vec<i64>)> = lanes
            .iter()
            .map(|&lane| (lane, search.marks.start(lane).left_out.keys()))
            .filter(|(_, keys)| !keys.is_empty())
            .collect();
        if !left_out.is_empty() {
            let keys: Vec<i64> = left_out.iter().flat_map(|(_, keys)| keys).copied().collect();
            let free = opening.free_keys(&keys)?;
            let of_lane =
                |(lane, keys): (i32, Vec<i64>)| keys.iter().any(|key| free.contains(key)).then_some(lane);
            search.is_ready(left_out.into_iter().filter_map(of_lane));
        }
        let due = if looked.any_in_retry { opening.due()? } else { Vec::new() };
        search.due(&due, Instant::now());
        Ok(true)
    }

    /// What became of lanes that were tried to be locked, for a worker to read them.
    fn locked(&self, search: &mut Search, locked: Locked) -> Attempt {
        Self::missed(search, &locked).unwrap_or_else(|| {
            let stage = Stage::Locked(locked);
            Attempt::Claimed(Box::new(Job { stage, bytes: self.max_claim_bytes }))
        })
    }

    fn limits(&self, events: i32) -> ClaimLimits {
        ClaimLimits { lanes: LANES, events, event_bytes: Some(self.publisher.max_payload()) }
    }

    /// Why lanes that were tried, or what was known of them, are no good; `None` if they are. Dropped, they are given
    /// back.
    fn missed(search: &mut Search, locked: &Locked) -> Option<Attempt> {
        if locked.lanes.is_empty() {
            return Some(Self::got_nothing(search));
        }
        if search.marks.is_other_life(locked.server) {
            // What would be read from the marks of another life is not read.
            search.forget();
            return Some(Attempt::Missed);
        }
        search.marks.belong_to(locked.server);
        None
    }

    /// Somebody else has, or had, what was tried.
    fn got_nothing(search: &Search) -> Attempt {
        if search.ready.is_empty() { Attempt::Elsewhere } else { Attempt::Missed }
    }

    /// Claims lanes in which a claim has failed, and reads them here.
    fn claim_with_care(
        &self,
        opening: Opening,
        search: &mut Search,
        lanes: &[i32],
        batch: i32,
    ) -> Result<Attempt, StoreError> {
        let limits = self.limits(search.care.limit(lanes, batch));
        // What cannot be read is known by its place alone, before the try and after it.
        let head = match *lanes {
            [lane] if limits.events == 1 => self.store.open()?.head(lane, &search.marks)?,
            _ => None,
        };
        let locked = opening.lock(lanes, limits, &search.marks)?;
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
        search.care.worked(&claim.lanes(), batch);
        if claim.is_empty() {
            search.read_nothing(&claim);
            return Ok(Attempt::Missed);
        }
        let bytes = claim.bytes();
        let stage = Stage::Read(claim, Boottime::now());
        Ok(Attempt::Claimed(Box::new(Job { stage, bytes })))
    }

    /// This event cannot be read, not even alone: makes a dead letter of it, so that the others of its lane go on.
    fn bury(&self, lane: i32, search: &Search, head: Head, error: &StoreError) -> Result<(), StoreError> {
        let reason = format!("PostgreSQL cannot hand it over: {error}");
        if self.store.open()?.bury(lane, &search.marks, head, &reason)? {
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
        if let Err(error) = self.store.warm_up() {
            log::debug!("warm-up failed: {error}");
        }
        match self.store.claims_open() {
            Ok(claims_open) => {
                if !claims_open {
                    // Nothing to claim, and not because somebody else has it: a trial of the gate is passed.
                    self.publisher.confirm_idle();
                    // Nor is anything left to settle: what could not be, somebody else has settled.
                    self.failed_settles.store(0, Ordering::Relaxed);
                }
                let retry = search.next_due(Instant::now()).unwrap_or(longest).max(REST_MIN);
                let others = if claims_open { self.poll_interval } else { longest };
                longest.min(retry).min(others)
            }
            Err(error) => {
                log::debug!("asking for open claims failed: {error}");
                self.poll_interval.min(longest)
            }
        }
    }
}
