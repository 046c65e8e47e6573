//! What a path in a request means: expansion of `~` and of relative paths, and lexical cleaning.
//!
//! Purely lexical: nothing is looked up on disk, and symbolic links stay as they are (contract: envd.md sections 2.4 and 3.1).

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use super::accounts::User;

/// Why a path of a request has no meaning.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// `~name`: only the user's own home directory expands.
    #[error("cannot expand user-specific home dir")]
    OtherHome,
    /// A file name of the operating system ends at its first NUL byte.
    #[error("path contains a NUL byte")]
    Nul,
}

/// The absolute path that `path`, which need not be text, means to `user`.
///
/// An empty path is the default working directory, or else the home directory; `~` and `~/x` are in the home directory; a
/// relative path is relative to the home directory and not to the default working directory, as SDKs expect. The result is clean
/// as by [`clean`], absolute paths too: envd leaves those as they were given (envd.md section 11, number 18), so that one file had
/// many names in replies.
///
/// # Errors
///
/// [`PathError::OtherHome`] for `~name`, and [`PathError::Nul`].
pub fn resolve_path(
    path: impl AsRef<OsStr>,
    user: &User,
    default_workdir: Option<&str>,
) -> Result<PathBuf, PathError> {
    let path = match (path.as_ref().as_bytes(), default_workdir) {
        (b"", Some(workdir)) => workdir.as_bytes(),
        (path, _) => path,
    };
    if path.contains(&0) {
        return Err(PathError::Nul);
    }
    // A home directory without a leading slash would make every answer depend on the agent's own directory.
    let home = Path::new("/").join(&user.home);
    let expanded = match path {
        b"~" => home,
        [b'~', b'/', rest @ ..] => {
            // `join` would take a second slash for the start of an absolute path.
            let start = rest.iter().position(|byte| *byte != b'/').unwrap_or(rest.len());
            home.join(OsStr::from_bytes(&rest[start..]))
        }
        [b'~', ..] => return Err(PathError::OtherHome),
        path => home.join(OsStr::from_bytes(path)),
    };
    Ok(clean(&expanded))
}

/// The shortest lexically equal form of an absolute path: no `.`, no `..`, no doubled or trailing slash.
pub fn clean(path: &Path) -> PathBuf {
    let mut cleaned = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => cleaned.push(name),
            // `pop` at the root does nothing: the parent of the root is the root.
            Component::ParentDir => {
                cleaned.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    cleaned
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(home: &str) -> User {
        User {
            name: "user".to_owned(),
            uid: 1000,
            gid: 1000,
            home: home.into(),
            shell: "/bin/sh".into(),
            groups: vec![1000],
        }
    }

    #[test]
    fn every_form_of_path_resolves_as_the_contract_says() {
        let cases: &[(&str, Option<&str>, &str)] = &[
            ("", None, "/home/user"),
            ("", Some("/work"), "/work"),
            ("", Some("/srv/"), "/srv"),
            ("", Some("project"), "/home/user/project"),
            ("", Some("~/project"), "/home/user/project"),
            ("", Some(""), "/home/user"),
            ("~", Some("/work"), "/home/user"),
            ("~/", None, "/home/user"),
            ("~/a/b", None, "/home/user/a/b"),
            ("~//etc", None, "/home/user/etc"),
            ("~/../other", None, "/home/other"),
            ("a.txt", Some("/work"), "/home/user/a.txt"),
            ("./a//b/", None, "/home/user/a/b"),
            (".", None, "/home/user"),
            ("..", None, "/home"),
            ("../../../../etc/passwd", None, "/etc/passwd"),
            ("a/~", None, "/home/user/a/~"),
            ("/", None, "/"),
            ("//tmp///x", None, "/tmp/x"),
            ("/tmp/", None, "/tmp"),
            ("/tmp/./a/../b", None, "/tmp/b"),
            ("/../..", None, "/"),
            ("/~", None, "/~"),
            ("with space/ü", None, "/home/user/with space/ü"),
        ];
        for (path, workdir, expected) in cases {
            let resolved = resolve_path(path, &user("/home/user"), *workdir);
            assert_eq!(resolved.as_deref(), Ok(Path::new(expected)), "{path:?} with {workdir:?}");
        }
    }

    #[test]
    fn a_name_that_is_no_text_stays_what_it_is() {
        for path in [&b"raw\xff"[..], b"~/raw\xff", b"./raw\xff", b"/home/user/raw\xff"] {
            let resolved = resolve_path(OsStr::from_bytes(path), &user("/home/user"), None).unwrap();
            assert_eq!(resolved.as_os_str().as_bytes(), b"/home/user/raw\xff");
        }
    }

    #[test]
    fn the_home_of_somebody_else_does_not_expand() {
        for path in ["~root", "~root/x", "~~", "~.", "~\\x"] {
            assert_eq!(resolve_path(path, &user("/home/user"), None), Err(PathError::OtherHome), "{path:?}");
        }
        let error = resolve_path("", &user("/home/user"), Some("~root")).unwrap_err();
        assert_eq!(error.to_string(), "cannot expand user-specific home dir");
    }

    #[test]
    fn a_nul_byte_is_refused_before_it_cuts_a_name() {
        assert_eq!(resolve_path("/etc/passwd\0.txt", &user("/home/user"), None), Err(PathError::Nul));
    }

    #[test]
    fn a_home_without_a_leading_slash_stays_absolute() {
        assert_eq!(resolve_path("x", &user("home/u"), None).unwrap(), Path::new("/home/u/x"));
        assert_eq!(resolve_path("x", &user(""), None).unwrap(), Path::new("/x"));
    }

    proptest::proptest! {
        #[test]
        fn a_resolved_path_is_absolute_and_already_clean(path in "[a-c./~ ]{0,24}", home in "[a-c./]{0,12}") {
            if let Ok(resolved) = resolve_path(&path, &user(&home), None) {
                proptest::prop_assert!(resolved.is_absolute());
                let cleaned_again = clean(&resolved);
                proptest::prop_assert_eq!(cleaned_again.as_os_str(), resolved.as_os_str());
                proptest::prop_assert!(!resolved.components().any(|c| c == Component::ParentDir));
            }
        }
    }
}
