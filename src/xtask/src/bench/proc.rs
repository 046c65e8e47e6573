//! What the kernel says about a process: memory, processor time, wake-ups, and what it holds.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

#[derive(Clone, Copy, Debug)]
pub struct Process {
    pid: u32,
}

/// From `smaps_rollup`, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    pub rss: u64,
    pub pss: u64,
    /// What would be free without this process.
    pub private: u64,
}

/// What a process may leave behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    pub descriptors: usize,
    pub threads: usize,
    /// Children that ended and were not waited for.
    pub zombies: usize,
    pub children: usize,
    /// Of the whole machine.
    pub cgroups: usize,
}

impl Process {
    pub fn new(pid: u32) -> Self {
        Self { pid }
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.pid))
    }

    fn read(&self, name: &str) -> Result<String> {
        let path = self.path(name);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    }

    /// User and system time of all threads, those that ended included: the process's own clock, finer than the ticks of /proc.
    pub fn cpu(&self) -> Result<Duration> {
        let pid = Pid::from_raw(i32::try_from(self.pid)?);
        let clock = clock_getcpuclockid(pid).context("no clock of that process")?;
        Ok(clock_gettime(clock)?.into())
    }

    pub fn memory(&self) -> Result<Memory> {
        Ok(memory(&self.read("smaps_rollup")?))
    }

    /// The pids of its children.
    pub fn children(&self) -> Result<Vec<u32>> {
        Ok(children(self.pid)?.into_iter().map(|(pid, _)| pid).collect())
    }

    pub fn threads(&self) -> Result<usize> {
        Ok(fs::read_dir(self.path("task"))?.count())
    }

    /// How often any thread went to sleep by itself.
    pub fn voluntary_switches(&self) -> Result<u64> {
        let mut sum = 0;
        for task in fs::read_dir(self.path("task"))?.flatten() {
            // A thread may end in between; its switches are not those of an idle agent.
            let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
            sum += line(&status, "voluntary_ctxt_switches:").unwrap_or(0);
        }
        Ok(sum)
    }

    pub fn held(&self) -> Result<Held> {
        let children = children(self.pid)?;
        Ok(Held {
            descriptors: fs::read_dir(self.path("fd"))?.count(),
            threads: self.threads()?,
            zombies: children.iter().filter(|(_, state)| *state == 'Z').count(),
            children: children.len(),
            cgroups: folders(PathBuf::from("/sys/fs/cgroup"), 8),
        })
    }
}

/// The number after a name at the beginning of a line.
fn line(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse().ok()
}

fn memory(rollup: &str) -> Memory {
    let bytes = |name| line(rollup, name).unwrap_or(0) * 1024;
    Memory {
        rss: bytes("Rss:"),
        pss: bytes("Pss:"),
        private: bytes("Private_Clean:") + bytes("Private_Dirty:"),
    }
}

/// The children of `parent` with their states.
fn children(parent: u32) -> Result<Vec<(u32, char)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        let mut fields = stat.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ');
        let (state, ppid) = (fields.next(), fields.next());
        if ppid == Some(&parent.to_string()) {
            found.extend(state.and_then(|state| state.chars().next()).map(|state| (pid, state)));
        }
    }
    Ok(found)
}

fn folders(path: PathBuf, depth: usize) -> usize {
    let Ok(entries) = fs::read_dir(path) else { return 0 };
    let below = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    below.map(|entry| 1 + if depth > 0 { folders(entry.path(), depth - 1) } else { 0 }).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_shows_on_the_clock_of_a_process_and_sleep_does_not() {
        let here = Process::new(std::process::id());
        let before = here.cpu().unwrap();
        let sum: u64 = (0..2_000_000_u64).map(std::hint::black_box).sum();
        assert!(sum > 0 && here.cpu().unwrap() > before);
    }

    #[test]
    fn memory_adds_up_what_is_private() {
        let text = "00-ff ---p [rollup]\nRss:    2048 kB\nPss:    1024 kB\nPrivate_Clean:   4 kB\nPrivate_Dirty:   6 kB\n";
        let memory = memory(text);
        assert_eq!((memory.rss, memory.pss, memory.private), (2 << 20, 1 << 20, 10 << 10));
    }

    #[test]
    fn this_process_holds_what_it_holds() {
        let here = Process::new(std::process::id());
        let before = here.held().unwrap();
        let file = fs::File::open("/proc/self/stat").unwrap();
        assert!(here.memory().unwrap().rss > 0);
        assert!(before.threads >= 1 && before.descriptors >= 3);
        drop(file);
    }
}
