//! Stopping everything that clients started while a snapshot is taken, and starting it again (contract: envd.md sections 4.8 and 4.9).
//!
//! [`Freezer`] owns what is frozen and remembers what the guest had frozen itself, which stays so. A freeze that nobody undoes is undone
//! after ten minutes; an accepted `/init` undoes it before that. `groups` knows control groups, `disk` the root file system, `http` speaks
//! the wire.

mod disk;
mod groups;
pub mod http;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::{Mutex, OwnedMutexGuard, RwLock, RwLockReadGuard};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use crate::logs::EACH_CALL;
use groups::{Groups, Written};

/// How long a freeze that nobody undoes lasts (contract: envd.md section 4.8).
const WATCHDOG: Duration = Duration::from_secs(600);

/// How long a call waits for the one before it.
const LOCK_WAIT: Duration = Duration::from_secs(10);

/// How long a freeze waits for commands that are being started right now.
const SPAWN_WAIT: Duration = Duration::from_secs(1);

/// The longest wait for groups to stand still that a caller may ask for.
const WAIT_LIMIT: Duration = Duration::from_secs(60);

/// How many groups a walk visits unless the caller says so, and at most (contract: envd.md section 4.8).
const DEFAULT_GROUPS: usize = 512;
const GROUPS_LIMIT: usize = 8192;

/// What is frozen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// What clients started: the groups of commands and of terminals.
    #[default]
    Legacy,
    /// Every group outside the allow list.
    Hierarchy,
}

/// One freeze as it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    pub mode: Mode,
    pub max_groups: usize,
    /// How long to wait for everything to stand still; `None` does not wait.
    pub max_wait: Option<Duration>,
}

impl Default for Request {
    fn default() -> Self {
        Self { mode: Mode::default(), max_groups: DEFAULT_GROUPS, max_wait: None }
    }
}

/// What a freeze came to; the numbers are groups. A group stands for everything below it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    pub mode: Mode,
    pub visited: usize,
    pub allowlisted: usize,
    pub truncated: bool,
    /// Were frozen by the guest itself, and stay so after the thaw.
    pub pre_frozen: usize,
    pub requested: usize,
    pub frozen: usize,
    pub not_frozen: usize,
    pub failed: usize,
    pub unobservable: usize,
    /// Were removed while the freeze ran.
    pub vanished: usize,
    pub sweep_ms: u64,
    pub wait_ms: u64,
}

/// Whether a freeze held until the thaw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Audit {
    pub visited: usize,
    pub frozen: usize,
    /// Should stand still and do not: somebody thawed or made them meanwhile.
    pub escaped: usize,
    /// Stand still and must not.
    pub violations: usize,
    pub truncated: bool,
}

/// What is frozen, as data.
#[derive(Clone, Debug, Default, Serialize, serde::Deserialize)]
pub struct FreezerState {
    ours: BTreeSet<PathBuf>,
    mode: Mode,
    disk: bool,
    generation: u64,
}

/// Another freeze or thaw took too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("another freeze or thaw is still running")]
pub struct Busy;

#[derive(Debug, Default)]
struct State {
    /// The groups that this agent froze, to be thawed.
    ours: BTreeSet<PathBuf>,
    mode: Mode,
    disk: bool,
    watchdog: Option<AbortHandle>,
    /// This agent has frozen or thawed: what an agent before it left frozen was seen to.
    inherited_thawed: bool,
}

/// Freezes and thaws, one call at a time.
#[derive(Debug)]
pub struct Freezer {
    root: PathBuf,
    /// What the file system calls are about: the root of the machine.
    disk: PathBuf,
    state: Arc<Mutex<State>>,
    generation: AtomicU64,
    /// Held for reading while a command is started, for writing while a freeze runs.
    spawning: RwLock<()>,
}

impl Freezer {
    pub fn new(root: PathBuf, disk: PathBuf) -> Arc<Self> {
        Arc::new(Self {
            root,
            disk,
            state: Arc::default(),
            generation: AtomicU64::new(0),
            spawning: RwLock::default(),
        })
    }

    /// What the agent that takes this one's place has to know; None while a freeze or a thaw runs.
    pub fn export(&self) -> Option<FreezerState> {
        let state = self.state.try_lock().ok()?;
        Some(FreezerState {
            ours: state.ours.clone(),
            mode: state.mode,
            disk: state.disk,
            generation: self.generation(),
        })
    }

    /// Goes on where the agent before this one was: what it froze stays so, for no longer than any freeze.
    pub async fn restore(self: &Arc<Self>, restored: FreezerState) {
        self.generation.store(restored.generation, Ordering::Relaxed);
        let mut state = self.state.lock().await;
        (state.ours, state.mode, state.disk) = (restored.ours, restored.mode, restored.disk);
        state.inherited_thawed = true;
        self.watch(&mut state);
    }

    /// Whether something of this agent's is frozen.
    pub async fn is_frozen(&self) -> bool {
        !self.state.lock().await.ours.is_empty()
    }

    /// Waits while a freeze runs; no freeze begins while the result lives. Hold it while a process is made.
    pub async fn spawning(&self) -> RwLockReadGuard<'_, ()> {
        self.spawning.read().await
    }

    /// Counts the freezes that were asked for.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    async fn lock(&self) -> Result<OwnedMutexGuard<State>, Busy> {
        timeout(LOCK_WAIT, Arc::clone(&self.state).lock_owned()).await.map_err(|_elapsed| Busy)
    }

    /// Stops the workload. Goes on to its end when its caller goes away.
    ///
    /// # Errors
    /// [`Busy`] when another call took too long.
    pub async fn freeze(self: &Arc<Self>, request: Request) -> Result<Outcome, Busy> {
        self.generation.fetch_add(1, Ordering::Relaxed);
        let mut state = self.lock().await?;
        let freezer = Arc::clone(self);
        let done = tokio::spawn(async move {
            let _no_spawns = timeout(SPAWN_WAIT, freezer.spawning.write()).await;
            let ours = std::mem::take(&mut state.ours);
            let root = freezer.root.clone();
            let swept = tokio::task::spawn_blocking(move || sweep(root, ours, request)).await;
            let (outcome, ours) = swept.unwrap_or_default();
            state.mode = request.mode;
            state.ours = ours;
            // What was frozen before has been seen: it is the guest's, and stays.
            state.inherited_thawed = true;
            freezer.watch(&mut state);
            let Outcome { mode, requested, pre_frozen, failed, .. } = outcome;
            tracing::info!(target: EACH_CALL, ?mode, requested, pre_frozen, failed, "workload frozen");
            outcome
        });
        Ok(done.await.unwrap_or_default())
    }

    /// Starts what was stopped. Nothing frozen is no error.
    ///
    /// # Errors
    /// [`Busy`] when another call took too long.
    pub async fn thaw(self: &Arc<Self>) -> Result<(), Busy> {
        let state = self.lock().await?;
        self.release(state, true).await;
        Ok(())
    }

    /// What an accepted `/init` does: takes the audit, then thaws unless it is told not to, or a freeze came after the `/init` did.
    ///
    /// # Errors
    /// [`Busy`] when another call took too long.
    pub async fn resume(self: &Arc<Self>, generation: u64, thaw: bool) -> Result<Option<Audit>, Busy> {
        let state = self.lock().await?;
        let audit = if state.ours.is_empty() {
            None
        } else {
            let (root, mode, ours) = (self.root.clone(), state.mode, state.ours.clone());
            tokio::task::spawn_blocking(move || audit(root, mode, &ours)).await.ok()
        };
        if thaw && self.generation() == generation {
            self.release(state, false).await;
        }
        Ok(audit)
    }

    /// Stops writes to the root file system, so that its disk can be copied.
    ///
    /// # Errors
    /// What the kernel said: a file system that cannot be frozen, or no right to.
    pub async fn freeze_disk(self: &Arc<Self>) -> std::io::Result<()> {
        let mut state = self.lock().await.map_err(std::io::Error::other)?;
        let path = self.disk.clone();
        let freezer = Arc::clone(self);
        let done = tokio::spawn(async move {
            tokio::task::spawn_blocking(move || disk::freeze(&path))
                .await
                .map_err(std::io::Error::other)??;
            state.disk = true;
            freezer.watch(&mut state);
            tracing::info!(target: EACH_CALL, "root file system frozen");
            Ok(())
        });
        done.await.map_err(std::io::Error::other)?
    }

    /// # Errors
    /// What the kernel said.
    pub async fn thaw_disk(self: &Arc<Self>) -> std::io::Result<()> {
        let mut state = self.lock().await.map_err(std::io::Error::other)?;
        let path = self.disk.clone();
        let done = tokio::spawn(async move {
            tokio::task::spawn_blocking(move || disk::thaw(&path)).await.map_err(std::io::Error::other)??;
            state.disk = false;
            tracing::info!(target: EACH_CALL, "root file system thawed");
            if state.ours.is_empty()
                && let Some(watchdog) = state.watchdog.take()
            {
                watchdog.abort();
            }
            Ok(())
        });
        done.await.map_err(std::io::Error::other)?
    }

    /// The only timer of this module; it runs while something is frozen.
    fn watch(self: &Arc<Self>, state: &mut State) {
        if let Some(earlier) = state.watchdog.take() {
            earlier.abort();
        }
        if state.ours.is_empty() && !state.disk {
            return;
        }
        let freezer = Arc::downgrade(self);
        let watchdog = tokio::spawn(async move {
            tokio::time::sleep(WATCHDOG).await;
            let Some(freezer) = freezer.upgrade() else { return };
            let mut state = Arc::clone(&freezer.state).lock_owned().await;
            tracing::warn!("nobody thawed this machine: its commands run again");
            // It is this task: it must not end itself half way.
            state.watchdog = None;
            freezer.release(state, false).await;
        });
        state.watchdog = Some(watchdog.abort_handle());
    }

    /// Thaws; `told` leaves a line in the log even when nothing was frozen.
    async fn release(&self, mut state: OwnedMutexGuard<State>, told: bool) {
        if let Some(watchdog) = state.watchdog.take() {
            watchdog.abort();
        }
        let ours = std::mem::take(&mut state.ours);
        let disk = std::mem::take(&mut state.disk).then(|| self.disk.clone());
        let inherited = !std::mem::replace(&mut state.inherited_thawed, true);
        let (groups, with_disk) = (ours.len(), disk.is_some());
        let told = told || groups > 0 || with_disk;
        let tell = move || {
            if told {
                tracing::info!(target: EACH_CALL, groups, disk = with_disk, "workload thawed");
            }
        };
        if ours.is_empty() && disk.is_none() && !inherited {
            tell();
            return;
        }
        let root = self.root.clone();
        let done = tokio::spawn(async move {
            let thawed = tokio::task::spawn_blocking(move || {
                if let Some(Err(error)) = disk.map(|path| disk::thaw(&path)) {
                    tracing::warn!(%error, "the root file system stays frozen");
                }
                thaw_all(root, ours, inherited);
            });
            if let Err(error) = thawed.await {
                tracing::error!(%error, "the thaw did not end");
            } else {
                tell();
            }
            drop(state);
        });
        // Its caller may go away; the thaw may not.
        let _result = done.await;
    }
}

fn sweep(root: PathBuf, mut ours: BTreeSet<PathBuf>, request: Request) -> (Outcome, BTreeSet<PathBuf>) {
    let mut groups = Groups::new(root);
    let mut outcome = Outcome { mode: request.mode, ..Outcome::default() };
    if !groups.exist() {
        return (outcome, ours);
    }
    groups.find_own();
    let started = Instant::now();
    let found = match request.mode {
        Mode::Legacy => groups.workload(),
        Mode::Hierarchy => groups.everything_else(request.max_groups.clamp(1, GROUPS_LIMIT)),
    };
    outcome.visited = found.visited;
    outcome.allowlisted = found.allowed.len();
    outcome.truncated = found.truncated;
    let mut requested = BTreeSet::new();
    for group in found.targets {
        if !ours.contains(&group) && groups::is_requested(&group) {
            outcome.pre_frozen += 1;
            continue;
        }
        match groups::write(&group, true) {
            Written::Done => {
                requested.insert(group);
            }
            Written::Vanished => outcome.vanished += 1,
            Written::Failed => outcome.failed += 1,
        }
    }
    outcome.requested = requested.len();
    outcome.sweep_ms = millis(started);
    if let Some(wait) = request.max_wait {
        let started = Instant::now();
        let settled = groups::settle(&requested, started + wait.min(WAIT_LIMIT));
        outcome.frozen = settled.frozen;
        outcome.not_frozen = settled.not_frozen;
        outcome.unobservable = settled.unobservable;
        outcome.vanished += settled.vanished;
        outcome.wait_ms = millis(started);
    }
    ours.append(&mut requested);
    (outcome, ours)
}

fn audit(root: PathBuf, mode: Mode, ours: &BTreeSet<PathBuf>) -> Audit {
    let mut groups = Groups::new(root);
    groups.find_own();
    let found = match mode {
        Mode::Legacy => groups.workload(),
        Mode::Hierarchy => groups.everything_else(GROUPS_LIMIT),
    };
    let frozen = found.targets.iter().filter(|group| groups::stands_still(group)).count();
    let escaped = ours.iter().filter(|group| group.is_dir() && !groups::stands_still(group));
    let made_since =
        found.targets.iter().filter(|group| !ours.contains(*group) && !groups::is_requested(group));
    Audit {
        visited: found.visited,
        frozen,
        escaped: escaped.count() + made_since.count(),
        violations: found.allowed.iter().filter(|group| groups::stands_still(group)).count(),
        truncated: found.truncated,
    }
}

fn thaw_all(root: PathBuf, ours: BTreeSet<PathBuf>, inherited: bool) {
    // An agent that was started again does not know what the one before it froze; the workload's groups are the agent's own.
    let left = if inherited { Groups::new(root).workload().targets } else { Vec::new() };
    let left = left.into_iter().filter(|group| groups::is_requested(group));
    for group in ours.into_iter().chain(left) {
        groups::write(&group, false);
    }
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
