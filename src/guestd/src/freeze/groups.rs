//! The control groups that a freeze is about: which they are, and how one is stopped and started (Linux's cgroup-v2 documentation).
//!
//! A frozen group stops everything below it, so one write at the top of a subtree is enough, nothing in it can make another group meanwhile,
//! and what the guest itself froze deeper down stays as it was.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// The groups that hold what clients started (contract: envd.md section 2.13).
const WORKLOAD: [&str; 2] = ["user", "ptys"];

/// What has to run on for the machine to answer (contract: envd.md section 4.8). The agent's own group is added to them.
const ALLOWED: [&str; 6] = [
    "init.scope",
    "system.slice/systemd-journald.service",
    "system.slice/rpcbind.service",
    "system.slice/rpcbind.socket",
    "system.slice/rpc-statd.service",
    "socats",
];

/// The longest `cgroup.events` that is read, in bytes; the kernel's has two short lines.
const EVENTS_LIMIT: usize = 256;

/// The hierarchy below one folder.
#[derive(Debug)]
pub(super) struct Groups {
    root: PathBuf,
    allowed: Vec<PathBuf>,
}

/// What one walk found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) targets: Vec<PathBuf>,
    pub(super) allowed: Vec<PathBuf>,
    pub(super) visited: usize,
    /// There are more groups than the caller allows to visit.
    pub(super) truncated: bool,
}

/// What a write to a group came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Written {
    Done,
    /// The group has been removed meanwhile.
    Vanished,
    Failed,
}

impl Groups {
    pub(super) fn new(root: PathBuf) -> Self {
        Self { root, allowed: Vec::new() }
    }

    /// Whether the folder is a cgroup v2 hierarchy at all.
    pub(super) fn exist(&self) -> bool {
        self.root.join("cgroup.controllers").is_file()
    }

    /// Learns where this process is: a freeze must not stop who has to undo it.
    pub(super) fn find_own(&mut self) {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let own = own_group(&read("/proc/self/cgroup"), &read("/proc/self/mountinfo"), &self.root);
        let fixed = ALLOWED.iter().map(|name| self.root.join(name));
        self.allowed = fixed.chain(own).collect();
    }

    /// The groups of clients' commands and terminals.
    pub(super) fn workload(&self) -> Found {
        let targets: Vec<_> =
            WORKLOAD.iter().map(|name| self.root.join(name)).filter(|path| path.is_dir()).collect();
        Found { visited: targets.len(), targets, ..Found::default() }
    }

    /// The tops of all subtrees with nothing in them that has to run on.
    pub(super) fn everything_else(&self, max_groups: usize) -> Found {
        let mut found = Found::default();
        let mut open = vec![self.root.clone()];
        while let Some(folder) = open.pop() {
            let Ok(entries) = fs::read_dir(&folder) else { continue };
            for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
                if found.visited == max_groups {
                    found.truncated = true;
                    return found;
                }
                found.visited += 1;
                let path = entry.path();
                if self.allowed.contains(&path) {
                    found.allowed.push(path);
                } else if self.allowed.iter().any(|allowed| allowed.starts_with(&path)) {
                    open.push(path);
                } else {
                    found.targets.push(path);
                }
            }
        }
        found
    }
}

/// The group of this process as a folder, if it lies below `root`. Freezing an ancestor of it would stop this process, too.
fn own_group(cgroup: &str, mounts: &str, root: &Path) -> Option<PathBuf> {
    let inside = cgroup.lines().find_map(|line| line.strip_prefix("0::"))?;
    // The mount that `root` lies in: its root within the hierarchy, and its mount point (proc_pid_mountinfo(5)).
    let mount = mounts.lines().filter_map(|line| {
        let (fields, kind) = line.split_once(" - ")?;
        let mut fields = fields.split(' ').skip(3);
        let (top, point) = (fields.next()?, fields.next()?);
        (kind.starts_with("cgroup2 ") && root.starts_with(point)).then_some((top, point))
    });
    let (top, point) = mount.max_by_key(|(_, point)| point.len())?;
    let own = Path::new(point).join(Path::new(inside).strip_prefix(top).ok()?);
    (own.starts_with(root) && own != root).then_some(own)
}

/// Asks for the group to be stopped or started.
pub(super) fn write(group: &Path, frozen: bool) -> Written {
    match fs::write(group.join("cgroup.freeze"), if frozen { "1" } else { "0" }) {
        Ok(()) => Written::Done,
        Err(error) if is_gone(&error) => Written::Vanished,
        Err(error) => {
            tracing::warn!(group = %group.display(), frozen, %error, "a control group keeps its state");
            Written::Failed
        }
    }
}

/// Whether somebody asked for the group itself to be frozen.
pub(super) fn is_requested(group: &Path) -> bool {
    fs::read_to_string(group.join("cgroup.freeze")).is_ok_and(|text| text.trim_end() == "1")
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// A group whose state is being waited for.
#[derive(Debug)]
struct Watched {
    events: File,
}

/// How the groups stand when a wait is over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Settled {
    pub(super) frozen: usize,
    pub(super) not_frozen: usize,
    pub(super) unobservable: usize,
    pub(super) vanished: usize,
}

/// Waits until everything in all `groups` stands still, or until `deadline`. The kernel says so itself, so nothing is polled.
pub(super) fn settle(groups: &BTreeSet<PathBuf>, deadline: Instant) -> Settled {
    let mut settled = Settled::default();
    let mut waiting = Vec::new();
    for group in groups {
        match File::open(group.join("cgroup.events")) {
            Ok(events) => waiting.push(Watched { events }),
            Err(error) if is_gone(&error) => settled.vanished += 1,
            Err(_) => settled.unobservable += 1,
        }
    }
    loop {
        waiting.retain(|watched| match state(&watched.events) {
            Ok(Some(false)) => true,
            Ok(Some(true)) => {
                settled.frozen += 1;
                false
            }
            Err(error) if is_gone(&error) => {
                settled.vanished += 1;
                false
            }
            Ok(None) | Err(_) => {
                settled.unobservable += 1;
                false
            }
        });
        let left = deadline.saturating_duration_since(Instant::now());
        if waiting.is_empty() || left.is_zero() {
            settled.not_frozen = waiting.len();
            return settled;
        }
        let mut polled: Vec<_> = waiting
            .iter()
            .map(|watched| libc::pollfd { fd: watched.events.as_raw_fd(), events: libc::POLLPRI, revents: 0 })
            .collect();
        let millis = i32::try_from(left.as_millis()).unwrap_or(i32::MAX).max(1);
        // SAFETY: the array lives through the call and its descriptors are open. An error is an interruption: the loop looks again.
        unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, millis) };
    }
}

/// Whether the group stands still; `None` when its kernel does not say.
fn state(events: &File) -> io::Result<Option<bool>> {
    let mut buffer = [0; EVENTS_LIMIT];
    let count = events.read_at(&mut buffer, 0)?;
    let text = String::from_utf8_lossy(&buffer[..count]);
    Ok(text.lines().find_map(|line| line.strip_prefix("frozen ")).map(|value| value == "1"))
}

/// Whether the group stands still now; false when it cannot be told.
pub(super) fn stands_still(group: &Path) -> bool {
    File::open(group.join("cgroup.events"))
        .and_then(|events| state(&events))
        .is_ok_and(|state| state == Some(true))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(names: &[&str]) -> (tempfile::TempDir, Groups) {
        let root = tempfile::tempdir().unwrap();
        for name in names {
            fs::create_dir_all(root.path().join(name)).unwrap();
        }
        fs::write(root.path().join("cgroup.controllers"), "").unwrap();
        let mut groups = Groups::new(root.path().to_owned());
        groups.find_own();
        (root, groups)
    }

    fn names(root: &Path, paths: &[PathBuf]) -> Vec<String> {
        let mut names: Vec<_> =
            paths.iter().map(|path| path.strip_prefix(root).unwrap().display().to_string()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_the_machine_needs_to_answer_is_never_a_target() {
        let (root, mut groups) = tree(&[
            "init.scope",
            "socats",
            "user/command-1",
            "ptys",
            "system.slice/systemd-journald.service",
            "system.slice/cron.service",
            "system.slice/guestd.service/workers",
            "kubepods/pod",
        ]);
        groups.allowed.push(root.path().join("system.slice/guestd.service"));
        let found = groups.everything_else(100);
        assert_eq!(
            names(root.path(), &found.targets),
            ["kubepods", "ptys", "system.slice/cron.service", "user"]
        );
        assert_eq!(
            names(root.path(), &found.allowed),
            ["init.scope", "socats", "system.slice/guestd.service", "system.slice/systemd-journald.service"]
        );
        assert!(!found.truncated);
        assert_eq!(names(root.path(), &groups.workload().targets), ["ptys", "user"]);
    }

    #[test]
    fn a_machine_full_of_groups_does_not_make_an_endless_walk() {
        let names: Vec<String> = (0..20).map(|number| format!("g{number}")).collect();
        let (_root, groups) = tree(&names.iter().map(String::as_str).collect::<Vec<_>>());
        let found = groups.everything_else(5);
        assert_eq!((found.visited, found.targets.len(), found.truncated), (5, 5, true));
    }

    #[test]
    fn the_agents_own_group_is_found_through_every_kind_of_mount() {
        let own = |cgroup, mounts, root: &str| own_group(cgroup, mounts, Path::new(root));
        let whole = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        let service = "0::/system.slice/guestd.service\n";
        assert_eq!(
            own(service, whole, "/sys/fs/cgroup").unwrap(),
            Path::new("/sys/fs/cgroup/system.slice/guestd.service")
        );
        assert_eq!(own("0::/\n", whole, "/sys/fs/cgroup"), None, "the root cannot be frozen");
        let part = "30 23 0:26 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(
            own("0::/docker/abc/agent\n", part, "/sys/fs/cgroup").unwrap(),
            Path::new("/sys/fs/cgroup/agent")
        );
        let hybrid = format!(
            "29 23 0:25 / /sys/fs/cgroup rw - tmpfs t rw\n{}",
            whole.replace("cgroup rw", "cgroup/unified rw")
        );
        assert_eq!(
            own("9:pids:/\n0::/a\n", &hybrid, "/sys/fs/cgroup/unified").unwrap(),
            Path::new("/sys/fs/cgroup/unified/a")
        );
        assert_eq!(own(service, whole, "/sys/fs/cgroup/elsewhere"), None);
    }

    #[test]
    fn waiting_for_a_group_that_never_settles_ends() {
        let (root, _groups) = tree(&["slow", "done", "silent"]);
        let path = |name: &str| root.path().join(name);
        fs::write(path("slow").join("cgroup.events"), "populated 1\nfrozen 0\n").unwrap();
        fs::write(path("done").join("cgroup.events"), "populated 1\nfrozen 1\n").unwrap();
        fs::write(path("silent").join("cgroup.events"), "populated 1\n").unwrap();
        let all = ["slow", "done", "silent", "gone"].map(path).into();
        let settled = settle(&all, Instant::now() + std::time::Duration::from_millis(20));
        assert_eq!(settled, Settled { frozen: 1, not_frozen: 1, unobservable: 1, vanished: 1 });
    }
}
