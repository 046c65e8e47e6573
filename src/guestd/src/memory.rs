//! Gives memory back that the agent does not need any more.
//!
//! The C library keeps what was freed: after 10,000 commands or a crowd of streams the agent would stay tens of megabytes large for the
//! rest of its life, and each fork would copy the page tables of that (malloc(3), malloc_trim(3)).
//!
//! So would the program itself: a page that ran once stays mapped, with fifteen around it, though starting, a kernel's first cell or an
//! upload may not come again for an hour. Four fifths of what an idle agent took were such pages.

use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::activity::Activity;
use crate::logs::Logs;

/// How long nothing begins or ends before memory is given back: longer than the end of a process is kept (30 s, contract: envd.md section
/// 2.8), so that it goes, too.
const REST: Duration = Duration::from_secs(31);

/// The heap of the agent's one thread and one for all blocking threads. By default each of those gets its own (mallopt(3)), and keeps what
/// the largest file operation left in it.
const HEAPS: libc::c_int = 2;

/// Bounds the number of heaps. To be called before there is a second thread.
pub fn limit_heaps() {
    // SAFETY: sets a number that the C library reads when a thread allocates for the first time.
    let accepted = unsafe { libc::mallopt(libc::M_ARENA_MAX, HEAPS) };
    debug_assert_eq!(accepted, 1);
}

/// Gives memory back each time that the agent comes to rest, for ever. An agent that rests has no timer.
pub async fn give_back_at_rest(activity: Arc<Activity>, logs: Arc<Logs>) {
    let mut changes = activity.changes();
    while changes.changed().await.is_ok() {
        // Not moved by each change: one timer for all commands of a while. It finds out how long the rest lasts already.
        let mut wake = Instant::now() + REST;
        loop {
            tokio::time::sleep_until(wake).await;
            wake = activity.changed() + REST;
            if wake <= Instant::now() {
                break;
            }
        }
        changes.mark_unchanged();
        logs.move_together();
        give_back();
    }
}

fn give_back() {
    // SAFETY: gives whole free pages to the kernel, under the locks of the heaps.
    unsafe { libc::malloc_trim(0) };
    unmap_program();
}

/// Unmaps the program's code and constants. They stay in the page cache, where the kernel reclaims them before mapped pages; what runs
/// again is mapped again, without a read as long as it is there (madvise(2), MADV_DONTNEED on a private mapping of a file).
pub fn unmap_program() {
    // SAFETY: the callback keeps nothing of what it is given.
    unsafe { libc::dl_iterate_phdr(Some(unmap_segments), std::ptr::null_mut()) };
}

/// Of a static program this is called once, for itself (dl_iterate_phdr(3)).
unsafe extern "C" fn unmap_segments(
    object: *mut libc::dl_phdr_info,
    _size: libc::size_t,
    _data: *mut c_void,
) -> c_int {
    // SAFETY: valid for the time of this call, and so is the table that it points to (dl_iterate_phdr(3)).
    let (base, segments) = unsafe {
        let object = &*object;
        (object.dlpi_addr, std::slice::from_raw_parts(object.dlpi_phdr, object.dlpi_phnum.into()))
    };
    // SAFETY: asks for a number (sysconf(3)).
    let page = match u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }) {
        Ok(page) if page.is_power_of_two() => page,
        _ => return 1,
    };
    // What may be written holds what was written, relocations included; the rest is as it is in the file.
    for segment in segments.iter().filter(|it| it.p_type == libc::PT_LOAD && it.p_flags & libc::PF_W == 0) {
        let start = (base + segment.p_vaddr) & !(page - 1);
        let end = (base + segment.p_vaddr + segment.p_memsz).next_multiple_of(page);
        // SAFETY: a page has the rights of one segment, so these are whole pages of the file that nobody can have changed; the next use of
        // one, the return from this call included, reads it from there.
        unsafe { libc::madvise(start as *mut c_void, (end - start) as usize, libc::MADV_DONTNEED) };
    }
    1
}

#[cfg(test)]
mod tests {
    use guestd_idle::{HoldClass, Policy};

    use super::*;

    /// How much of files is mapped and present, in pages (proc_pid_statm(5)).
    fn mapped_pages() -> u64 {
        let sizes = std::fs::read_to_string("/proc/self/statm").unwrap();
        sizes.split(' ').nth(2).unwrap().parse().unwrap()
    }

    #[test]
    fn a_program_that_rests_is_not_kept_in_memory_and_goes_on() {
        let constants = include_bytes!("memory.rs");
        let sum = || constants.iter().map(|byte| u64::from(*byte)).sum::<u64>();
        let (before, expected) = (mapped_pages(), sum());
        unmap_program();
        let after = mapped_pages();
        assert!(after < before / 2, "{before} pages before, {after} after");
        assert_eq!(sum(), expected);
    }

    #[tokio::test(start_paused = true)]
    async fn rest_begins_with_the_last_change_and_not_with_the_first() {
        let activity = Activity::new(Policy::default());
        let resting = tokio::spawn(give_back_at_rest(Arc::clone(&activity), Logs::new()));
        let hold = activity.hold(HoldClass::Command, "sleep");
        tokio::time::sleep(REST / 2).await;
        drop(hold);
        assert_eq!(activity.changed().elapsed(), Duration::ZERO);
        tokio::time::sleep(REST * 3).await;
        assert_eq!(activity.changed().elapsed(), REST * 3);
        assert!(!resting.is_finished());
        resting.abort();
    }
}
