//! The host's state machine for one sandbox: when it ends, and why.
//!
//! ```text
//!               due, nothing held           ready, still nothing held
//!   Running ──────────────────────► Preparing ──────────────────────► Ended
//!      ▲  │                             │                               ▲
//!      │  └── timeout, kill, crash ─────┼───────────────────────────────┘
//!      └───── busy, host hold, silence ─┘
//! ```
//!
//! The driver calls [`Lifetime::step`] whenever something happened or the moment that the last step named has come, does what the
//! step says, and feeds the outcome back. Nothing here waits or sends.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ledger::{HoldClass, HoldId, Ledger};
use crate::policy::IdleSettings;
use crate::terms::{Limits, Terms, TermsError};
use crate::{Moment, admission};

/// Added to every deadline: a client learns of the end of its call a little after this side does, and must never see its sandbox go
/// before the time that it was promised.
pub const MARGIN: Duration = Duration::from_millis(150);

/// How long the guest may take to answer a prepare. Below the fence's own silence limit, so that an answer in time means a closed fence.
pub const PREPARE_DEADLINE: Duration = Duration::from_millis(1500);

/// The pause before the guest is asked again after it said "busy" although its reports say idle.
const ASK_AGAIN: Duration = Duration::from_millis(250);

/// After so many unanswered prepares (30 s) the agent counts as dead: the sandbox has crashed. Silence alone never reads as idleness,
/// because work inside the guest would be lost that the host cannot see.
const UNANSWERED_LIMIT: u32 = 20;

/// How far an announced end may move without being announced again: reports are rounded to milliseconds and take time.
const SAME_END: Duration = Duration::from_secs(1);

const _: () = assert!(PREPARE_DEADLINE.as_millis() < admission::SILENCE.as_millis());

/// Why a sandbox ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    /// Nobody used it for its idle timeout.
    Idle,
    /// Its `timeout` passed.
    Timeout,
    /// The connection that created it closed, or its client was silent for too long.
    Session,
    /// It reached the maximum lifetime.
    Lifetime,
    /// Somebody asked for its end.
    Killed,
    /// The VM or the agent in it died.
    Crashed,
    /// The supervisor stopped.
    HostShutdown,
}

impl EndReason {
    pub const ALL: [Self; 7] = [
        Self::Idle,
        Self::Timeout,
        Self::Session,
        Self::Lifetime,
        Self::Killed,
        Self::Crashed,
        Self::HostShutdown,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Timeout => "timeout",
            Self::Session => "session",
            Self::Lifetime => "lifetime",
            Self::Killed => "killed",
            Self::Crashed => "crashed",
            Self::HostShutdown => "host_shutdown",
        }
    }
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What the guest says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestReport {
    /// Grows with each change; an older report never replaces a newer one.
    pub sequence: u64,
    pub idle_for: Duration,
    /// Live holds that count.
    pub counting: usize,
}

/// What the driver has to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing until then, or until something happens.
    Wait(Moment),
    /// Ask the guest to prepare its release, and give the answer to [`Lifetime::answer`].
    Prepare { epoch: u64, idle_for: Duration },
    /// Tell the guest that it ends so soon. For an idle release the guest has to agree that it has been idle for `idle_for`: when it does
    /// not, give its report to [`Lifetime::refuse_notice`].
    Notify { reason: EndReason, ends_in: Duration, idle_for: Option<Duration> },
    /// Stop the VM. Every later step says the same.
    End(EndReason),
}

/// What the driver tells the guest after its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is over: [`Lifetime::step`] says [`Step::End`] from now on.
    Commit,
    /// Admission has to open again.
    Abort,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Running,
    Preparing { epoch: u64, sent: Moment },
    Ended { reason: EndReason, at: Moment },
}

#[derive(Clone, Copy, Debug)]
struct GuestView {
    sequence: u64,
    counting: usize,
    last_activity: Moment,
}

/// One sandbox's lifetime.
#[derive(Debug)]
pub struct Lifetime {
    terms: Terms,
    host: Ledger,
    guest: GuestView,
    phase: Phase,
    epoch: u64,
    ask_not_before: Moment,
    unanswered: u32,
    /// How long before its end the sandbox wants to hear of it.
    notice: Option<Duration>,
    /// The end that the guest was last told of.
    announced: Option<Moment>,
    /// When the client of a session counts as gone, unless it is heard of before.
    session_ends: Option<Moment>,
}

impl Lifetime {
    /// A sandbox that is ready now. `last_epoch` is the highest epoch that an earlier supervisor may have used, 0 for a new sandbox.
    pub fn new(terms: Terms, settings: &IdleSettings, last_epoch: u64, now: Moment) -> Self {
        Self {
            terms,
            host: Ledger::new(settings.policy.clone(), now),
            guest: GuestView { sequence: 0, counting: 0, last_activity: now },
            phase: Phase::Running,
            epoch: last_epoch,
            ask_not_before: now,
            unanswered: 0,
            notice: settings.notice,
            announced: None,
            session_ends: terms.session.map(|liveness| now + liveness),
        }
    }

    /// The lifetime of a sandbox found alive after a restart: its idle clock goes on. `host_used` is the last use that the earlier
    /// supervisor saw, which the guest need not know of: requests to a port of the guest pass by its agent.
    pub fn adopt(
        terms: Terms,
        settings: &IdleSettings,
        last_epoch: u64,
        report: GuestReport,
        host_used: Option<Moment>,
        now: Moment,
    ) -> Self {
        let used = (now - report.idle_for).max(host_used.unwrap_or_default().min(now));
        let mut lifetime = Self::new(terms, settings, last_epoch, used);
        lifetime.report(report, now);
        // Its connection ended with the earlier supervisor.
        lifetime.close_session("its connection was to an earlier hostd", now);
        lifetime
    }

    /// What to do now. Call it again whenever something happened, and at the moment that [`Step::Wait`] names.
    pub fn step(&mut self, now: Moment) -> Step {
        if let Phase::Ended { reason, .. } = self.phase {
            return Step::End(reason);
        }
        let end = self.terms.end + MARGIN;
        if now >= end {
            return self.finish(self.hard_reason(), now);
        }
        if self.session_ends.is_some_and(|due| now >= due) {
            return self.finish(EndReason::Session, now);
        }
        let next_end = self.session_ends.map_or(end, |due| due.min(end));
        if let Phase::Preparing { epoch, sent } = self.phase {
            let deadline = sent + PREPARE_DEADLINE;
            if now < deadline {
                return Step::Wait(deadline.min(next_end));
            }
            self.unanswered += 1;
            self.phase = Phase::Running;
            self.host.note(now, format!("release {epoch}: the agent did not answer"));
        }
        let due = self.release_due().map(|due| due.max(self.ask_not_before));
        let notify_at = match self.notice_due(due, end) {
            Some((notify_at, ends_at, reason)) if now >= notify_at => {
                self.announced = Some(ends_at);
                let ends_in = ends_at.since(now);
                self.host.note(now, format!("notice: {reason} in {:.1} s", ends_in.as_secs_f64()));
                let idle_for = (reason == EndReason::Idle)
                    .then(|| self.terms.idle_timeout.unwrap_or_default().saturating_sub(ends_in));
                return Step::Notify { reason, ends_in, idle_for };
            }
            waiting => waiting.map(|(notify_at, ..)| notify_at),
        };
        let Some(due) = due.filter(|due| now >= *due) else {
            let next = due.into_iter().chain(notify_at).fold(next_end, Moment::min);
            return Step::Wait(next);
        };
        debug_assert!(now >= due);
        if self.unanswered >= UNANSWERED_LIMIT {
            self.host.note(now, "the agent does not answer");
            return self.finish(EndReason::Crashed, now);
        }
        self.epoch += 1;
        self.phase = Phase::Preparing { epoch: self.epoch, sent: now };
        Step::Prepare { epoch: self.epoch, idle_for: self.terms.idle_timeout.unwrap_or_default() }
    }

    /// The guest answered a prepare. The verdict is to be sent to it; after [`Verdict::Commit`] nothing is admitted any more.
    pub fn answer(&mut self, epoch: u64, ready: bool, report: GuestReport, now: Moment) -> Verdict {
        self.report(report, now);
        let Phase::Preparing { epoch: asked, sent } = self.phase else { return Verdict::Abort };
        if asked != epoch {
            return Verdict::Abort;
        }
        self.unanswered = 0;
        self.phase = Phase::Running;
        let fence_holds = now.since(sent) < PREPARE_DEADLINE;
        let idle_timeout = self.terms.idle_timeout.unwrap_or(Duration::MAX);
        if ready && fence_holds && self.host.idle_for(now) >= idle_timeout {
            self.finish(EndReason::Idle, now);
            return Verdict::Commit;
        }
        self.ask_not_before = now + ASK_AGAIN;
        self.host.note(
            now,
            format!("release {epoch}: {}", if ready { "called off, in use" } else { "the guest is busy" }),
        );
        Verdict::Abort
    }

    /// The guest was told of an idle release and does not agree that it is idle: it is told again when it is.
    pub fn refuse_notice(&mut self, report: GuestReport, now: Moment) {
        self.announced = None;
        self.ask_not_before = now + ASK_AGAIN;
        self.report(report, now);
        self.host.note(now, "notice: the guest is in use");
    }

    /// When to announce which end, unless it was announced already.
    fn notice_due(&self, due: Option<Moment>, end: Moment) -> Option<(Moment, Moment, EndReason)> {
        let notice = self.notice?;
        let (ends_at, reason) = match due {
            Some(due) if due < end => (due, EndReason::Idle),
            _ => (end, self.hard_reason()),
        };
        let told = self
            .announced
            .is_some_and(|told| ends_at.since(told) <= SAME_END && told.since(ends_at) <= SAME_END);
        (!told).then(|| ((ends_at - notice).max(self.ask_not_before), ends_at, reason))
    }

    fn hard_reason(&self) -> EndReason {
        if self.terms.end >= self.terms.last_end { EndReason::Lifetime } else { EndReason::Timeout }
    }

    /// A request came in. The hold lives until [`Lifetime::release_hold`], and is use once it is confirmed.
    ///
    /// # Errors
    /// When the sandbox has ended.
    pub fn admit(
        &mut self,
        class: HoldClass,
        origin: impl Into<String>,
        now: Moment,
    ) -> Result<HoldId, EndReason> {
        match self.phase {
            Phase::Ended { reason, .. } => Err(reason),
            Phase::Running | Phase::Preparing { .. } => Ok(self.host.begin_provisional(class, origin, now)),
        }
    }

    /// The agent took the request: its caller may call. From now on it is use.
    pub fn confirm(&mut self, hold: HoldId, now: Moment) {
        self.host.confirm(hold, now);
    }

    pub fn progress(&mut self, hold: HoldId, bytes: u64, now: Moment) {
        self.host.progress(hold, bytes, now);
    }

    pub fn reclass(&mut self, hold: HoldId, class: HoldClass, now: Moment) {
        self.host.reclass(hold, class, now);
    }

    pub fn release_hold(&mut self, hold: HoldId, now: Moment) {
        self.host.end(hold, now);
    }

    /// An SDK's `connect`: one touch.
    pub fn touch(&mut self, origin: &str, now: Moment) {
        self.host.touch(HoldClass::Connect, origin, now);
    }

    /// Takes the guest's report, unless a newer one is known.
    pub fn report(&mut self, report: GuestReport, now: Moment) {
        if report.sequence < self.guest.sequence {
            return;
        }
        self.guest = GuestView {
            sequence: report.sequence,
            counting: report.counting,
            last_activity: if report.counting > 0 { now } else { now - report.idle_for },
        };
    }

    /// # Errors
    /// When the maximum lifetime is already over.
    pub fn set_timeout(&mut self, seconds: i64, now: Moment) -> Result<(), TermsError> {
        self.terms.set_timeout(seconds, now)?;
        self.host.note(now, format!("timeout set to {seconds} s from now"));
        Ok(())
    }

    /// Moves the end to so long from now, at most to the maximum lifetime. A session stays one.
    ///
    /// # Errors
    /// When the maximum lifetime is already over.
    pub fn set_left(&mut self, length: Duration, now: Moment) -> Result<(), TermsError> {
        self.terms.set_left(length, now)?;
        self.host.note(now, format!("end set to {:.3} s from now", self.terms.end.since(now).as_secs_f64()));
        Ok(())
    }

    /// The client of a session was heard of at `heard`. Nothing to a sandbox that is none, and to a session that is closed.
    pub fn hear(&mut self, heard: Moment, now: Moment) {
        if let (Some(liveness), Some(due)) = (self.terms.session, self.session_ends)
            && now < due
        {
            self.session_ends = Some(due.max(heard + liveness));
        }
    }

    /// The connection that created a session is closed: the next step ends it. Nothing to a sandbox that is no session.
    pub fn close_session(&mut self, why: &str, now: Moment) {
        if self.session_ends.is_some_and(|due| now < due) && self.ended().is_none() {
            self.session_ends = Some(now);
            self.host.note(now, format!("session closed: {why}"));
        }
    }

    /// How long until the client of a session counts as gone, unless it is heard of; none when it is no session.
    pub fn session_ends_in(&self, now: Moment) -> Option<Duration> {
        self.session_ends.map(|due| due.since(now))
    }

    /// # Errors
    /// When `seconds` is negative or above the maximum lifetime.
    pub fn extend(&mut self, seconds: i64, limits: &Limits, now: Moment) -> Result<(), TermsError> {
        self.terms.extend(seconds, limits, now)
    }

    /// Somebody asked for its end. False when it had ended already.
    pub fn kill(&mut self, now: Moment) -> bool {
        let alive = self.ended().is_none();
        self.finish(EndReason::Killed, now);
        alive
    }

    /// Whoever asked for it went before it was ready. A session is over with its client; of another nobody knows the id, so it is killed.
    pub fn abandon(&mut self, now: Moment) -> EndReason {
        let reason = if self.session_ends.is_some() { EndReason::Session } else { EndReason::Killed };
        self.end(reason, now)
    }

    /// Ends it for a reason of the driver's own. The first reason stays.
    pub fn end(&mut self, reason: EndReason, now: Moment) -> EndReason {
        match self.finish(reason, now) {
            Step::End(reason) => reason,
            Step::Wait(_) | Step::Prepare { .. } | Step::Notify { .. } => reason,
        }
    }

    pub fn terms(&self) -> &Terms {
        &self.terms
    }

    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The host's own holds.
    pub fn host_ledger(&self) -> &Ledger {
        &self.host
    }

    /// Adds a line to the history.
    pub fn note(&mut self, now: Moment, what: impl Into<String>) {
        self.host.note(now, what);
    }

    pub fn ended(&self) -> Option<(EndReason, Moment)> {
        match self.phase {
            Phase::Ended { reason, at } => Some((reason, at)),
            Phase::Running | Phase::Preparing { .. } => None,
        }
    }

    pub fn state_name(&self) -> &'static str {
        match self.phase {
            Phase::Running => "running",
            Phase::Preparing { .. } => "releasing",
            Phase::Ended { .. } => "ended",
        }
    }

    /// Zero while either side holds.
    pub fn idle_for(&self, now: Moment) -> Duration {
        if self.is_busy() { Duration::ZERO } else { now.since(self.last_activity()) }
    }

    /// How long until an idle release, if nothing happens; none while in use or without an idle timeout.
    pub fn releases_in(&self, now: Moment) -> Option<Duration> {
        self.release_due().map(|due| due.since(now))
    }

    fn is_busy(&self) -> bool {
        self.host.counting() > 0 || self.guest.counting > 0
    }

    fn last_activity(&self) -> Moment {
        self.host.last_activity().max(self.guest.last_activity)
    }

    fn release_due(&self) -> Option<Moment> {
        let idle_timeout = self.terms.idle_timeout?;
        (!self.is_busy()).then(|| self.last_activity() + idle_timeout + MARGIN)
    }

    fn finish(&mut self, reason: EndReason, now: Moment) -> Step {
        if let Phase::Ended { reason, .. } = self.phase {
            return Step::End(reason);
        }
        self.phase = Phase::Ended { reason, at: now };
        self.host.note(now, format!("ended: {reason}"));
        Step::End(reason)
    }
}

#[cfg(test)]
mod tests;
