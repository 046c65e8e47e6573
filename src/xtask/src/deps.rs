//! `cargo xtask deps`: installs what is missing, and only that. The other commands call [`ensure`] first.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure as require};
use clap::ValueEnum;

use crate::{steps, workspace};

/// The vsock backend for QEMU: it is in no distribution, and builds without any system library.
const VHOST_DEVICE_VSOCK: (&str, &str) = ("vhost-device-vsock", "0.3.0");

/// What the tools are needed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Purpose {
    /// Building an image
    Image,
    /// Running sandboxes in virtual machines
    Demo,
    /// Running sandboxes in containers
    Container,
    /// Everything
    Test,
}

#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Options {
    #[arg(long = "for", value_enum, default_value = "test")]
    purpose: Purpose,
}

pub fn run(options: &Options) -> Result<()> {
    ensure(options.purpose)?;
    eprintln!("  ok everything is installed");
    Ok(())
}

/// One thing that has to be there, and the Debian package that brings it.
struct Need {
    what: &'static str,
    package: &'static str,
    why: &'static str,
    purposes: &'static [Purpose],
    is_there: fn(&str) -> bool,
}

use Purpose::{Container, Demo, Image, Test};

const NEEDS: &[Need] = &[
    program(
        "mmdebstrap",
        "mmdebstrap",
        "to install the packages of a guest image",
        &[Image, Demo, Container, Test],
    ),
    program("sqfstar", "squashfs-tools", "to pack a guest image", &[Image, Demo, Container, Test]),
    program("dpkg-deb", "dpkg", "to unpack the guest's kernel", &[Image, Demo, Container, Test]),
    Need {
        what: "the Debian archive's keys",
        package: "debian-archive-keyring",
        why: "to check the packages of a guest image",
        purposes: &[Image, Demo, Container, Test],
        is_there: |_| std::path::Path::new("/usr/share/keyrings/debian-archive-keyring.gpg").exists(),
    },
    Need {
        what: "newuidmap",
        package: "uidmap",
        why: "to build a guest image without root",
        purposes: &[Image, Demo, Test],
        is_there: |name| workspace::is_root() || workspace::find_program(name).is_some(),
    },
    program("qemu-system-x86_64", "qemu-system-x86", "to run sandboxes in virtual machines", &[Demo, Test]),
    program("runc", "runc", "to run sandboxes in containers", &[Container, Test]),
    Need {
        what: "python3 with venv",
        package: "python3-venv",
        why: "to run the SDKs, and to fetch wheels for a guest image",
        purposes: &[Image, Demo, Container, Test],
        is_there: |_| {
            // The distribution's own: other users can run it (see `python`).
            let probe = Command::new("/usr/bin/python3").args(["-c", "import ensurepip, venv"]).output();
            probe.is_ok_and(|probe| probe.status.success())
        },
    },
    program("npm", "npm", "to run the JavaScript SDKs", &[Test]),
];

const fn program(
    what: &'static str,
    package: &'static str,
    why: &'static str,
    purposes: &'static [Purpose],
) -> Need {
    Need { what, package, why, purposes, is_there: |name| workspace::find_program(name).is_some() }
}

/// Installs what `purpose` needs and is not there.
pub fn ensure(purpose: Purpose) -> Result<()> {
    let missing: Vec<_> =
        NEEDS.iter().filter(|need| need.purposes.contains(&purpose) && !(need.is_there)(need.what)).collect();
    if !missing.is_empty() {
        install_packages(&missing)?;
    }
    if matches!(purpose, Demo | Test) {
        vhost_device_vsock()?;
    }
    Ok(())
}

fn install_packages(missing: &[&Need]) -> Result<()> {
    for need in missing {
        eprintln!("     {} is missing: {} is installed {}", need.what, need.package, need.why);
    }
    let packages: Vec<_> = missing.iter().map(|need| need.package).collect();
    let list = packages.join(" ");
    if workspace::find_program("apt-get").is_none() {
        bail!(
            "this system has no apt-get: install what brings these Debian packages' programs, then try again: {list}"
        );
    }
    // The lists may be missing or old, and an old list names packages that the archive no longer has.
    steps::step("update the package lists", || steps::quietly(apt_get()?.arg("update")))?;
    steps::step(&format!("install {list}"), || {
        let mut command = apt_get()?;
        steps::quietly(command.args(["install", "--yes", "--no-install-recommends"]).args(&packages))
    })?;
    let still_missing: Vec<_> =
        missing.iter().filter(|need| !(need.is_there)(need.what)).map(|need| need.what).collect();
    require!(
        still_missing.is_empty(),
        "still missing after `apt-get install {list}`: {}",
        still_missing.join(", ")
    );
    Ok(())
}

fn apt_get() -> Result<Command> {
    let mut command = if workspace::is_root() {
        Command::new("apt-get")
    } else {
        require!(
            workspace::find_program("sudo").is_some(),
            "installing packages needs root: run `cargo xtask deps` as root once, or install sudo"
        );
        eprintln!("     sudo may ask for your password");
        let mut command = Command::new("sudo");
        command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get"]);
        command
    };
    command.env("DEBIAN_FRONTEND", "noninteractive").arg("--quiet");
    Ok(command)
}

/// Where the tools are that are built here.
fn tools() -> PathBuf {
    workspace::target().join("tools")
}

/// The path of the vsock backend, built on first use.
pub fn vhost_device_vsock() -> Result<PathBuf> {
    let (name, version) = VHOST_DEVICE_VSOCK;
    let path = tools().join("bin").join(name);
    if workspace::is_executable(&path) {
        return Ok(path);
    }
    steps::step(&format!("build {name} {version} (about a minute)"), || {
        let mut command = workspace::cargo();
        command
            .args(["install", "--locked", "--quiet", "--version", version, "--root"])
            .arg(tools())
            .arg(name);
        steps::quietly(&mut command)
    })?;
    workspace::is_executable(&path)
        .then_some(path)
        .with_context(|| format!("cargo install made no {name} in {}", tools().display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn testing_needs_everything_that_the_other_purposes_need() {
        for need in NEEDS {
            assert!(need.purposes.contains(&Test), "{}", need.what);
        }
    }

    #[test]
    fn every_need_says_why() {
        for need in NEEDS {
            assert!(need.why.starts_with("to "), "{}", need.what);
        }
    }
}
