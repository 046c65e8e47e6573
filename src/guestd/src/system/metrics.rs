//! `GET /metrics` (contract: envd.md sections 4.2 and 12).

use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::cpus::Status;
use super::kmsg::OomKill;

const MIB: u64 = 1024 * 1024;

#[derive(Debug, Serialize)]
pub(super) struct Metrics {
    ts: u64,
    cpu_count: usize,
    cpu_used_pct: f64,
    mem_total: u64,
    mem_used: u64,
    mem_cache: u64,
    mem_total_mib: u64,
    mem_used_mib: u64,
    disk_total: u64,
    disk_used: u64,
    cpu_possible: u32,
    cpu_target: u32,
    cpu_target_attempts: u64,
    cpu_write_pending_ms: u64,
    oom_kills: Vec<OomKill>,
}

/// Time that the processors spent, in ticks since boot.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Ticks {
    total: u64,
    idle: u64,
}

/// Remembers the last reading: processor use is what happened since.
#[derive(Debug, Default)]
pub(super) struct Sampler {
    last: Mutex<Ticks>,
}

impl Sampler {
    pub(super) fn sample(&self, cpus: &Status, oom_kills: Vec<OomKill>) -> Metrics {
        let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
        let ticks = parse_ticks(&stat);
        let last = std::mem::replace(&mut *self.last.lock().unwrap_or_else(PoisonError::into_inner), ticks);
        let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let field = |name| parse_meminfo(&memory, name);
        let (total, available) = (field("MemTotal:"), field("MemAvailable:"));
        let used = total.saturating_sub(available);
        let (disk_total, disk_used) = disk();
        Metrics {
            ts: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            cpu_count: std::thread::available_parallelism().map_or(1, usize::from),
            cpu_used_pct: used_percent(last, ticks),
            mem_total: total,
            mem_used: used,
            mem_cache: field("Cached:"),
            mem_total_mib: total / MIB,
            mem_used_mib: used / MIB,
            disk_total,
            disk_used,
            cpu_possible: cpus.possible,
            cpu_target: cpus.target,
            cpu_target_attempts: cpus.attempts,
            cpu_write_pending_ms: cpus
                .pending
                .map_or(0, |pending| u64::try_from(pending.as_millis()).unwrap_or(u64::MAX)),
            oom_kills,
        }
    }
}

fn parse_ticks(stat: &str) -> Ticks {
    let mut fields = stat.lines().next().unwrap_or_default().split_whitespace().skip(1);
    let mut ticks = Ticks::default();
    // user nice system idle iowait irq softirq steal: what follows is part of user already (proc(5)).
    for index in 0..8 {
        let value = fields.next().and_then(|field| field.parse().ok()).unwrap_or(0);
        ticks.total += value;
        if index == 3 || index == 4 {
            ticks.idle += value;
        }
    }
    ticks
}

fn used_percent(before: Ticks, after: Ticks) -> f64 {
    let total = after.total.saturating_sub(before.total);
    let idle = after.idle.saturating_sub(before.idle).min(total);
    if total == 0 {
        return 0.0;
    }
    let percent = (total - idle) as f64 * 100.0 / total as f64;
    (percent * 100.0).round() / 100.0
}

/// A field of /proc/meminfo in bytes.
fn parse_meminfo(text: &str, name: &str) -> u64 {
    let line = text.lines().find(|line| line.starts_with(name));
    let kib = line
        .and_then(|line| line[name.len()..].split_whitespace().next())
        .and_then(|field| field.parse().ok());
    kib.unwrap_or(0u64) * 1024
}

fn disk() -> (u64, u64) {
    let Ok(stat) = nix::sys::statvfs::statvfs("/") else { return (0, 0) };
    let total = stat.blocks() * stat.fragment_size();
    (total, total.saturating_sub(stat.blocks_available() * stat.fragment_size()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_use_is_what_happened_since_the_last_reading() {
        let before = parse_ticks("cpu  100 0 100 800 0 0 0 0 0 0\n");
        let after = parse_ticks("cpu  150 0 100 850 0 0 0 0 0 0\n");
        assert!((used_percent(before, after) - 50.0).abs() < f64::EPSILON);
        assert!(used_percent(after, after).abs() < f64::EPSILON);
    }

    #[test]
    fn memory_is_read_in_bytes() {
        assert_eq!(parse_meminfo("MemTotal:       1024 kB\nCached: 7 kB\n", "Cached:"), 7168);
        assert_eq!(parse_meminfo("", "Cached:"), 0);
    }
}
