//! The program that is to take this one's place: where it comes from, and whether it runs here and understands what it is handed.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use axum::body::Body;
use http::HeaderMap;
use http_body_util::BodyExt;
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::UpgradeError;
use super::state::SCHEMA;
use crate::filesystem::expected_sha256;

/// The largest program that is taken, in bytes.
const SIZE_LIMIT: u64 = 64 * 1024 * 1024;

/// How long its bytes may take to come.
const RECEIVE_LIMIT: Duration = Duration::from_secs(120);

/// How long it may take to say its version.
const CHECK_LIMIT: Duration = Duration::from_secs(5);

/// How much of an ELF file says what machine it is for, in bytes; elf(5).
const ELF_HEAD: usize = 20;

/// This program, by whatever name it has now.
pub(super) const OWN: &str = "/proc/self/exe";

/// Receives a program into `path`, in place of what is there. None when there is no body.
///
/// # Errors
/// [`UpgradeError::Rejected`] for what is no program of this machine, or not the one that was announced; nothing is left then.
pub(super) async fn receive(headers: &HeaderMap, mut body: Body, path: &Path) -> Result<bool, UpgradeError> {
    let digests = expected_sha256(headers).map_err(|error| UpgradeError::Rejected(error.to_string()))?;
    let received = async {
        let mut first = None;
        while let Some(frame) = body.frame().await {
            let data = frame.map_err(broken)?.into_data().unwrap_or_default();
            if !data.is_empty() {
                first = Some(data);
                break;
            }
        }
        let Some(first) = first else { return Ok(false) };
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(path)(error)),
            _ => {}
        }
        let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o755).open(path);
        let mut file = tokio::fs::File::from_std(file.map_err(failed(path))?);
        let (mut sha256, mut size) = (Sha256::new(), 0);
        let mut next = Some(first);
        while let Some(data) = next {
            size += data.len() as u64;
            if size > SIZE_LIMIT {
                return Err(UpgradeError::Rejected(format!("the program has more than {SIZE_LIMIT} bytes")));
            }
            sha256.update(&data);
            file.write_all(&data).await.map_err(failed(path))?;
            next = match body.frame().await {
                Some(frame) => Some(frame.map_err(broken)?.into_data().unwrap_or_default()),
                None => None,
            };
        }
        file.flush().await.map_err(failed(path))?;
        // Whatever the mask of this process is.
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        file.set_permissions(mode).await.map_err(failed(path))?;
        let digest = sha256.finalize();
        if digests.iter().any(|expected| expected.as_slice() != digest.as_slice()) {
            return Err(UpgradeError::Rejected("Content-Digest: the program has another sha-256".to_owned()));
        }
        is_for_this_machine(path)?;
        Ok(true)
    };
    let received = tokio::time::timeout(RECEIVE_LIMIT, received).await;
    let received = received.unwrap_or_else(|_elapsed| {
        Err(UpgradeError::Rejected(format!(
            "the program did not arrive within {} s",
            RECEIVE_LIMIT.as_secs()
        )))
    });
    if received.is_err() {
        let _nothing_there = fs::remove_file(path);
    }
    received
}

fn broken(error: axum::Error) -> UpgradeError {
    UpgradeError::Rejected(format!("the program did not arrive: {error}"))
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> UpgradeError {
    let path = path.display().to_string();
    move |error| UpgradeError::Failed(format!("{path}: {error}"))
}

fn head(path: &Path) -> io::Result<[u8; ELF_HEAD]> {
    let mut head = [0; ELF_HEAD];
    File::open(path)?.read_exact(&mut head)?;
    Ok(head)
}

/// Compares magic, class, byte order and machine with this program's own.
fn is_for_this_machine(path: &Path) -> Result<(), UpgradeError> {
    let own = head(Path::new(OWN)).map_err(failed(Path::new(OWN)))?;
    let same = head(path).is_ok_and(|other| other[..6] == own[..6] && other[18..] == own[18..]);
    if same {
        Ok(())
    } else {
        Err(UpgradeError::Rejected("the program is no ELF file for this machine".to_owned()))
    }
}

/// Runs it: it has to start, say a version, and read the form of state that it will be handed. The result is its version.
///
/// # Errors
/// [`UpgradeError::Failed`] with what it did instead.
pub(super) async fn check(path: &Path) -> Result<String, UpgradeError> {
    let version = ask(path, &["--version"]).await?;
    let version = version.lines().next().unwrap_or_default().trim().to_owned();
    if version.is_empty() {
        return Err(UpgradeError::Failed("the program says no version".to_owned()));
    }
    let schemas = ask(path, &["resume", "--schema"]).await?;
    if !schemas.split_whitespace().any(|schema| schema.parse() == Ok(SCHEMA)) {
        return Err(UpgradeError::Failed(format!(
            "the program (version {version}) cannot go on from this one"
        )));
    }
    Ok(version)
}

async fn ask(path: &Path, arguments: &[&str]) -> Result<String, UpgradeError> {
    let asked = arguments.join(" ");
    let failed = |why: String| UpgradeError::Failed(format!("the program does not answer to {asked}: {why}"));
    let mut command = Command::new(path);
    command.args(arguments).current_dir("/").stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(CHECK_LIMIT, command.output()).await;
    let output = match output {
        Ok(output) => output.map_err(|error| failed(error.to_string()))?,
        Err(_elapsed) => return Err(failed(format!("not within {} s", CHECK_LIMIT.as_secs()))),
    };
    if !output.status.success() {
        return Err(failed(output.status.to_string()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The path of this very program: the file that it was started from if that is still it, so that the next one has its name.
pub(super) fn own() -> PathBuf {
    let identity = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino())).ok();
    let named = fs::read_link(OWN).ok().filter(|path| {
        let there = identity(path);
        there.is_some() && there == identity(Path::new(OWN))
    });
    named.unwrap_or_else(|| PathBuf::from(OWN))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn received(folder: &Path, bytes: Vec<u8>, digest: Option<&str>) -> Result<bool, UpgradeError> {
        let mut headers = HeaderMap::new();
        if let Some(digest) = digest {
            headers.insert("content-digest", digest.parse().unwrap());
        }
        receive(&headers, Body::from(bytes), &folder.join("next")).await
    }

    #[tokio::test]
    async fn what_is_no_program_of_this_machine_is_refused_and_not_kept() {
        let folder = tempfile::tempdir().unwrap();
        let own = fs::read(OWN).unwrap()[..4096].to_vec();
        let mut other_machine = own.clone();
        other_machine[18] ^= 0xff;
        for wrong in [b"#!/bin/sh\necho hello\n".to_vec(), vec![0; 64], b"\x7fELF".to_vec(), other_machine] {
            let refused = received(folder.path(), wrong, None).await.unwrap_err();
            assert!(matches!(refused, UpgradeError::Rejected(_)), "{refused}");
            assert!(!folder.path().join("next").exists());
        }
        let wrong_digest = "sha-256=:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=:";
        let refused = received(folder.path(), own.clone(), Some(wrong_digest)).await.unwrap_err();
        assert!(refused.to_string().contains("sha-256"), "{refused}");
        assert!(received(folder.path(), own, None).await.unwrap());
        assert_eq!(fs::metadata(folder.path().join("next")).unwrap().mode() & 0o777, 0o755);
        assert!(!received(folder.path(), Vec::new(), None).await.unwrap());
    }

    #[tokio::test]
    async fn a_program_that_cannot_go_on_is_found_out_before() {
        let error = check(Path::new("/bin/false")).await.unwrap_err();
        assert!(error.to_string().contains("exit status: 1"), "{error}");
        let error = check(Path::new("/bin/true")).await.unwrap_err();
        assert!(error.to_string().contains("version"), "{error}");
    }
}
