//! What the demo shows: a line of progress while it runs, and at its end what became of the events.
//!
//! On a terminal the line is written over in place, elsewhere a new one comes each second. Runs on the demo's own thread
//! and decides nothing: what is lost or doubled the account has counted.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use super::traffic::WriteTotals;
use crate::lab::numbers::thousands;

/// Time between two progress reports on a terminal, and elsewhere.
pub(super) const PROGRESS_TERMINAL: Duration = Duration::from_millis(200);
const PROGRESS_LINES: Duration = Duration::from_secs(1);

/// What became of the events, which the summary shows.
#[derive(Debug, PartialEq)]
pub(super) struct DeliveryReport {
    pub(super) delivered: u64,
    pub(super) lost: u64,
    pub(super) duplicates: u64,
    pub(super) out_of_order: u64,
    pub(super) uncommitted: u64,
    pub(super) per_second: f64,
    pub(super) p50_us: i64,
    pub(super) p99_us: i64,
}

impl DeliveryReport {
    pub(super) fn failures(&self) -> Vec<String> {
        let faults = [
            (self.lost, "lost"),
            (self.duplicates, "delivered again"),
            (self.out_of_order, "out of order"),
            (self.uncommitted, "delivered and never committed"),
        ];
        let found = faults.iter().filter(|(count, _)| *count > 0);
        found.map(|(count, fault)| format!("{} {fault}", thousands(*count))).collect()
    }

    pub(super) fn summary(&self, written: &WriteTotals) -> String {
        let milliseconds = |us: i64| format!("{:.1} ms", us as f64 / 1e3);
        let rows = [
            ("committed", thousands(written.committed())),
            ("in transactions", thousands(written.transactions)),
            ("rolled back", thousands(written.rolled_back)),
            ("delivered", thousands(self.delivered)),
            ("lost", thousands(self.lost)),
            ("duplicates", thousands(self.duplicates)),
            ("out of order per key", thousands(self.out_of_order)),
            ("rolled back, delivered", thousands(self.uncommitted)),
            ("events/s", thousands(self.per_second as u64)),
            ("latency p50", milliseconds(self.p50_us)),
            ("latency p99", milliseconds(self.p99_us)),
        ];
        let mut text = String::new();
        for (name, value) in rows {
            // Infallible: it writes to a String.
            let _ = writeln!(text, "  {name:<24}{value:>12}");
        }
        text += "  (latency: from the INSERT to the stream, with the writers at full speed)\n\n";
        text
    }
}

/// A line that is updated in place on a terminal; elsewhere a new one each second.
pub(super) struct Progress {
    events: u64,
    on_terminal: bool,
    began: Instant,
    shown: Instant,
}

impl Progress {
    pub(super) fn new(events: u64) -> Progress {
        let now = Instant::now();
        Progress { events, on_terminal: std::io::stdout().is_terminal(), began: now, shown: now }
    }

    pub(super) fn show(&mut self, committed: u64, delivered: u64) {
        let every = if self.on_terminal { PROGRESS_TERMINAL } else { PROGRESS_LINES };
        if self.shown.elapsed() >= every {
            self.print(committed, delivered);
        }
    }

    pub(super) fn end(&mut self, committed: u64, delivered: u64) {
        self.print(committed, delivered);
        if self.on_terminal {
            println!();
        }
    }

    fn print(&mut self, committed: u64, delivered: u64) {
        self.shown = Instant::now();
        let [committed, delivered, events] = [committed, delivered, self.events].map(thousands);
        let line = format!(
            "{:>5.1} s  committed {committed}  delivered {delivered} of {events}",
            self.began.elapsed().as_secs_f64()
        );
        if self.on_terminal {
            print!("\r\x1b[K{line}");
            // A terminal that is gone is no reason to end.
            let _ = std::io::stdout().flush();
        } else {
            println!("{line}");
        }
    }
}
