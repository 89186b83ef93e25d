//! The process's own figures: CPU time, memory, file descriptors, threads.
//!
//! Read from the kernel at a scrape, on the thread `http`, and nowhere else. Nothing here is asked of PostgreSQL or NATS.
//! What cannot be read keeps its last value, and never fails a scrape.

use std::fs;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use prometheus::{Counter, IntGauge, Registry};
use rustix::param::{clock_ticks_per_second, page_size};
use rustix::process::{Resource, getrlimit};
use rustix::time::{ClockId, clock_gettime};

use super::register::{gauge, gauge_value, int_gauge, register, unix_seconds};

/// The process's own figures, under the names that every Prometheus client library uses.
#[derive(Debug)]
pub(super) struct Process {
    /// CPU seconds already counted. The lock keeps two scrapes at once from counting the same second twice.
    counted: Mutex<f64>,
    cpu: Counter,
    resident: IntGauge,
    open_fds: IntGauge,
    threads: IntGauge,
}

impl Process {
    pub(super) fn new(registry: &Registry) -> Process {
        let start = gauge(registry, "process_start_time_seconds", "Unix time at which the process started.");
        start.set(process_start().unwrap_or_else(|| unix_seconds(SystemTime::now())));
        let max_fds = int_gauge(registry, "process_max_fds", "Limit on open file descriptors.");
        max_fds.set(getrlimit(Resource::Nofile).current.map_or(i64::MAX, gauge_value));
        let cpu = Counter::new("process_cpu_seconds_total", "User and system CPU time spent, in seconds.");
        Process {
            counted: Mutex::new(0.0),
            cpu: register(registry, cpu),
            resident: int_gauge(registry, "process_resident_memory_bytes", "Resident memory, in bytes."),
            open_fds: int_gauge(registry, "process_open_fds", "Open file descriptors."),
            threads: int_gauge(registry, "process_threads", "Threads of the process."),
        }
    }

    /// Reads the figures. What cannot be read keeps its last value: /proc may be hidden from us.
    pub(super) fn refresh(&self) {
        let cpu = clock_gettime(ClockId::ProcessCPUTime);
        let cpu = cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9;
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        self.cpu.inc_by((cpu - *counted).max(0.0));
        *counted = cpu;
        if let Some(pages) = stat_field(RSS) {
            self.resident.set(gauge_value(pages.saturating_mul(page_size() as u64)));
        }
        if let Some(threads) = stat_field(NUM_THREADS) {
            self.threads.set(gauge_value(threads));
        }
        if let Ok(fds) = fs::read_dir("/proc/self/fd") {
            // The directory being read is itself one of them.
            self.open_fds.set(gauge_value(fds.count().saturating_sub(1) as u64));
        }
    }
}

/// Fields of /proc/self/stat, numbered as in proc(5).
const NUM_THREADS: usize = 20;
const START_TIME: usize = 22;
const RSS: usize = 24;

fn stat_field(number: usize) -> Option<u64> {
    parse_stat_field(&fs::read_to_string("/proc/self/stat").ok()?, number)
}

/// The command, field 2, stands in parentheses and may hold blanks and parentheses itself: count from its
/// end.
fn parse_stat_field(stat: &str, number: usize) -> Option<u64> {
    let (_, after_command) = stat.rsplit_once(')')?;
    after_command.split_ascii_whitespace().nth(number - 3)?.parse().ok()
}

/// Unix time at which this process started. The start is told as ticks since boot; /proc/stat, which has the
/// time of the boot, is hidden under `ProcSubset=pid`, so it is reckoned back from now.
fn process_start() -> Option<f64> {
    let since_boot = clock_gettime(ClockId::Boottime);
    let since_boot = since_boot.tv_sec as f64 + since_boot.tv_nsec as f64 / 1e9;
    let started = stat_field(START_TIME)? as f64 / clock_ticks_per_second() as f64;
    Some(unix_seconds(SystemTime::now()) - (since_boot - started))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_with_blanks_and_parentheses_does_not_shift_the_fields() {
        let stat =
            "12 (a) b (c) S 1 12 12 0 -1 4194304 1 0 0 0 5 6 0 0 20 0 9 0 777 1000 42 18446744073709551615";
        assert_eq!(parse_stat_field(stat, NUM_THREADS), Some(9));
        assert_eq!(parse_stat_field(stat, START_TIME), Some(777));
        assert_eq!(parse_stat_field(stat, RSS), Some(42));
        assert_eq!(parse_stat_field("nonsense", RSS), None);
    }
}
