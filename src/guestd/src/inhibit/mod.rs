//! Inhibitors: how a program in the machine says that it is busy, although nobody from outside is using it.
//!
//! [`Inhibition`] owns the live ones: it pairs the rules of `guestd_idle::inhibitor` with holds of the agent's ledger. `socket` speaks a
//! one-line protocol on a Unix socket, `command` is the client behind `guestd busy` and `guestd idle`.

pub mod command;
mod socket;

use std::collections::HashMap;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use guestd_idle::inhibitor::{InhibitorError, InhibitorId};
use guestd_idle::{HoldClass, HoldId, Inhibitors, Policy};
use guestd_protocol::wire::activity::v1 as wire;
use tokio::sync::Notify;

use crate::activity::{Activity, Gone, HoldGuard};

pub use socket::{SOCKET_PATH, listen, resume, serve};

/// The budget of an agent that no host has set one for: the default maximum lifetime.
const DEFAULT_BUDGET: Duration = Duration::from_secs(3600);

/// Why there is no inhibitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TakeError {
    #[error(transparent)]
    Rule(#[from] InhibitorError),
    #[error("the sandbox is being released")]
    Gone,
}

#[derive(Debug)]
struct Inner {
    rules: Inhibitors,
    holds: HashMap<InhibitorId, HoldGuard>,
    /// A task waits for the next expiry.
    waiting: bool,
}

/// All of it as data.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub struct InhibitionState {
    rules: Inhibitors,
    holds: Vec<(InhibitorId, HoldId)>,
    /// Connections that end inhibitors with themselves.
    conversations: Vec<(RawFd, Vec<InhibitorId>)>,
}

impl InhibitionState {
    /// The descriptors that have to stay open.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        self.conversations.iter().map(|(fd, _)| *fd)
    }
}

/// All inhibitors of this agent.
#[derive(Debug)]
pub struct Inhibition {
    activity: Arc<Activity>,
    inner: Mutex<Inner>,
    changed: Notify,
    /// The open connections and what ends with each.
    conversations: Mutex<HashMap<RawFd, Vec<InhibitorId>>>,
}

impl Inhibition {
    pub fn new(activity: Arc<Activity>) -> Arc<Self> {
        let inner = Inner { rules: Inhibitors::new(DEFAULT_BUDGET), holds: HashMap::new(), waiting: false };
        Arc::new(Self {
            activity,
            inner: Mutex::new(inner),
            changed: Notify::new(),
            conversations: Mutex::default(),
        })
    }

    /// What the agent that takes this one's place has to know.
    pub fn export(&self) -> InhibitionState {
        let inner = self.lock();
        InhibitionState {
            rules: inner.rules.clone(),
            holds: inner.holds.iter().map(|(id, hold)| (*id, hold.id())).collect(),
            conversations: self.conversations().iter().map(|(fd, ids)| (*fd, ids.clone())).collect(),
        }
    }

    /// Goes on with the inhibitors of the agent before this one. The results are their holds and the connections that they end with.
    pub fn restore(
        self: &Arc<Self>,
        state: InhibitionState,
    ) -> (Vec<HoldId>, Vec<(RawFd, Vec<InhibitorId>)>) {
        let mut inner = self.lock();
        inner.rules = state.rules;
        let holds: Vec<_> = state.holds.iter().map(|(_, hold)| *hold).collect();
        let claimed = state.holds.into_iter().filter_map(|(id, hold)| Some((id, self.activity.claim(hold)?)));
        inner.holds = claimed.collect();
        inner.waiting = true;
        tokio::spawn(Arc::clone(self).expire());
        (holds, state.conversations)
    }

    fn conversations(&self) -> MutexGuard<'_, HashMap<RawFd, Vec<InhibitorId>>> {
        self.conversations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over what the host says; None leaves what is.
    pub fn configure(&self, policy: Option<Policy>, budget: Option<Duration>) {
        if let Some(policy) = policy {
            self.activity.set_policy(policy);
        }
        if let Some(budget) = budget {
            self.lock().rules.set_budget(budget);
            self.changed.notify_one();
        }
    }

    /// Takes an inhibitor for `why`; the second result is the time that it was granted.
    ///
    /// # Errors
    /// When the rules refuse it, or the sandbox is released while it waits at the fence.
    pub async fn take(
        self: &Arc<Self>,
        ttl: Duration,
        why: &str,
        pid: u32,
    ) -> Result<(InhibitorId, Duration), TakeError> {
        // The fence first: one that is taken while a release is being prepared must not be lost.
        let hold = self.activity.admit(HoldClass::Inhibitor, why).await.map_err(|Gone| TakeError::Gone)?;
        hold.name_process(pid);
        let now = self.activity.now();
        let mut inner = self.lock();
        let (id, granted) = inner.rules.take(ttl, now)?;
        inner.holds.insert(id, hold);
        if !std::mem::replace(&mut inner.waiting, true) {
            tokio::spawn(Arc::clone(self).expire());
        }
        drop(inner);
        self.changed.notify_one();
        Ok((id, granted))
    }

    /// Ends an inhibitor; false when it had ended already.
    pub fn end(&self, id: InhibitorId) -> bool {
        let now = self.activity.now();
        let mut inner = self.lock();
        let ended = inner.rules.end(id, now);
        let hold = inner.holds.remove(&id);
        drop(inner);
        drop(hold);
        self.changed.notify_one();
        ended
    }

    /// The explain view of this guest, with what is left of the budget.
    pub fn explain(&self) -> wire::ExplainResponse {
        let now = self.activity.now();
        let (left, budget) = {
            let inner = self.lock();
            (inner.rules.left(now), inner.rules.budget())
        };
        let millis = |length: Duration| u64::try_from(length.as_millis()).unwrap_or(u64::MAX);
        wire::ExplainResponse {
            inhibitor_left_ms: millis(left),
            inhibitor_budget_ms: millis(budget),
            ..self.activity.explain()
        }
    }

    /// Ends what is over, and itself when nothing is left: no timer runs without an inhibitor.
    async fn expire(self: Arc<Self>) {
        loop {
            let now = self.activity.now();
            let mut over = Vec::new();
            let next = {
                let mut inner = self.lock();
                for id in inner.rules.expire(now) {
                    over.extend(inner.holds.remove(&id));
                }
                let next = inner.rules.next_expiry(now);
                inner.waiting = next.is_some();
                next
            };
            if !over.is_empty() {
                self.activity.note(format!("{} inhibitors ran out of time", over.len()));
            }
            drop(over);
            let Some(next) = next else { return };
            tokio::select! {
                () = tokio::time::sleep(next.since(now)) => {}
                () = self.changed.notified() => {}
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inhibition() -> (Arc<Activity>, Arc<Inhibition>) {
        let activity = Activity::new(guestd_idle::Policy::default());
        (Arc::clone(&activity), Inhibition::new(activity))
    }

    #[tokio::test(start_paused = true)]
    async fn an_inhibitor_holds_until_its_time_is_over_and_leaves_no_timer() {
        let (activity, inhibition) = inhibition();
        let (id, granted) = inhibition.take(Duration::from_secs(600), "training", 7).await.unwrap();
        assert_eq!(granted, Duration::from_secs(600));
        tokio::time::sleep(Duration::from_secs(599)).await;
        assert_eq!(activity.report().counting, 1);
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(activity.report().counting, 0);
        assert!(!inhibition.end(id) && !inhibition.lock().waiting);
        assert_eq!(inhibition.explain().inhibitor_left_ms, 3_000_000);
    }

    #[tokio::test(start_paused = true)]
    async fn a_spent_budget_ends_the_hold_and_is_said() {
        let (activity, inhibition) = inhibition();
        inhibition.configure(None, Some(Duration::from_secs(30)));
        let (_, granted) = inhibition.take(Duration::from_secs(600), "training", 0).await.unwrap();
        assert_eq!(granted, Duration::from_secs(30));
        tokio::time::sleep(Duration::from_secs(31)).await;
        assert_eq!(activity.report().counting, 0);
        let refused = inhibition.take(Duration::from_secs(5), "again", 0).await.unwrap_err();
        assert!(refused.to_string().contains("30 s"), "{refused}");
        assert_eq!(activity.report().counting, 0, "a refused one holds nothing");
    }

    #[tokio::test(start_paused = true)]
    async fn an_inhibitor_taken_during_a_prepare_is_not_lost() {
        let (activity, inhibition) = inhibition();
        assert!(activity.prepare(1, Duration::ZERO).0);
        let late = tokio::spawn({
            let inhibition = Arc::clone(&inhibition);
            async move { inhibition.take(Duration::from_secs(60), "late", 0).await }
        });
        tokio::task::yield_now().await;
        activity.abort(1);
        late.await.unwrap().unwrap();
        assert!(!activity.prepare(2, Duration::ZERO).0);
    }
}
