//! What the agent says about itself, kept for the host: a bounded ring of lines, fed by `tracing` and read by `logs.v1.Logs` (`rpc`).
//!
//! [`Logs`] owns the ring. When it is full the oldest lines go, and whoever reads learns how many. Nothing runs while nothing is logged.
//!
//! **What may be in a line.** Names and numbers: a path of the routes table, a pid, a tag, a user, the file name of an executable, an exit
//! code. Never an argument or a command line, an environment value, what is written or read, or a credential (contract: envd.md section
//! 11, weakness 24). An error's text may be there where the error is the system's.

mod layer;
pub mod middleware;
mod rpc;

use std::collections::VecDeque;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::watch;
use tracing::Level;

pub use layer::layer;
pub use rpc::LogService;

/// The target of lines that come with each call. They are for the host and stay off the console, which is a slow serial port in a
/// machine; warnings are on both.
pub const EACH_CALL: &str = "guestd::each_call";

/// What the ring may hold, in bytes.
const RING_LIMIT: usize = 256 * 1024;

/// What one line may hold, in bytes of its message, names and values.
const LINE_LIMIT: usize = 8 * 1024;

/// What a line costs besides its text, about.
const LINE_COST: usize = 128;

/// One line.
#[derive(Clone, Debug)]
pub struct Line {
    pub sequence: u64,
    pub at: Instant,
    pub level: Level,
    pub message: String,
    pub fields: Vec<(&'static str, String)>,
}

impl Line {
    fn size(&self) -> usize {
        let fields = self.fields.iter().map(|(name, value)| name.len() + value.len() + LINE_COST / 2);
        LINE_COST + self.message.len() + fields.sum::<usize>()
    }
}

#[derive(Debug, Default)]
struct Ring {
    lines: VecDeque<Line>,
    bytes: usize,
    /// The sequence of the newest line; zero before the first.
    newest: u64,
}

/// Some lines in order, and how many of those that were asked for are not there any more.
#[derive(Debug, Default)]
pub struct Batch {
    pub lost: u64,
    pub lines: Vec<Line>,
}

/// The lines of this agent's life.
#[derive(Debug)]
pub struct Logs {
    life: String,
    ring: Mutex<Ring>,
    news: watch::Sender<u64>,
}

impl Logs {
    pub fn new() -> Arc<Self> {
        // Random keys of the standard library's: no secret, only another value in each life.
        let life = format!("{:016x}", RandomState::new().build_hasher().finish());
        Arc::new(Self { life, ring: Mutex::default(), news: watch::Sender::new(0) })
    }

    /// Keeps a line; its sequence is given here.
    pub fn say(&self, level: Level, message: String, fields: Vec<(&'static str, String)>) {
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        ring.newest += 1;
        let line = Line { sequence: ring.newest, at: Instant::now(), level, message, fields };
        ring.bytes += line.size();
        ring.lines.push_back(line);
        while ring.bytes > RING_LIMIT {
            let Some(oldest) = ring.lines.pop_front() else { break };
            ring.bytes -= oldest.size();
        }
        let newest = ring.newest;
        drop(ring);
        self.news.send_replace(newest);
    }

    /// The lines after the sequence `after`, at most `count` and about `bytes` of them, but at least one if there is one.
    pub fn after(&self, after: u64, count: usize, bytes: usize) -> Batch {
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(oldest) = ring.lines.front().map(|line| line.sequence) else { return Batch::default() };
        let lost = oldest.saturating_sub(after.saturating_add(1));
        let skipped = after.saturating_add(1).saturating_sub(oldest);
        let skipped = usize::try_from(skipped).unwrap_or(usize::MAX);
        let mut left = bytes;
        let mut lines = Vec::new();
        for line in ring.lines.iter().skip(skipped).take(count) {
            if !lines.is_empty() && line.size() > left {
                break;
            }
            left = left.saturating_sub(line.size());
            lines.push(line.clone());
        }
        Batch { lost, lines }
    }

    /// Moves the lines together: they lie between what was freed since they were said, and keep its pages from being given back.
    pub fn move_together(&self) {
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        ring.lines = ring.lines.iter().cloned().collect();
    }

    /// Another one for each agent that starts.
    pub fn life(&self) -> &str {
        &self.life
    }

    /// Wakes with each new line; the value is its sequence.
    pub fn news(&self) -> watch::Receiver<u64> {
        self.news.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn say(logs: &Logs, messages: &[&str]) {
        for message in messages {
            logs.say(Level::INFO, (*message).to_owned(), Vec::new());
        }
    }

    fn messages(batch: &Batch) -> Vec<&str> {
        batch.lines.iter().map(|line| line.message.as_str()).collect()
    }

    #[test]
    fn a_cursor_continues_where_it_was() {
        let logs = Logs::new();
        say(&logs, &["a", "b", "c"]);
        assert_eq!(messages(&logs.after(0, 2, 1 << 20)), ["a", "b"]);
        let rest = logs.after(2, 2, 1 << 20);
        assert_eq!((messages(&rest), rest.lost, rest.lines[0].sequence), (vec!["c"], 0, 3));
        assert!(logs.after(3, 2, 1 << 20).lines.is_empty());
        assert!(logs.after(u64::MAX, 2, 1 << 20).lines.is_empty());
    }

    #[test]
    fn a_full_ring_drops_the_oldest_and_tells_how_many() {
        let logs = Logs::new();
        let long = "x".repeat(4000);
        say(&logs, &[long.as_str(); 1000]);
        let kept = logs.after(0, usize::MAX, usize::MAX);
        assert_eq!(kept.lost + kept.lines.len() as u64, 1000);
        assert!((1..RING_LIMIT / 4000 + 1).contains(&kept.lines.len()));
        assert!(logs.ring.lock().unwrap().bytes <= RING_LIMIT);
        assert_eq!(logs.after(990, usize::MAX, usize::MAX).lost, 0);
    }

    #[test]
    fn a_batch_is_bounded_and_never_empty_while_there_is_more() {
        let logs = Logs::new();
        let long = "x".repeat(4000);
        say(&logs, &["a", &long, "b"]);
        assert_eq!(messages(&logs.after(0, 10, 1000)), ["a"]);
        assert_eq!(messages(&logs.after(1, 10, 1000)), [&long]);
        assert_eq!(messages(&logs.after(2, 10, 1000)), ["b"]);
    }

    #[test]
    fn lines_without_text_are_bounded_too() {
        let logs = Logs::new();
        say(&logs, &[""; 10_000]);
        assert!(logs.ring.lock().unwrap().lines.len() <= RING_LIMIT / LINE_COST);
    }
}
