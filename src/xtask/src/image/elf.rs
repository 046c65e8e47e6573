//! As much of the ELF format as an image needs: the section that says what a kernel module depends on, and whether a
//! program needs an interpreter. 64-bit little-endian only; every read is checked, as the files come from packages.

/// A parsed header.
#[derive(Clone, Copy, Debug)]
pub struct File<'a> {
    bytes: &'a [u8],
}

impl<'a> File<'a> {
    /// `None` when this is no 64-bit little-endian ELF file.
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        bytes.starts_with(b"\x7fELF\x02\x01").then_some(Self { bytes })
    }

    /// The kinds (`p_type`) of the program headers.
    pub fn segment_kinds(self) -> impl Iterator<Item = u32> + 'a {
        let table = self.table(0x20, 0x36, 0x38);
        table.filter_map(|entry| number::<4>(entry, 0)).map(|kind| kind as u32)
    }

    /// The contents of the section with this name.
    pub fn section(self, name: &str) -> Option<&'a [u8]> {
        let names_index = number::<2>(self.bytes, 0x3e)?;
        let names = contents(self.bytes, self.sections().nth(names_index)?)?;
        self.sections().find_map(|header| {
            let start = number::<4>(header, 0)?;
            let rest = names.get(start..)?;
            let end = rest.iter().position(|byte| *byte == 0)?;
            (rest[..end] == *name.as_bytes()).then(|| contents(self.bytes, header)).flatten()
        })
    }

    fn sections(self) -> impl Iterator<Item = &'a [u8]> {
        self.table(0x28, 0x3a, 0x3c)
    }

    /// The entries of a header table, given where the file header keeps its offset, its entry size and its length.
    fn table(self, offset: usize, size: usize, count: usize) -> impl Iterator<Item = &'a [u8]> {
        let bytes = self.bytes;
        let offset = number::<8>(bytes, offset).unwrap_or(usize::MAX);
        let size = number::<2>(bytes, size).unwrap_or(0);
        let count = number::<2>(bytes, count).unwrap_or(0);
        (0..count).map_while(move |index| {
            let start = offset.checked_add(index.checked_mul(size)?)?;
            bytes.get(start..start.checked_add(size)?)
        })
    }
}

fn contents<'a>(bytes: &'a [u8], header: &[u8]) -> Option<&'a [u8]> {
    let start = number::<8>(header, 0x18)?;
    let length = number::<8>(header, 0x20)?;
    bytes.get(start..start.checked_add(length)?)
}

/// The little-endian number of `N` bytes at `offset`.
pub fn number<const N: usize>(bytes: &[u8], offset: usize) -> Option<usize> {
    let field = bytes.get(offset..offset.checked_add(N)?)?;
    usize::try_from(field.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte))).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_of_a_real_program_is_found_by_name() {
        let bytes = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let file = File::parse(&bytes).unwrap();
        assert!(!file.section(".text").unwrap().is_empty());
        assert_eq!(file.section(".no-such-section"), None);
        assert!(file.segment_kinds().count() > 2);
    }

    #[test]
    fn damaged_files_are_refused_and_never_read_out_of_bounds() {
        assert!(File::parse(b"#!/bin/sh").is_none());
        let bytes = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        for length in [6, 16, 64, 100, 1000] {
            let cut = File::parse(&bytes[..length]).unwrap();
            assert_eq!(cut.section(".text"), None);
            let _ = cut.segment_kinds().count();
        }
    }

    #[test]
    fn numbers_are_little_endian() {
        assert_eq!(number::<2>(&[0, 1, 2], 1), Some(0x201));
        assert_eq!(number::<4>(&[0, 1, 2], 0), None);
    }
}
