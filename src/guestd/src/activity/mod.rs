//! What the agent knows about being used: the ledger of holds, the admission fence, and who waits for their changes.
//!
//! [`Activity`] owns both (a [`Gate`]) under one lock, so that a call is admitted and held in one step: there is no moment in which an accepted
//! call is not counted. `middleware` holds for each call by the routes table, `rpc` speaks to the host. The rules themselves are in
//! `guestd_idle`.

mod body;
pub mod middleware;
pub mod rpc;
mod sampling;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use guestd_idle::{Gate, HoldClass, HoldId, Ledger, LedgerState, Moment, Passage, Policy, PolicyError};
use guestd_protocol::wire::activity::v1 as wire;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::upgrade::Stamp;

/// How many holds a report names (contract: activity.proto).
const REPORTED_HOLDS: usize = 64;

/// Longest origin that a hold keeps, in bytes: a command line can be two megabytes.
const ORIGIN_LIMIT: usize = 200;

/// The sandbox was released while the call waited at the fence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

#[derive(Debug)]
struct Inner {
    gate: Gate,
    /// A task looks for progress that nobody reports.
    sampling: bool,
    /// The ledger's sequence, and when it became that: the last time that the set of holds changed.
    told: u64,
    changed: Instant,
}

/// Everything about being used, as data.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub struct ActivityState {
    origin: Stamp,
    ledger: LedgerState,
    epoch: u64,
}

#[derive(Debug)]
pub struct Activity {
    origin: Instant,
    inner: Mutex<Inner>,
    fence: Notify,
    changes: watch::Sender<u64>,
}

impl Activity {
    pub fn new(policy: Policy) -> Arc<Self> {
        Self::with(Instant::now(), Gate::new(policy, Moment::default()))
    }

    fn with(origin: Instant, gate: Gate) -> Arc<Self> {
        let told = gate.ledger.sequence();
        let changes = watch::Sender::new(told);
        Arc::new(Self {
            origin,
            inner: Mutex::new(Inner { gate, sampling: false, told, changed: Instant::now() }),
            fence: Notify::new(),
            changes,
        })
    }

    /// What another agent needs to go on; None when the sandbox was released.
    pub fn export(&self) -> Option<ActivityState> {
        let inner = self.lock();
        (!inner.gate.is_gone()).then(|| ActivityState {
            origin: Stamp::of(self.origin),
            ledger: inner.gate.ledger.export(),
            epoch: inner.gate.last_epoch(),
        })
    }

    /// Goes on where another agent was. Its holds live until [`Activity::settle`], for their owners to claim them.
    ///
    /// # Errors
    /// When the idle policy is one that this agent does not know.
    pub fn restore(state: ActivityState) -> Result<Arc<Self>, PolicyError> {
        let gate = Gate::after(Ledger::restore(state.ledger)?, state.epoch);
        Ok(Self::with(state.origin.instant(), gate))
    }

    /// Takes over a hold of the agent before this one; None when there is none of that id. Nobody may claim it twice.
    pub fn claim(self: &Arc<Self>, id: HoldId) -> Option<HoldGuard> {
        let known = self.lock().gate.ledger.ids().any(|known| known == id);
        known.then(|| HoldGuard { activity: Arc::clone(self), id })
    }

    /// Ends all holds but the claimed ones: their calls ended with the agent before this one.
    pub fn settle(self: &Arc<Self>, claimed: &[HoldId]) {
        let now = self.now();
        self.change(|inner| {
            let left: Vec<_> = inner.gate.ledger.ids().filter(|id| !claimed.contains(id)).collect();
            for id in left {
                inner.gate.ledger.end(id, now);
            }
            inner.gate.ledger.note(now, "the agent was replaced");
        });
        sampling::start(self);
    }

    /// The agent's monotonic clock, which all of its idle rules use.
    pub fn now(&self) -> Moment {
        Moment::default() + self.origin.elapsed()
    }

    /// Counts by `policy` from now on.
    pub fn set_policy(self: &Arc<Self>, policy: Policy) {
        let now = self.now();
        self.change(|inner| inner.gate.ledger.set_policy(policy, now));
        sampling::start(self);
    }

    /// Adds a line to the history.
    pub fn note(&self, what: impl Into<String>) {
        let now = self.now();
        self.lock().gate.ledger.note(now, what);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes the fence and takes a hold, in one step. Waits while a release is being prepared.
    ///
    /// # Errors
    /// [`Gone`] when the release was committed.
    pub async fn admit(self: &Arc<Self>, class: HoldClass, origin: &str) -> Result<HoldGuard, Gone> {
        loop {
            let changed = self.fence.notified();
            let wait = {
                let now = self.now();
                let mut inner = self.lock();
                match inner.gate.admit(class, shortened(origin), now) {
                    Passage::Admitted(id) => {
                        let sequence = inner.gate.ledger.sequence();
                        (inner.told, inner.changed) = (sequence, Instant::now());
                        drop(inner);
                        self.changes.send_replace(sequence);
                        return Ok(HoldGuard { activity: Arc::clone(self), id });
                    }
                    Passage::Gone => return Err(Gone),
                    Passage::Wait(until) => until.since(now),
                }
            };
            // Either the fence changed or the host has been silent for too long.
            let _elapsed = tokio::time::timeout(wait, changed).await;
        }
    }

    /// A hold of something that is already inside: a process that a held call starts.
    pub fn hold(self: &Arc<Self>, class: HoldClass, origin: &str) -> HoldGuard {
        let now = self.now();
        let id = self.change(|inner| inner.gate.ledger.begin(class, shortened(origin), 0, now));
        HoldGuard { activity: Arc::clone(self), id }
    }

    /// Closes the fence and counts again; opens it at once when something holds.
    pub fn prepare(&self, epoch: u64, idle_for: Duration) -> (bool, wire::Report) {
        let now = self.now();
        let mut inner = self.lock();
        let ready = inner.gate.prepare(epoch, idle_for, now);
        inner
            .gate
            .ledger
            .note(now, format!("release {epoch} asked: {}", if ready { "ready" } else { "busy" }));
        let report = report(&inner.gate.ledger, now);
        drop(inner);
        self.fence.notify_waiters();
        (ready, report)
    }

    /// False when the fence of this epoch is not closed any more.
    pub fn commit(&self, epoch: u64) -> bool {
        let now = self.now();
        let committed = self.lock().gate.commit(epoch, now);
        self.fence.notify_waiters();
        committed
    }

    pub fn abort(&self, epoch: u64) {
        self.lock().gate.abort(epoch);
        self.fence.notify_waiters();
    }

    pub fn report(&self) -> wire::Report {
        let now = self.now();
        report(&self.lock().gate.ledger, now)
    }

    /// Zero while a counting hold lives.
    pub fn idle_for(&self) -> Duration {
        let now = self.now();
        self.lock().gate.ledger.idle_for(now)
    }

    pub fn explain(&self) -> wire::ExplainResponse {
        let now = self.now();
        let inner = self.lock();
        let transitions = inner.gate.ledger.transitions().map(|transition| wire::Transition {
            age_ms: millis(now.since(transition.at)),
            what: transition.what.clone(),
            ..Default::default()
        });
        wire::ExplainResponse {
            transitions: transitions.collect(),
            report: report(&inner.gate.ledger, now).into(),
            admission: inner.gate.state_name().to_owned(),
            ..Default::default()
        }
    }

    /// When the set of holds changed for the last time.
    pub fn changed(&self) -> Instant {
        self.lock().changed
    }

    /// Wakes at each change of the set of holds.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn change<T>(&self, change: impl FnOnce(&mut Inner) -> T) -> T {
        let mut inner = self.lock();
        let result = change(&mut inner);
        let sequence = inner.gate.ledger.sequence();
        if inner.told != sequence {
            (inner.told, inner.changed) = (sequence, Instant::now());
        }
        drop(inner);
        self.changes.send_if_modified(|known| std::mem::replace(known, sequence) != sequence);
        result
    }
}

fn shortened(origin: &str) -> String {
    match origin.char_indices().find(|(index, c)| index + c.len_utf8() > ORIGIN_LIMIT) {
        Some((end, _)) => format!("{}…", &origin[..end]),
        None => origin.to_owned(),
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn report(ledger: &Ledger, now: Moment) -> wire::Report {
    let holds = ledger.by_blame().into_iter().take(REPORTED_HOLDS).map(|(id, hold)| wire::Hold {
        id: id.get(),
        class: hold.class.name().to_owned(),
        counts: ledger.keeps(hold, now),
        origin: hold.origin.clone(),
        pid: hold.pid,
        age_ms: millis(now.since(hold.started)),
        since_progress_ms: millis(now.since(hold.last_progress)),
        bytes: hold.bytes,
        ..Default::default()
    });
    let (last_class, last_origin) =
        ledger.last_use().map(|last| (last.class.name().to_owned(), last.origin.clone())).unwrap_or_default();
    wire::Report {
        sequence: ledger.sequence(),
        idle_for_ms: millis(ledger.idle_for(now)),
        counting: u32::try_from(ledger.counting()).unwrap_or(u32::MAX),
        holds: holds.collect(),
        last_class,
        last_origin,
        ..Default::default()
    }
}

/// A live hold; dropping it ends it.
#[derive(Debug)]
pub struct HoldGuard {
    activity: Arc<Activity>,
    id: HoldId,
}

impl HoldGuard {
    pub fn id(&self) -> HoldId {
        self.id
    }

    /// Bytes or events passed. Wakes nobody: the host asks before it releases.
    pub fn progress(&self, bytes: u64) {
        let now = self.activity.now();
        self.activity.lock().gate.ledger.progress(self.id, bytes, now);
    }

    pub fn reclass(&self, class: HoldClass) {
        let now = self.activity.now();
        self.activity.change(|inner| inner.gate.ledger.reclass(self.id, class, now));
        sampling::start(&self.activity);
    }

    pub fn name_process(&self, pid: u32) {
        self.activity.lock().gate.ledger.name_process(self.id, pid);
        sampling::start(&self.activity);
    }
}

impl Drop for HoldGuard {
    fn drop(&mut self) {
        let now = self.activity.now();
        self.activity.change(|inner| inner.gate.ledger.end(self.id, now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn activity() -> Arc<Activity> {
        Activity::new(Policy::default())
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_during_a_prepare_waits_and_runs_after_the_abort() {
        let activity = activity();
        assert!(activity.prepare(1, Duration::ZERO).0);
        let waiting = tokio::spawn({
            let activity = Arc::clone(&activity);
            async move { activity.admit(HoldClass::Call, "/x").await.is_ok() }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        activity.abort(1);
        assert!(waiting.await.unwrap());
    }

    #[tokio::test]
    async fn a_call_that_waits_at_a_committed_release_is_told_so() {
        let activity = activity();
        assert!(activity.prepare(1, Duration::ZERO).0);
        let waiting = tokio::spawn({
            let activity = Arc::clone(&activity);
            async move { activity.admit(HoldClass::Call, "/x").await.map(|_| ()) }
        });
        tokio::task::yield_now().await;
        assert!(activity.commit(1));
        assert_eq!(waiting.await.unwrap(), Err(Gone));
    }

    #[tokio::test]
    async fn a_held_call_makes_prepare_say_busy_and_leaves_the_door_open() {
        let activity = activity();
        let _hold = activity.admit(HoldClass::Call, "/x").await.unwrap();
        let (ready, report) = activity.prepare(1, Duration::ZERO);
        assert!(!ready);
        assert_eq!((report.counting, report.holds.len()), (1, 1));
        assert!(activity.admit(HoldClass::Call, "/y").await.is_ok());
    }

    #[test]
    fn a_huge_command_line_does_not_make_a_huge_report() {
        let activity = activity();
        let _hold = activity.hold(HoldClass::Command, &"é".repeat(1_000_000));
        assert!(activity.report().holds[0].origin.len() <= ORIGIN_LIMIT + '…'.len_utf8());
    }

    #[test]
    fn a_change_wakes_the_watcher_and_progress_does_not() {
        let activity = activity();
        let mut changes = activity.changes();
        changes.mark_unchanged();
        let hold = activity.hold(HoldClass::Terminal, "bash");
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        hold.progress(10);
        assert!(!changes.has_changed().unwrap());
        drop(hold);
        assert!(changes.has_changed().unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn a_replaced_agent_keeps_the_idle_clock_and_ends_the_calls_of_the_one_before() {
        let before = activity();
        let job = before.hold(HoldClass::Detached, "job");
        tokio::time::advance(Duration::from_secs(40)).await;
        assert_eq!(before.idle_for(), Duration::from_secs(40));
        let state = serde_json::to_string(&before.export().unwrap()).unwrap();
        let after = Activity::restore(serde_json::from_str(&state).unwrap()).unwrap();
        let claimed = after.claim(job.id()).unwrap();
        after.settle(&[claimed.id()]);
        assert!(after.idle_for().abs_diff(Duration::from_secs(40)) < Duration::from_secs(1));
        assert!(after.report().sequence > before.report().sequence);
        let call = before.hold(HoldClass::Call, "call");
        let state = serde_json::to_string(&before.export().unwrap()).unwrap();
        let after = Activity::restore(serde_json::from_str(&state).unwrap()).unwrap();
        assert_eq!(after.report().counting, 1);
        after.settle(&[job.id()]);
        assert_eq!((after.report().counting, after.idle_for().as_secs()), (0, 0));
        drop(call);
        assert!(before.prepare(1, Duration::ZERO).0 && before.commit(1));
        assert!(before.export().is_none(), "a released sandbox has no next agent");
    }
}
