//! Why a sandbox is alive, or why it is gone (DESIGN.md section 4, rule 7).

use std::collections::BTreeMap;
use std::time::Duration;

use guestd_idle::{EndReason, IdleSettings};
use guestd_protocol::wire::activity::v1 as wire;
use serde::{Deserialize, Serialize};

use super::Sandbox;
use crate::clock;
use crate::store::Tombstone;

/// The answer of `GET /sandboxes/{id}/idle`. Times are seconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Explanation {
    pub sandbox_id: String,
    /// running, releasing or ended.
    pub state: String,
    pub idle_timeout_s: Option<f64>,
    pub idle_for_s: f64,
    /// None while in use, or without an idle timeout.
    pub releases_in_s: Option<f64>,
    /// Until the hard end; 0 when it has ended.
    pub ends_in_s: f64,
    /// Those that keep it alive first.
    pub holds: Vec<HoldView>,
    /// Oldest first.
    pub transitions: Vec<TransitionView>,
    pub ended: Option<EndView>,
    /// What counts differently from the default in this sandbox: `class -> word`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub policy: BTreeMap<String, String>,
    /// The notice before the end that the sandbox asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notice_s: Option<u64>,
    /// A session's client counts as gone after this, unless it is heard of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_ends_in_s: Option<f64>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HoldView {
    pub class: String,
    /// Whether it keeps the sandbox alive by being there.
    pub counts: bool,
    /// What holds: a request's path, a command line.
    pub origin: String,
    /// The guest's process, or 0.
    pub pid: u32,
    pub age_s: f64,
    pub since_progress_s: f64,
    pub bytes: u64,
    /// Who knows of it: `host` or `guest`.
    pub side: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TransitionView {
    /// RFC 3339.
    pub at: String,
    pub what: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EndView {
    /// RFC 3339.
    pub at: String,
    pub reason: EndReason,
    pub detail: Option<String>,
    pub lived_s: f64,
    pub idle_for_s: f64,
    pub last_holds: Vec<HoldView>,
}

/// Explains a live sandbox from what the host knows. Asks the guest nothing: whoever looks must not disturb.
pub fn live(sandbox: &Sandbox) -> Explanation {
    let now = clock::now();
    let holds = holds(sandbox);
    let settings = IdleSettings::parse(&sandbox.record.metadata).unwrap_or_default();
    let lifetime = sandbox.lifetime();
    // It may have ended a moment ago: who is told so is told why, though its tombstone is still being written.
    let ended = lifetime.ended().map(|(reason, at)| EndView {
        at: clock::rfc3339(clock::wall_ms_of(at)),
        reason,
        detail: None,
        lived_s: at.since(lifetime.terms().started).as_secs_f64(),
        idle_for_s: lifetime.idle_for(at).as_secs_f64(),
        last_holds: holds.clone(),
    });
    Explanation {
        sandbox_id: sandbox.record.id.clone(),
        state: lifetime.state_name().to_owned(),
        idle_timeout_s: lifetime.terms().idle_timeout.map(|timeout| timeout.as_secs_f64()),
        idle_for_s: lifetime.idle_for(now).as_secs_f64(),
        releases_in_s: lifetime.releases_in(now).map(|left| left.as_secs_f64()),
        ends_in_s: lifetime.terms().end.since(now).as_secs_f64(),
        transitions: lifetime
            .host_ledger()
            .transitions()
            .map(|line| TransitionView {
                at: clock::rfc3339(clock::wall_ms_of(line.at)),
                what: line.what.clone(),
            })
            .collect(),
        holds,
        ended,
        policy: settings.policy.words(),
        notice_s: settings.notice.map(|notice| notice.as_secs()),
        session_ends_in_s: lifetime.session_ends_in(now).map(|left| left.as_secs_f64()),
    }
}

/// The holds that both sides know of.
pub fn holds(sandbox: &Sandbox) -> Vec<HoldView> {
    let now = clock::now();
    let mut all: Vec<HoldView> = {
        let lifetime = sandbox.lifetime();
        let ledger = lifetime.host_ledger();
        let view = |(_, hold): (guestd_idle::HoldId, &guestd_idle::Hold)| HoldView {
            class: hold.class.name().to_owned(),
            counts: ledger.keeps(hold, now),
            origin: hold.origin.clone(),
            pid: hold.pid,
            age_s: now.since(hold.started).as_secs_f64(),
            since_progress_s: now.since(hold.last_progress).as_secs_f64(),
            bytes: hold.bytes,
            side: "host".to_owned(),
        };
        ledger.by_blame().into_iter().map(view).collect()
    };
    let report = sandbox.report.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some((came, report)) = report.as_ref() {
        // Reports come when something changes: what they say of ages has gone on since.
        let since = now.since(*came);
        all.extend(report.holds.iter().map(|hold| guest_hold(hold, since)));
    }
    all.sort_by_key(|hold| !hold.counts);
    all
}

fn guest_hold(hold: &wire::Hold, since: Duration) -> HoldView {
    /// The guest is not trusted: what it calls its holds may be of any length.
    const TEXT_LIMIT: usize = 300;
    let text = |text: &str| text.chars().take(TEXT_LIMIT).collect();
    HoldView {
        class: text(&hold.class),
        counts: hold.counts,
        origin: text(&hold.origin),
        pid: hold.pid,
        age_s: hold.age_ms as f64 / 1000.0 + since.as_secs_f64(),
        since_progress_s: hold.since_progress_ms as f64 / 1000.0 + since.as_secs_f64(),
        bytes: hold.bytes,
        side: "guest".to_owned(),
    }
}

/// Explains a sandbox that ended.
pub fn gone(tombstone: &Tombstone) -> Explanation {
    let seconds = |millis: u64| millis as f64 / 1000.0;
    let settings = IdleSettings::parse(&tombstone.metadata).unwrap_or_default();
    Explanation {
        policy: settings.policy.words(),
        notice_s: settings.notice.map(|notice| notice.as_secs()),
        session_ends_in_s: None,
        sandbox_id: tombstone.id.clone(),
        state: "ended".to_owned(),
        idle_timeout_s: tombstone
            .metadata
            .get(guestd_idle::terms::IDLE_TIMEOUT_KEY)
            .and_then(|text| text.parse().ok()),
        idle_for_s: seconds(tombstone.idle_for_ms),
        releases_in_s: None,
        ends_in_s: 0.0,
        holds: Vec::new(),
        transitions: tombstone.transitions.clone(),
        ended: Some(EndView {
            at: clock::rfc3339(tombstone.ended_wall_ms),
            reason: tombstone.reason,
            detail: tombstone.detail.clone(),
            lived_s: seconds(tombstone.lived_ms),
            idle_for_s: seconds(tombstone.idle_for_ms),
            last_holds: tombstone.last_holds.clone(),
        }),
    }
}

/// The explanation as lines for people.
pub fn describe(explanation: &Explanation) -> String {
    let mut lines = Vec::new();
    let span = |seconds: f64| format!("{seconds:.1} s");
    match &explanation.ended {
        Some(ended) => {
            lines.push(format!("{}  ended: {}", explanation.sandbox_id, ended.reason));
            lines.push(format!("  at           {}", ended.at));
            lines.push(format!("  lived        {}", span(ended.lived_s)));
            lines.push(format!("  idle for     {}", span(ended.idle_for_s)));
            if let Some(detail) = &ended.detail {
                lines.push(format!("  because      {detail}"));
            }
            push_holds(&mut lines, "last holds", &ended.last_holds);
        }
        None => {
            lines.push(format!("{}  {}", explanation.sandbox_id, explanation.state));
            let timeout = explanation.idle_timeout_s.map_or("none".to_owned(), span);
            lines.push(format!("  idle timeout {timeout}"));
            lines.push(format!("  idle for     {}", span(explanation.idle_for_s)));
            let releases = explanation
                .releases_in_s
                .map_or("not while in use, or without an idle timeout".to_owned(), span);
            lines.push(format!("  releases in  {releases}"));
            lines.push(format!("  ends in      {}", span(explanation.ends_in_s)));
            if let Some(left) = explanation.session_ends_in_s {
                lines.push(format!(
                    "  session      ends with its connection, or in {} of silence",
                    span(left)
                ));
            }
            if !explanation.policy.is_empty() {
                let words: Vec<_> =
                    explanation.policy.iter().map(|(class, word)| format!("{class}={word}")).collect();
                lines.push(format!("  policy       {}", words.join(" ")));
            }
            if let Some(notice) = explanation.notice_s {
                lines.push(format!("  notice       {notice} s before the end"));
            }
            push_holds(&mut lines, "holds", &explanation.holds);
        }
    }
    if !explanation.transitions.is_empty() {
        lines.push("  history".to_owned());
        lines.extend(explanation.transitions.iter().map(|line| format!("    {}  {}", line.at, line.what)));
    }
    // Some of it was chosen by a guest: it must not speak to the operator's terminal.
    lines.iter().map(|line| line.replace(char::is_control, "?")).collect::<Vec<_>>().join("\n")
}

fn push_holds(lines: &mut Vec<String>, title: &str, holds: &[HoldView]) {
    if holds.is_empty() {
        lines.push(format!("  {title:<12} none"));
        return;
    }
    lines.push(format!("  {title}"));
    for hold in holds {
        let counts = if hold.counts { "keeps it alive" } else { "does not count" };
        let pid = if hold.pid == 0 { String::new() } else { format!(" pid {}", hold.pid) };
        lines.push(format!(
            "    {:<10} {:<14} {:>7.1} s  {}{pid} ({})",
            hold.class, counts, hold.age_s, hold.origin, hold.side
        ));
    }
}
