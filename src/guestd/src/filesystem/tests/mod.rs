//! Tests of the operations against a real directory tree, and the agent in miniature that they share with those of `/files`.

mod change;
mod entry;
mod list;
mod rpc;
mod transfer;

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;

use super::Filesystem;
use crate::identity::{Accounts, RequestUser};
use crate::settings::Settings;

/// A home directory of its own, whose user is whoever runs the tests.
pub(super) struct Fixture {
    _root: TempDir,
    pub home: PathBuf,
    pub accounts: Arc<Accounts>,
    pub settings: Arc<Settings>,
    pub filesystem: Arc<Filesystem>,
}

impl Fixture {
    pub(super) fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        // The real path: answers about links are resolved ones.
        let base = root.path().canonicalize().unwrap();
        let home = base.join("home/tester");
        std::fs::create_dir_all(&home).unwrap();
        std::fs::create_dir(base.join("etc")).unwrap();
        // Somebody else gets as far as the home directory, and into it by the leave of a test.
        std::fs::set_permissions(&base, std::fs::Permissions::from_mode(0o755)).unwrap();
        let me = home.metadata().unwrap();
        let passwd = format!(
            "tester:x:{}:{}::{}:/bin/sh\nother:x:12345:12346::{}:/bin/sh\n",
            me.uid(),
            me.gid(),
            home.display(),
            home.display()
        );
        std::fs::write(base.join("etc/passwd"), passwd).unwrap();
        std::fs::write(base.join("etc/group"), format!("testers:x:{}:\nothers:x:12346:\n", me.gid()))
            .unwrap();
        let accounts = Arc::new(Accounts::new(&base));
        let settings = Arc::new(Settings::new(false));
        settings.update(|values| values.default_user = "tester".to_owned());
        let activity = crate::activity::Activity::new(guestd_idle::Policy::default());
        let filesystem = Arc::new(Filesystem::new(Arc::clone(&accounts), Arc::clone(&settings), activity));
        Self { _root: root, home, accounts, settings, filesystem }
    }

    pub(super) fn write(&self, path: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.home.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        path
    }

    pub(super) fn link(&self, target: impl AsRef<Path>, path: &str) -> PathBuf {
        let path = self.home.join(path);
        std::os::unix::fs::symlink(target, &path).unwrap();
        path
    }

    pub(super) fn fifo(&self, path: &str) -> PathBuf {
        let path = self.home.join(path);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o644)).unwrap();
        path
    }

    pub(super) fn mode(&self, path: &str, mode: u32) {
        std::fs::set_permissions(self.home.join(path), std::fs::Permissions::from_mode(mode)).unwrap();
    }

    /// Somebody else, for tests of rights; only root can act as others.
    pub(super) fn other(&self) -> Option<RequestUser> {
        is_root().then(|| RequestUser(Some(self.accounts.user("other").unwrap())))
    }
}

pub(super) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Whether extended attributes of users work where the tests run.
pub(super) fn has_attributes(directory: &Path) -> bool {
    use std::os::fd::AsFd as _;
    let probe = directory.join(".attributes");
    let file = std::fs::File::create(&probe).unwrap();
    let works = super::sys::set(file.as_fd(), c"user.e2b.probe", b"1").is_ok();
    std::fs::remove_file(probe).unwrap();
    works
}

pub(super) fn nobody() -> RequestUser {
    RequestUser(None)
}
