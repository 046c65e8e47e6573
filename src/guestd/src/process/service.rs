//! A program that the agent needs itself: in no client's list, held by nobody, ended with its owner.

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::Signal;
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;

use super::leader::{Ended, Leader};
use super::{Spec, signals, spawn};
use crate::cgroup::{self, Cgroups, Group, GroupError};

/// How much of what it wrote last is kept, in bytes.
const TAIL: usize = 2 * 1024;

/// How long a killed program may take to be gone.
const REAP_LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    #[error(transparent)]
    Group(#[from] GroupError),
    #[error(transparent)]
    Spawn(#[from] io::Error),
}

/// A running program. Dropped, it is killed with all that it started.
#[derive(Debug)]
pub struct Service {
    pid: u32,
    leader: Option<Leader>,
    group: Option<Group>,
    ended: Option<Ended>,
    tail: Arc<Mutex<Vec<u8>>>,
}

impl Service {
    /// Starts what `spec` says, without terminal and stdin.
    ///
    /// # Errors
    /// [`ServiceError`]; nothing is left behind.
    pub fn start(spec: &Spec, cgroups: &Cgroups) -> Result<Self, ServiceError> {
        let group = cgroups.make(cgroup::Kind::Command, spec.limits, spec.default_limits)?;
        let spawned = group
            .as_ref()
            .map(Group::open)
            .transpose()
            .and_then(|directory| spawn::spawn(spec, directory.as_ref().map(AsFd::as_fd)));
        let spawn::Spawned { pid, leader, sources, .. } = match spawned {
            Ok(spawned) => spawned,
            Err(error) => {
                if let Some(group) = group {
                    group.remove_when_empty();
                }
                return Err(error.into());
            }
        };
        let tail = Arc::default();
        if let spawn::Sources::Pipes { stdout, stderr } = sources {
            for source in [stdout, stderr] {
                tokio::spawn(follow(source, Arc::clone(&tail)));
            }
        }
        Ok(Self { pid, leader: Some(leader), group, ended: None, tail })
    }

    /// Goes on with a child that an agent before this one started. What it writes goes nowhere.
    ///
    /// # Errors
    /// When it is no child of this process.
    pub fn adopt(pid: u32, group: Option<std::path::PathBuf>) -> io::Result<Self> {
        let leader = Leader::adopt(pid)?;
        Ok(Self { pid, leader: Some(leader), group: group.map(Group::at), ended: None, tail: Arc::default() })
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its control group's folder.
    pub fn group(&self) -> Option<&std::path::Path> {
        self.group.as_ref().map(Group::path)
    }

    /// Waits for its end. Dropping the future loses nothing.
    pub async fn wait(&mut self) -> Option<Ended> {
        if let Some(leader) = &mut self.leader {
            let ended = leader.wait().await;
            self.ended =
                ended.inspect_err(|error| tracing::warn!(pid = self.pid, %error, "a child was lost")).ok();
            self.leader = None;
        }
        self.ended
    }

    /// Whether the kernel killed something of it for want of memory.
    pub fn ran_out_of_memory(&self) -> bool {
        self.group.as_ref().is_some_and(|group| group.usage().oom_kills > 0)
    }

    /// Signals it and the group that it leads.
    ///
    /// # Errors
    /// The system's; ESRCH when it has ended.
    pub fn signal(&self, signal: Signal) -> Result<(), Errno> {
        if self.leader.is_none() {
            return Err(Errno::ESRCH);
        }
        signals::to_group(self.pid, signal)
    }

    /// The last of what it wrote, for people.
    pub fn tail(&self) -> String {
        String::from_utf8_lossy(&self.tail.lock().unwrap_or_else(PoisonError::into_inner)).trim().to_owned()
    }

    fn kill(&mut self) {
        if self.leader.is_some() {
            let _gone = signals::to_group(self.pid, Signal::SIGKILL);
        }
        // And whatever left its process group.
        if let Some(group) = self.group.take() {
            if let Err(error) = group.kill() {
                tracing::warn!(pid = self.pid, %error, "a control group could not be killed");
            }
            group.remove_when_empty();
        }
    }

    /// Ends it with all that it started, and waits until it is gone.
    pub async fn end(mut self) {
        self.kill();
        if tokio::time::timeout(REAP_LIMIT, self.wait()).await.is_err() {
            tracing::warn!(pid = self.pid, "a killed program is slow to go");
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.kill();
        if let Some(mut leader) = self.leader.take()
            && tokio::runtime::Handle::try_current().is_ok()
        {
            tokio::spawn(async move { leader.wait().await });
        }
    }
}

/// Reads one of its outputs to the end, whoever holds it open.
async fn follow(mut source: pipe::Receiver, tail: Arc<Mutex<Vec<u8>>>) {
    let mut chunk = [0; 1024];
    while let Ok(length @ 1..) = source.read(&mut chunk).await {
        let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.extend_from_slice(&chunk[..length]);
        let excess = tail.len().saturating_sub(TAIL);
        tail.drain(..excess);
    }
}
