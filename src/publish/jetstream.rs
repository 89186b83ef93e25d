//! Publishes one claim to JetStream: sends what is ready, hears the acks, and says what became of each event.
//!
//! Keys are in flight together, each with one event at a time (`event/order.rs`) or one atomic batch; answers come back
//! in any order and each frees its key's next event. Sending stops at the claim's budget, at the first sign of an
//! outage, and when the service drains; what was sent is still waited for, each event `ack_timeout` long. What then
//! has no answer is judged by a probe. Runs on a worker's thread; never touches the database, never sleeps, and waits
//! only with a deadline.

use std::time::Instant;

use crate::event::order::Order;
use crate::event::retry::Failure;
use crate::failpoint;
use crate::nats::answer::Answer;
use crate::nats::{Heard, NotSent};
use crate::publish::batch::{self, Batching};
use crate::publish::in_flight::{InFlight, Run};
use crate::publish::message::Messages;
use crate::publish::outcomes::{Landed, Outcomes};
use crate::publish::verdict::{self, Unjudged};
use crate::publish::window::Window;
use crate::publish::wire::Wire;

/// One claim on its way to the stream.
pub(super) struct JetStreamFlight<'a> {
    wire: Wire<'a>,
    /// The stream's name, for texts.
    stream: &'a str,
    messages: Messages<'a>,
    window: Window<'a>,
    order: Order,
    batching: Batching,
    in_flight: InFlight,
    unjudged: Unjudged,
    outcomes: Outcomes<'a>,
    /// Why NATS cannot take events, once that shows.
    outage: Option<String>,
}

impl<'a> JetStreamFlight<'a> {
    /// A flight that has sent nothing yet.
    pub(super) fn new(
        stream: &'a str,
        messages: Messages<'a>,
        window: Window<'a>,
        order: Order,
        batching: Batching,
        outcomes: Outcomes<'a>,
    ) -> JetStreamFlight<'a> {
        JetStreamFlight {
            wire: messages.wire,
            stream,
            messages,
            window,
            order,
            batching,
            in_flight: InFlight::default(),
            unjudged: Unjudged::default(),
            outcomes,
            outage: None,
        }
    }

    /// Sends and hears, until nothing is in flight and nothing may be sent.
    pub(super) fn fly(mut self) -> Landed<'a> {
        loop {
            self.send_ready();
            let Some(deadline) = self.in_flight.next_deadline() else { break };
            let mut heard = self.wire.session.hear(deadline);
            // All that is there already, before sending again: one answer is seldom alone.
            while self.take(heard) {
                heard = self.wire.session.hear(Instant::now());
            }
        }
        if self.outage.is_none() && !self.unjudged.is_empty() {
            self.judge_the_rest();
        }
        let in_flight = self.in_flight.events() + self.unjudged.silent();
        Landed { outcomes: self.outcomes, outage: self.outage, in_flight }
    }

    fn may_send(&self) -> bool {
        self.outage.is_none() && !self.unjudged.any_silent() && self.window.is_open()
    }

    /// Sends what is ready, in as few pieces as can be.
    fn send_ready(&mut self) {
        let mut runs = 0;
        let mut result = Ok(());
        while self.window.room(self.in_flight.events()) > 0 && self.may_send() && result.is_ok() {
            let Some(index) = self.order.next_ready() else { break };
            if self.outcomes.is_unsettled(index) {
                self.outcomes.published(index);
                self.order.stored(index);
                continue;
            }
            result = self.send_from(index).map(|sent| runs += usize::from(sent));
        }
        match result.and_then(|()| self.wire.session.hand_over(self.wire.deadline())) {
            Ok(()) => {
                for _ in 0..runs {
                    failpoint!("publish.sent");
                }
            }
            Err(not_sent) => self.outage = Some(not_sent.cause()),
        }
    }

    /// Publishes an event, or the batch that begins with it. False when it is no message, or no batch after all.
    fn send_from(&mut self, index: usize) -> Result<bool, NotSent> {
        let room = self.window.room(self.in_flight.events());
        let run = self.batching.run_from(index, &self.order, &self.outcomes, &self.in_flight, room);
        let deadline = self.wire.deadline();
        let sent =
            if run.is_batch() { self.send_batch(&run, deadline)? } else { self.send_event(index, deadline)? };
        if let Some(token) = sent {
            self.in_flight.add(token, run, deadline);
        }
        Ok(sent.is_some())
    }

    fn send_batch(&mut self, run: &Run, deadline: Instant) -> Result<Option<u64>, NotSent> {
        let sent = batch::send(run, &self.messages, &self.outcomes, self.window.budget, deadline)?;
        if sent.is_none() {
            self.batching.send_singly(run, &mut self.order);
        }
        Ok(sent)
    }

    /// `None` when the event can never be a message, which is then its outcome.
    fn send_event(&mut self, index: usize, deadline: Instant) -> Result<Option<u64>, NotSent> {
        match self.messages.make(self.outcomes.event(index)) {
            Ok(message) => self.wire.session.publish(message, self.window.budget, deadline).map(Some),
            Err(failure) => {
                self.outcomes.failed(index, &failure);
                Ok(None)
            }
        }
    }

    /// Takes in what was heard. False when there is nothing more to hear now.
    fn take(&mut self, heard: Heard) -> bool {
        match heard {
            Heard::Answer(token, answer) => {
                // An unknown token answers a claim that was settled before.
                if let Some(run) = self.in_flight.answered(token) {
                    failpoint!("publish.acked");
                    self.answered(&run, answer);
                }
            }
            Heard::Denied(subject) => self.denied(&subject),
            Heard::Down(cause) => {
                self.outage.get_or_insert(cause);
                self.in_flight.stop_waiting();
                return false;
            }
            Heard::Silence => {
                self.unjudged.add_silent(self.in_flight.overdue(Instant::now()));
                return false;
            }
            Heard::Echo(_) | Heard::Stream(..) => {}
        }
        true
    }

    fn answered(&mut self, run: &Run, answer: Answer) {
        match answer {
            Answer::Stored { duplicate } => {
                for &index in run.events() {
                    self.outcomes.published(index);
                }
                if duplicate {
                    self.outcomes.duplicate();
                }
                self.order.stored(run.last());
            }
            // No error of a batch says which event it means, nor that none was stored.
            Answer::Refused { .. } | Answer::Outage { .. } if run.is_batch() => {
                self.batching.send_singly(run, &mut self.order);
            }
            Answer::Refused { error } => self.outcomes.failed(run.first(), &Failure::Rejected { error }),
            Answer::NoResponders => self.unjudged.add_unrouted(run.first()),
            Answer::Outage { cause } => {
                self.outage.get_or_insert(cause);
            }
        }
    }

    /// The server denied `subject`: every event in flight to it is rejected.
    fn denied(&mut self, subject: &str) {
        let outcomes = &self.outcomes;
        let to_it = |run: &Run| run.events().iter().any(|&index| outcomes.subject(index) == subject);
        for run in self.in_flight.denied(to_it) {
            if run.is_batch() {
                self.batching.send_singly(&run, &mut self.order);
            } else {
                self.outcomes.failed(run.first(), &verdict::denial(subject));
            }
        }
    }

    /// Judges what was not answered, or answered by nobody, with the help of a probe.
    fn judge_the_rest(&mut self) {
        let (probed, late) = self.unjudged.probe(&self.wire);
        for (run, answer) in late {
            self.answered(&run, answer);
        }
        let judged = self.unjudged.judge(probed, &self.wire, self.stream, &mut self.outcomes);
        if let Err(cause) = judged {
            self.outage.get_or_insert(cause);
        }
    }
}
