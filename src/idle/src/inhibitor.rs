//! Inhibitors: use that is declared from inside the guest, each with a time limit, all within one budget that the host sets.
//!
//! The budget is spent by the clock while at least one inhibitor lives; when it is gone the live ones end and new ones are refused.
//! A guest that breaks these rules gains nothing that it could not have by running any call: the hard end stays.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Moment;

/// The most inhibitors that may live at once.
pub const INHIBITOR_LIMIT: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct InhibitorId(u64);

impl InhibitorId {
    pub const fn new(id: u64) -> Self {
        Self(id)
    }

    pub const fn get(self) -> u64 {
        self.0
    }
}

/// Why an inhibitor was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InhibitorError {
    #[error("ttl must be at least one second")]
    NoTime,
    #[error("the budget of {} s for inhibitors is spent", .budget.as_secs())]
    Spent { budget: Duration },
    #[error("{INHIBITOR_LIMIT} inhibitors are alive already, the most that may be")]
    TooMany,
}

/// The live inhibitors of one sandbox and what is left of their budget.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Inhibitors {
    budget: Duration,
    /// Before `since`.
    spent: Duration,
    /// Since when at least one lives.
    since: Option<Moment>,
    expiries: BTreeMap<InhibitorId, Moment>,
    next_id: u64,
}

impl Inhibitors {
    pub fn new(budget: Duration) -> Self {
        Self { budget, spent: Duration::ZERO, since: None, expiries: BTreeMap::new(), next_id: 1 }
    }

    /// The host sets another budget; what was spent stays spent.
    pub fn set_budget(&mut self, budget: Duration) {
        self.budget = budget;
    }

    /// Starts one. The second result is the time that it was granted: the one asked for, or what is left of the budget.
    ///
    /// # Errors
    /// When no time is asked for, the budget is spent, or too many live.
    pub fn take(&mut self, ttl: Duration, now: Moment) -> Result<(InhibitorId, Duration), InhibitorError> {
        if ttl < Duration::from_secs(1) {
            return Err(InhibitorError::NoTime);
        }
        if self.expiries.len() >= INHIBITOR_LIMIT {
            return Err(InhibitorError::TooMany);
        }
        let granted = ttl.min(self.left(now));
        if granted.is_zero() {
            return Err(InhibitorError::Spent { budget: self.budget });
        }
        let id = InhibitorId(self.next_id);
        self.next_id += 1;
        self.since.get_or_insert(now);
        self.expiries.insert(id, now + granted);
        Ok((id, granted))
    }

    /// Ends one; false when it had ended already.
    pub fn end(&mut self, id: InhibitorId, now: Moment) -> bool {
        let ended = self.expiries.remove(&id).is_some();
        if ended && self.expiries.is_empty() {
            self.pause(now);
        }
        ended
    }

    /// Ends those whose time is over, or all when the budget is; names them.
    pub fn expire(&mut self, now: Moment) -> Vec<InhibitorId> {
        let broke = self.left(now).is_zero();
        let over: Vec<_> =
            self.expiries.iter().filter(|(_, at)| broke || **at <= now).map(|(id, _)| *id).collect();
        for id in &over {
            self.end(*id, now);
        }
        over
    }

    pub fn budget(&self) -> Duration {
        self.budget
    }

    /// When [`Inhibitors::expire`] has something to do next.
    pub fn next_expiry(&self, now: Moment) -> Option<Moment> {
        let first = self.expiries.values().copied().min()?;
        Some(first.min(now + self.left(now)))
    }

    /// What is left of the budget.
    pub fn left(&self, now: Moment) -> Duration {
        let running = self.since.map_or(Duration::ZERO, |since| now.since(since));
        self.budget.saturating_sub(self.spent.saturating_add(running))
    }

    fn pause(&mut self, now: Moment) {
        if let Some(since) = self.since.take() {
            self.spent = self.spent.saturating_add(now.since(since));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Moment {
        Moment::from_millis(seconds * 1000)
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn an_inhibitor_ends_with_its_own_time() {
        let mut all = Inhibitors::new(seconds(1000));
        let (id, granted) = all.take(seconds(60), at(0)).unwrap();
        assert_eq!((granted, all.next_expiry(at(0))), (seconds(60), Some(at(60))));
        assert!(all.expire(at(59)).is_empty());
        assert_eq!(all.expire(at(60)), [id]);
        assert!(!all.end(id, at(61)), "it is over already");
        assert_eq!(all.left(at(5000)), seconds(940), "nothing is spent while none lives");
    }

    #[test]
    fn the_budget_is_spent_by_the_clock_and_not_by_their_number() {
        let mut all = Inhibitors::new(seconds(100));
        let (first, _) = all.take(seconds(80), at(0)).unwrap();
        let (second, _) = all.take(seconds(80), at(40)).unwrap();
        assert!(all.end(first, at(50)));
        assert_eq!(all.left(at(60)), seconds(40));
        assert!(all.end(second, at(60)));
        assert_eq!(all.left(at(500)), seconds(40));
    }

    #[test]
    fn a_spent_budget_ends_those_alive_and_refuses_new_ones() {
        let mut all = Inhibitors::new(seconds(100));
        let (first, granted) = all.take(seconds(600), at(0)).unwrap();
        assert_eq!(granted, seconds(100));
        let (second, granted) = all.take(seconds(600), at(90)).unwrap();
        assert_eq!(granted, seconds(10));
        assert_eq!(all.next_expiry(at(90)), Some(at(100)));
        assert_eq!(all.expire(at(100)), [first, second]);
        assert_eq!(all.take(seconds(5), at(200)), Err(InhibitorError::Spent { budget: seconds(100) }));
        all.set_budget(seconds(150));
        assert_eq!(all.take(seconds(500), at(300)).unwrap().1, seconds(50), "the host was generous");
    }

    #[test]
    fn a_smaller_budget_ends_those_alive() {
        let mut all = Inhibitors::new(seconds(100));
        let (id, _) = all.take(seconds(90), at(0)).unwrap();
        all.set_budget(seconds(30));
        assert!(all.expire(at(29)).is_empty());
        assert_eq!(all.expire(at(30)), [id]);
    }

    #[test]
    fn a_guest_cannot_keep_more_than_a_handful() {
        let mut all = Inhibitors::new(seconds(100));
        for _ in 0..INHIBITOR_LIMIT {
            all.take(seconds(5), at(0)).unwrap();
        }
        assert_eq!(all.take(seconds(5), at(0)), Err(InhibitorError::TooMany));
        assert_eq!(all.take(Duration::from_millis(999), at(0)), Err(InhibitorError::NoTime));
    }
}
