//! What the agent costs while nobody uses it: its size, its memory, its wake-ups.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::agent::Agent;
use super::connect::{self, Codec};
use super::row::{Gate, MEBIBYTES, Promise, Reading, Row};
use super::{Bench, floor};
use crate::workspace;

pub const ROWS: &[Row] = &[
    Row {
        name: "size",
        title: "static binary, stripped",
        promise: "<= 5 MB",
        gate: Gate::Exact,
        measure: size,
    },
    Row {
        name: "idle-memory",
        title: "agent's idle memory",
        promise: "<= 4 MiB RSS",
        gate: Gate::Exact,
        measure: memory,
    },
    Row {
        name: "idle-wakeups",
        title: "idle wake-ups",
        promise: "< 0.1 a second",
        gate: Gate::Exact,
        measure: wakeups,
    },
];

const MEBIBYTE: f64 = (1 << 20) as f64;

/// A quiet agent is one that did nothing for so long.
const QUIET: Duration = Duration::from_secs(2);
/// Blocking threads end after 10 s, and the end of a process is kept for 30 s (contract: envd.md section 2.8).
const AFTERMATH: Duration = Duration::from_secs(31);
const SETTLE_LIMIT: Duration = Duration::from_secs(60);

fn size(_bench: &Bench) -> Result<Reading> {
    let program = workspace::build("guestd", "dist")?;
    workspace::require_static(&program)?;
    let bytes = std::fs::metadata(&program)?.len() as f64;
    Ok(Reading::new(bytes / 1e6, "MB", Promise::AtMost(5.0).exactly(bytes / 1e6))
        .figure("bytes", bytes, "B")
        .note(format!("{bytes} bytes; the dist profile; no interpreter and no library")))
}

fn memory(bench: &Bench) -> Result<Reading> {
    let agent = bench.agent()?;
    settle(&agent, Duration::ZERO)?;
    let fresh = agent.process().memory()?;
    work(&agent, 16 << 20)?;
    settle(&agent, AFTERMATH)?;
    let after = agent.process().memory()?;
    let mib = |bytes: u64| bytes as f64 / MEBIBYTE;
    Ok(Reading::new(mib(fresh.rss), MEBIBYTES, Promise::AtMost(4.0).exactly(mib(fresh.rss)))
        .figure("pss", mib(fresh.pss), MEBIBYTES)
        .figure("private", mib(fresh.private), MEBIBYTES)
        .figure("rss_after_work", mib(after.rss), MEBIBYTES)
        .figure("private_after_work", mib(after.private), MEBIBYTES)
        .note(format!(
            "Pss {:.2}, private {:.2} MiB; after 100 commands, 16 MiB of output, an upload and a download of 16 MiB: Rss {:.2}, private {:.2} MiB",
            mib(fresh.pss),
            mib(fresh.private),
            mib(after.rss),
            mib(after.private),
        )))
}

fn wakeups(bench: &Bench) -> Result<Reading> {
    let window = bench.scale(Duration::from_secs(60), Duration::from_secs(15));
    let agent = bench.agent()?;
    // An agent that was used, with a client's idle connection: more than one that just started.
    work(&agent, 1 << 20)?;
    let _idle = agent.connect()?;
    let settled = settle(&agent, AFTERMATH)?;
    let before = agent.process().voluntary_switches()?;
    std::thread::sleep(window);
    let switches = agent.process().voluntary_switches()?.saturating_sub(before) as f64;
    let rate = switches / window.as_secs_f64();
    let mut judged = Promise::AtMost(0.1).exactly(rate);
    if rate == 0.1 {
        judged.verdict = super::row::Verdict::Short;
    }
    Ok(Reading::new(rate, "a second", judged).figure("switches", switches, "").note(format!(
        "{switches} voluntary context switches of all threads in {} s, {} s after its last work, with an idle connection",
        window.as_secs(),
        settled.as_secs()
    )))
}

/// A little of everything.
fn work(agent: &Agent, bytes: u64) -> Result<()> {
    let mut client = agent.connect()?;
    for _ in 0..100 {
        client.run(Codec::Json, &connect::start(Codec::Json, &["/bin/true"], false))?;
    }
    let command = floor::producer(bytes / floor::BLOCK);
    let command: Vec<_> = command.iter().map(String::as_str).collect();
    client.run(Codec::Json, &connect::start(Codec::Json, &command, false))?;
    let file = agent.folder().join("file");
    let path = file.to_string_lossy();
    client.upload(&path, bytes)?;
    client.download(&path)?;
    Ok(())
}

/// Waits for `least`, and until nothing woke the agent for a while; how long that took.
fn settle(agent: &Agent, least: Duration) -> Result<Duration> {
    let begin = Instant::now();
    let process = agent.process();
    let mut seen = process.voluntary_switches()?;
    let mut since = Instant::now();
    while (begin.elapsed() < least || since.elapsed() < QUIET) && begin.elapsed() < SETTLE_LIMIT {
        std::thread::sleep(Duration::from_millis(100));
        let now = process.voluntary_switches()?;
        if now != seen {
            seen = now;
            since = Instant::now();
        }
    }
    Ok(begin.elapsed())
}
