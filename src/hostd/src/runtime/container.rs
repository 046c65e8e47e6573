//! Containers, for machines where no VM can run. An OCI runtime on PATH does the work (runc).
//!
//! This is no security boundary: the guest shares the host's kernel. It is here to try things out, and for tests.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;

use super::{Image, Overlay, Plan, Runtime, Size, StartError};
use crate::link::{Socket, Transport};

/// In the run folder: where the agent makes its socket, mounted into the container.
const LINK_FOLDER: &str = "link";
const LINK_SOCKET: &str = "agent.sock";

/// The same folder, as the container sees it.
const LINK_INSIDE: &str = "/run/guestd";

const AGENT_INSIDE: &str = "/usr/bin/guestd";

/// What root in the container may do: enough for package managers and sudo, nothing that reaches the host.
const CAPABILITIES: [&str; 12] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

const PIDS_LIMIT: i64 = 4096;

/// The `container` runtime.
#[derive(Debug)]
pub struct Container {
    /// The OCI runtime.
    pub program: PathBuf,
    /// Where it keeps its state.
    pub state: PathBuf,
}

impl Runtime for Container {
    fn name(&self) -> &'static str {
        "container"
    }

    fn plan(&self, id: &str, folder: &Path, image: &Image, size: Size) -> Result<Plan, StartError> {
        if !image.has_tree {
            let name = &image.name;
            return Err(StartError::Missing(format!(
                "template '{name}' has no unpacked tree, which containers need: make it with `cargo xtask image --tree`"
            )));
        }
        for name in ["upper", "work", "rootfs", LINK_FOLDER] {
            let path = folder.join(name);
            fs::DirBuilder::new()
                .mode(0o755)
                .create(&path)
                .map_err(|source| StartError::Folder { path, source })?;
        }
        let config = self.config(id, folder, image, size);
        let path = folder.join("config.json");
        fs::write(&path, serde_json::to_vec_pretty(&config).unwrap_or_default())
            .map_err(|source| StartError::Folder { path, source })?;
        let command = |words: &[&str]| {
            let mut command = vec![
                self.program.display().to_string(),
                "--root".to_owned(),
                self.state.display().to_string(),
            ];
            command.extend(words.iter().map(|word| (*word).to_owned()));
            command
        };
        Ok(Plan {
            overlay: Some(Overlay {
                lower: image.file("rootfs"),
                upper: "upper".to_owned(),
                work: "work".to_owned(),
                target: "rootfs".to_owned(),
            }),
            main: command(&["run", "--bundle", ".", id]),
            at_end: vec![command(&["kill", id, "KILL"]), command(&["delete", "--force", id])],
            ..Plan::default()
        })
    }

    fn transport(&self, folder: &Path) -> Transport {
        Transport::Unix(Socket { folder: folder.join(LINK_FOLDER), name: LINK_SOCKET.to_owned() })
    }

    fn boot_limit(&self) -> Duration {
        Duration::from_secs(20)
    }
}

impl Container {
    /// The bundle's `config.json` (OCI runtime specification 1.0).
    fn config(&self, id: &str, folder: &Path, image: &Image, size: Size) -> serde_json::Value {
        let memory = i64::from(size.memory_mb) * 1024 * 1024;
        json!({
            "ociVersion": "1.0.2",
            "hostname": id,
            "root": { "path": "rootfs", "readonly": false },
            "process": {
                "user": { "uid": 0, "gid": 0 },
                "cwd": "/",
                "args": [AGENT_INSIDE],
                "env": [
                    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                    format!("GUESTD_UNIX={LINK_INSIDE}/{LINK_SOCKET}"),
                ],
                "capabilities": {
                    "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES,
                },
                "noNewPrivileges": false,
            },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                  "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
                { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                  "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
                { "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                  "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"] },
                { "destination": "/sys", "type": "sysfs", "source": "sysfs",
                  "options": ["nosuid", "noexec", "nodev", "ro"] },
                { "destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"] },
                { "destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=755"] },
                { "destination": AGENT_INSIDE, "type": "bind", "source": image.file("guestd"), "options": ["bind", "ro"] },
                { "destination": LINK_INSIDE, "type": "bind", "source": folder.join(LINK_FOLDER), "options": ["bind", "rw"] },
            ],
            "linux": {
                "namespaces": [
                    { "type": "pid" }, { "type": "mount" }, { "type": "ipc" }, { "type": "uts" }, { "type": "network" },
                ],
                "resources": {
                    "devices": [{ "allow": false, "access": "rwm" }],
                    "memory": { "limit": memory },
                    "pids": { "limit": PIDS_LIMIT },
                },
                "maskedPaths": [
                    "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                    "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware",
                ],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            },
        })
    }
}
