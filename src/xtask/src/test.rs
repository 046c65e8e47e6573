//! `cargo xtask test`: everything that decides whether a change is good, from formatting to real SDKs against real
//! sandboxes. pytest comes last, so that its closing line is the last of the output.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::deps::{self, Purpose};
use crate::python::Environment;
use crate::{image, lint, steps, workspace};

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Only what needs no sandbox: formatting, lints, dependencies, Rust tests
    #[arg(long, conflicts_with = "e2e")]
    unit: bool,
    /// Only the end-to-end tests
    #[arg(long)]
    e2e: bool,
    /// Only the end-to-end tests whose names match, in pytest's words
    #[arg(short = 'k', value_name = "EXPRESSION", conflicts_with = "unit")]
    select: Option<String>,
    /// Further options of pytest
    #[arg(last = true)]
    pytest: Vec<String>,
}

pub fn run(options: &Options) -> Result<()> {
    deps::ensure(Purpose::Test)?;
    if !options.e2e {
        lint::run()?;
        let mut tests = workspace::cargo();
        steps::openly(without_the_clock(tests.args(["test", "--quiet", "--workspace", "--locked"])))?;
    }
    if !options.unit {
        end_to_end(options)?;
    }
    Ok(())
}

fn end_to_end(options: &Options) -> Result<()> {
    let guestd = steps::step("build guestd", || workspace::build("guestd", "release"))?;
    let hostd = steps::step("build hostd", || workspace::build("hostd", "release"))?;
    // The container runtime needs the tree, and the tree needs root; without root its tests skip themselves.
    for template in ["base", "code-interpreter-v1"] {
        let image =
            image::Options { template: template.into(), tree: workspace::is_root(), ..Default::default() };
        image::build(&image, &guestd)?;
    }

    let tests = workspace::root().join("tests");
    let python = Environment::ensure("venv", &tests.join("requirements.txt"))?;
    let node = node_modules(&tests)?;

    let mut pytest = python.python();
    pytest.current_dir(workspace::root()).args(["-m", "pytest", "tests"]);
    if let Some(select) = &options.select {
        pytest.args(["-k", select]);
    }
    pytest.args(&options.pytest);
    // The names are those of tests/README.md.
    pytest.env("GUESTD_BIN", &guestd).env("HOSTD_BIN", &hostd).env("XTASK_BIN", std::env::current_exe()?);
    pytest.env("IMAGES_DIR", image::images()).env("VHOST_DEVICE_VSOCK", deps::vhost_device_vsock()?);
    pytest.env("TESTS_NODE_MODULES", node.join("node_modules"));
    let status = without_the_clock(&mut pytest).status().context("cannot run pytest")?;
    if !status.success() {
        // Its closing line says it all, and stays the last.
        std::process::exit(status.code().unwrap_or(1));
    }
    Ok(())
}

/// The agent sets the clock of the machine that it runs in. A test that runs it as root, outside of a sandbox, must not
/// set the clock of the machine under the tests: that outlasts them, and nothing says where it came from.
fn without_the_clock(command: &mut Command) -> &mut Command {
    let Some(setpriv) = workspace::find_program("setpriv").filter(|_| workspace::is_root()) else {
        return command;
    };
    let mut wrapped = Command::new(setpriv);
    wrapped.arg("--bounding-set=-sys_time").arg(command.get_program()).args(command.get_args());
    wrapped.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    if let Some(folder) = command.get_current_dir() {
        wrapped.current_dir(folder);
    }
    *command = wrapped;
    command
}

/// Installs the JavaScript SDKs into `target/node` and returns that folder.
fn node_modules(tests: &Path) -> Result<PathBuf> {
    let folder = workspace::target().join("node");
    let read = |name: &str| std::fs::read_to_string(tests.join(name));
    let Ok(package) = read("package.json") else { return Ok(folder) };
    let lock = read("package-lock.json").ok();
    let wanted = format!("{package}{}", lock.as_deref().unwrap_or_default());
    let stamp = folder.join("package.installed");
    if std::fs::read_to_string(&stamp).is_ok_and(|installed| installed == wanted) {
        return Ok(folder);
    }
    steps::step("install tests/package.json into target/node", || {
        let write = |name: &str, text: &str| {
            let path = folder.join(name);
            std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
        };
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        write("package.json", &package)?;
        let verb = match &lock {
            Some(lock) => {
                write("package-lock.json", lock)?;
                "ci"
            }
            None => "install",
        };
        let mut npm = Command::new("npm");
        steps::quietly(npm.current_dir(&folder).args([verb, "--no-audit", "--no-fund", "--loglevel=error"]))?;
        write("package.installed", &wanted)
    })?;
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_runs_as_it_would_without_the_wrapping_but_cannot_set_the_clock() {
        let mut command = Command::new("sh");
        command.args(["-c", "pwd; echo $GREETING; grep CapBnd /proc/self/status"]);
        command.current_dir("/usr").env("GREETING", "hello");
        let said = steps::output(without_the_clock(&mut command)).unwrap();
        assert!(said.starts_with("/usr\nhello\n"), "{said}");
        if workspace::is_root() && workspace::find_program("setpriv").is_some() {
            let bounding = said.trim().rsplit('\t').next().unwrap();
            const CAP_SYS_TIME: u64 = 1 << 25;
            assert_eq!(u64::from_str_radix(bounding, 16).unwrap() & CAP_SYS_TIME, 0, "{said}");
        }
    }
}
