//! `image.json`: what an image is, so that whoever boots it can tell a whole image from a broken one.
//!
//! Written last. A file that does not have the size and digest written here is not part of this image.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::store;

/// The file's name in the image's folder.
pub const FILE: &str = "image.json";
/// Changes when a reader of the old form would misread the new one.
pub const FORMAT: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub format: u32,
    pub name: String,
    /// The kernel's release, as `uname -r` says it.
    pub kernel: String,
    /// In load order.
    pub modules: Vec<String>,
    /// What must be on the kernel command line besides what the machine needs.
    pub command_line: String,
    /// `name=version`, sorted.
    pub packages: Vec<String>,
    pub guestd_version: String,
    /// By file name in the image's folder.
    pub digests: BTreeMap<String, FileDigest>,
    /// The digest of the root file system that the folder `rootfs` was unpacked from; absent when there is no such folder.
    pub tree_of: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileDigest {
    pub size: u64,
    pub sha256: String,
}

impl FileDigest {
    pub fn of(path: &Path) -> Result<Self> {
        let found = std::fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Self { size: found.len(), sha256: store::digest_file(path)? })
    }

    pub fn of_bytes(contents: &[u8]) -> Self {
        Self { size: contents.len() as u64, sha256: store::digest_bytes(contents) }
    }

    /// Keeps the digest of a file in the cache beside it, so that it is computed once.
    pub fn write_beside(&self, path: &Path) -> Result<()> {
        let path = beside(path);
        std::fs::write(&path, serde_json::to_string(self)?)
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Whether a file of the cache still has the size that it was made with. The output folder's files are second names
    /// of the cache's, so whoever cuts one off cuts the other.
    pub fn still_fits(path: &Path) -> bool {
        let size = std::fs::metadata(path).map(|found| found.len());
        Self::read_beside(path).is_ok_and(|digest| size.is_ok_and(|size| size == digest.size))
    }

    pub fn read_beside(path: &Path) -> Result<Self> {
        let path = beside(path);
        let text =
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is no digest", path.display()))
    }
}

fn beside(path: &Path) -> std::path::PathBuf {
    path.with_added_extension("digest")
}

impl Manifest {
    /// `None` when there is none, or none that this version can read: the image is made again.
    pub fn read(folder: &Path) -> Option<Self> {
        let text = std::fs::read_to_string(folder.join(FILE)).ok()?;
        serde_json::from_str(&text).ok().filter(|manifest: &Self| manifest.format == FORMAT)
    }

    pub fn write(&self, folder: &Path) -> Result<()> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        store::write_whole(&folder.join(FILE), text.as_bytes(), 0o644)
    }

    /// Whether every file is there with its size. Digests are checked by whoever is about to trust the files.
    pub fn sizes_match(&self, folder: &Path) -> bool {
        self.digests.iter().all(|(name, expected)| {
            std::fs::metadata(folder.join(name)).is_ok_and(|found| found.len() == expected.size)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(folder: &Path) -> Manifest {
        std::fs::write(folder.join("vmlinux"), "kernel").unwrap();
        Manifest {
            format: FORMAT,
            name: "base".into(),
            kernel: "6.1".into(),
            modules: vec![],
            command_line: String::new(),
            packages: vec![],
            guestd_version: "0.1.0".into(),
            digests: [("vmlinux".into(), FileDigest::of(&folder.join("vmlinux")).unwrap())].into(),
            tree_of: None,
        }
    }

    #[test]
    fn what_is_written_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let manifest = example(folder.path());
        manifest.write(folder.path()).unwrap();
        assert_eq!(Manifest::read(folder.path()), Some(manifest));
    }

    #[test]
    fn a_file_that_was_cut_off_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let manifest = example(folder.path());
        assert!(manifest.sizes_match(folder.path()));
        std::fs::write(folder.path().join("vmlinux"), "ker").unwrap();
        assert!(!manifest.sizes_match(folder.path()));
        std::fs::remove_file(folder.path().join("vmlinux")).unwrap();
        assert!(!manifest.sizes_match(folder.path()));
    }

    #[test]
    fn a_cached_file_that_was_cut_off_through_its_other_name_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let [cached, placed] = ["cached", "placed"].map(|name| folder.path().join(name));
        std::fs::write(&cached, "kernel").unwrap();
        FileDigest::of(&cached).unwrap().write_beside(&cached).unwrap();
        store::place(&cached, &placed).unwrap();
        assert!(FileDigest::still_fits(&cached));
        std::fs::File::options().write(true).open(&placed).unwrap().set_len(3).unwrap();
        assert!(!FileDigest::still_fits(&cached));
    }

    #[test]
    fn a_manifest_of_another_format_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let manifest = Manifest { format: FORMAT + 1, ..example(folder.path()) };
        manifest.write(folder.path()).unwrap();
        assert_eq!(Manifest::read(folder.path()), None);
    }
}
