//! Output without an end, one reader that keeps up and one that stopped reading.

use std::io::Write;
use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::Bench;
use super::agent::Agent;
use super::client::Client;
use super::connect::{self, Codec, Event};
use super::floor;
use super::row::{Gate, MILLISECONDS, Promise, Reading, Row, Verdict};

pub const ROWS: &[Row] = &[Row {
    name: "flood",
    title: "output flood with a stalled reader",
    promise: "<= 10 ms extra delay, RSS flat within 8 MiB",
    gate: Gate::Margin(10.0),
    measure,
}];

const EXTRA_DELAY: f64 = 10.0;
const GROWTH: f64 = 8.0;

/// An agent may cut a stalled reader off: a new one comes so often.
const NEXT_STALLED: Duration = Duration::from_secs(15);

/// The live reader alone, with a stalled one beside it, alone again.
const PHASES: usize = 3;
const STALLED: usize = 1;

/// What the live reader saw in one phase.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    bytes: u64,
    /// The longest time between two pieces.
    longest: Duration,
    /// How many were longer than the promise allows.
    over: u64,
}

#[derive(Debug, Default)]
struct Live {
    phase: AtomicUsize,
    stop: AtomicBool,
    pid: AtomicU32,
    seen: Mutex<[Seen; PHASES]>,
}

fn measure(bench: &Bench) -> Result<Reading> {
    let agent = bench.agent()?;
    let live = Live::default();
    let alone = bench.scale(Duration::from_secs(10), Duration::from_secs(4));
    let measured = std::thread::scope(|scope| {
        let reader = scope.spawn(|| live.read(&agent));
        let measured = phases(&agent, &live, alone, bench.flood);
        live.stop.store(true, Ordering::Relaxed);
        let read = reader.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the reader failed")));
        read.and(measured)
    })?;
    let seen = *live.seen.lock().unwrap_or_else(PoisonError::into_inner);
    ensure!(
        seen.iter().all(|phase| phase.bytes > 0),
        "the live reader got nothing in a whole phase: {seen:?}"
    );

    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
    let floor = milliseconds(seen[0].longest.max(seen[2].longest));
    let longest = milliseconds(seen[STALLED].longest);
    let extra = (longest - floor).max(0.0);
    let rate = |phase: usize, time: Duration| seen[phase].bytes as f64 / 1e6 / time.as_secs_f64();
    let growth = measured.growth;
    let mut delay = Promise::AtMost(EXTRA_DELAY).exactly(extra);
    if floor > EXTRA_DELAY && extra < 10.0 * EXTRA_DELAY && delay.verdict == Verdict::Short {
        // A machine that makes a lone reader wait for longer than the promise cannot tell.
        delay.verdict = Verdict::NotDecided;
    }
    let judged = delay.and(Promise::AtMost(GROWTH).exactly(growth));
    Ok(Reading::new(longest, MILLISECONDS, judged)
        .floor(floor, MILLISECONDS)
        .figure("extra_delay", extra, MILLISECONDS)
        .figure("rss_growth", growth, "MiB")
        .figure("rss_after", measured.after, "MiB")
        .figure("rate", rate(STALLED, bench.flood), "MB/s")
        .figure("floor_rate", rate(0, alone), "MB/s")
        .figure("gaps_over_10_ms", seen[STALLED].over as f64, "")
        .note(format!(
            "longest wait of the live reader in {} s against {} s alone before and after; {} waits over 10 ms (alone {}); extra {extra:.1} ms",
            bench.flood.as_secs(),
            alone.as_secs(),
            seen[STALLED].over,
            seen[0].over + seen[2].over,
        ))
        .note(format!(
            "RSS grew by {growth:.2} MiB at most, to {:.1} MiB; the live reader got {:.0} MB/s, alone {:.0} MB/s; {} stalled readers, one after the other",
            measured.after,
            rate(STALLED, bench.flood),
            rate(0, alone),
            measured.stalled,
        )))
}

struct Measured {
    /// In MiB, at most, against the time before the stalled reader came.
    growth: f64,
    after: f64,
    stalled: usize,
}

fn phases(agent: &Agent, live: &Live, alone: Duration, flood: Duration) -> Result<Measured> {
    let pid = live.pid()?;
    std::thread::sleep(alone);
    let before = agent.process().memory()?.rss;
    let mut largest = before;
    live.phase.store(STALLED, Ordering::Relaxed);
    // So that what the stalled reader does to the live one is not taken for the time before it.
    std::thread::sleep(Duration::from_millis(50));
    let mut stalled = stall(agent, pid)?;
    let mut count = 1;
    let begin = Instant::now();
    let mut since = begin;
    while begin.elapsed() < flood {
        std::thread::sleep(Duration::from_millis(500).min(flood));
        largest = largest.max(agent.process().memory()?.rss);
        if since.elapsed() > NEXT_STALLED {
            drop(stalled);
            stalled = stall(agent, pid)?;
            count += 1;
            since = Instant::now();
        }
    }
    drop(stalled);
    // What was held up by the last one belongs to it.
    std::thread::sleep(Duration::from_millis(200));
    live.phase.store(STALLED + 1, Ordering::Relaxed);
    std::thread::sleep(alone);
    let after = agent.process().memory()?.rss;
    agent.connect()?.unary(&connect::kill(pid))?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    Ok(Measured { growth: mib(largest - before), after: mib(after), stalled: count })
}

/// A client that asks for the output and never reads it.
fn stall(agent: &Agent, pid: u32) -> Result<TcpStream> {
    let mut socket = agent.socket()?;
    socket.write_all(&connect::attach(pid))?;
    Ok(socket)
}

impl Live {
    fn pid(&self) -> Result<u32> {
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(5) {
            match self.pid.load(Ordering::Relaxed) {
                0 => std::thread::sleep(Duration::from_millis(1)),
                pid => return Ok(pid),
            }
        }
        bail!("the flood does not start")
    }

    /// Starts the flood and reads it until told to stop.
    fn read(&self, agent: &Agent) -> Result<()> {
        let mut client: Client = agent.connect()?;
        let command = floor::producer(u64::MAX / floor::BLOCK);
        let command: Vec<_> = command.iter().map(String::as_str).collect();
        let mut last: Option<Instant> = None;
        let mut phase = 0;
        let mut seen = Seen::default();
        let read =
            client.stream(Codec::Binary, &connect::start(Codec::Binary, &command, false), &mut |event| {
                match event {
                    _ if self.stop.load(Ordering::Relaxed) => bail!("told to stop"),
                    Event::Start { pid } => self.pid.store(pid, Ordering::Relaxed),
                    Event::Output(output) => {
                        let now = Instant::now();
                        let gap = last.map_or(Duration::ZERO, |last| now - last);
                        last = Some(now);
                        seen.bytes += output.len() as u64;
                        seen.longest = seen.longest.max(gap);
                        seen.over += u64::from(gap.as_secs_f64() * 1e3 > EXTRA_DELAY);
                        let current = self.phase.load(Ordering::Relaxed);
                        if current != phase {
                            self.note(phase, seen);
                            (phase, seen) = (current, Seen::default());
                        }
                    }
                    Event::End { .. } | Event::Other => {}
                }
                Ok(())
            });
        self.note(phase, seen);
        if self.stop.load(Ordering::Relaxed) { Ok(()) } else { read.context("the live reader") }
    }

    fn note(&self, phase: usize, seen: Seen) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)[phase] = seen;
    }
}
