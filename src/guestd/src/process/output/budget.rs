//! The memory that the logs of all processes share.
//!
//! Below the limit every log keeps what its own limit allows. At the limit, each log has a right to an equal share: who writes first
//! takes from those that have more than it. So one process that floods does not take the history of the quiet ones.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::Shared;

#[derive(Debug, Default)]
struct Register {
    /// Those that hold something.
    logs: BTreeMap<u64, Weak<Shared>>,
    next: u64,
    /// The last one that was asked to give.
    hand: u64,
}

/// Shared by all processes of an agent.
#[derive(Debug)]
pub struct Budget {
    limit: usize,
    used: AtomicUsize,
    register: Mutex<Register>,
}

impl Budget {
    /// A budget of `limit` bytes.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, used: AtomicUsize::new(0), register: Mutex::default() })
    }

    /// True when `cost` more would be too much.
    pub(super) fn is_over(&self, cost: usize) -> bool {
        self.used() + cost > self.limit
    }

    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    pub(super) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// A log that held `before` bytes holds `after` now.
    pub(super) fn account(&self, before: usize, after: usize) {
        if after >= before {
            self.used.fetch_add(after - before, Ordering::Relaxed);
        } else {
            self.used.fetch_sub(before - after, Ordering::Relaxed);
        }
    }

    /// A number for a log to be entered under.
    pub(super) fn number(&self) -> u64 {
        let mut register = self.lock();
        register.next += 1;
        register.next
    }

    /// A log begins to hold something.
    pub(super) fn enter(&self, number: u64, log: Weak<Shared>) {
        self.lock().logs.insert(number, log);
    }

    /// A log holds nothing any more.
    pub(super) fn leave(&self, number: u64) {
        self.lock().logs.remove(&number);
    }

    /// Makes room for `cost` bytes as far as others have more than their share that nobody needs. No log may be locked.
    pub(super) fn make_room(&self, cost: usize) {
        if !self.is_over(cost) {
            return;
        }
        let count = self.lock().logs.len().max(1);
        let share = self.limit / count;
        for _ in 0..count {
            let Some(log) = self.next_log() else { return };
            log.shrink(share);
            if !self.is_over(cost) {
                return;
            }
        }
    }

    fn next_log(&self) -> Option<Arc<Shared>> {
        let mut register = self.lock();
        let after = (Bound::Excluded(register.hand), Bound::Unbounded);
        let (number, log) = register.logs.range(after).chain(register.logs.iter()).next()?;
        let (number, log) = (*number, log.upgrade());
        register.hand = number;
        log
    }

    fn lock(&self) -> MutexGuard<'_, Register> {
        self.register.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
