//! Another policy on a recorded trace: when the sandbox would have been released, what that saves and what it cuts.
//!
//! The guest's side is known at its reports (each change of its holds, at most two a second, and each question before a release), so
//! what a hold did in between is known at the next report. After the recorded end nothing is known: a policy that would have kept the
//! sandbox longer is told from there on as if nothing more had happened.

use std::collections::BTreeMap;
use std::time::Duration;

use guestd_idle::{HoldClass, HoldId, Ledger, Moment, Policy};
use serde::Serialize;

use super::{Event, GuestHold, Line};

/// Why a trace cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    #[error("line {line}: {source}")]
    Json { line: usize, source: serde_json::Error },
    #[error("the trace does not begin with a line that says \"started\"")]
    NoStart,
    #[error("the sandbox had no idle timeout; say one with --idle-timeout")]
    NoIdleTimeout,
}

/// What came of it. Times are seconds after the start.
#[derive(Clone, Debug, Serialize, PartialEq)]
pub struct Outcome {
    pub sandbox: String,
    /// The recorded end, and why; none when the trace breaks off.
    pub recorded_end_s: Option<f64>,
    pub recorded_reason: Option<String>,
    /// When the policy would have ended it, and why: idle or hard end.
    pub end_s: f64,
    pub reason: String,
    /// How much shorter it would have lived; negative when longer.
    pub saved_s: f64,
    /// What was under way when the policy would have ended it, or began later.
    pub cut: Vec<Cut>,
    /// The policy's end is after what was recorded: more may have happened.
    pub beyond_the_trace: bool,
}

/// Work that another policy would have cut.
#[derive(Clone, Debug, Serialize, PartialEq)]
pub struct Cut {
    pub class: String,
    pub origin: String,
    pub began_s: f64,
    /// None when it lived to the end of the trace.
    pub ended_s: Option<f64>,
}

/// Reads a trace.
///
/// # Errors
/// With the number of the first line that makes no sense.
pub fn parse(text: &str) -> Result<Vec<Line>, ReplayError> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(index, line)| {
            serde_json::from_str(line).map_err(|source| ReplayError::Json { line: index + 1, source })
        })
        .collect()
}

/// A hold of either side, as the trace shows it.
struct Seen {
    id: HoldId,
    cut: usize,
}

struct World {
    ledger: Ledger,
    host: BTreeMap<u64, Seen>,
    guest: BTreeMap<u64, (Seen, HoldClass)>,
    /// Everything that was ever held.
    all: Vec<Cut>,
}

fn at(millis: u64) -> Moment {
    Moment::from_millis(millis)
}

fn seconds(millis: u64) -> f64 {
    millis as f64 / 1000.0
}

/// Replays a trace under `policy`, with the recorded idle timeout or another.
///
/// # Errors
/// When the trace has no start, or there is no idle timeout.
pub fn replay(
    lines: &[Line],
    policy: Policy,
    idle_timeout: Option<Duration>,
) -> Result<Outcome, ReplayError> {
    let Some(Line { event: Event::Started { sandbox, idle_timeout_ms, end_ms, .. }, .. }) = lines.first()
    else {
        return Err(ReplayError::NoStart);
    };
    let idle_timeout = idle_timeout.or(idle_timeout_ms.map(Duration::from_millis));
    let idle_timeout = idle_timeout.ok_or(ReplayError::NoIdleTimeout)?;
    let ledger = Ledger::new(policy, at(0));
    let mut world = World { ledger, host: BTreeMap::new(), guest: BTreeMap::new(), all: Vec::new() };
    let mut hard_end = *end_ms;
    let mut end: Option<(u64, &str)> = None;
    for (index, line) in lines.iter().enumerate().skip(1) {
        // What the next report says of the time before it has to be known before a release is called.
        let until = look_back(&lines[index..]);
        if end.is_none() {
            end = world.over(idle_timeout, hard_end, until.unwrap_or(line.at_ms).min(line.at_ms));
        }
        world.take(line);
        if let Event::End { end_ms } = line.event {
            hard_end = end_ms;
        }
    }
    let last = lines.last().map_or(0, |line| line.at_ms);
    if end.is_none() {
        end = world.over(idle_timeout, hard_end, last);
    }
    let recorded = lines.iter().rev().find_map(|line| match &line.event {
        Event::Ended { reason } => Some((line.at_ms, reason.clone())),
        _ => None,
    });
    let beyond = end.is_none();
    let (end_ms, reason) = end.unwrap_or_else(|| world.later(idle_timeout, hard_end));
    let cut = world.all.into_iter().filter(|hold| hold.ended_s.is_none_or(|ended| ended > seconds(end_ms)));
    Ok(Outcome {
        sandbox: sandbox.clone(),
        saved_s: seconds(recorded.as_ref().map_or(last, |(at, _)| *at)) - seconds(end_ms),
        cut: if beyond { Vec::new() } else { cut.collect() },
        recorded_end_s: recorded.as_ref().map(|(at, _)| seconds(*at)),
        recorded_reason: recorded.map(|(_, reason)| reason),
        end_s: seconds(end_ms),
        reason: reason.to_owned(),
        beyond_the_trace: beyond,
    })
}

/// The earliest moment that the next report tells of.
fn look_back(rest: &[Line]) -> Option<u64> {
    rest.iter().find_map(|line| match &line.event {
        Event::Report { idle_for_ms, holds, .. } => {
            let ages = holds.iter().map(|hold| hold.age_ms.min(hold.since_progress_ms));
            let back = ages.chain([*idle_for_ms]).max().unwrap_or(0);
            Some(line.at_ms.saturating_sub(back))
        }
        _ => None,
    })
}

impl World {
    /// The end, if it is before `now`.
    fn over(&self, idle_timeout: Duration, hard_end: u64, now: u64) -> Option<(u64, &'static str)> {
        if self.ledger.counting() == 0 {
            let due = (self.ledger.last_activity() + idle_timeout).as_nanos() / 1_000_000;
            if due < now && due <= hard_end {
                return Some((due, "idle"));
            }
        }
        (hard_end < now).then_some((hard_end, "hard end"))
    }

    /// The end if nothing more happens.
    fn later(&self, idle_timeout: Duration, hard_end: u64) -> (u64, &'static str) {
        let due = (self.ledger.last_activity() + idle_timeout).as_nanos() / 1_000_000;
        if self.ledger.counting() == 0 && due < hard_end { (due, "idle") } else { (hard_end, "hard end") }
    }

    fn take(&mut self, line: &Line) {
        let now = at(line.at_ms);
        match &line.event {
            Event::Hold { id, class, origin } => {
                let Some(class) = HoldClass::from_name(class) else { return };
                let hold = self.ledger.begin_provisional(class, origin.as_str(), now);
                let cut = self.begin(class.name(), origin, line.at_ms);
                self.host.insert(*id, Seen { id: hold, cut });
            }
            Event::Confirmed { id } => {
                if let Some(seen) = self.host.get(id) {
                    self.ledger.confirm(seen.id, now);
                }
            }
            Event::Reclassed { id, class } => {
                if let (Some(seen), Some(class)) = (self.host.get(id), HoldClass::from_name(class)) {
                    self.ledger.reclass(seen.id, class, now);
                    self.all[seen.cut].class = class.name().to_owned();
                }
            }
            Event::Progress { id } => {
                if let Some(seen) = self.host.get(id) {
                    self.ledger.progress(seen.id, 0, now);
                }
            }
            Event::Dropped { id } => {
                if let Some(seen) = self.host.remove(id) {
                    self.ledger.end(seen.id, now);
                    self.all[seen.cut].ended_s = Some(seconds(line.at_ms));
                }
            }
            Event::Touched { class, origin } => {
                if let Some(class) = HoldClass::from_name(class) {
                    self.ledger.touch(class, origin.as_str(), now);
                }
            }
            Event::Report { idle_for_ms, last_class, holds } => {
                self.report(line.at_ms, *idle_for_ms, last_class, holds);
            }
            Event::Started { .. } | Event::End { .. } | Event::Missing { .. } | Event::Ended { .. } => {}
        }
    }

    fn report(&mut self, now: u64, idle_for_ms: u64, last_class: &str, holds: &[GuestHold]) {
        let gone: Vec<u64> =
            self.guest.keys().filter(|id| !holds.iter().any(|hold| hold.id == **id)).copied().collect();
        for id in gone {
            if let Some((seen, _)) = self.guest.remove(&id) {
                self.ledger.end(seen.id, at(now));
                self.all[seen.cut].ended_s = Some(seconds(now));
            }
        }
        for hold in holds {
            let Some(class) = HoldClass::from_name(&hold.class) else { continue };
            let began = now.saturating_sub(hold.age_ms);
            if !self.guest.contains_key(&hold.id) {
                let id = self.ledger.begin(class, hold.origin.as_str(), 0, at(began));
                let cut = self.begin(class.name(), &hold.origin, began);
                self.guest.insert(hold.id, (Seen { id, cut }, class));
            }
            let Some((seen, known)) = self.guest.get_mut(&hold.id) else { continue };
            if *known != class {
                self.ledger.reclass(seen.id, class, at(now));
                self.all[seen.cut].class = class.name().to_owned();
                *known = class;
            }
            self.ledger.progress(seen.id, 0, at(now.saturating_sub(hold.since_progress_ms)));
        }
        // A call that came and went between two reports left only this.
        if let Some(class) = HoldClass::from_name(last_class)
            && holds.iter().all(|hold| hold.class != last_class)
        {
            self.ledger.touch(class, "guest", at(now.saturating_sub(idle_for_ms)));
        }
    }

    fn begin(&mut self, class: &str, origin: &str, began: u64) -> usize {
        let (class, origin) = (class.to_owned(), origin.to_owned());
        self.all.push(Cut { class, origin, began_s: seconds(began), ended_s: None });
        self.all.len() - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guestd_idle::Counting;

    fn started() -> Line {
        let event = Event::Started {
            sandbox: "sb".to_owned(),
            idle_timeout_ms: Some(60_000),
            end_ms: 3_600_000,
            policy: BTreeMap::new(),
        };
        Line { at_ms: 0, event }
    }

    fn report(at_ms: u64, idle_for_ms: u64, holds: &[(u64, &str, u64, u64)]) -> Line {
        let holds = holds.iter().map(|(id, class, age_ms, since_progress_ms)| GuestHold {
            id: *id,
            class: (*class).to_owned(),
            origin: "train".to_owned(),
            age_ms: *age_ms,
            since_progress_ms: *since_progress_ms,
        });
        let event = Event::Report { idle_for_ms, last_class: String::new(), holds: holds.collect() };
        Line { at_ms, event }
    }

    fn ended(at_ms: u64) -> Line {
        Line { at_ms, event: Event::Ended { reason: "idle".to_owned() } }
    }

    /// A command is started at 1 s, its client goes at 5 s, and the sandbox is released 60 s later.
    fn detached() -> Vec<Line> {
        vec![
            started(),
            report(1_000, 0, &[(1, "command", 0, 0)]),
            report(5_000, 0, &[(1, "detached", 4_000, 0)]),
            report(65_000, 60_000, &[(1, "detached", 64_000, 2_000)]),
            ended(65_150),
        ]
    }

    #[test]
    fn the_recorded_policy_ends_it_when_it_was_ended() {
        let outcome = replay(&detached(), Policy::default(), None).unwrap();
        assert_eq!((outcome.end_s, outcome.reason.as_str()), (65.0, "idle"));
        assert!(outcome.saved_s.abs() < 1.0 && !outcome.beyond_the_trace);
    }

    #[test]
    fn a_policy_that_keeps_detached_commands_would_have_kept_it() {
        let policy = Policy::default().with(HoldClass::Detached, Counting::WhileHeld);
        let outcome = replay(&detached(), policy, None).unwrap();
        assert!(outcome.beyond_the_trace && outcome.end_s > 65.0 && outcome.cut.is_empty(), "{outcome:?}");
        let progress =
            Policy::default().with(HoldClass::Detached, Counting::OnProgress(Duration::from_secs(10)));
        let outcome = replay(&detached(), progress, None).unwrap();
        assert_eq!((outcome.end_s, outcome.beyond_the_trace), (133.0, true), "its last output was at 63 s");
    }

    #[test]
    fn a_shorter_timeout_says_what_it_would_have_cut() {
        let outcome = replay(&detached(), Policy::default(), Some(Duration::from_secs(20))).unwrap();
        assert_eq!(outcome.end_s, 25.0);
        assert_eq!(outcome.cut.len(), 1);
        assert_eq!((outcome.cut[0].class.as_str(), outcome.cut[0].began_s), ("detached", 1.0));
        assert!((outcome.saved_s - 40.15).abs() < 0.001);
    }

    #[test]
    fn a_request_that_was_refused_keeps_nothing_in_the_replay_either() {
        let hold = Event::Hold { id: 9, class: "guest_port".to_owned(), origin: "/".to_owned() };
        let lines = [
            started(),
            Line { at_ms: 30_000, event: hold },
            Line { at_ms: 31_000, event: Event::Dropped { id: 9 } },
            ended(60_150),
        ];
        assert_eq!(replay(&lines, Policy::default(), None).unwrap().end_s, 60.0);
    }

    #[test]
    fn a_broken_trace_names_its_line() {
        let error = parse("{\"at_ms\":0,\"event\":\"ended\",\"reason\":\"x\"}\n{").unwrap_err();
        assert!(error.to_string().starts_with("line 2"), "{error}");
        assert!(matches!(replay(&[], Policy::default(), None), Err(ReplayError::NoStart)));
    }
}
