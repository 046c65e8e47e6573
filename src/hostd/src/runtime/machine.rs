//! hostd's hold on one running sandbox: its guard.

use std::fs;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use guestd_idle::Moment;
use tokio::io::unix::AsyncFd;

use super::guard::{self, CONSOLE_FILE, END_FILE, End, PID_FILE, PLAN_FILE};
use super::{Image, Placement, Runtime, Size};
use crate::store::GuardId;

/// How long a guard may take to end its sandbox when asked.
const STOP_LIMIT: Duration = Duration::from_secs(8);

/// How much of a console goes into an error message, in bytes.
const CONSOLE_TAIL: usize = 600;

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("{0}")]
    Missing(String),
    #[error("cannot prepare {}: {source}", path.display())]
    Folder { path: PathBuf, source: io::Error },
    #[error("the guard could not be started: {0}")]
    Guard(io::Error),
}

/// A running sandbox, as hostd holds it.
#[derive(Debug)]
pub struct Machine {
    pub placement: Placement,
    pidfd: AsyncFd<OwnedFd>,
    /// hostd's end of the guard's standard input; none for an adopted sandbox, whose deadline is known already.
    pipe: Mutex<Option<io::PipeWriter>>,
}

/// Plans a sandbox and starts its guard.
///
/// # Errors
/// What is missing or could not be made; nothing is left behind.
pub fn start(
    runtime: &dyn Runtime,
    id: &str,
    runs: &Path,
    image: &Image,
    size: Size,
) -> Result<Machine, StartError> {
    let folder = runs.join(id);
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| StartError::Folder { path, source }
    };
    fs::create_dir(&folder).map_err(at(&folder))?;
    set_private(&folder).map_err(at(&folder))?;
    let started = || -> Result<Machine, StartError> {
        let plan = runtime.plan(id, &folder, image, size)?;
        let path = folder.join(PLAN_FILE);
        fs::write(&path, serde_json::to_vec_pretty(&plan).unwrap_or_default()).map_err(at(&path))?;
        let (reader, writer) = io::pipe().map_err(StartError::Guard)?;
        let guard = spawn_guard(&folder, reader).map_err(StartError::Guard)?;
        let path = folder.join(PID_FILE);
        fs::write(&path, format!("{}\n", guard.pid)).map_err(at(&path))?;
        let placement = Placement {
            runtime: runtime.name().to_owned(),
            transport: runtime.transport(&folder),
            folder: folder.clone(),
            guard,
        };
        let pidfd = open_pidfd(guard.pid).map_err(StartError::Guard)?;
        Ok(Machine { placement, pidfd, pipe: Mutex::new(Some(writer)) })
    };
    started().inspect_err(|_| remove(&folder))
}

/// Starts the guard as a session of its own, so that what ends hostd (a terminal's Ctrl-C, a service manager's signal to the group) does
/// not end the sandboxes.
fn spawn_guard(folder: &Path, stdin: io::PipeReader) -> io::Result<GuardId> {
    let log = fs::File::create(folder.join("guard.log"))?;
    // The running program, even when its file has been replaced by a newer one.
    let mut command = Command::new("/proc/self/exe");
    // Not hostd's environment: there are API keys in it.
    command.env_clear().env("PATH", guard::PATH);
    command.arg("guard").current_dir(folder).stdin(stdin).stdout(log.try_clone()?).stderr(log);
    // SAFETY: setsid is async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            libc::setsid();
            Ok(())
        });
    }
    let mut child = tokio::process::Command::from(command).spawn()?;
    let pid = child
        .id()
        .and_then(|pid| i32::try_from(pid).ok())
        .ok_or_else(|| io::Error::other("it ended at once"))?;
    let start_ticks = guard::start_ticks_of(pid).ok_or_else(|| io::Error::other("it ended at once"))?;
    // Only to reap it: the guard may outlive hostd, and says itself how its sandbox ended.
    tokio::spawn(async move { child.wait().await });
    Ok(GuardId { pid, start_ticks })
}

impl Machine {
    /// Takes hold of a sandbox that an earlier hostd started; None when its guard is gone.
    ///
    /// # Errors
    /// When that cannot be told.
    pub fn adopt(placement: Placement) -> io::Result<Option<Self>> {
        let pidfd = match open_pidfd(placement.guard.pid) {
            Ok(pidfd) => pidfd,
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            Err(error) => return Err(error),
        };
        // In this order: the descriptor pins the number, then the start time says whose it is.
        let alive = guard::is_alive(placement.guard.pid, placement.guard.start_ticks);
        Ok(alive.then(|| Self { placement, pidfd, pipe: Mutex::new(None) }))
    }

    /// Tells the guard the hard end. From now on the sandbox survives hostd.
    ///
    /// # Errors
    /// When the guard is gone.
    pub fn set_deadline(&self, end: Moment) -> io::Result<()> {
        let mut pipe = self.pipe.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match pipe.as_mut() {
            Some(pipe) => writeln!(pipe, "{}", end.as_nanos()),
            None => Ok(()),
        }
    }

    /// Waits for the end of the guard, and with it of everything that it started.
    pub async fn exited(&self) {
        // A pidfd becomes readable when its process ends (pidfd_open(2)).
        let _readable = self.pidfd.readable().await;
    }

    /// Ends the sandbox and removes its run folder.
    pub async fn stop(&self) {
        self.signal(libc::SIGTERM);
        if tokio::time::timeout(STOP_LIMIT, self.exited()).await.is_err() {
            tracing::error!(
                guard = self.placement.guard.pid,
                "a guard did not end; killing it, which kills its machine"
            );
            self.signal(libc::SIGKILL);
            let _late = tokio::time::timeout(STOP_LIMIT, self.exited()).await;
        }
        let folder = self.placement.folder.clone();
        let cleaning = tokio::task::spawn_blocking(move || {
            if !folder.join(END_FILE).exists() {
                guard::clean_up_after(&folder);
            }
            remove(&folder);
        });
        if let Err(error) = cleaning.await {
            tracing::warn!(%error, "a sandbox was not cleaned up after");
        }
    }

    /// Through the descriptor: the number may be another's by now.
    fn signal(&self, signal: i32) {
        use std::os::fd::AsRawFd;
        let fd = self.pidfd.get_ref().as_raw_fd();
        // SAFETY: pidfd_send_signal on a descriptor that is open; a process that is gone is an error that nobody needs.
        unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, std::ptr::null::<libc::siginfo_t>(), 0);
        }
    }

    /// The end of what the console said, at most so many bytes.
    pub fn console(&self, limit: usize) -> Option<String> {
        let mut file = fs::File::open(self.placement.folder.join(CONSOLE_FILE)).ok()?;
        let start = file.metadata().ok()?.len().saturating_sub(limit as u64);
        file.seek(io::SeekFrom::Start(start)).ok()?;
        let mut text = Vec::new();
        file.take(limit as u64).read_to_end(&mut text).ok()?;
        Some(String::from_utf8_lossy(&text).replace(['\r', '\x1b'], ""))
    }

    /// What the guard says of the end, and the console's last words.
    pub fn last_words(&self) -> String {
        let folder = &self.placement.folder;
        let end =
            fs::read(folder.join(END_FILE)).ok().and_then(|text| serde_json::from_slice::<End>(&text).ok());
        let alive = guard::is_alive(self.placement.guard.pid, self.placement.guard.start_ticks);
        let end = match end {
            Some(end) => end.what,
            None if alive => "its machine still ran".to_owned(),
            None => "its guard was killed".to_owned(),
        };
        match self.console(CONSOLE_TAIL) {
            Some(console) if !console.trim().is_empty() => {
                format!("{end}; its console said: {}", console.trim())
            }
            _ => end,
        }
    }
}

fn open_pidfd(pid: i32) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: pidfd_open takes two numbers and returns a new descriptor, close-on-exec by itself.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, libc::PIDFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the descriptor was just made and has no other owner; the AsyncFd keeps it, unchanged, to its end.
    unsafe { Ok(AsyncFd::register_with_interest(OwnedFd::from_raw_fd(fd), tokio::io::Interest::READABLE)?) }
}

fn set_private(folder: &Path) -> io::Result<()> {
    fs::set_permissions(folder, std::os::unix::fs::PermissionsExt::from_mode(0o700))
}

fn remove(folder: &Path) {
    if let Err(error) = fs::remove_dir_all(folder)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(folder = %folder.display(), %error, "a run folder could not be removed");
    }
}

/// A user that no other live sandbox of this host has, from `first` on: the owners of the run folders say which are taken.
pub(super) fn free_uid(folder: &Path, first: u32) -> Result<u32, StartError> {
    /// How many users the range has.
    const USERS: u32 = 65_536;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let at = |source| StartError::Folder { path: folder.to_owned(), source };
    let runs = folder.parent().unwrap_or(folder);
    let entries = fs::read_dir(runs).map_err(at)?;
    let owner = |entry: fs::DirEntry| {
        fs::metadata(entry.path().join(super::qemu::VM_FOLDER))
            .ok()
            .map(|found| std::os::unix::fs::MetadataExt::uid(&found))
    };
    let taken: Vec<u32> = entries.flatten().filter_map(owner).collect();
    // Round and round, so that a number comes back as late as possible.
    let free = (0..USERS)
        .map(|_| first + NEXT.fetch_add(1, Ordering::Relaxed) % USERS)
        .find(|uid| !taken.contains(uid));
    free.ok_or_else(|| StartError::Missing(format!("all users from {first} on are taken by live sandboxes")))
}
