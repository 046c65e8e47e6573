//! Running a command that does nothing, to its exit.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::Bench;
use super::client::Client;
use super::connect::{self, Codec};
use super::row::{Gate, Promise, Reading, Row};
use super::stats::{Paired, Samples};

pub const ROWS: &[Row] = &[Row {
    name: "run-true",
    title: "run /bin/true and get its exit",
    promise: "<= 2.0 x spawn and wait",
    gate: Gate::Margin(2.0),
    measure,
}];

const COMMAND: &str = "/bin/true";
const MICROSECONDS: &str = "us";

fn measure(bench: &Bench) -> Result<Reading> {
    let agent = bench.agent()?;
    let mut client = agent.connect()?;
    let request = connect::start(Codec::Json, &[COMMAND], false);
    let batch = bench.scale(50, 25);
    let rounds = bench.scale(30, 10);

    let (mut agent_times, mut floor_times) = (Vec::new(), Vec::new());
    let (mut fork_times, mut health_times) = (Vec::new(), Vec::new());
    let cpu = agent.process().cpu()?;
    let paired = Paired::run(
        rounds,
        || {
            let times = repeat(batch, || run(&mut client, &request))?;
            agent_times.extend(&times);
            median(times)
        },
        || {
            let times = repeat(batch, || spawn(false))?;
            floor_times.extend(&times);
            fork_times.extend(repeat(batch / 5, || spawn(true))?);
            median(times)
        },
    )?;
    let cpu = agent.process().cpu()?.saturating_sub(cpu).as_secs_f64() * 1e6 / (rounds * batch) as f64;
    health_times.extend(repeat(rounds * 10, || client.health())?);

    let all = |times| Samples::new(times).context("nothing was measured");
    let (ours, floor) = (all(agent_times)?, all(floor_times)?);
    let (fork, health) = (all(fork_times)?, all(health_times)?);
    let (low, high) = paired.ratio.spread();
    Ok(Reading::new(ours.median(), MICROSECONDS, Promise::AtMost(2.0).of(&paired.ratio))
        .floor(floor.median(), MICROSECONDS)
        .ratio(paired.ratio.median())
        .figure("p90", ours.percentile(90.0), MICROSECONDS)
        .figure("p99", ours.percentile(99.0), MICROSECONDS)
        .figure("floor_p90", floor.percentile(90.0), MICROSECONDS)
        .figure("fork_floor", fork.median(), MICROSECONDS)
        .figure("health", health.median(), MICROSECONDS)
        .figure("agent_cpu", cpu, MICROSECONDS)
        .note(format!(
            "p90 {:.0} us against {:.0} us; ratio {low:.2} to {high:.2} in the middle half of {rounds} rounds of {batch}",
            ours.percentile(90.0),
            floor.percentile(90.0),
        ))
        .note(format!(
            "floor: posix_spawn with two pipes read to their ends, and wait; the same with fork and exec {:.0} us; GET /health on the same connection {:.0} us; {cpu:.0} us of the agent's processor time for each",
            fork.median(),
            health.median(),
        )))
}

fn repeat(count: usize, mut work: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
    let timed = |_| {
        let begin = Instant::now();
        work().map(|()| begin.elapsed().as_secs_f64() * 1e6)
    };
    (0..count).map(timed).collect()
}

fn median(times: Vec<f64>) -> Result<f64> {
    Ok(Samples::new(times).context("nothing was measured")?.median())
}

fn run(client: &mut Client, request: &[u8]) -> Result<()> {
    let (code, _) = client.run(Codec::Json, request)?;
    ensure!(code == 0, "{COMMAND} ended with {code}");
    Ok(())
}

/// What the agent does for a command, without the agent: no input, both outputs on pipes, all read, the exit waited for.
fn spawn(fork: bool) -> Result<()> {
    let mut command = Command::new(COMMAND);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    if fork {
        // SAFETY: the hook does nothing; that there is one makes std fork.
        unsafe { command.pre_exec(|| Ok(())) };
    }
    let mut child = command.spawn()?;
    let mut text = Vec::new();
    child.stdout.take().context("no pipe")?.read_to_end(&mut text)?;
    child.stderr.take().context("no pipe")?.read_to_end(&mut text)?;
    ensure!(child.wait()?.success() && text.is_empty(), "{COMMAND} failed");
    Ok(())
}
