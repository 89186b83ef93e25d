//! What becomes of an event that was not published, and how long to wait before the next try.
//!
//! Pure decisions: values in, values out; the caller brings the random number and the clock is the
//! database's. A rejection counts as an attempt and waits longer each time, until the event is a dead
//! letter. An event that NATS leaves unanswered while NATS itself is well is given a few tries free of
//! charge, as silence is no judgement. An outage is no failure of an event: it never comes here, and only
//! its pause is computed below.

use std::time::Duration;

use crate::event::Outcome;

/// How often an event may go unanswered in a row before silence counts as a rejection.
pub const MAX_UNANSWERED: u32 = 3;

/// Longest `last_error`, in characters.
pub const MAX_ERROR_CHARS: usize = 1_000;

const OUTAGE_PAUSE_FIRST: Duration = Duration::from_secs(1);
/// A try costs a connect and two small messages, so what bounds it is how soon after its end an outage should be noticed.
const OUTAGE_PAUSE_LONGEST: Duration = Duration::from_secs(5);
/// Full jitter may draw next to nothing; below this a pause would be a busy loop.
const OUTAGE_PAUSE_SHORTEST: Duration = Duration::from_millis(100);

/// The limits of the configuration: `dispatcher.max_attempts`, `backoff_initial` and `backoff_max`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Attempts that NATS judges before an event is a dead letter, at least 1.
    pub max_attempts: u32,
    /// Wait before the second attempt; doubles with each further one.
    pub backoff_initial: Duration,
    /// Longest wait between attempts.
    pub backoff_max: Duration,
}

/// Why an event was not published. `error` is in words that say what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// NATS refused the event; another try may fare better (a stream or a permission may be mended).
    Rejected {
        /// What NATS said.
        error: String,
    },
    /// No number of tries can help, as with an event over the server's `max_payload`.
    Hopeless {
        /// What is wrong with the event.
        error: String,
    },
    /// No ack came for this event, though NATS answered everything else.
    Unanswered {
        /// What was waited for.
        error: String,
        /// How many times in a row this event has now gone unanswered, this time included.
        repeats: u32,
    },
}

/// Decides what settling writes for an event that had `attempts_before` judged attempts and now `failure`.
///
/// `jitter` is a random number from 0 to 1; half of each wait is fixed, the other half drawn, so that
/// events refused together do not come back together, and none comes back at once.
pub fn decide(failure: &Failure, attempts_before: u32, policy: &Policy, jitter: f64) -> Outcome {
    let attempts = attempts_before.saturating_add(1);
    match failure {
        Failure::Hopeless { error } => Outcome::Dead { attempts, error: bounded(error) },
        Failure::Unanswered { error, repeats } if *repeats < MAX_UNANSWERED => Outcome::Retry {
            attempts: attempts_before,
            delay_ms: backoff_ms(*repeats, policy, jitter),
            error: bounded(error),
        },
        Failure::Rejected { error } | Failure::Unanswered { error, .. }
            if attempts >= policy.max_attempts =>
        {
            Outcome::Dead { attempts, error: bounded(error) }
        }
        Failure::Rejected { error } | Failure::Unanswered { error, .. } => {
            Outcome::Retry { attempts, delay_ms: backoff_ms(attempts, policy, jitter), error: bounded(error) }
        }
    }
}

/// How long publishing pauses during an outage before try number `tries` (0 for the first one): up to 1 s,
/// doubling to 5 s, all of it drawn by `jitter` (0 to 1), as a fleet of instances lost NATS at one moment
/// and must not return at one moment; never under 100 ms.
pub fn outage_backoff(tries: u32, jitter: f64) -> Duration {
    let ceiling = doubled(OUTAGE_PAUSE_FIRST, tries, OUTAGE_PAUSE_LONGEST);
    ceiling.mul_f64(unit(jitter)).max(OUTAGE_PAUSE_SHORTEST)
}

/// The wait after attempt number `attempt` (1 for the first), in whole milliseconds, at least 1.
fn backoff_ms(attempt: u32, policy: &Policy, jitter: f64) -> i64 {
    let full = doubled(policy.backoff_initial, attempt.saturating_sub(1), policy.backoff_max);
    let wait = full / 2 + (full / 2).mul_f64(unit(jitter));
    i64::try_from(wait.as_millis()).unwrap_or(i64::MAX).max(1)
}

/// `first`, doubled `times` times, at most `longest`.
fn doubled(first: Duration, times: u32, longest: Duration) -> Duration {
    1_u32.checked_shl(times).and_then(|factor| first.checked_mul(factor)).unwrap_or(longest).min(longest)
}

/// `jitter` within 0 to 1, whatever the caller drew: `mul_f64` panics on negative numbers and NaN.
fn unit(jitter: f64) -> f64 {
    if jitter.is_nan() { 0.5 } else { jitter.clamp(0.0, 1.0) }
}

/// An error text that a row can hold: at most [`MAX_ERROR_CHARS`] characters, and no NUL, which PostgreSQL
/// text cannot store.
fn bounded(error: &str) -> String {
    let error = error.replace('\0', " ");
    match error.char_indices().nth(MAX_ERROR_CHARS) {
        None => error,
        Some(_) => error.chars().take(MAX_ERROR_CHARS - 1).chain(['…']).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: Policy = Policy {
        max_attempts: 3,
        backoff_initial: Duration::from_secs(1),
        backoff_max: Duration::from_secs(300),
    };

    fn rejected() -> Failure {
        Failure::Rejected { error: "no".to_owned() }
    }
    fn hopeless() -> Failure {
        Failure::Hopeless { error: "no".to_owned() }
    }
    fn unanswered(repeats: u32) -> Failure {
        Failure::Unanswered { error: "no".to_owned(), repeats }
    }
    fn retry(attempts: u32, delay_ms: i64) -> Outcome {
        Outcome::Retry { attempts, delay_ms, error: "no".to_owned() }
    }
    fn dead(attempts: u32) -> Outcome {
        Outcome::Dead { attempts, error: "no".to_owned() }
    }

    #[test]
    fn a_failure_becomes_a_retry_or_a_dead_letter() {
        let cases = [
            (rejected(), 0, 0.0, retry(1, 500)),
            (rejected(), 0, 1.0, retry(1, 1_000)),
            (rejected(), 1, 0.0, retry(2, 1_000)),
            (rejected(), 1, 0.5, retry(2, 1_500)),
            (rejected(), 2, 0.5, dead(3)),
            // max_attempts was lowered below what the event already has.
            (rejected(), 9, 0.5, dead(10)),
            (rejected(), u32::MAX, 0.5, dead(u32::MAX)),
            (hopeless(), 0, 0.5, dead(1)),
            (hopeless(), 2, 0.5, dead(3)),
            (unanswered(1), 0, 0.0, retry(0, 500)),
            (unanswered(2), 0, 1.0, retry(0, 2_000)),
            (unanswered(3), 0, 1.0, retry(1, 1_000)),
            (unanswered(4), 1, 1.0, retry(2, 2_000)),
            (unanswered(5), 2, 1.0, dead(3)),
            (unanswered(2), 2, 1.0, retry(2, 2_000)),
            // A jitter out of its range is bent, not a panic.
            (rejected(), 0, -1.0, retry(1, 500)),
            (rejected(), 0, 7.0, retry(1, 1_000)),
            (rejected(), 0, f64::NAN, retry(1, 750)),
        ];
        for (failure, attempts_before, jitter, expected) in cases {
            let case = format!("{failure:?} after {attempts_before} attempts, jitter {jitter}");
            assert_eq!(decide(&failure, attempts_before, &POLICY, jitter), expected, "{case}");
        }
    }

    #[test]
    fn the_wait_doubles_up_to_the_longest() {
        let policy = Policy { max_attempts: u32::MAX, ..POLICY };
        let waits: Vec<i64> = [1, 2, 3, 9, 10, 31, 32, 33, 1_000, u32::MAX]
            .iter()
            .map(|&attempt| backoff_ms(attempt, &policy, 1.0))
            .collect();
        assert_eq!(
            waits,
            [1_000, 2_000, 4_000, 256_000, 300_000, 300_000, 300_000, 300_000, 300_000, 300_000]
        );
        let tiny = Policy { backoff_initial: Duration::from_nanos(1), ..POLICY };
        assert_eq!(backoff_ms(1, &tiny, 0.0), 1);
    }

    #[test]
    fn an_outage_pauses_from_a_tenth_of_a_second_to_five() {
        let cases = [
            (0, 1.0, 1_000),
            (0, 0.5, 500),
            (0, 0.0, 100),
            (1, 1.0, 2_000),
            (2, 1.0, 4_000),
            (3, 1.0, 5_000),
            (5, 0.1, 500),
            (u32::MAX, 1.0, 5_000),
            (u32::MAX, 0.0, 100),
        ];
        for (tries, jitter, expected_ms) in cases {
            let pause = outage_backoff(tries, jitter);
            assert_eq!(pause, Duration::from_millis(expected_ms), "try {tries}, jitter {jitter}");
        }
    }

    #[test]
    fn an_error_fits_its_column() {
        let exact = "é".repeat(MAX_ERROR_CHARS);
        assert_eq!(bounded(&exact), exact);
        let cut = bounded(&"é".repeat(MAX_ERROR_CHARS + 1));
        assert_eq!(cut.chars().count(), MAX_ERROR_CHARS);
        assert!(cut.ends_with("é…"));
        assert_eq!(bounded("a\0b"), "a b");
    }
}
