//! The machine's name: the sandbox's id, in the kernel, in `/etc/hostname` and in `/etc/hosts` (sudo looks itself up there).

use std::path::Path;

/// The address that a machine knows itself by where it has no other (hosts(5) as Debian has it).
const OWN_ADDRESS: &str = "127.0.1.1";

const LOCALHOST: &str = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n";

pub(super) fn set(name: &str) {
    // A container's runtime has set it already and may not let us.
    if let Err(error) = nix::unistd::sethostname(name) {
        tracing::debug!(%error, "the kernel keeps its host name");
    }
    write("/etc/hostname", &format!("{name}\n"));
    let hosts = std::fs::read_to_string("/etc/hosts").unwrap_or_default();
    write("/etc/hosts", &with_own_name(&hosts, name));
}

fn write(path: &str, text: &str) {
    if let Err(error) = std::fs::write(Path::new(path), text) {
        tracing::warn!(path, %error, "the host name could not be written");
    }
}

fn with_own_name(hosts: &str, name: &str) -> String {
    let mut text: String = hosts
        .lines()
        .filter(|line| line.split_whitespace().next() != Some(OWN_ADDRESS))
        .flat_map(|line| [line, "\n"])
        .collect();
    if !text.contains("localhost") {
        text.insert_str(0, LOCALHOST);
    }
    text.push_str(&format!("{OWN_ADDRESS} {name}\n"));
    text
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
    }
}
