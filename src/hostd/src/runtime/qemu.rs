//! MicroVMs with QEMU (contract: microvm.md sections 2 to 4 have the measurements behind each option).

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::guard::number;
use super::{Helper, Image, Input, Plan, RunAs, Runtime, Size, StartError};
use crate::link::{Socket, Transport};

/// In the run folder: the VM's own folder, its programs' working directory.
pub(super) const VM_FOLDER: &str = "vm";

/// The sockets in it.
const VSOCK_SOCKET: &str = "vsock.sock";
const VHOST_SOCKET: &str = "vhost.sock";
const SERIAL_SOCKET: &str = "serial.sock";

/// Each VM has a vsock device process of its own, so all guests may have the same address.
const GUEST_CID: u32 = 3;

/// What QEMU may not do once it runs: spawn, gain privileges, change its limits.
const SECCOMP: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    Kvm,
    /// Software emulation.
    Tcg,
}

/// How hostd reaches the agent in the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkDevice {
    /// Hybrid vsock, through vhost-device-vsock.
    Vsock,
    /// One virtio-serial port: no extra process, and the only one that a snapshot survives.
    Serial,
}

/// The `qemu` runtime.
#[derive(Debug)]
pub struct Qemu {
    pub program: PathBuf,
    pub vhost_device_vsock: PathBuf,
    pub accelerator: Accelerator,
    pub link: LinkDevice,
    /// The first of the users that VMs run as, one each; the supervisor's own user when absent.
    pub first_uid: Option<u32>,
    pub tsc_khz: u64,
}

impl Runtime for Qemu {
    fn name(&self) -> &'static str {
        "qemu"
    }

    fn plan(&self, id: &str, folder: &Path, image: &Image, size: Size) -> Result<Plan, StartError> {
        let inputs =
            [("vmlinux", number::KERNEL), ("initrd.cpio", number::INITRD), ("rootfs.squashfs", number::ROOT)]
                .map(|(name, number)| Input { path: image.file(name), number });
        let helper = match self.link {
            LinkDevice::Serial => None,
            LinkDevice::Vsock => Some(Helper {
                command: vec![
                    self.vhost_device_vsock.display().to_string(),
                    "--vm".to_owned(),
                    format!("guest-cid={GUEST_CID},socket={VHOST_SOCKET},uds-path={VSOCK_SOCKET}"),
                ],
                socket: VHOST_SOCKET.to_owned(),
            }),
        };
        Ok(Plan {
            run_as: self.run_as(folder)?,
            folder: Some(VM_FOLDER.to_owned()),
            inputs: inputs.to_vec(),
            helper,
            main: self.command(id, image, size),
            ..Plan::default()
        })
    }

    fn transport(&self, folder: &Path) -> Transport {
        let socket = |name: &str| Socket { folder: folder.join(VM_FOLDER), name: name.to_owned() };
        match self.link {
            LinkDevice::Vsock => Transport::HybridVsock(socket(VSOCK_SOCKET)),
            LinkDevice::Serial => Transport::Serial(socket(SERIAL_SOCKET)),
        }
    }

    fn boot_limit(&self) -> Duration {
        match self.accelerator {
            Accelerator::Kvm => Duration::from_secs(20),
            // An emulated boot takes 3 s on a quiet machine; the SDKs wait 60 s for a sandbox.
            Accelerator::Tcg => Duration::from_secs(50),
        }
    }
}

impl Qemu {
    fn command(&self, id: &str, image: &Image, size: Size) -> Vec<String> {
        let memory = size.memory_mb;
        let mut machine = "microvm".to_owned();
        let mut command: Vec<String> = Vec::new();
        let mut push = |words: &[&str]| command.extend(words.iter().map(|word| (*word).to_owned()));
        push(&[&self.program.display().to_string(), "-nodefaults", "-no-user-config", "-display", "none"]);
        push(&["-no-reboot", "-name", id, "-sandbox", SECCOMP]);
        match self.accelerator {
            Accelerator::Kvm => {
                machine.push_str(",accel=kvm");
                push(&["-cpu", "host"]);
            }
            Accelerator::Tcg => {
                machine.push_str(",accel=tcg");
                push(&["-cpu", "max"]);
            }
        }
        push(&["-smp", &size.cpu_count.to_string(), "-m", &memory.to_string()]);
        push(&["-kernel", &input(number::KERNEL), "-initrd", &input(number::INITRD)]);
        push(&["-append", &self.kernel_command_line(image), "-serial", "stdio"]);
        let drive = format!("id=root,file={},format=raw,if=none,readonly=on", input(number::ROOT));
        push(&["-drive", &drive, "-device", "virtio-blk-device,drive=root", "-device", "virtio-rng-device"]);
        match self.link {
            LinkDevice::Vsock => {
                machine.push_str(",memory-backend=memory");
                let backend = format!("memory-backend-memfd,id=memory,size={memory}M,share=on");
                push(&["-object", &backend, "-chardev", &format!("socket,id=vsock,path={VHOST_SOCKET}")]);
                push(&["-device", "vhost-user-vsock-device,chardev=vsock"]);
            }
            LinkDevice::Serial => {
                let socket = format!("socket,id=link,path={SERIAL_SOCKET},server=on,wait=off");
                let port = format!("virtserialport,chardev=link,name={}", guestd_protocol::SERIAL_PORT_NAME);
                push(&["-device", "virtio-serial-device", "-chardev", &socket, "-device", &port]);
            }
        }
        push(&["-M", &machine]);
        command
    }

    fn kernel_command_line(&self, image: &Image) -> String {
        let mut line = kernel_basics(self.accelerator, self.tsc_khz);
        line.push_str(" quiet ");
        line.push_str(&image.command_line);
        line
    }

    /// A user for this VM alone, so that a VMM that a guest has taken over reaches nothing of its neighbours. Needs root.
    fn run_as(&self, folder: &Path) -> Result<Option<RunAs>, StartError> {
        let own = folder.join(VM_FOLDER);
        let at = |source| StartError::Folder { path: own.clone(), source };
        std::fs::DirBuilder::new().mode(0o700).create(&own).map_err(at)?;
        let Some(first) = self.first_uid else { return Ok(None) };
        let uid = super::machine::free_uid(folder, first)?;
        let kvm_group = match self.accelerator {
            Accelerator::Kvm => {
                std::fs::metadata("/dev/kvm").map(|found| std::os::unix::fs::MetadataExt::gid(&found)).ok()
            }
            Accelerator::Tcg => None,
        };
        std::os::unix::fs::chown(&own, Some(uid), Some(uid)).map_err(at)?;
        Ok(Some(RunAs { uid, gid: uid, groups: kvm_group.into_iter().collect() }))
    }
}

fn input(number: i32) -> String {
    format!("/proc/self/fd/{number}")
}

/// What every boot needs, whatever it boots for.
pub(super) fn kernel_basics(accelerator: Accelerator, tsc_khz: u64) -> String {
    let mut line = "console=ttyS0 panic=-1 reboot=t cryptomgr.notests".to_owned();
    if accelerator == Accelerator::Tcg {
        // Without a PIT to calibrate against, the kernel waits for ever unless it is told the frequency.
        line.push_str(&format!(" tsc=reliable tsc_early_khz={tsc_khz}"));
    }
    line
}

/// The host's TSC frequency in kHz: under emulation the guest sees the host's counter. Takes 50 ms.
pub fn measure_tsc_khz() -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: rdtsc has no preconditions on x86-64.
        let ticks = || unsafe { core::arch::x86_64::_rdtsc() };
        let (start, first) = (Instant::now(), ticks());
        std::thread::sleep(Duration::from_millis(50));
        let (passed, last) = (start.elapsed(), ticks());
        let khz = u128::from(last.saturating_sub(first)) * 1_000_000 / passed.as_nanos().max(1);
        u64::try_from(khz).unwrap_or(0)
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = Instant::now;
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qemu(link: LinkDevice) -> Qemu {
        Qemu {
            program: "qemu".into(),
            vhost_device_vsock: "vhost".into(),
            accelerator: Accelerator::Tcg,
            link,
            first_uid: None,
            tsc_khz: 2_000_000,
        }
    }

    fn image() -> Image {
        Image {
            name: "base".into(),
            folder: "/i/base".into(),
            command_line: "guestd.root=/dev/vda".into(),
            has_tree: false,
        }
    }

    #[test]
    fn a_guest_gets_no_network_and_no_writable_file_of_the_host() {
        for link in [LinkDevice::Vsock, LinkDevice::Serial] {
            let size = Size { cpu_count: 1, memory_mb: 512 };
            let line = qemu(link).command("i1", &image(), size).join(" ");
            assert!(
                line.contains("-nodefaults") && line.contains("readonly=on") && line.contains("-sandbox on")
            );
            for forbidden in ["-netdev", "-nic", "virtfs", "-monitor", "-qmp"] {
                assert!(!line.contains(forbidden), "{forbidden}: {line}");
            }
        }
    }

    #[test]
    fn an_emulated_kernel_is_told_the_frequency_of_its_clock() {
        assert!(kernel_basics(Accelerator::Tcg, 7).contains("tsc_early_khz=7"));
        assert!(!kernel_basics(Accelerator::Kvm, 7).contains("tsc"));
        assert!(measure_tsc_khz() > 100_000);
    }
}
