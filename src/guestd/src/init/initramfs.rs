//! The initramfs stage: from the kernel's first memory file system to the root file system of the image.
//!
//! Loads the kernel modules, waits for the root disk, mounts it read-only with a writable layer in memory above it, and
//! makes that the root. What the old root held is freed, except for the agent's own binary.

use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot};

use super::command_line::RootDisk;
use super::console::say;
use super::mounts::mount_at;
use super::{modules, mounts};

/// How long the root disk may take to appear. It is there within some milliseconds once its driver is loaded; five
/// seconds leave room for an emulated machine on a busy host.
const ROOT_DISK_DEADLINE: Duration = Duration::from_secs(5);

const LOWER: &str = "/lower";
const UPPER: &str = "/upper";
const NEW_ROOT: &str = "/newroot";

/// Where the agent's binary is inside the new root, so that a sandbox can run `guestd busy`. The image has an empty
/// file there; the running binary is bind-mounted over it, which costs no memory and always has the right version.
const AGENT_IN_ROOT: &str = "usr/local/bin/guestd";
/// The agent's binary in the initramfs: what the kernel started.
const AGENT: &str = "/init";

/// Runs the stage. The error is one line for the console; the caller powers the machine off.
pub(super) fn enter_root(root: &RootDisk) -> Result<(), String> {
    modules::load_all();
    wait_for(&root.device)?;
    mount_layers(root)?;
    show_agent();
    for row in mounts::KERNEL_TABLE {
        move_mount(row.target, &format!("{NEW_ROOT}{}", row.target))?;
    }
    switch_root()
}

fn wait_for(device: &str) -> Result<(), String> {
    let is_there = || std::fs::metadata(device).is_ok_and(|found| found.file_type().is_block_device());
    let start = Instant::now();
    while !is_there() {
        if start.elapsed() > ROOT_DISK_DEADLINE {
            return Err(format!(
                "the root disk {device} did not appear within {} s; block devices that did: {}. \
                 Either the host gave no such disk, or its driver is not among the image's modules",
                ROOT_DISK_DEADLINE.as_secs(),
                block_devices(),
            ));
        }
        sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn block_devices() -> String {
    let Ok(folder) = std::fs::read_dir("/sys/class/block") else {
        return "unknown, /sys is not mounted".into();
    };
    let names: Vec<_> =
        folder.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    if names.is_empty() { "none".into() } else { names.join(", ") }
}

fn mount_layers(root: &RootDisk) -> Result<(), String> {
    mount_at(&root.device, LOWER, &root.file_system, MsFlags::MS_RDONLY, "")?;
    let size = format!("mode=0755,size={}", root.upper_size);
    mount_at("tmpfs", UPPER, "tmpfs", MsFlags::empty(), &size)?;
    let (data, work) = (format!("{UPPER}/data"), format!("{UPPER}/work"));
    for folder in [&data, &work] {
        mounts::make_folder(folder, 0o755).map_err(|error| format!("cannot make {folder}: {error}"))?;
    }
    let layers = format!("lowerdir={LOWER},upperdir={data},workdir={work}");
    mount_at("overlay", NEW_ROOT, "overlay", MsFlags::empty(), &layers)?;
    for row in mounts::KERNEL_TABLE {
        let target = format!("{NEW_ROOT}{}", row.target);
        mounts::make_folder(&target, 0o755).map_err(|error| format!("cannot make {target}: {error}"))?;
    }
    Ok(())
}

/// Not fatal: the machine works without the command, only `guestd busy` inside it does not.
fn show_agent() {
    let target = format!("{NEW_ROOT}/{AGENT_IN_ROOT}");
    let shown = || -> Result<(), String> {
        if !Path::new(&target).exists() {
            File::create(&target).map_err(|error| error.to_string())?;
        }
        let bind = MsFlags::MS_BIND;
        mount(Some(AGENT), target.as_str(), None::<&str>, bind, None::<&str>).map_err(|e| e.to_string())?;
        let read_only =
            bind | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(None::<&str>, target.as_str(), None::<&str>, read_only, None::<&str>).map_err(|e| e.to_string())
    };
    if let Err(why) = shown() {
        say!("the command /{AGENT_IN_ROOT} is not available in the sandbox: {why}");
    }
}

fn move_mount(from: &str, to: &str) -> Result<(), String> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .map_err(|errno| format!("cannot move {from} to {to}: {errno}"))
}

/// The classic order: into the new root first, then move it over `/`, then chroot, so that no step ever resolves a
/// path in the wrong tree.
fn switch_root() -> Result<(), String> {
    chdir(NEW_ROOT).map_err(|errno| format!("cannot enter {NEW_ROOT}: {errno}"))?;
    move_mount(".", "/")?;
    chroot(".").map_err(|errno| format!("cannot change the root: {errno}"))?;
    chdir("/").map_err(|errno| format!("cannot enter the new root: {errno}"))
}
