//! The last quarter of an hour, for the status page: rates, lag and latency as they were, and what waits now.
//!
//! [`Recent`] belongs to the thread `http`, which reads the counters every [`STEP`] and keeps what came of it for
//! [`WINDOW`]: a page that is opened later shows what was before. It holds at most [`MAX_SAMPLES`] samples, of some
//! hundred bytes each, whatever happens. [`Waiting`] is where the janitor leaves the events in retry and the dead
//! letters that it has seen last, so that a look at the page asks the database nothing. Neither ever holds a payload,
//! metadata or a key.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::ops::metrics::{Durations, Totals};
use crate::postgres::{DeadLetter, Retry};

/// Time between two samples.
pub const STEP: Duration = Duration::from_secs(5);
/// How long a sample is kept.
pub const WINDOW: Duration = Duration::from_secs(15 * 60);
/// Samples of a window.
pub const MAX_SAMPLES: usize = (WINDOW.as_secs() / STEP.as_secs()) as usize;
/// Events in retry, and dead letters, that are shown at most.
pub const MAX_LISTED: usize = 20;
/// Characters of a reason that are shown at most.
pub const MAX_REASON: usize = 500;

/// What the janitor has seen of what waits. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Waiting(Arc<Mutex<LastSeen>>);

/// What waits, as last seen.
#[derive(Debug, Clone, Default)]
pub struct LastSeen {
    /// When the backlog was last counted.
    pub counted: Option<Instant>,
    /// The last try to count it succeeded.
    pub known: bool,
    /// The events in retry that are due first, [`MAX_LISTED`] at most.
    pub retries: Vec<Retry>,
    /// The newest dead letters, [`MAX_LISTED`] at most.
    pub dead_letters: Vec<DeadLetter>,
}

impl Waiting {
    /// The backlog was counted.
    pub fn counted(&self) {
        let mut seen = self.lock();
        seen.counted = Some(Instant::now());
        seen.known = true;
    }

    /// The backlog could not be counted: what was counted before may no longer be so.
    pub fn count_failed(&self) {
        self.lock().known = false;
    }

    /// Events in retry and dead letters were read. What is too many or too long is cut off.
    pub fn listed(&self, mut retries: Vec<Retry>, mut dead_letters: Vec<DeadLetter>) {
        retries.truncate(MAX_LISTED);
        dead_letters.truncate(MAX_LISTED);
        retries.iter_mut().for_each(|retry| shorten(&mut retry.reason));
        dead_letters.iter_mut().for_each(|letter| shorten(&mut letter.reason));
        let mut seen = self.lock();
        (seen.retries, seen.dead_letters) = (retries, dead_letters);
    }

    /// A copy.
    pub fn seen(&self) -> LastSeen {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, LastSeen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Cuts `reason` to [`MAX_REASON`] characters, and shows that it did.
fn shorten(reason: &mut String) {
    if let Some((end, _)) = reason.char_indices().nth(MAX_REASON) {
        reason.truncate(end);
        reason.push('…');
    }
}

/// The counters and gauges at one moment.
#[derive(Debug, Clone)]
pub struct Counters {
    /// The moment.
    pub at: Instant,
    /// Counts since the start, and gauges.
    pub totals: Totals,
    /// The backlog's gauges are up to date.
    pub known: bool,
    /// NATS cannot judge events.
    pub outage: bool,
    /// How long claims were held.
    pub claims: Durations,
    /// How long publishing took.
    pub publishes: Durations,
    /// How long settling took.
    pub settles: Durations,
}

/// What happened between two readings.
#[derive(Debug, Clone, PartialEq)]
struct Sample {
    at: Instant,
    published_per_second: f64,
    rejected_per_second: f64,
    backlog: Option<BacklogSample>,
    claim_p50: Option<f64>,
    claim_p99: Option<f64>,
    publish_mean: Option<f64>,
    settle_mean: Option<f64>,
    outage: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct BacklogSample {
    lag: f64,
    pending: u64,
    retrying: u64,
    dead: u64,
}

/// The samples of the last [`WINDOW`].
#[derive(Debug, Default)]
pub struct Recent {
    last: Option<Counters>,
    samples: VecDeque<Sample>,
}

/// The samples, oldest first: the n-th entries of all columns belong together. `null`: not known then, or nothing
/// happened that could be measured.
#[derive(Debug, Default, PartialEq, Serialize)]
pub struct Columns {
    /// How long ago, in seconds.
    pub age_seconds: Vec<f64>,
    /// Events published, over the step before.
    pub published_per_second: Vec<f64>,
    /// Attempts that were rejected, over the step before.
    pub rejected_per_second: Vec<f64>,
    /// Age of the oldest pending event.
    pub lag_seconds: Vec<Option<f64>>,
    /// Events pending.
    pub pending: Vec<Option<u64>>,
    /// Events in retry.
    pub retrying: Vec<Option<u64>>,
    /// Dead letters.
    pub dead: Vec<Option<u64>>,
    /// Half of the claims of the step were held no longer.
    pub claim_p50_seconds: Vec<Option<f64>>,
    /// All but one in a hundred were held no longer.
    pub claim_p99_seconds: Vec<Option<f64>>,
    /// Mean time to publish a claim's events.
    pub publish_mean_seconds: Vec<Option<f64>>,
    /// Mean time to settle a claim.
    pub settle_mean_seconds: Vec<Option<f64>>,
    /// There was an outage of NATS.
    pub outage: Vec<bool>,
}

impl Recent {
    /// Whether the time has come for another reading.
    pub fn is_due(&self, now: Instant) -> bool {
        self.last.as_ref().is_none_or(|last| now.saturating_duration_since(last.at) >= STEP)
    }

    /// Takes a reading; what happened since the one before becomes a sample. The first one makes none.
    pub fn take(&mut self, reading: Counters) {
        let at = reading.at;
        if let Some(last) = &self.last
            && let Some(sample) = between(last, &reading)
        {
            self.samples.push_back(sample);
        }
        self.last = Some(reading);
        while self.samples.len() > MAX_SAMPLES
            || self.samples.front().is_some_and(|first| at.saturating_duration_since(first.at) > WINDOW)
        {
            self.samples.pop_front();
        }
    }

    /// The samples as they are seen at `now`.
    pub fn columns(&self, now: Instant) -> Columns {
        let mut columns = Columns::default();
        for sample in &self.samples {
            let age = now.saturating_duration_since(sample.at);
            columns.age_seconds.push(rounded(age.as_secs_f64(), 10.0));
            columns.published_per_second.push(rounded(sample.published_per_second, 10.0));
            columns.rejected_per_second.push(rounded(sample.rejected_per_second, 10.0));
            columns.lag_seconds.push(sample.backlog.map(|backlog| rounded(backlog.lag, 1000.0)));
            columns.pending.push(sample.backlog.map(|backlog| backlog.pending));
            columns.retrying.push(sample.backlog.map(|backlog| backlog.retrying));
            columns.dead.push(sample.backlog.map(|backlog| backlog.dead));
            columns.claim_p50_seconds.push(sample.claim_p50.map(microseconds));
            columns.claim_p99_seconds.push(sample.claim_p99.map(microseconds));
            columns.publish_mean_seconds.push(sample.publish_mean.map(microseconds));
            columns.settle_mean_seconds.push(sample.settle_mean.map(microseconds));
            columns.outage.push(sample.outage);
        }
        columns
    }
}

/// What happened from one reading to the next; nothing can be said of no time.
fn between(before: &Counters, after: &Counters) -> Option<Sample> {
    let seconds = after.at.checked_duration_since(before.at)?.as_secs_f64();
    if seconds <= 0.0 {
        return None;
    }
    let per_second = |before: u64, after: u64| after.saturating_sub(before) as f64 / seconds;
    let totals = &after.totals;
    Some(Sample {
        at: after.at,
        published_per_second: per_second(before.totals.published, totals.published),
        rejected_per_second: per_second(before.totals.failed, totals.failed),
        backlog: after.known.then_some(BacklogSample {
            lag: totals.lag_seconds,
            pending: totals.pending,
            retrying: totals.retrying,
            dead: totals.dead,
        }),
        claim_p50: quantile(0.5, &before.claims, &after.claims),
        claim_p99: quantile(0.99, &before.claims, &after.claims),
        publish_mean: mean(&before.publishes, &after.publishes),
        settle_mean: mean(&before.settles, &after.settles),
        outage: after.outage,
    })
}

/// The duration that the part `q` (0 to 1) of what came between two readings did not exceed, in seconds; evenly spread
/// within its bucket, as Prometheus' `histogram_quantile` has it, and the highest bound for what is above all.
fn quantile(q: f64, before: &Durations, after: &Durations) -> Option<f64> {
    let count = after.count.checked_sub(before.count).filter(|count| *count > 0)?;
    let rank = q * count as f64;
    let (mut lower, mut below) = (0.0, 0.0);
    for (index, (upper, cumulative)) in after.buckets.iter().enumerate() {
        let earlier = before.buckets.get(index).map_or(0, |(_, cumulative)| *cumulative);
        let up_to_here = cumulative.saturating_sub(earlier) as f64;
        if up_to_here >= rank && up_to_here > below {
            return Some(lower + (upper - lower) * (rank - below) / (up_to_here - below));
        }
        (lower, below) = (*upper, up_to_here);
    }
    Some(lower)
}

/// The mean duration of what came between two readings, in seconds.
fn mean(before: &Durations, after: &Durations) -> Option<f64> {
    let count = after.count.checked_sub(before.count).filter(|count| *count > 0)?;
    Some((after.sum - before.sum).max(0.0) / count as f64)
}

fn rounded(value: f64, per_unit: f64) -> f64 {
    (value * per_unit).round() / per_unit
}

fn microseconds(seconds: f64) -> f64 {
    rounded(seconds, 1_000_000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn durations(counts: &[u64], sum: f64) -> Durations {
        let bounds = [0.01, 0.1, 1.0];
        let mut cumulative = 0;
        let buckets = bounds
            .into_iter()
            .zip(counts)
            .map(|(bound, count)| {
                cumulative += count;
                (bound, cumulative)
            })
            .collect();
        Durations { buckets, count: counts.iter().sum(), sum }
    }

    fn reading(at: Instant, published: u64, failed: u64, pending: u64) -> Counters {
        let totals = Totals {
            published,
            failed,
            dead_letters: 0,
            pending,
            retrying: 2,
            dead: 1,
            lag_seconds: pending as f64 / 10.0,
        };
        let (known, outage) = (true, false);
        let none = Durations::default();
        Counters { at, totals, known, outage, claims: none.clone(), publishes: none.clone(), settles: none }
    }

    #[test]
    fn a_quantile_lies_within_its_bucket() {
        for (q, before, after, expected) in [
            // Nothing came.
            (0.5, [0, 0, 0, 0], [0, 0, 0, 0], None),
            (0.5, [5, 5, 5, 5], [5, 5, 5, 5], None),
            // A counter that went back, which a restart does, says nothing.
            (0.5, [5, 0, 0, 0], [1, 0, 0, 0], None),
            (0.5, [0, 0, 0, 0], [10, 0, 0, 0], Some(0.005)),
            (1.0, [0, 0, 0, 0], [10, 0, 0, 0], Some(0.01_f64)),
            (0.5, [0, 0, 0, 0], [0, 10, 0, 0], Some(0.055)),
            // Only what came since counts.
            (0.5, [100, 0, 0, 0], [100, 0, 10, 0], Some(0.55)),
            (0.5, [0, 0, 0, 0], [50, 50, 0, 0], Some(0.01)),
            (0.75, [0, 0, 0, 0], [50, 50, 0, 0], Some(0.055)),
            // Above the last bound: at least that.
            (0.99, [0, 0, 0, 0], [0, 0, 0, 3], Some(1.0)),
        ] {
            let found = quantile(q, &durations(&before, 0.0), &durations(&after, 0.0));
            let close = match (found, expected) {
                (Some(found), Some(expected)) => (found - expected).abs() < 1e-9,
                (found, expected) => found.is_none() && expected.is_none(),
            };
            assert!(close, "{q} {before:?} {after:?}: {found:?}, not {expected:?}");
        }
        assert_eq!(mean(&durations(&[1, 0, 0], 1.0), &durations(&[3, 0, 0], 4.0)), Some(1.5));
        assert_eq!(mean(&durations(&[1, 0, 0], 1.0), &durations(&[1, 0, 0], 1.0)), None);
    }

    #[test]
    fn a_sample_is_what_came_between_two_readings() {
        let begun = Instant::now();
        let mut recent = Recent::default();
        assert!(recent.is_due(begun));
        recent.take(reading(begun, 1_000, 10, 7));
        assert_eq!(recent.columns(begun), Columns::default(), "one reading says nothing of a rate");
        assert!(!recent.is_due(begun + STEP / 2) && recent.is_due(begun + STEP));
        recent.take(reading(begun + Duration::from_secs(5), 2_000, 11, 30));
        let unknown = Counters { known: false, outage: true, ..reading(begun + STEP * 2, 2_000, 11, 30) };
        recent.take(unknown);
        let columns = recent.columns(begun + Duration::from_secs(13));
        assert_eq!(columns.age_seconds, [8.0, 3.0]);
        assert_eq!(columns.published_per_second, [200.0, 0.0]);
        assert_eq!(columns.rejected_per_second, [0.2, 0.0]);
        assert_eq!(columns.lag_seconds, [Some(3.0), None]);
        assert_eq!(columns.pending, [Some(30), None]);
        assert_eq!((columns.retrying[0], columns.dead[0]), (Some(2), Some(1)));
        assert_eq!(columns.outage, [false, true]);
        assert_eq!(columns.claim_p50_seconds, [None, None]);
    }

    #[test]
    fn samples_are_kept_for_a_window_and_no_longer() {
        let begun = Instant::now();
        let mut recent = Recent::default();
        for step in 0..3 * u32::try_from(MAX_SAMPLES).unwrap() {
            recent.take(reading(begun + STEP * step, 0, 0, 0));
            recent.take(reading(begun + STEP * step, 0, 0, 0));
            assert!(recent.samples.len() <= MAX_SAMPLES);
        }
        assert_eq!(recent.samples.len(), MAX_SAMPLES);
        // After a long pause there is nothing left of before.
        recent.take(reading(begun + STEP * 100_000, 0, 0, 0));
        assert_eq!(recent.samples.len(), 1);
    }

    #[test]
    fn what_waits_is_cut_to_what_is_shown() {
        let waiting = Waiting::default();
        assert!(!waiting.seen().known);
        waiting.counted();
        assert!(waiting.seen().known && waiting.seen().counted.is_some());
        waiting.count_failed();
        assert!(!waiting.seen().known && waiting.seen().counted.is_some());
        let retry = Retry {
            seq: 1,
            topic: "a".to_string(),
            attempts: 1,
            reason: "ä".repeat(MAX_REASON + 1),
            next_attempt_at_ms: 0,
        };
        waiting.listed(vec![retry; MAX_LISTED + 1], Vec::new());
        let seen = waiting.seen();
        assert_eq!(seen.retries.len(), MAX_LISTED);
        assert_eq!(seen.retries[0].reason.chars().count(), MAX_REASON + 1);
        assert!(seen.retries[0].reason.ends_with('…'));
    }
}
