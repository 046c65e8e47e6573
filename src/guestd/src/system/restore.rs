//! What happens when the machine finds itself in another life: it was restored from a snapshot, perhaps as one of many clones.
//!
//! What is at the other ends of the connections that the snapshot remembers is the past of another machine, so they are cut; the holds of
//! their calls end with them. Commands live on, and clients come back to them. Randomness is renewed, and the maximum lifetime begins again.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::generation::Generations;
use super::{System, entropy};
use crate::doors::Connection;

impl System {
    /// Cuts all connections but the one that brought the news, and renews what a clone must not share.
    pub(super) fn begin_new_life(&self, messenger: Option<&Connection>) {
        let cut = self.connections.cut_all_but(messenger);
        tracing::info!(connections = cut, "restored from a snapshot: what was connected before is cut");
        self.renew_entropy(Vec::new());
        self.guard_lifetime(None);
    }

    pub(super) fn renew_entropy(&self, seed: Vec<u8>) {
        if !self.own_kernel {
            return;
        }
        if let Err(error) = entropy::renew(&seed) {
            tracing::warn!(%error, "the kernel's randomness was not renewed");
        }
    }

    /// Starts the agent's own end of the machine's lifetime, with a new length or the one from before.
    pub(super) fn guard_lifetime(&self, length: Option<Duration>) {
        let known = self.guard.lock().unwrap_or_else(PoisonError::into_inner).length;
        if let Some(length) = length.or(known) {
            self.guard_until(length, Instant::now() + length);
        }
    }

    /// As above, for a lifetime that began before.
    pub(super) fn guard_until(&self, length: Duration, ends: Instant) {
        let mut guard = self.guard.lock().unwrap_or_else(PoisonError::into_inner);
        (guard.length, guard.ends) = (Some(length), Some(ends));
        let power_off = self.power_off;
        let timer = tokio::spawn(async move {
            tokio::time::sleep_until(ends).await;
            tracing::warn!("the maximum lifetime is over and nobody stopped this machine");
            power_off();
        });
        if let Some(earlier) = guard.timer.replace(timer.abort_handle()) {
            earlier.abort();
        }
    }
}

/// Waits for the hypervisor to say that the machine is another one now, where it can.
pub(super) fn watch(system: Arc<System>) {
    tokio::spawn(async move {
        let generations = match Generations::listen() {
            Ok(Some(generations)) => generations,
            Ok(None) => return,
            Err(error) => {
                return tracing::warn!(%error, "a restored snapshot is noticed at the next /init only");
            }
        };
        loop {
            match generations.changed().await {
                Ok(()) => system.begin_new_life(None),
                Err(error) => {
                    return tracing::warn!(%error, "a restored snapshot is noticed at the next /init only");
                }
            }
        }
    });
}
