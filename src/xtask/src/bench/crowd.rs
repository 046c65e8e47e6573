//! Many at once: 1,000 live processes with two clients each, and 1,000 commands that end together.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::Bench;
use super::agent::Agent;
use super::client::Client;
use super::connect::{self, Codec, Event};
use super::mux::{Lane, Mux};
use super::row::{Gate, MEBIBYTES, Promise, Reading, Row, Verdict};

pub const ROWS: &[Row] = &[
    Row {
        name: "crowd",
        title: "1,000 live processes and 2,000 open streams",
        promise: "<= 64 MiB RSS, no lost byte",
        gate: Gate::Exact,
        measure: crowd,
    },
    Row {
        name: "at-once",
        title: "1,000 commands at once report their exits",
        promise: "all 1,000",
        gate: Gate::Exact,
        measure: at_once,
    },
];

const PROCESSES: usize = 1000;

/// What each process is given to say, in pieces.
const PIECE: usize = 8 * 1024;
const PIECES: usize = 8;
const EXPECTED: usize = PIECE * PIECES;

/// With nothing coming for so long, what is missing is lost.
const SILENCE: Duration = Duration::from_secs(20);

/// One stream of a process, and what it said so far.
struct Stream {
    lane: Lane,
    pid: Option<u32>,
    bytes: usize,
    wrong: usize,
    exit: Option<i32>,
}

/// The byte at this place of what this process is given.
fn pattern(pid: u32, at: usize) -> u8 {
    let place = (u64::from(pid) << 32) | at as u64;
    (place.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

impl Stream {
    fn new(lane: Lane) -> Self {
        Self { lane, pid: None, bytes: 0, wrong: 0, exit: None }
    }

    fn read(&mut self, mux: &mut Mux) -> Result<()> {
        let Self { lane, pid, bytes, wrong, exit } = self;
        mux.read(lane, &mut |event| {
            match event {
                Event::Start { pid: started } => *pid = Some(started),
                Event::Output(output) => {
                    for byte in output.decode()? {
                        *wrong += usize::from(pid.is_none_or(|pid| byte != pattern(pid, *bytes)));
                        *bytes += 1;
                    }
                }
                Event::End { exit_code } => *exit = Some(exit_code),
                Event::Other => {}
            }
            Ok(())
        })
    }
}

/// Reads until all streams satisfy `until` or nothing comes any more; how large the agent was at most.
fn pump(
    agent: &Agent,
    mux: &mut Mux,
    streams: &mut [Stream],
    until: impl Fn(&Stream) -> bool,
) -> Result<u64> {
    let mut largest = 0;
    let mut sampled: Option<Instant> = None;
    let mut last = Instant::now();
    let mut missing = streams.iter().filter(|stream| !until(stream)).count();
    while missing > 0 && last.elapsed() < SILENCE {
        for token in mux.ready(Duration::from_millis(100))? {
            last = Instant::now();
            let stream = &mut streams[token];
            let before = until(stream);
            stream.read(mux)?;
            missing -= usize::from(!before && until(stream));
        }
        if sampled.is_none_or(|at| at.elapsed() > Duration::from_millis(50)) {
            largest = largest.max(agent.process().memory()?.rss);
            sampled = Some(Instant::now());
        }
    }
    Ok(largest.max(agent.process().memory()?.rss))
}

fn crowd(bench: &Bench) -> Result<Reading> {
    let agent = bench.agent()?;
    let mut mux = Mux::new()?;
    let idle = agent.process().memory()?.rss;
    let mut streams = Vec::new();
    for token in 0..PROCESSES {
        let mut lane = mux.connect(&agent, token)?;
        lane.open_stream(Codec::Json, &connect::start(Codec::Json, &["/bin/cat"], true))?;
        streams.push(Stream::new(lane));
    }
    pump(&agent, &mut mux, &mut streams, |stream| stream.pid.is_some())?;
    let pids: Vec<u32> = streams.iter().filter_map(|stream| stream.pid).collect();
    ensure!(pids.len() == PROCESSES, "only {} of {PROCESSES} processes started", pids.len());
    for (index, pid) in pids.iter().enumerate() {
        let mut lane = mux.connect(&agent, PROCESSES + index)?;
        lane.open_stream(Codec::Json, &connect::attach(*pid))?;
        streams.push(Stream::new(lane));
    }
    pump(&agent, &mut mux, &mut streams, |stream| stream.pid.is_some())?;
    let open = agent.process().memory()?;

    let mut input = agent.connect()?;
    let begin = Instant::now();
    let largest = std::thread::scope(|scope| {
        let talk = scope.spawn(|| talk(&mut input, &pids));
        let largest = pump(&agent, &mut mux, &mut streams, |stream| stream.bytes >= EXPECTED);
        let said = talk.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the client failed")));
        said.and(largest)
    })?;
    let elapsed = begin.elapsed();
    for pid in &pids {
        input.unary(&connect::close_stdin(*pid))?;
    }
    pump(&agent, &mut mux, &mut streams, |stream| stream.exit.is_some())?;

    let lost: usize = streams.iter().map(|stream| EXPECTED.abs_diff(stream.bytes) + stream.wrong).sum();
    let ended = streams.iter().filter(|stream| stream.exit == Some(0)).count();
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let mut judged = Promise::AtMost(64.0).exactly(mib(largest));
    if lost > 0 || ended != streams.len() {
        judged.verdict = Verdict::Short;
    }
    Ok(Reading::new(mib(largest), MEBIBYTES, judged)
        .figure("open", mib(open.rss), MEBIBYTES)
        .figure("idle", mib(idle), MEBIBYTES)
        .figure("lost_bytes", lost as f64, "")
        .figure("ended", ended as f64, "")
        .note(format!(
            "open and silent {:.1} MiB, idle {:.1} MiB; {:.1} kB for a process with its two streams; {lost} of {} bytes lost or wrong; {ended} of {} streams saw exit 0; {:.1} s to pass on {} MiB",
            mib(open.rss),
            mib(idle),
            (open.rss.saturating_sub(idle)) as f64 / 1e3 / PROCESSES as f64,
            streams.len() * EXPECTED,
            streams.len(),
            elapsed.as_secs_f64(),
            (streams.len() * EXPECTED) >> 20,
        )))
}

/// Gives each process a piece in turn.
fn talk(client: &mut Client, pids: &[u32]) -> Result<()> {
    for piece in 0..PIECES {
        for pid in pids {
            let bytes: Vec<u8> = (0..PIECE).map(|at| pattern(*pid, piece * PIECE + at)).collect();
            client.unary(&connect::send_input(*pid, &bytes))?;
        }
    }
    Ok(())
}

fn at_once(bench: &Bench) -> Result<Reading> {
    let agent = bench.agent()?;
    let mut mux = Mux::new()?;
    let mut streams = Vec::new();
    for token in 0..PROCESSES {
        streams.push(Stream::new(mux.connect(&agent, token)?));
    }
    let begin = Instant::now();
    for (index, stream) in streams.iter_mut().enumerate() {
        let script = format!("exit {}", index % 256);
        let request = connect::start(Codec::Json, &["/bin/sh", "-c", &script], false);
        stream.lane.open_stream(Codec::Json, &request)?;
    }
    let largest = pump(&agent, &mut mux, &mut streams, |stream| stream.lane.is_idle())?;
    let elapsed = begin.elapsed().as_secs_f64();
    let right = |(index, stream): &(usize, &Stream)| stream.exit == i32::try_from(index % 256).ok();
    let right = streams.iter().enumerate().filter(right).count() as f64;
    let held = agent.process().held()?;
    let judged = Promise::AtLeast(PROCESSES as f64).exactly(right);
    Ok(Reading::new(right, "exits", judged)
        .figure("seconds", elapsed, "s")
        .figure("rss", largest as f64 / f64::from(1 << 20), MEBIBYTES)
        .note(format!(
            "each with an exit code of its own, over 1,000 connections, in {elapsed:.2} s; {} zombies after it; RSS {:.1} MiB at most",
            held.zombies,
            largest as f64 / f64::from(1 << 20)
        )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_another_place_or_process_are_noticed() {
        let differ = |a: (u32, usize), b: (u32, usize)| {
            (0..64).any(|at| pattern(a.0, a.1 + at) != pattern(b.0, b.1 + at))
        };
        assert!(differ((7, 0), (8, 0)));
        assert!(differ((7, 0), (7, 1)));
        assert!(differ((7, 0), (7, PIECE)));
    }
}
