//! Loads the kernel modules that the image carries, in the order that the image builder computed.
//!
//! The builder has already sorted them by their dependencies (a module whose dependency is missing fails with a bare
//! "no such file"), so nothing is resolved here.

use std::fs::File;
use std::path::Path;

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};

use super::console::say;

/// The folder in the initramfs.
pub(super) const FOLDER: &str = "/modules";
/// The list in that folder: one file name a line.
const ORDER: &str = "order";

/// The file names in an order file: one a line, `#` starts a comment. A name that could leave the folder is refused.
pub(super) fn parse_order(text: &str) -> Result<Vec<&str>, String> {
    let mut names = Vec::new();
    for line in text.lines() {
        let name = line.split('#').next().unwrap_or_default().trim();
        if name.is_empty() {
            continue;
        }
        if name.contains('/') || name.starts_with('.') {
            return Err(format!("`{name}` is not a plain file name"));
        }
        names.push(name);
    }
    Ok(names)
}

/// Loads everything in the order file and frees its memory. A module that cannot be loaded is reported and skipped:
/// the machine may well do without it, and if it is the root disk's the wait for that disk says so.
pub(super) fn load_all() {
    let folder = Path::new(FOLDER);
    let order = match std::fs::read_to_string(folder.join(ORDER)) {
        Ok(order) => order,
        Err(error) => return say!("no kernel modules are loaded: cannot read {FOLDER}/{ORDER}: {error}"),
    };
    let names = match parse_order(&order) {
        Ok(names) => names,
        Err(error) => return say!("no kernel modules are loaded: {FOLDER}/{ORDER}: {error}"),
    };
    for name in names {
        if let Err(why) = load(&folder.join(name)) {
            say!("kernel module {name} was not loaded: {why}");
        }
    }
    // The initramfs is memory, and nothing reads these files again.
    if let Err(error) = std::fs::remove_dir_all(folder) {
        say!("the memory of {FOLDER} was not freed: {error}");
    }
}

fn load(path: &Path) -> Result<(), String> {
    let file = File::open(path).map_err(|error| error.to_string())?;
    match finit_module(&file, c"", ModuleInitFlags::empty()) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(Errno::ENOENT) => {
            Err("it needs a module that comes later in the order or is not in the image".into())
        }
        Err(Errno::ENOEXEC) => Err("it is not a module of this kernel".into()),
        Err(errno) => Err(errno.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_kept_and_comments_are_left_out() {
        let text = "# made by the image builder\nvirtio_ring.ko\n\n  virtio.ko  # after the ring\n";
        assert_eq!(parse_order(text), Ok(vec!["virtio_ring.ko", "virtio.ko"]));
    }

    #[test]
    fn a_name_that_leaves_the_folder_is_refused() {
        for name in ["../evil.ko", "/tmp/evil.ko", "sub/evil.ko", ".hidden"] {
            assert!(parse_order(name).unwrap_err().contains(name));
        }
    }

    #[test]
    fn an_empty_order_loads_nothing() {
        assert_eq!(parse_order(""), Ok(vec![]));
    }
}
