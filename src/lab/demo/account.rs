//! The account of the demo: what has arrived in the stream, compared with what was committed.
//!
//! An event says itself whose it is, which number it has among its customer's, and whether its transaction was rolled
//! back. From that the account tells what is lost, came twice, came out of order, or should never have come. Pure.

use std::collections::{HashMap, HashSet};

use anyhow::{Context, Result};
use serde::Deserialize;

use super::report::DeliveryReport;
use super::traffic::WriteTotals;
use crate::lab::numbers::percentile;
use crate::nats::reader::Stored;

/// The stream that it takes its messages from.
pub(super) const STREAM: &str = "DEMO";

/// What an event of the demo says about itself.
#[derive(Debug, Deserialize)]
struct Payload {
    customer: String,
    /// Its number among the customer's committed events, from 1.
    n: u64,
    rolled_back: bool,
    /// When it was inserted, by the database's clock, in microseconds since 1970.
    at_us: i64,
}

/// What has arrived.
#[derive(Debug, Default)]
pub(super) struct Account {
    /// Different events that were to arrive, as far as they say so themselves.
    pub(super) delivered: u64,
    duplicates: u64,
    out_of_order: u64,
    rolled_back: u64,
    /// Customer and number of each.
    seen: HashSet<(String, u64)>,
    /// By customer: the highest number so far.
    highest: HashMap<String, u64>,
    latencies_us: Vec<i64>,
    first_insert_us: Option<i64>,
    last_stored_us: i64,
}

impl Account {
    /// Takes a message of the stream.
    pub(super) fn take(&mut self, message: &Stored) -> Result<()> {
        let payload = serde_json::from_slice(&message.payload)
            .with_context(|| format!("stream {STREAM}, message {}: not an event of the demo", message.seq))?;
        self.arrived(payload, message.stored_at_ns / 1_000);
        Ok(())
    }

    fn arrived(&mut self, event: Payload, stored_us: i64) {
        if event.rolled_back {
            self.rolled_back += 1;
            return;
        }
        if !self.seen.insert((event.customer.clone(), event.n)) {
            self.duplicates += 1;
            return;
        }
        self.delivered += 1;
        self.latencies_us.push(stored_us - event.at_us);
        self.first_insert_us = Some(self.first_insert_us.map_or(event.at_us, |first| first.min(event.at_us)));
        self.last_stored_us = self.last_stored_us.max(stored_us);
        let highest = self.highest.entry(event.customer).or_insert(0);
        if event.n < *highest {
            self.out_of_order += 1;
        }
        *highest = event.n.max(*highest);
    }

    /// Compares with what the writers committed.
    pub(super) fn judge(mut self, written: &WriteTotals) -> DeliveryReport {
        let expected: u64 = written.committed();
        let found = written
            .events
            .iter()
            .map(|(customer, count)| {
                (1..=*count).filter(|n| self.seen.contains(&(customer.clone(), *n))).count() as u64
            })
            .sum::<u64>();
        self.latencies_us.sort_unstable();
        let flow_us = self.last_stored_us - self.first_insert_us.unwrap_or(self.last_stored_us);
        DeliveryReport {
            delivered: self.delivered,
            lost: expected - found,
            duplicates: self.duplicates,
            out_of_order: self.out_of_order,
            // What was never written at all counts with what was rolled back.
            uncommitted: self.rolled_back + (self.delivered - found),
            per_second: if flow_us > 0 { self.delivered as f64 * 1e6 / flow_us as f64 } else { 0.0 },
            p50_us: percentile(&self.latencies_us, 50).unwrap_or(0),
            p99_us: percentile(&self.latencies_us, 99).unwrap_or(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written() -> WriteTotals {
        WriteTotals { events: vec![("a".into(), 3), ("b".into(), 1)], transactions: 3, rolled_back: 1 }
    }

    /// Judges events given as customer, number and rolled back, inserted at 1 s and stored at 2 s.
    fn judge(events: &[(&str, u64, bool)]) -> [u64; 5] {
        let mut account = Account::default();
        for &(customer, n, rolled_back) in events {
            let payload = Payload { customer: customer.into(), n, rolled_back, at_us: 1_000_000 };
            account.arrived(payload, 2_000_000);
        }
        let report = account.judge(&written());
        let faults = [report.lost, report.duplicates, report.out_of_order, report.uncommitted];
        assert_eq!(report.failures().len(), faults.iter().filter(|count| **count > 0).count());
        [report.delivered, faults[0], faults[1], faults[2], faults[3]]
    }

    #[test]
    fn each_planted_fault_is_counted_as_what_it_is() {
        let (a1, a2, a3, b1) = (("a", 1, false), ("a", 2, false), ("a", 3, false), ("b", 1, false));
        assert_eq!(judge(&[a1, a2, b1, a3]), [4, 0, 0, 0, 0]);
        assert_eq!(judge(&[b1, a1, a2, a3]), [4, 0, 0, 0, 0], "customers have no order among each other");
        assert_eq!(judge(&[a1, a2, a3]), [3, 1, 0, 0, 0], "lost");
        assert_eq!(judge(&[a1, a2, b1, a3, a1]), [4, 0, 1, 0, 0], "duplicated");
        assert_eq!(judge(&[a2, a1, b1, a3]), [4, 0, 0, 1, 0], "out of order");
        assert_eq!(judge(&[a1, a2, b1, a3, ("a", 3, true)]), [4, 0, 0, 0, 1], "rolled back");
        assert_eq!(judge(&[a1, a2, b1, a3, ("a", 4, false)]), [5, 0, 0, 0, 1], "never written");
        assert_eq!(
            judge(&[a1, a2, a3, ("c", 1, false)]),
            [4, 1, 0, 0, 1],
            "a stranger does not stand in for b"
        );
    }

    #[test]
    fn the_rate_is_from_the_first_insert_to_the_last_arrival() {
        let mut account = Account::default();
        for (n, at_us, stored_us) in [(1, 1_000_000, 1_500_000), (2, 2_000_000, 3_000_000)] {
            account.arrived(Payload { customer: "a".into(), n, rolled_back: false, at_us }, stored_us);
        }
        let report = account.judge(&WriteTotals { events: vec![("a".into(), 2)], ..WriteTotals::default() });
        assert_eq!((report.per_second, report.p50_us, report.p99_us), (1.0, 500_000, 1_000_000));
    }
}
