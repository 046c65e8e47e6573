//! Running commands: the table of live processes, who is attached to which, and what happened to those that ended.
//!
//! [`Processes`] owns the table. Each process has one task (`run`) that owns its child and is the only one to write its [`output`];
//! clients read the output at their own pace and come and go without touching the process. `spec` turns a request into what `spawn`
//! starts; `rpc` speaks `process.Process`.

mod encode;
mod follow;
mod output;
mod rpc;
mod run;
mod signals;
mod spawn;
mod spec;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::activity::{Activity, HoldGuard};

pub use output::{BeyondEnd, Channel, End, Event, Reader};
pub use rpc::ProcessService;
pub use spec::{Spec, SpecError};

/// How long the end of a process is kept for a client that comes late (contract: envd.md section 2.8).
const RETAINED: Duration = Duration::from_secs(30);

/// How long SendSignal waits for a killed process to be gone, so that a `kill -0` right after it fails.
const REAP_WAIT: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error("process with pid {0} not found")]
    NoPid(u32),
    #[error("process with tag {0} not found")]
    NoTag(String),
    #[error("error starting process '{command}': {source}")]
    Spawn { command: String, source: std::io::Error },
    #[error("error writing to stdin: stdin not enabled or closed")]
    StdinClosed,
    #[error("error writing to stdin: {0}")]
    StdinBroken(std::io::Error),
    #[error("error writing to stdin: the process did not read it in time")]
    StdinStalled,
    #[error("error sending signal: {0}")]
    Signal(nix::errno::Errno),
}

/// One process, alive or just ended.
#[derive(Debug)]
pub struct Process {
    pub pid: u32,
    pub spec: Spec,
    output: output::Output,
    stdin: tokio::sync::Mutex<Option<tokio::process::ChildStdin>>,
    /// Turns true when the process was reaped.
    reaped: watch::Sender<bool>,
}

impl Process {
    /// Attaches a client: it sees what comes from now on, and the end.
    pub fn attach(&self) -> Reader {
        self.output.attach()
    }

    /// Attaches a client that sees all output from `offset` on, as far as it is kept.
    ///
    /// # Errors
    /// When the output has not come that far.
    pub fn attach_at(&self, offset: u64) -> Result<Reader, BeyondEnd> {
        self.output.attach_at(offset)
    }

    /// Writes all of `bytes`, or until `deadline`.
    ///
    /// # Errors
    /// When stdin is closed or was never open, the process closed its end, or it did not read in time.
    pub async fn write_stdin(&self, bytes: &[u8], deadline: Option<Instant>) -> Result<(), ProcessError> {
        use tokio::io::AsyncWriteExt;
        let write = async {
            let mut stdin = self.stdin.lock().await;
            let pipe = stdin.as_mut().ok_or(ProcessError::StdinClosed)?;
            pipe.write_all(bytes).await.map_err(ProcessError::StdinBroken)
        };
        let mut reaped = self.reaped.subscribe();
        tokio::select! {
            written = write => written,
            // A grandchild may hold the reading end and never read: the command itself is gone.
            _ = reaped.wait_for(|reaped| *reaped) => Err(ProcessError::StdinClosed),
            () = sleep_until(deadline) => Err(ProcessError::StdinStalled),
        }
    }

    /// Closes stdin; closing it again is no error.
    pub async fn close_stdin(&self) {
        let mut reaped = self.reaped.subscribe();
        tokio::select! {
            biased;
            mut stdin = self.stdin.lock() => drop(stdin.take()),
            _ = reaped.wait_for(|reaped| *reaped) => {}
        }
    }

    /// Signals the process, then its group: what it started ends with it. After SIGKILL it is gone when this returns.
    ///
    /// # Errors
    /// [`ProcessError::NoPid`] when it has finished already: SDKs turn it into "there was nothing to kill".
    pub async fn signal(&self, signal: nix::sys::signal::Signal) -> Result<(), ProcessError> {
        if *self.reaped.borrow() {
            return Err(ProcessError::NoPid(self.pid));
        }
        signals::to_group(self.pid, signal).map_err(|error| match error {
            nix::errno::Errno::ESRCH => ProcessError::NoPid(self.pid),
            error => ProcessError::Signal(error),
        })?;
        if signal == nix::sys::signal::Signal::SIGKILL {
            let mut reaped = self.reaped.subscribe();
            let _slow_exit = tokio::time::timeout(REAP_WAIT, reaped.wait_for(|reaped| *reaped)).await;
        }
        Ok(())
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// How a request names a process.
#[derive(Clone, Debug)]
pub enum Selector {
    Pid(u32),
    Tag(String),
}

#[derive(Debug, Default)]
struct Table {
    live: HashMap<u32, Arc<Process>>,
    ended: HashMap<u32, Arc<Process>>,
}

/// All processes of this agent.
#[derive(Debug)]
pub struct Processes {
    table: Mutex<Table>,
    activity: Arc<Activity>,
    /// What all kept output may take together.
    budget: Arc<output::budget::Budget>,
}

impl Processes {
    pub fn new(activity: Arc<Activity>) -> Arc<Self> {
        let budget = output::budget::Budget::new(output::TOTAL_LIMIT);
        Arc::new(Self { table: Mutex::default(), activity, budget })
    }

    /// Starts a process and attaches its first client before the first byte can come.
    ///
    /// # Errors
    /// [`ProcessError::Spawn`]; nothing is left behind.
    pub fn start(
        self: &Arc<Self>,
        spec: Spec,
        deadline: Option<Instant>,
    ) -> Result<(Arc<Process>, Reader), ProcessError> {
        let hold = self.activity.hold(guestd_idle::HoldClass::Command, &spec.command_line());
        let mut child = spawn::spawn(&spec)
            .map_err(|source| ProcessError::Spawn { command: spec.command_line(), source })?;
        hold.name_process(child.pid);
        let process = Arc::new(Process {
            pid: child.pid,
            output: output::Output::new(Attachment::of(hold), Arc::clone(&self.budget)),
            stdin: tokio::sync::Mutex::new(child.stdin.take()),
            reaped: watch::Sender::new(false),
            spec,
        });
        let reader = process.attach();
        {
            let mut table = self.lock();
            // The number was used before: its old owner is not what a client asks for now.
            table.ended.remove(&child.pid);
            if let Some(tag) = &process.spec.tag {
                table.ended.retain(|_, ended| ended.spec.tag.as_ref() != Some(tag));
            }
            table.live.insert(child.pid, Arc::clone(&process));
        }
        tokio::spawn(run::run(Arc::clone(self), Arc::clone(&process), child, deadline));
        Ok((process, reader))
    }

    /// The live processes, oldest number first.
    pub fn list(&self) -> Vec<Arc<Process>> {
        let mut live: Vec<_> = self.lock().live.values().cloned().collect();
        live.sort_by_key(|process| process.pid);
        live
    }

    /// A live process.
    ///
    /// # Errors
    /// When there is none of that pid or tag.
    pub fn find_live(&self, selector: &Selector) -> Result<Arc<Process>, ProcessError> {
        find(&self.lock().live, selector)
    }

    /// A live process, or one that ended a moment ago.
    ///
    /// # Errors
    /// When there is none of that pid or tag.
    pub fn find_any(&self, selector: &Selector) -> Result<Arc<Process>, ProcessError> {
        let table = self.lock();
        find(&table.live, selector).or_else(|_| find(&table.ended, selector))
    }

    /// Moves a process to those that ended, for a while.
    fn retire(self: &Arc<Self>, process: &Arc<Process>) {
        let mut table = self.lock();
        // The number may be another's by now.
        if table.live.get(&process.pid).is_some_and(|live| Arc::ptr_eq(live, process)) {
            table.live.remove(&process.pid);
        }
        table.ended.insert(process.pid, Arc::clone(process));
        drop(table);
        let (processes, process) = (Arc::downgrade(self), Arc::clone(process));
        tokio::spawn(async move {
            tokio::time::sleep(RETAINED).await;
            let Some(processes) = processes.upgrade() else { return };
            let mut table = processes.lock();
            if table.ended.get(&process.pid).is_some_and(|kept| Arc::ptr_eq(kept, &process)) {
                table.ended.remove(&process.pid);
            }
        });
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn find(table: &HashMap<u32, Arc<Process>>, selector: &Selector) -> Result<Arc<Process>, ProcessError> {
    match selector {
        Selector::Pid(pid) => table.get(pid).cloned().ok_or(ProcessError::NoPid(*pid)),
        Selector::Tag(tag) => table
            .values()
            .filter(|process| process.spec.tag.as_ref() == Some(tag))
            // Tags need not be unique: the newest is meant.
            .max_by_key(|process| process.spec.started)
            .cloned()
            .ok_or_else(|| ProcessError::NoTag(tag.clone())),
    }
}

/// The process's hold, which follows whether a client is attached (DESIGN.md section 4, rule 2).
#[derive(Debug)]
pub struct Attachment {
    hold: Option<HoldGuard>,
    ended: bool,
}

impl Attachment {
    fn of(hold: HoldGuard) -> Self {
        Self { hold: Some(hold), ended: false }
    }

    /// The number of attached clients changed.
    fn clients(&mut self, count: usize) {
        if self.ended && count == 0 {
            self.hold = None;
        }
        if let Some(hold) = &self.hold {
            let class =
                if count == 0 { guestd_idle::HoldClass::Detached } else { guestd_idle::HoldClass::Command };
            hold.reclass(class);
        }
    }

    fn progress(&self, bytes: usize) {
        if let Some(hold) = &self.hold {
            hold.progress(bytes as u64);
        }
    }

    /// The process ended; clients that still read its output keep the hold.
    fn ended(&mut self, clients: usize) {
        self.ended = true;
        if clients == 0 {
            self.hold = None;
        }
    }
}
