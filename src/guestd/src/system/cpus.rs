//! How many processors are online: an `/init` may ask for another number after the machine was given more (contract: envd.md section 12,
//! `cpuCount`).

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A processor that the host has just added takes a moment to appear.
const ATTEMPTS: u64 = 5;
const ATTEMPT_PAUSE: Duration = Duration::from_millis(100);

/// Why a number of processors was refused; the text goes into `X-Envd-Cpus`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Rejection {
    #[error("cpuCount must be at least 1")]
    Zero,
    #[error("cpuCount {asked} is more than the {possible} processors that this machine can have")]
    TooMany { asked: u32, possible: u32 },
    #[error("the processors of this machine are not the agent's to change")]
    NotOurs,
}

/// What is known about the processors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Status {
    pub(super) online: u32,
    pub(super) possible: u32,
    /// As asked for last; what is online when nobody asked.
    pub(super) target: u32,
    pub(super) attempts: u64,
    /// How long the present change has been under way.
    pub(super) pending: Option<Duration>,
}

#[derive(Debug, Default)]
struct State {
    target: Option<u32>,
    attempts: u64,
    pending: Option<Instant>,
}

/// The processors as sysfs shows them.
#[derive(Debug)]
pub(super) struct Cpus {
    folder: PathBuf,
    ours: bool,
    state: Mutex<State>,
}

impl Cpus {
    pub(super) fn new(folder: PathBuf, ours: bool) -> Self {
        Self { folder, ours, state: Mutex::default() }
    }

    pub(super) fn status(&self) -> Status {
        let count = |name| list(&self.folder, name).len();
        let online = u32::try_from(count("online")).unwrap_or(u32::MAX);
        let state = self.lock();
        Status {
            online,
            possible: u32::try_from(count("possible")).unwrap_or(u32::MAX),
            target: state.target.unwrap_or(online),
            attempts: state.attempts,
            pending: state.pending.map(|since| since.elapsed()),
        }
    }

    /// Brings processors online, or takes the last ones offline, in the background: the kernel may take a while.
    pub(super) fn ask(self: &Arc<Self>, count: u32) -> Result<(), Rejection> {
        let possible = self.status().possible;
        match count {
            _ if !self.ours => return Err(Rejection::NotOurs),
            0 => return Err(Rejection::Zero),
            asked if asked > possible => return Err(Rejection::TooMany { asked, possible }),
            _ => {}
        }
        let mut state = self.lock();
        state.target = Some(count);
        if state.pending.replace(Instant::now()).is_none() {
            let cpus = Arc::clone(self);
            drop(tokio::task::spawn_blocking(move || cpus.work()));
        }
        Ok(())
    }

    /// Works until the target is reached or given up; a target that changes meanwhile is a new one.
    fn work(&self) {
        let (mut aimed, mut tries) = (None, 0);
        loop {
            let target = self.lock().target;
            if aimed != target {
                (aimed, tries) = (target, 0);
            }
            let Some(target) = target else { break };
            let reached = self.set(target);
            tries += 1;
            let mut state = self.lock();
            state.attempts += 1;
            if state.target == aimed && (reached || tries == ATTEMPTS) {
                state.pending = None;
                if !reached {
                    tracing::warn!(target, "not as many processors as asked for are online");
                }
                return;
            }
            drop(state);
            std::thread::sleep(ATTEMPT_PAUSE);
        }
        self.lock().pending = None;
    }

    /// Whether as many are online now.
    fn set(&self, target: u32) -> bool {
        let target = usize::try_from(target).unwrap_or(usize::MAX);
        for (index, number) in list(&self.folder, "present").into_iter().enumerate() {
            let path = self.folder.join(format!("cpu{number}/online"));
            // The first processor has no such file on most machines: it is always online.
            let Ok(now) = fs::read_to_string(&path) else { continue };
            let wanted = if index < target { "1" } else { "0" };
            if now.trim_end() != wanted
                && let Err(error) = fs::write(&path, wanted)
            {
                tracing::warn!(number, wanted, %error, "a processor keeps its state");
            }
        }
        list(&self.folder, "online").len() == target
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The numbers in a list like `0-3,5` (sysfs's cpulist).
fn list(folder: &Path, name: &str) -> Vec<u32> {
    let text = fs::read_to_string(folder.join(name)).unwrap_or_default();
    let mut numbers = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.parse::<u32>(), last.parse::<u32>()) {
            numbers.extend(first..=last.min(first.saturating_add(4096)));
        }
    }
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(ours: bool) -> (tempfile::TempDir, Arc<Cpus>) {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in [("online", "0-1\n"), ("present", "0-3\n"), ("possible", "0-7\n")] {
            fs::write(folder.path().join(name), text).unwrap();
        }
        for number in 1..4 {
            let cpu = folder.path().join(format!("cpu{number}"));
            fs::create_dir(&cpu).unwrap();
            fs::write(cpu.join("online"), if number == 1 { "1" } else { "0" }).unwrap();
        }
        let cpus = Arc::new(Cpus::new(folder.path().to_owned(), ours));
        (folder, cpus)
    }

    #[test]
    fn processors_go_on_and_off_from_the_first_to_the_last() {
        let (folder, cpus) = machine(true);
        let online =
            |number: u32| fs::read_to_string(folder.path().join(format!("cpu{number}/online"))).unwrap();
        cpus.set(3);
        assert_eq!((online(1), online(2), online(3)), ("1".into(), "1".into(), "0".into()));
        assert!(!cpus.set(1), "this list does not follow");
        assert_eq!((online(1), online(2), online(3)), ("0".into(), "0".into(), "0".into()));
    }

    #[tokio::test]
    async fn a_number_that_cannot_be_is_refused_and_changes_nothing() {
        let (_folder, cpus) = machine(true);
        assert_eq!(cpus.ask(0), Err(Rejection::Zero));
        assert_eq!(cpus.ask(9), Err(Rejection::TooMany { asked: 9, possible: 8 }));
        assert_eq!(cpus.status(), Status { online: 2, possible: 8, target: 2, attempts: 0, pending: None });
        assert_eq!(machine(false).1.ask(1), Err(Rejection::NotOurs));
    }

    #[test]
    fn a_target_that_is_never_reached_is_given_up() {
        let (_folder, cpus) = machine(true);
        cpus.lock().target = Some(4);
        cpus.work();
        let status = cpus.status();
        assert_eq!((status.target, status.attempts, status.pending), (4, ATTEMPTS, None));
    }
}
