//! `cargo xtask bench`: the promises of the design as numbers, each beside its floor in the same run.
//!
//! A family of rows is a file with a list of [`Row`]s; [`ROWS`] puts the families in order. The agent is measured from outside, through
//! its wire: `agent` starts it, `client` talks to it (`http` and `connect` take its answers apart), `proc` asks the kernel about it,
//! `floor` does the same work without it. `stats` and `row` decide, `report` shows. `sweep` measures over concurrency, `plot` draws it.
//!
//! Times on a shared machine scatter: what is measured and its floor take turns, medians count, and `--check` fails only on what such
//! a machine can decide (see [`Gate`]).

mod agent;
mod client;
mod code;
mod connect;
mod crowd;
mod flood;
mod floor;
mod footprint;
mod http;
mod leftovers;
mod mux;
mod plot;
pub(crate) mod proc;
mod report;
mod row;
mod spawn;
mod start;
pub(crate) mod stats;
mod stdout;
mod sweep;
mod transfer;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::{steps, workspace};
use agent::Agent;
use row::{Reading, Row};

pub use floor::{Options as FloorOptions, run as run_floor};

/// What a floor and a client need beside the agent's own: 2,000 streams.
const OPEN_FILES: u64 = 16 * 1024;

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Only these rows (a name from the table's first column; may be repeated)
    #[arg(long, value_name = "NAME")]
    row: Vec<String>,
    /// Less data, fewer rounds, shorter waits
    #[arg(long)]
    quick: bool,
    /// Write everything that was measured to this file
    #[arg(long, value_name = "PATH")]
    json: Option<PathBuf>,
    /// Measure over 1 to 1,000 streams and draw it (SVG)
    #[arg(long, value_name = "PATH")]
    plot: Option<PathBuf>,
    /// Fail when a row that a shared machine can decide falls short
    #[arg(long)]
    check: bool,
    /// How long the flood with a stalled reader lasts: 3600 is the promise's hour
    #[arg(long, value_name = "N")]
    flood_seconds: Option<u64>,
    /// Measure this agent (a static binary) instead of building one; the size is still the dist build's
    #[arg(long, value_name = "PATH")]
    agent: Option<PathBuf>,
}

const FAMILIES: &[&[Row]] = &[
    footprint::ROWS,
    start::ROWS,
    spawn::ROWS,
    stdout::ROWS,
    transfer::ROWS,
    crowd::ROWS,
    flood::ROWS,
    leftovers::ROWS,
    code::ROWS,
];

/// What the rows are measured with.
#[derive(Debug)]
pub struct Bench {
    /// The agent's program, built for speed as it is released.
    program: PathBuf,
    /// A folder on the file system of the build: on many machines /tmp is memory.
    work: tempfile::TempDir,
    quick: bool,
    flood: Duration,
}

impl Bench {
    fn agent(&self) -> Result<Agent> {
        Agent::start(&self.program, self.work.path())
    }

    /// One of two numbers, by `--quick`.
    fn scale<T>(&self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }
}

/// Measures, reports, and says whether `--check` is satisfied.
pub fn run(options: &Options) -> Result<()> {
    let rows = select(&options.row)?;
    allow_files()?;
    let bench = prepare(options)?;
    let mut measured = Vec::new();
    for row in rows {
        let reading = steps::step(row.title, || Ok((row.measure)(&bench)))?;
        measured.push((row, reading.unwrap_or_else(|error| Reading::failed(&error))));
    }
    let mut points = Vec::new();
    if let Some(path) = &options.plot {
        points = steps::step("latency and throughput over 1 to 1,000 streams", || sweep::run(&bench))?;
        plot::draw(path, &points)?;
        eprintln!("     drawn: {}", path.display());
    }
    print!("{}", report::table(&measured));
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&report::json(&measured, &points, options.quick))?;
        std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    let failing: Vec<_> =
        measured.iter().filter(|(row, reading)| reading.fails(row.gate)).map(|(row, _)| row.name).collect();
    ensure!(!options.check || failing.is_empty(), "these promises are not kept: {}", failing.join(", "));
    Ok(())
}

fn select(names: &[String]) -> Result<Vec<&'static Row>> {
    let all = || FAMILIES.iter().copied().flatten();
    if names.is_empty() {
        return Ok(all().collect());
    }
    let find = |name: &String| {
        all().find(|row| row.name == name).with_context(|| {
            let known: Vec<_> = all().map(|row| row.name).collect();
            format!("--row {name}: there is no such row; the rows are {}", known.join(", "))
        })
    };
    names.iter().map(find).collect()
}

fn prepare(options: &Options) -> Result<Bench> {
    let program = match &options.agent {
        Some(path) => std::path::absolute(path)?,
        None => steps::step("build guestd", || workspace::build("guestd", "dist"))?,
    };
    workspace::require_static(&program)?;
    std::fs::create_dir_all(workspace::target())?;
    let work = tempfile::Builder::new().prefix("bench-").tempdir_in(workspace::target())?;
    let flood = Duration::from_secs(options.flood_seconds.unwrap_or(if options.quick { 15 } else { 60 }));
    Ok(Bench { program, work, quick: options.quick, flood })
}

/// Each stream is a descriptor here and one in the agent, which inherits the limit.
fn allow_files() -> Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let wanted = OPEN_FILES.min(hard).max(soft);
    setrlimit(Resource::RLIMIT_NOFILE, wanted, hard)?;
    ensure!(wanted >= 8 * 1024, "the limit of open files is {hard}: 2,000 streams need 8192 (ulimit -Hn)");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_is_found_by_its_own_name() {
        let all: Vec<_> = FAMILIES.iter().copied().flatten().collect();
        for row in &all {
            assert_eq!(all.iter().filter(|other| other.name == row.name).count(), 1, "{}", row.name);
            assert_eq!(select(&[row.name.to_owned()]).unwrap()[0].title, row.title);
        }
        assert_eq!(select(&[]).unwrap().len(), all.len());
    }

    #[test]
    fn a_row_that_does_not_exist_is_an_error_that_names_those_that_do() {
        let error = select(&["sise".to_owned()]).unwrap_err().to_string();
        assert!(error.contains("sise") && error.contains("size"), "{error}");
    }
}
