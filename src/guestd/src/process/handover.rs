//! The table of processes as data, for the program that takes this process's place under the same pid: its children stay its children.
//!
//! Descriptors are numbers here: who replaces this program leaves them open. Exporting changes nothing, so that an agent which could not
//! be replaced goes on.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use guestd_idle::{HoldClass, HoldId};
use guestd_protocol::wire::process as wire;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::time::Instant;

use super::exit::Kill;
use super::input::{Input, Owed, Sink};
use super::leader::Leader;
use super::output::{Channel, Output, OutputState, Reader};
use super::run::{self, Finishing, Source};
use super::{Attachment, Process, Processes, RETAINED, Spec, Terminal, lock};
use crate::cgroup::{Group, Limits};
use crate::identity::User;
use crate::upgrade::{Descriptors, Stamp, Store};

/// One process.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct ProcessState {
    pid: u32,
    config: wire::ProcessConfig,
    tag: Option<String>,
    user: User,
    directory: PathBuf,
    stdin: bool,
    terminal: Option<super::Size>,
    limits: Limits,
    default_limits: Limits,
    started: Stamp,
    deadline: Option<Stamp>,
    kill: Option<Kill>,
    group: Option<PathBuf>,
    finishing: Option<Finishing>,
    retired: Option<Stamp>,
    /// The writing end of stdin.
    input: Option<RawFd>,
    /// Input that was taken for it.
    #[serde(default)]
    owed: OwedState,
    /// Its terminal, while it lives.
    master: Option<RawFd>,
    ends: Vec<(Channel, RawFd)>,
    output: OutputState,
}

/// Its bytes are in the store.
#[derive(Debug, Default, serde::Serialize, serde::Deserialize)]
struct OwedState {
    stored_at: u64,
    length: u64,
    closing: bool,
}

impl OwedState {
    fn of(owed: &Owed, store: &mut Store) -> Self {
        let stored_at = store.len();
        owed.pieces.iter().for_each(|piece| store.put(piece));
        Self { stored_at, length: store.len() - stored_at, closing: owed.closing }
    }

    fn restore(&self, store: &Store) -> Option<Owed> {
        let bytes = Bytes::copy_from_slice(store.get(self.stored_at, self.length)?);
        let pieces = if bytes.is_empty() { VecDeque::new() } else { VecDeque::from([bytes]) };
        Some(Owed { pieces, closing: self.closing })
    }
}

/// All of them.
#[derive(Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct ProcessesState {
    live: Vec<ProcessState>,
    ended: Vec<ProcessState>,
    /// What outlives its command, by descriptor; true is a terminal.
    outliving: Vec<(RawFd, bool)>,
}

/// What became of exported processes.
#[derive(Debug, Default)]
pub struct Restored {
    pub processes: usize,
    pub failed: usize,
    pub retained: usize,
    pub retained_failed: usize,
    /// The holds that are somebody's again.
    pub holds: Vec<HoldId>,
}

impl ProcessesState {
    /// The descriptors that have to stay open.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        let of_one = |process: &ProcessState| {
            let ends: Vec<RawFd> = process.ends.iter().map(|(_, fd)| *fd).collect();
            process.input.into_iter().chain(process.master).chain(ends)
        };
        self.live.iter().flat_map(of_one).chain(self.outliving.iter().map(|(fd, _)| *fd))
    }

    /// The control groups that have an owner.
    pub fn groups(&self) -> Vec<PathBuf> {
        self.live.iter().filter_map(|process| process.group.clone()).collect()
    }

    /// Children that have an owner.
    pub fn pids(&self) -> Vec<u32> {
        self.live.iter().map(|process| process.pid).collect()
    }
}

impl Process {
    fn export(&self, store: &mut Store) -> ProcessState {
        let spec = &self.spec;
        ProcessState {
            pid: self.pid,
            config: spec.config.clone(),
            tag: spec.tag.clone(),
            user: spec.user.clone(),
            directory: spec.directory.clone(),
            stdin: spec.stdin,
            terminal: spec.terminal,
            limits: spec.limits,
            default_limits: spec.default_limits,
            started: Stamp::of(spec.started.into()),
            deadline: self.deadline.map(Stamp::of),
            kill: self.kill(),
            group: lock(&self.group).as_ref().map(|group| group.path().to_owned()),
            finishing: self.finishing(),
            retired: lock(&self.retired).map(Stamp::of),
            input: self.input.pipe(),
            owed: OwedState::of(&self.input.owed(), store),
            master: self.terminal().map(|terminal| terminal.as_raw_fd()),
            ends: lock(&self.ends).clone(),
            output: self.output.export(store),
        }
    }
}

impl Processes {
    /// Ends the streams of clients, which have to come back; their places in the output are kept.
    pub fn send_clients_away(&self) {
        let live = self.list();
        *lock(&self.stand_ins) = live.iter().flat_map(|process| process.output.stand_ins()).collect();
        self.leaving.send_replace(true);
    }

    /// How many streams are still open.
    pub fn clients(&self) -> usize {
        self.leaving.receiver_count()
    }

    /// Takes clients again; those that did not come back have lost their places.
    pub fn take_clients(&self) {
        self.leaving.send_replace(false);
        lock(&self.stand_ins).clear();
        self.list().iter().for_each(pay);
    }

    /// Turns true when the agent is about to be replaced.
    pub(super) fn leaving(&self) -> watch::Receiver<bool> {
        self.leaving.subscribe()
    }

    pub fn export(&self, store: &mut Store) -> ProcessesState {
        let table = self.lock();
        ProcessesState {
            live: table.live.values().map(|process| process.export(store)).collect(),
            ended: table.ended.values().map(|process| process.export(store)).collect(),
            outliving: lock(&self.outliving).iter().map(|(fd, terminal)| (*fd, *terminal)).collect(),
        }
    }

    /// Goes on with exported processes. One that cannot be taken over is told of and left alone.
    pub fn restore(
        self: &Arc<Self>,
        state: ProcessesState,
        store: &Store,
        descriptors: &mut Descriptors,
    ) -> Restored {
        let mut restored = Restored::default();
        for process in state.live {
            let (pid, hold) = (process.pid, process.output.hold);
            match self.take_over(process, store, descriptors) {
                Ok(()) => {
                    restored.processes += 1;
                    restored.holds.extend(hold);
                }
                Err(error) => {
                    restored.failed += 1;
                    tracing::error!(pid, %error, "a process was not taken over");
                }
            }
        }
        for process in state.ended {
            match self.remember(process, store) {
                Some(()) => restored.retained += 1,
                None => restored.retained_failed += 1,
            }
        }
        for (fd, terminal) in state.outliving {
            let source = descriptors.take(fd).and_then(|fd| source(fd, terminal));
            match source {
                Ok(source) => self.discard(source),
                Err(error) => tracing::warn!(%error, "an output that outlives its command is closed"),
            }
        }
        restored
    }

    fn take_over(
        self: &Arc<Self>,
        state: ProcessState,
        store: &Store,
        descriptors: &mut Descriptors,
    ) -> std::io::Result<()> {
        // First: a child that nobody waits for would stay for ever.
        let leader = match state.finishing {
            Some(_) => None,
            None => Some(Leader::adopt(state.pid)?),
        };
        let terminal = match state.master {
            Some(fd) => Some(Arc::new(Terminal::adopt(descriptors.take(fd)?)?)),
            None => None,
        };
        let sink = match (&terminal, state.input) {
            (Some(terminal), _) => Some(Sink::Terminal(Arc::clone(terminal))),
            (None, Some(fd)) => Some(Sink::Pipe(pipe::Sender::from_owned_fd(descriptors.take(fd)?)?)),
            (None, None) => None,
        };
        let mut sources = Vec::new();
        for (channel, fd) in &state.ends {
            let source = match &terminal {
                Some(terminal) if state.master == Some(*fd) => Source::Terminal(Arc::clone(terminal)),
                _ => source(descriptors.take(*fd)?, *channel == Channel::Pty)?,
            };
            sources.push((*channel, source));
        }
        let (process, stand_ins) = self.rebuild(state, store, sink, terminal)?;
        lock(&self.stand_ins).extend(stand_ins);
        self.lock().live.insert(process.pid, Arc::clone(&process));
        pay(&process);
        tokio::spawn(run::run(Arc::clone(self), process, leader, sources));
        Ok(())
    }

    /// An end that is kept for clients that come late.
    fn remember(self: &Arc<Self>, mut state: ProcessState, store: &Store) -> Option<()> {
        // Whoever read it then is gone.
        state.output.hold = None;
        let since = state.retired.map(Stamp::instant)?;
        let (process, _nobody) = self.rebuild(state, store, None, None).ok()?;
        self.lock().ended.insert(process.pid, Arc::clone(&process));
        let left = (since + RETAINED).saturating_duration_since(Instant::now());
        self.forget_after(&process, left.max(Duration::from_millis(1)));
        Some(())
    }

    fn rebuild(
        &self,
        state: ProcessState,
        store: &Store,
        sink: Option<Sink>,
        terminal: Option<Arc<Terminal>>,
    ) -> std::io::Result<(Arc<Process>, Vec<Reader>)> {
        let class = state.terminal.map_or(HoldClass::Command, |_| HoldClass::Terminal);
        let ended = state.output.end.is_some();
        let hold = state.output.hold.and_then(|id| self.activity.claim(id));
        let attachment = Attachment { hold, class, ended };
        let (output, stand_ins) = Output::restore(&state.output, store, attachment, Arc::clone(&self.budget))
            .ok_or_else(|| std::io::Error::other("its output is not in the handover"))?;
        let owed = state
            .owed
            .restore(store)
            .ok_or_else(|| std::io::Error::other("its input is not in the handover"))?;
        let is_reaped = ended || state.finishing.is_some();
        let process = Process {
            pid: state.pid,
            output,
            input: Input::restored(state.terminal.is_some(), sink, owed, self.leaving.clone()),
            terminal: Mutex::new(terminal),
            group: Mutex::new(state.group.map(Group::at)),
            kill: Mutex::new(state.kill),
            asked_job: Mutex::default(),
            reaped: watch::Sender::new(is_reaped),
            deadline: state.deadline.map(Stamp::instant),
            ends: Mutex::new(state.ends),
            finishing: Mutex::new(state.finishing),
            retired: Mutex::new(state.retired.map(Stamp::instant)),
            leaving: self.leaving.clone(),
            spec: Spec {
                config: state.config,
                tag: state.tag,
                user: state.user,
                directory: state.directory,
                stdin: state.stdin,
                terminal: state.terminal,
                limits: state.limits,
                default_limits: state.default_limits,
                started: state.started.instant().into_std(),
                argv: Vec::new(),
                environment: Vec::new(),
                candidates: Vec::new(),
            },
        };
        Ok((Arc::new(process), stand_ins))
    }
}

/// Input that was taken while an agent was being replaced goes to the process.
fn pay(process: &Arc<Process>) {
    if process.input.owes() {
        let process = Arc::clone(process);
        tokio::spawn(async move { process.input.pay().await });
    }
}

fn source(fd: OwnedFd, terminal: bool) -> std::io::Result<Source> {
    Ok(match terminal {
        true => Source::Terminal(Arc::new(Terminal::adopt(fd)?)),
        false => Source::Pipe(pipe::Receiver::from_owned_fd(fd)?),
    })
}
