//! The new program: finds what it was handed, and goes on with it.

use std::ffi::OsString;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use super::state::{self, SCHEMA};
use super::{Descriptors, Door, Handover, Parts, Report, Store};
use crate::activity::ActivityState;
use crate::init;
use crate::process::Leader;

/// How long a workload stays frozen whose host does not come back (contract: envd.md section 4.11).
const THAW_AFTER: Duration = Duration::from_secs(60);

/// How long the places of clients in the output of their commands are kept, once they can come back.
const RETURN_LIMIT: Duration = Duration::from_secs(10);

/// What `resume` on the command line asks for. It is no command for people.
#[derive(Debug)]
pub enum Asked {
    /// The form of state that this program reads.
    Schema,
    GoOn(Box<Resumed>),
}

/// A handover, on its way from the old agent's descriptors into the new one.
#[derive(Debug)]
pub struct Resumed {
    pub handover: Handover,
    pub store: Store,
    pub descriptors: Descriptors,
}

/// Reads the command line; None when it is not about this.
///
/// # Errors
/// When there is no handover that can be read.
pub fn asked(mut arguments: impl Iterator<Item = OsString>) -> Option<io::Result<Asked>> {
    if arguments.next()? != "resume" {
        return None;
    }
    let option = arguments.next().unwrap_or_default();
    if option == "--schema" {
        return Some(Ok(Asked::Schema));
    }
    let number = arguments.next().and_then(|number| number.to_str()?.parse::<RawFd>().ok());
    Some(match number.filter(|number| option == "--state-fd" && *number > 2) {
        Some(number) => Resumed::read(number).map(|resumed| Asked::GoOn(Box::new(resumed))),
        None => Err(io::Error::new(io::ErrorKind::InvalidInput, "resume is for the agent itself")),
    })
}

impl Resumed {
    /// Must be called before anything else in the process opens descriptors.
    fn read(number: RawFd) -> io::Result<Self> {
        state::set_inherited(number, false)?;
        // SAFETY: it is open, or the call above had failed, and this program has opened nothing yet: it was handed over.
        let file = unsafe { OwnedFd::from_raw_fd(number) };
        let (handover, store) = state::read(file)?;
        // SAFETY: as above; the old agent names each descriptor that it left open.
        let descriptors = unsafe { Descriptors::inherit(&handover.descriptors) };
        if handover.supervised {
            init::resume_supervised();
        }
        Ok(Self { handover, store, descriptors })
    }

    /// The old agent's activity, once.
    pub fn take_activity(&mut self) -> Option<ActivityState> {
        self.handover.activity.take()
    }

    /// A listening socket of the old agent's: callers who came meanwhile wait in it.
    pub fn door(&mut self, door: &Door) -> Option<OwnedFd> {
        let place = self.handover.doors.iter().position(|(kind, _)| kind == door)?;
        let (_, number) = self.handover.doors.remove(place);
        self.descriptors.take(number).ok()
    }
}

/// Prints what [`Asked::Schema`] asks for.
pub fn finish() {
    println!("{SCHEMA}");
}

impl Parts {
    /// Goes on where the agent before this one was: frozen if it was, and sealed.
    pub async fn restore(&self, resumed: Resumed) {
        let Resumed { handover, store, mut descriptors } = resumed;
        let from = handover.from.clone();
        self.access.restore(handover.credentials);
        self.settings.update(|values| *values = handover.settings);
        self.freezer.restore(handover.freezer).await;
        self.system.restore(handover.system).await;
        let mut known = handover.processes.pids();
        known.extend(handover.code.pids());
        self.interpreter.restore(handover.code).await;
        let restored = self.processes.restore(handover.processes, &store, &mut descriptors);
        drop(store);
        let (holds, conversations) = self.inhibition.restore(handover.inhibition);
        for (number, ids) in conversations {
            let taken = descriptors.take(number);
            let resumed = taken.and_then(|fd| crate::inhibit::resume(&self.inhibition, fd, ids.clone()));
            if let Err(error) = resumed {
                tracing::warn!(%error, "a connection that held inhibitors is lost");
                for id in ids {
                    self.inhibition.end(id);
                }
            }
        }
        let mut claimed = restored.holds;
        claimed.extend(holds);
        self.activity.settle(&claimed);
        let (watchers, watchers_failed) = self.files.restore_watchers(handover.watchers).await;
        let report = Report {
            failed: restored.failed + restored.retained_failed + watchers_failed > 0,
            procs: restored.processes,
            procs_failed: restored.failed,
            retained: restored.retained,
            retained_failed: restored.retained_failed,
            watchers,
            watchers_failed,
        };
        tracing::info!(from, ?report, "resumed");
        self.system.tell_handover(report);
        tokio::spawn(reap_strangers(known));
        tokio::spawn(self.clone().wait_for_host());
    }

    /// Until the host comes, the workload waits; but not for ever.
    async fn wait_for_host(self) {
        if tokio::time::timeout(THAW_AFTER, self.access.unsealed()).await.is_err() {
            tracing::warn!("no /init after the upgrade: the commands run again, and nobody is served");
            if self.freezer.thaw().await.is_err() {
                tracing::error!("the workload stays frozen: another freeze or thaw is still running");
            }
        }
        tokio::time::sleep(RETURN_LIMIT).await;
        self.processes.take_clients();
    }
}

/// Children of the agent before this one that nobody answers for any more (a hook, a program that was tried): they are waited for.
async fn reap_strangers(known: Vec<u32>) {
    let children = tokio::task::spawn_blocking(children).await.unwrap_or_default();
    for pid in children.into_iter().filter(|pid| !known.contains(pid)) {
        if let Ok(mut child) = Leader::adopt(pid) {
            tokio::spawn(async move { child.wait().await });
        }
    }
}

/// The children of this process, zombies included; proc_pid_stat(5).
fn children() -> Vec<u32> {
    let own = std::process::id().to_string();
    let of_mine = |pid: &u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(')')
            .and_then(|(_, rest)| rest.split_whitespace().nth(1))
            .is_some_and(|ppid| ppid == own)
    };
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(of_mine).collect()
}
