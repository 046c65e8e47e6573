//! Holds: what keeps a sandbox in use, and since when nothing does.
//!
//! Both sides keep a ledger: the guest for its calls, commands and transfers, the host for the requests that it is proxying.
//! The ledger knows nothing of releases; [`crate::admission`] and [`crate::lifetime`] ask it.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Moment;
use crate::policy::{Counting, Policy, PolicyError};

/// How many transitions the explain view remembers.
const REMEMBERED_TRANSITIONS: usize = 32;

/// What kind of use a hold stands for (DESIGN.md section 4, rule 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HoldClass {
    /// A unary call on processes, files or contexts.
    Call,
    /// A command with at least one client attached.
    Command,
    /// A command whose clients all went.
    Detached,
    Terminal,
    Transfer,
    /// A code cell that has no result yet.
    Code,
    /// A directory watch.
    Watch,
    /// A request to a port inside the guest, through the proxy.
    GuestPort,
    /// An upgraded connection (WebSocket) to a port inside the guest.
    GuestStream,
    /// Taken from inside the guest, with a time limit of its own.
    Inhibitor,
    /// An SDK's `connect`.
    Connect,
}

impl HoldClass {
    pub const ALL: [Self; 11] = [
        Self::Call,
        Self::Command,
        Self::Detached,
        Self::Terminal,
        Self::Transfer,
        Self::Code,
        Self::Watch,
        Self::GuestPort,
        Self::GuestStream,
        Self::Inhibitor,
        Self::Connect,
    ];

    /// The name on the wire and in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Call => "call",
            Self::Command => "command",
            Self::Detached => "detached",
            Self::Terminal => "terminal",
            Self::Transfer => "transfer",
            Self::Code => "code",
            Self::Watch => "watch",
            Self::GuestPort => "guest_port",
            Self::GuestStream => "guest_stream",
            Self::Inhibitor => "inhibitor",
            Self::Connect => "connect",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|class| class.name() == name)
    }
}

impl fmt::Display for HoldClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct HoldId(u64);

impl HoldId {
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// One live hold.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hold {
    pub class: HoldClass,
    /// What holds: a call's path, a command line, a file.
    pub origin: String,
    /// The guest process behind it, or 0.
    pub pid: u32,
    pub started: Moment,
    pub last_progress: Moment,
    /// Bytes moved so far.
    pub bytes: u64,
    /// It counts while it lives, but is no use before it is confirmed: nobody knows yet whether its caller may call.
    pub provisional: bool,
}

/// A change that the explain view shows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Transition {
    pub at: Moment,
    pub what: String,
}

/// The last use that ended, for the explain view and the tombstone.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LastUse {
    pub class: HoldClass,
    pub origin: String,
}

/// A ledger as data: what another agent needs to go on with it, on the same clock.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LedgerState {
    /// As [`Policy::words`] has it.
    policy: BTreeMap<String, String>,
    holds: Vec<(HoldId, Hold)>,
    next_id: u64,
    last_activity: Moment,
    last_use: Option<LastUse>,
    sequence: u64,
    transitions: Vec<Transition>,
}

/// The set of live holds and the moment of the last use.
#[derive(Debug)]
pub struct Ledger {
    policy: Policy,
    holds: BTreeMap<HoldId, Hold>,
    next_id: u64,
    counting: usize,
    /// In the future while a movement still counts ([`Counting::OnProgress`]).
    last_activity: Moment,
    last_use: Option<LastUse>,
    sequence: u64,
    transitions: VecDeque<Transition>,
}

impl Ledger {
    /// An empty ledger whose idle clock starts now.
    pub fn new(policy: Policy, now: Moment) -> Self {
        Self {
            policy,
            holds: BTreeMap::new(),
            next_id: 1,
            counting: 0,
            last_activity: now,
            last_use: None,
            sequence: 1,
            transitions: VecDeque::new(),
        }
    }

    pub fn export(&self) -> LedgerState {
        LedgerState {
            policy: self.policy.words(),
            holds: self.holds.iter().map(|(id, hold)| (*id, hold.clone())).collect(),
            next_id: self.next_id,
            last_activity: self.last_activity,
            last_use: self.last_use.clone(),
            sequence: self.sequence,
            transitions: self.transitions.iter().cloned().collect(),
        }
    }

    /// Goes on with an exported ledger, live holds and all: nothing of this is use. Whoever holds no longer has to be ended.
    ///
    /// # Errors
    /// When the policy is one that these rules do not know.
    pub fn restore(state: LedgerState) -> Result<Self, PolicyError> {
        let mut ledger = Self {
            policy: Policy::from_words(&state.policy)?,
            holds: state.holds.into_iter().collect(),
            next_id: state.next_id,
            counting: 0,
            last_activity: state.last_activity,
            last_use: state.last_use,
            // The set of holds is about to change, and whoever compares has to see that.
            sequence: state.sequence + 1,
            transitions: state.transitions.into_iter().collect(),
        };
        ledger.counting = ledger.holds.values().filter(|hold| ledger.counts(hold)).count();
        Ok(ledger)
    }

    /// The live holds.
    pub fn ids(&self) -> impl Iterator<Item = HoldId> {
        self.holds.keys().copied()
    }

    /// Starts a hold. Its start is use, unless its class never counts.
    pub fn begin(&mut self, class: HoldClass, origin: impl Into<String>, pid: u32, now: Moment) -> HoldId {
        let id = self.begin_provisional(class, origin, now);
        self.confirm(id, now);
        if let Some(hold) = self.holds.get_mut(&id) {
            hold.pid = pid;
        }
        id
    }

    /// Starts a hold that becomes use only when it is confirmed. It counts while it lives, so that a call on its way in is never missed,
    /// but a call that is refused leaves the idle clock as it was.
    pub fn begin_provisional(&mut self, class: HoldClass, origin: impl Into<String>, now: Moment) -> HoldId {
        let id = HoldId(self.next_id);
        self.next_id += 1;
        let origin = origin.into();
        let hold =
            Hold { class, origin, pid: 0, started: now, last_progress: now, bytes: 0, provisional: true };
        self.sequence += 1;
        self.counting += usize::from(self.counts(&hold));
        self.holds.insert(id, hold);
        id
    }

    /// Makes a provisional hold use.
    pub fn confirm(&mut self, id: HoldId, now: Moment) {
        let Some(mut hold) = self.holds.remove(&id) else { return };
        if hold.provisional {
            self.counting -= usize::from(self.counts(&hold));
            hold.provisional = false;
            self.enter(&hold, now);
        }
        self.holds.insert(id, hold);
    }

    /// A provisional hold counts whatever its class is: its call has not been looked at yet.
    fn counts(&self, hold: &Hold) -> bool {
        match self.policy.counting(hold.class) {
            Counting::WhileHeld => true,
            Counting::OnProgress(_) => hold.provisional,
            Counting::Never => false,
        }
    }

    /// Bytes or events passed. Unknown ids are ignored: the hold ended a moment ago.
    pub fn progress(&mut self, id: HoldId, bytes: u64, now: Moment) {
        let Some(hold) = self.holds.get_mut(&id) else { return };
        hold.bytes = hold.bytes.saturating_add(bytes);
        hold.last_progress = now;
        if let Counting::OnProgress(linger) = self.policy.counting(hold.class)
            && !hold.provisional
        {
            self.last_activity = self.last_activity.max(now + linger);
        }
    }

    /// Moves a hold to another class: a command's last client went, or one came back.
    pub fn reclass(&mut self, id: HoldId, class: HoldClass, now: Moment) {
        self.confirm(id, now);
        let Some(mut hold) = self.holds.remove(&id) else { return };
        if hold.class != class {
            self.leave(&hold, now);
            hold.class = class;
            self.enter(&hold, now);
        }
        self.holds.insert(id, hold);
    }

    /// Says which process a hold is about, once that is known.
    pub fn name_process(&mut self, id: HoldId, pid: u32) {
        if let Some(hold) = self.holds.get_mut(&id) {
            hold.pid = pid;
        }
    }

    /// Ends a hold. The end of one that counted while held is use.
    pub fn end(&mut self, id: HoldId, now: Moment) {
        if let Some(hold) = self.holds.remove(&id) {
            self.leave(&hold, now);
        }
        if self.holds.is_empty() {
            // An empty map keeps room for eleven holds; an idle sandbox needs none.
            self.holds = BTreeMap::new();
        }
    }

    /// Use without duration: an SDK's `connect`.
    pub fn touch(&mut self, class: HoldClass, origin: impl Into<String>, now: Moment) {
        let linger = match self.policy.counting(class) {
            Counting::Never => return,
            Counting::OnProgress(linger) => linger,
            Counting::WhileHeld => Duration::ZERO,
        };
        self.last_activity = self.last_activity.max(now + linger);
        let origin = origin.into();
        self.note(now, format!("{class} {origin}"));
        self.last_use = Some(LastUse { class, origin });
        self.sequence += 1;
    }

    /// Zero while a counting hold lives.
    pub fn idle_for(&self, now: Moment) -> Duration {
        if self.counting > 0 { Duration::ZERO } else { now.since(self.last_activity) }
    }

    /// How many live holds count from start to end.
    pub fn counting(&self) -> usize {
        self.counting
    }

    pub fn last_activity(&self) -> Moment {
        self.last_activity
    }

    pub fn last_use(&self) -> Option<&LastUse> {
        self.last_use.as_ref()
    }

    /// Grows with each change of the set of holds.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Counts by other rules from now on. What counted so far was use until now.
    pub fn set_policy(&mut self, policy: Policy, now: Moment) {
        if self.policy == policy {
            return;
        }
        if self.counting > 0 {
            self.last_activity = self.last_activity.max(now);
        }
        self.policy = policy;
        self.counting = self.holds.values().filter(|hold| self.counts(hold)).count();
        self.sequence += 1;
        let words: Vec<_> =
            self.policy.words().into_iter().map(|(class, word)| format!("{class}={word}")).collect();
        self.note(
            now,
            format!("policy: {}", if words.is_empty() { "default".to_owned() } else { words.join(" ") }),
        );
    }

    /// Whether a live hold keeps the sandbox at this moment.
    pub fn keeps(&self, hold: &Hold, now: Moment) -> bool {
        match self.policy.counting(hold.class) {
            Counting::OnProgress(linger) => hold.provisional || now < hold.last_progress + linger,
            Counting::WhileHeld => true,
            Counting::Never => false,
        }
    }

    /// The processes whose progress has to be looked for, because they may work without a byte of output.
    pub fn sampled(&self) -> impl Iterator<Item = (HoldId, u32)> {
        let sampled = |hold: &Hold| {
            matches!(hold.class, HoldClass::Command | HoldClass::Detached)
                && matches!(self.policy.counting(hold.class), Counting::OnProgress(_))
        };
        self.holds.iter().filter(move |(_, hold)| sampled(hold)).map(|(id, hold)| (*id, hold.pid))
    }

    /// The live holds, those that count first, then the oldest first.
    pub fn by_blame(&self) -> Vec<(HoldId, &Hold)> {
        let mut holds: Vec<_> = self.holds.iter().map(|(id, hold)| (*id, hold)).collect();
        holds.sort_by_key(|(id, hold)| (self.policy.counting(hold.class) != Counting::WhileHeld, *id));
        holds
    }

    pub fn transitions(&self) -> impl Iterator<Item = &Transition> {
        self.transitions.iter()
    }

    /// Remembers a line for the explain view.
    pub fn note(&mut self, now: Moment, what: impl Into<String>) {
        if self.transitions.len() == REMEMBERED_TRANSITIONS {
            self.transitions.pop_front();
        }
        self.transitions.push_back(Transition { at: now, what: what.into() });
    }

    fn enter(&mut self, hold: &Hold, now: Moment) {
        self.sequence += 1;
        match self.policy.counting(hold.class) {
            Counting::WhileHeld => {
                self.counting += 1;
                self.last_activity = self.last_activity.max(now);
                if self.counting == 1 {
                    self.note(now, format!("busy: {} {}", hold.class, hold.origin));
                }
            }
            Counting::OnProgress(linger) => {
                self.last_activity = self.last_activity.max(now + linger);
                self.note(now, format!("opened: {} {}", hold.class, hold.origin));
                self.last_use = Some(LastUse { class: hold.class, origin: hold.origin.clone() });
            }
            Counting::Never => {}
        }
    }

    fn leave(&mut self, hold: &Hold, now: Moment) {
        self.sequence += 1;
        if !self.counts(hold) {
            return;
        }
        self.counting -= 1;
        if hold.provisional {
            return;
        }
        self.last_activity = self.last_activity.max(now);
        self.last_use = Some(LastUse { class: hold.class, origin: hold.origin.clone() });
        if self.counting == 0 {
            self.note(now, format!("idle after: {} {}", hold.class, hold.origin));
        }
    }
}

#[cfg(test)]
mod tests;
