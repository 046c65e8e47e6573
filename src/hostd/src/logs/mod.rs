//! What the sandboxes' agents say, kept on the host: one bounded [`SandboxLog`] for each, filled by a follower task (`follow`), and
//! [`Ended`] for those of sandboxes that are over.
//!
//! A guest is not trusted with the length, the number or the characters of anything. Logs live in memory: a supervisor that starts anew
//! reads again what each agent keeps; those of sandboxes that ended before are gone.

pub mod follow;
mod ring;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use guestd_protocol::wire::logs::v1 as wire;

use crate::clock;
use crate::link::Link;
pub use ring::{Entry, Level, Ring};

/// What is kept of a console when its sandbox ends, in bytes.
const CONSOLE_KEPT: usize = 8 * 1024;

/// What a live console shows, in bytes.
pub const CONSOLE_SHOWN: usize = 64 * 1024;

/// What the logs of ended sandboxes may take together, in bytes; the oldest go first.
const ENDED_LIMIT: usize = 32 * 1024 * 1024;

/// One sandbox's log.
#[derive(Debug, Default)]
pub struct SandboxLog {
    ring: Mutex<Ring>,
    /// The end of the console, when the sandbox is over.
    console: Mutex<Option<String>>,
}

impl SandboxLog {
    pub fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The console as it was at the end; None while the sandbox lives.
    pub fn last_console(&self) -> Option<String> {
        self.console.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A line of the supervisor's own.
    pub fn note(&self, level: Level, message: &str, fields: &[(&str, &str)]) {
        self.ring().push(clock::wall_ms(), level, message, fields.iter().copied());
    }

    /// Takes what an agent sent.
    fn take(&self, message: &wire::FollowResponse) {
        let now = clock::wall_ms();
        let mut ring = self.ring();
        if message.lost > 0 {
            let said = format!("{} lines were lost: the agent said more than was kept", message.lost);
            ring.push(now, Level::Warn, &said, std::iter::empty());
        }
        for line in message.lines.iter().take(follow::MESSAGE_LINES) {
            let age = i64::try_from(line.age_ms).unwrap_or(i64::MAX);
            let fields = line.fields.iter().map(|(name, value)| (name.as_str(), value.as_str()));
            ring.push(now.saturating_sub(age), Level::of(line.level.as_known()), &line.message, fields);
        }
    }

    /// The sandbox is over: nothing more is said. A crash shows what the console said last among the lines.
    fn close(&self, reason: guestd_idle::EndReason, console: Option<String>) {
        let mut console = console.unwrap_or_default();
        let start = console.ceil_char_boundary(console.len().saturating_sub(CONSOLE_KEPT));
        console.drain(..start);
        console.shrink_to_fit();
        let crashed = reason == guestd_idle::EndReason::Crashed;
        if crashed {
            for line in console.lines().filter(|line| !line.trim().is_empty()) {
                self.note(Level::Warn, line, &[("source", "console")]);
            }
        }
        let level = if crashed { Level::Error } else { Level::Info };
        self.note(level, "sandbox ended", &[("reason", &reason.to_string())]);
        self.ring().shrink();
        *self.console.lock().unwrap_or_else(PoisonError::into_inner) = Some(console);
    }

    fn size(&self) -> usize {
        let console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        self.ring().size() + console.as_ref().map_or(0, String::len)
    }
}

#[derive(Debug)]
struct Kept {
    id: String,
    ended_wall_ms: i64,
    size: usize,
    log: Arc<SandboxLog>,
}

/// The logs of sandboxes that are over, oldest first.
#[derive(Debug, Default)]
pub struct Ended {
    kept: Mutex<VecDeque<Kept>>,
}

impl Ended {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes a log and keeps it.
    pub fn close(
        &self,
        id: &str,
        log: &Arc<SandboxLog>,
        reason: guestd_idle::EndReason,
        console: Option<String>,
    ) {
        log.close(reason, console);
        let size = log.size();
        let entry = Kept { id: id.to_owned(), ended_wall_ms: clock::wall_ms(), size, log: Arc::clone(log) };
        let mut kept = self.lock();
        kept.push_back(entry);
        let mut total: usize = kept.iter().map(|kept| kept.size).sum();
        while total > ENDED_LIMIT {
            let Some(oldest) = kept.pop_front() else { break };
            total -= oldest.size;
        }
    }

    /// None when it was never known here, or is kept no more.
    pub fn find(&self, id: &str) -> Option<Arc<SandboxLog>> {
        self.lock().iter().find(|kept| kept.id == id).map(|kept| Arc::clone(&kept.log))
    }

    /// Forgets those that ended before a wall time.
    pub fn expire(&self, before_ms: i64) {
        self.lock().retain(|kept| kept.ended_wall_ms >= before_ms);
    }
}

/// Where a follower is: the life of the agent and the last line of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    pub life: String,
    pub after: u64,
}

/// A stream of an agent's lines.
pub type Lines = connectrpc::client::ServerStream<hyper::body::Incoming, wire::FollowResponseView<'static>>;

impl Link {
    /// Follows an agent's log from a cursor.
    ///
    /// # Errors
    /// What the agent answered, or that it did not.
    pub async fn follow_logs(&self, cursor: &Cursor) -> Result<Lines, connectrpc::ConnectError> {
        let (transport, config) = self.client();
        let request =
            wire::FollowRequest { life: cursor.life.clone(), after: cursor.after, ..Default::default() };
        wire::LogsClient::new(transport, config).follow(request).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guestd_idle::EndReason;

    #[test]
    fn a_crash_shows_what_the_console_said_last() {
        let log = Arc::new(SandboxLog::default());
        let ended = Ended::default();
        let console = format!("{}\nKernel panic - not syncing\x1b[31m\n", "é".repeat(CONSOLE_KEPT));
        ended.close("i1", &log, EndReason::Crashed, Some(console));
        let found = ended.find("i1").unwrap();
        assert!(found.last_console().unwrap().len() <= CONSOLE_KEPT);
        let ring = found.ring();
        let said: Vec<_> = ring.entries().map(|entry| entry.message.as_str()).collect();
        assert!(
            said.iter().any(|line| line.starts_with("Kernel panic") && !line.contains('\x1b')),
            "{said:?}"
        );
        assert_eq!(said.last(), Some(&"sandbox ended"));
    }

    #[test]
    fn an_orderly_end_does_not_repeat_its_console() {
        let log = Arc::new(SandboxLog::default());
        Ended::default().close("i1", &log, EndReason::Idle, Some("booted\n".to_owned()));
        assert_eq!(log.ring().entries().count(), 1);
        assert_eq!(log.last_console().as_deref(), Some("booted\n"));
    }

    #[test]
    fn the_logs_of_ended_sandboxes_are_bounded_together() {
        let ended = Ended::default();
        for number in 0..5000 {
            let console = Some("x".repeat(CONSOLE_KEPT));
            ended.close(&format!("i{number}"), &Arc::default(), EndReason::Idle, console);
        }
        assert!(ended.lock().iter().map(|kept| kept.size).sum::<usize>() <= ENDED_LIMIT);
        assert!(ended.find("i4999").is_some());
        assert!(ended.find("i0").is_none());
        ended.expire(i64::MAX);
        assert!(ended.find("i4999").is_none());
    }

    #[test]
    fn an_agent_that_lies_about_everything_is_kept_in_bounds() {
        let log = SandboxLog::default();
        let line = wire::Line {
            age_ms: u64::MAX,
            level: 77.into(),
            message: "m\r\n\x1b]0;x\x07".repeat(10_000),
            fields: (0..1000).map(|n| (format!("{n}").repeat(500), "v".repeat(500))).collect(),
            ..Default::default()
        };
        let message = wire::FollowResponse { lost: u64::MAX, lines: vec![line; 300], ..Default::default() };
        for _ in 0..3 {
            log.take(&message);
        }
        let ring = log.ring();
        assert!(ring.size() <= ring::RING_LIMIT);
        assert!(ring.entries().all(|entry| !entry.message.contains(char::is_control)));
        let times: Vec<_> = ring.entries().map(|entry| entry.at_ms).collect();
        assert!(times.windows(2).all(|pair| pair[0] < pair[1]), "cursors are times: no two lines share one");
    }
}
