//! What the claimer knows of the lanes, and when it learnt it: which have something, which are claimed, how far each is
//! settled, and what to look at next.
//!
//! Plain data and decisions; the claimer's thread alone has it, and asks the database for it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::lane::marks::{Basis, Cursors};
use crate::lane::{ByLane, LANES, by_lane};
use crate::postgres::{LaneEnd, LaneLook, ServerLife, StoreError};
use crate::publish::{Finished, Job, ReadSummary};

/// Shortest rest, so that a retry that is due in a moment does not make the claimer spin.
pub(super) const REST_MIN: Duration = Duration::from_millis(5);
/// Time between two readings of the horizon while claims are made.
const HORIZON_INTERVAL: Duration = Duration::from_secs(1);
/// Time between two looks while lanes with events are known: how long a lane may wait to be found behind them.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// Shortest and longest rest while claims are under way; it doubles while nothing is found. Should the instance that
/// has them die, its lanes are found after the longest at the latest.
const NAP: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(250));
/// Time between two looks from the beginning, which may cost more than others.
pub(super) const REWIND_INTERVAL: Duration = Duration::from_secs(1);
/// A rest after which a wake-up is likely to mean a few events. Between the claims of a load there are shorter ones, and
/// a claim of the first few events that have come would only be one more.
const LONG_REST: Duration = Duration::from_millis(10);
/// Events that are worth a claim of their own. Each costs PostgreSQL and us some 2 ms whatever it holds, as much as 50
/// events do.
const WORTH_A_CLAIM: f64 = 250.0;
/// How much larger each next claim is of a lane in which one has failed.
const CARE_GROWTH: i32 = 4;

/// What the claimer knows of the lanes, and when it learnt it.
pub(super) struct Search {
    pub(super) cursors: Cursors,
    pub(super) care: Care,
    /// The life of the server that the cursors belong to.
    pub(super) server: ServerLife,
    /// Lanes that have something and that no worker of ours has; the one that waits longest comes first.
    pub(super) ready: VecDeque<i32>,
    /// Lanes that a worker of ours has.
    claimed: ByLane<bool>,
    /// Workers that wait for a claim.
    pub(super) idle_workers: usize,
    /// What the claims of the other workers hold at most.
    bytes_in_flight: usize,
    /// How workers read the lanes they were given, since somebody asked.
    news: ReadNews,
    /// How many events a lane that is ready has, by the last claims.
    events_a_lane: f64,
    /// The last nap, and the one before the last claim.
    nap: Duration,
    nap_before: Duration,
    /// Since when there was always something to claim.
    pub(super) awake_since: Option<Instant>,
    /// Since when there was never anything to claim.
    resting_since: Option<Instant>,
    /// The last claim was made without a look, and there may be more than it has.
    pub(super) look_at_once: bool,
    /// Where the next look begins.
    first_lane: i32,
    looked_at: Option<Instant>,
    horizon_at: Option<Instant>,
    rewound_at: Instant,
    /// Claims were made since the last look from the beginning.
    pub(super) claimed_since_rewind: bool,
    /// Claims were made since the last reading of the horizon.
    claimed_since_horizon: bool,
    /// It was said that cursors cannot be had.
    without_cursors: bool,
}

impl Search {
    pub(super) fn new(now: Instant) -> Search {
        Search {
            cursors: Cursors::default(),
            care: Care::default(),
            server: ServerLife::default(),
            ready: VecDeque::new(),
            claimed: by_lane(false),
            idle_workers: 0,
            bytes_in_flight: 0,
            news: ReadNews::default(),
            events_a_lane: WORTH_A_CLAIM,
            nap: Duration::ZERO,
            nap_before: Duration::ZERO,
            awake_since: None,
            resting_since: None,
            look_at_once: false,
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
    pub(super) fn finished(&mut self, finished: Finished) {
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
        match finished.read {
            Some(Ok(summary)) => self.was_read(summary, &finished.lanes),
            Some(Err(error)) => {
                let lanes: Vec<i32> = finished.lanes.iter().map(|end| end.lane).collect();
                if let Err(error) = self.claim_failed(&lanes, error) {
                    self.news.failed = Some(error);
                }
            }
            None => {}
        }
    }

    fn was_read(&mut self, summary: ReadSummary, lanes: &[LaneEnd]) {
        self.news.worked = true;
        if let Some(lane) = summary.too_large {
            self.care.failed(&[lane]);
        } else if summary.events == 0 {
            self.news.in_vain = true;
            self.nap = self.nap.max(self.nap_before);
        } else {
            self.weigh(summary.events, lanes.len(), lanes.iter().any(|lane| lane.more));
        }
    }

    /// A claim of `lanes` failed, and their next claims are made with care if they can be the reason.
    ///
    /// # Errors
    /// `error`, unless it says that an event cannot be read, which is what the care is for.
    pub(super) fn claim_failed(&mut self, lanes: &[i32], error: StoreError) -> Result<(), StoreError> {
        if error.sqlstate().is_some() {
            self.care.failed(lanes);
        }
        if !error.is_unreadable() {
            return Err(error);
        }
        log::warn!("claim failed, will read its lanes one by one: lanes={}: {error}", lanes.len());
        Ok(())
    }

    /// How workers read what they were given, since the last time.
    pub(super) fn take_news(&mut self) -> ReadNews {
        std::mem::take(&mut self.news)
    }

    /// A connection was lost, or the server is another: nothing that is known holds.
    pub(super) fn forget(&mut self) {
        self.cursors.clear();
        self.ready.clear();
        self.looked_at = None;
        self.horizon_at = None;
    }

    /// Begins at the beginning of every lane if that was not done for `interval`; returns whether it does.
    pub(super) fn rewind_after(&mut self, interval: Duration, now: Instant) -> bool {
        let due = now.saturating_duration_since(self.rewound_at) >= interval;
        if due {
            self.cursors.rewind();
            self.rewound_at = now;
            self.claimed_since_rewind = false;
        }
        due
    }

    /// Time until a look from the beginning may be made, if one should be made before a long rest.
    pub(super) fn next_rewind(&self, now: Instant) -> Option<Duration> {
        let rest = REWIND_INTERVAL.saturating_sub(now.saturating_duration_since(self.rewound_at));
        self.claimed_since_rewind.then_some(rest.max(REST_MIN))
    }

    /// Events can appear below any bound, so every read begins at the beginning.
    pub(super) fn go_without_cursors(&mut self) {
        self.cursors.clear();
        if !std::mem::replace(&mut self.without_cursors, true) {
            log::warn!(
                "claims read every lane from its beginning, which is slow: outboxes.seq must have a sequence of its own with CACHE 1"
            );
        }
    }

    pub(super) fn horizon_is_due(&mut self, now: Instant) -> bool {
        let long_ago = |at: Instant| now.saturating_duration_since(at) >= HORIZON_INTERVAL;
        let due = self.claimed_since_horizon && self.horizon_at.is_none_or(long_ago);
        if due {
            self.horizon_at = Some(now);
            self.claimed_since_horizon = false;
        }
        due
    }

    pub(super) fn look_is_due(&mut self, now: Instant) -> bool {
        let long_ago = |at: Instant| now.saturating_duration_since(at) >= LOOK_INTERVAL;
        let due = self.ready.is_empty() || self.looked_at.is_none_or(long_ago);
        if due {
            self.looked_at = Some(now);
        }
        due
    }

    /// The lanes to look into: those that are not ours now, beginning each time with another one.
    pub(super) fn unclaimed(&mut self) -> Vec<i32> {
        self.first_lane = (self.first_lane + 1) % LANES;
        let from = self.first_lane;
        (from..from + LANES).map(|lane| lane % LANES).filter(|&lane| !self.is_claimed(lane)).collect()
    }

    /// Those of the unclaimed lanes that need no care.
    pub(super) fn unclaimed_without_care(&mut self) -> Vec<i32> {
        let mut lanes = self.unclaimed();
        lanes.retain(|&lane| self.care.limit_of(lane).is_none());
        lanes
    }

    /// Takes in a look that began with `basis`.
    pub(super) fn found(&mut self, basis: Basis, found: &[LaneLook]) {
        for lane in found {
            if let Some(reach) = lane.reach {
                self.cursors.advance(basis, lane.lane, reach);
            }
            if lane.claimable && !self.ready.contains(&lane.lane) {
                self.ready.push_back(lane.lane);
            }
        }
    }

    /// There is nothing to claim.
    pub(super) fn rests(&mut self, now: Instant) {
        self.awake_since = None;
        self.resting_since.get_or_insert(now);
    }

    /// There was nothing to claim for so long that what has come since is little.
    pub(super) fn has_rested(&self, now: Instant) -> bool {
        self.resting_since.is_some_and(|since| now.saturating_duration_since(since) >= LONG_REST)
    }

    /// Takes the share of one free worker from the lanes that are ready, for a claim of `batch` events at most: as many
    /// as each of the free workers can have, or more where that would hardly be worth a claim.
    pub(super) fn take_share(&mut self, batch: i32) -> Vec<i32> {
        let alike = self.ready.len().div_ceil(self.idle_workers.max(1));
        let worthwhile = (WORTH_A_CLAIM.min(f64::from(batch)) / self.events_a_lane).ceil() as usize;
        let share = alike.max(worthwhile);
        let share = self.care.alike(self.ready.iter().copied().take(share));
        self.ready.drain(..share).collect()
    }

    /// Of the lanes that were `tried`, a claim of `max_events` could not take more than that many; the others are
    /// still to be tried. (Those that it tried and did not get are somebody else's.)
    pub(super) fn put_back(&mut self, tried: &[i32], got: &[i32], max_events: i32) {
        if usize::try_from(max_events).is_ok_and(|max| got.len() >= max) {
            for lane in tried.iter().rev().filter(|lane| !got.contains(lane)) {
                self.ready.push_front(*lane);
            }
        }
    }

    /// A claim went to a worker; returns for how long there was always something to claim.
    pub(super) fn sent(&mut self, job: &Job, now: Instant) -> Duration {
        self.idle_workers = self.idle_workers.saturating_sub(1);
        self.claimed_since_rewind = true;
        self.claimed_since_horizon = true;
        self.bytes_in_flight += job.bytes;
        for &lane in job.lanes() {
            self.set_claimed(lane, true);
        }
        self.nap_before = std::mem::take(&mut self.nap);
        self.resting_since = None;
        now.saturating_duration_since(*self.awake_since.get_or_insert(now))
    }

    /// A claim had so many events in so many lanes, and perhaps there were more.
    fn weigh(&mut self, events: usize, lanes: usize, more: bool) {
        let found = if more { WORTH_A_CLAIM } else { events as f64 / lanes.max(1) as f64 };
        self.events_a_lane = f64::midpoint(self.events_a_lane, found).max(1.0);
    }

    /// True while claims hold so much that one more could be too much: one of them is of a single large event.
    pub(super) fn has_no_room(&self, max_bytes: usize, claim_bytes: usize) -> bool {
        self.bytes_in_flight > 0 && self.bytes_in_flight.saturating_add(claim_bytes) > max_bytes
    }

    /// The next nap, while claims are under way.
    pub(super) fn nap(&mut self) -> Duration {
        self.nap = (self.nap * 2).clamp(NAP.0, NAP.1);
        self.nap
    }

    pub(super) fn has_claims(&self) -> bool {
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

/// How workers read the lanes they were given.
#[derive(Debug, Default)]
pub(super) struct ReadNews {
    /// Some reading worked.
    pub(super) worked: bool,
    /// Some reading found nothing: somebody else had settled it before.
    pub(super) in_vain: bool,
    /// The last one that failed, unless it will be told by [`Care`] why.
    pub(super) failed: Option<StoreError>,
}

/// Lanes in which a claim has failed: one of their events may be at fault. Such a lane is claimed alone, at first one
/// event and then, while it works, more and more; so the event at fault comes to be read alone.
pub(super) struct Care {
    /// By lane: events that a claim of it may have; `None` where there is no cause for care.
    limits: ByLane<Option<i32>>,
}

impl Default for Care {
    fn default() -> Care {
        Care { limits: by_lane(None) }
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

    /// Whether the claim of `lanes` needs care.
    pub(super) fn is_needed(&self, lanes: &[i32]) -> bool {
        lanes.iter().any(|&lane| self.limit_of(lane).is_some())
    }

    /// How many events a claim of `lanes` may have, which is `batch` unless care is needed.
    pub(super) fn limit(&self, lanes: &[i32], batch: i32) -> i32 {
        lanes.iter().filter_map(|&lane| self.limit_of(lane)).min().unwrap_or(batch).min(batch)
    }

    pub(super) fn failed(&mut self, lanes: &[i32]) {
        for &lane in lanes {
            self.set(lane, Some(1));
        }
    }

    pub(super) fn worked(&mut self, lanes: &[i32], batch: i32) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lane::marks::BEGINNING;

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
    fn how_workers_read_is_taken_in() {
        let mut search = Search::new(Instant::now());
        let read = |search: &mut Search, lane: i32, more: bool, read: Result<ReadSummary, StoreError>| {
            let lanes = vec![LaneEnd { lane, reach: BEGINNING, more }];
            let basis = Some(search.cursors.basis());
            search.finished(Finished { basis, lanes, read: Some(read), ..Finished::default() });
        };
        let error = |sqlstate: Option<&str>, outage: bool| StoreError {
            text: "it fails".into(),
            sqlstate: sqlstate.map(Into::into),
            outage,
        };
        read(&mut search, 1, false, Ok(ReadSummary { events: 7, too_large: None }));
        let news = search.take_news();
        assert!(news.worked && !news.in_vain && news.failed.is_none());
        read(&mut search, 2, false, Ok(ReadSummary { events: 0, too_large: None }));
        assert!(search.take_news().in_vain);
        read(&mut search, 3, true, Ok(ReadSummary { events: 0, too_large: Some(3) }));
        assert!(!search.take_news().in_vain && search.care.is_needed(&[3]));
        assert_eq!(search.ready, [3], "it is claimed again, with care");
        // Nobody knows which event it is, and the next claims will tell.
        read(&mut search, 4, false, Err(error(Some("22P05"), false)));
        let news = search.take_news();
        assert!(!news.worked && news.failed.is_none() && search.care.is_needed(&[4]));
        read(&mut search, 5, false, Err(error(None, true)));
        read(&mut search, 6, false, Err(error(Some("22P05"), false)));
        assert!(search.take_news().failed.is_some(), "one does not hide the other");
        assert!(!search.care.is_needed(&[5]), "it is no event's fault");
        assert!(search.take_news().failed.is_none(), "it is told once");
    }

    #[test]
    fn a_share_is_worth_a_claim() {
        let mut search = Search::new(Instant::now());
        let share = |search: &mut Search, batch: i32| {
            search.ready = (0..LANES).collect();
            search.idle_workers = 4;
            search.take_share(batch).len()
        };
        assert_eq!(share(&mut search, 5_000), 16, "of what is not known yet, every worker has a part");
        for _ in 0..40 {
            search.weigh(64, 32, false);
        }
        assert_eq!(share(&mut search, 5_000), 64, "few events are one claim");
        assert_eq!(share(&mut search, 40), 20, "but no more than it may hold");
        for _ in 0..40 {
            search.weigh(300, 32, false);
        }
        assert_eq!(share(&mut search, 5_000), 27);
        // A claim of all lanes that was full of the first events of each must not make the next one as wide.
        for _ in 0..40 {
            search.weigh(100, 64, true);
        }
        assert_eq!(share(&mut search, 100), 16, "where there is more, every worker has a part");
    }

    #[test]
    fn one_large_event_leaves_no_room_and_shares_always_do() {
        let mut search = Search::new(Instant::now());
        assert!(!search.has_no_room(64, 16), "with nothing in flight there is always room");
        for (in_flight, full) in [(16, false), (48, false), (49, true), (1_000, true)] {
            search.bytes_in_flight = in_flight;
            assert_eq!(search.has_no_room(64, 16), full, "{in_flight}");
        }
        search.finished(Finished { bytes: 1_000, ..Finished::default() });
        assert!(!search.has_no_room(64, 16));
    }
}
