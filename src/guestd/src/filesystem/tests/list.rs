//! The order, the depth and the robustness of listings.

use std::fs::{Permissions, create_dir, create_dir_all};
use std::os::unix::fs::PermissionsExt as _;

use guestd_protocol::wire::filesystem::FileType;

use super::{Fixture, is_root, nobody};
use crate::filesystem::FilesystemError;

async fn names(fixture: &Fixture, path: &str, depth: u32) -> Vec<String> {
    let entries = fixture.filesystem.list_dir(nobody(), path.to_owned(), depth).await.unwrap();
    entries.into_iter().map(|entry| entry.name).collect()
}

fn tree() -> Fixture {
    let fixture = Fixture::new();
    for path in
        ["parent/subdir1/subdir1_1/subdir1_1_1", "parent/subdir1/subdir1_2", "parent/subdir2/subdir2_1"]
    {
        create_dir_all(fixture.home.join(path)).unwrap();
    }
    fixture.write("parent/subdir2/subdir2_2/file", "");
    fixture.write("parent/file", "");
    fixture
}

#[tokio::test]
async fn a_listing_is_in_preorder_and_as_deep_as_asked() {
    let fixture = tree();
    let one = ["file", "subdir1", "subdir2"];
    assert_eq!(names(&fixture, "parent", 0).await, one);
    assert_eq!(names(&fixture, "parent", 1).await, one);
    let two = ["file", "subdir1", "subdir1_1", "subdir1_2", "subdir2", "subdir2_1", "subdir2_2"];
    assert_eq!(names(&fixture, "parent", 2).await, two);
    let three = [
        "file",
        "subdir1",
        "subdir1_1",
        "subdir1_1_1",
        "subdir1_2",
        "subdir2",
        "subdir2_1",
        "subdir2_2",
        "file",
    ];
    assert_eq!(names(&fixture, "parent", 3).await, three);
    assert_eq!(names(&fixture, "parent", u32::MAX).await, three);
}

#[tokio::test]
async fn names_are_in_byte_order() {
    let fixture = Fixture::new();
    for name in ["b", "a", "B", "a.b", "a-b", "10", "9", "ü", ".hidden"] {
        fixture.write(&format!("d/{name}"), "");
    }
    assert_eq!(names(&fixture, "d", 1).await, [".hidden", "10", "9", "B", "a", "a-b", "a.b", "b", "ü"]);
}

#[tokio::test]
async fn a_symlink_to_a_directory_lists_under_the_requested_path() {
    let fixture = tree();
    let link = fixture.link("parent/subdir2", "link");
    let entries = fixture.filesystem.list_dir(nobody(), "link".to_owned(), 2).await.unwrap();
    let paths: Vec<_> = entries.iter().map(|entry| entry.path.as_str()).collect();
    let expected =
        ["subdir2_1", "subdir2_2", "subdir2_2/file"].map(|path| format!("{}/{path}", link.display()));
    assert_eq!(paths, expected);
}

#[tokio::test]
async fn links_below_the_base_are_listed_and_not_followed() {
    let fixture = tree();
    fixture.link("subdir2", "parent/a-link");
    fixture.link(".", "parent/loop");
    fixture.link("nowhere", "parent/broken");
    let entries = fixture.filesystem.list_dir(nobody(), "parent".to_owned(), 9).await.unwrap();
    let of = |name: &str| entries.iter().find(|entry| entry.name == name).unwrap();
    assert_eq!(of("a-link").r#type, FileType::Directory);
    assert_eq!(of("loop").r#type, FileType::Directory);
    assert_eq!(of("broken").r#type, FileType::Unspecified);
    assert!(!entries.iter().any(|entry| entry.path.contains("link/") || entry.path.contains("loop/")));
}

#[tokio::test]
async fn directories_below_the_wanted_depth_are_not_read() {
    if is_root() {
        // Root reads everything, so nothing would be seen.
        return;
    }
    let fixture = tree();
    let locked = fixture.home.join("parent/subdir1");
    std::fs::set_permissions(&locked, Permissions::from_mode(0o000)).unwrap();
    // One level does not look into it, and two levels only miss its content.
    assert_eq!(names(&fixture, "parent", 1).await, ["file", "subdir1", "subdir2"]);
    assert_eq!(names(&fixture, "parent", 2).await, ["file", "subdir1", "subdir2", "subdir2_1", "subdir2_2"]);
    let error = fixture.filesystem.list_dir(nobody(), "parent/subdir1".to_owned(), 1).await.unwrap_err();
    assert_eq!(error.code().as_str(), "permission_denied");
    std::fs::set_permissions(&locked, Permissions::from_mode(0o755)).unwrap();
}

#[tokio::test]
async fn what_cannot_be_listed_says_why() {
    let fixture = Fixture::new();
    fixture.write("file", "");
    fixture.link("cycle", "cycle");
    fixture.link("nowhere", "broken");
    let list =
        async |path: &str| fixture.filesystem.list_dir(nobody(), path.to_owned(), 1).await.unwrap_err();
    assert!(matches!(list("missing").await, FilesystemError::PathNotFound { .. }));
    assert!(matches!(list("broken").await, FilesystemError::PathNotFound { .. }));
    assert!(matches!(list("cycle").await, FilesystemError::CyclicLink { .. }));
    assert_eq!(list("file/below").await.code().as_str(), "invalid_argument");
    let error = list("file").await;
    assert_eq!(error.to_string(), format!("path is not a directory: {}/file", fixture.home.display()));
}

#[tokio::test]
async fn a_name_that_is_not_utf8_does_not_fail_the_listing() {
    use std::os::unix::ffi::OsStrExt as _;
    let fixture = Fixture::new();
    create_dir(fixture.home.join("d")).unwrap();
    std::fs::write(fixture.home.join("d").join(std::ffi::OsStr::from_bytes(b"bad\xff")), "").unwrap();
    fixture.write("d/good", "");
    assert_eq!(names(&fixture, "d", 1).await, ["bad\u{fffd}", "good"]);
}

#[tokio::test]
async fn an_empty_path_lists_the_working_directory_then_the_home() {
    let fixture = tree();
    assert_eq!(names(&fixture, "", 1).await, ["parent"]);
    fixture.settings.update(|values| values.default_workdir = Some("~/parent/subdir2".to_owned()));
    assert_eq!(names(&fixture, "", 1).await, ["subdir2_1", "subdir2_2"]);
}
