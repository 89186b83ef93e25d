//! Judges what was not answered: whether that is an outage, or the fault of one event.
//!
//! A JetStream flight comes here when it has waited for everything. A probe decides: if server and stream answer, an
//! event that got no ack is *unanswered*, it alone; if not, it is an outage, and nothing is charged to any event. "Nobody
//! takes this subject" is judged by the stream's own subjects, as a change of its leader answers so too. Runs on a
//! worker's thread and waits for the probe, with a deadline.

use std::collections::HashMap;
use std::sync::Arc;

use crate::event::retry::Failure;
use crate::nats::ProbeFailure;
use crate::nats::answer::{Answer, StreamFacts};
use crate::publish::in_flight::Run;
use crate::publish::outcomes::Outcomes;
use crate::publish::wire::Wire;

/// How the reason begins for an event that nobody answered: whether it was stored, nobody knows.
pub const NO_ACK: &str = "no ack within ";

/// What a claim sent and nobody judged.
#[derive(Default)]
pub(super) struct Unjudged {
    /// Sent, and not answered in time, by token.
    silent: HashMap<u64, Run>,
    /// Answered by "nobody takes this subject".
    unrouted: Vec<usize>,
}

/// What a probe found.
type Probed = Result<Arc<StreamFacts>, ProbeFailure>;

impl Unjudged {
    /// No answer came to these in time.
    pub(super) fn add_silent(&mut self, runs: Vec<(u64, Run)>) {
        self.silent.extend(runs);
    }

    /// The answer was that nobody takes the event's subject.
    pub(super) fn add_unrouted(&mut self, index: usize) {
        self.unrouted.push(index);
    }

    /// Whether anything got no answer in time.
    pub(super) fn any_silent(&self) -> bool {
        !self.silent.is_empty()
    }

    /// How many runs got no answer in time.
    pub(super) fn silent(&self) -> usize {
        self.silent.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.silent.is_empty() && self.unrouted.is_empty()
    }

    /// Asks server and stream whether they are there. Returns what they say, and the answers to silent runs that came
    /// meanwhile: late, but answers.
    pub(super) fn probe(&mut self, wire: &Wire<'_>) -> (Probed, Vec<(Run, Answer)>) {
        let mut late = Vec::new();
        let mut hear = |token, answer| late.push((token, answer));
        let probed = if self.silent.is_empty() {
            wire.publisher.fresh_facts(wire.session, &mut hear)
        } else {
            wire.session.probe(wire.deadline(), &mut hear).map(Arc::new)
        };
        let heard = |(token, answer)| self.silent.remove(&token).map(|run| (run, answer));
        (probed, late.into_iter().filter_map(heard).collect())
    }

    /// Judges everything by what the probe found.
    ///
    /// # Errors
    /// NATS cannot take events, and why: an outage. What is silent then stays so.
    pub(super) fn judge(
        &mut self,
        probed: Probed,
        wire: &Wire<'_>,
        stream: &str,
        outcomes: &mut Outcomes<'_>,
    ) -> Result<(), String> {
        let facts = probed.map_err(|failure| self.outage(&failure, wire))?;
        let silent = std::mem::take(&mut self.silent);
        // What the writer dropped was never sent.
        if !wire.session.dropped_any() {
            for run in silent.into_values() {
                let index = run.first();
                outcomes.unanswered(index, silence(&wire.patience(), &outcomes.subject(index)));
            }
        }
        let mut outage = Ok(());
        for index in std::mem::take(&mut self.unrouted) {
            match unrouted(&outcomes.subject(index), stream, &facts) {
                Ok(failure) => outcomes.failed(index, &failure),
                Err(cause) => outage = outage.and(Err(cause)),
            }
        }
        outage
    }

    /// The cause of an outage that the probe found; a link that does not answer is given up.
    fn outage(&self, failure: &ProbeFailure, wire: &Wire<'_>) -> String {
        let waited = if self.any_silent() { format!("{NO_ACK}{}; ", wire.patience()) } else { String::new() };
        let cause = format!("{waited}{}", failure.cause());
        if matches!(failure, ProbeFailure::Link(_)) {
            wire.publisher.abandon(wire.session, &cause, self.silent());
        }
        cause
    }
}

/// Why an event failed that alone got no ack.
fn silence(patience: &str, subject: &str) -> String {
    format!(
        "{NO_ACK}{patience} though server and stream answer: is {subject} a subject of the stream, or does somebody \
         else take it?"
    )
}

/// What "nobody takes this subject" means: a refusal, or, where the stream does take it, an outage with its cause.
fn unrouted(subject: &str, stream: &str, facts: &StreamFacts) -> Result<Failure, String> {
    if facts.takes(subject) {
        return Err(format!("stream {stream} takes {subject} but nobody answers: a leader change?"));
    }
    let error = format!(
        "no stream takes subject {subject}: add it to stream {stream} or map the topic to one that it takes"
    );
    Ok(Failure::Rejected { error })
}

/// The server denied to publish to `subject`.
pub(super) fn denial(subject: &str) -> Failure {
    Failure::Rejected {
        error: format!(
            "permission denied to publish to {subject}: allow it for this NATS user, or map the topic elsewhere"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subject_that_nobody_takes_is_a_refusal_unless_it_is_the_streams() {
        let facts = StreamFacts { subjects: vec!["order.>".into(), "one".into()], ..StreamFacts::default() };
        for (subject, is_outage) in
            [("order.placed", true), ("one", true), ("one.more", false), ("order", false)]
        {
            match unrouted(subject, "EVENTS", &facts) {
                Ok(Failure::Rejected { error }) => {
                    assert!(
                        !is_outage && error.contains(&format!("no stream takes subject {subject}")),
                        "{error}"
                    );
                }
                Err(cause) => assert!(is_outage && cause.contains("a leader change?"), "{cause}"),
                Ok(other) => panic!("{subject}: {other:?}"),
            }
        }
    }

    #[test]
    fn silence_begins_with_what_is_looked_for_later() {
        let error = silence("0.3s", "order.placed");
        assert!(error.starts_with(NO_ACK) && error.contains("no ack within 0.3s though"), "{error}");
    }
}
