//! Whether KVM really runs a kernel here. A `/dev/kvm` that opens proves nothing: on a para-virtual KVM every small probe passes and a
//! kernel never gets anywhere (contract: microvm.md section 8). So a kernel is booted, for a few seconds, and the answer is kept.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::Image;
use super::qemu::{Accelerator, kernel_basics};
use crate::clock;

/// A kernel under KVM starts its init well within a second.
const PROBE_LIMIT: Duration = Duration::from_secs(5);

/// What the kernel prints when it has come so far that it runs programs.
const ALIVE: &[u8] = b"Run /init as init process";

/// The file in the data folder that keeps the answer.
const CACHE: &str = "kvm.json";

/// The probe's answer, good for one boot of the host and one kernel.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Finding {
    boot_id: String,
    kernel: (u64, i64),
    pub usable: bool,
    /// For the operator.
    pub why: String,
}

/// Finds out, or remembers. Takes [`PROBE_LIMIT`] at most.
pub fn find(qemu: &Path, image: &Image, data: &Path) -> Finding {
    let key = fs::metadata(image.file("vmlinux"))
        .map(|found| (found.len(), std::os::unix::fs::MetadataExt::mtime(&found)))
        .unwrap_or_default();
    let cache = data.join(CACHE);
    let known = fs::read(&cache).ok().and_then(|text| serde_json::from_slice::<Finding>(&text).ok());
    let boot_id = clock::boot_id();
    if let Some(known) = known.filter(|known| known.boot_id == boot_id && known.kernel == key) {
        return known;
    }
    let (probed, (usable, why)) = match cheap_refusal() {
        Some(why) => (false, (false, why)),
        None => (true, probe(qemu, image)),
    };
    let finding = Finding { boot_id, kernel: key, usable, why };
    if !probed {
        // What was found out at no cost is found out again: the operator may have repaired it.
        return finding;
    }
    if let Err(error) = fs::write(&cache, serde_json::to_vec(&finding).unwrap_or_default()) {
        tracing::warn!(%error, "the KVM probe's answer cannot be kept");
    }
    finding
}

/// What rules KVM out without booting anything.
fn cheap_refusal() -> Option<String> {
    if let Err(error) = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return Some(format!("/dev/kvm cannot be opened: {error}"));
    }
    let loaded = |module: &str| Path::new("/sys/module").join(module).exists();
    if loaded("kvm_pvm") && !loaded("kvm_intel") && !loaded("kvm_amd") {
        return Some("this machine's KVM is para-virtual and cannot run a whole kernel".to_owned());
    }
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let virtualises = flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
    (cfg!(target_arch = "x86_64") && !virtualises)
        .then(|| "the processor shows neither vmx nor svm".to_owned())
}

/// Boots the template's kernel under KVM and waits for its first program.
fn probe(qemu: &Path, image: &Image) -> (bool, String) {
    let spawned = Command::new(qemu)
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-M", "microvm,accel=kvm"])
        .args([
            "-cpu",
            "host",
            "-m",
            "256",
            "-serial",
            "stdio",
            "-append",
            &kernel_basics(Accelerator::Kvm, 0),
        ])
        .arg("-kernel")
        .arg(image.file("vmlinux"))
        .arg("-initrd")
        .arg(image.file("initrd.cpio"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => return (false, format!("{} cannot be started: {error}", qemu.display())),
    };
    let alive = saw_alive(&mut child);
    let _gone = child.kill();
    let _status = child.wait();
    if alive {
        (true, "a kernel booted under KVM".to_owned())
    } else {
        let limit = PROBE_LIMIT.as_secs();
        (
            false,
            format!(
                "a kernel did not boot under KVM within {limit} s (remembered in {CACHE} of the data folder until a reboot)"
            ),
        )
    }
}

fn saw_alive(child: &mut Child) -> bool {
    let Some(mut console) = child.stdout.take() else { return false };
    let (found, result) = mpsc::channel();
    // Ends with the process, which is killed at the latest when the time is over.
    std::thread::spawn(move || {
        let mut seen = Vec::new();
        let mut buffer = [0; 4096];
        while let Ok(count) = console.read(&mut buffer) {
            if count == 0 || seen.len() > 1 << 20 {
                break;
            }
            seen.extend_from_slice(&buffer[..count]);
            if seen.windows(ALIVE.len()).any(|window| window == ALIVE) {
                let _receiver_gone = found.send(());
                return;
            }
        }
    });
    let started = Instant::now();
    result.recv_timeout(PROBE_LIMIT.saturating_sub(started.elapsed())).is_ok()
}
