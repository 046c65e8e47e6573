//! The machine's names: its own (the sandbox's id, in the kernel, `/etc/hostname` and `/etc/hosts`: sudo looks itself up there), the event
//! gateway's, and the files that tell programs which sandbox they are in.

use std::fs;
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// The address that a machine knows itself by where it has no other (hosts(5) as Debian has it).
const OWN_ADDRESS: &str = "127.0.1.1";

const LOCALHOST: &str = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n";

/// The event gateway (contract: envd.md section 4.3, `hyperloopIP`).
const EVENTS_HOST: &str = "events.e2b.local";

/// Below the root (contract: envd.md section 0).
const RUN_FOLDER: &str = "run/e2b";

/// Longest id that becomes a host name, in bytes (hostname(7)).
const NAME_LIMIT: usize = 64;

/// What is to be written; `None` leaves what is there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Names {
    pub(super) sandbox_id: Option<String>,
    pub(super) template_id: Option<String>,
    pub(super) events: Option<IpAddr>,
    /// The machine is the sandbox's own: it may be named after it.
    pub(super) own_machine: bool,
}

/// Writes the names, one call after the other, behind everybody's back: nobody waits for a disk.
#[derive(Clone, Debug)]
pub(super) struct NameFiles {
    root: PathBuf,
    writing: Arc<Mutex<()>>,
}

impl NameFiles {
    pub(super) fn new(root: PathBuf) -> Self {
        Self { root, writing: Arc::default() }
    }

    pub(super) fn write_soon(&self, names: Names) {
        if names == (Names { own_machine: names.own_machine, ..Names::default() }) {
            return;
        }
        let files = self.clone();
        drop(tokio::task::spawn_blocking(move || files.write(&names)));
    }

    fn write(&self, names: &Names) {
        let _one = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let own_name = names.sandbox_id.as_deref().filter(|_| names.own_machine);
        if let Some(name) = own_name {
            // A container's runtime has set it already and may not let us.
            if let Err(error) = nix::unistd::sethostname(name) {
                tracing::debug!(%error, "the kernel keeps its host name");
            }
            self.put("etc/hostname", &format!("{name}\n"));
        }
        if own_name.is_some() || names.events.is_some() {
            let hosts = fs::read_to_string(self.root.join("etc/hosts")).unwrap_or_default();
            let mut next = hosts.clone();
            if let Some(name) = own_name {
                next = with_own_name(&next, name);
            }
            if let Some(address) = names.events {
                next = with_events_host(&next, address);
            }
            if next != hosts {
                self.put("etc/hosts", &next);
            }
        }
        if names.own_machine && (names.sandbox_id.is_some() || names.template_id.is_some()) {
            let files = [
                (".E2B_SANDBOX", Some("true")),
                (".E2B_SANDBOX_ID", names.sandbox_id.as_deref()),
                (".E2B_TEMPLATE_ID", names.template_id.as_deref()),
            ];
            for (name, value) in files.into_iter().filter_map(|(name, value)| Some((name, value?))) {
                if let Err(error) = put_run_file(&self.root.join(RUN_FOLDER), name, value) {
                    tracing::warn!(name, %error, "a run file could not be written");
                }
            }
        }
    }

    /// In place: a container's runtime may have mounted the file, which cannot be replaced then.
    fn put(&self, path: &str, text: &str) {
        if let Err(error) = fs::write(self.root.join(path), text) {
            tracing::warn!(path, %error, "a name could not be written");
        }
    }
}

/// Whether an id can stand in `/etc/hosts` and be a host name.
pub(super) fn is_name(id: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    (1..=NAME_LIMIT).contains(&id.len()) && id.chars().all(plain) && !id.starts_with(['-', '.'])
}

fn put_run_file(folder: &Path, name: &str, value: &str) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755))?;
    let temporary = folder.join(format!("{name}.new"));
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o444).open(&temporary)?;
    file.write_all(value.as_bytes())?;
    file.set_permissions(fs::Permissions::from_mode(0o444))?;
    fs::rename(&temporary, folder.join(name))
}

fn with_own_name(hosts: &str, name: &str) -> String {
    let mut text = without(hosts, |line| line.split_whitespace().next() == Some(OWN_ADDRESS));
    if !text.contains("localhost") {
        text.insert_str(0, LOCALHOST);
    }
    text.push_str(&format!("{OWN_ADDRESS} {name}\n"));
    text
}

fn with_events_host(hosts: &str, address: IpAddr) -> String {
    let mut text = without(hosts, |line| line.split_whitespace().skip(1).any(|name| name == EVENTS_HOST));
    text.push_str(&format!("{address} {EVENTS_HOST}\n"));
    text
}

fn without(hosts: &str, goes: impl Fn(&str) -> bool) -> String {
    hosts.lines().filter(|line| !goes(line)).flat_map(|line| [line, "\n"]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_name_replaces_the_first_and_leaves_the_rest() {
        let first = with_own_name("127.0.0.1 localhost\n10.0.0.1 db\n", "one");
        let second = with_own_name(&first, "two");
        assert_eq!(second, "127.0.0.1 localhost\n10.0.0.1 db\n127.0.1.1 two\n");
        assert!(with_own_name("", "one").starts_with("127.0.0.1 localhost\n"));
        let events = with_events_host(&second, "192.0.2.1".parse().unwrap());
        let moved = with_events_host(&events, "192.0.2.9".parse().unwrap());
        assert_eq!(moved, format!("{second}192.0.2.9 events.e2b.local\n"));
    }

    #[test]
    fn a_name_that_would_break_a_file_is_none() {
        for bad in ["", "a b", "a\nb", "../x", "-x", ".x", "a/b", &"x".repeat(65)] {
            assert!(!is_name(bad), "{bad:?}");
        }
        assert!(is_name("i1a2-b3_c.d"));
    }

    #[test]
    fn run_files_can_be_read_by_everybody_and_written_again() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("e2b");
        for value in ["first", "second"] {
            put_run_file(&folder, ".E2B_SANDBOX_ID", value).unwrap();
        }
        let path = folder.join(".E2B_SANDBOX_ID");
        assert_eq!(fs::read_to_string(&path).unwrap(), "second");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o444);
        assert_eq!(fs::metadata(&folder).unwrap().permissions().mode() & 0o777, 0o755);
    }

    #[test]
    fn a_machine_of_somebody_elses_keeps_its_name() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        let files = NameFiles::new(root.path().to_owned());
        let events = Some("192.0.2.1".parse().unwrap());
        files.write(&Names { sandbox_id: Some("sandbox".to_owned()), events, ..Names::default() });
        assert_eq!(
            fs::read_to_string(root.path().join("etc/hosts")).unwrap(),
            "192.0.2.1 events.e2b.local\n"
        );
        assert!(!root.path().join("etc/hostname").exists() && !root.path().join("run").exists());
    }
}
