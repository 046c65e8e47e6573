//! Fresh randomness after a snapshot was restored: two clones of one snapshot hold the same pool and would draw the same numbers.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;

/// The most that an `/init` may bring, in bytes.
pub(super) const SEED_LIMIT: usize = 512;

const HEADER: usize = 2 * size_of::<libc::c_int>();

nix::ioctl_write_ptr_bad!(add_entropy, nix::request_code_write!(b'R', 0x03, HEADER), libc::c_int);
nix::ioctl_none!(reseed, b'R', 0x07);

/// Adds `seed` to the kernel's pool, if there is one, and has the generator start from it at once (random(4): RNDADDENTROPY,
/// RNDRESEEDCRNG).
///
/// # Errors
/// What the kernel said; without the right to, nothing changes.
pub(super) fn renew(seed: &[u8]) -> io::Result<()> {
    let device = OpenOptions::new().write(true).open("/dev/urandom")?;
    if !seed.is_empty() {
        let pool = pool_info(&seed[..seed.len().min(SEED_LIMIT)]);
        // SAFETY: `pool` is a `rand_pool_info` with as many bytes behind its header as it says, and lives through the call.
        unsafe { add_entropy(device.as_raw_fd(), pool.as_ptr()) }?;
    }
    // SAFETY: the descriptor is open; the call has no argument.
    unsafe { reseed(device.as_raw_fd()) }?;
    Ok(())
}

/// `struct rand_pool_info`: bits of entropy, bytes that follow, the bytes, in whole words.
fn pool_info(seed: &[u8]) -> Vec<libc::c_int> {
    let length = libc::c_int::try_from(seed.len()).unwrap_or_default();
    let words = seed.chunks(4).map(|chunk| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        libc::c_int::from_ne_bytes(word)
    });
    [length * 8, length].into_iter().chain(words).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pool_never_says_more_than_it_holds() {
        for length in [0, 1, 4, 5, SEED_LIMIT] {
            let pool = pool_info(&vec![7; length]);
            assert_eq!(pool[0], pool[1] * 8);
            assert_eq!(pool[1], i32::try_from(length).unwrap());
            assert!((pool.len() - 2) * 4 >= length);
        }
    }
}
