//! What the claimer knows of the lanes, and when it learnt it: which have something, which are claimed, how far each is
//! settled, and what to look at next.
//!
//! Plain data and decisions; the claimer's thread alone has it, and asks the database for it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::share::Share;
use crate::lane::marks::{Basis, LaneEnd, Marks, Seen};
use crate::lane::writers::WriterSample;
use crate::lane::{ByLane, LANES, by_lane};
use crate::postgres::{Claim, Looked, StoreError};
use crate::publish::{Finished, Job, ReadSummary};

/// Shortest rest, so that a retry that is due in a moment does not make the claimer spin.
pub(super) const REST_MIN: Duration = Duration::from_millis(5);
/// Time between two looks while lanes with events are known: how long a lane may wait to be found behind them.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// Shortest and longest rest while claims are under way; it doubles while nothing is found. Should the instance that
/// has them die, its lanes are found after the longest at the latest.
const NAP: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(250));
/// A rest after which a wake-up is likely to mean a few events. Between the claims of a load there are shorter ones, and
/// a claim of the first few events that have come would only be one more.
const LONG_REST: Duration = Duration::from_millis(10);
/// How much larger each next claim is of a lane in which one has failed.
const CARE_GROWTH: i32 = 4;

/// What the claimer knows of the lanes, and when it learnt it.
pub(super) struct Search {
    pub(super) marks: Marks,
    pub(super) care: Care,
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
    /// How many lanes a claim takes.
    share: Share,
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
    /// Claims were made, or a rest has ended, since the last sample was asked for.
    pub(super) wants_sample: bool,
    /// When the last whole sample was asked for.
    pub(super) sampled_at: Option<Instant>,
    /// When the next retry of a lane that is not ours is due, by the last look.
    next_due: Option<Instant>,
}

impl Search {
    pub(super) fn new() -> Search {
        Search {
            marks: Marks::default(),
            care: Care::default(),
            ready: VecDeque::new(),
            claimed: by_lane(false),
            idle_workers: 0,
            bytes_in_flight: 0,
            news: ReadNews::default(),
            share: Share::default(),
            nap: Duration::ZERO,
            nap_before: Duration::ZERO,
            awake_since: None,
            resting_since: None,
            look_at_once: false,
            first_lane: fastrand::i32(0..LANES),
            looked_at: None,
            wants_sample: true,
            sampled_at: None,
            next_due: None,
        }
    }

    /// A worker is free.
    pub(super) fn finished(&mut self, finished: Finished) {
        self.idle_workers += 1;
        self.bytes_in_flight = self.bytes_in_flight.saturating_sub(finished.bytes);
        for &lane in &finished.lanes {
            self.set_claimed(lane, false);
        }
        self.wants_sample |= !finished.lanes.is_empty();
        if finished.database_failed {
            self.look_anew();
        }
        let (mut more, mut lanes) = (false, finished.lanes.len());
        if let Some((basis, ends)) = &finished.ends {
            lanes = ends.len();
            more = self.ended(basis, ends);
        }
        match finished.read {
            Some(Ok(summary)) => self.was_read(summary, lanes, more),
            Some(Err(error)) => {
                if let Err(error) = self.claim_failed(&finished.lanes, error) {
                    self.news.failed = Some(error);
                }
            }
            None => {}
        }
    }

    /// A claim's lanes ended so; returns whether there may be more in one of them.
    fn ended(&mut self, basis: &Basis, ends: &[LaneEnd]) -> bool {
        for end in ends {
            self.marks.ended(basis, end);
            if end.more && !self.ready.contains(&end.lane) {
                self.ready.push_back(end.lane);
            }
        }
        ends.iter().any(|end| end.more)
    }

    /// The claimer itself has read a lane, and there was nothing.
    pub(super) fn read_nothing(&mut self, claim: &Claim) {
        self.ended(&claim.basis(), &claim.ends([]));
    }

    fn was_read(&mut self, summary: ReadSummary, lanes: usize, more: bool) {
        self.news.worked = true;
        if let Some(lane) = summary.too_large {
            self.care.failed(&[lane]);
        }
        if summary.events > 0 {
            self.share.weigh(summary.events, summary.keys, lanes, more);
        } else if summary.too_large.is_none() && !more {
            self.news.in_vain = true;
            self.nap = self.nap.max(self.nap_before);
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

    /// The server is another, or began anew: nothing that is known holds.
    pub(super) fn forget(&mut self) {
        self.marks.forget();
        self.wants_sample = true;
        self.look_anew();
    }

    /// Something failed: what is known of who has something may be old.
    pub(super) fn look_anew(&mut self) {
        self.ready.clear();
        self.looked_at = None;
    }

    /// Takes in a sample of the writers, which was asked for at `asked_at`; returns whether a writer has ended since the last
    /// one, or everything was forgotten.
    pub(super) fn sampled(&mut self, sample: &WriterSample, asked_at: Instant) -> bool {
        let seen = self.marks.observe(sample);
        if seen == Seen::OtherLife {
            self.look_anew();
        }
        self.sampled_at = Some(asked_at);
        seen != Seen::NoEnd
    }

    pub(super) fn look_is_due(&mut self, now: Instant) -> bool {
        let long_ago = |at: Instant| now.saturating_duration_since(at) >= LOOK_INTERVAL;
        let due = self.ready.is_empty() || self.looked_at.is_none_or(long_ago);
        if due {
            self.looked_at = Some(now);
        }
        due
    }

    /// The lanes to look into: those that are not ours now, and of which nothing is known.
    pub(super) fn unknown(&mut self) -> Vec<i32> {
        let mut lanes = self.unclaimed();
        lanes.retain(|lane| !self.ready.contains(lane));
        lanes
    }

    /// The lanes that are not ours now, beginning each time with another one.
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

    /// Takes in a look.
    pub(super) fn looked(&mut self, looked: &Looked) {
        for &(lane, claimable) in &looked.lanes {
            if claimable {
                self.is_ready([lane]);
            } else {
                self.marks.looked(lane);
            }
        }
    }

    /// These lanes have something to claim.
    pub(super) fn is_ready(&mut self, lanes: impl IntoIterator<Item = i32>) {
        for lane in lanes {
            if !self.ready.contains(&lane) && !self.is_claimed(lane) {
                self.ready.push_back(lane);
            }
        }
    }

    /// The lanes that have events in retry, each with the time until the first is due.
    pub(super) fn due(&mut self, lanes: &[(i32, Duration)], now: Instant) {
        self.is_ready(lanes.iter().filter(|(_, due)| due.is_zero()).map(|(lane, _)| *lane));
        self.next_due =
            lanes.iter().map(|(_, due)| *due).filter(|due| !due.is_zero()).min().map(|due| now + due);
    }

    /// Time until the next retry is due; `None` when none is.
    pub(super) fn next_due(&self, now: Instant) -> Option<Duration> {
        self.next_due.map(|at| at.saturating_duration_since(now))
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

    /// Takes the share of one free worker from the lanes that are ready, for a claim that reads `batch` events at once.
    pub(super) fn take_share(&mut self, batch: i32) -> Vec<i32> {
        let share = self.share.lanes(self.ready.len(), self.idle_workers, batch);
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
        self.wants_sample = true;
        self.bytes_in_flight += job.bytes;
        for lane in job.lanes() {
            self.set_claimed(lane, true);
            self.marks.claimed(lane);
        }
        self.nap_before = std::mem::take(&mut self.nap);
        self.resting_since = None;
        now.saturating_duration_since(*self.awake_since.get_or_insert(now))
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
    use crate::lane::marks::LaneRow;
    use std::sync::Arc;

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
        let mut search = Search::new();
        let read = |search: &mut Search, lane: i32, more: bool, read: Result<ReadSummary, StoreError>| {
            let end =
                LaneEnd { lane, row: LaneRow::default(), reached: None, left_out: Arc::default(), more };
            let ends = read.is_ok().then(|| (search.marks.basis(), vec![end]));
            search.finished(Finished { lanes: vec![lane], ends, read: Some(read), ..Finished::default() });
        };
        let error = |sqlstate: Option<&str>, outage: bool| StoreError {
            text: "it fails".into(),
            sqlstate: sqlstate.map(Into::into),
            outage,
        };
        read(&mut search, 1, false, Ok(ReadSummary { events: 7, keys: 7, too_large: None }));
        let news = search.take_news();
        assert!(news.worked && !news.in_vain && news.failed.is_none());
        read(&mut search, 2, false, Ok(ReadSummary { events: 0, keys: 0, too_large: None }));
        assert!(search.take_news().in_vain);
        read(&mut search, 3, true, Ok(ReadSummary { events: 0, keys: 0, too_large: Some(3) }));
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
    fn one_large_event_leaves_no_room_and_shares_always_do() {
        let mut search = Search::new();
        assert!(!search.has_no_room(64, 16), "with nothing in flight there is always room");
        for (in_flight, full) in [(16, false), (48, false), (49, true), (1_000, true)] {
            search.bytes_in_flight = in_flight;
            assert_eq!(search.has_no_room(64, 16), full, "{in_flight}");
        }
        search.finished(Finished { bytes: 1_000, ..Finished::default() });
        assert!(!search.has_no_room(64, 16));
    }
}
