//! Volumes: NFS exports that `/init` asks to be mounted (contract: envd.md section 4.3, `volumeMounts`).
//!
//! [`Volumes`] remembers which export it mounted where, in which life of the machine. In the same life a mount that is still there is left
//! alone; in another one its connection is a memory of the snapshot's, so it is made anew. mount(2) is called directly: no `mount.nfs`.

mod kernel;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use guestd_protocol::init::VolumeMount;
use tokio::sync::Semaphore;

pub use kernel::Kernel;

/// How long all mounts of one call may take together (contract: envd.md section 4.3).
const MOUNT_LIMIT: Duration = Duration::from_secs(10);

/// How many volumes one call may bring.
const VOLUMES_LIMIT: usize = 64;

/// Why volumes are not mounted; the text is the 400's.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error("volumeMounts: nfs_target {0:?} must be <IP address>:<absolute path>")]
    Target(String),
    #[error("volumeMounts: path {0:?} must be absolute, without '..', and not the root")]
    Path(String),
    #[error("volumeMounts: {0:?} is named twice")]
    Twice(PathBuf),
    #[error("volumeMounts: at most {VOLUMES_LIMIT} volumes can be mounted")]
    TooMany,
    #[error("volumeMounts: {source_text} could not be mounted on {path}: {error}", path = path.display())]
    Mount { source_text: String, path: PathBuf, error: io::Error },
    #[error("volumeMounts: the servers did not answer within {} s", MOUNT_LIMIT.as_secs())]
    TimedOut,
    #[error("volumeMounts: an earlier mount still waits for its server")]
    Stuck,
}

/// One export and where it goes, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    pub server: IpAddr,
    /// As mount(2) wants it: `<address>:<path>`.
    pub source: String,
    pub path: PathBuf,
}

impl Volume {
    /// # Errors
    /// What is wrong, with the field's name.
    pub fn parse_all(mounts: &[VolumeMount]) -> Result<Vec<Self>, VolumeError> {
        if mounts.len() > VOLUMES_LIMIT {
            return Err(VolumeError::TooMany);
        }
        let mut volumes: Vec<Self> = Vec::new();
        for mount in mounts {
            let volume = Self::parse(mount)?;
            if volumes.iter().any(|other| other.path == volume.path) {
                return Err(VolumeError::Twice(volume.path));
            }
            volumes.push(volume);
        }
        Ok(volumes)
    }

    fn parse(mount: &VolumeMount) -> Result<Self, VolumeError> {
        let (server, export) =
            split_target(&mount.nfs_target).ok_or_else(|| VolumeError::Target(mount.nfs_target.clone()))?;
        let path = Path::new(&mount.path);
        let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        if !path.is_absolute() || !plain || path.parent().is_none() || mount.path.contains('\0') {
            return Err(VolumeError::Path(mount.path.clone()));
        }
        let source = match server {
            IpAddr::V4(server) => format!("{server}:{export}"),
            IpAddr::V6(server) => format!("[{server}]:{export}"),
        };
        Ok(Self { server, source, path: path.components().collect() })
    }

    /// The options of mount(2) (nfs(5)): what the contract gives, and the address, which `mount.nfs` would add.
    fn options(&self) -> String {
        format!(
            "vers=3,proto={proto},mountproto={proto},port=2049,hard,noac,noacl,lookupcache=none,rsize=1048576,wsize=1048576,\
             addr={address},mountaddr={address}",
            proto = if self.server.is_ipv4() { "tcp" } else { "tcp6" },
            address = self.server,
        )
    }
}

/// Names are not resolved: an address is what the platform sends, and the agent has no name service.
fn split_target(target: &str) -> Option<(IpAddr, &str)> {
    let (server, export) = match target.strip_prefix('[') {
        Some(rest) => {
            let (server, export) = rest.split_once("]:")?;
            (server.parse::<Ipv6Addr>().ok()?.into(), export)
        }
        None => {
            let (server, export) = target.split_once(':')?;
            (server.parse().ok()?, export)
        }
    };
    (export.starts_with('/') && !export.contains('\0')).then_some((server, export))
}

/// What mounts: the kernel, or a test.
pub trait Mounter: Send + Sync + std::fmt::Debug {
    /// Blocks until it is mounted.
    ///
    /// # Errors
    /// What the kernel said.
    fn mount(&self, source: &str, path: &Path, options: &str) -> io::Result<()>;
    /// # Errors
    /// What the kernel said.
    fn unmount(&self, path: &Path) -> io::Result<()>;
    fn is_mounted(&self, path: &Path) -> bool;
}

/// What lies on a mount point, and since which life of the machine.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Mounted {
    source: String,
    life: Option<String>,
}

/// What was mounted by this agent.
#[derive(Debug)]
pub struct Volumes {
    table: Arc<std::sync::Mutex<BTreeMap<PathBuf, Mounted>>>,
    mounter: Arc<dyn Mounter>,
    /// A mount whose server does not answer cannot be called off: no second one waits beside it.
    turn: Arc<Semaphore>,
}

impl Volumes {
    pub fn new(mounter: Arc<dyn Mounter>) -> Self {
        Self { table: Arc::default(), mounter, turn: Arc::new(Semaphore::new(1)) }
    }

    /// What is mounted, for the agent that takes this one's place.
    pub fn export(&self) -> BTreeMap<PathBuf, Mounted> {
        self.table.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    pub fn restore(&self, mounted: BTreeMap<PathBuf, Mounted>) {
        *self.table.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = mounted;
    }

    /// Mounts what is not mounted yet in this `life` of the machine. What is not named stays as it is.
    ///
    /// # Errors
    /// The first mount that failed; those before it are mounted.
    pub async fn apply(&self, volumes: Vec<Volume>, life: Option<String>) -> Result<(), VolumeError> {
        if volumes.is_empty() {
            return Ok(());
        }
        let turn = Arc::clone(&self.turn).try_acquire_owned().map_err(|_| VolumeError::Stuck)?;
        let (table, mounter) = (Arc::clone(&self.table), Arc::clone(&self.mounter));
        let mounting = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            volumes.into_iter().try_for_each(|volume| mount_one(&table, &*mounter, volume, life.as_deref()))
        });
        match tokio::time::timeout(MOUNT_LIMIT, mounting).await {
            Ok(mounted) => mounted.unwrap_or(Err(VolumeError::Stuck)),
            Err(_elapsed) => Err(VolumeError::TimedOut),
        }
    }
}

fn mount_one(
    table: &std::sync::Mutex<BTreeMap<PathBuf, Mounted>>,
    mounter: &dyn Mounter,
    volume: Volume,
    life: Option<&str>,
) -> Result<(), VolumeError> {
    let lock = || table.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let wanted = Mounted { source: volume.source.clone(), life: life.map(str::to_owned) };
    let known = lock().get(&volume.path).cloned();
    let there = mounter.is_mounted(&volume.path);
    if there && known.as_ref() == Some(&wanted) {
        return Ok(());
    }
    let failed =
        |error| VolumeError::Mount { source_text: volume.source.clone(), path: volume.path.clone(), error };
    // Only what this agent mounted is taken away: what lies there otherwise is the template's, and is mounted over.
    if there && known.is_some() {
        mounter.unmount(&volume.path).map_err(failed)?;
    }
    // Known before it is there: should it come after all when nobody waits any more, the next call finds it.
    lock().insert(volume.path.clone(), Mounted { life: None, ..wanted.clone() });
    mounter.mount(&volume.source, &volume.path, &volume.options()).map_err(failed)?;
    lock().insert(volume.path, wanted);
    Ok(())
}

#[cfg(test)]
mod tests;
