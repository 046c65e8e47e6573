//! The root file system: installs the recipe's packages into an empty tree and packs it.
//!
//! mmdebstrap does it without root where user namespaces allow, and gives a tar archive whose order and times do not
//! depend on when and where it runs; sqfstar packs that without unpacking it.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::overlay;
use super::recipe::Template;
use crate::{steps, workspace};

/// The files that [`build`] makes in its folder.
pub const SQUASHFS: &str = "rootfs.squashfs";
pub const KERNEL_PACKAGE: &str = "kernel.deb";
pub const PACKAGES: &str = "packages";

/// What a build needs at its worst moment: the tree, the archive, the packed image, and the downloads. A template that
/// brings more than packages is a large one.
pub fn needed_bytes(template: &Template) -> u64 {
    if template.wheels.is_empty() { 900 << 20 } else { 2000 << 20 }
}

/// Where the tree's scripts leave what is copied out of it.
const HANDOVER: &str = "guestd-build";

/// The versions of the programs whose output is in the image: another version may give other bytes.
pub fn tool_versions() -> Result<String> {
    let mmdebstrap = steps::output(Command::new("mmdebstrap").arg("--version"))?;
    let sqfstar = steps::output(Command::new("sqfstar").arg("-version"))?;
    let first_line = |text: &str| text.lines().next().unwrap_or_default().trim().to_owned();
    Ok(format!("{}\n{}", first_line(&mmdebstrap), first_line(&sqfstar)))
}

/// Builds into the empty folder `out`, an absolute path.
pub fn build(template: &Template, out: &Path) -> Result<()> {
    let recipe = &template.recipe;
    let fetch_kernel = workspace::root().join("rootfs/fetch-kernel.sh");
    let fetch_kernel = std::fs::read_to_string(&fetch_kernel)
        .with_context(|| format!("cannot read {}", fetch_kernel.display()))?;

    let overlay = out.join("overlay.tar");
    let has_overlay = overlay::pack(template, &out.join("overlay"), &overlay)?;

    let archive = out.join("rootfs.tar");
    // The caller's umask must not become the image's. The folder is one that every user can be in: without root the
    // scripts run as somebody who may not be able to enter ours.
    let mut command = Command::new("sh");
    command.args(["-c", "umask 022 && exec \"$@\"", "sh", "mmdebstrap"]).current_dir("/");
    command.env("SOURCE_DATE_EPOCH", recipe.source_date_epoch.to_string());
    if workspace::is_root() {
        // Where there is room has been checked. Without root the tree belongs to other user ids, which may not be able
        // to enter the repository's folders, so mmdebstrap chooses.
        command.env("TMPDIR", out);
    }
    command.args(["--mode=auto", "--format=tar", "--variant=minbase"]);
    command.arg(format!("--include={}", recipe.packages.join(",")));
    command.args(recipe.leave_out.iter().map(|path| format!("--dpkgopt=path-exclude={path}")));
    command.args(recipe.keep.iter().map(|path| format!("--dpkgopt=path-include={path}")));
    if has_overlay {
        command.arg(format!("--customize-hook=tar-in '{}' /", overlay.display()));
    }
    // The scripts go in by value: without root mmdebstrap may not be able to read them from here.
    command.args(template.scripts.iter().map(|script| format!("--customize-hook={script}")));
    command.arg(format!("--customize-hook=KERNEL_PACKAGE='{}'\n{fetch_kernel}", recipe.kernel.package));
    for name in [KERNEL_PACKAGE, PACKAGES] {
        command.arg(format!("--customize-hook=copy-out /{HANDOVER}/{name} '{}'", out.display()));
    }
    command.arg(format!("--customize-hook=rm -r \"$1/{HANDOVER}\""));
    command.arg(&recipe.suite).arg(&archive);
    steps::quietly(&mut command)?;

    pack(&archive, &out.join(SQUASHFS), recipe.source_date_epoch)?;
    for made in [Some(&archive), has_overlay.then_some(&overlay)].into_iter().flatten() {
        std::fs::remove_file(made).with_context(|| format!("cannot remove {}", made.display()))?;
    }
    Ok(())
}

fn pack(archive: &Path, image: &Path, time: u32) -> Result<()> {
    let input = File::open(archive).with_context(|| format!("cannot read {}", archive.display()))?;
    // The root folder has no name in the archive, so it gets the user, the group and the time of this process; the
    // program's options for them do nothing (4.5.1), its option for the permissions works.
    let mut command = if workspace::is_root() {
        Command::new("sqfstar")
    } else {
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", "sqfstar"]);
        command
    };
    command.env("SOURCE_DATE_EPOCH", time.to_string()).args(["-root-mode", "755"]);
    // The kernel or the container runtime fills /dev; device nodes in an image only trouble whoever unpacks it.
    // LZ4 is the format that an emulated machine unpacks fastest.
    command.args(["-comp", "lz4", "-Xhc", "-reproducible", "-no-progress", "-quiet", "-exit-on-error"]);
    let output = command.arg(image).arg("dev/*").stdin(input).output().context("cannot run `sqfstar`")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`sqfstar` failed ({}):\n{said}", output.status);
    Ok(())
}

/// Unpacks a root file system with its owners, for runtimes that need a folder.
pub fn unpack(image: &Path, folder: &Path) -> Result<()> {
    ensure!(
        workspace::is_root(),
        "--tree needs root: the tree has files of several owners. Run it with sudo, or leave --tree out \
         (virtual machines do not need it)"
    );
    let mut command = Command::new("unsquashfs");
    steps::quietly(command.args(["-no-progress", "-quiet", "-dest"]).arg(folder).arg(image))
}
