//! The status of every failure.

use std::io;
use std::path::PathBuf;

use http::StatusCode;

use crate::filesystem::files::FilesError;
use crate::filesystem::files::metadata::MetadataError;
use crate::identity::{AccountsError, PathError};

#[test]
fn every_failure_has_its_status() {
    use FilesError as E;
    let path = || PathBuf::from("/p");
    let text = || "x".to_owned();
    let unknown = AccountsError::UnknownUser { name: text() };
    let unreadable = AccountsError::Read { path: path(), source: io::Error::other("x") };
    let errno = |errno| E::Io { action: "do", path: path(), source: io::Error::from_raw_os_error(errno) };
    let table = [
        (E::User { name: text(), source: unknown }, 401),
        (E::User { name: text(), source: unreadable }, 500),
        (E::Path(PathError::OtherHome), 400),
        (E::Path(PathError::Nul), 400),
        (E::NotFound { path: path() }, 404),
        (E::IsDirectory { path: path() }, 400),
        (E::NotRegular { path: path() }, 400),
        (E::NotAcceptable, 406),
        (E::ContentType { content_type: text() }, 400),
        (E::ContentEncoding { encoding: text() }, 400),
        (E::BadGzip { message: text() }, 400),
        (E::BodyBroken { message: text() }, 400),
        (E::Multipart { message: text() }, 400),
        (E::MissingPath, 400),
        (E::MissingFileName, 400),
        (E::SamePath { path: path() }, 400),
        (E::Metadata(MetadataError::EmptyKey), 400),
        (E::Metadata(MetadataError::KeyTooLong { key: text() }), 400),
        (E::Metadata(MetadataError::Value { key: text() }), 400),
        (E::Metadata(MetadataError::TooLarge { bytes: 1 }), 400),
        (E::NoInodes, 507),
        (E::NoSpace { attempted: 1, written: 0 }, 507),
        (E::NoSpaceForMetadata { written: 1 }, 507),
        (E::Stopped, 503),
        (errno(libc::ENOENT), 404),
        (errno(libc::ENOTDIR), 400),
        (errno(libc::EISDIR), 400),
        (errno(libc::ENAMETOOLONG), 400),
        (errno(libc::EACCES), 403),
        (errno(libc::EROFS), 409),
        (errno(libc::ETXTBSY), 409),
        (errno(libc::ENOSPC), 507),
        (errno(libc::EDQUOT), 507),
        (errno(libc::EMFILE), 503),
        (errno(libc::EIO), 500),
    ];
    for (error, status) in table {
        assert_eq!(error.status(), StatusCode::from_u16(status).unwrap(), "{error}");
    }
}
