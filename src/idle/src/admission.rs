//! The guest's fence. While the host prepares a release, counting calls wait at it; none is refused before the host commits.
//!
//! ```text
//!            prepare                commit
//!   Open ──────────────► Closed ──────────────► Gone
//!    ▲                     │
//!    └─── abort, silence ──┘
//! ```

use std::time::Duration;

use crate::Moment;

/// How long the fence stays closed when the host says nothing more (DESIGN.md section 4, rule 4).
pub const SILENCE: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    Closed { epoch: u64, until: Moment },
    Gone,
}

/// What a call that arrives now does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    Admitted,
    /// Ask again when the fence changes, at the latest at the given moment.
    Wait(Moment),
    /// The sandbox was released: the answer is "sandbox was not found".
    Gone,
}

#[derive(Debug)]
pub struct Admission {
    state: State,
    last_epoch: u64,
}

impl Default for Admission {
    fn default() -> Self {
        Self { state: State::Open, last_epoch: 0 }
    }
}

impl Admission {
    /// An open fence that has seen the epochs up to `epoch`.
    pub fn after(epoch: u64) -> Self {
        Self { state: State::Open, last_epoch: epoch }
    }

    /// The newest epoch that was seen; 0 before the first.
    pub fn last_epoch(&self) -> u64 {
        self.last_epoch
    }

    /// Whether a release was committed.
    pub fn is_gone(&self) -> bool {
        self.state == State::Gone
    }

    pub fn enter(&mut self, now: Moment) -> Entry {
        self.expire(now);
        match self.state {
            State::Open => Entry::Admitted,
            State::Closed { until, .. } => Entry::Wait(until),
            State::Gone => Entry::Gone,
        }
    }

    /// Closes the fence for `epoch`. False when a newer epoch was seen (a message that was on its way for long) or the sandbox is gone.
    pub fn prepare(&mut self, epoch: u64, now: Moment) -> bool {
        if self.state == State::Gone || epoch <= self.last_epoch {
            return false;
        }
        self.last_epoch = epoch;
        self.state = State::Closed { epoch, until: now + SILENCE };
        true
    }

    /// False when this epoch's fence is not closed any more: calls may have entered since.
    pub fn commit(&mut self, epoch: u64, now: Moment) -> bool {
        self.expire(now);
        match self.state {
            State::Closed { epoch: closed, .. } if closed == epoch => {
                self.state = State::Gone;
                true
            }
            State::Gone => true,
            State::Open | State::Closed { .. } => false,
        }
    }

    /// Opens the fence that `epoch` closed; another epoch's stays.
    pub fn abort(&mut self, epoch: u64) {
        if matches!(self.state, State::Closed { epoch: closed, .. } if closed == epoch) {
            self.state = State::Open;
        }
    }

    pub fn is_open(&self) -> bool {
        self.state == State::Open
    }

    pub fn name(&self) -> &'static str {
        match self.state {
            State::Open => "open",
            State::Closed { .. } => "closed",
            State::Gone => "gone",
        }
    }

    fn expire(&mut self, now: Moment) {
        if matches!(self.state, State::Closed { until, .. } if now >= until) {
            self.state = State::Open;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Moment {
        Moment::from_millis(millis)
    }

    #[test]
    fn a_silent_host_opens_the_fence_after_two_seconds() {
        let mut fence = Admission::default();
        assert!(fence.prepare(1, at(0)));
        assert_eq!(fence.enter(at(1_999)), Entry::Wait(at(2_000)));
        assert_eq!(fence.enter(at(2_000)), Entry::Admitted);
        assert!(!fence.commit(1, at(2_001)), "a call may have entered in between");
    }

    #[test]
    fn a_late_prepare_does_not_close_a_newer_fence() {
        let mut fence = Admission::default();
        assert!(fence.prepare(5, at(0)));
        fence.abort(5);
        assert!(!fence.prepare(4, at(1)));
        assert!(!fence.prepare(5, at(1)), "a repeated message is not a new epoch");
        assert_eq!(fence.enter(at(1)), Entry::Admitted);
    }

    #[test]
    fn an_abort_of_another_epoch_changes_nothing() {
        let mut fence = Admission::default();
        fence.prepare(2, at(0));
        fence.abort(1);
        assert!(!fence.is_open());
        assert!(fence.commit(2, at(10)));
        assert_eq!(fence.enter(at(99_999)), Entry::Gone);
    }

    #[test]
    fn a_repeated_commit_is_not_an_error() {
        let mut fence = Admission::default();
        fence.prepare(1, at(0));
        assert!(fence.commit(1, at(1)));
        assert!(fence.commit(1, at(2)));
    }
}
