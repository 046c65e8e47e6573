//! Python environments below `target/`, made once and again when what they are to contain has changed.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::{steps, workspace};

/// An environment that is ready for use.
#[derive(Clone, Debug)]
pub struct Environment {
    folder: PathBuf,
}

impl Environment {
    /// Makes `target/<name>` contain what the requirements file asks for.
    pub fn ensure(name: &str, requirements: &Path) -> Result<Self> {
        let wanted = std::fs::read_to_string(requirements)
            .with_context(|| format!("cannot read {}", requirements.display()))?;
        let environment = Self { folder: workspace::target().join(name) };
        let stamp = environment.folder.join("requirements.installed");
        if std::fs::read_to_string(&stamp).is_ok_and(|installed| installed == wanted) {
            return Ok(environment);
        }
        steps::step(&format!("install {} into target/{name}", requirements_name(requirements)), || {
            // From scratch: what an older list had installed must not stay.
            let mut venv = Command::new(interpreter());
            steps::quietly(venv.args(["-m", "venv", "--clear"]).arg(&environment.folder))?;
            let mut pip = environment.python();
            pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"])
                .arg(requirements);
            steps::quietly(&mut pip)?;
            // Last: an environment that was cut off half-way has no stamp.
            std::fs::write(&stamp, &wanted).with_context(|| format!("cannot write {}", stamp.display()))
        })?;
        Ok(environment)
    }

    pub fn python(&self) -> Command {
        Command::new(self.program("python"))
    }

    pub fn program(&self, name: &str) -> PathBuf {
        self.folder.join("bin").join(name)
    }
}

/// The distribution's Python where it can make environments, else the one on PATH. Tests run programs of the environment
/// as other users, who cannot enter the home that somebody's own Python lies in.
fn interpreter() -> &'static str {
    let distribution = "/usr/bin/python3";
    let probe = Command::new(distribution).args(["-c", "import ensurepip, venv"]).output();
    if probe.is_ok_and(|probe| probe.status.success()) { distribution } else { "python3" }
}

fn requirements_name(path: &Path) -> String {
    path.strip_prefix(workspace::root()).unwrap_or(path).display().to_string()
}
