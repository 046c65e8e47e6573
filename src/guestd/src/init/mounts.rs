//! The file systems of a machine, as a table of rows that one loop walks.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

use super::console::say;

/// One file system to mount.
#[derive(Debug)]
pub(super) struct Row {
    pub source: &'static str,
    pub target: &'static str,
    pub file_system: &'static str,
    pub flags: MsFlags,
    pub data: &'static str,
    /// Without it the agent cannot work, so the machine is powered off instead of started.
    pub required: bool,
}

const NO_SUID: MsFlags = MsFlags::MS_NOSUID;
const NO_DEV: MsFlags = MsFlags::MS_NODEV;
const NO_EXEC: MsFlags = MsFlags::MS_NOEXEC;
const INERT: MsFlags = NO_SUID.union(NO_DEV).union(NO_EXEC);

/// What both stages need: the initramfs stage mounts these first and moves them into the real root.
pub(super) const KERNEL_TABLE: &[Row] = &[
    Row {
        source: "devtmpfs",
        target: "/dev",
        file_system: "devtmpfs",
        flags: NO_SUID,
        data: "mode=0755",
        required: true,
    },
    Row { source: "proc", target: "/proc", file_system: "proc", flags: INERT, data: "", required: true },
    Row { source: "sysfs", target: "/sys", file_system: "sysfs", flags: INERT, data: "", required: false },
];

/// What a machine needs on top, parents before children.
pub(super) const MACHINE_TABLE: &[Row] = &[
    Row {
        source: "devpts",
        target: "/dev/pts",
        file_system: "devpts",
        flags: NO_SUID.union(NO_EXEC),
        data: "gid=5,mode=620,ptmxmode=666",
        required: false,
    },
    Row {
        source: "tmpfs",
        target: "/dev/shm",
        file_system: "tmpfs",
        flags: NO_SUID.union(NO_DEV),
        data: "mode=1777",
        required: false,
    },
    Row {
        source: "tmpfs",
        target: "/run",
        file_system: "tmpfs",
        flags: NO_SUID.union(NO_DEV),
        data: "mode=0755",
        required: false,
    },
    Row {
        source: "tmpfs",
        target: "/tmp",
        file_system: "tmpfs",
        flags: NO_SUID.union(NO_DEV),
        data: "mode=1777",
        required: false,
    },
    Row {
        source: "cgroup2",
        target: "/sys/fs/cgroup",
        file_system: "cgroup2",
        flags: INERT,
        data: "nsdelegate,memory_recursiveprot",
        required: false,
    },
];

/// Walks a table. A row that fails is reported; the first required one that fails ends the walk with its message.
pub(super) fn walk(table: &[Row]) -> Result<(), String> {
    for row in table {
        let Err(message) = mount_at(row.source, row.target, row.file_system, row.flags, row.data) else {
            continue;
        };
        if row.required {
            return Err(message);
        }
        say!("{message}");
    }
    Ok(())
}

/// Mounts one file system, making its mount point; the error is one line that says what and why.
pub(super) fn mount_at(
    source: &str,
    target: &str,
    file_system: &str,
    flags: MsFlags,
    data: &str,
) -> Result<(), String> {
    make_folder(target, 0o755).map_err(|error| format!("cannot make the mount point {target}: {error}"))?;
    let why = match mount(Some(source), target, Some(file_system), flags, Some(data)) {
        // Busy: the same file system is there already, from the initramfs stage or from the kernel itself.
        Ok(()) | Err(Errno::EBUSY) => return Ok(()),
        Err(Errno::ENODEV) => {
            "this kernel does not know that file system and has no module for it".to_owned()
        }
        Err(Errno::EINVAL) => {
            "no such file system is on it, or it does not know one of the options".to_owned()
        }
        Err(errno) => errno.to_string(),
    };
    Err(format!("cannot mount {source} on {target} as {file_system}: {why}"))
}

/// Makes a folder with exactly these permissions; one that exists already is left as it is.
pub(super) fn make_folder(path: &str, mode: u32) -> io::Result<()> {
    if Path::new(path).is_dir() {
        return Ok(());
    }
    std::fs::create_dir_all(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_rows() -> impl Iterator<Item = &'static Row> {
        KERNEL_TABLE.iter().chain(MACHINE_TABLE)
    }

    #[test]
    fn no_target_is_mounted_twice() {
        let mut targets: Vec<_> = all_rows().map(|row| row.target).collect();
        targets.sort_unstable();
        targets.dedup();
        assert_eq!(targets.len(), all_rows().count());
    }

    #[test]
    fn a_parent_comes_before_its_children() {
        let targets: Vec<_> = all_rows().map(|row| row.target).collect();
        for (position, target) in targets.iter().enumerate() {
            let child_before =
                targets[..position].iter().any(|earlier| earlier.starts_with(&format!("{target}/")));
            assert!(!child_before, "{target} would hide a file system mounted before it");
        }
    }

    #[test]
    fn nothing_in_the_table_honours_setuid() {
        assert!(all_rows().all(|row| row.flags.contains(MsFlags::MS_NOSUID)));
    }

    #[test]
    fn folders_that_everybody_writes_to_are_sticky() {
        for row in all_rows().filter(|row| ["/tmp", "/dev/shm"].contains(&row.target)) {
            assert!(row.data.split(',').any(|option| option == "mode=1777"), "{}", row.target);
        }
    }

    #[test]
    fn targets_are_absolute_and_plain() {
        assert!(all_rows().all(|row| row.target.starts_with('/') && !row.target.ends_with('/')));
    }
}
