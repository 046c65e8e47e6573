//! `cargo xtask fuzz`: lets libFuzzer look for inputs that crash, hang or grow the agent (`tests/fuzz`).
//!
//! Needs a nightly compiler and cargo-fuzz. What is found is kept in `target/fuzz`, not in the tree: `tests/fuzz/corpus` is small on
//! purpose, and replayed by guestd's tests.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{steps, workspace};

const TARGETS: [&str; 7] = [
    "connect_envelope",
    "json_bodies",
    "kernel_messages",
    "multipart",
    "path_resolution",
    "process_state_machine",
    "signature",
];

#[derive(Debug, clap::Args)]
pub struct Options {
    /// One target; all of them, one after the other, when there is none
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(TARGETS))]
    target: Option<String>,
    /// How long each runs
    #[arg(long, default_value_t = 600)]
    seconds: u32,
}

pub fn run(options: &Options) -> Result<()> {
    for tool in ["cargo-fuzz", "rustup"] {
        if workspace::find_program(tool).is_none() {
            bail!("{tool} is not on PATH: `rustup toolchain install nightly` and `cargo install cargo-fuzz`");
        }
    }
    for target in TARGETS.iter().filter(|target| options.target.as_deref().is_none_or(|one| one == **target))
    {
        steps::step(&format!("fuzz {target} for {} s", options.seconds), || fuzz(target, options.seconds))?;
    }
    Ok(())
}

fn fuzz(target: &str, seconds: u32) -> Result<()> {
    let folder = workspace::root().join("tests/fuzz");
    let found = workspace::target().join("fuzz").join(target);
    let artifacts = found.join("artifacts");
    let corpus = found.join("corpus");
    for folder in [&artifacts, &corpus] {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    open_to_nobody(&artifacts)?;
    open_to_nobody(&corpus)?;
    let mut command = Command::new("rustup");
    command
        .current_dir(&folder)
        .env_remove("RUSTUP_TOOLCHAIN")
        .env_remove("CARGO")
        .args(["run", "nightly", "cargo-fuzz", "run", "--fuzz-dir", ".", target])
        .args([&corpus, &folder.join("corpus").join(target)])
        .env("GUESTD_FUZZ_WRITABLE", format!("{}:{}", artifacts.display(), corpus.display()))
        .arg("--")
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .args(["-timeout=10", "-rss_limit_mb=1024", "-max_len=4096", "-print_final_stats=1"]);
    let log = steps::output(&mut command)?;
    log.lines().filter(|line| line.starts_with("stat::")).for_each(|line| eprintln!("     {line}"));
    Ok(())
}

/// A fuzzed agent is nobody's, even when root started it.
fn open_to_nobody(folder: &std::path::Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    Ok(fs::set_permissions(folder, fs::Permissions::from_mode(0o777))?)
}
