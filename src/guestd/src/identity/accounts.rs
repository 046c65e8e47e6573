//! The users and groups of the machine, read from `/etc/passwd` and `/etc/group` by hand.
//!
//! Nothing is cached between lookups: a template, or a command that runs in the sandbox, may add a user at any time. The files
//! are small; one pass over the bytes finds a line without allocating for the others.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};

/// One user, as the operating system needs it for running a command or owning a file.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct User {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    pub home: PathBuf,
    /// Login shell; empty when the line does not name one.
    pub shell: PathBuf,
    /// Every group of the user, its primary one first, each once: what `setgroups` takes.
    pub groups: Vec<u32>,
}

/// Why a lookup failed.
#[derive(Debug, thiserror::Error)]
pub enum AccountsError {
    #[error("user: unknown user {name}")]
    UnknownUser { name: String },
    #[error("reading {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
}

impl AccountsError {
    /// The machine has no descriptors or no memory left: the account may well be there.
    pub fn is_exhaustion(&self) -> bool {
        match self {
            Self::UnknownUser { .. } => false,
            Self::Read { source, .. } => {
                matches!(source.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM))
            }
        }
    }
}

/// Looks users and groups up below one root directory.
#[derive(Clone, Debug)]
pub struct Accounts {
    passwd: PathBuf,
    group: PathBuf,
}

impl Accounts {
    /// Reads `<root>/etc/passwd` and `<root>/etc/group`; the agent passes `/`.
    pub fn new(root: &Path) -> Self {
        Self { passwd: root.join("etc/passwd"), group: root.join("etc/group") }
    }

    /// The user with this name. Numeric ids are not names (contract: envd.md section 2.1).
    ///
    /// An image without any `/etc/passwd` still has root, so that an agent in a bare image can run commands at all. A group file
    /// that cannot be read costs the supplementary groups and no more.
    ///
    /// # Errors
    ///
    /// [`AccountsError::UnknownUser`] when no well-formed line has the name; [`AccountsError::Read`] when the file exists and
    /// cannot be read.
    pub fn user(&self, name: &str) -> Result<User, AccountsError> {
        let unknown = || AccountsError::UnknownUser { name: name.to_owned() };
        let passwd = match std::fs::read(&self.passwd) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return if name == "root" { Ok(bare_root()) } else { Err(unknown()) };
            }
            Err(source) => return Err(AccountsError::Read { path: self.passwd.clone(), source }),
        };
        let line = passwd_lines(&passwd).find(|line| line.name == name.as_bytes()).ok_or_else(unknown)?;
        let group = std::fs::read(&self.group).unwrap_or_else(|error| {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(path = %self.group.display(), %error, "supplementary groups are unknown");
            }
            Vec::new()
        });
        let mut groups = vec![line.gid];
        for entry in group_lines(&group) {
            let is_member =
                entry.members.split(|byte| *byte == b',').any(|member| member.trim_ascii() == line.name);
            if is_member && !groups.contains(&entry.gid) {
                groups.push(entry.gid);
            }
        }
        Ok(User {
            name: name.to_owned(),
            uid: line.uid,
            gid: line.gid,
            home: path_of(if line.home.is_empty() { b"/" } else { line.home }),
            shell: path_of(line.shell),
            groups,
        })
    }

    /// The name of a user id, or the id in decimal (contract: envd.md section 3.3).
    pub fn user_name(&self, uid: u32) -> String {
        self.names().user(uid)
    }

    /// The name of a group id, or the id in decimal (contract: envd.md section 3.3).
    pub fn group_name(&self, gid: u32) -> String {
        self.names().group(gid)
    }

    /// Both tables of names as they are now, for a call that names the owners of many files. Files that cannot be read leave
    /// every id in decimal.
    pub fn names(&self) -> Names {
        let passwd = std::fs::read(&self.passwd).unwrap_or_default();
        let group = std::fs::read(&self.group).unwrap_or_default();
        let mut names = Names::default();
        for line in passwd_lines(&passwd) {
            names.users.entry(line.uid).or_insert_with(|| text_of(line.name));
        }
        for line in group_lines(&group) {
            names.groups.entry(line.gid).or_insert_with(|| text_of(line.name));
        }
        names
    }
}

/// Names by id at one moment; the first line of a file wins, as it does for the C library.
#[derive(Clone, Debug, Default)]
pub struct Names {
    users: HashMap<u32, String>,
    groups: HashMap<u32, String>,
}

impl Names {
    pub fn user(&self, uid: u32) -> String {
        self.users.get(&uid).cloned().unwrap_or_else(|| uid.to_string())
    }

    pub fn group(&self, gid: u32) -> String {
        self.groups.get(&gid).cloned().unwrap_or_else(|| gid.to_string())
    }
}

// === parsing ===

struct PasswdLine<'a> {
    name: &'a [u8],
    uid: u32,
    gid: u32,
    home: &'a [u8],
    shell: &'a [u8],
}

struct GroupLine<'a> {
    name: &'a [u8],
    gid: u32,
    members: &'a [u8],
}

/// The well-formed lines; a damaged one hides only itself.
fn passwd_lines(bytes: &[u8]) -> impl Iterator<Item = PasswdLine<'_>> {
    lines(bytes).filter_map(|line| {
        // name:password:uid:gid:comment:home:shell, where the shell may be missing with its colon.
        let mut fields = line.splitn(7, |byte| *byte == b':');
        let name = fields.next()?;
        let uid = number(fields.nth(1)?)?;
        let gid = number(fields.next()?)?;
        let home = fields.nth(1)?;
        let shell = fields.next().unwrap_or_default();
        Some(PasswdLine { name, uid, gid, home, shell })
    })
}

fn group_lines(bytes: &[u8]) -> impl Iterator<Item = GroupLine<'_>> {
    lines(bytes).filter_map(|line| {
        let mut fields = line.splitn(4, |byte| *byte == b':');
        let name = fields.next()?;
        let gid = number(fields.nth(1)?)?;
        let members = fields.next().unwrap_or_default();
        Some(GroupLine { name, gid, members })
    })
}

/// Lines without blanks, comments and the `+` and `-` lines by which NIS includes or hides entries.
fn lines(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes
        .split(|byte| *byte == b'\n')
        .map(<[u8]>::trim_ascii)
        .filter(|line| !line.is_empty() && !line.starts_with(b":") && !matches!(line[0], b'#' | b'+' | b'-'))
}

fn number(field: &[u8]) -> Option<u32> {
    // `parse` alone would also take a leading plus sign.
    if !field.first()?.is_ascii_digit() {
        return None;
    }
    std::str::from_utf8(field).ok()?.parse().ok()
}

fn text_of(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn path_of(bytes: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStrExt as _;
    PathBuf::from(std::ffi::OsStr::from_bytes(bytes))
}

fn bare_root() -> User {
    User {
        name: "root".to_owned(),
        uid: 0,
        gid: 0,
        home: PathBuf::from("/root"),
        shell: PathBuf::from("/bin/sh"),
        groups: vec![0],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts(passwd: &[u8], group: &[u8]) -> (tempfile::TempDir, Accounts) {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        std::fs::write(root.path().join("etc/passwd"), passwd).unwrap();
        std::fs::write(root.path().join("etc/group"), group).unwrap();
        let accounts = Accounts::new(root.path());
        (root, accounts)
    }

    #[test]
    fn a_user_comes_with_its_home_shell_and_groups() {
        let passwd = b"root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000:A User,,,:/home/user:/bin/zsh\n";
        let group =
            b"root:x:0:\nsudo:x:27:user,other\nuser:x:1000:\ndocker:x:998:other, user\nusers:x:100:others\n";
        let (_root, accounts) = accounts(passwd, group);
        let user = accounts.user("user").unwrap();
        let expected = User {
            name: "user".to_owned(),
            uid: 1000,
            gid: 1000,
            home: "/home/user".into(),
            shell: "/bin/zsh".into(),
            groups: vec![1000, 27, 998],
        };
        assert_eq!(user, expected);
    }

    #[test]
    fn damaged_lines_hide_only_themselves() {
        let passwd = b"# comment\n\n+nis::::::\n-hidden\nshort:x:1\nletters:x:abc:0::/h:/s\nplus:x:+5:0::/h:/s\n\
            huge:x:4294967296:0::/h:/s\nnegative:x:-2:0::/h:/s\n:x:7:7::/h:/s\n\xff\xfe:x:9:9::/h:/s\n  \nuser:x:1000:1000::/home/user:/bin/sh";
        let (_root, accounts) = accounts(passwd, b"");
        assert_eq!(accounts.user("user").unwrap().uid, 1000);
        for name in ["", "#", "+nis", "-hidden", "short", "letters", "plus", "huge", "negative", "1000"] {
            assert!(matches!(accounts.user(name), Err(AccountsError::UnknownUser { .. })), "{name:?}");
        }
    }

    #[test]
    fn carriage_returns_empty_homes_and_missing_shells_are_survived() {
        let (_root, accounts) =
            accounts(b"dos:x:5:6::/home/dos:/bin/sh\r\nbare:x:7:8::\nno:x:9:9::/h\n", b"");
        assert_eq!(accounts.user("dos").unwrap().shell, Path::new("/bin/sh"));
        assert_eq!(accounts.user("bare").unwrap().home, Path::new("/"));
        assert_eq!(accounts.user("no").unwrap().shell, Path::new(""));
    }

    #[test]
    fn the_first_of_two_lines_with_one_name_wins() {
        let (_root, accounts) =
            accounts(b"u:x:1:1::/a:/s\nu:x:2:2::/b:/s\nv:x:1:1::/c:/s\n", b"g:x:4:\nh:x:4:u,u\ni:x:4:u\n");
        assert_eq!(accounts.user("u").unwrap().uid, 1);
        assert_eq!(accounts.user("u").unwrap().groups, [1, 4]);
        assert_eq!(accounts.user_name(1), "u");
        assert_eq!(accounts.group_name(4), "g");
    }

    #[test]
    fn an_id_without_a_name_is_decimal() {
        let (_root, accounts) = accounts(b"u:x:1:1::/a:/s\n", b"");
        assert_eq!(accounts.user_name(4_000_000_000), "4000000000");
        assert_eq!(accounts.group_name(1), "1");
    }

    #[test]
    fn a_user_added_at_run_time_is_found() {
        let (root, accounts) = accounts(b"root:x:0:0::/root:/bin/sh\n", b"");
        assert!(accounts.user("late").is_err());
        std::fs::write(root.path().join("etc/passwd"), "late:x:1001:1001::/home/late:/bin/sh\n").unwrap();
        assert_eq!(accounts.user("late").unwrap().uid, 1001);
    }

    #[test]
    fn an_image_without_account_files_still_has_root() {
        let root = tempfile::tempdir().unwrap();
        let accounts = Accounts::new(root.path());
        assert_eq!(accounts.user("root").unwrap().uid, 0);
        assert!(matches!(accounts.user("user"), Err(AccountsError::UnknownUser { .. })));
        assert_eq!(accounts.user_name(0), "0");
    }

    #[test]
    fn an_unreadable_file_is_not_an_unknown_user() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("etc/passwd")).unwrap();
        let error = Accounts::new(root.path()).user("root").unwrap_err();
        assert!(matches!(error, AccountsError::Read { .. }), "{error}");
    }
}
