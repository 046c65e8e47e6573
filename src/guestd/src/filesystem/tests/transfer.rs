//! Moves between file systems. The copy is the same between any two directories, so most tests need no second file system.

use std::collections::BTreeMap;
use std::fs::{File, FileTimes, Permissions};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::{Fixture, has_attributes, is_root, nobody};
use crate::filesystem::credentials::ActingAs;
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

/// Everything below a directory, with the content of files.
fn tree(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(tree(&path));
        }
        found.insert(path.clone(), std::fs::read(&path).unwrap_or_default());
    }
    found
}

/// Moves as `other`, and expects an error that has changed nothing.
fn refused_to_other(fixture: &Fixture, source: &str, destination: &str) -> i32 {
    let before = tree(&fixture.home);
    let user = fixture.accounts.user("other").unwrap();
    let (source, destination) = (fixture.home.join(source), fixture.home.join(destination));
    let moved = std::thread::spawn(move || {
        let _acting = ActingAs::user(&user).unwrap();
        move_across(&source, &destination).unwrap_err().raw_os_error().unwrap()
    });
    let errno = moved.join().unwrap();
    assert_eq!(tree(&fixture.home), before);
    errno
}

fn give_to_other(path: &Path) {
    std::os::unix::fs::chown(path, Some(12345), Some(12346)).unwrap();
}

#[test]
fn a_source_that_has_to_stay_leaves_the_destination_as_it_was() {
    let fixture = Fixture::new();
    if !is_root() {
        return;
    }
    fixture.write("locked/source", "new");
    let victim = fixture.write("theirs/victim", "old");
    give_to_other(&victim);
    give_to_other(&fixture.home.join("theirs"));
    assert_eq!(refused_to_other(&fixture, "locked/source", "theirs/victim"), libc::EACCES);
    fixture.mode("locked", 0o1777);
    assert_eq!(refused_to_other(&fixture, "locked/source", "theirs/victim"), libc::EPERM);
}

#[test]
fn a_tree_of_which_a_part_has_to_stay_stays_whole() {
    let fixture = Fixture::new();
    if !is_root() {
        return;
    }
    std::fs::create_dir(fixture.home.join("target")).unwrap();
    for name in ["first", "middle", "shared", "last"] {
        fixture.write(&format!("source/tree/{name}/deep/file"), name);
    }
    for path in ["target", "source", "source/tree", "source/tree/first", "source/tree/last"] {
        give_to_other(&fixture.home.join(path));
    }
    for path in ["first/deep", "last/deep"] {
        give_to_other(&fixture.home.join("source/tree").join(path));
    }
    // Writable for the mover as a member of its group, and closed to it as the owner of the copy.
    for path in ["source/tree/shared", "source/tree/shared/deep"] {
        std::os::unix::fs::chown(fixture.home.join(path), None, Some(12346)).unwrap();
        fixture.mode(path, 0o070);
    }
    assert_eq!(refused_to_other(&fixture, "source/tree", "target/tree"), libc::EACCES);
}

#[test]
fn a_destination_that_cannot_be_replaced_leaves_the_source_under_its_name() {
    let fixture = Fixture::new();
    if !is_root() {
        return;
    }
    let source = fixture.write("source/file", "new");
    fixture.write("target/victim", "old");
    for path in [source.as_path(), &fixture.home.join("source")] {
        give_to_other(path);
    }
    fixture.mode("target", 0o1777);
    assert_eq!(refused_to_other(&fixture, "source/file", "target/victim"), libc::EPERM);
}

#[test]
fn the_holes_of_a_file_stay_holes() {
    const LENGTH: u64 = 64 << 20;
    let fixture = Fixture::new();
    for (name, at) in [("middle", Some(LENGTH / 2)), ("end", Some(LENGTH - 5)), ("empty", None)] {
        let source = fixture.home.join(name);
        let file = File::create(&source).unwrap();
        file.set_len(LENGTH).unwrap();
        if let Some(at) = at {
            file.write_all_at(b"hello", at).unwrap();
        }
        let blocks = file.metadata().unwrap().blocks();
        let target = fixture.home.join(format!("moved-{name}"));
        move_across(&source, &target).unwrap();
        let moved = target.metadata().unwrap();
        assert_eq!(moved.len(), LENGTH);
        assert!(moved.blocks() <= blocks + 64, "{name}: {} blocks were {blocks}", moved.blocks());
        if let Some(at) = at {
            let mut read = [0; 5];
            File::open(&target).unwrap().read_exact_at(&mut read, at).unwrap();
            assert_eq!(&read, b"hello");
        }
    }
}

#[tokio::test]
async fn a_move_that_fails_leaves_no_directories_behind() {
    let fixture = Fixture::new();
    let Some(other) = fixture.other() else { return };
    fixture.write("locked/file", "");
    std::fs::create_dir(fixture.home.join("theirs")).unwrap();
    give_to_other(&fixture.home.join("theirs"));
    let path = |path: &str| fixture.home.join(path).to_str().unwrap().to_owned();
    let moved = fixture.filesystem.rename(other, path("locked/file"), path("theirs/new/deep/file")).await;
    assert_eq!(moved.unwrap_err().code(), connectrpc::ErrorCode::PermissionDenied);
    assert!(!fixture.home.join("theirs/new").exists());
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
