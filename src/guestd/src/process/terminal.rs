//! Terminals: a pseudo-terminal pair, whose slave is a command's controlling terminal and whose master is read and written here.
//!
//! `portable-pty` opens and resizes; starting the command stays `spawn`'s, which knows users, groups and descriptors. A terminal that
//! was opened by the program which this process was before is taken over by its master alone.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

use bytes::{BufMut, BytesMut};
use portable_pty::{MasterPty, PtySize, PtySystem, unix::UnixPtySystem};
use tokio::io::unix::AsyncFd;

/// The size of a terminal whose client names none.
const DEFAULT_SIZE: Size = Size { columns: 80, rows: 24 };

/// A terminal's size in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Size {
    pub columns: u16,
    pub rows: u16,
}

impl Size {
    /// Numbers of more than 16 bits are cut to them, as envd does; what then is 0 means "not said" and is `otherwise`'s (contract:
    /// envd.md section 2.5).
    pub fn from_wire(columns: u32, rows: u32, otherwise: Option<Self>) -> Self {
        let otherwise = otherwise.unwrap_or(DEFAULT_SIZE);
        let cut = |number: u32, otherwise: u16| match (number & 0xffff) as u16 {
            0 => otherwise,
            number => number,
        };
        Self { columns: cut(columns, otherwise.columns), rows: cut(rows, otherwise.rows) }
    }
}

impl From<Size> for PtySize {
    fn from(size: Size) -> Self {
        Self { rows: size.rows, cols: size.columns, ..Self::default() }
    }
}

/// The master's side of one terminal.
#[derive(Debug)]
pub struct Terminal {
    // Before its owner: it leaves the reactor before the descriptor is closed.
    io: AsyncFd<RawFd>,
    master: Master,
}

enum Master {
    Opened(Mutex<Box<dyn MasterPty + Send>>),
    Adopted(#[expect(dead_code, reason = "owns the descriptor")] OwnedFd),
}

impl std::fmt::Debug for Master {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Opened(_) => "Opened",
            Self::Adopted(_) => "Adopted",
        })
    }
}

impl Terminal {
    /// Opens a terminal. The second value is its slave, for the command.
    ///
    /// # Errors
    /// The system's: no terminals left (ENOSPC), no descriptors left, no devpts.
    pub(super) fn open(size: Size) -> io::Result<(Self, OwnedFd)> {
        let pair = UnixPtySystem::default().openpty(size.into()).map_err(|error| {
            // The crate makes a text of the error; the number is still the thread's.
            match io::Error::last_os_error() {
                system if system.raw_os_error().is_some_and(|number| number != 0) => system,
                _ => io::Error::other(error.to_string()),
            }
        })?;
        let Some(fd) = pair.master.as_raw_fd() else {
            return Err(io::Error::other("the terminal has no descriptor"));
        };
        // The crate keeps the slave's descriptor to itself.
        let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
        // SAFETY: TIOCGPTPEER takes flags and returns a new descriptor; ioctl_tty(2).
        let slave = unsafe { libc::ioctl(fd, libc::TIOCGPTPEER, flags) };
        if slave < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, and nobody else's.
        let slave = unsafe { OwnedFd::from_raw_fd(slave) };
        Ok((Self::new(fd, Master::Opened(Mutex::new(pair.master)))?, slave))
    }

    /// Takes over the master of a terminal that is open already.
    ///
    /// # Errors
    /// When the descriptor cannot be waited for.
    pub fn adopt(master: OwnedFd) -> io::Result<Self> {
        let fd = master.as_raw_fd();
        Self::new(fd, Master::Adopted(master))
    }

    fn new(fd: RawFd, master: Master) -> io::Result<Self> {
        set_nonblocking(fd)?;
        // SAFETY: `master` owns the descriptor, is never replaced, and is dropped after `io`.
        Ok(Self { io: unsafe { AsyncFd::register(fd) }?, master })
    }

    /// The next bytes of output, at most `limit`; 0 when nothing has the terminal open any more.
    ///
    /// # Errors
    /// Any but EIO, with which the kernel says the same as with 0.
    pub async fn read(&self, buffer: &mut BytesMut, limit: usize) -> io::Result<usize> {
        loop {
            let mut ready = self.io.readable().await?;
            // Only now: a terminal that is quiet has no buffer.
            buffer.reserve(limit);
            let room = buffer.chunk_mut();
            let length = room.len().min(limit);
            let target = room.as_mut_ptr();
            // SAFETY: `target` is valid for `length` bytes.
            let read = ready.try_io(|fd| result(unsafe { libc::read(*fd.get_ref(), target.cast(), length) }));
            match read {
                Ok(Ok(count)) => {
                    // SAFETY: the kernel wrote that many.
                    unsafe { buffer.advance_mut(count) };
                    return Ok(count);
                }
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => return Ok(0),
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => {}
            }
        }
    }

    /// Types some of `bytes`; returns how many the terminal took.
    ///
    /// # Errors
    /// EIO when nothing has the terminal open any more.
    pub async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.io.writable().await?;
            let wrote = ready.try_io(|fd| {
                // SAFETY: `bytes` is valid for its length.
                result(unsafe { libc::write(*fd.get_ref(), bytes.as_ptr().cast(), bytes.len()) })
            });
            match wrote {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(done) => return done,
                Err(_would_block) => {}
            }
        }
    }

    /// Tells the terminal its new size; the foreground job gets SIGWINCH.
    ///
    /// # Errors
    /// The system's.
    pub fn resize(&self, size: Size) -> io::Result<()> {
        match &self.master {
            Master::Opened(master) => master
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .resize(size.into())
                .map_err(|error| io::Error::other(error.to_string())),
            Master::Adopted(_) => {
                let size =
                    libc::winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
                // SAFETY: TIOCSWINSZ reads one winsize.
                let done = unsafe { libc::ioctl(self.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
                if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
            }
        }
    }

    pub fn size(&self) -> Option<Size> {
        // SAFETY: a plain structure of integers, and TIOCGWINSZ fills one in.
        let mut size: libc::winsize = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        let done = unsafe { libc::ioctl(self.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
        (done == 0).then_some(Size { columns: size.ws_col, rows: size.ws_row })
    }

    /// The process group that has the keyboard.
    pub fn foreground(&self) -> Option<i32> {
        // SAFETY: tcgetpgrp takes a descriptor and returns a number.
        let group = unsafe { libc::tcgetpgrp(self.as_raw_fd()) };
        // 1 would be everybody, for kill(2).
        (group > 1).then_some(group)
    }
}

impl AsRawFd for Terminal {
    fn as_raw_fd(&self) -> RawFd {
        *self.io.get_ref()
    }
}

/// `portable-pty` can start programs too, and looks up their shell with this; nobody asks it to, but the linker does not know that. The
/// C library's own would bring its whole name service into the binary, which must never be called (see [`crate::identity`]).
#[unsafe(no_mangle)]
extern "C" fn getpwuid(_uid: libc::uid_t) -> *mut libc::passwd {
    std::ptr::null_mut()
}

/// Makes the slave the user's, as login(1) does: a program may open it again by its name.
pub(super) fn give_to(slave: BorrowedFd<'_>, uid: libc::uid_t) {
    // SAFETY: fchown takes a descriptor and two numbers; -1 leaves the group as devpts has it.
    if unsafe { libc::fchown(slave.as_raw_fd(), uid, libc::gid_t::MAX) } < 0 {
        tracing::debug!(error = %io::Error::last_os_error(), uid, "a terminal keeps its owner");
    }
}

fn set_nonblocking(fd: RawFd) -> io::Result<()> {
    // SAFETY: two fcntl calls with integers.
    let done = unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        if flags < 0 { flags } else { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) }
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn result(count: isize) -> io::Result<usize> {
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};

    #[test]
    fn a_size_is_cut_to_sixteen_bits_and_zero_means_unsaid() {
        let size = |columns, rows| Size::from_wire(columns, rows, None);
        assert_eq!(size(100, 40), Size { columns: 100, rows: 40 });
        assert_eq!(size(65_536 + 100, 0), Size { columns: 100, rows: 24 });
        assert_eq!(size(65_536, u32::MAX), Size { columns: 80, rows: 65_535 });
        let before = Size { columns: 132, rows: 50 };
        assert_eq!(Size::from_wire(0, 10, Some(before)), Size { columns: 132, rows: 10 });
    }

    #[tokio::test]
    async fn what_was_written_before_the_slave_closed_is_read_before_the_end() {
        let (terminal, slave) = Terminal::open(DEFAULT_SIZE).unwrap();
        File::from(slave).write_all(b"early").unwrap();
        let mut buffer = BytesMut::new();
        assert_eq!(terminal.read(&mut buffer, 3).await.unwrap(), 3);
        assert_eq!(terminal.read(&mut buffer, 16).await.unwrap(), 2);
        assert_eq!(&buffer[..], b"early");
        assert_eq!(terminal.read(&mut buffer, 16).await.unwrap(), 0, "EIO is the end");
    }

    #[tokio::test]
    async fn an_adopted_terminal_is_typed_into_and_resized() {
        let (opened, slave) = Terminal::open(DEFAULT_SIZE).unwrap();
        // SAFETY: the descriptor is open; what comes back is new.
        let copy = unsafe { OwnedFd::from_raw_fd(libc::fcntl(opened.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 3)) };
        drop(opened);
        let adopted = Terminal::adopt(copy).unwrap();
        adopted.resize(Size { columns: 120, rows: 33 }).unwrap();
        assert_eq!(adopted.size(), Some(Size { columns: 120, rows: 33 }));
        assert_eq!(adopted.write(b"line\n").await.unwrap(), 5);
        let mut line = [0; 16];
        assert_eq!(File::from(slave).read(&mut line).unwrap(), 5);
        assert_eq!(&line[..5], b"line\n");
    }
}
