//! From a pipe to chunks.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::ready;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::AsyncRead;
use tokio_util::io::poll_read_buf;

/// The most that one data event carries (contract: envd.md section 2.6).
pub const CHUNK: usize = 32 * 1024;

/// A read that fills its buffer this far keeps it; a shorter one is copied into memory of its own size.
const WORTH_KEEPING: usize = CHUNK * 3 / 4;

thread_local! {
    /// Where all pipes are read to: a process that is quiet has no buffer.
    static BUFFER: RefCell<BytesMut> = RefCell::default();
}

/// Reads what there is, at most [`CHUNK`] bytes; no bytes at the end of the pipe. Dropped before it is done, it has read nothing.
///
/// # Errors
/// What read(2) says.
pub async fn read_chunk(pipe: &mut (impl AsyncRead + Unpin)) -> io::Result<Bytes> {
    poll_fn(|cx| {
        BUFFER.with_borrow_mut(|buffer| {
            buffer.clear();
            buffer.reserve(CHUNK);
            let count = ready!(poll_read_buf(Pin::new(&mut *pipe), cx, &mut (&mut *buffer).limit(CHUNK)))?;
            let chunk = if count >= WORTH_KEEPING {
                std::mem::take(buffer).freeze()
            } else {
                Bytes::copy_from_slice(&buffer[..count])
            };
            std::task::Poll::Ready(Ok(chunk))
        })
    })
    .await
}
