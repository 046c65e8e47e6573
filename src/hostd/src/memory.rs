//! Gives memory back that hostd does not need any more.
//!
//! A crowd of creates, or of ends, needs more for a moment than the sandboxes need that are left. The C library keeps what was freed, in
//! pieces between what is still in use (malloc(3), malloc_trim(3)): 5 to 10 KiB a sandbox after a thousand creates at once.

use std::sync::Arc;
use std::time::Duration;

use crate::lifetime::Sandboxes;

/// From a sandbox's coming or going until memory is given back, for all that come and go meanwhile.
const REST: Duration = Duration::from_secs(10);

/// Gives memory back after sandboxes came or went, for ever. Where none does, there is no timer.
pub async fn give_back_at_rest(sandboxes: Arc<Sandboxes>) {
    loop {
        sandboxes.came_or_went.notified().await;
        tokio::time::sleep(REST).await;
        let trimmed = tokio::task::spawn_blocking(|| {
            // SAFETY: gives whole free pages to the kernel, under the locks of the heaps.
            unsafe { libc::malloc_trim(0) }
        });
        if trimmed.await.is_err() {
            return;
        }
    }
}
