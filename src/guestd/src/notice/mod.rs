//! Before the end: what a sandbox that asked for notice (metadata `idle_notice`) does with it.
//!
//! The host says how soon and why. The executables of a fixed folder are run, and terminals see a line. Neither counts as use; what a
//! hook does through the agent (an inhibitor, for instance) does, and calls an idle release off. The hard end comes all the same.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::activity::Activity;
use crate::process::Processes;

/// The folder of the hooks. Only executables that root owns and nobody else may write are run: they run as the agent does.
pub const HOOKS: &str = "/etc/guestd/before-end.d";

/// The most hooks that are run.
const HOOKS_LIMIT: usize = 16;

/// What a hook finds programs with.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What the agent did with a notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Given {
    /// The guest is in use; nobody was told.
    InUse,
    /// So many hooks were started.
    Told { hooks: usize },
}

/// Gives notices.
#[derive(Debug)]
pub struct Notices {
    activity: Arc<Activity>,
    processes: Arc<Processes>,
    hooks: PathBuf,
    /// Hooks are running: a second notice does not start them again.
    running: Arc<AtomicBool>,
}

impl Notices {
    pub fn new(activity: Arc<Activity>, processes: Arc<Processes>, hooks: PathBuf) -> Self {
        Self { activity, processes, hooks, running: Arc::default() }
    }

    /// Tells the machine that it ends in `ends_in`, unless it has not been idle for `idle_for`.
    pub fn give(&self, reason: &str, ends_in: Duration, idle_for: Option<Duration>) -> Given {
        if idle_for.is_some_and(|idle_for| self.activity.idle_for() < idle_for) {
            return Given::InUse;
        }
        let seconds = ends_in.as_secs_f64();
        self.activity.note(format!("notice: {reason} in {seconds:.0} s"));
        self.processes.announce(&format!("this sandbox ends in {seconds:.0} s: {reason}"));
        if self.running.swap(true, Ordering::AcqRel) {
            return Given::Told { hooks: 0 };
        }
        let hooks = executables(&self.hooks);
        let count = hooks.len();
        let (running, reason) = (Arc::clone(&self.running), reason.to_owned());
        tokio::spawn(async move {
            let runs = hooks.iter().map(|hook| run(hook, &reason, ends_in));
            futures_util::future::join_all(runs).await;
            running.store(false, Ordering::Release);
        });
        Given::Told { hooks: count }
    }
}

/// What may be run of a folder, in order of name.
fn executables(folder: &Path) -> Vec<PathBuf> {
    let trusted = |path: &Path| {
        let Ok(metadata) = path.symlink_metadata() else { return false };
        metadata.uid() == nix::unistd::geteuid().as_raw() && metadata.mode() & 0o022 == 0
    };
    if !trusted(folder) {
        return Vec::new();
    }
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut found: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    found.retain(|path| {
        let runs = path.symlink_metadata().is_ok_and(|file| file.is_file() && file.mode() & 0o100 != 0);
        let trusted = runs && trusted(path);
        if runs && !trusted {
            tracing::warn!(hook = %path.display(), "a hook that others may write is not run");
        }
        trusted
    });
    found.sort();
    found.truncate(HOOKS_LIMIT);
    found
}

/// Runs one hook to its end, or to the end of the notice.
async fn run(hook: &Path, reason: &str, ends_in: Duration) {
    let started = tokio::process::Command::new(hook)
        .env_clear()
        .env("PATH", PATH)
        .env("GUESTD_END_REASON", reason)
        // Rounded: the notice took a few milliseconds to come.
        .env("GUESTD_END_IN_SECONDS", format!("{:.0}", ends_in.as_secs_f64()))
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .kill_on_drop(true)
        .spawn();
    let mut child = match started {
        Ok(child) => child,
        Err(error) => {
            tracing::warn!(hook = %hook.display(), %error, "a hook could not be started");
            return;
        }
    };
    match tokio::time::timeout(ends_in, child.wait()).await {
        Ok(Ok(status)) if !status.success() => {
            tracing::warn!(hook = %hook.display(), %status, "a hook failed")
        }
        Ok(_) => {}
        Err(_elapsed) => {
            tracing::warn!(hook = %hook.display(), "a hook took longer than the notice");
            if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
                // Whatever it started ends with it.
                let _gone = killpg(Pid::from_raw(pid), Signal::SIGKILL);
            }
            let _reaped = child.wait().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::{self, Cgroups};
    use std::os::unix::fs::PermissionsExt as _;

    fn hook(folder: &Path, name: &str, script: &str, mode: u32) {
        let path = folder.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        folder
    }

    fn notices(folder: &Path) -> Notices {
        let activity = Activity::new(guestd_idle::Policy::default());
        let processes =
            Processes::new(Arc::clone(&activity), Arc::new(Cgroups::prepare(&cgroup::Choice::Off)));
        Notices::new(activity, processes, folder.to_owned())
    }

    async fn settled(notices: &Notices) {
        while notices.running.load(Ordering::Acquire) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn hooks_learn_why_and_how_soon() {
        let folder = folder();
        let out = folder.path().join("out");
        hook(
            folder.path(),
            "b",
            &format!("echo $GUESTD_END_REASON $GUESTD_END_IN_SECONDS >> {}", out.display()),
            0o755,
        );
        hook(folder.path(), "not-executable", "exit 1", 0o644);
        let notices = notices(folder.path());
        assert_eq!(notices.give("idle", Duration::from_secs(30), None), Given::Told { hooks: 1 });
        settled(&notices).await;
        assert_eq!(std::fs::read_to_string(out).unwrap(), "idle 30\n");
    }

    #[tokio::test]
    async fn a_hook_that_an_ordinary_user_may_write_is_not_run_as_root() {
        let folder = folder();
        hook(folder.path(), "open", "exit 0", 0o777);
        assert_eq!(
            notices(folder.path()).give("idle", Duration::from_secs(1), None),
            Given::Told { hooks: 0 }
        );
        std::fs::set_permissions(folder.path().join("open"), std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(
            notices(folder.path()).give("idle", Duration::from_secs(1), None),
            Given::Told { hooks: 0 }
        );
    }

    #[tokio::test]
    async fn a_hook_and_its_children_end_with_the_notice() {
        let folder = folder();
        hook(folder.path(), "slow", "sleep 300 & echo $! > pid; wait", 0o755);
        let script = format!("cd {}; sleep 300 & echo $! > pid; wait", folder.path().display());
        hook(folder.path(), "slow", &script, 0o755);
        let notices = notices(folder.path());
        notices.give("idle", Duration::from_millis(300), None);
        settled(&notices).await;
        let pid = std::fs::read_to_string(folder.path().join("pid")).unwrap();
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
        assert!(stat.is_empty() || stat.contains(") Z "), "{stat}");
    }

    #[tokio::test]
    async fn a_machine_in_use_is_not_told_that_it_is_idle() {
        let folder = folder();
        let notices = notices(folder.path());
        assert_eq!(
            notices.give("idle", Duration::from_secs(30), Some(Duration::from_secs(30))),
            Given::InUse
        );
        assert_eq!(notices.give("lifetime", Duration::from_secs(30), None), Given::Told { hooks: 0 });
    }
}
