//! The output of one process to one client.
//!
//! "On one core" is payload by the agent's own processor time: on a machine with fewer free cores than the three parties of this row
//! (producer, agent, client), wall time says more about the machine. Both are shown.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::Bench;
use super::client::Client;
use super::connect::{self, Codec};
use super::floor::{self, Floor};
use super::proc::Process;
use super::row::{Gate, MEGABYTES_PER_SECOND, Promise, Reading, Row};
use super::stats::{Paired, Samples};

pub const ROWS: &[Row] = &[
    Row {
        name: "stdout-json",
        title: "stdout to the client, JSON codec",
        promise: ">= 400 MB/s on one core, or >= 60 % of base64",
        gate: Gate::Margin(2.0),
        measure: json,
    },
    Row {
        name: "stdout-binary",
        title: "stdout to the client, binary codec",
        promise: ">= 1 GB/s on one core, or >= 50 % of pipe to socket",
        gate: Gate::Margin(2.0),
        measure: binary,
    },
];

/// What the agent reads from a pipe at once (contract: envd.md section 2.6).
const CHUNK: usize = 32 * 1024;

/// Megabytes per second.
#[derive(Clone, Copy, Debug)]
struct Rate {
    of_cpu: f64,
    of_wall: f64,
}

impl Rate {
    fn new(bytes: u64, cpu: Duration, wall: Duration) -> Self {
        let rate = |time: Duration| bytes as f64 / 1e6 / time.as_secs_f64();
        Self { of_cpu: rate(cpu), of_wall: rate(wall) }
    }
}

fn blocks(bench: &Bench) -> u64 {
    bench.scale(512 << 20, 128 << 20) / floor::BLOCK
}

fn through_agent(client: &mut Client, process: Process, codec: Codec, blocks: u64) -> Result<Rate> {
    let command = floor::producer(blocks);
    let command: Vec<_> = command.iter().map(String::as_str).collect();
    let (cpu, begin) = (process.cpu()?, Instant::now());
    let (code, bytes) = client.run(codec, &connect::start(codec, &command, false))?;
    let (wall, cpu) = (begin.elapsed(), process.cpu()?.saturating_sub(cpu));
    ensure!(code == 0 && bytes == blocks * floor::BLOCK, "lost output: {bytes} bytes of {blocks} blocks");
    Ok(Rate::new(bytes, cpu, wall))
}

fn json(bench: &Bench) -> Result<Reading> {
    let agent = bench.agent()?;
    let mut client = agent.connect()?;
    let blocks = blocks(bench);
    let mut wall = Vec::new();
    let paired = Paired::run(
        bench.scale(7, 5),
        || {
            let rate = through_agent(&mut client, agent.process(), Codec::Json, blocks)?;
            wall.push(rate.of_wall);
            Ok(rate.of_cpu)
        },
        || Ok(base64_alone(blocks * floor::BLOCK)),
    )?;
    let judged = Promise::AtLeast(400.0).of(&paired.measured).or(Promise::AtLeast(0.6).of(&paired.ratio));
    Ok(reading(&paired, &wall, judged)?
        .note("floor: base64 of chunks of 32 KiB in a loop; both by their processor time"))
}

fn binary(bench: &Bench) -> Result<Reading> {
    let agent = bench.agent()?;
    let mut client = agent.connect()?;
    let blocks = blocks(bench);
    let (mut wall, mut floor_wall, mut spliced) = (Vec::new(), Vec::new(), Vec::new());
    let paired = Paired::run(
        bench.scale(7, 5),
        || {
            let rate = through_agent(&mut client, agent.process(), Codec::Binary, blocks)?;
            wall.push(rate.of_wall);
            Ok(rate.of_cpu)
        },
        || {
            spliced.push(pipe_to_socket(blocks, true)?.of_cpu);
            let rate = pipe_to_socket(blocks, false)?;
            floor_wall.push(rate.of_wall);
            Ok(rate.of_cpu)
        },
    )?;
    let judged = Promise::AtLeast(1000.0).of(&paired.measured).or(Promise::AtLeast(0.5).of(&paired.ratio));
    let (floor_wall, spliced) = (median(floor_wall)?, median(spliced)?);
    Ok(reading(&paired, &wall, judged)?
        .figure("floor_wall", floor_wall, MEGABYTES_PER_SECOND)
        .figure("splice_floor", spliced, MEGABYTES_PER_SECOND)
        .note(format!(
            "floor: read and write from a pipe to a loopback socket, both by their processor time; the floor by the wall clock {floor_wall:.0} MB/s; with splice(2) {spliced:.0} MB/s"
        )))
}

fn reading(paired: &Paired, wall: &[f64], judged: super::row::Judgement) -> Result<Reading> {
    let wall = median(wall.to_vec())?;
    let (low, high) = paired.measured.spread();
    Ok(Reading::new(paired.measured.median(), MEGABYTES_PER_SECOND, judged)
        .floor(paired.floor.median(), MEGABYTES_PER_SECOND)
        .ratio(paired.ratio.median())
        .figure("wall", wall, MEGABYTES_PER_SECOND)
        .note(format!("of payload by a second of the agent's processor time ({low:.0} to {high:.0}); by the wall clock {wall:.0} MB/s")))
}

fn median(values: Vec<f64>) -> Result<f64> {
    Samples::new(values)
        .map(|samples| samples.median())
        .ok_or_else(|| anyhow::anyhow!("nothing was measured"))
}

/// Megabytes of input a second. One thread that does nothing else: its time is its processor time, but for who takes the core away.
fn base64_alone(bytes: u64) -> f64 {
    let input = vec![0x5a; CHUNK];
    let mut output = vec![0; CHUNK.div_ceil(3) * 4];
    let process = Process::new(std::process::id());
    let count = (4 * bytes).div_ceil(CHUNK as u64);
    let (begin, cpu) = (Instant::now(), process.cpu());
    for _ in 0..count {
        let encoded = STANDARD.encode_slice(std::hint::black_box(&input), &mut output);
        std::hint::black_box(encoded.is_ok());
    }
    let wall = begin.elapsed();
    let cpu = cpu.and_then(|before| Ok(process.cpu()?.saturating_sub(before))).unwrap_or(wall);
    Rate::new(count * CHUNK as u64, cpu, wall).of_cpu
}

fn pipe_to_socket(blocks: u64, splice: bool) -> Result<Rate> {
    let mut floor = Floor::pipe(blocks, splice)?;
    let begin = Instant::now();
    let bytes = floor.drain()?;
    let wall = begin.elapsed();
    ensure!(bytes == blocks * floor::BLOCK, "a floor lost output");
    Ok(Rate::new(bytes, floor.finish()?, wall))
}
