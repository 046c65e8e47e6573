//! The guest's side of a release: the ledger and the fence in front of it as one value, so that every decision about both is one step.
//!
//! Whoever owns a [`Gate`] keeps it under one lock. `tests/fence.rs` runs it under random thread schedules.

use std::time::Duration;

use crate::admission::{Admission, Entry};
use crate::ledger::{HoldClass, HoldId, Ledger};
use crate::{Moment, Policy};

/// What a call that arrives now does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passage {
    /// It is in, and held from this moment on.
    Admitted(HoldId),
    /// Ask again when the fence changes, at the latest at the given moment.
    Wait(Moment),
    /// The sandbox was released: the answer is "sandbox was not found".
    Gone,
}

#[derive(Debug)]
pub struct Gate {
    pub ledger: Ledger,
    fence: Admission,
}

impl Gate {
    pub fn new(policy: Policy, now: Moment) -> Self {
        Self { ledger: Ledger::new(policy, now), fence: Admission::default() }
    }

    /// The gate of an agent that takes another's place: an open fence that has seen the epochs up to `epoch`.
    pub fn after(ledger: Ledger, epoch: u64) -> Self {
        Self { ledger, fence: Admission::after(epoch) }
    }

    /// The newest epoch that was seen; 0 before the first.
    pub fn last_epoch(&self) -> u64 {
        self.fence.last_epoch()
    }

    /// Whether a release was committed.
    pub fn is_gone(&self) -> bool {
        self.fence.is_gone()
    }

    /// Passes the fence and takes a hold: a prepare between the two would call this sandbox ready.
    pub fn admit(&mut self, class: HoldClass, origin: impl Into<String>, now: Moment) -> Passage {
        match self.fence.enter(now) {
            Entry::Admitted => Passage::Admitted(self.ledger.begin(class, origin, 0, now)),
            Entry::Wait(until) => Passage::Wait(until),
            Entry::Gone => Passage::Gone,
        }
    }

    /// Closes the fence and counts again; true when nothing holds and nothing was used for `idle_for`. Else the fence is open again.
    pub fn prepare(&mut self, epoch: u64, idle_for: Duration, now: Moment) -> bool {
        let closed = self.fence.prepare(epoch, now);
        let ready = closed && self.ledger.counting() == 0 && self.ledger.idle_for(now) >= idle_for;
        if closed && !ready {
            self.fence.abort(epoch);
        }
        ready
    }

    /// False when the fence of this epoch is not closed any more.
    pub fn commit(&mut self, epoch: u64, now: Moment) -> bool {
        self.fence.commit(epoch, now)
    }

    pub fn abort(&mut self, epoch: u64) {
        self.fence.abort(epoch);
    }

    /// The fence's state, for the explain view.
    pub fn state_name(&self) -> &'static str {
        self.fence.name()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Moment {
        Moment::from_millis(millis)
    }

    #[test]
    fn a_busy_guest_is_not_ready_and_leaves_its_door_open() {
        let mut gate = Gate::new(Policy::default(), at(0));
        let Passage::Admitted(_) = gate.admit(HoldClass::Call, "/x", at(1)) else { panic!("not admitted") };
        assert!(!gate.prepare(1, Duration::ZERO, at(2)));
        assert!(matches!(gate.admit(HoldClass::Call, "/y", at(3)), Passage::Admitted(_)));
    }

    #[test]
    fn a_guest_used_a_moment_ago_is_not_ready() {
        let mut gate = Gate::new(Policy::default(), at(0));
        let Passage::Admitted(hold) = gate.admit(HoldClass::Call, "/x", at(1)) else {
            panic!("not admitted")
        };
        gate.ledger.end(hold, at(5_000));
        assert!(!gate.prepare(1, Duration::from_secs(5), at(9_999)));
        assert!(gate.prepare(2, Duration::from_secs(5), at(10_000)));
    }
}
