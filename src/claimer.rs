//! The claimer: one thread that begins claims and hands each to a worker that is free.
//!
//! It claims only for a free worker and only while the gate is open, so no lane is locked without somebody to
//! publish its events. One look into the lanes feeds the claims that follow: what it found is shared out among the
//! free workers, and a lane that had more than its claim could take goes back to the end of the queue, so that no
//! lane starves. Looks and reads begin at the lanes' cursors (see `cursors.rs`).
//!
//! An empty look lets it rest until something may have changed: a wake-up; a worker that finished (its lanes were
//! locked, so events that were committed meanwhile could not be claimed); the next retry that falls due; or the
//! poll. While somebody has claims open it looks again soon, after `poll_interval` at the latest: should that
//! instance die, its lanes come free without any notification. Before a long rest it
//! looks once from the beginning of every lane, whatever the cursors say.
//!
//! It never gives up on the database: it says once that claims fail, and once that they work again.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use crossbeam_channel::{Receiver, Sender, TryRecvError, select};

use crate::boottime::Boottime;
use crate::cursors::{self, Basis, Cursors};
use crate::health::{Health, Heartbeat, Part};
use crate::live::Live;
use crate::metrics::Metrics;
use crate::publisher::Publisher;
use crate::store::{ClaimLimits, Found, Head, LANES, ServerLife, Sessions, Store, StoreError};
use crate::wakeup::Doze;
use crate::worker::{Finished, Job};

/// First and longest pause between claims that fail.
const TROUBLE_PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// Shortest rest, so that a retry that is due in a moment does not make the claimer spin.
const REST_MIN: Duration = Duration::from_millis(5);
/// Time between two readings of the horizon while claims are made.
const HORIZON_INTERVAL: Duration = Duration::from_secs(1);
/// Time between two looks while lanes with events are known: how long a lane may wait to be found behind them.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// Shortest and longest rest while claims are under way; it doubles while nothing is found. Should the instance that
/// has them die, its lanes are found after the longest at the latest.
const NAP: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(250));
/// Writers need not notify any more when claims went on for so long without a rest.
const AWAKE_AFTER: Duration = Duration::from_millis(20);
/// Time between two looks from the beginning, which may cost more than others.
const REWIND_INTERVAL: Duration = Duration::from_secs(1);

/// How much larger each next claim is of a lane in which one has failed.
const CARE_GROWTH: i32 = 4;

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
enum Next {
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
        if let Next::Stop = self.await_schema(stop) {
            return Ok(());
        }
        let mut search = Search::new(Instant::now());
        let mut trouble = Trouble::default();
        loop {
            self.heartbeat.idle();
            while search.idle_workers == 0
                || search.has_no_room(self.max_in_flight_bytes, self.max_claim_bytes)
            {
                select! {
                    recv(stop) -> _ => return Ok(()),
                    recv(self.free) -> finished => search.finished(&finished.unwrap_or_default()),
                }
            }
            if let Next::Stop = self.await_gate(stop) {
                return Ok(());
            }
            if let Next::Stop = self.await_settles(&mut trouble, stop) {
                return Ok(());
            }
            self.heartbeat.beat();
            while let Ok(finished) = self.free.try_recv() {
                search.finished(&finished);
            }
            // A wake-up before the look's snapshot is answered by the look itself.
            let _ = self.doze.wake_ups().try_recv();
            let rest = match self.attempt(&mut search) {
                Ok(Attempt::Claimed(job)) => {
                    trouble.over(&self.health);
                    if search.sent(&job, Instant::now()) >= AWAKE_AFTER {
                        self.doze.awake();
                    }
                    if self.jobs.send(*job).is_err() {
                        return Ok(());
                    }
                    if !search.ready.is_empty() {
                        continue;
                    }
                    self.nap(&mut search)
                }
                Ok(Attempt::Missed) => {
                    trouble.over(&self.health);
                    continue;
                }
                Ok(Attempt::Elsewhere) => {
                    trouble.over(&self.health);
                    self.doze.awake();
                    self.nap(&mut search)
                }
                Ok(Attempt::Nothing) if search.has_claims() => {
                    trouble.over(&self.health);
                    self.nap(&mut search)
                }
                Ok(Attempt::Nothing) => {
                    trouble.over(&self.health);
                    if search.claimed_since_rewind && search.rewind_after(REWIND_INTERVAL, Instant::now()) {
                        continue;
                    }
                    self.rest(&mut search)
                }
                Err(error) => {
                    search.forget();
                    self.metrics.claim_failed();
                    self.metrics.postgres_error();
                    trouble.again(&error, &self.health)
                }
            };
            self.heartbeat.idle();
            select! {
                recv(stop) -> _ => return Ok(()),
                recv(self.doze.wake_ups()) -> _ => {}
                recv(self.free) -> finished => search.finished(&finished.unwrap_or_default()),
                default(rest) => {}
            }
        }
    }

    /// Waits until the schema is there, saying once what is missing. Learns before what connections are.
    fn await_schema(&self, stop: &Receiver<Infallible>) -> Next {
        let mut said = String::new();
        let mut sessions = None;
        loop {
            self.heartbeat.beat();
            let missing = match self.schema_problems(&mut sessions) {
                Ok(problems) if problems.is_empty() => {
                    self.health.set(Part::Postgres, Ok(()));
                    self.health.set(Part::Schema, Ok(()));
                    for hidden in self.store.hidden().unwrap_or_default() {
                        log::warn!("{hidden}");
                    }
                    return Next::Claim;
                }
                Ok(problems) => {
                    self.health.set(Part::Postgres, Ok(()));
                    let problems = problems.join("; ");
                    self.health.set(Part::Schema, Err(problems.clone()));
                    format!("schema is not ready: {problems}")
                }
                Err(error) => {
                    self.health.set(Part::Postgres, Err(error.to_string()));
                    format!("postgres is not ready: {error}")
                }
            };
            if said != missing {
                log::warn!("{missing}");
                said = missing;
            }
            select! {
                recv(stop) -> _ => return Next::Stop,
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
    fn await_gate(&self, stop: &Receiver<Infallible>) -> Next {
        while !self.publisher.lets_through() {
            self.doze.awake();
            select! {
                recv(stop) -> _ => return Next::Stop,
                recv(self.publisher.gate_opened()) -> _ => {}
                default(Duration::from_secs(1)) => {}
            }
        }
        match stop.try_recv() {
            Err(TryRecvError::Empty) => Next::Claim,
            _ => Next::Stop,
        }
    }

    /// Pauses while settles fail, the longer the more of them: what is claimed now can hardly be settled either.
    fn await_settles(&self, trouble: &mut Trouble, stop: &Receiver<Infallible>) -> Next {
        let failures = self.failed_settles.load(Ordering::Relaxed);
        trouble.settles(failures > 0, &self.health);
        if failures == 0 {
            return Next::Claim;
        }
        let pause = TROUBLE_PAUSE.0.saturating_mul(failures).min(TROUBLE_PAUSE.1);
        select! {
            recv(stop) -> _ => Next::Stop,
            default(pause) => Next::Claim,
        }
    }

    /// Looks for lanes if that is due, and claims a free worker's share of what is known.
    fn attempt(&self, search: &mut Search) -> Result<Attempt, StoreError> {
        search.rewind_after(self.fallback_interval, Instant::now());
        if search.horizon_is_due(Instant::now()) {
            match self.store.horizon()? {
                Some(reading) => search.cursors.observe(reading),
                None => search.go_without_cursors(),
            }
        }
        let mut opening = self.store.open()?;
        let looks = search.look_is_due(Instant::now());
        if looks {
            let basis = search.cursors.basis();
            let found = opening.find(&search.unclaimed(), search.cursors.positions())?;
            search.found(basis, &found);
        }
        let lanes = search.take_share();
        if lanes.is_empty() {
            return Ok(Attempt::Nothing);
        }
        let basis = search.cursors.basis();
        let batch = i32::try_from(self.live.now().batch_size).unwrap_or(i32::MAX);
        let limits = ClaimLimits {
            lanes: LANES,
            events: search.care.limit(&lanes, batch),
            event_bytes: self.publisher.max_payload(),
        };
        // What cannot be read is known by its place alone, before the try and after it.
        let head = match lanes[..] {
            [lane] if limits.events == 1 => opening.head(lane, search.cursors.positions())?,
            _ => None,
        };
        let claim = match (opening.claim(&lanes, limits, search.cursors.positions()), head) {
            (Ok(claim), _) => claim,
            (Err(error), Some(head)) if error.is_unreadable() => {
                self.bury(lanes[0], search, head, &error)?;
                return Ok(Attempt::Missed);
            }
            (Err(error), _) => {
                if error.sqlstate().is_some() {
                    search.care.failed(&lanes);
                }
                if error.is_unreadable() {
                    log::warn!(
                        "claim failed, will read its lanes one by one: lanes={}: {error}",
                        lanes.len()
                    );
                    return Ok(Attempt::Missed);
                }
                return Err(error);
            }
        };
        search.care.worked(&claim.lanes, batch);
        search.put_back(&lanes, &claim.lanes, limits.events);
        if claim.is_empty() {
            return Ok(if search.ready.is_empty() { Attempt::Elsewhere } else { Attempt::Missed });
        }
        if claim.server != search.server {
            // Also the first time. What was read with the cursors of another life is given back unpublished.
            search.forget();
            search.server = claim.server;
            return Ok(Attempt::Missed);
        }
        self.metrics.claimed(claim.len());
        let bytes = claim.bytes();
        Ok(Attempt::Claimed(Box::new(Job { claim, read_at: Boottime::now(), basis, bytes })))
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
        search.nap = (search.nap * 2).clamp(NAP.0, NAP.1);
        search.nap
    }

    /// How long to rest when there is nothing to claim. From here on writers wake us.
    fn rest(&self, search: &mut Search) -> Duration {
        search.awake_since = None;
        self.doze.asleep();
        let longest = if self.doze.covered() { self.fallback_interval } else { self.poll_interval };
        let longest = longest.min(search.next_rewind(Instant::now()).unwrap_or(longest));
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

/// What the claimer knows of the lanes, and when it learnt it.
struct Search {
    cursors: Cursors,
    care: Care,
    /// The life of the server that the cursors belong to.
    server: ServerLife,
    /// Lanes that have something and that no worker of ours has; the one that waits longest comes first.
    ready: VecDeque<i32>,
    /// Lanes that a worker of ours has.
    claimed: [bool; cursors::LANES],
    /// Workers that wait for a claim.
    idle_workers: usize,
    /// What the claims of the other workers hold.
    bytes_in_flight: usize,
    /// The last nap.
    nap: Duration,
    /// Since when there was always something to claim.
    awake_since: Option<Instant>,
    /// Where the next look begins.
    first_lane: i32,
    looked_at: Option<Instant>,
    horizon_at: Option<Instant>,
    rewound_at: Instant,
    /// Claims were made since the last look from the beginning.
    claimed_since_rewind: bool,
    /// Claims were made since the last reading of the horizon.
    claimed_since_horizon: bool,
    /// It was said that cursors cannot be had.
    without_cursors: bool,
}

impl Search {
    fn new(now: Instant) -> Search {
        Search {
            cursors: Cursors::default(),
            care: Care::default(),
            server: ServerLife::default(),
            ready: VecDeque::new(),
            claimed: [false; cursors::LANES],
            idle_workers: 0,
            bytes_in_flight: 0,
            nap: Duration::ZERO,
            awake_since: None,
            first_lane: fastrand::i32(0..LANES),
            looked_at: None,
            horizon_at: None,
            rewound_at: now,
            claimed_since_rewind: false,
            claimed_since_horizon: false,
            without_cursors: false,
        }
    }

    /// A worker is free.
    fn finished(&mut self, finished: &Finished) {
        self.idle_workers += 1;
        self.bytes_in_flight = self.bytes_in_flight.saturating_sub(finished.bytes);
        if finished.database_failed {
            self.forget();
        }
        let Some(basis) = finished.basis else { return };
        for end in &finished.lanes {
            self.set_claimed(end.lane, false);
            self.cursors.advance(basis, end.lane, end.reach);
            if end.more {
                self.ready.push_back(end.lane);
            }
        }
    }

    /// A connection was lost, or the server is another: nothing that is known holds.
    fn forget(&mut self) {
        self.cursors.clear();
        self.ready.clear();
        self.looked_at = None;
        self.horizon_at = None;
    }

    /// Begins at the beginning of every lane if that was not done for `interval`; returns whether it does.
    fn rewind_after(&mut self, interval: Duration, now: Instant) -> bool {
        let due = now.saturating_duration_since(self.rewound_at) >= interval;
        if due {
            self.cursors.rewind();
            self.rewound_at = now;
            self.claimed_since_rewind = false;
        }
        due
    }

    /// Time until a look from the beginning may be made, if one should be made before a long rest.
    fn next_rewind(&self, now: Instant) -> Option<Duration> {
        let rest = REWIND_INTERVAL.saturating_sub(now.saturating_duration_since(self.rewound_at));
        self.claimed_since_rewind.then_some(rest.max(REST_MIN))
    }

    /// Events can appear below any bound, so every read begins at the beginning.
    fn go_without_cursors(&mut self) {
        self.cursors.clear();
        if !std::mem::replace(&mut self.without_cursors, true) {
            log::warn!(
                "claims read every lane from its beginning, which is slow: outboxes.seq must have a sequence of its own with CACHE 1"
            );
        }
    }

    fn horizon_is_due(&mut self, now: Instant) -> bool {
        let long_ago = |at: Instant| now.saturating_duration_since(at) >= HORIZON_INTERVAL;
        let due = self.claimed_since_horizon && self.horizon_at.is_none_or(long_ago);
        if due {
            self.horizon_at = Some(now);
            self.claimed_since_horizon = false;
        }
        due
    }

    fn look_is_due(&mut self, now: Instant) -> bool {
        let long_ago = |at: Instant| now.saturating_duration_since(at) >= LOOK_INTERVAL;
        let due = self.ready.is_empty() || self.looked_at.is_none_or(long_ago);
        if due {
            self.looked_at = Some(now);
        }
        due
    }

    /// The lanes to look into: those that are not ours now, beginning each time with another one.
    fn unclaimed(&mut self) -> Vec<i32> {
        self.first_lane = (self.first_lane + 1) % LANES;
        let from = self.first_lane;
        (from..from + LANES).map(|lane| lane % LANES).filter(|&lane| !self.is_claimed(lane)).collect()
    }

    /// Takes in a look that began with `basis`.
    fn found(&mut self, basis: Basis, found: &[Found]) {
        for lane in found {
            if lane.settled {
                self.cursors.advance(basis, lane.lane, i64::MAX);
            }
            if lane.claimable && !self.ready.contains(&lane.lane) {
                self.ready.push_back(lane.lane);
            }
        }
    }

    /// Takes the share of one free worker from the lanes that are ready.
    fn take_share(&mut self) -> Vec<i32> {
        let share = self.ready.len().div_ceil(self.idle_workers.max(1));
        let share = self.care.alike(self.ready.iter().copied().take(share));
        self.ready.drain(..share).collect()
    }

    /// Of the lanes that were `tried`, a claim of `max_events` could not take more than that many; the others are
    /// still to be tried. (Those that it tried and did not get are somebody else's.)
    fn put_back(&mut self, tried: &[i32], got: &[i32], max_events: i32) {
        if usize::try_from(max_events).is_ok_and(|max| got.len() >= max) {
            for lane in tried.iter().rev().filter(|lane| !got.contains(lane)) {
                self.ready.push_front(*lane);
            }
        }
    }

    /// A claim of these lanes went to a worker; returns for how long there was always something to claim.
    fn sent(&mut self, job: &Job, now: Instant) -> Duration {
        self.idle_workers = self.idle_workers.saturating_sub(1);
        self.claimed_since_rewind = true;
        self.claimed_since_horizon = true;
        self.bytes_in_flight += job.bytes;
        for &lane in &job.claim.lanes {
            self.set_claimed(lane, true);
        }
        self.nap = Duration::ZERO;
        now.saturating_duration_since(*self.awake_since.get_or_insert(now))
    }

    /// True while claims hold so much that one more could be too much: one of them is of a single large event.
    fn has_no_room(&self, max_bytes: usize, claim_bytes: usize) -> bool {
        self.bytes_in_flight > 0 && self.bytes_in_flight.saturating_add(claim_bytes) > max_bytes
    }

    fn has_claims(&self) -> bool {
        self.claimed.contains(&true)
    }

    fn is_claimed(&self, lane: i32) -> bool {
        usize::try_from(lane).ok().and_then(|lane| self.claimed.get(lane)).copied().unwrap_or(false)
    }

    fn set_claimed(&mut self, lane: i32, claimed: bool) {
        if let Some(slot) = usize::try_from(lane).ok().and_then(|lane| self.claimed.get_mut(lane)) {
            *slot = claimed;
        }
    }
}

/// Lanes in which a claim has failed: one of their events may be at fault. Such a lane is claimed alone, at first one
/// event and then, while it works, more and more; so the event at fault comes to be read alone.
struct Care {
    /// By lane: events that a claim of it may have; `None` where there is no cause for care.
    limits: [Option<i32>; cursors::LANES],
}

impl Default for Care {
    fn default() -> Care {
        Care { limits: [None; cursors::LANES] }
    }
}

impl Care {
    /// How many of these lanes, from the first one on, make one claim: one that needs care makes it alone.
    fn alike(&self, lanes: impl Iterator<Item = i32>) -> usize {
        let mut lanes = lanes.peekable();
        match lanes.peek() {
            Some(&first) if self.limit_of(first).is_some() => 1,
            _ => lanes.take_while(|&lane| self.limit_of(lane).is_none()).count(),
        }
    }

    /// How many events a claim of `lanes` may have, which is `batch` unless care is needed.
    fn limit(&self, lanes: &[i32], batch: i32) -> i32 {
        lanes.iter().filter_map(|&lane| self.limit_of(lane)).min().unwrap_or(batch).min(batch)
    }

    fn failed(&mut self, lanes: &[i32]) {
        for &lane in lanes {
            self.set(lane, Some(1));
        }
    }

    fn worked(&mut self, lanes: &[i32], batch: i32) {
        for &lane in lanes {
            if let Some(limit) = self.limit_of(lane) {
                let limit = limit.saturating_mul(CARE_GROWTH);
                self.set(lane, (limit < batch).then_some(limit));
            }
        }
    }

    fn limit_of(&self, lane: i32) -> Option<i32> {
        usize::try_from(lane).ok().and_then(|lane| self.limits.get(lane)).copied().flatten()
    }

    fn set(&mut self, lane: i32, limit: Option<i32>) {
        if let Some(slot) = usize::try_from(lane).ok().and_then(|lane| self.limits.get_mut(lane)) {
            *slot = limit;
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
        health.set(Part::Postgres, Err(error.to_string()));
        self.pause
    }

    /// Tells health when settles begin to fail and when they work again.
    fn settles(&mut self, fail: bool, health: &Health) {
        if fail != self.settles_fail {
            self.settles_fail = fail;
            let state = if fail { Err("settles fail; the log says why".into()) } else { Ok(()) };
            health.set(Part::Postgres, state);
        }
    }

    fn over(&mut self, health: &Health) {
        if let Some(since) = self.since.take() {
            log::info!("claims work again: lasted={:.1}s", since.elapsed().as_secs_f64());
            health.set(Part::Postgres, Ok(()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a claim of what is ready would be: how many lanes, and how many events of them.
    fn next(care: &Care, ready: &[i32]) -> (usize, i32) {
        let share = care.alike(ready.iter().copied());
        (share, care.limit(&ready[..share], 100))
    }

    #[test]
    fn a_lane_in_which_a_claim_failed_is_claimed_alone_and_with_care() {
        let mut care = Care::default();
        assert_eq!(next(&care, &[1, 2, 3]), (3, 100));
        assert_eq!(next(&care, &[]), (0, 100));
        care.failed(&[2]);
        assert_eq!(next(&care, &[1, 2, 3]), (1, 100), "the lanes before it go without it");
        assert_eq!(next(&care, &[2, 3]), (1, 1));
        for limit in [4, 16, 64] {
            care.worked(&[1, 2], 100);
            assert_eq!(next(&care, &[2, 3]), (1, limit));
        }
        care.failed(&[2]);
        assert_eq!(next(&care, &[2]), (1, 1));
        for _ in 0..4 {
            care.worked(&[2], 100);
        }
        assert_eq!(next(&care, &[1, 2, 3]), (3, 100), "what works is trusted again");
        care.failed(&[3]);
        care.worked(&[3], 1);
        assert_eq!(next(&care, &[3]), (1, 100), "a batch of one needs no care beyond that");
    }

    #[test]
    fn one_large_event_leaves_no_room_and_shares_always_do() {
        let mut search = Search::new(Instant::now());
        assert!(!search.has_no_room(64, 16), "with nothing in flight there is always room");
        for (in_flight, full) in [(16, false), (48, false), (49, true), (1_000, true)] {
            search.bytes_in_flight = in_flight;
            assert_eq!(search.has_no_room(64, 16), full, "{in_flight}");
        }
        search.finished(&Finished { bytes: 1_000, ..Finished::default() });
        assert!(!search.has_no_room(64, 16));
    }
}
