//! What became of one claim's events so far: one outcome each, the log line of a failure, and the counts to report.
//!
//! Both protocols write into it, on a worker's thread. It decides by the retry policy that the claim took when it began,
//! and brings what outlives the claim up to date. An event that is told nothing of stays untouched: its row stays as it
//! is, and no attempt counts. Sends nothing and never waits.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use crate::config::live::Settings;
use crate::event::retry::{self, Failure};
use crate::event::{Event, Outcome};
use crate::publish::memory::Memory;

/// What became of a claim's events.
#[derive(Debug)]
pub struct ClaimReport {
    /// One outcome for each event, in the claim's order.
    pub outcomes: Vec<Outcome>,
    /// How many of the published ones JetStream had already.
    pub duplicates: u64,
    /// Silent events that were put into retry without being charged an attempt.
    pub unanswered: u64,
}

impl ClaimReport {
    /// Of `count` events nothing was done.
    pub(super) fn untouched(count: usize) -> ClaimReport {
        ClaimReport { outcomes: vec![Outcome::Untouched; count], duplicates: 0, unanswered: 0 }
    }
}

/// One claim's events, and what became of each. Events are named by their index in the claim.
pub(super) struct Outcomes<'a> {
    events: &'a [Arc<Event>],
    live: &'a Settings,
    memory: &'a Memory,
    report: ClaimReport,
}

/// How a claim came back.
pub(super) struct Landed<'a> {
    /// What became of its events.
    pub(super) outcomes: Outcomes<'a>,
    /// Why NATS could not take all of them, if that is so: an outage.
    pub(super) outage: Option<String>,
    /// How many events were sent then, and neither stored nor judged.
    pub(super) in_flight: usize,
}

impl<'a> Outcomes<'a> {
    /// Nothing became of any of `events` yet.
    pub(super) fn of(events: &'a [Arc<Event>], live: &'a Settings, memory: &'a Memory) -> Outcomes<'a> {
        Outcomes { events, live, memory, report: ClaimReport::untouched(events.len()) }
    }

    pub(super) fn event(&self, index: usize) -> &'a Arc<Event> {
        &self.events[index]
    }

    /// The subject that an event is for.
    pub(super) fn subject(&self, index: usize) -> Cow<'a, str> {
        self.live.topic_map.subject(&self.events[index].topic)
    }

    /// True for an event that an earlier claim published and could not settle: nothing is left to do but that.
    pub(super) fn is_unsettled(&self, index: usize) -> bool {
        self.memory.unsettled.contains(self.events[index].id)
    }

    pub(super) fn is_untouched(&self, index: usize) -> bool {
        self.report.outcomes[index] == Outcome::Untouched
    }

    /// The event is stored, or over core NATS received.
    pub(super) fn published(&mut self, index: usize) {
        self.report.outcomes[index] = Outcome::Published;
        let event = &self.events[index];
        if event.in_retry {
            self.memory.unanswered.forget(event.id);
        }
    }

    /// JetStream had a message already.
    pub(super) fn duplicate(&mut self) {
        self.report.duplicates += 1;
    }

    /// No answer came to the event, though NATS answers otherwise; `error` says so.
    pub(super) fn unanswered(&mut self, index: usize, error: String) {
        let event = &self.events[index];
        let repeats = self.memory.unanswered.again(event.id);
        self.failed(index, &Failure::Unanswered { error, repeats });
        let charged = |attempts: u32| attempts > event.attempts;
        if matches!(self.report.outcomes[index], Outcome::Retry { attempts, .. } if !charged(attempts)) {
            self.report.unanswered += 1;
        }
    }

    /// Decides and logs what becomes of an event that failed.
    pub(super) fn failed(&mut self, index: usize, failure: &Failure) {
        let event = &self.events[index];
        let policy = &self.live.policy;
        let outcome = retry::decide(failure, event.attempts, policy, fastrand::f64());
        let subject = self.subject(index);
        let which = format!("event={} seq={} topic={} subject={subject}", event.id, event.seq, event.topic);
        let max = policy.max_attempts;
        match &outcome {
            Outcome::Retry { attempts, delay_ms, error } => {
                let next = Duration::from_millis(u64::try_from(*delay_ms).unwrap_or(0)).as_secs_f64();
                let what = what_happened(failure);
                log::warn!("{what}, will retry: {which} attempt={attempts}/{max} next={next:.1}s: {error}");
            }
            Outcome::Dead { attempts, error } => {
                log::error!("event is dead: {which} attempts={attempts}/{max}: {error}");
                self.memory.unanswered.forget(event.id);
            }
            Outcome::Published | Outcome::Untouched => {}
        }
        self.report.outcomes[index] = outcome;
    }

    /// The outcomes themselves, for who may still change them.
    pub(super) fn all_mut(&mut self) -> &mut [Outcome] {
        &mut self.report.outcomes
    }

    /// What is reported in the end.
    pub(super) fn report(self) -> ClaimReport {
        self.report
    }
}

/// How the line of an event that will be retried begins. Nobody refused an event that nobody answered.
fn what_happened(failure: &Failure) -> &'static str {
    match failure {
        Failure::Unanswered { .. } => "no ack",
        Failure::Rejected { .. } | Failure::Hopeless { .. } => "publish refused",
    }
}
