//! Making, moving and removing.

use std::fs::{create_dir, create_dir_all};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::{Fixture, nobody};
use crate::filesystem::FilesystemError;

async fn make_dir(fixture: &Fixture, path: &str) -> Result<(), FilesystemError> {
    fixture.filesystem.make_dir(nobody(), path.to_owned()).await.map(drop)
}

async fn rename(fixture: &Fixture, source: &str, destination: &str) -> Result<(), FilesystemError> {
    fixture.filesystem.rename(nobody(), source.to_owned(), destination.to_owned()).await.map(drop)
}

async fn remove(fixture: &Fixture, path: &str) -> Result<(), FilesystemError> {
    fixture.filesystem.remove(nobody(), path.to_owned()).await
}

fn owner(path: &Path) -> (u32, u32) {
    let metadata = path.symlink_metadata().unwrap();
    (metadata.uid(), metadata.gid())
}

#[tokio::test]
async fn parents_are_made_and_the_entry_is_returned() {
    let fixture = Fixture::new();
    let entry = fixture.filesystem.make_dir(nobody(), "a/b/c".to_owned()).await.unwrap();
    assert_eq!(entry.path, fixture.home.join("a/b/c").to_str().unwrap());
    assert_eq!(entry.permissions, "drwxr-xr-x");
    assert_eq!(fixture.home.join("a").metadata().unwrap().mode() & 0o7777, 0o755);
}

#[tokio::test]
async fn only_created_directories_change_owner() {
    let fixture = Fixture::new();
    let Some(other) = fixture.other() else { return };
    create_dir(fixture.home.join("old")).unwrap();
    let before = owner(&fixture.home.join("old"));
    fixture.filesystem.make_dir(other, "old/new/deep".to_owned()).await.unwrap();
    assert_eq!(owner(&fixture.home.join("old")), before);
    assert_eq!(owner(&fixture.home.join("old/new")), (12345, 12346));
    assert_eq!(owner(&fixture.home.join("old/new/deep")), (12345, 12346));
}

#[tokio::test]
async fn what_is_in_the_way_of_a_new_directory_is_named() {
    let fixture = Fixture::new();
    fixture.write("file", "");
    fixture.link("nowhere", "broken");
    create_dir(fixture.home.join("dir")).unwrap();
    fixture.link("dir", "link");
    let exists = make_dir(&fixture, "dir").await.unwrap_err();
    assert_eq!(exists.to_string(), format!("directory already exists: {}/dir", fixture.home.display()));
    assert_eq!(exists.code().as_str(), "already_exists");
    assert_eq!(make_dir(&fixture, "link").await.unwrap_err().code().as_str(), "already_exists");
    for path in ["file", "broken", "file/below", "file/far/below", "broken/below"] {
        assert_eq!(make_dir(&fixture, path).await.unwrap_err().code().as_str(), "invalid_argument", "{path}");
    }
    make_dir(&fixture, "link/inside").await.unwrap();
    assert!(fixture.home.join("dir/inside").is_dir());
}

#[tokio::test]
async fn a_move_makes_parents_and_replaces_a_file() {
    let fixture = Fixture::new();
    fixture.write("source", "new");
    fixture.write("deep/target", "old");
    rename(&fixture, "source", "deep/target").await.unwrap();
    assert_eq!(std::fs::read(fixture.home.join("deep/target")).unwrap(), b"new");
    rename(&fixture, "deep/target", "much/deeper/name").await.unwrap();
    assert!(fixture.home.join("much/deeper/name").is_file());
    rename(&fixture, "much", "renamed").await.unwrap();
    assert!(fixture.home.join("renamed/deeper/name").is_file());
}

#[tokio::test]
async fn a_missing_source_leaves_no_directories_behind() {
    let fixture = Fixture::new();
    let error = rename(&fixture, "missing", "new/place").await.unwrap_err();
    assert_eq!(error.to_string(), format!("source file not found: {}/missing", fixture.home.display()));
    assert_eq!(error.code().as_str(), "not_found");
    assert!(!fixture.home.join("new").exists());
}

#[tokio::test]
async fn a_broken_link_moves_as_the_link_it_is() {
    let fixture = Fixture::new();
    fixture.link("nowhere", "broken");
    rename(&fixture, "broken", "moved").await.unwrap();
    assert_eq!(std::fs::read_link(fixture.home.join("moved")).unwrap(), Path::new("nowhere"));
}

#[tokio::test]
async fn a_move_that_cannot_be_says_why() {
    let fixture = Fixture::new();
    fixture.write("file", "");
    fixture.write("full/inside", "");
    create_dir_all(fixture.home.join("dir/sub")).unwrap();
    let code = async |source: &str, destination: &str| {
        rename(&fixture, source, destination).await.unwrap_err().code().as_str()
    };
    assert_eq!(code("dir", "full").await, "failed_precondition");
    assert_eq!(code("dir", "dir/sub/self").await, "invalid_argument");
    assert_eq!(code("dir", "file").await, "invalid_argument");
    assert_eq!(code("file", "dir").await, "invalid_argument");
    assert_eq!(code("dir", "file/below").await, "invalid_argument");
    assert_eq!(code("file/below", "x").await, "invalid_argument");
}

#[tokio::test]
async fn a_removal_takes_the_tree_and_spares_what_links_point_to() {
    let fixture = Fixture::new();
    fixture.write("keep/file", "");
    fixture.write("gone/deep/file", "");
    fixture.link("../keep", "gone/link");
    remove(&fixture, "gone").await.unwrap();
    assert!(!fixture.home.join("gone").exists());
    assert!(fixture.home.join("keep/file").exists());
    let link = fixture.link("keep", "link");
    remove(&fixture, "link").await.unwrap();
    assert!(!link.is_symlink() && fixture.home.join("keep/file").exists());
    fixture.fifo("pipe");
    remove(&fixture, "pipe").await.unwrap();
}

#[tokio::test]
async fn removing_what_is_not_there_is_success() {
    let fixture = Fixture::new();
    remove(&fixture, "missing/deep").await.unwrap();
    fixture.write("file", "");
    assert_eq!(remove(&fixture, "file/below").await.unwrap_err().code().as_str(), "invalid_argument");
    assert!(fixture.home.join("file").exists());
}

#[tokio::test]
async fn the_root_directory_is_never_removed() {
    let fixture = Fixture::new();
    for path in ["/", "//", "/..", "/tmp/../"] {
        assert!(matches!(remove(&fixture, path).await, Err(FilesystemError::Root)), "{path}");
    }
}
