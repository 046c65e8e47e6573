//! Output without an end, one reader that keeps up and one that stopped reading.
//!
//! The reader that keeps up has turns alone and turns beside a new stalled reader, one after the other. Each stalled reader holds it up
//! once, if at all, so what counts in a turn is its longest wait. A shared machine makes it wait for longer than that at any time: it does so
//! in both kinds of turn, and the promise is about the difference between neighbours.

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
use super::row::{Gate, MILLISECONDS, Promise, Reading, Row};
use super::stats::Samples;

pub const ROWS: &[Row] = &[Row {
    name: "flood",
    title: "output flood with a stalled reader",
    promise: "<= 10 ms extra delay, RSS flat within 8 MiB",
    gate: Gate::Margin(2.0),
    measure,
}];

const EXTRA_DELAY: f64 = 10.0;
const GROWTH: f64 = 8.0;

/// One turn: a stalled reader's buffers are full, and it is cut off, within a tenth of it.
const TURN: Duration = Duration::from_millis(500);

/// What is read before the first turn: the start of the flood is none of it.
const LEAD: Duration = Duration::from_millis(500);

/// What the live reader saw in one turn.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    bytes: u64,
    /// The longest time between two pieces.
    longest: Duration,
    time: Duration,
}

#[derive(Debug, Default)]
struct Live {
    turn: AtomicUsize,
    stop: AtomicBool,
    pid: AtomicU32,
    /// One for each turn, the lead first; then alone and beside a stalled reader by turns.
    seen: Mutex<Vec<Seen>>,
}

fn measure(bench: &Bench) -> Result<Reading> {
    let agent = bench.agent()?;
    let live = Live::default();
    let pairs = (bench.flood.as_millis() / TURN.as_millis()).max(1) as usize;
    let measured = std::thread::scope(|scope| {
        let reader = scope.spawn(|| live.read(&agent));
        let measured = turns(&agent, &live, pairs);
        live.stop.store(true, Ordering::Relaxed);
        let read = reader.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the reader failed")));
        read.and(measured)
    })?;
    let seen = live.seen.lock().unwrap_or_else(PoisonError::into_inner);
    judge(&seen[1..], &measured)
}

/// What the turns come to: pairs of one alone and one beside a stalled reader.
fn judge(turns: &[Seen], measured: &Measured) -> Result<Reading> {
    let (pairs, _rest) = turns.as_chunks::<2>();
    let all = pairs.len();
    // A wait that outlasted a turn leaves nothing to compare.
    let pairs: Vec<_> = pairs.iter().filter(|pair| pair.iter().all(|turn| turn.bytes > 0)).collect();
    ensure!(
        pairs.len() * 2 > all,
        "the live reader got something in both turns of {} pairs of {all} only",
        pairs.len()
    );
    let longest = |turn: &Seen| turn.longest.as_secs_f64() * 1e3;
    let samples = |of: &dyn Fn(&[Seen; 2]) -> f64| {
        Samples::new(pairs.iter().map(|pair| of(pair)).collect()).context("a time that is no number")
    };
    let alone = samples(&|[alone, _]| longest(alone))?;
    let beside = samples(&|[_, beside]| longest(beside))?;
    let extra = samples(&|[alone, beside]| longest(beside) - longest(alone))?;
    let rate = |side: usize| {
        let bytes: u64 = pairs.iter().map(|pair| pair[side].bytes).sum();
        let time: Duration = pairs.iter().map(|pair| pair[side].time).sum();
        bytes as f64 / 1e6 / time.as_secs_f64()
    };
    let growth = measured.growth;
    let (low, high) = extra.spread();
    let judged = Promise::AtMost(EXTRA_DELAY).of(&extra).and(Promise::AtMost(GROWTH).exactly(growth));
    Ok(Reading::new(beside.median(), MILLISECONDS, judged)
        .floor(alone.median(), MILLISECONDS)
        .figure("extra_delay", extra.median(), MILLISECONDS)
        .figure("extra_delay_low", low, MILLISECONDS)
        .figure("extra_delay_high", high, MILLISECONDS)
        .figure("longest", beside.max(), MILLISECONDS)
        .figure("longest_alone", alone.max(), MILLISECONDS)
        .figure("rss_growth", growth, "MiB")
        .figure("rss_after", measured.after, "MiB")
        .figure("rate", rate(1), "MB/s")
        .figure("floor_rate", rate(0), "MB/s")
        .note(format!(
            "longest wait of the live reader in a turn of {} ms beside a new stalled reader; floor: in the turn alone before it; extra {:.2} ms ({low:.2} to {high:.2} in the middle half of {} pairs)",
            TURN.as_millis(),
            extra.median(),
            pairs.len(),
        ))
        .note(format!(
            "nine turns in ten within {:.1} ms, alone {:.1} ms; longest of all {:.0} ms, alone {:.0} ms",
            beside.percentile(90.0),
            alone.percentile(90.0),
            beside.max(),
            alone.max(),
        ))
        .note(format!(
            "RSS grew by {growth:.2} MiB at most, to {:.1} MiB; the live reader got {:.0} MB/s, alone {:.0} MB/s",
            measured.after,
            rate(1),
            rate(0),
        )))
}

struct Measured {
    /// In MiB, at most, against the time before the first stalled reader came.
    growth: f64,
    after: f64,
}

fn turns(agent: &Agent, live: &Live, pairs: usize) -> Result<Measured> {
    let pid = live.pid()?;
    std::thread::sleep(LEAD);
    let mut before = None;
    let mut largest = 0;
    for _ in 0..pairs {
        live.next_turn();
        std::thread::sleep(TURN);
        let rss = agent.process().memory()?.rss;
        let first = *before.get_or_insert(rss);
        live.next_turn();
        let stalled = stall(agent, pid)?;
        std::thread::sleep(TURN);
        largest = agent.process().memory()?.rss.max(rss).max(first).max(largest);
        drop(stalled);
    }
    live.next_turn();
    let after = agent.process().memory()?.rss;
    agent.connect()?.unary(&connect::kill(pid))?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    Ok(Measured { growth: mib(largest - before.unwrap_or(largest)), after: mib(after) })
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
        let mut begin = Instant::now();
        let mut turn = 0;
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
                        let current = self.turn.load(Ordering::Relaxed);
                        if current != turn {
                            seen.time = now - std::mem::replace(&mut begin, now);
                            let mut all = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
                            // A turn that a lone wait outlasted has nothing of its own.
                            all.push(std::mem::take(&mut seen));
                            all.resize(current, Seen::default());
                            turn = current;
                        }
                    }
                    Event::End { .. } | Event::Other => {}
                }
                Ok(())
            });
        if self.stop.load(Ordering::Relaxed) { Ok(()) } else { read.context("the live reader") }
    }

    fn next_turn(&self) {
        self.turn.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::row::Verdict;

    fn turns(longest: &[(f64, f64)]) -> Vec<Seen> {
        let seen =
            |longest: f64| Seen { bytes: 1, longest: Duration::from_secs_f64(longest / 1e3), time: TURN };
        longest.iter().flat_map(|(alone, beside)| [seen(*alone), seen(*beside)]).collect()
    }

    #[test]
    fn a_machine_that_makes_the_reader_wait_in_every_turn_does_not_decide_against_the_agent() {
        let flat = Measured { growth: 1.0, after: 5.0 };
        let judged = |longest: &[(f64, f64)], measured| judge(&turns(longest), measured).unwrap().judgement;
        assert_eq!(judged(&[(40.0, 45.0), (300.0, 46.0), (41.0, 170.0)], &flat).verdict, Verdict::Ok);
        assert_eq!(judged(&[(40.0, 55.0), (60.0, 75.0), (41.0, 170.0)], &flat).verdict, Verdict::Short);
        let grown = Measured { growth: 9.0, after: 5.0 };
        assert_eq!(judged(&[(1.0, 1.0)], &grown).verdict, Verdict::Short);
    }

    #[test]
    fn a_turn_in_which_nothing_came_is_no_turn_without_waits() {
        let flat = Measured { growth: 0.0, after: 1.0 };
        let mut seen = turns(&[(40.0, 55.0), (40.0, 0.0), (40.0, 56.0)]);
        seen[3].bytes = 0;
        assert_eq!(judge(&seen, &flat).unwrap().judgement.verdict, Verdict::Short);
        seen[1].bytes = 0;
        assert!(judge(&seen, &flat).is_err());
    }
}
