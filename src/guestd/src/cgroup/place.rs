//! Where in the machine's hierarchy the agent may make groups.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{FsType, statfs};

/// From linux/magic.h.
const CGROUP2_MAGIC: FsType = FsType(0x6367_7270);

/// Where the agent's own processes go when their group is to be divided: a group with members may not hand controllers on
/// (cgroup-v2.rst, "no internal process constraint").
const AGENT_GROUP: &str = "agent";

/// What a service manager puts on a group that it leaves to its service; systemd.resource-control(5).
const DELEGATION_MARKS: [&std::ffi::CStr; 2] = [c"user.delegate", c"trusted.delegate"];

/// Which hierarchy an agent uses.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Choice {
    /// None.
    Off,
    /// This folder in a cgroup v2 file system, made when it is missing.
    At(PathBuf),
    /// That of the machine whose first process started this one.
    Machine,
    /// That of the container whose first process started this one.
    Container,
    /// An ordinary service's: its own group, when that was delegated to it.
    Delegated,
}

/// The folder to make groups in, ready to be divided; the error is why there is none, in one line.
pub(super) fn find(choice: &Choice) -> Result<PathBuf, String> {
    match choice {
        Choice::Off => Err("they are switched off".to_owned()),
        Choice::At(root) => {
            // Before anything is made.
            check_file_system(if root.exists() { root } else { root.parent().unwrap_or(root) })?;
            make_directory(root).map_err(|error| format!("{}: {error}", root.display()))?;
            Ok(root.clone())
        }
        Choice::Machine => own_group().and_then(|root| clear(&root)),
        Choice::Container => {
            let root = own_group()?;
            if is_top(&root) {
                return Err("the container has no group of its own".to_owned());
            }
            clear(&root)
        }
        Choice::Delegated => {
            let root = own_group()?;
            if !DELEGATION_MARKS.iter().any(|mark| is_marked(&root, mark)) {
                return Err(format!("{} was not delegated to this service", root.display()));
            }
            clear(&root)
        }
    }
}

pub(super) fn make_directory(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        done => done,
    }
}

fn check_file_system(root: &Path) -> Result<(), String> {
    match statfs(root) {
        Ok(found) if found.filesystem_type() == CGROUP2_MAGIC => Ok(()),
        Ok(_) => Err(format!("{} is in no cgroup v2 file system", root.display())),
        Err(error) => Err(format!("{}: {error}", root.display())),
    }
}

/// The folder of the group that this process is in.
fn own_group() -> Result<PathBuf, String> {
    let read = |path| fs::read_to_string(path).map_err(|error| format!("{path}: {error}"));
    let mount = mount_point(&read("/proc/self/mountinfo")?).ok_or("no cgroup v2 file system is mounted")?;
    let groups = read("/proc/self/cgroup")?;
    let group = own_path(&groups).ok_or("this process is in no cgroup v2 group")?;
    let root = mount.join(group.trim_start_matches('/'));
    check_file_system(&root)?;
    Ok(root)
}

/// proc_pid_mountinfo(5): the mount point is the fifth field, the type the first after the dash.
fn mount_point(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        (right.split(' ').next()? == "cgroup2").then(|| left.split(' ').nth(4).map(PathBuf::from))?
    })
}

/// cgroups(7): the line of version 2 is numbered 0 and names no controllers.
fn own_path(cgroup: &str) -> Option<&str> {
    cgroup.lines().find_map(|line| line.strip_prefix("0::"))
}

fn is_marked(group: &Path, mark: &std::ffi::CStr) -> bool {
    let Ok(path) = CString::new(group.as_os_str().as_bytes()) else { return false };
    let mut value = [0_u8; 1];
    // SAFETY: two C strings and a buffer with its length.
    let length =
        unsafe { libc::getxattr(path.as_ptr(), mark.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    length == 1 && value[0] == b'1'
}

/// The one group of a kernel that has no parent has no type either.
fn is_top(group: &Path) -> bool {
    !group.join("cgroup.type").exists()
}

/// Moves what is in the group itself to a child. The root of a machine's hierarchy is free of that rule, and has processes that cannot
/// be moved: the kernel's.
fn clear(root: &Path) -> Result<PathBuf, String> {
    if is_top(root) {
        return Ok(root.to_owned());
    }
    let agent = root.join(AGENT_GROUP);
    let failed = |error: io::Error| format!("{}: {error}", agent.display());
    make_directory(&agent).map_err(failed)?;
    for pid in fs::read_to_string(root.join("cgroup.procs")).map_err(failed)?.lines() {
        match fs::write(agent.join("cgroup.procs"), pid) {
            // It ended.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            done => done.map_err(failed)?,
        }
    }
    Ok(root.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hierarchy_is_found_beside_those_of_version_1() {
        let mounts = "33 32 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:7 - cgroup2 cgroup2 rw\n";
        assert_eq!(mount_point(mounts), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(mount_point("33 32 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"), None);
        let own = "9:name=systemd:/\n4:memory:/x\n0::/system.slice/guestd.service\n";
        assert_eq!(own_path(own), Some("/system.slice/guestd.service"));
    }

    #[test]
    fn a_folder_of_another_file_system_is_no_hierarchy() {
        let folder = tempfile::tempdir().unwrap();
        let error = find(&Choice::At(folder.path().join("made"))).unwrap_err();
        assert!(error.contains("no cgroup v2 file system"), "{error}");
    }
}
