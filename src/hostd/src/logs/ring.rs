//! One sandbox's lines: bounded, in order, no two with the same time, so that a time is a cursor.

use std::collections::{BTreeMap, VecDeque};

use guestd_protocol::wire::logs::v1 as wire;
use serde::{Deserialize, Serialize};

/// What the lines of one sandbox may take, in bytes; the oldest go first.
pub(super) const RING_LIMIT: usize = 128 * 1024;

/// What one line may hold, in bytes of its message, names and values; and how many fields, with how long names.
const LINE_LIMIT: usize = 8 * 1024;
const FIELDS_LIMIT: usize = 16;
const NAME_LIMIT: usize = 64;

/// What a line and a field cost besides their text, about.
const ENTRY_COST: usize = 128;
const FIELD_COST: usize = 64;

/// How long before its arrival a line can have been said, in milliseconds: no sandbox lives longer than a year.
const OLDEST: i64 = 366 * 24 * 3600 * 1000;

/// In the order of their weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    Debug,
    Info,
    Warn,
    Error,
}

impl Level {
    /// What is unknown is news.
    pub(super) fn of(level: Option<wire::Level>) -> Self {
        match level {
            Some(wire::Level::LEVEL_DEBUG) => Self::Debug,
            Some(wire::Level::LEVEL_WARN) => Self::Warn,
            Some(wire::Level::LEVEL_ERROR) => Self::Error,
            Some(wire::Level::LEVEL_INFO | wire::Level::LEVEL_UNSPECIFIED) | None => Self::Info,
        }
    }
}

/// One line.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Milliseconds since 1970, later than the entry before.
    pub at_ms: i64,
    pub level: Level,
    pub message: String,
    pub fields: BTreeMap<String, String>,
}

impl Entry {
    fn size(&self) -> usize {
        let fields = self.fields.iter().map(|(name, value)| FIELD_COST + name.len() + value.len());
        ENTRY_COST + self.message.len() + fields.sum::<usize>()
    }
}

#[derive(Debug, Default)]
pub struct Ring {
    entries: VecDeque<Entry>,
    bytes: usize,
    dropped: u64,
}

impl Ring {
    pub(super) fn push<'a>(
        &mut self,
        at_ms: i64,
        level: Level,
        message: &str,
        fields: impl Iterator<Item = (&'a str, &'a str)>,
    ) {
        let now = crate::clock::wall_ms();
        let earliest = self.entries.back().map_or(now - OLDEST, |last| last.at_ms + 1);
        let mut left = LINE_LIMIT;
        let message = shortened(message, &mut left);
        let mut kept = BTreeMap::new();
        for (name, value) in fields.take(FIELDS_LIMIT) {
            let name = shortened(name, &mut left.min(NAME_LIMIT));
            left = left.saturating_sub(name.len());
            kept.insert(name, shortened(value, &mut left));
        }
        let entry = Entry { at_ms: at_ms.max(earliest), level, message, fields: kept };
        self.bytes += entry.size();
        self.entries.push_back(entry);
        while self.bytes > RING_LIMIT {
            let Some(oldest) = self.entries.pop_front() else { break };
            self.bytes -= oldest.size();
            self.dropped += 1;
        }
    }

    /// Oldest first.
    pub fn entries(&self) -> impl DoubleEndedIterator<Item = &Entry> {
        self.entries.iter()
    }

    /// How many older lines are not kept any more.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    pub(super) fn size(&self) -> usize {
        self.bytes
    }

    pub(super) fn shrink(&mut self) {
        self.entries.shrink_to_fit();
    }
}

/// As much as fits, without what would speak to an operator's terminal.
fn shortened(text: &str, left: &mut usize) -> String {
    let end = text.floor_char_boundary(*left);
    *left -= end;
    let mut kept = text[..end].replace(char::is_control, " ");
    if end < text.len() {
        *left = 0;
        kept.push('…');
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_ring_drops_the_oldest_and_counts_them() {
        let mut ring = Ring::default();
        for number in 0..5000 {
            ring.push(1, Level::Info, &number.to_string(), std::iter::empty());
        }
        assert!(ring.size() <= RING_LIMIT);
        assert_eq!(ring.dropped() + ring.entries().count() as u64, 5000);
        assert_eq!(ring.entries().last().unwrap().message, "4999");
    }

    #[test]
    fn a_line_that_was_said_before_the_last_one_keeps_the_order() {
        let mut ring = Ring::default();
        let now = crate::clock::wall_ms();
        for at in [now, now - 5000, i64::MIN, now + 1] {
            ring.push(at, Level::Info, "x", std::iter::empty());
        }
        let times: Vec<_> = ring.entries().map(|entry| entry.at_ms - now).collect();
        assert_eq!(times, [0, 1, 2, 3]);
    }
}
