//! Templates on disk, as `cargo xtask image` makes them, and whether they are whole.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use serde::Deserialize;
use sha2::{Digest, Sha256};

/// The form of `image.json` that this version reads.
const FORMAT: u32 = 1;

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("template '{0}' not found")]
    Unknown(String),
    #[error("template '{name}' is broken: {what}; make it again with `cargo xtask image`")]
    Broken { name: String, what: String },
}

#[derive(Debug, Deserialize)]
struct Manifest {
    format: u32,
    #[serde(default)]
    command_line: String,
    digests: BTreeMap<String, FileDigest>,
    #[serde(default)]
    tree_of: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
struct FileDigest {
    size: u64,
    sha256: String,
}

/// A whole template.
#[derive(Clone, Debug)]
pub struct Image {
    pub name: String,
    pub folder: PathBuf,
    pub command_line: String,
    /// Whether the unpacked tree, which containers need, is there.
    pub has_tree: bool,
}

impl Image {
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

/// The templates below one folder: each a folder of its own.
#[derive(Debug)]
pub struct Images {
    folder: PathBuf,
    aliases: BTreeMap<String, String>,
    /// Digests of files that did not change since they were read.
    verified: Mutex<HashMap<PathBuf, (u64, SystemTime, String)>>,
}

impl Images {
    pub fn new(folder: PathBuf, aliases: BTreeMap<String, String>) -> Self {
        Self { folder, aliases, verified: Mutex::default() }
    }

    /// Finds a template by the name that a client gave: `name`, `namespace/name`, either with `:tag`.
    ///
    /// # Errors
    /// When there is none of that name, or it is not whole. Reads all of its files the first time.
    pub fn find(&self, given: &str) -> Result<Image, ImageError> {
        let unknown = || ImageError::Unknown(given.chars().take(100).collect());
        let plain = |name: &str| {
            !name.is_empty()
                && !name.starts_with('.')
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        };
        let untagged = given.split_once(':').map_or(given, |(untagged, _tag)| untagged);
        let name = match untagged.split_once('/') {
            Some((namespace, name)) if plain(namespace) => name,
            Some(_) => return Err(unknown()),
            None => untagged,
        };
        if !plain(name) {
            return Err(unknown());
        }
        let folder = self.folder.join(name);
        let (name, folder) = match self.aliases.get(name) {
            Some(target) if !folder.is_dir() => (target.as_str(), self.folder.join(target)),
            _ => (name, folder),
        };
        if !folder.is_dir() {
            return Err(unknown());
        }
        let broken = |what: String| ImageError::Broken { name: name.to_owned(), what };
        let path = folder.join("image.json");
        let text = std::fs::read(&path).map_err(|error| broken(format!("{}: {error}", path.display())))?;
        let manifest: Manifest =
            serde_json::from_slice(&text).map_err(|error| broken(format!("{}: {error}", path.display())))?;
        if manifest.format != FORMAT {
            return Err(broken(format!(
                "image.json has format {}, this hostd reads {FORMAT}",
                manifest.format
            )));
        }
        for (file, expected) in &manifest.digests {
            self.verify(&folder.join(file), expected).map_err(broken)?;
        }
        let has_tree = manifest.tree_of.is_some() && folder.join("rootfs").is_dir();
        Ok(Image { name: name.to_owned(), command_line: manifest.command_line, has_tree, folder })
    }

    fn verify(&self, path: &Path, expected: &FileDigest) -> Result<(), String> {
        let cannot = |error: io::Error| format!("{}: {error}", path.display());
        let found = std::fs::metadata(path).map_err(cannot)?;
        if found.len() != expected.size {
            return Err(format!("{} has {} bytes instead of {}", path.display(), found.len(), expected.size));
        }
        let changed = found.modified().map_err(cannot)?;
        let key = (found.len(), changed, expected.sha256.clone());
        let mut verified = self.verified.lock().unwrap_or_else(PoisonError::into_inner);
        if verified.get(path) == Some(&key) {
            return Ok(());
        }
        if digest(path).map_err(cannot)? != expected.sha256 {
            return Err(format!("{} does not have the contents that image.json names", path.display()));
        }
        verified.insert(path.to_owned(), key);
        Ok(())
    }
}

fn digest(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            count => hash.update(&buffer[..count]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn images(folder: &Path) -> Images {
        Images::new(folder.to_owned(), BTreeMap::from([("other".to_owned(), "base".to_owned())]))
    }

    fn make(folder: &Path, contents: &str) {
        std::fs::create_dir_all(folder.join("base")).unwrap();
        std::fs::write(folder.join("base/vmlinux"), "kernel").unwrap();
        let digest = digest(&folder.join("base/vmlinux")).unwrap();
        let manifest = format!(
            r#"{{"format":1,"command_line":"a=b","digests":{{"vmlinux":{{"size":6,"sha256":"{digest}"}}}},"tree_of":null}}"#
        );
        std::fs::write(folder.join("base/image.json"), manifest).unwrap();
        std::fs::write(folder.join("base/vmlinux"), contents).unwrap();
    }

    #[test]
    fn a_template_is_found_by_every_spelling_and_by_alias() {
        let folder = tempfile::tempdir().unwrap();
        make(folder.path(), "kernel");
        for name in ["base", "team/base", "base:latest", "team/base:v1", "other"] {
            assert_eq!(images(folder.path()).find(name).unwrap().name, "base", "{name}");
        }
    }

    #[test]
    fn an_unknown_name_and_a_path_are_not_found() {
        let folder = tempfile::tempdir().unwrap();
        make(folder.path(), "kernel");
        for name in
            ["", "nosuch", "..", "../base/..", "../base", "base/../base", "a/b/base", ".", "base\0", "a b"]
        {
            let error = images(folder.path()).find(name).unwrap_err();
            assert!(matches!(error, ImageError::Unknown(_)), "{name}: {error}");
        }
    }

    #[test]
    fn a_truncated_or_altered_file_is_noticed_even_after_a_good_look() {
        let folder = tempfile::tempdir().unwrap();
        let images = images(folder.path());
        make(folder.path(), "kernel");
        images.find("base").unwrap();
        for bad in ["kerne", "KERNEL"] {
            make(folder.path(), bad);
            let later = SystemTime::now() + std::time::Duration::from_secs(5);
            File::options()
                .append(true)
                .open(folder.path().join("base/vmlinux"))
                .unwrap()
                .set_modified(later)
                .unwrap();
            let error = images.find("base").unwrap_err().to_string();
            assert!(error.contains("broken") && error.contains("vmlinux"), "{error}");
        }
    }
}
