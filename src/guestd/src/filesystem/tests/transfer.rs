//! Moves between file systems. The copy is the same between any two directories, so most tests need no second file system.

use std::fs::{File, FileTimes, Permissions};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::{Fixture, has_attributes, nobody};
use crate::filesystem::place::Place;
use crate::filesystem::{sys, transfer};

fn move_across(source: &Path, destination: &Path) -> std::io::Result<()> {
    transfer::move_across(&Place::open(source)?, &Place::open(destination)?)
}

#[test]
fn a_tree_arrives_with_everything_that_it_was() {
    let fixture = Fixture::new();
    let file = fixture.write("tree/sub/file", vec![7; 300_000]);
    std::fs::set_permissions(&file, Permissions::from_mode(0o4751)).unwrap();
    std::fs::set_permissions(file.parent().unwrap(), Permissions::from_mode(0o500)).unwrap();
    std::fs::set_permissions(file.parent().unwrap(), Permissions::from_mode(0o700)).unwrap();
    fixture.link("../nowhere", "tree/link");
    fixture.fifo("tree/pipe");
    let time = SystemTime::UNIX_EPOCH + Duration::new(1_600_000_000, 5_000);
    let attributes = has_attributes(&fixture.home);
    let open = File::options().write(true).open(&file).unwrap();
    if attributes {
        sys::set(open.as_fd(), c"user.e2b.author", b"ada").unwrap();
    }
    open.set_times(FileTimes::new().set_modified(time)).unwrap();
    let moved = fixture.home.join("moved");
    move_across(&fixture.home.join("tree"), &moved).unwrap();
    assert!(!fixture.home.join("tree").exists());
    let metadata = moved.join("sub/file").metadata().unwrap();
    assert_eq!(
        (metadata.len(), metadata.mode() & 0o7777, metadata.modified().unwrap()),
        (300_000, 0o4751, time)
    );
    assert_eq!(moved.join("sub").metadata().unwrap().mode() & 0o7777, 0o700);
    assert_eq!(std::fs::read_link(moved.join("link")).unwrap(), Path::new("../nowhere"));
    assert!(moved.join("pipe").symlink_metadata().unwrap().file_type().is_fifo());
    if attributes {
        assert_eq!(crate::filesystem::entry::metadata(&moved.join("sub/file"))["author"], "ada");
    }
    // Nothing of the copying is left.
    assert_eq!(std::fs::read_dir(&fixture.home).unwrap().count(), 1);
}

#[test]
fn an_existing_file_is_replaced_and_an_empty_directory_too() {
    let fixture = Fixture::new();
    let (source, target) = (fixture.write("source", "new"), fixture.write("target", "old"));
    move_across(&source, &target).unwrap();
    assert_eq!(std::fs::read(&target).unwrap(), b"new");
    fixture.write("tree/file", "");
    std::fs::create_dir(fixture.home.join("empty")).unwrap();
    move_across(&fixture.home.join("tree"), &fixture.home.join("empty")).unwrap();
    assert!(fixture.home.join("empty/file").exists());
}

#[test]
fn what_cannot_be_replaced_is_refused_before_anything_is_copied() {
    let fixture = Fixture::new();
    fixture.write("file", "");
    fixture.write("full/file", "");
    let errno = |source: &str, target: &str| {
        let moved = move_across(&fixture.home.join(source), &fixture.home.join(target));
        moved.unwrap_err().raw_os_error().unwrap()
    };
    assert_eq!(errno("file", "full"), libc::EISDIR);
    assert_eq!(errno("full", "file"), libc::ENOTDIR);
    std::fs::create_dir(fixture.home.join("dir")).unwrap();
    assert_eq!(errno("dir", "full"), libc::ENOTEMPTY);
    assert_eq!(std::fs::read_dir(&fixture.home).unwrap().count(), 3);
}

#[tokio::test]
async fn a_move_to_another_file_system_works() {
    let fixture = Fixture::new();
    let Ok(elsewhere) = tempfile::tempdir_in("/dev/shm") else { return };
    if elsewhere.path().metadata().unwrap().dev() == fixture.home.metadata().unwrap().dev() {
        return;
    }
    fixture.write("tree/deep/file", "content");
    let target = elsewhere.path().join("new/tree");
    let (source, destination) = ("tree".to_owned(), target.to_str().unwrap().to_owned());
    let entry = fixture.filesystem.rename(nobody(), source, destination).await.unwrap();
    assert_eq!(entry.path, target.to_str().unwrap());
    assert_eq!(std::fs::read(target.join("deep/file")).unwrap(), b"content");
    assert!(!fixture.home.join("tree").exists());
}
