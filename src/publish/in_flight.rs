//! What one claim has sent and not heard of: the runs in flight by their tokens, and when the wait for each ends.
//!
//! Bookkeeping of a JetStream flight, on a worker's thread. Everything in it is sent once and leaves once: answered,
//! denied, or given up when its time has passed. Deadlines stand in the order of sending, so the next one is the front's.
//! It knows nothing of sessions, never waits, and looks at no clock of its own.

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

/// Events of one key that wait for one answer: one event, or a batch of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Run {
    /// By index, each the successor of the one before. Never empty.
    events: Vec<usize>,
}

impl Run {
    /// A run of one event.
    pub(super) fn alone(index: usize) -> Run {
        Run { events: vec![index] }
    }

    /// A run of `events`, each the successor of the one before; `None` if there are none.
    pub(super) fn of(events: Vec<usize>) -> Option<Run> {
        (!events.is_empty()).then_some(Run { events })
    }

    pub(super) fn events(&self) -> &[usize] {
        &self.events
    }

    pub(super) fn first(&self) -> usize {
        self.events[0]
    }

    pub(super) fn last(&self) -> usize {
        self.events[self.events.len() - 1]
    }

    pub(super) fn is_batch(&self) -> bool {
        self.events.len() > 1
    }
}

/// What was sent and not answered.
#[derive(Debug, Default)]
pub(super) struct InFlight {
    /// By the token that the answer will carry.
    runs: HashMap<u64, Run>,
    /// How many events that are.
    events: usize,
    /// The tokens in the order of sending, with the time at which the wait for each ends; some may be answered.
    waits: VecDeque<(Instant, u64)>,
}

impl InFlight {
    /// A run was sent; its answer carries `token` and is waited for until `deadline`, which is no earlier than any before.
    pub(super) fn add(&mut self, token: u64, run: Run, deadline: Instant) {
        self.events += run.events.len();
        self.runs.insert(token, run);
        self.waits.push_back((deadline, token));
    }

    /// How many events were sent and not answered.
    pub(super) fn events(&self) -> usize {
        self.events
    }

    /// How many batches that are.
    pub(super) fn batches(&self) -> usize {
        self.runs.values().filter(|run| run.is_batch()).count()
    }

    /// When the next wait ends; `None` when nothing is waited for.
    pub(super) fn next_deadline(&mut self) -> Option<Instant> {
        while let Some((deadline, token)) = self.waits.front() {
            if self.runs.contains_key(token) {
                return Some(*deadline);
            }
            self.waits.pop_front();
        }
        None
    }

    /// Takes out what `token` answers; `None` for the answer to a claim that was settled before.
    pub(super) fn answered(&mut self, token: u64) -> Option<Run> {
        let run = self.runs.remove(&token)?;
        self.events -= run.events.len();
        Some(run)
    }

    /// Takes out the runs that `is_denied` is true for.
    pub(super) fn denied(&mut self, is_denied: impl Fn(&Run) -> bool) -> Vec<Run> {
        let denied = self.runs.iter().filter(|(_, run)| is_denied(run));
        let tokens: Vec<u64> = denied.map(|(&token, _)| token).collect();
        tokens.into_iter().filter_map(|token| self.answered(token)).collect()
    }

    /// Takes out what was waited for until `now` or before.
    pub(super) fn overdue(&mut self, now: Instant) -> Vec<(u64, Run)> {
        let mut overdue = Vec::new();
        while let Some(&(deadline, token)) = self.waits.front()
            && deadline <= now
        {
            self.waits.pop_front();
            overdue.extend(self.answered(token).map(|run| (token, run)));
        }
        overdue
    }

    /// Nothing is waited for any more; what is in flight stays so, and nobody will know of it.
    pub(super) fn stop_waiting(&mut self) {
        self.waits.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Tokens 1, 2 and 3, sent a second after each other: an event, a batch of three, an event.
    fn three(start: Instant) -> InFlight {
        let mut in_flight = InFlight::default();
        in_flight.add(1, Run::alone(0), start);
        in_flight.add(2, Run::of(vec![1, 2, 3]).unwrap(), start + Duration::from_secs(1));
        in_flight.add(3, Run::alone(4), start + Duration::from_secs(2));
        in_flight
    }

    #[test]
    fn an_answer_takes_its_run_out_once() {
        let mut in_flight = three(Instant::now());
        assert_eq!((in_flight.events(), in_flight.batches()), (5, 1));
        assert_eq!(in_flight.answered(2).unwrap().events(), [1, 2, 3]);
        assert_eq!((in_flight.events(), in_flight.batches()), (2, 0));
        assert_eq!(in_flight.answered(2), None);
        assert_eq!(in_flight.answered(9), None, "of a claim that was settled before");
        assert_eq!(in_flight.events(), 2);
    }

    #[test]
    fn the_next_deadline_is_that_of_the_first_without_an_answer() {
        let start = Instant::now();
        let mut in_flight = three(start);
        assert_eq!(in_flight.next_deadline(), Some(start));
        in_flight.answered(1);
        in_flight.answered(2);
        assert_eq!(in_flight.next_deadline(), Some(start + Duration::from_secs(2)));
        in_flight.answered(3);
        assert_eq!(in_flight.next_deadline(), None);
    }

    #[test]
    fn what_is_overdue_is_in_flight_no_more() {
        let start = Instant::now();
        let mut in_flight = three(start);
        in_flight.answered(1);
        let tokens =
            |overdue: Vec<(u64, Run)>| -> Vec<u64> { overdue.into_iter().map(|(token, _)| token).collect() };
        assert_eq!(tokens(in_flight.overdue(start + Duration::from_secs(1))), [2]);
        assert_eq!(in_flight.events(), 1);
        assert_eq!(in_flight.next_deadline(), Some(start + Duration::from_secs(2)));
    }

    #[test]
    fn a_denial_takes_out_whole_runs() {
        let mut in_flight = three(Instant::now());
        let denied = in_flight.denied(|run| run.events().contains(&2));
        assert_eq!(denied, [Run::of(vec![1, 2, 3]).unwrap()]);
        assert_eq!(in_flight.events(), 2);
    }

    #[test]
    fn what_nobody_waits_for_still_counts_as_in_flight() {
        let mut in_flight = three(Instant::now());
        in_flight.stop_waiting();
        assert_eq!(in_flight.next_deadline(), None);
        assert_eq!(in_flight.events(), 5);
    }
}
