//! `cargo xtask image`: the agent, a kernel and a root file system, made into the folder that hostd boots from.
//!
//! ```text
//!  recipes + all beside them + tools --> system: rootfs.squashfs, kernel.deb, packages   (minutes, cached)
//!  kernel.deb + wanted modules       --> kernel: vmlinux, modules in load order          (seconds, cached)
//!  guestd + modules                  --> initrd.cpio                                     (at once)
//! ```
//!
//! Each cached result is found again by the digest of everything that went into it. The output folder's files are
//! replaced one by one, whole, and `image.json` with their digests comes last.

mod cpio;
pub mod elf;
mod kernel;
mod manifest;
mod overlay;
mod recipe;
mod store;
mod system;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::deps::{self, Purpose};
use crate::{steps, workspace};
use cpio::Archive;
use manifest::{FileDigest, Manifest};
use recipe::Template;
use store::Cache;

/// Part of every cache key: changes when the same inputs are to give another result.
const BUILDER_VERSION: &str = "5";

const VMLINUX: &str = "vmlinux";
const INITRD: &str = "initrd.cpio";
const AGENT: &str = "guestd";
const TREE: &str = "rootfs";
const ROOT_FILE_SYSTEM: &str = "squashfs";
const MODULES: &str = "modules";
const ORDER: &str = "order";
const RELEASE: &str = "release";

/// An unpacked kernel package and what is taken out of it.
const KERNEL_BYTES: u64 = 350 << 20;
/// The root file system as a folder.
const TREE_BYTES: u64 = 800 << 20;

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Which recipe below rootfs/ to build
    #[arg(long, default_value = "base")]
    pub template: String,
    /// Unpack the root file system as well, for the container runtime (needs root)
    #[arg(long)]
    pub tree: bool,
    /// Where the image goes [default: target/guest/<template>]
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Cargo profile of the agent: `release` is quick to build, `dist` is what ships
    #[arg(long, default_value = "release")]
    pub profile: String,
    /// Use this agent instead of building one
    #[arg(long)]
    pub guestd: Option<PathBuf>,
    /// Ask the distribution for newer packages even if the recipe has not changed
    #[arg(long)]
    pub refresh: bool,
}

impl Default for Options {
    fn default() -> Self {
        let (template, profile) = ("base".into(), "release".into());
        Self { template, tree: false, out: None, profile, guestd: None, refresh: false }
    }
}

impl Options {
    fn folder(&self) -> PathBuf {
        self.out.clone().unwrap_or_else(|| images().join(&self.template))
    }
}

/// The folder of all images, for `hostd --images`.
pub fn images() -> PathBuf {
    workspace::target().join("guest")
}

/// Makes the images that hostd is to boot from what the tree holds now: `base`, and every other one that was made before.
pub fn renew(tree: bool) -> Result<()> {
    deps::ensure(Purpose::Image)?;
    let mut options = Options { tree, ..Options::default() };
    let agent = steps::step("build guestd", || workspace::build("guestd", &options.profile))?;
    for template in recipe::names(&workspace::root().join("rootfs"))? {
        if template == Options::default().template || Manifest::read(&images().join(&template)).is_some() {
            options.template = template;
            build(&options, &agent)?;
        }
    }
    Ok(())
}

pub fn run(options: &Options) -> Result<()> {
    deps::ensure(Purpose::Image)?;
    let agent = match &options.guestd {
        Some(agent) => agent.clone(),
        None => steps::step("build guestd", || workspace::build("guestd", &options.profile))?,
    };
    build(options, &agent)
}

/// Builds the image with this agent.
pub fn build(options: &Options, agent: &Path) -> Result<()> {
    workspace::require_static(agent)?;
    let template = Template::read(&workspace::root().join("rootfs").join(&options.template))?;
    let cache = Cache::open(&workspace::target().join("image-cache").join(&template.recipe.name))?;
    let system = system(&template, &cache, options.refresh)?;
    let kernel = kernel(&template, &cache, &system)?;
    let out = options.folder();
    store::create_folder(&out)?;
    assemble(options, &template, &system, &kernel, agent, &out)
}

fn system(template: &Template, cache: &Cache, refresh: bool) -> Result<PathBuf> {
    let name = &template.recipe.name;
    let key = store::digest_texts(&[BUILDER_VERSION, &template.text, &system::tool_versions()?]);
    if let Some(folder) = cache.find("system", &key) {
        if !refresh && FileDigest::still_fits(&folder.join(system::SQUASHFS)) {
            return Ok(folder);
        }
        cache.forget(&folder)?;
    }
    steps::step(&format!("install the packages of `{name}` (a minute or two)"), || {
        cache.fill("system", &key, system::needed_bytes(template), |out| {
            system::build(template, out)?;
            let image = out.join(system::SQUASHFS);
            FileDigest::of(&image)?.write_beside(&image)
        })
    })
}

fn kernel(template: &Template, cache: &Cache, system: &Path) -> Result<PathBuf> {
    let package = system.join(system::KERNEL_PACKAGE);
    let modules = &template.recipe.kernel.modules;
    let key = store::digest_texts(&[BUILDER_VERSION, &store::digest_file(&package)?, &modules.join(",")]);
    if let Some(folder) = cache.find("kernel", &key) {
        if FileDigest::still_fits(&folder.join(VMLINUX)) {
            return Ok(folder);
        }
        cache.forget(&folder)?;
    }
    steps::step("unpack the kernel", || {
        cache.fill("kernel", &key, KERNEL_BYTES, |out| {
            let scratch = out.join("package");
            let kernel = kernel::take_apart(&package, modules, &scratch)?;
            std::fs::remove_dir_all(&scratch)?;
            let folder = out.join(MODULES);
            std::fs::create_dir(&folder)?;
            for (name, contents) in &kernel.modules {
                std::fs::write(folder.join(format!("{name}.ko")), contents)?;
            }
            let order: String = kernel.modules.iter().map(|(name, _)| format!("{name}.ko\n")).collect();
            std::fs::write(folder.join(ORDER), order)?;
            std::fs::write(out.join(RELEASE), &kernel.release)?;
            let vmlinux = out.join(VMLINUX);
            std::fs::write(&vmlinux, &kernel.vmlinux)?;
            FileDigest::of_bytes(&kernel.vmlinux).write_beside(&vmlinux)
        })
    })
}

/// Puts the image together. Quick when nothing has changed: the digests of the big files are in the cache.
fn assemble(
    options: &Options,
    template: &Template,
    system: &Path,
    kernel: &Path,
    agent: &Path,
    out: &Path,
) -> Result<()> {
    let order = read_text(&kernel.join(MODULES).join(ORDER))?;
    let agent = read_bytes(agent)?;
    let initrd = initramfs(&agent, &kernel.join(MODULES), &order)?;
    let big = [(VMLINUX, kernel.join(VMLINUX)), (system::SQUASHFS, system.join(system::SQUASHFS))];
    let small = [(AGENT, 0o755, &agent), (INITRD, 0o644, &initrd)];

    let mut digests = BTreeMap::new();
    for (name, path) in &big {
        digests.insert((*name).to_owned(), FileDigest::read_beside(path)?);
    }
    for (name, _, contents) in &small {
        digests.insert((*name).to_owned(), FileDigest::of_bytes(contents));
    }
    let mut manifest = Manifest {
        format: manifest::FORMAT,
        name: template.recipe.name.clone(),
        kernel: read_text(&kernel.join(RELEASE))?,
        modules: order.lines().map(|name| name.trim_end_matches(".ko").to_owned()).collect(),
        command_line: format!("guestd.root=/dev/vda guestd.rootfstype={ROOT_FILE_SYSTEM}"),
        packages: read_text(&system.join(system::PACKAGES))?.lines().map(str::to_owned).collect(),
        guestd_version: env!("CARGO_PKG_VERSION").into(),
        digests,
        tree_of: None,
    };
    let root_digest = manifest.digests[system::SQUASHFS].sha256.clone();
    let previous = Manifest::read(out);
    let tree_is_current = out.join(TREE).is_dir()
        && previous.as_ref().and_then(|previous| previous.tree_of.as_ref()) == Some(&root_digest);
    // A tree of another image must not stay: whoever finds it takes it for this one's.
    let make_tree = !tree_is_current && (options.tree || out.join(TREE).exists());
    manifest.tree_of = (tree_is_current || make_tree).then_some(root_digest);

    if previous.as_ref() == Some(&manifest) && manifest.sizes_match(out) {
        eprintln!("  ok {} is up to date", out.display());
        return Ok(());
    }
    steps::step(&format!("write {}", out.display()), || {
        for (name, path) in &big {
            store::place(path, &out.join(name))?;
        }
        for (name, permissions, contents) in small {
            store::write_whole(&out.join(name), contents, permissions)?;
        }
        if make_tree {
            replace_tree(&system.join(system::SQUASHFS), out)?;
        }
        manifest.write(out)
    })
}

/// The agent as `/init`, the modules, and the two devices that a program may want before anything is mounted.
fn initramfs(agent: &[u8], modules: &Path, order: &str) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for folder in ["dev", "proc", "sys", "lower", "upper", "newroot", MODULES] {
        archive.folder(folder);
    }
    archive.character_device("dev/console", 0o600, 5, 1);
    archive.character_device("dev/null", 0o666, 1, 3);
    archive.file("init", 0o755, agent);
    for name in order.lines() {
        archive.file(&format!("{MODULES}/{name}"), 0o644, &read_bytes(&modules.join(name))?);
    }
    archive.file(&format!("{MODULES}/{ORDER}"), 0o644, order.as_bytes());
    Ok(archive.finish())
}

/// The new tree is whole before it has its name. Containers that still run on the old one lose it.
fn replace_tree(image: &Path, out: &Path) -> Result<()> {
    store::require_space(out, TREE_BYTES)?;
    let [tree, unfinished, old] = [TREE, ".rootfs.unfinished", ".rootfs.old"].map(|name| out.join(name));
    let remove = |folder: &Path| match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    };
    remove(&unfinished)?;
    remove(&old)?;
    system::unpack(image, &unfinished)?;
    if tree.exists() {
        std::fs::rename(&tree, &old).with_context(|| format!("cannot move {} away", tree.display()))?;
    }
    std::fs::rename(&unfinished, &tree).with_context(|| format!("cannot make {}", tree.display()))?;
    remove(&old)
}

fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_initramfs_has_the_agent_and_its_modules_in_order() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("b.ko"), "module b").unwrap();
        std::fs::write(folder.path().join("a.ko"), "module a").unwrap();
        let bytes = initramfs(b"agent", folder.path(), "b.ko\na.ko\n").unwrap();
        let at = |word: &[u8]| bytes.windows(word.len()).position(|window| window == word).unwrap();
        assert!(at(b"agent") < at(b"module b") && at(b"module b") < at(b"module a"));
        assert!(at(b"dev/console") < at(b"agent"));
    }

    #[test]
    fn a_module_that_is_missing_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = format!("{:#}", initramfs(b"agent", folder.path(), "gone.ko\n").unwrap_err());
        assert!(error.contains("gone.ko"), "{error}");
    }
}
