//! The writers of the demo: orders with their events, in transactions of which some are rolled back.
//!
//! Each writer is a thread, `demo-writer-N`, that feeds a `psql`, and one, `demo-answers-N`, that counts what it answers.
//! A customer's orders are one writer's, so that they have one order in time. An event counts as committed once its
//! COMMIT was answered, never before; at its end a writer compares what psql answered with what it asked.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, ensure};

/// Connections that insert at the same time.
pub(super) const WRITERS: usize = 4;
/// Customers of one writer. A customer's orders are one writer's, so that they have one order in time.
const CUSTOMERS: usize = 25;
/// Events of one order at most.
const MAX_EVENTS: u64 = 3;
/// What happens to an order, in this order: an event each.
const TOPICS: [&str; MAX_EVENTS as usize] = ["order.placed", "order.paid", "order.shipped"];
/// Of a hundred transactions, how many are rolled back.
const ROLLBACK_PERCENT: u8 = 5;

/// One writer: a thread that feeds a `psql`, and one that reads what it answers.
pub(super) struct OrderWriter {
    pub(super) number: usize,
    /// Events to commit.
    pub(super) events: u64,
    /// Events whose COMMIT was answered, by all writers.
    pub(super) committed: Arc<AtomicU64>,
    pub(super) stop: Arc<AtomicBool>,
}

impl OrderWriter {
    pub(super) fn spawn(self, mut psql: Command) -> Result<JoinHandle<Result<WriteTotals>>> {
        psql.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let mut psql = psql.spawn().context("run psql")?;
        let answers = psql.stdout.take().context("psql has no stdout")?;
        let committed = self.committed.clone();
        // Ends with psql, which closes its stdout.
        let counter = thread(&format!("demo-answers-{}", self.number), move || count(answers, &committed))?;
        thread(&format!("demo-writer-{}", self.number), move || self.run(psql, counter))
    }

    /// Feeds psql to the end, waits for it, and compares what it answered with what was asked.
    fn run(self, mut psql: Child, counter: JoinHandle<Result<u64>>) -> Result<WriteTotals> {
        let mut stdin = psql.stdin.take().context("psql has no stdin")?;
        // An error here is psql's end; why, it says itself.
        let written = self.feed(&mut stdin);
        drop(stdin);
        let output = psql.wait_with_output().context("wait for psql")?;
        ensure!(
            output.status.success(),
            "writer {}: {}",
            self.number,
            String::from_utf8_lossy(&output.stderr)
        );
        let written = written.context("write to psql")?;
        let answered = counter.join().map_err(|_| anyhow::anyhow!("a reader of psql panicked"))??;
        ensure!(
            answered == written.committed(),
            "psql answered {answered} of {} commits",
            written.committed()
        );
        Ok(written)
    }

    fn feed(&self, psql: &mut impl Write) -> std::io::Result<WriteTotals> {
        let mut written = WriteTotals {
            events: (0..CUSTOMERS).map(|n| (format!("customer-{}", n * WRITERS + self.number), 0)).collect(),
            ..WriteTotals::default()
        };
        let mut left = self.events;
        while left > 0 && !self.stop.load(Ordering::Relaxed) {
            let count = fastrand::u64(1..=MAX_EVENTS).min(left);
            let (customer, last) = &mut written.events[fastrand::usize(0..CUSTOMERS)];
            let rollback = fastrand::u8(0..100) < ROLLBACK_PERCENT;
            psql.write_all(transaction(customer, *last, count, rollback).as_bytes())?;
            if rollback {
                written.rolled_back += count;
            } else {
                *last += count;
                left -= count;
                written.transactions += 1;
            }
        }
        Ok(written)
    }
}

/// What writers did.
#[derive(Debug, Default)]
pub(super) struct WriteTotals {
    /// By customer: how many events were committed, numbered from 1.
    pub(super) events: Vec<(String, u64)>,
    pub(super) transactions: u64,
    /// Events that were inserted and rolled back.
    pub(super) rolled_back: u64,
}

impl WriteTotals {
    pub(super) fn add(&mut self, other: WriteTotals) {
        self.events.extend(other.events);
        self.transactions += other.transactions;
        self.rolled_back += other.rolled_back;
    }

    pub(super) fn committed(&self) -> u64 {
        self.events.iter().map(|(_, count)| count).sum()
    }
}

/// An order and its events in one transaction. psql echoes the number of events once COMMIT was answered.
fn transaction(customer: &str, last: u64, count: u64, rollback: bool) -> String {
    let amount = fastrand::u32(1..1_000);
    let mut script =
        format!("BEGIN;\nINSERT INTO orders (customer, amount) VALUES ('{customer}', {amount});\n");
    for (n, topic) in (last + 1..=last + count).zip(TOPICS) {
        // Infallible: it writes to a String.
        let _ = writeln!(
            script,
            "INSERT INTO outboxes (topic, metadata, payload) VALUES ('{topic}', '{{\"ordering-key\": \"{customer}\"}}', \
             jsonb_build_object('customer', '{customer}', 'n', {n}, 'amount', {amount}, 'rolled_back', {rollback}, \
             'at_us', (extract(epoch FROM clock_timestamp()) * 1000000)::bigint));"
        );
    }
    script += if rollback { "ROLLBACK;\n" } else { "COMMIT;\n" };
    if !rollback {
        let _ = writeln!(script, "\\echo {count}");
    }
    script
}

/// Adds up the numbers that psql echoes, here and for everybody.
fn count(answers: impl Read, committed: &AtomicU64) -> Result<u64> {
    let mut total = 0;
    for line in BufReader::new(answers).lines() {
        let line = line.context("read from psql")?;
        let events: u64 = line.parse().with_context(|| format!("psql answered {line:?}"))?;
        committed.fetch_add(events, Ordering::Relaxed);
        total += events;
    }
    Ok(total)
}

fn thread<T: Send + 'static>(
    name: &str,
    run: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<JoinHandle<Result<T>>> {
    std::thread::Builder::new().name(name.into()).spawn(run).with_context(|| format!("start thread {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rolled_back_transaction_is_never_echoed_as_committed() {
        assert!(transaction("c", 0, 2, false).ends_with("COMMIT;\n\\echo 2\n"));
        assert!(transaction("c", 0, 2, true).ends_with("ROLLBACK;\n"));
    }
}
