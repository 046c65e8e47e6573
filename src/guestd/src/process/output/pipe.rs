//! From a pipe to chunks.
//!
//! A pipe is read in large pieces: between two processors, what counts is how often one wakes the other. Measured with 2 GiB from dd to a
//! loopback socket, reads and pipes of 256 KiB cost the agent 0.6 of the time of 32 KiB and 64 KiB.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::task::{Poll, ready};

use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::AsyncRead;
use tokio_util::io::poll_read_buf;

/// The most that is read at once where there is memory for it.
pub(in crate::process) const LARGE: usize = 256 * 1024;

/// The most that is read at once where there is not.
pub(in crate::process) const SMALL: usize = 32 * 1024;

/// What a pipe holds unless it is told otherwise; pipe(7).
const PIPE: usize = 64 * 1024;

/// A read that fills its buffer this far keeps it; a shorter one is copied into memory of its own size.
const WORTH_KEEPING: usize = LARGE * 3 / 4;

thread_local! {
    /// Where all pipes are read to: a process that is quiet has no buffer.
    static BUFFER: RefCell<BytesMut> = RefCell::default();
}

/// Reads what there is, at most `limit` bytes; no bytes at the end of the pipe. Dropped before it is done, it has read nothing.
///
/// # Errors
/// What read(2) says.
pub(in crate::process) async fn read_chunk(
    pipe: &mut (impl AsyncRead + Unpin),
    limit: usize,
) -> io::Result<Bytes> {
    poll_fn(|cx| {
        BUFFER.with_borrow_mut(|buffer| {
            buffer.clear();
            buffer.reserve(LARGE);
            let count = ready!(poll_read_buf(Pin::new(&mut *pipe), cx, &mut (&mut *buffer).limit(limit)))?;
            Poll::Ready(Ok(if count >= WORTH_KEEPING {
                std::mem::take(buffer).freeze()
            } else {
                Bytes::copy_from_slice(&buffer[..count])
            }))
        })
    })
    .await
}

/// Lets a pipe that was found full hold more. Best effort: without privilege there is a limit for each user.
pub(in crate::process) fn widen(pipe: &impl AsRawFd, found: usize) {
    if (PIPE..LARGE).contains(&found) {
        // SAFETY: an fcntl on a descriptor that the caller holds; no memory is involved.
        let _refused = unsafe { libc::fcntl(pipe.as_raw_fd(), libc::F_SETPIPE_SZ, LARGE as libc::c_int) };
    }
}
