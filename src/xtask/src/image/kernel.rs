//! Takes a distribution's kernel package apart: the uncompressed kernel, and the modules that the recipe names together
//! with all that they depend on, in an order in which they can be loaded.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::elf::{File, number};
use crate::steps;

/// A kernel that is ready for an image.
#[derive(Debug)]
pub struct Kernel {
    /// As `uname -r` says it.
    pub release: String,
    /// The uncompressed ELF kernel. Every virtual machine monitor loads it, and an emulated machine need not unpack it.
    pub vmlinux: Vec<u8>,
    /// Name and contents, in load order.
    pub modules: Vec<(String, Vec<u8>)>,
}

/// Unpacks the package into `scratch` and takes out what an image needs.
pub fn take_apart(package: &Path, wanted: &[String], scratch: &Path) -> Result<Kernel> {
    steps::quietly(Command::new("dpkg-deb").arg("--extract").arg(package).arg(scratch))?;
    let image = only_file(&scratch.join("boot"), "vmlinuz-")?;
    let name = image.file_name().unwrap_or_default().to_string_lossy();
    let release = name.trim_start_matches("vmlinuz-").to_owned();
    let compressed = std::fs::read(&image).with_context(|| format!("cannot read {}", image.display()))?;
    let vmlinux =
        unpack_bzimage(&compressed).with_context(|| format!("cannot unpack {}", image.display()))?;

    let lib = if scratch.join("usr/lib/modules").is_dir() { "usr/lib/modules" } else { "lib/modules" };
    let available = Available::read(&scratch.join(lib).join(&release))?;
    let modules = available.load(wanted)?;
    Ok(Kernel { release, vmlinux, modules })
}

fn only_file(folder: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let mut found: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)))
        .collect();
    match (found.pop(), found.len()) {
        (Some(path), 0) => Ok(path),
        (_, others) => bail!("expected one {prefix}* in {}, found {}", folder.display(), others),
    }
}

// === The kernel itself ===

/// The first four bytes of LZ4's legacy frame, which is what the kernel's build uses.
const LZ4_LEGACY: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
/// The most that one block of a legacy frame can unpack to.
const LZ4_BLOCK: usize = 8 << 20;

/// Finds the payload of a bzImage by its boot header and unpacks it.
fn unpack_bzimage(image: &[u8]) -> Result<Vec<u8>> {
    let header = |offset| number::<4>(image, offset).context("the file is too short for a boot header");
    ensure!(image.get(0x202..0x206) == Some(b"HdrS"), "it is no x86 kernel image (no boot header)");
    let setup_sectors = match image[0x1f1] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (setup_sectors + 1) * 512 + header(0x248)?;
    let payload = image.get(start..start + header(0x24c)?).context("its payload is outside of the file")?;
    // The last four bytes are the unpacked size.
    let (packed, size) =
        payload.split_at_checked(payload.len().saturating_sub(4)).context("its payload is empty")?;
    let size = number::<4>(size, 0).unwrap_or(0);
    ensure!(
        packed.starts_with(&LZ4_LEGACY),
        "its payload is not packed with LZ4, the only format known here"
    );
    let kernel = unpack_lz4(&packed[LZ4_LEGACY.len()..])?;
    ensure!(kernel.len() == size, "unpacked {} bytes, its header says {size}", kernel.len());
    ensure!(File::parse(&kernel).is_some(), "what was unpacked is no ELF kernel");
    Ok(kernel)
}

fn unpack_lz4(mut blocks: &[u8]) -> Result<Vec<u8>> {
    let mut unpacked = Vec::new();
    while let Some((length, rest)) = blocks.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        let block = rest.get(..length).context("a block is cut off")?;
        unpacked.extend(lz4_flex::block::decompress(block, LZ4_BLOCK)?);
        blocks = &rest[length..];
    }
    Ok(unpacked)
}

// === Its modules ===

/// Every module of one kernel.
struct Available {
    files: BTreeMap<String, PathBuf>,
    built_in: String,
    release: PathBuf,
}

impl Available {
    fn read(folder: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        collect_modules(&folder.join("kernel"), &mut files)?;
        let built_in = std::fs::read_to_string(folder.join("modules.builtin")).unwrap_or_default();
        Ok(Self { files, built_in, release: folder.to_owned() })
    }

    /// The wanted modules and all that they need, each after what it needs.
    fn load(&self, wanted: &[String]) -> Result<Vec<(String, Vec<u8>)>> {
        let mut modules: BTreeMap<String, (Vec<u8>, Vec<String>)> = BTreeMap::new();
        let mut names: Vec<_> = wanted.iter().map(|name| canonical(name)).collect();
        while let Some(name) = names.pop() {
            if modules.contains_key(&name) || self.is_built_in(&name) {
                continue;
            }
            let path = self.files.get(&name).with_context(|| {
                format!("the kernel in {} has no module `{name}`, built in or not", self.release.display())
            })?;
            let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
            let needs =
                dependencies(&bytes).with_context(|| format!("{} is no kernel module", path.display()))?;
            names.extend(needs.iter().cloned());
            modules.insert(name, (bytes, needs));
        }
        let needs = |name: &str| modules.get(name).map_or(&[][..], |(_, needs)| needs);
        let order = load_order(&wanted.iter().map(|name| canonical(name)).collect::<Vec<_>>(), needs)?;
        Ok(order
            .into_iter()
            .filter_map(|name| modules.remove_entry(&name))
            .map(|(n, (b, _))| (n, b))
            .collect())
    }

    fn is_built_in(&self, name: &str) -> bool {
        let file_name = |line: &str| line.rsplit('/').next().map(canonical);
        self.built_in.lines().any(|line| file_name(line).as_deref() == Some(name))
    }
}

fn collect_modules(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            collect_modules(&path, files)?;
        } else if name.ends_with(".ko") {
            files.insert(canonical(&name), path);
        } else if name.contains(".ko.") {
            bail!("{} is a compressed module; only kernels with plain modules are supported", path.display());
        }
    }
    Ok(())
}

/// The kernel takes `-` and `_` in a module's name for the same.
fn canonical(name: &str) -> String {
    name.trim_end_matches(".ko").replace('-', "_")
}

/// What a module's own `depends=` entry says.
fn dependencies(module: &[u8]) -> Option<Vec<String>> {
    let info = File::parse(module)?.section(".modinfo")?;
    let entry = info.split(|byte| *byte == 0).find_map(|entry| entry.strip_prefix(b"depends="))?;
    let names = String::from_utf8_lossy(entry);
    Some(names.split(',').filter(|name| !name.is_empty()).map(canonical).collect())
}

/// Depth first, so that every module comes after all that it needs, and otherwise in the order asked for.
fn load_order<'a>(wanted: &[String], needs: impl Fn(&str) -> &'a [String]) -> Result<Vec<String>> {
    enum Visit {
        Enter(String),
        Leave(String),
    }
    let mut order: Vec<String> = Vec::new();
    let mut open: Vec<String> = Vec::new();
    let mut stack: Vec<_> = wanted.iter().rev().cloned().map(Visit::Enter).collect();
    while let Some(visit) = stack.pop() {
        match visit {
            Visit::Enter(name) if order.contains(&name) => {}
            Visit::Enter(name) => {
                ensure!(
                    !open.contains(&name),
                    "the modules need each other in a circle: {}",
                    open.join(" -> ")
                );
                open.push(name.clone());
                stack.push(Visit::Leave(name.clone()));
                stack.extend(needs(&name).iter().rev().cloned().map(Visit::Enter));
            }
            Visit::Leave(name) => {
                open.retain(|other| *other != name);
                order.push(name);
            }
        }
    }
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order_of(wanted: &[&str], table: &[(&str, &[&str])]) -> Result<Vec<String>> {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let table: BTreeMap<_, _> =
            table.iter().map(|(name, needs)| ((*name).to_owned(), owned(needs))).collect();
        load_order(&owned(wanted), |name| table.get(name).map_or(&[][..], |needs| needs))
    }

    #[test]
    fn a_module_comes_after_everything_that_it_needs() {
        let order = order_of(
            &["virtio_mmio", "virtio_net"],
            &[
                ("virtio", &["virtio_ring"]),
                ("virtio_mmio", &["virtio", "virtio_ring"]),
                ("virtio_net", &["net_failover", "virtio"]),
                ("net_failover", &["failover"]),
            ],
        );
        assert_eq!(
            order.unwrap(),
            ["virtio_ring", "virtio", "virtio_mmio", "failover", "net_failover", "virtio_net"]
        );
    }

    #[test]
    fn a_module_that_two_others_need_is_loaded_once() {
        let order = order_of(&["a", "b", "a"], &[("a", &["c"]), ("b", &["c"])]).unwrap();
        assert_eq!(order, ["c", "a", "b"]);
    }

    #[test]
    fn a_circle_is_an_error_and_not_a_hang() {
        let error = order_of(&["a"], &[("a", &["b"]), ("b", &["a"])]).unwrap_err().to_string();
        assert!(error.contains("circle"), "{error}");
    }

    #[test]
    fn dashes_and_underscores_name_the_same_module() {
        assert_eq!(canonical("virtio-rng.ko"), "virtio_rng");
    }

    #[test]
    fn what_is_no_kernel_is_refused_with_a_reason() {
        assert!(unpack_bzimage(b"short").unwrap_err().to_string().contains("boot header"));
        let mut image = vec![0; 2048];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
        assert!(unpack_bzimage(&image).unwrap_err().to_string().contains("payload"));
    }

    #[test]
    fn legacy_lz4_blocks_are_put_together() {
        let mut packed = Vec::new();
        for part in [&b"first "[..], &b"second"[..]] {
            let block = lz4_flex::block::compress(part);
            packed.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
            packed.extend(block);
        }
        assert_eq!(unpack_lz4(&packed).unwrap(), b"first second");
        packed.truncate(packed.len() - 1);
        assert!(unpack_lz4(&packed).is_err());
    }
}
