//! What one file looks like in a reply.

use std::fs::{File, FileTimes, Permissions};
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, SystemTime};

use guestd_protocol::wire::filesystem::{EntryInfo, FileType};

use super::{Fixture, has_attributes, nobody};
use crate::filesystem::{FilesystemError, entry, sys};

async fn stat(fixture: &Fixture, path: &str) -> EntryInfo {
    fixture.filesystem.stat(nobody(), path.to_owned()).await.unwrap()
}

#[test]
fn permissions_are_spelled_as_go_spells_them() {
    let cases: &[(u32, &str)] = &[
        (libc::S_IFREG | 0o644, "-rw-r--r--"),
        (libc::S_IFREG, "----------"),
        (libc::S_IFREG | 0o777, "-rwxrwxrwx"),
        (libc::S_IFDIR | 0o755, "drwxr-xr-x"),
        (libc::S_IFDIR | 0o1777, "dtrwxrwxrwx"),
        (libc::S_IFDIR | 0o2775, "dgrwxrwxr-x"),
        (libc::S_IFREG | 0o4755, "urwxr-xr-x"),
        (libc::S_IFREG | 0o2755, "grwxr-xr-x"),
        (libc::S_IFREG | 0o6711, "ugrwx--x--x"),
        (libc::S_IFREG | 0o7000, "ugt---------"),
        (libc::S_IFLNK | 0o777, "Lrwxrwxrwx"),
        (libc::S_IFCHR | 0o666, "Dcrw-rw-rw-"),
        (libc::S_IFBLK | 0o660, "Drw-rw----"),
        (libc::S_IFIFO | 0o644, "prw-r--r--"),
        (libc::S_IFSOCK | 0o755, "Srwxr-xr-x"),
    ];
    for (mode, expected) in cases {
        assert_eq!(entry::permissions(*mode), *expected, "{mode:o}");
    }
}

#[tokio::test]
async fn a_regular_file_is_described_in_full() {
    let fixture = Fixture::new();
    let path = fixture.write("dir/a.txt", "hello");
    std::fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
    let time = SystemTime::UNIX_EPOCH + Duration::new(1_700_000_000, 123_000_000);
    File::open(&path).unwrap().set_times(FileTimes::new().set_modified(time)).unwrap();
    let info = stat(&fixture, "dir/a.txt").await;
    assert_eq!((info.name.as_str(), info.path.as_str()), ("a.txt", path.to_str().unwrap()));
    assert_eq!((info.size, info.mode, info.permissions.as_str()), (5, 0o640, "-rw-r-----"));
    assert_eq!((info.owner.as_str(), info.group.as_str()), ("tester", "testers"));
    assert_eq!(info.r#type, FileType::File);
    assert_eq!((info.modified_time.seconds, info.modified_time.nanos), (1_700_000_000, 123_000_000));
    assert_eq!((info.symlink_target, info.is_symlink), (None, false));
}

#[tokio::test]
async fn a_link_has_the_type_and_mode_of_its_target_and_the_rest_of_its_own() {
    let fixture = Fixture::new();
    let target = fixture.write("dir/test.txt", "hello");
    std::fs::set_permissions(&target, Permissions::from_mode(0o600)).unwrap();
    let link = fixture.link("test.txt", "dir/link");
    let second = fixture.link("dir/link", "second");
    for (path, length) in [(&link, 8), (&second, 8)] {
        let info = stat(&fixture, path.to_str().unwrap()).await;
        assert_eq!((info.r#type, info.mode), (FileType::File.into(), 0o600));
        assert_eq!((info.permissions.as_str(), info.size, info.is_symlink), ("Lrwxrwxrwx", length, true));
        assert_eq!(info.path, path.to_str().unwrap());
        assert_eq!(info.symlink_target.as_deref(), target.to_str());
    }
}

#[tokio::test]
async fn broken_and_cyclic_links_point_to_themselves() {
    let fixture = Fixture::new();
    for (target, name) in [("nowhere", "broken"), ("cycle", "cycle")] {
        let link = fixture.link(target, name);
        let info = stat(&fixture, name).await;
        assert_eq!((info.r#type, info.mode, info.is_symlink), (FileType::Unspecified.into(), 0, true));
        assert_eq!(info.symlink_target.as_deref(), link.to_str());
    }
}

#[tokio::test]
async fn pipes_and_devices_have_no_type_and_never_block() {
    let fixture = Fixture::new();
    fixture.fifo("pipe");
    let info = stat(&fixture, "pipe").await;
    assert_eq!((info.r#type, info.permissions.as_str()), (FileType::Unspecified.into(), "prw-r--r--"));
    let info = stat(&fixture, "/dev/null").await;
    assert_eq!((info.r#type, info.permissions.as_str()), (FileType::Unspecified.into(), "Dcrw-rw-rw-"));
}

#[tokio::test]
async fn the_root_has_a_name() {
    let info = stat(&Fixture::new(), "/").await;
    assert_eq!((info.name.as_str(), info.path.as_str()), ("/", "/"));
}

#[tokio::test]
async fn metadata_shows_the_clients_keys_and_nothing_else() {
    let fixture = Fixture::new();
    if !has_attributes(&fixture.home) {
        return;
    }
    let file = File::open(fixture.write("f", "")).unwrap();
    sys::set(file.as_fd(), c"user.e2b.author", b"ada").unwrap();
    sys::set(file.as_fd(), c"user.e2b.binary", b"\xff\xfe").unwrap();
    sys::set(file.as_fd(), c"user.other", b"x").unwrap();
    fixture.link("f", "link");
    for path in ["f", "link"] {
        let metadata: Vec<_> = stat(&fixture, path).await.metadata.into_iter().collect();
        assert_eq!(metadata, [("author".to_owned(), "ada".to_owned())]);
    }
}

#[tokio::test]
async fn a_date_that_json_cannot_hold_is_left_out() {
    let fixture = Fixture::new();
    let path = fixture.write("f", "");
    let file = File::options().write(true).open(&path).unwrap();
    for seconds in [0_u64, 300_000_000_000] {
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        // Not every file system can store such a date; then there is nothing to see.
        if file.set_times(FileTimes::new().set_modified(time)).is_err()
            || path.metadata().unwrap().modified().unwrap() != time
        {
            continue;
        }
        assert!(stat(&fixture, "f").await.modified_time.is_unset());
    }
    let before_1970 = SystemTime::UNIX_EPOCH - Duration::from_millis(1500);
    file.set_times(FileTimes::new().set_modified(before_1970)).unwrap();
    let modified = stat(&fixture, "f").await.modified_time;
    assert_eq!((modified.seconds, modified.nanos), (-2, 500_000_000));
}

#[tokio::test]
async fn what_is_wrong_with_a_path_is_told_apart() {
    let fixture = Fixture::new();
    fixture.write("file", "");
    let stat = async |path: &str| fixture.filesystem.stat(nobody(), path.to_owned()).await.unwrap_err();
    let missing = stat("missing").await;
    assert!(matches!(missing, FilesystemError::FileNotFound { .. }));
    assert_eq!(missing.to_string(), format!("file not found: {}/missing", fixture.home.display()));
    // Below a file there is nothing, and an SDK's `exists` must say so instead of failing.
    assert!(matches!(stat("file/below").await, FilesystemError::FileNotFound { .. }));
    assert_eq!(stat(&"x".repeat(300)).await.code().as_str(), "invalid_argument");
    assert_eq!(stat("~root").await.to_string(), "cannot expand user-specific home dir");
    fixture.settings.update(|values| values.default_user = "ghost".to_owned());
    assert_eq!(stat("file").await.code().as_str(), "unauthenticated");
}
