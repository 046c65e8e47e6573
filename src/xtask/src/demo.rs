//! `cargo xtask demo`: one sandbox from its creation to its release, through the E2B SDK as it is published.

use std::path::Path;

use anyhow::{Context, Result};

use crate::python::Environment;
use crate::supervisor::{Runtime, Settings, Supervisor, free_address};
use crate::{deps, image, steps, workspace};

#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Options {
    /// How the sandbox is run
    #[arg(long, value_enum, default_value = "auto")]
    runtime: Runtime,
    /// The sandbox's idle_timeout in seconds
    #[arg(long, default_value_t = 60)]
    idle: u32,
}

pub fn run(options: &Options) -> Result<()> {
    deps::ensure(options.runtime.purpose())?;
    let program = steps::step("build hostd", || workspace::build("hostd", "release"))?;
    image::run(&image::Options { tree: options.runtime == Runtime::Container, ..Default::default() })?;
    let assets = workspace::root().join("src/xtask/assets");
    let python = Environment::ensure("demo-venv", &assets.join("demo-requirements.txt"))?;

    let scratch = tempfile::tempdir().context("cannot make a folder for the demo's records")?;
    let log = workspace::target().join("demo-hostd.log");
    let settings = Settings {
        program,
        data: scratch.path().to_owned(),
        images: image::images(),
        api: free_address()?,
        proxy: free_address()?,
        runtime: options.runtime,
        more: vec![],
    };
    let mut supervisor = steps::step("start hostd", || Supervisor::start(&settings, Some(&log)))?;
    let outcome = play(options, &python, &assets.join("demo.py"), &supervisor);
    supervisor.stop();
    outcome.with_context(|| {
        format!("the demo did not get to its end; hostd's own words are in {}", log.display())
    })
}

fn play(options: &Options, python: &Environment, script: &Path, supervisor: &Supervisor) -> Result<()> {
    let mut command = python.python();
    command.arg(script).args(["--idle", &options.idle.to_string()]);
    command.envs([
        ("E2B_API_KEY", "any"),
        ("E2B_API_URL", &supervisor.api),
        ("E2B_SANDBOX_URL", &supervisor.proxy),
    ]);
    let status = command.status().context("cannot run the demo's script")?;
    anyhow::ensure!(status.success(), "the script ended with {status}");
    Ok(())
}
