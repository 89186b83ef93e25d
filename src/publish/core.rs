//! Publishes one claim over core NATS: rounds of publishes, each closed by a fence.
//!
//! Core NATS acknowledges nothing. So a round of events is sent, then a fence: our own message, which comes back after
//! the server has processed all that went before it on the same connection. Only then are they published. In a round a
//! key's events go out together as long as their subject is the same: the connection keeps their order, and if it
//! breaks, it loses a tail of them. Where the subject changes, the fence must tell first whether the server denied the
//! former one. Runs on a worker's thread; never sleeps, and waits only with a deadline.

use crate::event::order::Order;
use crate::nats::{NoFence, NotSent};
use crate::publish::in_flight::Run;
use crate::publish::message::Messages;
use crate::publish::outcomes::{Landed, Outcomes};
use crate::publish::verdict;
use crate::publish::window::Window;

/// One claim on its way to the server.
pub(super) struct CoreFlight<'a> {
    /// What its events become messages by, and the connection.
    pub(super) messages: Messages<'a>,
    /// What it may send.
    pub(super) window: Window<'a>,
    /// Which event goes next.
    pub(super) order: Order,
    /// What became of its events.
    pub(super) outcomes: Outcomes<'a>,
}

impl<'a> CoreFlight<'a> {
    /// Sends round after round, until nothing is left to send or nothing more may be sent.
    pub(super) fn fly(mut self) -> Landed<'a> {
        let outage = self.fly_in_rounds().err();
        // Without acks nobody knows how many the server has not seen.
        Landed { outcomes: self.outcomes, outage, in_flight: 0 }
    }

    fn fly_in_rounds(&mut self) -> Result<(), String> {
        loop {
            let round = self.send_round()?;
            if round.is_empty() {
                return Ok(());
            }
            let denied = self.fence()?;
            self.take_in(&round, &denied);
        }
    }

    /// Sends the next events of every key; each run is of one key and one subject.
    fn send_round(&mut self) -> Result<Vec<Run>, String> {
        let mut round = Vec::new();
        let mut sent = 0;
        while sent < self.window.events_max && self.window.is_open() {
            let Some(first) = self.order.next_ready() else { break };
            if self.outcomes.is_unsettled(first) {
                self.outcomes.published(first);
                self.order.stored(first);
                continue;
            }
            let run = self.send_run(first, self.window.events_max - sent)?;
            sent += run.len();
            round.extend(Run::of(run));
        }
        Ok(round)
    }

    /// Sends the events of a key from `first` on, at most `room`, as long as they are for the same subject.
    fn send_run(&mut self, first: usize, room: usize) -> Result<Vec<usize>, String> {
        let mut run = Vec::new();
        let mut next = Some(first);
        while let Some(index) = next
            && run.len() < room
            && self.outcomes.event(index).topic == self.outcomes.event(first).topic
            && !self.outcomes.is_unsettled(index)
        {
            let message = match self.messages.make(self.outcomes.event(index)) {
                Ok(message) => message,
                Err(failure) => {
                    self.outcomes.failed(index, &failure);
                    break;
                }
            };
            let wire = &self.messages.wire;
            let sent = wire.session.publish(message, self.window.budget, wire.deadline());
            sent.map_err(NotSent::cause)?;
            run.push(index);
            next = self.order.successor(index);
        }
        Ok(run)
    }

    /// Waits until the server has processed all that was sent; returns the subjects that it denied.
    fn fence(&self) -> Result<Vec<String>, String> {
        let wire = &self.messages.wire;
        wire.session.fence(wire.deadline()).map_err(|no_fence| match no_fence {
            NoFence::Silence => {
                let cause = format!("no fence within {}", wire.patience());
                wire.publisher.abandon(wire.session, &cause, 0);
                cause
            }
            NoFence::Lost(cause) => cause,
        })
    }

    /// The server has processed a round, and denied some subjects.
    fn take_in(&mut self, round: &[Run], denied: &[String]) {
        for run in round {
            let subject = self.outcomes.subject(run.first());
            if denied.iter().any(|denied| *denied == subject) {
                self.outcomes.failed(run.first(), &verdict::denial(&subject));
                continue;
            }
            for &index in run.events() {
                self.outcomes.published(index);
            }
            // The run may have ended at an event that can never be sent: its key goes no further in this claim.
            let goes_on = |next: usize| self.outcomes.is_untouched(next);
            if self.order.successor(run.last()).is_none_or(goes_on) {
                self.order.stored(run.last());
            }
        }
    }
}
