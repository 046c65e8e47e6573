//! A file that takes the place of another all at once, or not at all.
//!
//! It is written under a hidden name in the same directory and renamed over the old one when it is complete and on disk. What fails
//! before that leaves the old file as it was; the hidden one is removed, unless the agent itself dies in between.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{OFlag, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::destination::{no_inodes, regular};
use super::{FilesError, metadata};
use crate::filesystem::Caller;
use crate::filesystem::credentials::ActingAs;
use crate::filesystem::entry::METADATA_PREFIX;
use crate::filesystem::error::{Fault, fault};
use crate::filesystem::place::{Place, open_at, reopen};
use crate::filesystem::transfer::copy_identity;

/// What file systems allow in a name.
const MOST_NAME_BYTES: usize = 255;

/// Attributes that vouch for the content that goes: its rights as a program, its measurements. A write in place drops them as well.
const ABOUT_CONTENT: [&[u8]; 3] = [b"security.capability", b"security.ima", b"security.evm"];

/// What the hidden name of a staged file ends in.
#[derive(Clone, Copy, Debug)]
pub(super) enum Suffix {
    /// `.<name>.guestd-<random>`
    Upload,
    /// `.<name>.e2b-compose.<uuid>.tmp` (contract: envd.md section 4.7)
    Compose,
}

/// A new file that is not yet where it belongs.
#[derive(Debug)]
pub(super) struct Staged {
    place: Place,
    path: PathBuf,
    pub(super) file: Arc<File>,
    old: Option<File>,
    caller: Arc<Caller>,
    /// The hidden name; `None` when there is nothing to clean up any more.
    hidden: Option<OsString>,
}

impl Staged {
    /// Makes the hidden file beside `place`, which is where links were followed to. Blocking, as the caller's user.
    ///
    /// # Errors
    ///
    /// [`FilesError::IsDirectory`] and [`FilesError::NotRegular`] for what cannot be replaced, [`FilesError::NoInodes`], or what the
    /// operating system said.
    pub(super) fn create(
        caller: &Arc<Caller>,
        place: Place,
        path: &Path,
        suffix: Suffix,
    ) -> Result<Self, FilesError> {
        let old = match place.look() {
            Ok(old) => Some(old),
            Err(error) if fault(&error) == Fault::NotFound => None,
            Err(error) => return Err(FilesError::io("open", path)(error)),
        };
        if let Some(old) = &old {
            regular(path, &old.metadata().map_err(FilesError::io("stat", path))?)?;
        }
        // What was closed to others stays closed while it is being written.
        let mode = Mode::from_bits_truncate(if old.is_some() { 0o600 } else { 0o666 });
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW;
        let hidden = hidden_name(&place.name, suffix)?;
        let file =
            open_at(&place.parent, Path::new(&hidden), flags, mode).map_err(no_inodes("open", path))?;
        Ok(Self {
            place,
            path: path.to_owned(),
            file: Arc::new(file.into()),
            old,
            caller: Arc::clone(caller),
            hidden: Some(hidden),
        })
    }

    /// Whether this file is what is being replaced.
    pub(super) fn replaces(&self, id: (u64, u64)) -> bool {
        use std::os::unix::fs::MetadataExt as _;
        let old = self.old.as_ref().and_then(|old| old.metadata().ok());
        old.is_some_and(|old| (old.dev(), old.ino()) == id)
    }

    /// Puts the file in its place: with the mode, the owner and the extended attributes of the old one, and with the client's
    /// metadata replaced when there is new metadata. Blocking, as the caller's user.
    ///
    /// The directory is synchronised as well, where the user may read it.
    ///
    /// # Errors
    ///
    /// [`FilesError::NoSpace`], [`FilesError::NoSpaceForMetadata`], or what the operating system said; the old file is still there.
    pub(super) fn commit(mut self, metadata: &BTreeMap<String, String>) -> Result<(), FilesError> {
        let path = &self.path;
        let failed = |action| FilesError::io(action, path);
        match &self.old {
            Some(old) => copy_identity(old, &self.file, |name| {
                let replaced = !metadata.is_empty() && name.starts_with(METADATA_PREFIX.as_bytes());
                !replaced && !ABOUT_CONTENT.contains(&name)
            }),
            None => self.caller.owner().take(&*self.file),
        }
        .map_err(failed("set the owner and the mode of"))?;
        if !metadata.is_empty() {
            metadata::replace(&self.file, path, metadata)?;
        }
        self.file.sync_all().map_err(|error| {
            let length = self.file.metadata().map_or(0, |metadata| metadata.len());
            match fault(&error) {
                Fault::NoSpace => FilesError::NoSpace { attempted: length, written: length },
                _ => failed("synchronise")(error),
            }
        })?;
        if let Some(hidden) = self.hidden.take() {
            let parent = &self.place.parent;
            if let Err(error) = renameat(parent, hidden.as_os_str(), parent, self.place.name.as_os_str()) {
                let error = failed("replace")(error.into());
                self.hidden = Some(hidden);
                return Err(error);
            }
        }
        if let Ok(directory) = reopen(&self.place.parent, OFlag::O_RDONLY | OFlag::O_DIRECTORY) {
            File::from(directory)
                .sync_all()
                .map_err(FilesError::io("synchronise the directory of", &self.path))?;
        }
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        let Some(hidden) = self.hidden.take() else { return };
        if ActingAs::is_under_way() {
            // On a blocking thread, as this very user; it must not start another thread.
            return report(&hidden, discard(&self.place.parent, &hidden));
        }
        // A client that goes takes the whole call with it, and that happens on the runtime's own thread.
        let (caller, parent) = (Arc::clone(&self.caller), self.place.parent.try_clone());
        let remove = move || {
            let removed = parent.and_then(|parent| {
                let _acting = caller.act()?;
                discard(&parent, &hidden)
            });
            report(&hidden, removed);
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(remove)),
            Err(_outside) => remove(),
        }
    }
}

fn discard(parent: &OwnedFd, hidden: &OsStr) -> io::Result<()> {
    Ok(unlinkat(parent, hidden, UnlinkatFlags::NoRemoveDir)?)
}

fn report(hidden: &OsStr, removed: io::Result<()>) {
    if let Err(error) = removed {
        tracing::warn!(name = %hidden.display(), %error, "an unfinished file stays behind");
    }
}

/// A name that nobody can guess, so that nobody can be there first.
fn hidden_name(name: &OsStr, suffix: Suffix) -> Result<OsString, FilesError> {
    let mut random = [0; 16];
    getrandom::fill(&mut random).map_err(|_| FilesError::NoRandom)?;
    let suffix = match suffix {
        Suffix::Upload => format!(".guestd-{:016x}", u128::from_be_bytes(random) >> 64),
        Suffix::Compose => {
            // RFC 9562: version 4, variant 10.
            random[6] = random[6] & 0x0f | 0x40;
            random[8] = random[8] & 0x3f | 0x80;
            let hex = format!("{:032x}", u128::from_be_bytes(random));
            let groups = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
            format!(".e2b-compose.{}.tmp", groups.join("-"))
        }
    };
    let room = MOST_NAME_BYTES - 1 - suffix.len();
    let name = name.as_bytes();
    Ok(OsString::from_vec([b".", &name[..name.len().min(room)], suffix.as_bytes()].concat()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hidden_name_fits_whatever_the_name() {
        for length in [1, 200, 255] {
            let name = OsString::from("x".repeat(length));
            for (suffix, middle) in [(Suffix::Upload, ".guestd-"), (Suffix::Compose, ".e2b-compose.")] {
                let hidden = hidden_name(&name, suffix).unwrap().into_string().unwrap();
                assert!(
                    hidden.len() <= 255 && hidden.starts_with(".x") && hidden.contains(middle),
                    "{hidden}"
                );
                assert_ne!(hidden_name(&name, suffix).unwrap(), OsString::from(hidden));
            }
        }
        let uuid = hidden_name(OsStr::new("n"), Suffix::Compose).unwrap().into_string().unwrap();
        let uuid = uuid.strip_prefix(".n.e2b-compose.").unwrap().strip_suffix(".tmp").unwrap();
        assert_eq!((uuid.len(), uuid.as_bytes()[14], uuid.matches('-').count()), (36, b'4', 4));
    }
}
