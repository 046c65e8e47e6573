//! The project's own commands: `cargo xtask <command>`.
//!
//! One file per command. `steps` runs other programs and shows progress, `workspace` knows where things are, `tools`
//! builds and installs. None of it is part of what ships.

mod bench;
mod demo;
mod deps;
mod fuzz;
mod image;
mod lint;
mod python;
mod simulate;
mod steps;
mod supervisor;
mod test;
mod trust;
mod up;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Builds, tries and tests guestd and hostd")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the whole thing: a sandbox is created, used, left alone, and released
    Demo(demo::Options),
    /// Start hostd here and print what to set for each SDK
    Up(up::Options),
    /// Build the agent and a guest image
    Image(image::Options),
    /// Check and test everything
    Test(test::Options),
    /// Measure the promises of the design, each beside its floor
    Bench(bench::Options),
    /// A thousand simulated guests under the real hostd: when is each released?
    Simulate(simulate::Options),
    /// One floor of `bench`, in a process of its own
    #[command(hide = true)]
    BenchFloor(bench::FloorOptions),
    /// Look for inputs that crash, hang or grow the agent
    Fuzz(fuzz::Options),
    /// Check formatting, lints and dependencies
    Lint,
    /// Install what the other commands need
    Deps(deps::Options),
}

fn main() -> ExitCode {
    let Err(error) = run(Cli::parse().command) else { return ExitCode::SUCCESS };
    eprintln!("\nerror: {error}");
    for cause in error.chain().skip(1) {
        eprintln!("because: {cause}");
    }
    ExitCode::FAILURE
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Demo(options) => demo::run(&options),
        Command::Up(options) => up::run(&options),
        Command::Image(options) => image::run(&options),
        Command::Test(options) => test::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Simulate(options) => simulate::run(&options),
        Command::BenchFloor(options) => bench::run_floor(&options),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Lint => lint::run(),
        Command::Deps(options) => deps::run(&options),
    }
}
