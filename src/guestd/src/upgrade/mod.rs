//! `POST /upgrade`: another program takes this one's place under the same pid (contract: envd.md section 4.11).
//!
//! [`Upgrader`] brings the agent to rest, writes down everything that it knows, and replaces it with execve(2). The children of the process
//! stay its children, descriptors stay open under their numbers, and sockets go on listening. Until the exec nothing is given up: whatever
//! fails before it, the old agent goes on.
//!
//! `candidate` receives and tries the new program, `state` is what is handed over and in what form, `resume` is the other side: the new
//! program, which keeps the workload frozen and itself sealed until an `/init`. `http` is the wire.

mod candidate;
pub mod http;
mod resume;
mod state;

use std::ffi::{CString, NulError};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use guestd_protocol::ENVD_VERSION;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::access::{Access, Credentials};
use crate::activity::{Activity, ActivityState};
use crate::agent::Config;
use crate::cgroup::Cgroups;
use crate::code::{CodeState, Interpreter};
use crate::doors::{Connection, Connections};
use crate::filesystem::{Filesystem, WatcherState};
use crate::freeze::{self, Freezer, FreezerState};
use crate::inhibit::{Inhibition, InhibitionState};
use crate::init;
use crate::process::{Processes, ProcessesState};
use crate::settings::{Settings, Values};
use crate::system::{System, SystemState};

pub use resume::{Asked, Resumed, asked, finish};
pub use state::{Descriptors, Stamp, Store};

/// Where a new program is put (contract: envd.md section 4.11).
const DROP_PATH: &str = "usr/bin/envd.next";

/// How long the workload may take to stand still (contract: envd.md section 4.11).
const FREEZE_LIMIT: Duration = Duration::from_secs(2);

/// How long clients may take to read what is on its way to them.
const DRAIN_LIMIT: Duration = Duration::from_millis(500);

/// For the last frames on the connection that asked, which cannot be waited for: it stays open.
const FLUSH_PAUSE: Duration = Duration::from_millis(20);
const DRAIN_STEP: Duration = Duration::from_millis(2);

/// Why there was no upgrade; the old agent goes on.
#[derive(Debug, thiserror::Error)]
pub enum UpgradeError {
    #[error("envd not initialized")]
    NotInitialised,
    #[error("another upgrade is under way")]
    Busy,
    /// What a kernel says while nobody listens would be lost.
    #[error("a code cell or the start of a kernel is under way")]
    CodeRuns,
    /// The request's own fault.
    #[error("{0}")]
    Rejected(String),
    #[error("{0}")]
    Failed(String),
}

/// A listening socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Door {
    Tcp,
    Unix,
    Vsock,
    /// For code cells.
    Code,
    /// Of programs in the machine.
    Activity,
}

/// Everything, as data.
#[derive(Debug, Serialize, Deserialize)]
pub struct Handover {
    /// The version of the agent that wrote it.
    pub from: String,
    pub config: Config,
    /// It runs under the PID 1 of its own.
    supervised: bool,
    /// All descriptors that stay open.
    descriptors: Vec<RawFd>,
    doors: Vec<(Door, RawFd)>,
    processes: ProcessesState,
    watchers: Vec<WatcherState>,
    #[serde(default)]
    code: CodeState,
    settings: Values,
    credentials: Credentials,
    /// None once the new agent has it.
    activity: Option<ActivityState>,
    inhibition: InhibitionState,
    freezer: FreezerState,
    system: SystemState,
}

impl Handover {
    /// The control groups that have commands in them.
    pub fn groups(&self) -> Vec<PathBuf> {
        self.processes.groups().into_iter().chain(self.code.groups()).collect()
    }
}

/// What became of a handover; the value of `X-Envd-Handover`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Something was not taken over.
    pub failed: bool,
    pub procs: usize,
    pub procs_failed: usize,
    pub retained: usize,
    pub retained_failed: usize,
    pub watchers: usize,
    pub watchers_failed: usize,
}

/// The capabilities that have something to hand over.
#[derive(Clone, Debug)]
pub struct Parts {
    pub access: Arc<Access>,
    pub settings: Arc<Settings>,
    pub activity: Arc<Activity>,
    pub inhibition: Arc<Inhibition>,
    pub processes: Arc<Processes>,
    pub files: Arc<Filesystem>,
    pub freezer: Arc<Freezer>,
    pub cgroups: Arc<Cgroups>,
    pub system: Arc<System>,
    pub connections: Connections,
    pub interpreter: Arc<Interpreter>,
}

/// Replaces the agent.
#[derive(Debug)]
pub struct Upgrader {
    parts: Parts,
    config: Config,
    doors: Mutex<Vec<(Door, RawFd)>>,
    /// True while nobody is let in.
    shut: watch::Sender<bool>,
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl Upgrader {
    pub fn new(parts: Parts, config: Config) -> Arc<Self> {
        Arc::new(Self {
            parts,
            config,
            doors: Mutex::default(),
            shut: watch::Sender::new(false),
            turn: Arc::default(),
        })
    }

    /// A socket that listens for as long as the agent lives.
    pub fn keep_open(&self, door: Door, socket: &impl AsRawFd) {
        self.doors.lock().unwrap_or_else(PoisonError::into_inner).push((door, socket.as_raw_fd()));
    }

    /// Turns true while nobody is to be let in.
    pub fn shut(&self) -> watch::Receiver<bool> {
        self.shut.subscribe()
    }

    fn drop_path(&self) -> PathBuf {
        self.config.root.join(DROP_PATH)
    }

    /// Replaces the agent with the program at `path`. Returns only when that failed, and everything is as before. `caller` is the connection
    /// that is not closed.
    async fn replace(&self, path: &Path, caller: Option<Connection>) -> UpgradeError {
        let version = match candidate::check(path).await {
            Ok(version) => version,
            Err(error) => return error,
        };
        if self.parts.interpreter.export().is_none() {
            return UpgradeError::CodeRuns;
        }
        tracing::info!(from = ENVD_VERSION, to = version, program = %path.display(), "upgrade");
        self.shut.send_replace(true);
        let freezer = &self.parts.freezer;
        let was_frozen = freezer.is_frozen().await;
        let error = match self.freeze(was_frozen).await {
            Ok(()) => {
                self.drain(caller.as_ref()).await;
                // Hears what happened until now; from here on nothing waits.
                let watchers = self.parts.files.export_watchers().await;
                self.exec(path, watchers)
            }
            Err(error) => error,
        };
        tracing::error!(%error, "the agent was not replaced and goes on");
        self.parts.processes.take_clients();
        if !was_frozen && freezer.thaw().await.is_err() {
            tracing::error!("the workload stays frozen: another freeze or thaw is still running");
        }
        self.shut.send_replace(false);
        error
    }

    /// Where there are no control groups the workload runs on: its output waits in its pipes.
    async fn freeze(&self, was_frozen: bool) -> Result<(), UpgradeError> {
        if was_frozen {
            return Ok(());
        }
        let request = freeze::Request { max_wait: Some(FREEZE_LIMIT), ..freeze::Request::default() };
        let outcome = self.parts.freezer.freeze(request).await;
        let outcome = outcome.map_err(|error| UpgradeError::Failed(error.to_string()))?;
        if outcome.not_frozen + outcome.failed > 0 {
            let count = outcome.not_frozen + outcome.failed;
            return Err(UpgradeError::Failed(format!(
                "the workload does not stand still: {count} control groups did not freeze within {} s",
                FREEZE_LIMIT.as_secs()
            )));
        }
        Ok(())
    }

    /// Lets clients have what is theirs already, and be told to come back.
    async fn drain(&self, caller: Option<&Connection>) {
        let Parts { processes, connections, .. } = &self.parts;
        processes.send_clients_away();
        connections.close_all_but(caller);
        let until = Instant::now() + DRAIN_LIMIT;
        while Instant::now() < until && (processes.clients() > 0 || connections.count_but(caller) > 0) {
            tokio::time::sleep(DRAIN_STEP).await;
        }
        tokio::time::sleep(FLUSH_PAUSE).await;
    }

    /// Everything as it is at this moment. The runtime has one thread, so nothing changes before the exec.
    fn export(&self, watchers: Vec<WatcherState>) -> Result<(Handover, Store), UpgradeError> {
        let busy = |what: &str| UpgradeError::Failed(format!("{what} is under way"));
        let Parts { access, settings, activity, inhibition, processes, freezer, cgroups, system, .. } =
            &self.parts;
        let code = self.parts.interpreter.export().ok_or(UpgradeError::CodeRuns)?;
        let mut store = Store::default();
        let mut handover = Handover {
            from: ENVD_VERSION.to_owned(),
            config: Config { cgroups: cgroups.choice(), ..self.config.clone() },
            supervised: init::is_supervised(),
            descriptors: Vec::new(),
            doors: self.doors.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            processes: processes.export(&mut store),
            watchers,
            code,
            settings: settings.snapshot(),
            credentials: access.export(),
            activity: Some(activity.export().ok_or_else(|| busy("the sandbox's release"))?),
            inhibition: inhibition.export(),
            freezer: freezer.export().ok_or_else(|| busy("a freeze"))?,
            system: system.export().ok_or_else(|| busy("an /init"))?,
        };
        let doors = handover.doors.iter().map(|(_, fd)| *fd);
        handover.descriptors =
            doors.chain(handover.processes.descriptors()).chain(handover.inhibition.descriptors()).collect();
        Ok((handover, store))
    }

    fn exec(&self, path: &Path, watchers: Vec<WatcherState>) -> UpgradeError {
        let (handover, store) = match self.export(watchers) {
            Ok(exported) => exported,
            Err(error) => return error,
        };
        let failed = |error: io::Error| UpgradeError::Failed(format!("the upgrade failed: {error}"));
        match state::write(&handover, &store) {
            Ok(file) => failed(become_program(path, &file, &handover.descriptors)),
            Err(error) => failed(error),
        }
    }
}

/// execve(2) with the descriptors open; returns with the error when there was one, and they are closed on the next exec again.
fn become_program(path: &Path, state: &OwnedFd, descriptors: &[RawFd]) -> io::Error {
    let number = state.as_raw_fd();
    let prepared = program(path, number);
    let (program, argv, environment) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => return error.into(),
    };
    let all = || descriptors.iter().copied().chain([number]);
    for fd in all() {
        if let Err(error) = state::set_inherited(fd, true) {
            // It is handed over all the same: the next agent finds that it is not there.
            tracing::warn!(fd, %error, "a descriptor could not be kept open");
        }
    }
    let Err(errno) = nix::unistd::execve(&program, &argv, &environment);
    for fd in all() {
        let _closed_already = state::set_inherited(fd, false);
    }
    errno.into()
}

type Program = (CString, Vec<CString>, Vec<CString>);

fn program(path: &Path, number: RawFd) -> Result<Program, NulError> {
    let name = std::env::args_os().next().map_or_else(|| b"guestd".to_vec(), OsStringExt::into_vec);
    let argv = vec![
        CString::new(name)?,
        c"resume".to_owned(),
        c"--state-fd".to_owned(),
        CString::new(number.to_string())?,
    ];
    let variable = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
        CString::new([name.as_bytes(), b"=", value.as_bytes()].concat())
    };
    let environment = std::env::vars_os().map(variable).collect::<Result<_, _>>()?;
    Ok((CString::new(path.as_os_str().as_bytes())?, argv, environment))
}
