//! The control group of one command.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// How deep a command may have divided its group for it to be removed.
const DEPTH: usize = 16;

/// What a group used since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct GroupUsage {
    pub user: Duration,
    pub system: Duration,
    /// In bytes; None where the kernel does not tell.
    pub peak_memory: Option<u64>,
    /// How many of its processes the kernel killed for want of memory.
    pub oom_kills: u64,
}

/// A group with one command in it. Removed when it is empty, which may be long after the command: what a finished command leaves running
/// stays.
#[derive(Debug)]
pub struct Group {
    path: PathBuf,
}

impl Group {
    /// A group that exists.
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory, for starting a process in it.
    ///
    /// # Errors
    /// The system's.
    pub fn open(&self) -> io::Result<File> {
        File::options().read(true).custom_flags(libc::O_DIRECTORY).open(&self.path)
    }

    /// Kills everything in it and below.
    ///
    /// # Errors
    /// The system's.
    pub fn kill(&self) -> io::Result<()> {
        match fs::write(self.path.join("cgroup.kill"), "1") {
            // Before Linux 5.14.
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.kill_each(),
            done => done,
        }
    }

    /// Stops the group, so that nothing escapes by forking, and kills one by one.
    fn kill_each(&self) -> io::Result<()> {
        let _without = fs::write(self.path.join("cgroup.freeze"), "1");
        for pid in fs::read_to_string(self.path.join("cgroup.procs"))?.lines() {
            if let Ok(pid) = pid.parse::<i32>()
                && pid > 1
            {
                let _gone = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        let _without = fs::write(self.path.join("cgroup.freeze"), "0");
        Ok(())
    }

    /// What is in it and below, by number; as far as it can be read.
    pub fn processes(&self) -> Vec<i32> {
        let mut found = Vec::new();
        collect(&self.path, DEPTH, &mut found);
        found
    }

    pub fn usage(&self) -> GroupUsage {
        let cpu = self.read("cpu.stat");
        let micros = |key| Duration::from_micros(value(&cpu, key).unwrap_or(0));
        GroupUsage {
            user: micros("user_usec"),
            system: micros("system_usec"),
            peak_memory: self.read("memory.peak").trim().parse().ok(),
            oom_kills: value(&self.read("memory.events"), "oom_kill").unwrap_or(0),
        }
    }

    fn read(&self, file: &str) -> String {
        fs::read_to_string(self.path.join(file)).unwrap_or_default()
    }

    /// Removes the group now, or when the last process in it has ended.
    pub fn remove_when_empty(self) {
        if remove(&self.path, DEPTH).is_ok() {
            return;
        }
        tokio::spawn(async move {
            if let Err(error) = emptied(&self.path).await {
                tracing::warn!(group = %self.path.display(), %error, "a control group is not watched any more");
            }
            if let Err(error) = remove(&self.path, DEPTH) {
                tracing::warn!(group = %self.path.display(), %error, "an empty control group stays");
            }
        });
    }
}

fn collect(group: &Path, depth: usize, found: &mut Vec<i32>) {
    let own = std::process::id();
    let listed = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    // 0 is a process that this one cannot see.
    let pids = listed.lines().filter_map(|pid| pid.parse::<i32>().ok());
    found.extend(pids.filter(|pid| *pid > 1 && pid.unsigned_abs() != own));
    if depth == 0 {
        return;
    }
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), depth - 1, found);
        }
    }
}

/// Waits until nothing is left in a group. The kernel tells: `cgroup.events` is ready for POLLPRI when it has changed.
async fn emptied(group: &Path) -> io::Result<()> {
    let file = File::open(group.join("cgroup.events"))?;
    // SAFETY: a File is the same open descriptor for as long as it lives.
    let events = unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) }?;
    loop {
        // From its beginning each time. What changes after it makes the descriptor ready again.
        let mut text = [0; 256];
        // SAFETY: `text` is valid for its length.
        let length =
            unsafe { libc::pread(events.get_ref().as_raw_fd(), text.as_mut_ptr().cast(), text.len(), 0) };
        // An error says that the group is gone.
        let Ok(length) = usize::try_from(length) else { return Ok(()) };
        if value(&String::from_utf8_lossy(&text[..length]), "populated") != Some(1) {
            return Ok(());
        }
        events.ready(Interest::PRIORITY).await?.clear_ready();
    }
}

/// Removes a group and the groups that its command made below it.
pub(super) fn remove(group: &Path, depth: usize) -> io::Result<()> {
    match fs::remove_dir(group) {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) if depth == 0 => return Err(error),
        Err(_) => {}
    }
    for entry in fs::read_dir(group)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove(&entry.path(), depth - 1)?;
        }
    }
    fs::remove_dir(group)
}

/// The number after `key` in a file of "key number" lines.
fn value(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_is_read_from_the_groups_files() {
        let folder = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| fs::write(folder.path().join(file), text).unwrap();
        write("cpu.stat", "usage_usec 30\nuser_usec 20\nsystem_usec 10\n");
        write("memory.peak", "4096\n");
        write("memory.events", "low 0\noom 3\noom_kill 2\noom_group_kill 0\n");
        let usage = Group::at(folder.path().to_owned()).usage();
        assert_eq!((usage.user.as_micros(), usage.system.as_micros()), (20, 10));
        assert_eq!((usage.peak_memory, usage.oom_kills), (Some(4096), 2));
        let none = Group::at(folder.path().join("gone")).usage();
        assert_eq!(none, GroupUsage::default());
    }

    #[test]
    fn what_a_command_divided_is_found_below_its_group() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("a/b")).unwrap();
        fs::write(folder.path().join("cgroup.procs"), "0\n1\n300\n").unwrap();
        fs::write(folder.path().join("a/b/cgroup.procs"), format!("{}\n301\n", std::process::id())).unwrap();
        assert_eq!(Group::at(folder.path().to_owned()).processes(), [300, 301]);
        assert!(Group::at(folder.path().join("gone")).processes().is_empty());
    }

    #[test]
    fn groups_that_a_command_made_go_with_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let group = folder.path().join("c-1");
        fs::create_dir_all(group.join("a/b")).unwrap();
        remove(&group, DEPTH).unwrap();
        assert!(!group.exists());
        remove(&group, DEPTH).unwrap();
    }
}
