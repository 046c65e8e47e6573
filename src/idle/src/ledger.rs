//! Holds: what keeps a sandbox in use, and since when nothing does.
//!
//! Both sides keep a ledger: the guest for its calls, commands and transfers, the host for the requests that it is proxying.
//! The ledger knows nothing of releases; [`crate::admission`] and [`crate::lifetime`] ask it.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Moment;
use crate::policy::{Counting, Policy};

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

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HoldId(u64);

impl HoldId {
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// One live hold.
#[derive(Clone, Debug)]
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
#[derive(Clone, Debug)]
pub struct Transition {
    pub at: Moment,
    pub what: String,
}

/// The last use that ended, for the explain view and the tombstone.
#[derive(Clone, Debug)]
pub struct LastUse {
    pub class: HoldClass,
    pub origin: String,
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
mod tests {
    use super::*;

    fn at(millis: u64) -> Moment {
        Moment::from_millis(millis)
    }

    fn ledger() -> Ledger {
        Ledger::new(Policy::default(), at(0))
    }

    #[test]
    fn a_long_call_is_not_idle_however_long_it_takes() {
        let mut ledger = ledger();
        let call = ledger.begin(HoldClass::Call, "/x", 0, at(10));
        assert_eq!(ledger.idle_for(at(1_000_000)), Duration::ZERO);
        ledger.end(call, at(1_000_000));
        assert_eq!(ledger.idle_for(at(1_000_500)), Duration::from_millis(500));
    }

    #[test]
    fn an_open_terminal_without_bytes_is_idle() {
        let mut ledger = ledger();
        let terminal = ledger.begin(HoldClass::Terminal, "bash", 7, at(100));
        assert_eq!(ledger.idle_for(at(1_100)), Duration::from_secs(1));
        ledger.progress(terminal, 1, at(1_100));
        assert_eq!(ledger.idle_for(at(1_200)), Duration::from_millis(100));
        ledger.end(terminal, at(5_000));
        assert_eq!(ledger.idle_for(at(5_100)), Duration::from_millis(4_000), "closing is not use");
    }

    #[test]
    fn a_detached_command_does_not_keep_the_sandbox() {
        let mut ledger = ledger();
        let command = ledger.begin(HoldClass::Command, "sleep", 3, at(0));
        ledger.reclass(command, HoldClass::Detached, at(2_000));
        assert_eq!(ledger.idle_for(at(3_000)), Duration::from_secs(1));
        ledger.reclass(command, HoldClass::Command, at(4_000));
        assert_eq!(ledger.idle_for(at(9_000)), Duration::ZERO, "a client came back");
    }

    #[test]
    fn a_policy_can_keep_detached_commands() {
        let policy = Policy::default().with(HoldClass::Detached, Counting::WhileHeld);
        let mut ledger = Ledger::new(policy, at(0));
        let command = ledger.begin(HoldClass::Detached, "train", 3, at(0));
        assert_eq!(ledger.idle_for(at(9_000)), Duration::ZERO);
        ledger.end(command, at(9_000));
        assert_eq!(ledger.idle_for(at(9_001)), Duration::from_millis(1));
    }

    #[test]
    fn a_detached_command_under_progress_counts_for_so_long_after_each_movement() {
        let linger = Duration::from_secs(10);
        let policy = Policy::default().with(HoldClass::Detached, Counting::OnProgress(linger));
        let mut ledger = Ledger::new(policy, at(0));
        let command = ledger.begin(HoldClass::Command, "train", 3, at(0));
        ledger.reclass(command, HoldClass::Detached, at(1_000));
        assert_eq!(ledger.sampled().collect::<Vec<_>>(), [(command, 3)]);
        ledger.progress(command, 0, at(5_000));
        assert_eq!(ledger.idle_for(at(15_000)), Duration::ZERO, "it moved ten seconds ago");
        assert_eq!(ledger.idle_for(at(17_000)), Duration::from_secs(2), "it hangs");
        let hold = ledger.by_blame()[0].1.clone();
        assert!(ledger.keeps(&hold, at(14_999)) && !ledger.keeps(&hold, at(15_000)));
        ledger.end(command, at(30_000));
        assert_eq!(ledger.idle_for(at(30_000)), Duration::from_secs(15), "its end is no use by itself");
    }

    #[test]
    fn a_new_policy_counts_what_lives_already() {
        let mut ledger = ledger();
        ledger.begin(HoldClass::Detached, "train", 3, at(0));
        ledger.begin(HoldClass::Code, "cell", 0, at(0));
        assert_eq!(ledger.counting(), 1);
        let policy = Policy::default()
            .with(HoldClass::Detached, Counting::WhileHeld)
            .with(HoldClass::Code, Counting::WhileHeld);
        ledger.set_policy(policy, at(5_000));
        assert_eq!((ledger.counting(), ledger.idle_for(at(9_000))), (2, Duration::ZERO));
        let none = Policy::default()
            .with(HoldClass::Detached, Counting::Never)
            .with(HoldClass::Code, Counting::Never);
        ledger.set_policy(none, at(10_000));
        assert_eq!((ledger.counting(), ledger.idle_for(at(11_000))), (0, Duration::from_secs(1)));
    }

    #[test]
    fn a_call_that_is_refused_does_not_keep_the_sandbox() {
        for class in [HoldClass::Call, HoldClass::Transfer] {
            let mut ledger = ledger();
            let stranger = ledger.begin_provisional(class, "stranger", at(5_000));
            assert_eq!(ledger.idle_for(at(6_000)), Duration::ZERO, "it may be somebody who may");
            ledger.progress(stranger, 10, at(6_000));
            ledger.end(stranger, at(7_000));
            assert_eq!((ledger.counting(), ledger.idle_for(at(8_000))), (0, Duration::from_secs(8)));
            let owner = ledger.begin_provisional(class, "owner", at(9_000));
            ledger.confirm(owner, at(9_000));
            ledger.end(owner, at(9_500));
            assert!(ledger.idle_for(at(10_000)) <= Duration::from_secs(1));
            assert_eq!(ledger.counting(), 0);
        }
    }

    #[test]
    fn ending_a_hold_twice_counts_once() {
        let mut ledger = ledger();
        let first = ledger.begin(HoldClass::Call, "a", 0, at(0));
        let second = ledger.begin(HoldClass::Call, "b", 0, at(0));
        ledger.end(first, at(1));
        ledger.end(first, at(2));
        assert_eq!(ledger.counting(), 1);
        ledger.end(second, at(3));
        assert_eq!(ledger.counting(), 0);
    }

    #[test]
    fn a_clock_that_steps_back_does_not_shorten_the_last_use() {
        let mut ledger = ledger();
        ledger.touch(HoldClass::Connect, "sdk", at(500));
        ledger.touch(HoldClass::Connect, "sdk", at(100));
        assert_eq!(ledger.last_activity(), at(500));
    }

    #[test]
    fn the_history_keeps_the_newest_lines_only() {
        let mut ledger = ledger();
        for n in 0..100 {
            ledger.note(at(n), format!("{n}"));
        }
        let lines: Vec<_> = ledger.transitions().map(|t| t.what.clone()).collect();
        assert_eq!(lines.len(), REMEMBERED_TRANSITIONS);
        assert_eq!(lines.last().map(String::as_str), Some("99"));
    }

    #[test]
    fn every_class_has_a_name_of_its_own() {
        for class in HoldClass::ALL {
            assert_eq!(HoldClass::from_name(class.name()), Some(class));
        }
    }

    #[test]
    fn blame_lists_what_counts_first() {
        let mut ledger = ledger();
        ledger.begin(HoldClass::Terminal, "t", 0, at(0));
        ledger.begin(HoldClass::Command, "c", 0, at(1));
        let classes: Vec<_> = ledger.by_blame().iter().map(|(_, hold)| hold.class).collect();
        assert_eq!(classes, [HoldClass::Command, HoldClass::Terminal]);
    }
}
