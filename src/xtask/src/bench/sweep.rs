//! Latency and throughput over 1 to 1,000 concurrent streams, in a closed loop: each stream has one operation under way.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde::Serialize;

use super::Bench;
use super::agent::Agent;
use super::connect::{self, Codec, Event};
use super::floor;
use super::mux::{Lane, Mux};
use super::stats::Samples;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// A command from its request to its end.
    Run,
    /// From the input of a running process to its echo on the open stream.
    Echo,
    /// Output of one process for each stream.
    OutputJson,
    OutputBinary,
}

/// What was measured at one number of streams.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Point {
    pub operation: Operation,
    pub streams: usize,
    /// Of one operation; none for output.
    pub p50_ms: Option<f64>,
    pub p99_ms: Option<f64>,
    /// Operations a second, or megabytes of output a second.
    pub per_second: f64,
}

const LEVELS: [usize; 10] = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000];
const QUICK_LEVELS: [usize; 4] = [1, 10, 100, 1000];

/// With nothing coming for so long, something is lost.
const SILENCE: Duration = Duration::from_secs(20);

/// All operations at all levels.
///
/// # Errors
/// The first stream that breaks, or that nothing comes from any more.
pub fn run(bench: &Bench) -> Result<Vec<Point>> {
    let levels: &[usize] = bench.scale(&LEVELS, &QUICK_LEVELS);
    let mut points = Vec::new();
    for &streams in levels {
        points.push(commands(bench, streams)?);
        points.push(echoes(bench, streams)?);
        points.push(output(bench, streams, Codec::Json)?);
        points.push(output(bench, streams, Codec::Binary)?);
    }
    Ok(points)
}

/// Long enough for the median, short enough for ten levels.
fn duration(bench: &Bench) -> Duration {
    bench.scale(Duration::from_secs(3), Duration::from_secs(1))
}

/// The times of operations that ended.
#[derive(Debug)]
struct Tally {
    begin: Instant,
    milliseconds: Vec<f64>,
}

impl Tally {
    fn new() -> Self {
        Self { begin: Instant::now(), milliseconds: Vec::new() }
    }

    fn add(&mut self, since: Instant) {
        self.milliseconds.push(since.elapsed().as_secs_f64() * 1e3);
    }

    fn point(self, operation: Operation, streams: usize) -> Result<Point> {
        let seconds = self.begin.elapsed().as_secs_f64();
        let per_second = self.milliseconds.len() as f64 / seconds;
        let samples = Samples::new(self.milliseconds).ok_or_else(|| anyhow::anyhow!("nothing ended"))?;
        let (p50_ms, p99_ms) = (Some(samples.median()), Some(samples.percentile(99.0)));
        Ok(Point { operation, streams, p50_ms, p99_ms, per_second })
    }
}

/// Reads what is ready, and fails when nothing is for too long.
fn ready(mux: &Mux) -> Result<Vec<usize>> {
    let tokens = mux.ready(SILENCE)?;
    ensure!(!tokens.is_empty(), "nothing came for {} s", SILENCE.as_secs());
    Ok(tokens)
}

fn commands(bench: &Bench, streams: usize) -> Result<Point> {
    let agent = bench.agent()?;
    let mut mux = Mux::new()?;
    let request = connect::start(Codec::Json, &["/bin/true"], false);
    let mut lanes = connections(&agent, &mux, 0, streams)?;
    let mut since = Vec::new();
    let mut tally = Tally::new();
    for lane in &mut lanes {
        since.push(Instant::now());
        lane.open_stream(Codec::Json, &request)?;
    }
    let mut under_way = streams;
    while under_way > 0 {
        for token in ready(&mux)? {
            let lane = &mut lanes[token];
            mux.read(lane, &mut |_| Ok(()))?;
            if !lane.is_idle() {
                continue;
            }
            tally.add(since[token]);
            if tally.begin.elapsed() < duration(bench) {
                since[token] = Instant::now();
                lane.open_stream(Codec::Json, &request)?;
            } else {
                under_way -= 1;
            }
        }
    }
    tally.point(Operation::Run, streams)
}

fn connections(agent: &Agent, mux: &Mux, from: usize, count: usize) -> Result<Vec<Lane>> {
    (from..from + count).map(|token| mux.connect(agent, token)).collect()
}

/// Starts a command on each lane and waits for their numbers; what they say already is counted by `bytes`.
fn started(
    mux: &mut Mux,
    lanes: &mut [Lane],
    codec: Codec,
    request: &[u8],
    bytes: &mut u64,
) -> Result<Vec<u32>> {
    let mut pids = vec![None; lanes.len()];
    for lane in lanes.iter_mut() {
        lane.open_stream(codec, request)?;
    }
    while pids.contains(&None) {
        for token in ready(mux)? {
            mux.read(&mut lanes[token], &mut |event| {
                match event {
                    Event::Start { pid } => pids[token] = Some(pid),
                    Event::Output(output) => *bytes += output.len() as u64,
                    Event::End { .. } | Event::Other => {}
                }
                Ok(())
            })?;
        }
    }
    Ok(pids.into_iter().flatten().collect())
}

fn echoes(bench: &Bench, streams: usize) -> Result<Point> {
    let agent = bench.agent()?;
    let mut mux = Mux::new()?;
    let mut lanes = connections(&agent, &mux, 0, streams)?;
    let request = connect::start(Codec::Json, &["/bin/cat"], true);
    let pids = started(&mut mux, &mut lanes, Codec::Json, &request, &mut 0)?;
    lanes.extend(connections(&agent, &mux, streams, streams)?);
    let requests: Vec<_> = pids.iter().map(|pid| connect::send_input(*pid, &[b'x'; 64])).collect();

    let mut tally = Tally::new();
    let mut since = vec![tally.begin; streams];
    // Of each stream: what is missing of its echo.
    let mut missing = vec![64_usize; streams];
    for (stream, request) in requests.iter().enumerate() {
        since[stream] = Instant::now();
        lanes[streams + stream].call(request)?;
    }
    let mut under_way = streams;
    while under_way > 0 {
        for token in ready(&mux)? {
            let stream = token % streams;
            let mut heard = 0;
            mux.read(&mut lanes[token], &mut |event| {
                if let Event::Output(output) = event {
                    heard += output.len();
                }
                Ok(())
            })?;
            if heard > 0 {
                missing[stream] = missing[stream].saturating_sub(heard);
                if missing[stream] == 0 {
                    tally.add(since[stream]);
                }
            }
            // The next one when the echo is there and the call was answered.
            let input = &mut lanes[streams + stream];
            if missing[stream] > 0 || !input.is_idle() {
                continue;
            }
            if tally.begin.elapsed() < duration(bench) {
                missing[stream] = 64;
                since[stream] = Instant::now();
                input.call(&requests[stream])?;
            } else {
                under_way -= 1;
            }
        }
    }
    let point = tally.point(Operation::Echo, streams);
    let mut client = agent.connect()?;
    for pid in pids {
        client.unary(&connect::close_stdin(pid))?;
    }
    point
}

fn output(bench: &Bench, streams: usize, codec: Codec) -> Result<Point> {
    let agent = bench.agent()?;
    let mut mux = Mux::new()?;
    let total: u64 = bench.scale(512 << 20, 128 << 20);
    let blocks = (total / floor::BLOCK / streams as u64).max((1 << 20) / floor::BLOCK);
    let command = floor::producer(blocks);
    let command: Vec<_> = command.iter().map(String::as_str).collect();
    let request = connect::start(codec, &command, false);
    let mut lanes = connections(&agent, &mux, 0, streams)?;
    // Starting them is another operation: the clock runs when all have begun.
    let mut early = 0;
    started(&mut mux, &mut lanes, codec, &request, &mut early)?;
    let begin = Instant::now();
    let mut bytes = 0;
    let mut open = lanes.iter().filter(|lane| !lane.is_idle()).count();
    while open > 0 {
        for token in ready(&mux)? {
            mux.read(&mut lanes[token], &mut |event| {
                if let Event::Output(output) = event {
                    bytes += output.len() as u64;
                }
                Ok(())
            })?;
            open -= usize::from(lanes[token].is_idle());
        }
    }
    let expected = blocks * floor::BLOCK * streams as u64;
    ensure!(early + bytes == expected, "lost output: {} of {expected} bytes", early + bytes);
    let operation = if codec == Codec::Json { Operation::OutputJson } else { Operation::OutputBinary };
    let per_second = bytes as f64 / 1e6 / begin.elapsed().as_secs_f64();
    Ok(Point { operation, streams, p50_ms: None, p99_ms: None, per_second })
}
