//! Random schedules of calls, delays, lost and repeated messages, paused machines and killed supervisors against both halves of the rules,
//! in simulated time. No wall clock is in the rules, so a step of one changes nothing.
//!
//! The model is a client, a host with a [`Lifetime`] and a guest with a [`Ledger`] and an [`Admission`]; every message takes a random
//! time and may be lost. What the invariants of the crate forbid is checked when the sandbox ends.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::time::Duration;

use guestd_idle::admission::Entry;
use guestd_idle::lifetime::{Lifetime, Step, Verdict};
use guestd_idle::terms::Asked;
use guestd_idle::{
    Admission, EndReason, GuestReport, HoldClass, HoldId, IdleSettings, Ledger, Limits, Moment, Policy,
};
use proptest::prelude::*;

const IDLE: u64 = 60_000;
const LIMITS: Limits = Limits {
    idle_floor: Duration::from_secs(60),
    max_lifetime: Duration::from_secs(400),
    default_timeout: Duration::from_secs(300),
};

/// One call of a client.
#[derive(Clone, Debug)]
struct Call {
    /// After the start of the schedule, in ms.
    at: u64,
    lasts: u64,
    /// Through the host's proxy, or from inside the guest.
    through_host: bool,
}

#[derive(Clone, Debug)]
struct Schedule {
    calls: Vec<Call>,
    /// The time of each message in turn, in ms, and what becomes of it.
    network: Vec<(u64, Fate)>,
    /// The guest never answers a prepare truthfully.
    liar: bool,
    /// How long before its end the sandbox wants to hear of it, in ms.
    notice: Option<u64>,
    /// When the machine stands still, and for how long, in ms. Its clock stands still as well.
    pauses: Vec<(u64, u64)>,
    /// When hostd is killed and started again: the rules begin anew with what the guest says.
    restarts: Vec<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Arrives,
    Lost,
    Twice,
}

impl Schedule {
    fn plain(calls: Vec<Call>, network: Vec<(u64, Fate)>) -> Self {
        Self { calls, network, liar: false, notice: None, pauses: Vec::new(), restarts: Vec::new() }
    }

    /// How long the machine stood still before `now`.
    fn paused_before(&self, now: u64) -> u64 {
        self.pauses.iter().map(|(at, length)| now.saturating_sub(*at).min(*length)).sum()
    }

    /// When the machine goes on, if it stands still at `now`.
    fn resumes(&self, now: u64) -> Option<u64> {
        self.pauses
            .iter()
            .find(|(at, length)| (*at..at + length).contains(&now))
            .map(|(at, length)| at + length)
    }
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Clone)]
enum Event {
    Arrive(usize),
    AtGuest(usize),
    Done(usize),
    BackAtHost(usize),
    ReportAtHost { sequence: u64, idle_ms: u64, counting: usize, sent: u64 },
    PrepareAtGuest { epoch: u64, idle_ms: u64 },
    AnswerAtHost { epoch: u64, ready: bool, sequence: u64, idle_ms: u64, counting: usize },
    CommitAtGuest(u64),
    AbortAtGuest(u64),
    FenceTimer,
    NotifyAtGuest { idle_ms: Option<u64> },
    RefusalAtHost { sequence: u64, idle_ms: u64, counting: usize },
    Restart,
    Step,
}

impl Event {
    /// What waits while the machine stands still.
    fn in_guest(&self) -> bool {
        matches!(
            self,
            Self::AtGuest(_)
                | Self::Done(_)
                | Self::PrepareAtGuest { .. }
                | Self::CommitAtGuest(_)
                | Self::AbortAtGuest(_)
                | Self::FenceTimer
                | Self::NotifyAtGuest { .. }
        )
    }
}

#[derive(Default, Debug)]
struct Outcome {
    ended_at: u64,
    reason: Option<EndReason>,
    /// Calls that had begun in the guest and had no answer yet when an idle release committed.
    lost: Vec<usize>,
    /// The true end of the last use before the end.
    last_use: u64,
    /// The idle releases that were announced.
    notices: Vec<u64>,
}

struct World {
    now: u64,
    queue: BinaryHeap<Reverse<(u64, u64, Event)>>,
    order: u64,
    network: std::iter::Cycle<std::vec::IntoIter<(u64, Fate)>>,
    schedule: Schedule,
    host: Lifetime,
    ledger: Ledger,
    fence: Admission,
    /// Calls that wait at the fence.
    waiting: Vec<usize>,
    /// When they look again.
    fence_timer: Option<u64>,
    host_holds: HashMap<usize, HoldId>,
    guest_holds: HashMap<usize, HoldId>,
    last_use: u64,
}

fn at(millis: u64) -> Moment {
    Moment::from_millis(millis)
}

impl World {
    fn push(&mut self, delay: u64, event: Event) {
        self.order += 1;
        self.queue.push(Reverse((self.now + delay, self.order, event)));
    }

    /// Sends over the network: after a while, or never.
    fn send(&mut self, event: Event) {
        match self.network.next() {
            Some((delay, Fate::Arrives)) => self.push(delay, event),
            Some((delay, Fate::Twice)) => {
                self.push(delay, event.clone());
                self.push(delay * 3 + 1, event);
            }
            Some((_, Fate::Lost)) | None => {}
        }
    }

    /// The guest's clock, which stands still when the machine does.
    fn guest_now(&self) -> Moment {
        at(self.now - self.schedule.paused_before(self.now))
    }

    /// A proxied call: hyper's stream is reliable, so it takes time but is not lost.
    fn carry(&mut self, event: Event) {
        let delay = self.network.next().map_or(0, |(delay, _)| delay);
        self.push(delay, event);
    }

    fn report(&mut self) {
        let event = Event::ReportAtHost {
            sequence: self.ledger.sequence(),
            idle_ms: self.ledger.idle_for(self.guest_now()).as_millis() as u64,
            counting: self.ledger.counting(),
            sent: self.now,
        };
        self.send(event);
    }

    fn at_guest(&mut self, call: usize, lasts: u64, through_host: bool) {
        let now = self.guest_now();
        match self.fence.enter(now) {
            Entry::Admitted => {
                let hold = self.ledger.begin(HoldClass::Call, "call", 0, now);
                self.guest_holds.insert(call, hold);
                self.report();
                self.push(lasts, Event::Done(call));
            }
            Entry::Wait(until) => {
                self.waiting.push(call);
                let delay = until.since(now).as_millis() as u64;
                // One timer for all that wait: with one each, every round would multiply them.
                if self.fence_timer != Some(self.now + delay) {
                    self.fence_timer = Some(self.now + delay);
                    self.push(delay, Event::FenceTimer);
                }
            }
            Entry::Gone => assert!(!through_host, "a call that the host let through found the guest gone"),
        }
    }
}

fn run(schedule: &Schedule) -> Outcome {
    let terms = Asked::parse(None, Some("60"), &LIMITS).unwrap().starting(at(0), &LIMITS);
    let settings =
        IdleSettings { notice: schedule.notice.map(Duration::from_millis), ..IdleSettings::default() };
    let mut world = World {
        schedule: schedule.clone(),
        now: 0,
        queue: BinaryHeap::new(),
        order: 0,
        network: schedule.network.clone().into_iter().cycle(),
        host: Lifetime::new(terms, &settings, 0, at(0)),
        ledger: Ledger::new(Policy::default(), at(0)),
        fence: Admission::default(),
        waiting: Vec::new(),
        fence_timer: None,
        host_holds: HashMap::new(),
        guest_holds: HashMap::new(),
        last_use: 0,
    };
    for (index, call) in schedule.calls.iter().enumerate() {
        world.push(call.at, Event::Arrive(index));
    }
    for restart in &schedule.restarts {
        world.push(*restart, Event::Restart);
    }
    world.push(0, Event::Step);
    let mut outcome = Outcome::default();
    while let Some(Reverse((time, _, event))) = world.queue.pop() {
        world.now = time;
        let now = at(time);
        if event.in_guest()
            && let Some(resumes) = schedule.resumes(time)
        {
            world.push(resumes - time, event);
            continue;
        }
        let guest_now = world.guest_now();
        match event {
            Event::Arrive(index) => {
                let call = &schedule.calls[index];
                if !call.through_host {
                    world.push(0, Event::AtGuest(index));
                } else if let Ok(hold) = world.host.admit(HoldClass::Call, "call", now) {
                    world.host_holds.insert(index, hold);
                    world.carry(Event::AtGuest(index));
                }
            }
            Event::AtGuest(index) => {
                let call = &schedule.calls[index];
                world.at_guest(index, call.lasts, call.through_host);
            }
            Event::Done(index) => {
                if let Some(hold) = world.guest_holds.remove(&index) {
                    world.ledger.end(hold, guest_now);
                    world.last_use = time;
                    world.report();
                }
                if world.host_holds.contains_key(&index) {
                    world.carry(Event::BackAtHost(index));
                }
            }
            Event::BackAtHost(index) => {
                if let Some(hold) = world.host_holds.remove(&index) {
                    world.host.confirm(hold, now);
                    world.host.release_hold(hold, now);
                    world.last_use = time;
                }
            }
            Event::ReportAtHost { sequence, idle_ms, counting, sent } => {
                let _ = sent;
                let idle_for = Duration::from_millis(idle_ms);
                world.host.report(GuestReport { sequence, idle_for, counting }, now);
            }
            Event::PrepareAtGuest { epoch, idle_ms } => {
                let closed = world.fence.prepare(epoch, guest_now);
                let idle = world.ledger.idle_for(guest_now).as_millis() as u64;
                let ready = if schedule.liar { false } else { closed && idle >= idle_ms };
                if closed && !ready {
                    world.fence.abort(epoch);
                }
                let (sequence, counting) = (world.ledger.sequence(), world.ledger.counting());
                world.send(Event::AnswerAtHost { epoch, ready, sequence, idle_ms: idle, counting });
            }
            Event::AnswerAtHost { epoch, ready, sequence, idle_ms, counting } => {
                let report = GuestReport { sequence, idle_for: Duration::from_millis(idle_ms), counting };
                match world.host.answer(epoch, ready, report, now) {
                    Verdict::Commit => {
                        outcome.lost.extend(world.guest_holds.keys());
                        outcome.lost.extend(world.host_holds.keys());
                        world.send(Event::CommitAtGuest(epoch));
                    }
                    Verdict::Abort => world.send(Event::AbortAtGuest(epoch)),
                }
            }
            Event::CommitAtGuest(epoch) => {
                world.fence.commit(epoch, guest_now);
            }
            Event::AbortAtGuest(epoch) => {
                world.fence.abort(epoch);
                world.push(0, Event::FenceTimer);
            }
            Event::FenceTimer => {
                world.fence_timer = None;
                for index in std::mem::take(&mut world.waiting) {
                    let call = &schedule.calls[index];
                    world.at_guest(index, call.lasts, call.through_host);
                }
            }
            Event::NotifyAtGuest { idle_ms } => {
                let idle = world.ledger.idle_for(guest_now).as_millis() as u64;
                if schedule.liar || idle_ms.is_some_and(|asked| idle < asked) {
                    let (sequence, counting) = (world.ledger.sequence(), world.ledger.counting());
                    world.send(Event::RefusalAtHost { sequence, idle_ms: idle, counting });
                }
            }
            Event::RefusalAtHost { sequence, idle_ms, counting } => {
                let idle_for = Duration::from_millis(idle_ms);
                world.host.refuse_notice(GuestReport { sequence, idle_for, counting }, now);
            }
            Event::Restart => {
                // What it saw last is in a file. The calls that it proxied are cut off with it; the guest goes on with what it began.
                let report = match schedule.resumes(time) {
                    // A machine that stands still says nothing.
                    Some(_) => GuestReport { sequence: 0, idle_for: Duration::ZERO, counting: 0 },
                    None => GuestReport {
                        sequence: world.ledger.sequence(),
                        idle_for: world.ledger.idle_for(guest_now),
                        counting: world.ledger.counting(),
                    },
                };
                let host = world.host.host_ledger();
                let used = if host.counting() > 0 { now } else { host.last_activity() };
                let (terms, epoch) = (*world.host.terms(), 1_000_000 + time);
                world.host = Lifetime::adopt(terms, &settings, epoch, report, Some(used), now);
                world.host_holds.clear();
            }
            Event::Step => {}
        }
        match world.host.step(now) {
            Step::Wait(until) => {
                let delay = until.since(now).as_nanos().div_ceil(1_000_000) as u64;
                world.push(delay, Event::Step);
            }
            Step::Prepare { epoch, idle_for } => {
                world.send(Event::PrepareAtGuest { epoch, idle_ms: idle_for.as_millis() as u64 });
                world.push(0, Event::Step);
            }
            Step::Notify { reason, ends_in, idle_for } => {
                assert!(schedule.notice.is_some(), "nobody asked for notice");
                if reason == EndReason::Idle {
                    outcome.notices.push(time + ends_in.as_millis() as u64);
                }
                world.send(Event::NotifyAtGuest { idle_ms: idle_for.map(|idle| idle.as_millis() as u64) });
                world.push(0, Event::Step);
            }
            Step::End(reason) => {
                outcome.ended_at = time;
                outcome.reason = Some(reason);
                outcome.last_use = world.last_use;
                return outcome;
            }
        }
    }
    panic!("the sandbox never ended");
}

fn calls() -> impl Strategy<Value = Vec<Call>> {
    let call = (0u64..200_000, prop_oneof![0u64..500, 0u64..90_000], any::<bool>())
        .prop_map(|(at, lasts, through_host)| Call { at, lasts, through_host });
    // Calls around the release are what matters: a share of them is aimed at it.
    let aimed = (0u64..4_000, 0u64..3_000, any::<bool>()).prop_map(|(offset, lasts, through_host)| Call {
        at: IDLE - 1_000 + offset,
        lasts,
        through_host,
    });
    prop::collection::vec(prop_oneof![2 => call, 3 => aimed], 0..8)
}

fn network(slowest: u64, lossy: bool) -> impl Strategy<Value = Vec<(u64, Fate)>> {
    let fate = if lossy {
        prop_oneof![6 => Just(Fate::Arrives), 2 => Just(Fate::Lost), 1 => Just(Fate::Twice)].boxed()
    } else {
        Just(Fate::Arrives).boxed()
    };
    prop::collection::vec((0..=slowest, fate), 1..40)
}

fn notice() -> impl Strategy<Value = Option<u64>> {
    prop_oneof![Just(None), (1u64..=60).prop_map(|seconds| Some(seconds * 1000))]
}

fn pauses() -> impl Strategy<Value = Vec<(u64, u64)>> {
    let pause = (0u64..200_000, prop_oneof![1u64..4_000, 1u64..60_000]);
    prop::collection::vec(pause, 0..3).prop_map(|mut pauses| {
        pauses.sort_unstable();
        // One after the other: a machine that stands still cannot be paused.
        let mut end = 0;
        pauses.retain(|(at, length)| {
            let apart = *at >= end;
            end = if apart { at + length } else { end };
            apart
        });
        pauses
    })
}

/// How many schedules each property sees; `PROPTEST_CASES` changes it.
fn cases() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(26_000);
    ProptestConfig { cases, max_shrink_iters: 20_000, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn no_accepted_call_is_lost_whatever_the_network_does(
        calls in calls(), network in network(2_500, true), notice in notice(),
    ) {
        let outcome = run(&Schedule { notice, ..Schedule::plain(calls, network) });
        if outcome.reason == Some(EndReason::Idle) {
            prop_assert!(outcome.lost.is_empty(), "{outcome:?}");
            prop_assert!(outcome.ended_at >= outcome.last_use + IDLE, "{outcome:?}");
        }
        prop_assert!(outcome.ended_at <= 401_000);
    }

    #[test]
    fn an_idle_sandbox_is_released_within_a_second_on_a_working_network(
        calls in calls(), network in network(100, false), notice in notice(),
    ) {
        let outcome = run(&Schedule { notice, ..Schedule::plain(calls, network) });
        if outcome.reason == Some(EndReason::Idle) {
            prop_assert!(outcome.lost.is_empty(), "{outcome:?}");
            let idle = outcome.ended_at - outcome.last_use;
            prop_assert!((IDLE..=IDLE + 1_000).contains(&idle), "idle for {idle}: {outcome:?}");
            if notice.is_some() {
                let told = outcome.notices.last().is_some_and(|told| told.abs_diff(outcome.ended_at) <= 2_000);
                prop_assert!(told, "released without notice: {outcome:?}");
            }
        } else {
            prop_assert_eq!(outcome.reason, Some(EndReason::Lifetime));
            prop_assert!(outcome.last_use + IDLE + 1_000 >= 400_000, "{:?}", outcome);
        }
    }

    #[test]
    fn a_machine_that_stands_still_and_a_supervisor_that_is_killed_lose_no_call(
        calls in calls(),
        network in network(2_500, true),
        pauses in pauses(),
        restarts in prop::collection::vec(0u64..200_000, 0..3),
    ) {
        let outcome = run(&Schedule { pauses, restarts, ..Schedule::plain(calls, network) });
        if outcome.reason == Some(EndReason::Idle) {
            prop_assert!(outcome.lost.is_empty(), "{outcome:?}");
            prop_assert!(outcome.ended_at >= outcome.last_use + IDLE, "{outcome:?}");
        }
        prop_assert!(outcome.ended_at <= 401_000);
    }

    #[test]
    fn a_lying_guest_gains_nothing_beyond_the_hard_end(
        calls in calls(), network in network(2_500, true), notice in notice(),
    ) {
        let outcome = run(&Schedule { liar: true, notice, ..Schedule::plain(calls, network) });
        prop_assert!(outcome.ended_at <= 401_000, "{outcome:?}");
    }
}
