//! Who else has a command's output open: the processes whose descriptors are the other end of it, found in `/proc`.
//!
//! Looked for only when a command has ended and its output has not, and with a limit on the time: it is a hint for people.

use std::fs;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How many are named.
const NAMED: usize = 4;

/// How long the search may take.
const TIME: Duration = Duration::from_millis(20);

/// A process that keeps an output open.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Holder {
    pub pid: u32,
    /// As the kernel has it: at most 15 bytes.
    pub name: String,
}

/// What a link in `/proc/<pid>/fd` of the writing end reads: a pipe has one inode for both its ends.
pub(super) fn link_of_pipe(pipe: &impl AsRawFd) -> Option<PathBuf> {
    let stat = stat_of(pipe.as_raw_fd()).ok()?;
    Some(PathBuf::from(format!("pipe:[{}]", stat.st_ino)))
}

/// The slave of a terminal, by its master.
pub(super) fn link_of_terminal(master: &impl AsRawFd) -> Option<PathBuf> {
    let mut number: libc::c_uint = 0;
    // SAFETY: TIOCGPTN writes one unsigned int.
    let asked = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTN, &raw mut number) };
    (asked == 0).then(|| PathBuf::from(format!("/dev/pts/{number}")))
}

fn stat_of(fd: RawFd) -> io::Result<libc::stat> {
    // SAFETY: a plain structure of integers.
    let mut stat: libc::stat = unsafe { mem::zeroed() };
    // SAFETY: fstat fills it in.
    if unsafe { libc::fstat(fd, &raw mut stat) } < 0 { Err(io::Error::last_os_error()) } else { Ok(stat) }
}

/// Searches those that came after the process `first`: who holds on is a descendant of it. Blocks for as long as [`TIME`].
pub(super) fn find(first: u32, links: &[PathBuf]) -> Vec<Holder> {
    let mut pids: Vec<u32> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid| *pid != std::process::id())
        .collect();
    sort_from(first, &mut pids);
    let until = Instant::now() + TIME;
    let mut found = Vec::new();
    for pid in pids {
        if found.len() == NAMED || Instant::now() > until {
            break;
        }
        let folder = PathBuf::from(format!("/proc/{pid}"));
        if holds(&folder, links) {
            let name = fs::read_to_string(folder.join("comm")).unwrap_or_default();
            found.push(Holder { pid, name: name.trim_end().to_owned() });
        }
    }
    found
}

/// Numbers are given out in a circle: after the largest come small ones (proc_sys_kernel(5), pid_max).
fn sort_from(first: u32, pids: &mut [u32]) {
    pids.sort_unstable_by_key(|pid| pid.wrapping_sub(first));
}

fn holds(process: &Path, links: &[PathBuf]) -> bool {
    fs::read_dir(process.join("fd"))
        .into_iter()
        .flatten()
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .any(|target| links.contains(&target))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn the_process_that_holds_the_pipe_is_named() {
        let (reader, writer) = io::pipe().unwrap();
        let mut sleeper =
            Command::new("/bin/sleep").arg("100").stdin(Stdio::null()).stdout(writer).spawn().unwrap();
        let link = [link_of_pipe(&reader).unwrap()];
        let found = find(std::process::id(), &link);
        sleeper.kill().unwrap();
        sleeper.wait().unwrap();
        assert_eq!(found, [Holder { pid: sleeper.id(), name: "sleep".to_owned() }]);
        assert_eq!(find(std::process::id(), &link), []);
    }

    #[test]
    fn a_descendant_is_looked_at_early_when_the_numbers_have_gone_round() {
        let mut pids = [1, 301, 32_000, 32_599, 32_600, 32_700];
        sort_from(32_600, &mut pids);
        assert_eq!(pids, [32_600, 32_700, 1, 301, 32_000, 32_599]);
    }
}
