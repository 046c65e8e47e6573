//! `POST /collapse`: puts the agent's own memory into huge pages, so that a restored snapshot faults fewer of them in (contract: envd.md
//! section 4.10).

use std::time::Instant;

use serde::Serialize;

/// The size of a huge page, in bytes, and how many pages are in one.
const CHUNK: usize = 2 * 1024 * 1024;
const PAGE: usize = 4096;
const PAGES: usize = CHUNK / PAGE;

/// A chunk of which less is in memory is left alone: making it whole would cost more than its faults.
const RESIDENT_PAGES: usize = PAGES / 2;

/// The most chunks that one call looks at.
const CHUNKS_LIMIT: usize = 4096;

/// The counts are of chunks, but for `regions`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Collapse {
    /// Heaps and other private memory, large enough for a huge page.
    regions: usize,
    chunks: usize,
    collapsed: usize,
    already_huge: usize,
    /// Mostly not in memory, or the kernel would not.
    skipped: usize,
    elapsed_ms: u64,
}

/// A private writable region without a file, and how much of it is huge already, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Region {
    start: usize,
    end: usize,
    huge: usize,
}

/// Collapses what can be. Blocks while the kernel copies.
pub(super) fn collapse() -> Collapse {
    let started = Instant::now();
    let mut counts = Collapse::default();
    for region in regions(&std::fs::read_to_string("/proc/self/smaps").unwrap_or_default()) {
        let first = region.start.next_multiple_of(CHUNK);
        if first + CHUNK > region.end {
            continue;
        }
        counts.regions += 1;
        let mut huge = region.huge / CHUNK;
        for start in (first..=region.end - CHUNK).step_by(CHUNK) {
            if counts.chunks == CHUNKS_LIMIT {
                break;
            }
            counts.chunks += 1;
            // The table says how many of a region's chunks are huge, not which; asking again for one of those is free.
            if huge > 0 {
                huge -= 1;
                counts.already_huge += 1;
            } else if resident_pages(start) >= RESIDENT_PAGES && collapse_chunk(start) {
                counts.collapsed += 1;
            } else {
                counts.skipped += 1;
            }
        }
    }
    counts.elapsed_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    counts
}

/// How much of a chunk is in memory.
fn resident_pages(start: usize) -> usize {
    let mut states = [0u8; PAGES];
    // SAFETY: mincore(2) reads no memory of the range, and writes one byte for each of its pages to `states`. A range that was unmapped
    // meanwhile is an error.
    let told = unsafe { libc::mincore(start as *mut libc::c_void, CHUNK, states.as_mut_ptr()) };
    if told < 0 { 0 } else { states.iter().filter(|state| *state & 1 == 1).count() }
}

fn collapse_chunk(start: usize) -> bool {
    // SAFETY: MADV_COLLAPSE changes which pages back the range, never what is in it (madvise(2)); a range that was unmapped meanwhile is an
    // error.
    unsafe { libc::madvise(start as *mut libc::c_void, CHUNK, libc::MADV_COLLAPSE) == 0 }
}

/// The regions in the words of proc_pid_smaps(5).
fn regions(smaps: &str) -> Vec<Region> {
    let mut regions: Vec<Region> = Vec::new();
    let mut ours = false;
    for line in smaps.lines() {
        let mut fields = line.split_whitespace();
        let Some(first) = fields.next() else { continue };
        if let Some(kind) = first.strip_suffix(':') {
            if ours
                && kind == "AnonHugePages"
                && let (Some(region), Some(kib)) = (regions.last_mut(), fields.next())
            {
                region.huge = kib.parse::<usize>().unwrap_or_default() * 1024;
            }
            continue;
        }
        let address = |text: &str| usize::from_str_radix(text, 16).ok();
        let range = first.split_once('-').and_then(|(start, end)| Some((address(start)?, address(end)?)));
        let private = fields.next() == Some("rw-p");
        let name = fields.nth(3);
        ours = private && matches!(name, None | Some("[heap]"));
        if let (true, Some((start, end))) = (ours, range) {
            regions.push(Region { start, end, huge: 0 });
        }
    }
    regions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_agents_own_writable_memory_is_touched() {
        let smaps = "\
            00400000-00900000 r-xp 00000000 08:01 12 /usr/bin/guestd\nAnonHugePages:      2048 kB\n\
            01000000-02000000 rw-p 00000000 00:00 0 [heap]\nRss: 8 kB\nAnonHugePages:      4096 kB\n\
            7f0000000000-7f0000800000 rw-p 00000000 00:00 0 \nAnonHugePages:      0 kB\n\
            7f1000000000-7f1000800000 rw-s 00000000 00:01 9 /dev/zero\n\
            7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0 [stack]\nAnonHugePages:      2048 kB\n";
        let heap = Region { start: 0x0100_0000, end: 0x0200_0000, huge: 4 * 1024 * 1024 };
        let anonymous = Region { start: 0x7f00_0000_0000, end: 0x7f00_0080_0000, huge: 0 };
        assert_eq!(regions(smaps), [heap, anonymous]);
    }

    #[test]
    fn memory_is_the_same_after_it_was_collapsed() {
        let numbers: Vec<u32> = (0..2_000_000).collect();
        let counts = collapse();
        assert_eq!(counts.chunks, counts.collapsed + counts.already_huge + counts.skipped);
        assert!(counts.regions >= 1, "{counts:?}");
        assert!(numbers.iter().copied().eq(0..2_000_000));
    }
}
