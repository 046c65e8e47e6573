//! The kernel interfaces of this capability that neither std nor nix offers: extended attributes, and reads that do not wait for a disk.
//!
//! All the `unsafe` of the folder is here and in `credentials`, and nothing else is here.

use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use bytes::BytesMut;

/// What carries the attributes: a path, whose last component is followed when it is a link, or an open file.
#[derive(Debug)]
pub(super) enum Carrier<'a> {
    Path(CString),
    File(BorrowedFd<'a>),
}

impl Carrier<'_> {
    /// # Errors
    ///
    /// `InvalidInput` for a path with a NUL byte.
    pub(super) fn path(path: &Path) -> io::Result<Self> {
        Ok(Self::Path(CString::new(path.as_os_str().as_bytes())?))
    }
}

/// The names of all attributes.
///
/// # Errors
///
/// Those of listxattr(2); `ENOTSUP` where the file system has no attributes.
pub(super) fn list(carrier: &Carrier<'_>) -> io::Result<Vec<CString>> {
    let bytes = grow(|buffer| {
        let (data, size) = (buffer.as_mut_ptr().cast(), buffer.len());
        match carrier {
            // SAFETY: the path ends in NUL and `data` is valid for `size` writable bytes; both outlive the call.
            Carrier::Path(path) => unsafe { libc::listxattr(path.as_ptr(), data, size) },
            // SAFETY: the descriptor is open while it is borrowed; `data` is as above.
            Carrier::File(file) => unsafe { libc::flistxattr(file.as_raw_fd(), data, size) },
        }
    })?;
    let names = bytes.split_inclusive(|byte| *byte == 0);
    Ok(names.filter_map(|name| CStr::from_bytes_with_nul(name).ok().map(CStr::to_owned)).collect())
}

/// The value of one attribute.
///
/// # Errors
///
/// Those of getxattr(2); `ENODATA` when the file has no such attribute.
pub(super) fn get(carrier: &Carrier<'_>, name: &CStr) -> io::Result<Vec<u8>> {
    grow(|buffer| {
        let (data, size) = (buffer.as_mut_ptr().cast(), buffer.len());
        match carrier {
            // SAFETY: path and name end in NUL and `data` is valid for `size` writable bytes; all outlive the call.
            Carrier::Path(path) => unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), data, size) },
            // SAFETY: the descriptor is open while it is borrowed; the rest is as above.
            Carrier::File(file) => unsafe { libc::fgetxattr(file.as_raw_fd(), name.as_ptr(), data, size) },
        }
    })
}

/// Sets one attribute of an open file.
///
/// # Errors
///
/// Those of fsetxattr(2).
pub(super) fn set(file: BorrowedFd<'_>, name: &CStr, value: &[u8]) -> io::Result<()> {
    // SAFETY: the descriptor is open while it is borrowed, the name ends in NUL, and `value` is valid for its length.
    let result =
        unsafe { libc::fsetxattr(file.as_raw_fd(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Removes one attribute of an open file.
///
/// # Errors
///
/// Those of fremovexattr(2).
pub(super) fn remove(file: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    // SAFETY: the descriptor is open while it is borrowed and the name ends in NUL.
    let result = unsafe { libc::fremovexattr(file.as_raw_fd(), name.as_ptr()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// An attribute name without its NUL, for looking at its prefix.
pub(super) fn text(name: &CStr) -> &OsStr {
    OsStr::from_bytes(name.to_bytes())
}

/// Calls `read` with a buffer that is large enough for nearly every file, and then with larger ones: attributes may grow
/// between a call that asks for the size and one that reads.
fn grow(mut read: impl FnMut(&mut [u8]) -> isize) -> io::Result<Vec<u8>> {
    /// What the kernel limits a list of names and a value to.
    const MOST: usize = 64 * 1024;
    let mut buffer = vec![0; 1024];
    loop {
        match usize::try_from(read(&mut buffer)) {
            Ok(length) => {
                buffer.truncate(length);
                return Ok(buffer);
            }
            Err(_negative) => {
                let error = io::Error::last_os_error();
                if error.raw_os_error() != Some(libc::ERANGE) || buffer.len() >= MOST {
                    return Err(error);
                }
                buffer.resize(buffer.len() * 8, 0);
            }
        }
    }
}

/// Appends to `buffer` what of a file is in the page cache, at most `length` bytes and no more than fit in without growing it.
///
/// # Errors
///
/// Those of preadv2(2) with `RWF_NOWAIT`: `EAGAIN` when it would have to wait (the kernel has begun to read by then), `EOPNOTSUPP` where the
/// file system cannot tell.
pub(super) fn read_cached(file: &File, from: u64, length: usize, buffer: &mut BytesMut) -> io::Result<()> {
    let offset = libc::off_t::try_from(from).map_err(io::Error::other)?;
    let room = buffer.spare_capacity_mut();
    let into = libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len().min(length) };
    // SAFETY: the descriptor is open while it is borrowed, and `into` names writable bytes of the buffer, which is not touched meanwhile.
    let count = unsafe { libc::preadv2(file.as_raw_fd(), &raw const into, 1, offset, libc::RWF_NOWAIT) };
    let count = usize::try_from(count).map_err(|_negative| io::Error::last_os_error())?;
    // SAFETY: the kernel has written the first `count` of them.
    unsafe { buffer.set_len(buffer.len() + count) };
    Ok(())
}
