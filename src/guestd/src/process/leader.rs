//! The process that a command or a terminal begins with, as something to wait for.
//!
//! A number and, where the kernel has them, a pidfd: plain data, so that a process which this program did not start itself (its image
//! was replaced under the same pid, and the children stayed) is waited for in the same way, with the same exact result.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use libc::c_int;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::output::Status;

/// What the kernel says of a process that ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Ended {
    pub status: Status,
    pub usage: Usage,
}

/// Of the process and of the children that it waited for; getrusage(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Usage {
    pub user: Duration,
    pub system: Duration,
    /// The largest resident set of any one of them, in bytes; 0 when it is not known. A child begins as a copy of this program, and the
    /// kernel counts that as its own: up to what this program once had, the number says nothing of the child.
    pub peak_memory: u64,
}

/// A child of this process that nobody else waits for.
#[derive(Debug)]
pub struct Leader {
    pid: i32,
    news: News,
}

/// What tells that it is worth asking.
#[derive(Debug)]
enum News {
    Pidfd(AsyncFd<OwnedFd>),
    /// Where the kernel has no pidfds: every end of any child.
    AnyChild(Signal),
}

impl Leader {
    /// Takes over a child of this process, started by it or by the program that it was before.
    ///
    /// # Errors
    /// When `pid` is no process, or the kernel has no descriptor to spare.
    pub fn adopt(pid: u32) -> io::Result<Self> {
        let pid = i32::try_from(pid).map_err(|_| io::Error::from_raw_os_error(libc::ESRCH))?;
        // SAFETY: a plain system call; a pidfd is close-on-exec.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if fd >= 0 {
            // SAFETY: just made, and nobody else's.
            return Self::new(pid, Some(unsafe { OwnedFd::from_raw_fd(fd as RawFd) }));
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::ENOSYS | libc::EPERM) => Self::new(pid, None),
            _ => Err(error),
        }
    }

    pub(super) fn new(pid: i32, pidfd: Option<OwnedFd>) -> io::Result<Self> {
        let news = match pidfd {
            // SAFETY: an OwnedFd is the same open descriptor for as long as it lives.
            Some(fd) => News::Pidfd(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?),
            None => News::AnyChild(signal(SignalKind::child())?),
        };
        Ok(Self { pid, news })
    }

    /// Waits for its end and reaps it. Dropping the future loses nothing.
    ///
    /// # Errors
    /// When it is no child of this process, or was reaped already.
    pub async fn wait(&mut self) -> io::Result<Ended> {
        loop {
            self.ended().await?;
            if let Some(ended) = reap(self.pid, libc::WNOHANG)? {
                return Ok(ended);
            }
        }
    }

    /// Waits for its end and does not reap it: until that is done, its number and that of the group it leads are nobody else's. Dropping the
    /// future loses nothing.
    ///
    /// # Errors
    /// As [`Leader::wait`].
    pub async fn ended(&mut self) -> io::Result<()> {
        loop {
            if has_ended(self.pid)? {
                return Ok(());
            }
            match &mut self.news {
                // Not cleared before the next look: a pidfd that became readable stays so.
                News::Pidfd(fd) => {
                    let mut ready = fd.readable().await?;
                    if has_ended(self.pid)? {
                        return Ok(());
                    }
                    ready.clear_ready();
                }
                News::AnyChild(signal) => {
                    signal.recv().await;
                }
            }
        }
    }

    /// The descriptor that is worth handing on, if there is one.
    pub fn pidfd(&self) -> Option<RawFd> {
        match &self.news {
            News::Pidfd(fd) => Some(fd.as_raw_fd()),
            News::AnyChild(_) => None,
        }
    }
}

/// waitid(2), which leaves the child to be reaped.
fn has_ended(pid: i32) -> io::Result<bool> {
    // SAFETY: a plain structure of integers.
    let mut info: libc::siginfo_t = unsafe { mem::zeroed() };
    let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    loop {
        // SAFETY: the pointer is to a value of ours that outlives the call.
        if unsafe { libc::waitid(libc::P_PID, pid.cast_unsigned(), &raw mut info, options) } == 0 {
            // SAFETY: waitid fills in the fields of SIGCHLD, or leaves them zero while nothing has ended.
            return Ok(unsafe { info.si_pid() } == pid);
        }
        match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => {}
            error => return Err(error),
        }
    }
}

/// wait4(2). None with WNOHANG while it runs.
pub(super) fn reap(pid: i32, options: c_int) -> io::Result<Option<Ended>> {
    let mut status: c_int = 0;
    // SAFETY: a plain structure of integers.
    let mut usage: libc::rusage = unsafe { mem::zeroed() };
    loop {
        // SAFETY: both pointers are to values of ours that outlive the call.
        match unsafe { libc::wait4(pid, &raw mut status, options, &raw mut usage) } {
            0 => return Ok(None),
            1.. => return Ok(Some(Ended { status: status_of(status), usage: usage_of(&usage) })),
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}

fn status_of(status: c_int) -> Status {
    if libc::WIFEXITED(status) {
        Status::Exited(libc::WEXITSTATUS(status))
    } else {
        Status::Signalled { signal: libc::WTERMSIG(status), core_dumped: libc::WCOREDUMP(status) }
    }
}

fn usage_of(usage: &libc::rusage) -> Usage {
    let peak = u64::try_from(usage.ru_maxrss).unwrap_or(0) * 1024;
    Usage {
        user: duration(usage.ru_utime),
        system: duration(usage.ru_stime),
        peak_memory: if peak > own_peak(peak) { peak } else { 0 },
    }
}

/// The most memory that this program had, in bytes, or some less if that is as much as `asked` already.
///
/// Not getrusage(2) of itself, which counts what the process was before its exec as well.
fn own_peak(asked: u64) -> u64 {
    static KNOWN: AtomicU64 = AtomicU64::new(0);
    // It only grows: most commands are answered without a look.
    let known = KNOWN.load(Ordering::Relaxed);
    if known >= asked {
        return known;
    }
    // proc_pid_status(5)
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    let peak = kib.map_or(u64::MAX, |kib| kib.saturating_mul(1024));
    KNOWN.store(peak, Ordering::Relaxed);
    peak
}

fn duration(time: libc::timeval) -> Duration {
    Duration::from_secs(u64::try_from(time.tv_sec).unwrap_or(0))
        + Duration::from_micros(u64::try_from(time.tv_usec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A child that this module knows nothing of: it has a number, as after the program was replaced.
    fn stranger(script: &str) -> u32 {
        use std::process::{Command, Stdio};
        Command::new("/bin/sh").args(["-c", script]).stdin(Stdio::null()).spawn().unwrap().id()
    }

    #[tokio::test]
    async fn an_adopted_child_ends_with_its_own_code_and_signal() {
        for (script, status) in [
            ("exit 7", Status::Exited(7)),
            ("sleep 0.1; exit 130", Status::Exited(130)),
            ("kill -KILL $$", Status::Signalled { signal: libc::SIGKILL, core_dumped: false }),
            ("sleep 0.1; kill -TERM $$", Status::Signalled { signal: libc::SIGTERM, core_dumped: false }),
        ] {
            let mut leader = Leader::adopt(stranger(script)).unwrap();
            let ended = tokio::time::timeout(Duration::from_secs(10), leader.wait()).await.unwrap().unwrap();
            assert_eq!(ended.status, status, "{script}");
        }
    }

    #[tokio::test]
    async fn the_memory_of_the_agent_is_not_told_as_a_childs() {
        let mut own = vec![1_u8; 64 << 20];
        std::hint::black_box(&mut own);
        let small = Leader::adopt(stranger("exit 0")).unwrap().wait().await.unwrap();
        assert_eq!(small.usage.peak_memory, 0);
        let hungry = "head -c 300000000 /dev/zero | tail -c 300000000 | wc -c > /dev/null";
        let large = Leader::adopt(stranger(hungry)).unwrap().wait().await.unwrap();
        assert!(large.usage.peak_memory > 300_000_000, "{:?}", large.usage);
    }

    #[tokio::test]
    async fn a_child_that_ended_keeps_its_number_until_it_is_reaped() {
        let pid = stranger("exit 3");
        let mut leader = Leader::adopt(pid).unwrap();
        for _ in 0..2 {
            tokio::time::timeout(Duration::from_secs(10), leader.ended()).await.unwrap().unwrap();
            assert!(std::path::Path::new(&format!("/proc/{pid}")).exists());
        }
        assert_eq!(leader.wait().await.unwrap().status, Status::Exited(3));
        assert_eq!(leader.ended().await.unwrap_err().raw_os_error(), Some(libc::ECHILD));
    }

    #[tokio::test]
    async fn without_pidfds_an_end_is_still_learnt() {
        let pid = stranger("sleep 0.1; exit 3");
        let mut leader = Leader::new(pid.cast_signed(), None).unwrap();
        let ended = tokio::time::timeout(Duration::from_secs(10), leader.wait()).await.unwrap().unwrap();
        assert_eq!(ended.status, Status::Exited(3));
    }

    #[tokio::test]
    async fn somebody_elses_process_cannot_be_adopted_for_ever() {
        let mut leader = Leader::adopt(std::process::id()).unwrap();
        assert_eq!(leader.wait().await.unwrap_err().raw_os_error(), Some(libc::ECHILD));
    }
}
