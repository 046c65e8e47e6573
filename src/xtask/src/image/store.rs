//! Where results are kept: a cache whose folder names are the digests of what went in, and an output folder whose files
//! are replaced whole or not at all. Says so before the disk is full, not after.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Error, Result, bail};
use sha2::{Digest, Sha256};

use crate::steps;

/// A cache of folders, used by one process at a time.
#[derive(Debug)]
pub struct Cache {
    folder: PathBuf,
    /// Held while the cache is in use; the system releases it however the process ends.
    _lock: File,
}

impl Cache {
    pub fn open(folder: &Path) -> Result<Self> {
        create_folder(folder)?;
        let path = folder.join("lock");
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let lock = lock.with_context(|| format!("cannot open {}", path.display()))?;
        if lock.try_lock().is_err() {
            eprintln!("     waiting for another `cargo xtask image`");
            lock.lock().with_context(|| format!("cannot lock {}", path.display()))?;
        }
        let cache = Self { folder: folder.to_owned(), _lock: lock };
        // What a run that was cut off has left. A program that it had started may still be writing there: it ends when
        // its folder goes, and what it leaves is removed by the next run.
        if let Err(error) = cache.remove_all("unfinished-", None) {
            eprintln!("     left over from a run that was cut off: {error:#}");
        }
        Ok(cache)
    }

    /// The folder for `key`, if it was finished once.
    pub fn find(&self, kind: &str, key: &str) -> Option<PathBuf> {
        Some(self.path(kind, key)).filter(|folder| folder.is_dir())
    }

    /// Removes a result that is not to be used again.
    pub fn forget(&self, folder: &Path) -> Result<()> {
        std::fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))
    }

    /// Lets `make` fill an empty folder and keeps it under `key`. Older results of the same kind are removed: their
    /// inputs are gone. What is there after an error or a crash is never found.
    pub fn fill(
        &self,
        kind: &str,
        key: &str,
        needed_bytes: u64,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        require_space(&self.folder, needed_bytes)?;
        let unfinished = self.folder.join(format!("unfinished-{kind}-{}", std::process::id()));
        create_folder(&unfinished)?;
        if let Err(error) = make(&unfinished) {
            let error = explain_space(error, &self.folder, needed_bytes);
            // The first error is the one to report.
            let _ = std::fs::remove_dir_all(&unfinished);
            return Err(error);
        }
        let finished = self.path(kind, key);
        let renamed = std::fs::rename(&unfinished, &finished);
        renamed.with_context(|| format!("cannot make {}", finished.display()))?;
        self.remove_all(&format!("{kind}-"), Some(&finished))?;
        Ok(finished)
    }

    fn path(&self, kind: &str, key: &str) -> PathBuf {
        self.folder.join(format!("{kind}-{}", &key[..key.len().min(32)]))
    }

    fn remove_all(&self, prefix: &str, except: Option<&Path>) -> Result<()> {
        let entries = std::fs::read_dir(&self.folder);
        for entry in entries.with_context(|| format!("cannot list {}", self.folder.display()))? {
            let path = entry?.path();
            let matches = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix));
            if matches && Some(path.as_path()) != except {
                std::fs::remove_dir_all(&path)
                    .with_context(|| format!("cannot remove {}", path.display()))?;
            }
        }
        Ok(())
    }
}

// === Files ===

pub fn create_folder(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))
}

/// Writes a file of the output folder: under another name first, then renamed, so that nobody ever reads half of it.
pub fn write_whole(path: &Path, contents: &[u8], permissions: u32) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let unfinished = unfinished_name(path);
    let write = || -> std::io::Result<()> {
        std::fs::write(&unfinished, contents)?;
        std::fs::set_permissions(&unfinished, std::fs::Permissions::from_mode(permissions))?;
        File::open(&unfinished)?.sync_all()?;
        std::fs::rename(&unfinished, path)
    };
    write().map_err(|error| failed_write(error, path, &unfinished, contents.len() as u64))
}

/// Puts a file of the cache into the output folder: the same file under a second name where the file system can do that,
/// else a copy.
pub fn place(from: &Path, to: &Path) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let source = std::fs::metadata(from).with_context(|| format!("cannot read {}", from.display()))?;
    if std::fs::metadata(to).is_ok_and(|there| there.ino() == source.ino() && there.dev() == source.dev()) {
        return Ok(());
    }
    let unfinished = unfinished_name(to);
    let write = || -> std::io::Result<()> {
        match std::fs::remove_file(&unfinished) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        if std::fs::hard_link(from, &unfinished).is_err() {
            std::fs::copy(from, &unfinished)?;
            File::open(&unfinished)?.sync_all()?;
        }
        std::fs::rename(&unfinished, to)
    };
    write().map_err(|error| failed_write(error, to, &unfinished, source.len()))
}

fn unfinished_name(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.unfinished"))
}

fn failed_write(error: std::io::Error, path: &Path, unfinished: &Path, size: u64) -> Error {
    let is_full = error.kind() == ErrorKind::StorageFull;
    // Gives the space back; the write's own error is the one to report.
    let _ = std::fs::remove_file(unfinished);
    let folder = path.parent().unwrap_or(path);
    let error = Error::new(error).context(format!("cannot write {}", path.display()));
    if is_full { error.context(space_message(folder, size)) } else { error }
}

// === Space ===

/// Fails when the file system of `folder` has less than `needed` bytes free.
pub fn require_space(folder: &Path, needed: u64) -> Result<()> {
    match free_bytes(folder) {
        Some(free) if free < needed => bail!(space_message(folder, needed)),
        // A file system that does not say is given the benefit of the doubt; the write itself will tell.
        _ => Ok(()),
    }
}

/// Programs report a full disk in their own words, or not at all.
fn explain_space(error: Error, folder: &Path, needed: u64) -> Error {
    let says_so = format!("{error:#}").contains(steps::DISK_FULL);
    if says_so || free_bytes(folder).is_some_and(|free| free < 1 << 20) {
        error.context(space_message(folder, needed))
    } else {
        error
    }
}

fn space_message(folder: &Path, needed: u64) -> String {
    let free = free_bytes(folder).map_or("an unknown amount".to_owned(), megabytes);
    format!("not enough space in {}: {} needed, {free} free", folder.display(), megabytes(needed))
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

fn free_bytes(folder: &Path) -> Option<u64> {
    let found = nix::sys::statvfs::statvfs(folder).ok()?;
    Some(found.blocks_available() * found.fragment_size())
}

// === Digests ===

/// The SHA-256 of a file, in hexadecimal.
pub fn digest_file(path: &Path) -> Result<String> {
    let read = || -> std::io::Result<String> {
        let mut file = File::open(path)?;
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(hex(&hasher.finalize())),
                length => hasher.update(&buffer[..length]),
            }
        }
    };
    read().with_context(|| format!("cannot read {}", path.display()))
}

pub fn digest_bytes(contents: &[u8]) -> String {
    hex(&Sha256::digest(contents))
}

/// The SHA-256 of several texts, each of which counts with its length, so that they cannot run into each other.
pub fn digest_texts(texts: &[&str]) -> String {
    let mut hasher = Sha256::new();
    for text in texts {
        hasher.update((text.len() as u64).to_le_bytes());
        hasher.update(text);
    }
    hex(&hasher.finalize())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_that_failed_is_never_found() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path()).unwrap();
        let outcome = cache.fill("system", "key", 0, |out| {
            std::fs::write(out.join("half"), "x").unwrap();
            bail!("broken")
        });
        assert!(outcome.unwrap_err().to_string().contains("broken"));
        assert_eq!(cache.find("system", "key"), None);
        assert_eq!(cache.find("unfinished", "system"), None);
    }

    #[test]
    fn a_new_result_replaces_the_old_one_of_its_kind_only() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path()).unwrap();
        for (kind, key) in [("system", "old"), ("kernel", "k"), ("system", "new")] {
            cache.fill(kind, key, 0, |_| Ok(())).unwrap();
        }
        assert_eq!(cache.find("system", "old"), None);
        assert!(cache.find("system", "new").is_some() && cache.find("kernel", "k").is_some());
    }

    #[test]
    fn what_a_killed_run_left_is_removed_by_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let left = folder.path().join("unfinished-system");
        std::fs::create_dir(&left).unwrap();
        Cache::open(folder.path()).unwrap();
        assert!(!left.exists());
    }

    #[test]
    fn a_full_disk_is_named_with_what_is_needed_and_free() {
        let folder = tempfile::tempdir().unwrap();
        let error = require_space(folder.path(), u64::MAX).unwrap_err().to_string();
        assert!(error.contains(&folder.path().display().to_string()), "{error}");
        assert!(error.contains("needed") && error.contains("free"), "{error}");
    }

    #[test]
    fn a_placed_file_replaces_the_old_one_and_leaves_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        std::fs::write(&from, "new").unwrap();
        std::fs::write(&to, "old").unwrap();
        place(&from, &to).unwrap();
        place(&from, &to).unwrap();
        assert_eq!(std::fs::read_to_string(&to).unwrap(), "new");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn texts_cannot_run_into_each_other() {
        assert_ne!(digest_texts(&["ab", "c"]), digest_texts(&["a", "bc"]));
    }

    #[test]
    fn a_digest_is_what_the_whole_world_calls_sha256() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "abc").unwrap();
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(digest_file(file.path()).unwrap(), expected);
    }
}
