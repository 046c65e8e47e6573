//! One kernel: a process, its folder, its sockets.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use guestd_protocol::wire::process as wire;
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout_at};

use super::event::{self, Heard};
use super::link::{Address, Channel, Link, LinkError, Said, random};
use super::message::Message;
use super::spec::{Interrupt, KernelSpec};
use crate::cgroup::Cgroups;
use crate::freeze::Freezer;
use crate::identity::User;
use crate::process::{Ended, Service, ServiceError, Spec, SpecError, Status};
use crate::settings::Values;

/// From the start of a process to the first sign of a kernel. Under emulation an ipykernel takes more than half a minute.
const START_LIMIT: Duration = Duration::from_secs(120);

/// How long one answer to the first question is waited for before it is asked again: an answer that came before the subscription is lost.
const ASK_AGAIN: Duration = Duration::from_millis(250);

/// Where the folders of kernels are, if it can be made; else below the folder for temporary files.
const FOLDER: &str = "/run/guestd-kernels";

#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("the kernel {name} could not be started: {source}")]
    Files { name: String, source: io::Error },
    #[error("the kernel {name} could not be started: {source}")]
    Spec { name: String, source: SpecError },
    #[error("the kernel {name} could not be started: {source}")]
    Service { name: String, source: ServiceError },
    #[error("the kernel {name} {how} before it was ready{}", said(.tail))]
    Ended { name: String, how: String, tail: String },
    #[error("the kernel {name} was not ready within {} s{}", START_LIMIT.as_secs(), said(.tail))]
    Slow { name: String, tail: String },
    #[error("the kernel {name} does not speak: {source}")]
    Link { name: String, source: LinkError },
}

fn said(tail: &str) -> String {
    if tail.is_empty() { String::new() } else { format!("; it wrote: {tail}") }
}

/// What a kernel needs from the machine.
#[derive(Clone, Debug)]
pub struct Ground {
    pub cgroups: Arc<Cgroups>,
    pub freezer: Arc<Freezer>,
}

/// A folder that only the kernel's user and root can enter; goes with its owner.
#[derive(Debug)]
struct Folder {
    path: PathBuf,
}

impl Folder {
    fn new(user: &User) -> io::Result<Self> {
        let parent = match parent(Path::new(FOLDER)) {
            Ok(()) => PathBuf::from(FOLDER),
            Err(_) => std::env::temp_dir(),
        };
        let path = parent.join(format!("guestd-{}", &random()?[..16]));
        fs::DirBuilder::new().mode(0o700).create(&path)?;
        let folder = Self { path };
        own(&folder.path, user)?;
        Ok(folder)
    }
}

/// Nobody can list it, everybody can pass.
fn parent(path: &Path) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o711).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            use std::os::unix::fs::MetadataExt as _;
            let found = path.symlink_metadata()?;
            let ours =
                found.is_dir() && found.uid() == nix::unistd::geteuid().as_raw() && found.mode() & 0o022 == 0;
            if ours { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EPERM)) }
        }
        made => made,
    }
}

fn own(path: &Path, user: &User) -> io::Result<()> {
    if nix::unistd::geteuid().as_raw() == user.uid {
        return Ok(());
    }
    std::os::unix::fs::lchown(path, Some(user.uid), Some(user.gid))
}

impl Drop for Folder {
    fn drop(&mut self) {
        let path = std::mem::take(&mut self.path);
        let remove = move || {
            if let Err(error) = fs::remove_dir_all(&path) {
                tracing::debug!(folder = %path.display(), %error, "a kernel's folder stays");
            }
        };
        // It is the user's: nobody knows how much is in it.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(remove)),
            Err(_) => remove(),
        }
    }
}

/// A kernel that answered.
#[derive(Debug)]
pub struct Kernel {
    pub spec: KernelSpec,
    pub link: Link,
    pub service: Service,
    /// The variables of `/init` that it has.
    pub environment: BTreeMap<String, String>,
    /// Where it was started or sent to.
    pub directory: PathBuf,
    pub user: User,
    address: Address,
    folder: Folder,
}

/// How an agent that takes this one's place finds a kernel.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KernelState {
    pid: u32,
    group: Option<PathBuf>,
    folder: PathBuf,
    address: Address,
    environment: BTreeMap<String, String>,
    directory: PathBuf,
    user: User,
}

impl KernelState {
    pub fn pid(&self) -> u32 {
        self.pid
    }

    pub fn group(&self) -> Option<&PathBuf> {
        self.group.as_ref()
    }
}

impl Kernel {
    /// Starts a kernel as `user` in `directory` and waits until it answers. Dropping the future ends the kernel.
    ///
    /// # Errors
    /// [`KernelError`]; nothing is left behind.
    pub async fn start(
        spec: KernelSpec,
        user: User,
        directory: PathBuf,
        values: &Values,
        ground: &Ground,
    ) -> Result<Self, KernelError> {
        let until = Instant::now() + START_LIMIT;
        let name = || spec.name.clone();
        let files = |source| KernelError::Files { name: name(), source };
        let folder = Folder::new(&user).map_err(files)?;
        let address = Address::new(spec.transport, &folder.path, &spec.name).map_err(files)?;
        let file = folder.path.join("connection.json");
        write(&file, &serde_json::to_vec(&address).map_err(io::Error::from).map_err(files)?, &user)
            .map_err(files)?;
        let mut command = spec.command(&file).into_iter();
        let process = wire::ProcessConfig {
            cmd: command.next().unwrap_or_default(),
            args: command.collect(),
            envs: spec.environment.clone().into_iter().collect(),
            cwd: Some(directory.to_string_lossy().into_owned()),
            ..Default::default()
        };
        let request =
            wire::StartRequest { process: process.into(), stdin: Some(false), ..Default::default() };
        let started = Spec::new(request, user.clone(), values)
            .map_err(|source| KernelError::Spec { name: name(), source })?;
        let mut service = {
            let _starting = ground.freezer.spawning().await;
            Service::start(&started, &ground.cgroups)
                .map_err(|source| KernelError::Service { name: name(), source })?
        };
        let link = tokio::select! {
            biased;
            ended = service.wait() => {
                // Its last words are on their way.
                tokio::time::sleep(Duration::from_millis(20)).await;
                return Err(KernelError::Ended { name: name(), how: how(ended), tail: service.tail() });
            }
            link = timeout_at(until, ready(&address)) => match link {
                Ok(link) => link.map_err(|source| KernelError::Link { name: name(), source })?,
                Err(_elapsed) => return Err(KernelError::Slow { name: name(), tail: service.tail() }),
            },
        };
        tracing::info!(kernel = spec.name, pid = service.pid(), user = user.name, "kernel started");
        Ok(Self {
            link,
            service,
            environment: values.environment.clone(),
            directory,
            user,
            address,
            folder,
            spec,
        })
    }

    /// Tells it to stop what it does.
    ///
    /// # Errors
    /// When it cannot be told.
    pub async fn interrupt(&mut self) -> Result<(), LinkError> {
        match self.spec.interrupt {
            Interrupt::Message => self.link.send(Channel::Control, "interrupt_request", "{}").await.map(drop),
            Interrupt::Signal => {
                if let Err(error) = self.service.signal(Signal::SIGINT) {
                    tracing::debug!(pid = self.service.pid(), %error, "not interrupted");
                }
                Ok(())
            }
        }
    }

    /// Ends it and all that it started.
    pub async fn end(self) {
        let Self { service, folder, link, .. } = self;
        drop(link);
        service.end().await;
        drop(folder);
    }

    /// Whether it has ended, without waiting.
    pub async fn has_ended(&mut self) -> bool {
        tokio::time::timeout(Duration::ZERO, self.service.wait()).await.is_ok()
    }

    pub fn export(&self) -> KernelState {
        KernelState {
            pid: self.service.pid(),
            group: self.service.group().map(Path::to_owned),
            folder: self.folder.path.clone(),
            address: self.address.clone(),
            environment: self.environment.clone(),
            directory: self.directory.clone(),
            user: self.user.clone(),
        }
    }

    /// Goes on with a kernel of the agent before this one.
    ///
    /// # Errors
    /// When it is gone, or does not answer.
    pub async fn resume(spec: KernelSpec, state: KernelState) -> Result<Self, KernelError> {
        let name = spec.name.clone();
        let KernelState { pid, group, folder, address, environment, directory, user } = state;
        let service =
            Service::adopt(pid, group).map_err(|source| KernelError::Files { name: name.clone(), source })?;
        let folder = Folder { path: folder };
        let link = match tokio::time::timeout(START_LIMIT, ready(&address)).await {
            Ok(link) => link.map_err(|source| KernelError::Link { name, source })?,
            Err(_elapsed) => return Err(KernelError::Slow { name, tail: String::new() }),
        };
        Ok(Self { spec, link, service, environment, directory, user, address, folder })
    }
}

/// How a process ended, in words.
pub fn how(ended: Option<Ended>) -> String {
    match ended.map(|ended| ended.status) {
        Some(Status::Exited(code)) => format!("exited with code {code}"),
        Some(Status::Signalled { signal, .. }) => {
            let name =
                Signal::try_from(signal).map_or_else(|_| "unknown".to_owned(), |signal| signal.to_string());
            format!("was killed by signal {signal} ({name})")
        }
        _ => "ended".to_owned(),
    }
}

fn write(path: &Path, text: &[u8], user: &User) -> io::Result<()> {
    let mut file: File = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text)?;
    own(path, user)
}

/// Connects, and asks until the answer is heard on both channels: only then nothing of the first cell can be lost.
async fn ready(address: &Address) -> Result<Link, LinkError> {
    address.listening().await;
    let mut link = Link::connect(address).await?;
    let (mut replied, mut idle) = (false, false);
    let mut asked = Vec::new();
    loop {
        asked.push(link.send(Channel::Shell, "kernel_info_request", "{}").await?);
        let again = Instant::now() + ASK_AGAIN * u32::try_from(asked.len()).unwrap_or(u32::MAX).min(20);
        while let Ok(received) = timeout_at(again, link.receive()).await {
            let Said::Message(channel, message) = received? else { continue };
            if !asked.contains(&message.parent) {
                continue;
            }
            replied |= channel == Channel::Shell && message.kind == "kernel_info_reply";
            idle |= channel == Channel::Iopub && is_idle(&message);
            if replied && idle {
                return Ok(link);
            }
        }
    }
}

pub fn is_idle(message: &Message) -> bool {
    matches!(event::translate(message), Heard::Idle)
}
