//! Writes an initramfs: the "newc" cpio format, the same bytes for the same entries.

/// An archive being written. Entries come out in the order in which they go in, owned by root, without times.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_000;
/// The name that ends an archive.
const TRAILER: &str = "TRAILER!!!";

impl Archive {
    pub fn folder(&mut self, name: &str) {
        self.entry(name, FOLDER | 0o755, (0, 0), &[]);
    }

    pub fn file(&mut self, name: &str, permissions: u32, contents: &[u8]) {
        self.entry(name, FILE | permissions, (0, 0), contents);
    }

    pub fn character_device(&mut self, name: &str, permissions: u32, major: u32, minor: u32) {
        self.entry(name, CHARACTER_DEVICE | permissions, (major, minor), &[]);
    }

    pub fn finish(mut self) -> Vec<u8> {
        self.entry(TRAILER, 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, (major, minor): (u32, u32), contents: &[u8]) {
        self.entries += 1;
        let links = if mode & FOLDER == FOLDER { 2 } else { 1 };
        let size = u32::try_from(contents.len()).expect("an initramfs entry is far below 4 GiB");
        let name_size = u32::try_from(name.len()).expect("a name is short") + 1;
        let inode = if name == TRAILER { 0 } else { self.entries };
        // inode, mode, uid, gid, links, mtime, size, device, special device, name size, checksum
        let fields = [inode, mode, 0, 0, links, 0, size, 0, 0, major, minor, name_size, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Vec<u8> {
        let mut archive = Archive::default();
        archive.folder("dev");
        archive.character_device("dev/console", 0o600, 5, 1);
        archive.file("init", 0o755, b"#!/bin/true\n");
        archive.finish()
    }

    #[test]
    fn the_same_entries_give_the_same_bytes() {
        assert_eq!(example(), example());
    }

    #[test]
    fn headers_and_contents_are_aligned() {
        let bytes = example();
        assert_eq!(bytes.len() % 4, 0);
        let starts: Vec<_> =
            bytes.windows(6).enumerate().filter(|(_, w)| w == b"070701").map(|(at, _)| at).collect();
        assert_eq!(starts.len(), 4);
        assert!(starts.iter().all(|start| start % 4 == 0));
    }

    /// The format as another program reads it, where one is installed.
    #[test]
    fn the_cpio_program_reads_it() {
        let Some(program) = crate::workspace::find_program("cpio") else {
            return eprintln!("skipped: no cpio program here");
        };
        let folder = tempfile::tempdir().unwrap();
        let archive = folder.path().join("x.cpio");
        std::fs::write(&archive, example()).unwrap();
        let mut command = std::process::Command::new(program);
        command.args(["--list", "--verbose", "--quiet", "-F"]).arg(&archive);
        let listing = String::from_utf8(command.output().unwrap().stdout).unwrap();
        let lines: Vec<_> = listing.lines().collect();
        assert!(lines[0].starts_with("drwxr-xr-x") && lines[0].ends_with("dev"), "{listing}");
        assert!(lines[1].starts_with("crw-------") && lines[1].contains("5,   1"), "{listing}");
        assert!(lines[2].starts_with("-rwxr-xr-x") && lines[2].ends_with("init"), "{listing}");
    }
}
