//! Looks for the work of processes that compute without a byte of output, where the sandbox's policy counts their progress.
//!
//! The one periodic task of the agent. It runs only while such a process lives and ends with the last one.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use guestd_idle::HoldId;
use nix::unistd::{SysconfVar, sysconf};

use super::Activity;

/// Between two looks: shorter than the shortest time for which a movement counts by default.
const PERIOD: Duration = Duration::from_secs(2);

/// Work is a hundredth of one processor or more: a program that only wakes up to look at a queue does not work.
const WORK: Duration = Duration::from_millis(20);

/// Starts the task unless it runs or has nothing to do.
pub(super) fn start(activity: &Arc<Activity>) {
    {
        let mut inner = activity.lock();
        if inner.sampling || inner.ledger.sampled().next().is_none() {
            return;
        }
        inner.sampling = true;
    }
    let activity = Arc::clone(activity);
    tokio::spawn(async move { run(&activity).await });
}

async fn run(activity: &Arc<Activity>) {
    let mut known: HashMap<HoldId, Duration> = HashMap::new();
    loop {
        let processes: Vec<_> = {
            let mut inner = activity.lock();
            let processes: Vec<_> = inner.ledger.sampled().collect();
            if processes.is_empty() {
                inner.sampling = false;
                return;
            }
            processes
        };
        let looked = tokio::task::spawn_blocking(move || {
            let used = |(hold, pid)| Some((hold, processor_time(pid)?));
            processes.into_iter().filter_map(used).collect::<HashMap<_, _>>()
        });
        let now_known = looked.await.unwrap_or_default();
        for (hold, used) in &now_known {
            // A process that ended took its time out of a sum: less is not work.
            if known.get(hold).is_some_and(|before| used.saturating_sub(*before) >= WORK) {
                let now = activity.now();
                activity.lock().ledger.progress(*hold, 0, now);
            }
        }
        known = now_known;
        tokio::time::sleep(PERIOD).await;
    }
}

/// The processor time of a process and of what it started: its control group's where it has one of its own, else its process group's.
fn processor_time(pid: u32) -> Option<Duration> {
    own_group_time(pid).or_else(|| process_group_time(pid))
}

fn own_group_time(pid: u32) -> Option<Duration> {
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    let agents = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    if own == "/" || agents.lines().any(|line| line.strip_prefix("0::") == Some(own)) {
        return None;
    }
    let folder = Path::new("/sys/fs/cgroup").join(own.trim_start_matches('/'));
    let stat = std::fs::read_to_string(folder.join("cpu.stat")).ok()?;
    let micros = stat.lines().find_map(|line| line.strip_prefix("usage_usec ")?.trim().parse().ok())?;
    Some(Duration::from_micros(micros))
}

fn process_group_time(group: u32) -> Option<Duration> {
    let ticks_per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().and_then(|n| u64::try_from(n).ok())?;
    let ticks: u64 = std::fs::read_dir("/proc")
        .ok()?
        .flatten()
        .filter(|entry| entry.file_name().as_encoded_bytes().first().is_some_and(u8::is_ascii_digit))
        .filter_map(|entry| std::fs::read_to_string(entry.path().join("stat")).ok())
        .filter_map(|stat| ticks_of(&stat, group))
        .sum();
    Some(Duration::from_millis(ticks * 1000 / ticks_per_second.max(1)))
}

/// The ticks of one line of `/proc/<pid>/stat` (proc(5)), if it is of this process group: its own and those of children that it waited for.
fn ticks_of(stat: &str, group: u32) -> Option<u64> {
    // The name is in parentheses and may hold anything, parentheses included.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    // After the name: state is field 3 of proc(5), pgrp 5, utime to cstime 14 to 17.
    if fields.get(2)?.parse() != Ok(group) {
        return None;
    }
    fields.get(11..15)?.iter().map(|ticks| ticks.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let stat = "77 (a) b (c)) S 1 42 42 0 -1 4194560 100 0 0 0 3 4 5 6 20 0 1 0 100";
        assert_eq!(ticks_of(stat, 42), Some(3 + 4 + 5 + 6));
        assert_eq!(ticks_of(stat, 43), None);
        assert_eq!(ticks_of("garbage", 42), None);
    }

    #[test]
    fn the_work_of_a_busy_group_is_seen() {
        // SAFETY: getpgrp cannot fail.
        let group = u32::try_from(unsafe { libc::getpgrp() }).unwrap();
        let before = process_group_time(group).unwrap();
        let begun = std::time::Instant::now();
        while begun.elapsed() < Duration::from_millis(300) {
            std::hint::black_box(begun);
        }
        assert!(process_group_time(group).unwrap() > before);
    }
}
