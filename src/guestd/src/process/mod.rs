//! Running commands: the table of live processes, who is attached to which, and what happened to those that ended.
//!
//! [`Processes`] owns the table. Each process has one task (`run`) that owns its child and is the only one to write its [`output`];
//! clients read the output at their own pace and come and go without touching the process. `spec` turns a request into what `spawn`
//! starts, in a `fork` of its own; `leader` is what is waited for, `terminal` and `input` what is written to, `exit` how it ended; `rpc`
//! speaks `process.Process`.

mod encode;
mod exit;
mod follow;
mod fork;
mod handover;
mod holders;
mod input;
mod leader;
mod output;
mod rpc;
mod run;
mod service;
mod signals;
mod spawn;
mod spec;
mod terminal;

use std::collections::HashMap;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use guestd_idle::HoldClass;
use nix::errno::Errno;
use nix::sys::signal::Signal;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::activity::{Activity, HoldGuard};
use crate::cgroup::{self, Cgroups, Group, GroupError, Limits};
use crate::logs::EACH_CALL;

use exit::Kill;
use input::Input;

pub use exit::{Cause, Record};
pub use handover::{ProcessesState, Restored};
pub use holders::Holder;
pub use input::{InputError, InputKind};
pub use leader::{Ended, Leader, Usage};
pub use output::{BeyondEnd, Channel, End, Event, Reader, Status};
pub use rpc::ProcessService;
pub use service::{Service, ServiceError};
pub use spec::{Spec, SpecError};
pub use terminal::{Size, Terminal};

/// How long the end of a process is kept for a client that comes late (contract: envd.md section 2.8).
const RETAINED: Duration = Duration::from_secs(30);

/// How long SendSignal waits for a killed process to be gone, so that a `kill -0` right after it fails.
const REAP_WAIT: Duration = Duration::from_secs(2);

/// A command with this tag stays in the agent's own control group (contract: envd.md section 2.13).
const SYSTEM_TAG: &str = "_system";

#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error("process with pid {0} not found")]
    NoPid(u32),
    #[error("process with tag {} not found", spec::excerpt(.0))]
    NoTag(String),
    #[error("error starting {} '{command}': {}", if *.terminal { "pty with command" } else { "process" }, reason(.source))]
    Spawn { command: String, terminal: bool, source: std::io::Error },
    #[error(transparent)]
    Input(#[from] InputError),
    #[error("error starting process '{command}': {source}")]
    Group { command: String, source: GroupError },
    #[error("error sending signal: {0}")]
    Signal(Errno),
    #[error("error resizing tty: tty not assigned to process")]
    NoTerminal,
    #[error("error resizing tty: {0}")]
    Resize(std::io::Error),
}

/// In the words of envd's clients: the system's, without its number and with a small letter first (contract: envd.md section 1.10).
fn reason(error: &std::io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error ").next().unwrap_or_default();
    match text.chars().next() {
        Some(first) if error.raw_os_error().is_some() => {
            format!("{}{}", first.to_lowercase(), &text[first.len_utf8()..])
        }
        _ => text.to_owned(),
    }
}

/// One process, alive or just ended.
#[derive(Debug)]
pub struct Process {
    pub pid: u32,
    pub spec: Spec,
    output: output::Output,
    input: Input,
    /// Until its end: a terminal that nobody uses any more is given back.
    terminal: Mutex<Option<Arc<Terminal>>>,
    /// What it runs in, until its end.
    group: Mutex<Option<Group>>,
    /// The last attempt to end it.
    kill: Mutex<Option<Kill>>,
    /// The terminal's job that was asked to end with it.
    asked_job: Mutex<Option<i32>>,
    /// Turns true when the process was reaped.
    reaped: watch::Sender<bool>,
    /// When its time is over.
    deadline: Option<Instant>,
    /// The outputs that are still read.
    ends: Mutex<Vec<(Channel, RawFd)>>,
    /// How it ended, while its output is still being read.
    finishing: Mutex<Option<run::Finishing>>,
    /// When its end was told.
    retired: Mutex<Option<Instant>>,
    /// The agent is about to be replaced: clients have to come back.
    leaving: watch::Sender<bool>,
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
    /// When the process has no input of that kind or it is closed, or it did not read in time.
    pub async fn write(
        &self,
        kind: InputKind,
        bytes: bytes::Bytes,
        deadline: Option<Instant>,
    ) -> Result<(), ProcessError> {
        // Before the process takes it: whoever types is there, whatever the program does.
        self.output.progress(bytes.len());
        Ok(self.input.write(kind, bytes, deadline).await?)
    }

    /// Closes stdin; closing it again is no error.
    ///
    /// # Errors
    /// For a terminal.
    pub async fn close_stdin(&self) -> Result<(), ProcessError> {
        Ok(self.input.close().await?)
    }

    /// Sets the size of its terminal; numbers as a client sends them.
    ///
    /// # Errors
    /// [`ProcessError::NoTerminal`] when it has none.
    pub fn resize(&self, columns: u32, rows: u32) -> Result<(), ProcessError> {
        let terminal = self.terminal().ok_or(ProcessError::NoTerminal)?;
        let size = Size::from_wire(columns, rows, terminal.size());
        terminal.resize(size).map_err(ProcessError::Resize)
    }

    /// Turns true when the agent is about to be replaced.
    fn leaving(&self) -> watch::Receiver<bool> {
        self.leaving.subscribe()
    }

    pub fn has_terminal(&self) -> bool {
        self.spec.terminal.is_some()
    }

    /// Asks the process to end (SIGTERM: it alone, and the job that its terminal's keyboard belongs to; when it has ended, what is left of
    /// what it started) or ends it with everything that it started (SIGKILL). After SIGKILL it is gone when this returns. `by` is who wants
    /// that. The rule is envd's and what its clients need beyond it (contract: envd.md sections 2.11 and 11, weakness 2).
    ///
    /// # Errors
    /// [`ProcessError::NoPid`] when it has finished already: SDKs turn it into "there was nothing to kill".
    pub async fn signal(&self, signal: Signal, by: &str) -> Result<(), ProcessError> {
        if *self.reaped.borrow() {
            return Err(ProcessError::NoPid(self.pid));
        }
        let kill = Kill::Signal { signal: signal as i32, by: by.to_owned() };
        let sent = if signal == Signal::SIGKILL { self.end_all(kill) } else { self.ask(signal, kill) };
        sent.map_err(|error| match error {
            Errno::ESRCH => ProcessError::NoPid(self.pid),
            error => ProcessError::Signal(error),
        })?;
        if signal == Signal::SIGKILL {
            let mut reaped = self.reaped.subscribe();
            let _slow_exit = tokio::time::timeout(REAP_WAIT, reaped.wait_for(|reaped| *reaped)).await;
        }
        Ok(())
    }

    fn ask(&self, signal: Signal, kill: Kill) -> Result<(), Errno> {
        self.note(kill);
        let job = self.terminal().and_then(|terminal| terminal.foreground());
        *lock(&self.asked_job) = job;
        signals::ask(self.pid, job, signal)
    }

    /// It has ended and is not reaped yet. If it was asked to end, so is what it leaves.
    fn ask_rest(&self) {
        let Some(Kill::Signal { signal: libc::SIGTERM, .. }) = self.kill() else { return };
        let others = lock(&self.group).as_ref().map(Group::processes).unwrap_or_default();
        signals::to_rest(self.pid, *lock(&self.asked_job), &others, Signal::SIGTERM);
    }

    /// Ends the process and what it started.
    fn end_all(&self, kill: Kill) -> Result<(), Errno> {
        self.note(kill);
        // Asked for before its session loses its leader.
        if let Some(terminal) = self.terminal() {
            signals::to_foreground(terminal.foreground(), self.pid, Signal::SIGKILL);
        }
        let sent = signals::to_group(self.pid, Signal::SIGKILL);
        // And whatever left its process group.
        if let Some(Err(error)) = lock(&self.group).as_ref().map(Group::kill) {
            tracing::warn!(pid = self.pid, %error, "the control group of a command could not be killed");
        }
        sent
    }

    fn terminal(&self) -> Option<Arc<Terminal>> {
        lock(&self.terminal).clone()
    }

    /// What is certain to end it is kept: a later attempt is not what ended it.
    fn note(&self, kill: Kill) {
        let mut noted = lock(&self.kill);
        if !noted.as_ref().is_some_and(Kill::is_certain) {
            *noted = Some(kill);
        }
    }

    fn kill(&self) -> Option<Kill> {
        lock(&self.kill).clone()
    }

    fn finishing(&self) -> Option<run::Finishing> {
        *lock(&self.finishing)
    }

    fn finish(&self, finishing: run::Finishing) {
        *lock(&self.finishing) = Some(finishing);
    }

    fn forget_end(&self, channel: Channel) {
        lock(&self.ends).retain(|(known, _)| *known != channel);
    }

    fn group_usage(&self) -> Option<cgroup::GroupUsage> {
        lock(&self.group).as_ref().map(Group::usage)
    }

    /// After the process's end: its group, to be given up.
    fn leave_group(&self) -> Option<Group> {
        lock(&self.group).take()
    }

    /// After the process's end: writers are told, and the descriptors given back.
    async fn release_input(&self) {
        self.input.end().await;
        lock(&self.terminal).take();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
    cgroups: Arc<Cgroups>,
    /// What all kept output may take together.
    budget: Arc<output::budget::Budget>,
    /// Outputs that outlive their commands, by descriptor; true is a terminal.
    outliving: Mutex<HashMap<RawFd, bool>>,
    leaving: watch::Sender<bool>,
    /// In the places of clients that have to come back.
    stand_ins: Mutex<Vec<Reader>>,
}

impl Processes {
    pub fn new(activity: Arc<Activity>, cgroups: Arc<Cgroups>) -> Arc<Self> {
        let budget = output::budget::Budget::new(output::TOTAL_LIMIT);
        Arc::new(Self {
            table: Mutex::default(),
            activity,
            cgroups,
            budget,
            outliving: Mutex::default(),
            leaving: watch::Sender::new(false),
            stand_ins: Mutex::default(),
        })
    }

    /// The control group of a new command.
    fn group(&self, spec: &Spec) -> Result<Option<Group>, GroupError> {
        if spec.tag.as_deref() == Some(SYSTEM_TAG) {
            return match spec.limits == Limits::default() {
                true => Ok(None),
                false => Err(GroupError::System),
            };
        }
        let kind = spec.terminal.map_or(cgroup::Kind::Command, |_| cgroup::Kind::Terminal);
        self.cgroups.make(kind, spec.limits, spec.default_limits)
    }

    /// Starts a process and attaches its first client before the first byte can come.
    ///
    /// # Errors
    /// [`ProcessError::Spawn`] and [`ProcessError::Group`]; nothing is left behind.
    pub fn start(
        self: &Arc<Self>,
        mut spec: Spec,
        deadline: Option<Instant>,
    ) -> Result<(Arc<Process>, Reader), ProcessError> {
        let class = spec.terminal.map_or(HoldClass::Command, |_| HoldClass::Terminal);
        let hold = self.activity.hold(class, &spec.command_line());
        let group = self
            .group(&spec)
            .map_err(|source| ProcessError::Group { command: spec.command_line(), source })?;
        let spawned = group
            .as_ref()
            .map(Group::open)
            .transpose()
            .and_then(|directory| spawn::spawn(&spec, directory.as_ref().map(std::os::fd::AsFd::as_fd)));
        let spawn::Spawned { pid, leader, sink, sources } = match spawned {
            Ok(spawned) => spawned,
            Err(source) => {
                if let Some(group) = group {
                    group.remove_when_empty();
                }
                let terminal = spec.terminal.is_some();
                let (command, user) = (spec.name(), &spec.user.name);
                tracing::warn!(command, user, error = %source, "a process was not started");
                return Err(ProcessError::Spawn { command: spec.command_line(), terminal, source });
            }
        };
        hold.name_process(pid);
        let (tag, user, command) = (spec.tag.as_deref(), &spec.user.name, spec.name());
        tracing::info!(target: EACH_CALL, pid, tag, user, command, "process started");
        spec.forget_start();
        let terminal = match &sources {
            spawn::Sources::Terminal(terminal) => Some(Arc::clone(terminal)),
            spawn::Sources::Pipes { .. } => None,
        };
        let sources = run::sources(sources);
        let process = Arc::new(Process {
            deadline,
            ends: Mutex::new(
                sources.iter().map(|(channel, source)| (*channel, source.as_raw_fd())).collect(),
            ),
            finishing: Mutex::default(),
            retired: Mutex::default(),
            leaving: self.leaving.clone(),
            pid,
            output: output::Output::new(Attachment::new(hold, class), Arc::clone(&self.budget)),
            input: Input::new(sink, self.leaving.clone()),
            terminal: Mutex::new(terminal),
            group: Mutex::new(group),
            kill: Mutex::default(),
            asked_job: Mutex::default(),
            reaped: watch::Sender::new(false),
            spec,
        });
        let reader = process.attach();
        {
            let mut table = self.lock();
            // The number was used before: its old owner is not what a client asks for now.
            table.ended.remove(&pid);
            if let Some(tag) = &process.spec.tag {
                table.ended.retain(|_, ended| ended.spec.tag.as_ref() != Some(tag));
            }
            table.live.insert(pid, Arc::clone(&process));
        }
        tokio::spawn(run::run(Arc::clone(self), Arc::clone(&process), Some(leader), sources));
        Ok((process, reader))
    }

    /// The live processes, oldest number first.
    pub fn list(&self) -> Vec<Arc<Process>> {
        let mut live: Vec<_> = self.lock().live.values().cloned().collect();
        live.sort_by_key(|process| process.pid);
        live
    }

    /// Shows a line to whoever looks at a terminal now. Nobody is waited for, and it is no use of the machine.
    pub fn announce(&self, line: &str) {
        let bytes = bytes::Bytes::from(format!("\r\n[guestd] {line}\r\n"));
        for process in self.list().iter().filter(|process| process.has_terminal()) {
            process.output.announce(Channel::Pty, bytes.clone());
        }
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
        *lock(&process.retired) = Some(Instant::now());
        self.forget_after(process, RETAINED);
    }

    /// Reads on from an output that outlives its command, and throws away what comes.
    fn discard(self: &Arc<Self>, mut source: run::Source) {
        let fd = source.as_raw_fd();
        lock(&self.outliving).insert(fd, source.is_terminal());
        let processes = Arc::clone(self);
        tokio::spawn(async move {
            run::discard(&mut source).await;
            lock(&processes.outliving).remove(&fd);
        });
    }

    fn forget_after(self: &Arc<Self>, process: &Arc<Process>, after: Duration) {
        let (processes, process) = (Arc::downgrade(self), Arc::clone(process));
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            let Some(processes) = processes.upgrade() else { return };
            let mut table = processes.lock();
            if table.ended.get(&process.pid).is_some_and(|kept| Arc::ptr_eq(kept, &process)) {
                table.ended.remove(&process.pid);
            }
            if table.ended.is_empty() {
                table.ended.shrink_to_fit();
            }
        });
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        lock(&self.table)
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
    /// What it is while a client is attached: a command, which counts for being so, or a terminal, which counts at each byte.
    class: HoldClass,
    ended: bool,
}

impl Attachment {
    fn new(hold: HoldGuard, class: HoldClass) -> Self {
        Self { hold: Some(hold), class, ended: false }
    }

    #[cfg(test)]
    fn of(hold: HoldGuard) -> Self {
        Self::new(hold, HoldClass::Command)
    }

    /// The number of attached clients changed.
    fn clients(&mut self, count: usize) {
        if self.ended && count == 0 {
            self.hold = None;
        }
        if let Some(hold) = &self.hold {
            hold.reclass(if count == 0 { HoldClass::Detached } else { self.class });
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
