//! The certificates that `/init` brings: added to the machine's own in `/etc/ssl/certs/ca-certificates.crt`, so that every program that
//! reads that file trusts them from the next connection on (contract: envd.md section 4.3, `caBundle`).
//!
//! [`TrustStore`] remembers what it added, on disk as well, so that the next bundle replaces it. No program is run: `update-ca-certificates`
//! finds the persisted copy should somebody run it.

mod pem;

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

pub use pem::{Bundle, PemError};

/// Below the root: what programs read, and where the bundle outlives the agent.
const STORE: &str = "etc/ssl/certs/ca-certificates.crt";
const PERSISTED: &str = "usr/local/share/ca-certificates/e2b-ca.crt";

/// The largest certificate store that is rewritten, in bytes; Debian's has 220 KB.
const STORE_LIMIT: u64 = 16 * 1024 * 1024;

/// Why a bundle is not in force; the text is the 400's.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    #[error("caBundle could not be installed: {path}: {source}", path = path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("caBundle could not be installed: {path} has more than {STORE_LIMIT} bytes", path = path.display())]
    TooLarge { path: PathBuf },
}

/// The machine's certificate store.
#[derive(Debug)]
pub struct TrustStore {
    root: PathBuf,
    /// One rewrite at a time.
    writing: Mutex<()>,
}

impl TrustStore {
    pub fn new(root: PathBuf) -> Self {
        Self { root, writing: Mutex::new(()) }
    }

    /// Puts `bundle` in the place of the one before. Blocks on the disk. Doing it again changes nothing.
    ///
    /// # Errors
    /// When the store cannot be read or written: it is as it was.
    pub fn install(&self, bundle: &Bundle) -> Result<(), TrustError> {
        let _one = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let (store, persisted) = (self.root.join(STORE), self.root.join(PERSISTED));
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| TrustError::Write { path, source }
        };
        let current =
            read(&store).map_err(failed(&store))?.ok_or(TrustError::TooLarge { path: store.clone() })?;
        let earlier = read(&persisted).ok().flatten().unwrap_or_default();
        let next = pem::replace(&current, &earlier, bundle);
        if next != current {
            write(&store, &next).map_err(failed(&store))?;
        }
        // The store is what counts; without the copy a later bundle is only added.
        if earlier != bundle.text()
            && let Err(error) = write(&persisted, bundle.text())
        {
            tracing::warn!(path = %persisted.display(), %error, "the certificates of this /init are not remembered");
        }
        Ok(())
    }
}

/// A file's text, empty when there is none; `None` when it is too large. What is not UTF-8 in comments is kept out of harm's way by
/// replacing it: certificates are ASCII.
fn read(path: &Path) -> io::Result<Option<String>> {
    let file = match fs::File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Some(String::new())),
        opened => opened?,
    };
    let mut bytes = Vec::new();
    file.take(STORE_LIMIT + 1).read_to_end(&mut bytes)?;
    let fits = u64::try_from(bytes.len()).is_ok_and(|length| length <= STORE_LIMIT);
    Ok(fits.then(|| String::from_utf8_lossy(&bytes).into_owned()))
}

/// Replaces a file in one step, through a link as well: no reader ever sees half a store.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    fs::create_dir_all(folder)?;
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy();
    let temporary = folder.join(format!(".{name}.guestd-{}", std::process::id()));
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o644).open(&temporary)?;
    let written = file
        .write_all(text.as_bytes())
        .and_then(|()| file.set_permissions(fs::Permissions::from_mode(0o644)))
        .and_then(|()| fs::rename(&temporary, &path));
    if written.is_err() {
        // Best effort: the error that is told is the first one.
        let _removed = fs::remove_file(&temporary);
    }
    written
}

#[cfg(test)]
mod tests;
