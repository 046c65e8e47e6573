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
    fixture.mode("old", 0o777);
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

#[tokio::test]
async fn what_a_user_may_not_do_is_not_done_for_it() {
    let fixture = Fixture::new();
    let Some(other) = fixture.other() else { return };
    fixture.write("dir/file", "x");
    fixture.mode("dir", 0o700);
    let filesystem = &fixture.filesystem;
    let outcomes = [
        filesystem.make_dir(other.clone(), format!("{}/new", fixture.home.display())).await.map(drop),
        filesystem.remove(other.clone(), format!("{}/dir", fixture.home.display())).await,
        filesystem.stat(other.clone(), format!("{}/dir/file", fixture.home.display())).await.map(drop),
        filesystem.list_dir(other.clone(), format!("{}/dir", fixture.home.display()), 1).await.map(drop),
        filesystem.rename(other, "dir".to_owned(), "moved".to_owned()).await.map(drop),
    ];
    for outcome in outcomes {
        let error = outcome.unwrap_err();
        assert_eq!(error.code().as_str(), "permission_denied", "{error}");
        assert!(error.to_string().starts_with("user 'other' may not "), "{error}");
    }
    assert!(fixture.home.join("dir/file").exists());
}

#[tokio::test]
async fn a_missing_home_is_made_for_its_user() {
    let fixture = Fixture::new();
    let Some(other) = fixture.other() else { return };
    std::fs::remove_dir(&fixture.home).unwrap();
    fixture.filesystem.make_dir(other, "projects/one".to_owned()).await.unwrap();
    for path in ["", "projects", "projects/one"] {
        assert_eq!(owner(&fixture.home.join(path)), (12345, 12346), "{path}");
    }
    assert_eq!(owner(fixture.home.parent().unwrap()), (0, 0));
}

#[tokio::test]
async fn a_tree_deeper_than_the_stack_and_the_descriptor_table_is_listed_and_removed() {
    let fixture = Fixture::new();
    let deep = fixture.home.join("deep");
    create_dir(&deep).unwrap();
    // No path can be that long, so it is made from the bottom up.
    for _ in 0..3000 {
        create_dir(fixture.home.join("above")).unwrap();
        std::fs::rename(&deep, fixture.home.join("above/d")).unwrap();
        std::fs::rename(fixture.home.join("above"), &deep).unwrap();
    }
    fixture.write("deep/d/e", "");
    let entries = fixture.filesystem.list_dir(nobody(), "deep".to_owned(), u32::MAX).await.unwrap();
    assert_eq!(entries.last().unwrap().name, "e", "the walk found its way up again");
    let longest = entries.iter().map(|entry| entry.path.len()).max().unwrap();
    assert!((4000..4100).contains(&longest), "{longest}");
    remove(&fixture, "deep").await.unwrap();
    assert!(!deep.exists());
}

#[tokio::test]
async fn more_names_than_are_held_at_once_are_removed() {
    let fixture = Fixture::new();
    create_dir(fixture.home.join("full")).unwrap();
    for number in 0..5000 {
        std::fs::write(fixture.home.join(format!("full/{number}")), "").unwrap();
    }
    remove(&fixture, "full").await.unwrap();
    assert!(!fixture.home.join("full").exists());
}
