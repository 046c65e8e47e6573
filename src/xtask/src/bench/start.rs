//! From exec to the first answered request.

use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::Bench;
use super::agent::Agent;
use super::row::{Gate, MILLISECONDS, Promise, Reading, Row};
use super::stats::Paired;

pub const ROWS: &[Row] = &[Row {
    name: "start",
    title: "start: exec to first answered request",
    promise: "<= 10 ms",
    gate: Gate::Margin(5.0),
    measure,
}];

fn measure(bench: &Bench) -> Result<Reading> {
    let nothing = trivial_program(bench)?;
    let floor = || {
        let begin = Instant::now();
        let status = Command::new(&nothing).status()?;
        ensure!(status.success(), "the trivial program failed");
        Ok(begin.elapsed().as_secs_f64() * 1e3)
    };
    let start = || {
        let (_agent, elapsed) = Agent::start_timed(&bench.program, bench.work.path())?;
        Ok(elapsed.as_secs_f64() * 1e3)
    };
    let paired = Paired::run(bench.scale(40, 15), start, floor)?;
    let (median, min) = (paired.measured.median(), paired.measured.min());
    Ok(Reading::new(median, MILLISECONDS, Promise::AtMost(10.0).of(&paired.measured))
        .floor(paired.floor.median(), MILLISECONDS)
        .ratio(paired.ratio.median())
        .figure("min", min, MILLISECONDS)
        .figure("max", paired.measured.max(), MILLISECONDS)
        .figure("floor_min", paired.floor.min(), MILLISECONDS)
        .note(format!(
            "fastest {min:.2} ms, slowest {:.2} ms; floor: a static program that does nothing, exec to exit (fastest {:.2} ms)",
            paired.measured.max(),
            paired.floor.min()
        )))
}

/// The least that a static program of this language can do.
fn trivial_program(bench: &Bench) -> Result<PathBuf> {
    let (source, program) = (bench.work.path().join("nothing.rs"), bench.work.path().join("nothing"));
    std::fs::write(&source, "fn main() {}\n")?;
    let rustc = std::env::var_os("RUSTC").unwrap_or("rustc".into());
    let mut command = Command::new(rustc);
    command.args(["-C", "target-feature=+crt-static", "-C", "opt-level=s", "-C", "strip=symbols", "-o"]);
    crate::steps::quietly(command.arg(&program).arg(&source))
        .context("cannot build the floor of the start")?;
    Ok(program)
}
