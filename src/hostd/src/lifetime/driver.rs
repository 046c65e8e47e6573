//! The task of one live sandbox: carries out what `guestd_idle::Lifetime` says, from ready to gone.

use std::future::pending;
use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use connectrpc::{ConnectError, ErrorCode};
use guestd_idle::lifetime::{PREPARE_DEADLINE, Verdict};
use guestd_idle::{EndReason, GuestReport, Step};
use guestd_protocol::wire::activity::v1 as wire;

use super::{Sandbox, Sandboxes, explain};
use crate::clock;
use crate::logs;
use crate::store::Tombstone;
use crate::trace::{Event, GuestHold};

/// How long the end of a sandbox waits for the disk.
const BURIAL_LIMIT: Duration = Duration::from_millis(500);

/// The longest sleep: a machine that was suspended wakes with deadlines in the past, and timers do not count its sleep.
const LONGEST_SLEEP: Duration = Duration::from_secs(10);

/// The pause after each report: "at most two a second" is the agent's manners, and the guest is not trusted to have them.
const REPORT_PAUSE: Duration = Duration::from_millis(100);

/// How many holds of a report are kept, and how much of each text (contract: activity.proto).
const HOLDS_LIMIT: usize = 64;
const TEXT_LIMIT: usize = 300;

/// How long the agent gets to tell waiting callers that it is over, before its machine is ended.
const GOODBYE: Duration = Duration::from_millis(100);

/// Between two tries to hear from an agent that broke off.
const WATCH_PAUSE: Duration = Duration::from_millis(500);

/// Longest line of the history that comes from a guest, in characters.
const NEWS_LIMIT: usize = 200;

/// What the agent answered to a prepare; None when it did not.
type Answer = Option<(bool, wire::Report)>;
type PendingAnswer = Pin<Box<dyn Future<Output = Answer> + Send>>;

/// Drives a sandbox to its end and removes it.
pub(super) async fn drive(sandboxes: &Arc<Sandboxes>, sandbox: &Arc<Sandbox>) {
    let watching = tokio::spawn(watch(Arc::clone(sandbox)));
    let logged = Arc::clone(sandbox);
    let following =
        tokio::spawn(async move { logs::follow::follow(&logged.record.id, &logged.link, &logged.log).await });
    let (reason, released) = live(sandboxes, sandbox).await;
    watching.abort();
    following.abort();
    Box::pin(end(sandboxes, sandbox, reason, released)).await;
}

/// Lives until a step says end; the second result is the epoch of the release that was committed, if that was it.
async fn live(sandboxes: &Sandboxes, sandbox: &Arc<Sandbox>) -> (EndReason, Option<u64>) {
    let pause = sandboxes.setup.release_pause;
    let mut asked: Option<(u64, PendingAnswer)> = None;
    let mut committed = None;
    loop {
        let step = sandbox.lifetime().step(clock::now());
        let until = match step {
            Step::End(reason) => return (reason, committed),
            Step::Wait(until) => until,
            Step::Prepare { epoch, idle_for } => {
                asked = Some((epoch, Box::pin(ask(Arc::clone(sandbox), epoch, idle_for, pause))));
                continue;
            }
            Step::Notify { reason, ends_in, idle_for } => {
                sandboxes.metrics.noticed();
                tokio::spawn(notify(Arc::clone(sandbox), reason, ends_in, idle_for));
                continue;
            }
        };
        tokio::select! {
            biased;
            () = sandbox.machine.exited() => {
                let mut lifetime = sandbox.lifetime();
                let now = clock::now();
                // It may be the hard end that the guard kept and this task was late for.
                if !matches!(lifetime.step(now), Step::End(_)) {
                    lifetime.end(EndReason::Crashed, now);
                }
            }
            (epoch, answer) = answered(&mut asked) => {
                asked = None;
                if decide(sandbox, epoch, answer) == Some(Verdict::Commit) {
                    committed = Some(epoch);
                }
            }
            () = sandbox.changed.notified() => {}
            () = tokio::time::sleep(until.since(clock::now()).min(LONGEST_SLEEP)) => {}
        }
    }
}

async fn answered(asked: &mut Option<(u64, PendingAnswer)>) -> (u64, Answer) {
    match asked {
        Some((epoch, answer)) => (*epoch, answer.await),
        None => pending().await,
    }
}

async fn ask(sandbox: Arc<Sandbox>, epoch: u64, idle_for: Duration, pause: Duration) -> Answer {
    tokio::time::sleep(pause).await;
    let asked = tokio::time::timeout(PREPARE_DEADLINE, sandbox.link.prepare_release(epoch, idle_for)).await;
    tokio::time::sleep(pause).await;
    match asked {
        Ok(Ok(answer)) => Some(answer),
        Ok(Err(error)) => {
            tracing::warn!(sandbox = sandbox.record.id, epoch, %error, "the agent did not answer a prepare");
            None
        }
        Err(_elapsed) => None,
    }
}

/// Tells the guest of its end. An agent that does not answer is not asked again: the end comes all the same.
async fn notify(sandbox: Arc<Sandbox>, reason: EndReason, ends_in: Duration, idle_for: Option<Duration>) {
    match sandbox.link.notify(reason.name(), ends_in, idle_for).await {
        Ok((true, report)) => keep(&sandbox, report),
        Ok((false, report)) => {
            let brief = brief(&report);
            keep(&sandbox, report);
            sandbox.change(|lifetime| lifetime.refuse_notice(brief, clock::now()));
        }
        Err(error) => tracing::warn!(sandbox = sandbox.record.id, %reason, %error, "a notice did not arrive"),
    }
}

/// Feeds the answer to the rules and tells the agent when it has to open its door again.
fn decide(sandbox: &Arc<Sandbox>, epoch: u64, answer: Answer) -> Option<Verdict> {
    let verdict = match answer {
        Some((ready, report)) => {
            let brief = brief(&report);
            keep(sandbox, report);
            Some(sandbox.lifetime().answer(epoch, ready, brief, clock::now()))
        }
        // The rules notice by themselves that no answer came.
        None => None,
    };
    if verdict != Some(Verdict::Commit) {
        let sandbox = Arc::clone(sandbox);
        tokio::spawn(async move {
            if let Err(error) = sandbox.link.abort_release(epoch).await {
                // Its fence opens by itself after two seconds.
                tracing::debug!(sandbox = sandbox.record.id, epoch, %error, "an abort did not arrive");
            }
        });
    }
    verdict
}

fn brief(report: &wire::Report) -> GuestReport {
    GuestReport {
        sequence: report.sequence,
        idle_for: Duration::from_millis(report.idle_for_ms),
        counting: usize::try_from(report.counting).unwrap_or(usize::MAX),
    }
}

/// Keeps a report for the explain view, and its news for the history.
fn keep(sandbox: &Sandbox, mut report: wire::Report) {
    report.holds.truncate(HOLDS_LIMIT);
    report.holds.shrink_to_fit();
    let texts = report.holds.iter_mut().flat_map(|hold| [&mut hold.class, &mut hold.origin]);
    for text in texts.chain([&mut report.last_class, &mut report.last_origin]) {
        if text.len() > TEXT_LIMIT {
            *text = text.chars().take(TEXT_LIMIT / 4).collect();
        }
    }
    let mut kept = sandbox.report.lock().unwrap_or_else(PoisonError::into_inner);
    let was_busy = kept.as_ref().is_some_and(|(_, report)| report.counting > 0);
    let news = match (was_busy, report.counting > 0) {
        (false, true) => report.holds.first().map(|hold| ("guest busy", &hold.class, &hold.origin)),
        (true, false) => Some(("guest idle after", &report.last_class, &report.last_origin)),
        _ => None,
    };
    if let Some((what, class, origin)) = news {
        // The guest is not trusted with the length of anything.
        let line: String = format!("{what}: {class} {origin}").chars().take(NEWS_LIMIT).collect();
        sandbox.lifetime().note(clock::now(), line);
    }
    sandbox.trace(|| Event::Report {
        idle_for_ms: report.idle_for_ms,
        last_class: report.last_class.clone(),
        holds: report.holds.iter().map(traced).collect(),
    });
    *kept = Some((clock::now(), report));
}

fn traced(hold: &wire::Hold) -> GuestHold {
    GuestHold {
        id: hold.id,
        class: hold.class.clone(),
        origin: hold.origin.clone(),
        age_ms: hold.age_ms,
        since_progress_ms: hold.since_progress_ms,
    }
}

/// Listens to the agent's reports, and again when the link broke, until it is aborted.
async fn watch(sandbox: Arc<Sandbox>) {
    loop {
        // Boxed, as other calls that are made once in a while: the task is as large as the largest future in it for as long as it lives.
        match Box::pin(sandbox.link.watch()).await {
            Ok(mut reports) => loop {
                match reports.message().await {
                    Ok(Some(report)) => {
                        let report = report.to_owned_message();
                        let brief = brief(&report);
                        keep(&sandbox, report);
                        sandbox.change(|lifetime| lifetime.report(brief, clock::now()));
                        tokio::time::sleep(REPORT_PAUSE).await;
                    }
                    Ok(None) => break,
                    Err(error) => {
                        tracing::debug!(sandbox = sandbox.record.id, %error, "the report stream broke off");
                        Box::pin(greet_if_new(&sandbox, &error)).await;
                        break;
                    }
                }
            },
            Err(error) => {
                tracing::debug!(sandbox = sandbox.record.id, %error, "no report stream");
                Box::pin(greet_if_new(&sandbox, &error)).await;
            }
        }
        tokio::time::sleep(WATCH_PAUSE).await;
    }
}

/// An agent that took another's place serves nobody before its host has come.
async fn greet_if_new(sandbox: &Sandbox, error: &ConnectError) {
    if error.code == ErrorCode::Unauthenticated
        && let Err(error) = sandbox.greet().await
    {
        tracing::warn!(sandbox = sandbox.record.id, %error, "the agent refuses its host");
    }
}

async fn end(sandboxes: &Sandboxes, sandbox: &Sandbox, reason: EndReason, released: Option<u64>) {
    let id = &sandbox.record.id;
    let detail = (reason == EndReason::Crashed).then(|| sandbox.machine.last_words());
    let tombstone = Arc::new(tombstone(sandbox, reason, detail));
    sandboxes.ended_logs.close(id, &sandbox.log, reason, sandbox.console(logs::CONSOLE_SHOWN));
    sandboxes.bury(&tombstone);
    sandboxes.metrics.ended(reason);
    sandbox.trace(|| Event::Ended { reason: reason.name().to_owned() });
    tracing::info!(
        sandbox = id,
        %reason,
        lived_ms = tombstone.lived_ms,
        idle_ms = tombstone.idle_for_ms,
        detail = tombstone.detail,
        "sandbox ended"
    );
    // On disk before anybody is told: a supervisor that dies now must not take over what was ended. A disk that does not answer must not
    // keep the machine alive either.
    match tokio::time::timeout(BURIAL_LIMIT, sandboxes.store.bury((*tombstone).clone())).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!(sandbox = id, %error, "a tombstone is not on disk"),
        Err(_elapsed) => {
            tracing::error!(sandbox = id, "a tombstone is not on disk yet: the disk does not answer")
        }
    }
    sandbox.buried.send_replace(true);
    if let Some(epoch) = released {
        tokio::time::sleep(sandboxes.setup.release_pause).await;
        // The machine is ended whether or not this arrives; it only gives callers inside the guest their answer.
        let _goodbye = tokio::time::timeout(GOODBYE, sandbox.link.commit_release(epoch)).await;
    }
    sandbox.over.send_replace(true);
    sandbox.machine.stop().await;
    // Only now: until its machine is gone, a restarted supervisor has to know of it.
    if let Err(error) = sandboxes.store.forget(id.clone()).await {
        tracing::error!(sandbox = id, %error, "the record of an ended sandbox stays");
    }
    sandboxes.leave(id);
}

fn tombstone(sandbox: &Sandbox, reason: EndReason, detail: Option<String>) -> Tombstone {
    let view = explain::live(sandbox);
    let now = clock::now();
    let (started, ended) = {
        let lifetime = sandbox.lifetime();
        (lifetime.terms().started, lifetime.ended().map_or(now, |(_, at)| at))
    };
    Tombstone {
        id: sandbox.record.id.clone(),
        template: sandbox.record.template.clone(),
        metadata: sandbox.record.metadata.clone(),
        labels: sandbox.record.labels.clone(),
        access_token: sandbox.record.access_token.clone(),
        reason,
        detail,
        started_wall_ms: sandbox.record.started_wall_ms,
        ended_wall_ms: clock::wall_ms_of(ended),
        lived_ms: u64::try_from(ended.since(started).as_millis()).unwrap_or(u64::MAX),
        idle_for_ms: (view.idle_for_s * 1000.0) as u64,
        last_holds: view.holds,
        transitions: view.transitions,
    }
}
