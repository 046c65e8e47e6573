//! `POST /files/compose`: several files become one (contract: envd.md section 4.7).
//!
//! The parts are copied, inside the kernel where it can, into a hidden file that then replaces the destination at once, so the
//! destination keeps its mode, its owner and its metadata (envd.md section 11, number 22). The parts go last: what cannot be
//! removed is told in `warnings`, which envd does not have, because by then the destination is what was asked for.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::{IntoResponse as _, Response};
use nix::fcntl::OFlag;
use nix::unistd::{UnlinkatFlags, unlinkat};
use serde::{Deserialize, Serialize};

use super::body::WireBody;
use super::content::find;
use super::destination::no_inodes;
use super::staged::{Staged, Suffix};
use super::upload::body_error;
use super::{FilesError, Filesystem, blocking};
use crate::filesystem::Caller;
use crate::filesystem::error::{Fault, fault};
use crate::filesystem::place::{Place, look_through, reopen};

/// Room for thousands of paths.
const MOST_BYTES: usize = 1024 * 1024;

#[derive(Debug, Deserialize)]
struct ComposeRequest {
    #[serde(default)]
    source_paths: Vec<String>,
    #[serde(default)]
    destination: String,
    username: Option<String>,
}

#[derive(Debug, Serialize)]
struct Composed {
    path: String,
    name: String,
    r#type: &'static str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

/// Concatenates the sources in their order and removes them.
///
/// # Errors
///
/// Those of envd.md section 4.7, in the JSON form; see [`FilesError::status`]. The destination and all sources are as they were.
pub(super) async fn compose(State(filesystem): State<Arc<Filesystem>>, mut request: Request) -> Response {
    let Some(wire) = request.extensions_mut().remove::<WireBody>() else {
        return FilesError::Stopped.into_response();
    };
    let version = request.version();
    wire.answer(version, composed(filesystem, request).await.map(axum::Json)).await
}

async fn composed(filesystem: Arc<Filesystem>, request: Request) -> Result<Composed, FilesError> {
    let body = axum::body::to_bytes(request.into_body(), MOST_BYTES).await.map_err(|error| {
        if std::error::Error::source(&error)
            .is_some_and(|cause| cause.is::<http_body_util::LengthLimitError>())
        {
            return FilesError::TooLarge { limit: MOST_BYTES };
        }
        body_error(error)
    })?;
    let request: ComposeRequest =
        serde_json::from_slice(&body).map_err(|error| FilesError::Json { message: error.to_string() })?;
    blocking(move || {
        let username = request.username.as_deref().filter(|name| !name.is_empty());
        let caller = Arc::new(filesystem.files_caller(username)?);
        if request.source_paths.is_empty() {
            return Err(FilesError::NoSources);
        }
        if request.destination.is_empty() {
            return Err(FilesError::NoDestination);
        }
        let destination = caller.resolve(&request.destination)?;
        let sources: Result<Vec<_>, _> =
            request.source_paths.iter().map(|path| caller.resolve(path)).collect();
        let sources = sources?;
        caller.prepare_home(&destination);
        caller.files_work(|| concatenate(&caller, &sources, &destination))
    })
    .await
}

/// A file that takes part: its path, and what was there when it was first looked at.
struct Part<'a> {
    path: &'a Path,
    id: (u64, u64),
    size: u64,
}

fn concatenate(
    caller: &Arc<Caller>,
    sources: &[PathBuf],
    destination: &Path,
) -> Result<Composed, FilesError> {
    let same = || FilesError::SourceIsDestination { path: destination.to_owned() };
    if sources.iter().any(|source| source == destination) {
        return Err(same());
    }
    // All of them, before anything is made.
    let parts: Result<Vec<_>, _> =
        sources.iter().map(|path| Part::find(path).map(|(part, _)| part)).collect();
    let parts = parts?;
    let place = Place::create(destination, caller.owner())
        .and_then(Place::followed)
        .map_err(no_inodes("make the directory of", destination))?;
    let staged = Staged::create(caller, place, destination, Suffix::Compose)?;
    if parts.iter().any(|part| staged.replaces(part.id)) {
        return Err(same());
    }
    for part in &parts {
        part.copy(&staged)?;
    }
    staged.commit(&Default::default())?;
    Ok(Composed {
        path: destination.to_string_lossy().into_owned(),
        name: destination.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        r#type: "file",
        warnings: parts.iter().filter_map(|part| part.remove().err()).collect(),
    })
}

impl<'a> Part<'a> {
    fn find(path: &'a Path) -> Result<(Self, std::fs::File), FilesError> {
        let (file, metadata) = find(path)?;
        Ok((Self { path, id: (metadata.dev(), metadata.ino()), size: metadata.len() }, file))
    }

    /// Appends this part.
    fn copy(&self, staged: &Staged) -> Result<(), FilesError> {
        let (now, found) = Self::find(self.path)?;
        if now.id != self.id {
            return Err(FilesError::Changed { path: self.path.to_owned() });
        }
        let from =
            reopen(found, OFlag::O_RDONLY | OFlag::O_NONBLOCK).map_err(FilesError::io("open", self.path))?;
        let before = length(staged);
        // On Linux this is copy_file_range(2), and read(2) and write(2) where that does not work.
        std::io::copy(&mut std::fs::File::from(from), &mut &*staged.file).map(drop).map_err(|error| {
            match fault(&error) {
                Fault::NoSpace => {
                    FilesError::NoSpace { attempted: before + now.size, written: length(staged) }
                }
                _ => FilesError::io("copy", self.path)(error),
            }
        })
    }

    /// Removes the part, or the link that led to it, unless something else is there by now; says what was in the way.
    fn remove(&self) -> Result<(), String> {
        let kept = |reason: &dyn std::fmt::Display| {
            Err(format!("source '{}' was not removed: {reason}", self.path.display()))
        };
        let missing = |error: &std::io::Error| fault(error) == Fault::NotFound;
        let found = Place::open(self.path).and_then(|place| {
            let metadata = look_through(&place.parent, &place.name)?.metadata()?;
            Ok((place, (metadata.dev(), metadata.ino())))
        });
        match found {
            // The same source twice, or somebody else removed it.
            Err(error) if missing(&error) => Ok(()),
            Err(error) => kept(&error),
            Ok((_, id)) if id != self.id => kept(&"it is another file by now"),
            Ok((place, _)) => {
                match unlinkat(&place.parent, place.name.as_os_str(), UnlinkatFlags::NoRemoveDir) {
                    Ok(()) => Ok(()),
                    Err(error) if missing(&error.into()) => Ok(()),
                    Err(error) => kept(&error),
                }
            }
        }
    }
}

fn length(staged: &Staged) -> u64 {
    staged.file.metadata().map_or(0, |metadata| metadata.len())
}
