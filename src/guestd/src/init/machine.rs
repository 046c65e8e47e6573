//! The machine stage: everything between "the root file system is there" and "the agent can start".
//!
//! Nothing here is fatal except for the required rows of the mount table: a sandbox without a host name is still a
//! sandbox. Each step says on the console what failed and why.

use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};

use super::command_line::CommandLine;
use super::console::say;
use super::{mounts, network};

const DEFAULT_HOSTNAME: &str = "sandbox";

/// devtmpfs has the device nodes but not these links, and `<(...)` in bash needs `/dev/fd`.
const DEVICE_LINKS: &[(&str, &str)] = &[
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Written once, in order. Paths are below `/proc/sys`.
const SYSCTLS: &[(&str, &str)] = &[
    // Only errors reach the console: it is an emulated serial port, and each byte stops the machine for a while.
    ("kernel/printk", "4 4 1 4"),
    // What systemd sets everywhere and a bare kernel does not: links in sticky folders are not followed for others.
    ("fs/protected_symlinks", "1"),
    ("fs/protected_hardlinks", "1"),
    ("fs/protected_fifos", "1"),
    ("fs/protected_regular", "1"),
    ("kernel/kptr_restrict", "1"),
    // A development server on port 80 without root, and ping without a setuid program.
    ("net/ipv4/ip_unprivileged_port_start", "0"),
    ("net/ipv4/ping_group_range", "0 2147483647"),
    // The host opens many connections at once; a short queue shows up there as lost connections.
    ("net/core/somaxconn", "4096"),
    // Bundlers and test runners watch whole source trees.
    ("fs/inotify/max_user_watches", "524288"),
    ("fs/inotify/max_user_instances", "1024"),
    // Databases and search engines refuse to start below this.
    ("vm/max_map_count", "262144"),
];

/// Open files: as many as programs may ask for, and a start value that is high enough for most without asking.
const OPEN_FILES: (u64, u64) = (65_536, 1_048_576);

/// Runs the stage. The error is one line for the console; the caller powers the machine off.
pub(super) fn prepare(command_line: &CommandLine) -> Result<(), String> {
    mounts::walk(mounts::MACHINE_TABLE)?;
    report("device links", link_devices());
    set_sysctls();
    set_limits();
    let hostname = hostname(command_line);
    report("host name", nix::unistd::sethostname(&hostname).map_err(io::Error::from));
    report("/etc/hosts", write_if_absent("/etc/hosts", &hosts_file(&hostname)));
    network::bring_up(command_line);
    // Ctrl-Alt-Del and the power button become a SIGINT that PID 1 handles, instead of an instant reset.
    if let Err(errno) = nix::sys::reboot::set_cad_enabled(false) {
        say!("Ctrl-Alt-Del still resets the machine: {errno}");
    }
    Ok(())
}

fn report(what: &str, outcome: io::Result<()>) {
    if let Err(error) = outcome {
        say!("{what}: not set: {error}");
    }
}

fn link_devices() -> io::Result<()> {
    for (target, link) in DEVICE_LINKS {
        match symlink(target, link) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn set_sysctls() {
    for (name, value) in SYSCTLS {
        let path = Path::new("/proc/sys").join(name);
        match std::fs::write(&path, value) {
            // A kernel that was built without the feature has nothing to set.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            outcome => report(name, outcome),
        }
    }
}

fn set_limits() {
    let set = |name: &str, resource, (soft, hard)| {
        if let Err(errno) = setrlimit(resource, soft, hard) {
            say!("limit of {name}: not set: {errno}");
        }
    };
    set("open files", Resource::RLIMIT_NOFILE, OPEN_FILES);
    // A core file goes to a disk that is memory; whoever wants one may still ask with `ulimit -c`.
    set("core files", Resource::RLIMIT_CORE, (0, RLIM_INFINITY));
}

/// The command line wins over the image, so that a host can name a sandbox without making an image for it.
fn hostname(command_line: &CommandLine) -> String {
    let from_image = || std::fs::read_to_string("/etc/hostname").ok();
    command_line
        .value("guestd.hostname")
        .map(str::to_owned)
        .or_else(from_image)
        .map(|name| name.trim().to_owned())
        .filter(|name| is_hostname(name))
        .unwrap_or_else(|| DEFAULT_HOSTNAME.to_owned())
}

fn is_hostname(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    (1..=64).contains(&name.len()) && name.chars().all(plain) && !name.starts_with(['-', '.'])
}

fn hosts_file(hostname: &str) -> String {
    format!("127.0.0.1 localhost {hostname}\n::1 localhost ip6-localhost ip6-loopback\n")
}

/// An image may bring its own file, and a template that was booted before has written one.
pub(super) fn write_if_absent(path: &str, text: &str) -> io::Result<()> {
    if Path::new(path).exists() { Ok(()) } else { std::fs::write(path, text) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_names_the_machine() {
        assert_eq!(hostname(&CommandLine::parse("guestd.hostname=i1a2b3")), "i1a2b3");
    }

    #[test]
    fn a_host_name_that_would_break_the_hosts_file_is_refused() {
        for name in ["", "two words", "a\nb", "-flag", "../x", &"x".repeat(65)] {
            assert!(!is_hostname(name), "{name:?}");
        }
        assert!(is_hostname("i1a2-b3.local"));
    }

    #[test]
    fn localhost_always_resolves() {
        assert!(hosts_file("sandbox").lines().all(|line| line.contains("localhost")));
    }

    #[test]
    fn a_file_of_the_image_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hosts");
        let path = path.to_str().unwrap();
        write_if_absent(path, "first").unwrap();
        write_if_absent(path, "second").unwrap();
        assert_eq!(std::fs::read_to_string(path).unwrap(), "first");
    }

    #[test]
    fn sysctl_names_stay_below_proc_sys() {
        assert!(SYSCTLS.iter().all(|(name, _)| !name.starts_with('/') && !name.contains("..")));
    }
}
