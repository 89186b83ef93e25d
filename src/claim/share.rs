//! How many lanes a claim takes, by what the last claims found in theirs.
//!
//! Few events are one claim, as each costs PostgreSQL and us some 2 ms whatever it holds. Under a deep backlog a claim takes
//! as few lanes as keep NATS busy, and more of each: a settle finds room on an event's own page only while few of that page's
//! events are settled at about the same time, by all workers together, and the events of a page are of any lane. Of 1,000 keys,
//! 5 workers and pages filled to 70 %, 1 lane a claim kept all updates on their pages, 3 lanes 97 to 99 %; 1 lane took a
//! fifth more of our processor time and of nats-server's, as each wait is for fewer acks.
//!
//! Plain data and one decision; the claimer's thread alone has it.

use crate::lane::ENOUGH_KEYS;
use crate::publish::READ_ON_EVENTS;

/// Events that are worth a claim of their own: 50 of them cost as much as the claim itself.
const WORTH_A_CLAIM: f64 = 250.0;
/// Events that are plenty for a claim, which reads on until it has so many.
const PLENTY: f64 = READ_ON_EVENTS as f64;
/// Keys that are enough for a claim.
const KEYS: f64 = ENOUGH_KEYS as f64;

/// What the lanes that are ready have, as far as the last claims tell.
pub(super) struct Share {
    /// Events of a lane.
    events: f64,
    /// Keys of a lane that had more than its claim took.
    keys: f64,
}

impl Default for Share {
    /// Of a backlog that nobody has seen yet: if it is none, the first claims show it.
    fn default() -> Share {
        Share { events: PLENTY, keys: KEYS }
    }
}

impl Share {
    /// A claim had so many events, of so many keys, in so many lanes, and perhaps there were more.
    pub(super) fn weigh(&mut self, events: usize, keys: usize, lanes: usize, more: bool) {
        let of_lane = |count: usize| count as f64 / lanes.max(1) as f64;
        let found = if more { PLENTY } else { of_lane(events) };
        self.events = f64::midpoint(self.events, found).max(1.0);
        if more {
            self.keys = f64::midpoint(self.keys, of_lane(keys)).max(1.0);
        }
    }

    /// How many of the lanes that are ready the next claim takes, which reads `batch` events at once: as many as each of the
    /// free workers can have; fewer where these have plenty; more where that would hardly be worth a claim.
    pub(super) fn lanes(&self, ready: usize, idle_workers: usize, batch: i32) -> usize {
        let batch = f64::from(batch);
        let alike = ready.div_ceil(idle_workers.max(1));
        let plenty = (batch.max(PLENTY) / self.events).floor().max((KEYS / self.keys).ceil());
        let worthwhile = (WORTH_A_CLAIM.min(batch) / self.events).ceil() as usize;
        alike.min(plenty as usize).max(worthwhile).min(ready)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_worth_a_claim() {
        let mut share = Share::default();
        let after = |share: &mut Share, events: usize, keys: usize, lanes: usize, more: bool| {
            (0..40).for_each(|_| share.weigh(events, keys, lanes, more));
        };
        assert_eq!(share.lanes(64, 4, 100), 1, "of a backlog that nobody has seen");
        after(&mut share, 64, 64, 32, false);
        assert_eq!(share.lanes(64, 4, 5_000), 64, "few events are one claim");
        assert_eq!(share.lanes(64, 4, 40), 20, "but no more than it may hold");
        after(&mut share, 300, 300, 32, false);
        assert_eq!(share.lanes(64, 4, 5_000), 27);
        // A claim of all lanes that was full of the first events of each must not make the next one as wide.
        after(&mut share, 1_000, 1_000, 64, true);
        assert_eq!(share.lanes(64, 4, 100), 3, "where there is more, few lanes have plenty");
        assert_eq!(share.lanes(64, 4, 5_000), 5, "and a few more for a claim that may have more");
    }

    #[test]
    fn lanes_of_few_keys_go_together() {
        let mut share = Share::default();
        (0..40).for_each(|_| share.weigh(1_000, 4, 1, true));
        assert_eq!(share.lanes(64, 4, 100), 10, "one event of a key is in flight at a time");
        assert_eq!(share.lanes(16, 4, 100), 4, "the other workers have theirs");
        assert_eq!(share.lanes(1, 4, 100), 1);
    }
}
