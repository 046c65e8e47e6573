//! Recent output of one process: chunks of all its channels in the order in which they were read, under one running byte offset.

use std::collections::VecDeque;

use bytes::Bytes;

use super::Channel;

/// What a chunk costs beside its bytes: its place in the queue, its allocation, its reference count.
const OVERHEAD: usize = 160;

/// Chunks of one channel that follow each other are kept as one up to this size, so that a program that writes byte by byte does not
/// fill its log with overhead.
const MERGED: usize = 4096;

/// The most that one data event carries (contract: envd.md section 2.6).
pub(super) const EVENT: usize = 32 * 1024;

/// How much of the end is recent, in bytes of memory.
const RECENT: usize = super::LOG_LIMIT;

/// The memory that a chunk of `length` bytes takes.
pub(super) fn cost(length: usize) -> usize {
    length + OVERHEAD
}

#[derive(Debug)]
struct Chunk {
    start: u64,
    channel: Channel,
    bytes: Bytes,
}

impl Chunk {
    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }
}

/// It holds what its owner lets it hold: it never drops anything by itself.
#[derive(Debug, Default)]
pub(super) struct Log {
    chunks: VecDeque<Chunk>,
    end: u64,
    held: usize,
    /// How many chunks are before those of the last [`RECENT`] bytes, and the memory that they take.
    old: usize,
    held_by_old: usize,
}

impl Log {
    /// An empty log whose next byte is at `offset`.
    pub(super) fn at(offset: u64) -> Self {
        Self { end: offset, ..Self::default() }
    }

    /// Everything that is kept, oldest first.
    pub(super) fn chunks(&self) -> impl Iterator<Item = (Channel, &Bytes)> {
        self.chunks.iter().map(|chunk| (chunk.channel, &chunk.bytes))
    }

    /// The memory that it takes, in bytes.
    pub(super) fn held(&self) -> usize {
        self.held
    }

    /// The offset after the last byte.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// The offset of the oldest byte that is kept; the end when nothing is.
    pub(super) fn first(&self) -> u64 {
        self.chunks.front().map_or(self.end, |chunk| chunk.start)
    }

    /// The offset after the oldest chunk, which is the next to go.
    pub(super) fn front_end(&self) -> Option<u64> {
        self.chunks.front().map(Chunk::end)
    }

    /// The offset of the oldest byte that is recent.
    pub(super) fn recent(&self) -> u64 {
        self.chunks.get(self.old).map_or(self.end, |chunk| chunk.start)
    }

    pub(super) fn append(&mut self, channel: Channel, bytes: Bytes) {
        let length = bytes.len();
        if length == 0 {
            return;
        }
        match self.chunks.back_mut() {
            Some(last) if last.channel == channel && last.bytes.len() + length <= MERGED => {
                last.bytes = [&last.bytes[..], &bytes[..]].concat().into();
                self.held += length;
            }
            _ => {
                self.chunks.push_back(Chunk { start: self.end, channel, bytes });
                self.held += cost(length);
            }
        }
        self.end += length as u64;
        while self.held - self.held_by_old > RECENT {
            let Some(chunk) = self.chunks.get(self.old) else { break };
            self.held_by_old += cost(chunk.bytes.len());
            self.old += 1;
        }
    }

    /// What is kept from `offset` on, up to the end of its chunk and at most [`EVENT`] bytes.
    pub(super) fn read(&self, offset: u64) -> Option<(Channel, Bytes)> {
        // A reader that keeps up wants the last chunk.
        let index = match self.chunks.back() {
            Some(last) if last.start <= offset => self.chunks.len() - 1,
            _ => self.chunks.partition_point(|chunk| chunk.end() <= offset),
        };
        let chunk = self.chunks.get(index)?;
        let skipped = usize::try_from(offset.checked_sub(chunk.start)?).ok()?;
        let end = chunk.bytes.len().min(skipped.saturating_add(EVENT));
        (skipped < end).then(|| (chunk.channel, chunk.bytes.slice(skipped..end)))
    }

    pub(super) fn drop_front(&mut self) {
        if let Some(chunk) = self.chunks.pop_front() {
            let cost = cost(chunk.bytes.len());
            self.held -= cost;
            if self.old > 0 {
                self.old -= 1;
                self.held_by_old -= cost;
            }
        }
        if self.chunks.is_empty() {
            // A process that is quiet from now on keeps no empty queue.
            self.chunks = VecDeque::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offset_in_the_middle_of_a_chunk_reads_its_rest() {
        let mut log = Log::default();
        log.append(Channel::Stdout, Bytes::from_static(b"abc"));
        log.append(Channel::Stderr, Bytes::from_static(b"de"));
        log.append(Channel::Stdout, Bytes::from_static(b"fg"));
        let at = |offset| log.read(offset).map(|(channel, bytes)| (channel, bytes.to_vec()));
        assert_eq!(at(0), Some((Channel::Stdout, b"abc".to_vec())));
        assert_eq!(at(2), Some((Channel::Stdout, b"c".to_vec())));
        assert_eq!(at(3), Some((Channel::Stderr, b"de".to_vec())));
        assert_eq!(at(6), Some((Channel::Stdout, b"g".to_vec())));
        assert_eq!((at(7), at(u64::MAX)), (None, None));
    }

    #[test]
    fn what_was_dropped_is_not_read_as_something_else() {
        let mut log = Log::default();
        log.append(Channel::Stdout, Bytes::from_static(b"abc"));
        log.append(Channel::Stderr, Bytes::from_static(b"de"));
        log.drop_front();
        assert_eq!((log.first(), log.end()), (3, 5));
        assert_eq!(log.read(1), None);
        log.drop_front();
        assert_eq!((log.first(), log.end(), log.held()), (5, 5, 0));
        assert_eq!(log.read(4), None);
    }

    #[test]
    fn what_is_recent_is_bounded_whatever_else_is_kept() {
        let mut log = Log::default();
        let mut sizes = [1, 5000, 32 * 1024, 3, 4096].into_iter().cycle();
        while log.held() < 4 * RECENT {
            let channel = if log.end().is_multiple_of(2) { Channel::Stdout } else { Channel::Stderr };
            log.append(channel, vec![b'x'; sizes.next().unwrap()].into());
            let recent = log.chunks.iter().filter(|chunk| chunk.start >= log.recent());
            let held: usize = recent.map(|chunk| cost(chunk.bytes.len())).sum();
            assert!(held <= RECENT && (log.recent() == 0 || held > RECENT - cost(32 * 1024)), "{held}");
        }
        let (recent, held) = (log.recent(), log.held());
        while log.front_end().is_some_and(|end| end <= recent) {
            log.drop_front();
        }
        assert_eq!((log.first(), log.recent()), (recent, recent));
        assert!(log.held() <= RECENT && log.held() < held);
        log.drop_front();
        assert_eq!(log.recent(), log.first());
    }

    #[test]
    fn a_program_that_writes_byte_by_byte_does_not_fill_its_log_with_overhead() {
        let mut log = Log::default();
        for _ in 0..100_000 {
            log.append(Channel::Stdout, Bytes::from_static(b"x"));
        }
        assert_eq!(log.end(), 100_000);
        assert!(log.held() < 110_000, "{}", log.held());
        while log.front_end().is_some() {
            log.drop_front();
        }
        assert_eq!(log.held(), 0);
    }
}
