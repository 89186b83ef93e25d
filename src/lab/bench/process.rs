//! What processes have used, from proc(5): CPU time of one or of a whole server, and peak memory.

use std::fs;

use anyhow::{Context, Result};

/// Processor seconds that a process has used.
pub(super) fn cpu_s(pid: u32) -> Result<f64> {
    Ok(CpuTimes::read(pid)?.own / ticks())
}

/// Processor seconds that a process and its children have used, those children included that have ended: for a
/// PostgreSQL, given its postmaster.
pub(super) fn tree_cpu_s(pid: u32) -> Result<f64> {
    // A child that ends between the two looks is missed or counted twice; a few ms either way.
    let path = format!("/proc/{pid}/task/{pid}/children");
    let children = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let living: f64 = children
        .split_whitespace()
        .filter_map(|child| CpuTimes::read(child.parse().ok()?).ok())
        .map(|times| times.own)
        .sum();
    let parent = CpuTimes::read(pid)?;
    Ok((parent.own + parent.ended_children + living) / ticks())
}

/// Processor seconds of the threads that a process has now, to the nanosecond.
pub(super) fn threads_cpu_s(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/task");
    let mut nanoseconds = 0.0;
    for thread in fs::read_dir(&path).with_context(|| format!("list {path}"))? {
        let stat = fs::read_to_string(thread?.path().join("schedstat")).unwrap_or_default();
        nanoseconds += stat.split(' ').next().and_then(|on_cpu| on_cpu.parse::<f64>().ok()).unwrap_or(0.0);
    }
    Ok(nanoseconds / 1e9)
}

/// The most memory that a process ever had, in MiB.
pub(super) fn peak_memory_mib(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse::<f64>().ok());
    Ok(kib.with_context(|| format!("no VmHWM in {path}"))? / 1024.0)
}

/// The machine in a few words: `2 cores, Intel(R) Xeon(R) CPU @ 2.20GHz, 8 GiB`.
pub(super) fn machine() -> Result<String> {
    let cores = std::thread::available_parallelism()?;
    let cpus = fs::read_to_string("/proc/cpuinfo").context("read /proc/cpuinfo")?;
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let memory = fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?;
    let kib = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse::<f64>().ok());
    let gib = kib.unwrap_or(0.0) / (1024.0 * 1024.0);
    Ok(format!("{cores} cores, {}, {gib:.0} GiB", model.map_or("unknown CPU", |(_, model)| model)))
}

/// Clock ticks.
struct CpuTimes {
    own: f64,
    ended_children: f64,
}

impl CpuTimes {
    fn read(pid: u32) -> Result<CpuTimes> {
        let path = format!("/proc/{pid}/stat");
        let stat = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        CpuTimes::parse(&stat).with_context(|| format!("read {path}: {stat}"))
    }

    /// The name in parentheses may hold anything; behind it the fields count from 3.
    fn parse(stat: &str) -> Option<CpuTimes> {
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
        Some(CpuTimes { own: field(14)? + field(15)?, ended_children: field(16)? + field(17)? })
    }
}

#[allow(clippy::cast_precision_loss, reason = "a hundred, as a rule")]
fn ticks() -> f64 {
    rustix::param::clock_ticks_per_second() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_found_behind_any_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 100 0 0 0 11 22 33 44 20 0 1 0 5 6 7";
        let times = CpuTimes::parse(stat).unwrap();
        assert_eq!((times.own, times.ended_children), (33.0, 77.0));
    }

    #[test]
    fn this_process_has_used_something() {
        let mut sum = 0_u64;
        while cpu_s(std::process::id()).unwrap() < 0.02 {
            sum = std::hint::black_box((0..1_000_000).fold(sum, u64::wrapping_add));
        }
        assert!(tree_cpu_s(std::process::id()).unwrap() >= 0.02);
        assert!(threads_cpu_s(std::process::id()).unwrap() > 0.0);
        assert!(peak_memory_mib(std::process::id()).unwrap() > 1.0);
    }
}
