//! Looks for the work of processes that compute without a byte of output, where the sandbox's policy counts their progress.
//!
//! The one periodic task of the agent. It runs only while such a process lives and ends with the last one.

use std::collections::{HashMap, HashSet};
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
        if inner.sampling || inner.gate.ledger.sampled().next().is_none() {
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
            let processes: Vec<_> = inner.gate.ledger.sampled().collect();
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
                activity.lock().gate.ledger.progress(*hold, 0, now);
            }
        }
        known = now_known;
        tokio::time::sleep(PERIOD).await;
    }
}

/// The processor time of a process and of what it started: its control group's where it has one of its own, else its process group's and
/// its descendants'.
fn processor_time(pid: u32) -> Option<Duration> {
    own_group_time(pid).or_else(|| family_time(pid))
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

fn family_time(leader: u32) -> Option<Duration> {
    let ticks_per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().and_then(|n| u64::try_from(n).ok())?;
    let running: Vec<_> = std::fs::read_dir("/proc")
        .ok()?
        .flatten()
        .filter(|entry| entry.file_name().as_encoded_bytes().first().is_some_and(u8::is_ascii_digit))
        .filter_map(|entry| Running::parse(&std::fs::read_to_string(entry.path().join("stat")).ok()?))
        .collect();
    Some(Duration::from_millis(family_ticks(leader, &running) * 1000 / ticks_per_second.max(1)))
}

/// One process, as `/proc/<pid>/stat` has it (proc(5)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Running {
    pid: u32,
    parent: u32,
    group: u32,
    /// Its own and those of children that it waited for.
    ticks: u64,
}

impl Running {
    fn parse(stat: &str) -> Option<Self> {
        // The name is in parentheses and may hold anything, parentheses included.
        let (start, rest) = stat.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        // After the name: state is field 3, ppid 4, pgrp 5, utime to cstime 14 to 17.
        Some(Self {
            pid: start.split_whitespace().next()?.parse().ok()?,
            parent: fields.get(1)?.parse().ok()?,
            group: fields.get(2)?.parse().ok()?,
            ticks: fields.get(11..15)?.iter().map(|ticks| ticks.parse::<u64>().ok()).sum::<Option<_>>()?,
        })
    }
}

/// The ticks of the leader's process group and of its descendants: timeout(1) and shells with job control give what they start a group
/// of its own.
fn family_ticks(leader: u32, running: &[Running]) -> u64 {
    let mut family: HashSet<u32> = HashSet::from([leader]);
    loop {
        let joins = |one: &&Running| {
            !family.contains(&one.pid) && (one.group == leader || family.contains(&one.parent))
        };
        let new: Vec<_> = running.iter().filter(joins).map(|one| one.pid).collect();
        if new.is_empty() {
            break;
        }
        family.extend(new);
    }
    running.iter().filter(|one| family.contains(&one.pid)).map(|one| one.ticks).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let stat = "77 (a) b (c)) S 1 42 43 0 -1 4194560 100 0 0 0 3 4 5 6 20 0 1 0 100";
        assert_eq!(
            Running::parse(stat),
            Some(Running { pid: 77, parent: 1, group: 42, ticks: 3 + 4 + 5 + 6 })
        );
        assert_eq!(Running::parse("garbage"), None);
    }

    #[test]
    fn work_in_a_group_of_its_own_is_the_commands_work() {
        let one = |pid, parent, group, ticks| Running { pid, parent, group, ticks };
        // A shell, timeout(1) below it with a group of its own, its child, an orphan of the shell's group, and a stranger.
        let running = [
            one(20, 1, 10, 8),
            one(12, 11, 11, 4),
            one(10, 1, 10, 1),
            one(11, 10, 11, 2),
            one(30, 1, 30, 16),
        ];
        assert_eq!(family_ticks(10, &running), 1 + 2 + 4 + 8);
        assert_eq!(family_ticks(99, &running), 0);
    }

    #[test]
    fn the_work_of_a_busy_process_is_seen() {
        let before = family_time(std::process::id()).unwrap();
        let begun = std::time::Instant::now();
        while begun.elapsed() < Duration::from_millis(300) {
            std::hint::black_box(begun);
        }
        assert!(family_time(std::process::id()).unwrap() > before);
    }
}
