//! Gives memory back that the agent does not need any more.
//!
//! The C library keeps what was freed: after 10,000 commands or a crowd of streams the agent would stay tens of megabytes large for the
//! rest of its life, and each fork would copy the page tables of that (malloc(3), malloc_trim(3)).

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
}

#[cfg(test)]
mod tests {
    use guestd_idle::{HoldClass, Policy};

    use super::*;

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
