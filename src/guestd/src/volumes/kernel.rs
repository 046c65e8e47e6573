//! mount(2) and umount2(2).

use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::Mounter;

/// The running kernel.
#[derive(Clone, Copy, Debug, Default)]
pub struct Kernel;

impl Mounter for Kernel {
    fn mount(&self, source: &str, path: &Path, options: &str) -> io::Result<()> {
        std::fs::create_dir_all(path)?;
        mount(Some(source), path, Some("nfs"), MsFlags::MS_SYNCHRONOUS, Some(options)).map_err(|errno| {
            match errno {
                Errno::ENODEV => io::Error::new(io::ErrorKind::Unsupported, "this kernel has no NFS"),
                errno => errno.into(),
            }
        })
    }

    fn unmount(&self, path: &Path) -> io::Result<()> {
        // Forced, so that a dead server does not hold it; lazily, when somebody is still in it.
        umount2(path, MntFlags::MNT_FORCE)
            .or_else(|_| umount2(path, MntFlags::MNT_DETACH))
            .map_err(io::Error::from)
    }

    fn is_mounted(&self, path: &Path) -> bool {
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        has_mount(&table, path)
    }
}

/// Whether the table (proc_pid_mountinfo(5)) has an NFS mount there.
fn has_mount(table: &str, path: &Path) -> bool {
    table.lines().any(|line| {
        let Some((fields, kind)) = line.split_once(" - ") else { return false };
        kind.starts_with("nfs")
            && fields.split(' ').nth(4).is_some_and(|point| Path::new(&unescaped(point)) == path)
    })
}

/// The table writes blanks and backslashes as octal escapes.
fn unescaped(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (escape, plain)| text.replace(escape, plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_found_by_its_path_and_kind() {
        let table = "36 35 0:30 / /mnt/my\\040data rw - nfs 192.0.2.1:/v rw,vers=3\n37 35 8:1 / /mnt/disk rw - ext4 /dev/vda rw\n";
        assert!(has_mount(table, Path::new("/mnt/my data")));
        assert!(!has_mount(table, Path::new("/mnt/disk")));
        assert!(!has_mount(table, Path::new("/mnt")));
    }
}
