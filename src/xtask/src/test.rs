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
        steps::openly(workspace::cargo().args(["test", "--quiet", "--workspace", "--locked"]))?;
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
    let image = image::Options { tree: workspace::is_root(), ..Default::default() };
    image::build(&image, &guestd)?;

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
    steps::openly(&mut pytest)
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
