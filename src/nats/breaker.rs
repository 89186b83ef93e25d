//! Whether NATS can take events now, and when to try again: the gate in front of every claim.
//!
//! Open: claims are made. An outage closes the gate; every try that fails doubles the wait, from 1 s to 5 s
//! with full jitter. When connection and stream answer again the gate is on trial: claims are made, and the
//! first stored event (or having nothing to publish) ends the outage, while another refusal closes it again
//! with the next wait. So an outage that only publishing can see (a full stream answers every question but
//! takes nothing) is not taken for over by a probe. One outage is one line in the log when it begins and one
//! when it ends, however many tries lie between.
//!
//! Pure: time and chance come in as arguments.

use std::time::{Duration, Instant};

use crate::event::retry;

/// The gate's state.
#[derive(Debug, Clone)]
pub enum Gate {
    /// No outage.
    Open,
    /// NATS cannot take events; tried again at `next_try`.
    Closed {
        /// The outage.
        outage: Outage,
        /// When to probe again.
        next_try: Instant,
    },
    /// The probe passed; the next publish decides.
    Trial {
        /// The outage that may be over.
        outage: Outage,
    },
}

/// One outage, from its first sign to the next stored event.
#[derive(Debug, Clone)]
pub struct Outage {
    /// What NATS said, or did not say, last.
    pub cause: String,
    /// When it began.
    pub since: Instant,
    /// Failed tries so far.
    pub tries: u32,
}

/// What a change of the gate is to the one who logs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GateChange {
    /// Nothing to say.
    None,
    /// An outage begins; the next try comes after this wait.
    Begins(Duration),
    /// The outage goes on; the next try comes after this wait.
    GoesOn(Duration),
    /// The outage is over; it lasted so long.
    Ends(Duration),
}

impl Gate {
    /// Whether claims may be made.
    pub fn lets_through(&self) -> bool {
        !matches!(self, Gate::Closed { .. })
    }

    /// The outage, if there is one.
    pub fn outage(&self) -> Option<&Outage> {
        match self {
            Gate::Open => None,
            Gate::Closed { outage, .. } | Gate::Trial { outage } => Some(outage),
        }
    }

    /// NATS cannot take events, says `cause`. `jitter` is uniform in 0..1.
    ///
    /// Workers that report the same outage one after another do not prolong it: a closed gate only takes the
    /// newer cause from [`Gate::try_failed`].
    pub fn close(&mut self, cause: &str, now: Instant, jitter: f64) -> GateChange {
        match self {
            Gate::Closed { .. } => GateChange::None,
            Gate::Open => {
                let wait = retry::outage_backoff(0, jitter);
                let outage = Outage { cause: cause.to_string(), since: now, tries: 0 };
                *self = Gate::Closed { outage, next_try: now + wait };
                GateChange::Begins(wait)
            }
            Gate::Trial { outage } => {
                let (since, tries) = (outage.since, outage.tries);
                self.wait_again(since, tries, cause, now, jitter)
            }
        }
    }

    /// A probe of the closed gate failed, says `cause`.
    pub fn try_failed(&mut self, cause: &str, now: Instant, jitter: f64) -> GateChange {
        match self {
            Gate::Closed { outage, .. } => {
                let (since, tries) = (outage.since, outage.tries);
                self.wait_again(since, tries, cause, now, jitter)
            }
            Gate::Open | Gate::Trial { .. } => self.close(cause, now, jitter),
        }
    }

    fn wait_again(
        &mut self,
        since: Instant,
        tries: u32,
        cause: &str,
        now: Instant,
        jitter: f64,
    ) -> GateChange {
        let tries = tries.saturating_add(1);
        let wait = retry::outage_backoff(tries, jitter);
        let outage = Outage { cause: cause.to_string(), since, tries };
        *self = Gate::Closed { outage, next_try: now + wait };
        GateChange::GoesOn(wait)
    }

    /// A probe of the closed gate passed: the next publish decides.
    pub fn try_passed(&mut self) {
        if let Gate::Closed { outage, .. } = self {
            *self = Gate::Trial { outage: outage.clone() };
        }
    }

    /// An event was stored, or there is none to publish: a trial is passed.
    pub fn confirm(&mut self, now: Instant) -> GateChange {
        match self {
            Gate::Trial { outage } => {
                let lasted = now.saturating_duration_since(outage.since);
                *self = Gate::Open;
                GateChange::Ends(lasted)
            }
            // An ack that was on its way when the gate closed proves nothing about now.
            Gate::Open | Gate::Closed { .. } => GateChange::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_begins_once_and_ends_once() {
        let start = Instant::now();
        let mut gate = Gate::Open;
        assert!(matches!(gate.close("no ack", start, 0.5), GateChange::Begins(_)));
        assert_eq!(gate.close("no ack", start, 0.5), GateChange::None, "another worker saw the same outage");
        assert!(!gate.lets_through());
        assert!(matches!(gate.try_failed("refused", start, 0.5), GateChange::GoesOn(_)));
        assert_eq!(gate.outage().unwrap().cause, "refused");
        gate.try_passed();
        assert!(gate.lets_through());
        assert!(matches!(gate.close("stream full", start, 0.5), GateChange::GoesOn(_)));
        gate.try_passed();
        let later = start + Duration::from_secs(9);
        assert_eq!(gate.confirm(later), GateChange::Ends(Duration::from_secs(9)));
        assert!(gate.outage().is_none());
    }

    #[test]
    fn a_late_ack_does_not_open_a_closed_gate() {
        let now = Instant::now();
        let mut gate = Gate::Open;
        gate.close("gone", now, 0.5);
        assert_eq!(gate.confirm(now), GateChange::None);
        assert!(!gate.lets_through());
    }

    #[test]
    fn waits_grow_while_trials_fail() {
        let now = Instant::now();
        let mut gate = Gate::Open;
        let mut waits = Vec::new();
        if let GateChange::Begins(wait) = gate.close("full", now, 0.999) {
            waits.push(wait);
        }
        for _ in 0..8 {
            gate.try_passed();
            if let GateChange::GoesOn(wait) = gate.close("full", now, 0.999) {
                waits.push(wait);
            }
        }
        assert_eq!(waits.len(), 9);
        assert!(waits.is_sorted() && waits[8] > Duration::from_secs(4), "{waits:?}");
        assert!(waits[8] <= Duration::from_secs(5));
    }
}
