//! One cell: code on its way through a context, and what came of it.
//!
//! Its lines go into a memory file as they come from the kernel, and each client reads at its own pace: one that stalls holds nobody up,
//! and the agent's own memory does not grow. What its only client has read is given back.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::Stream;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use super::event;
use crate::activity::HoldGuard;

/// What one cell may keep that nobody has read, in bytes.
const UNREAD_LIMIT: u64 = 64 << 20;

/// What all cells may keep together, in bytes.
const TOTAL_LIMIT: u64 = 256 << 20;

/// How much is read at once.
const CHUNK: usize = 64 * 1024;

/// How much is read before it is given back.
const GIVE_BACK: u64 = 256 * 1024;

/// How long a stream is silent before it says that it lives (contract: envd.md section 7.2).
const SILENCE: Duration = Duration::from_secs(5);

/// What all cells have in common.
#[derive(Debug, Default)]
pub struct Budget {
    /// Bytes that are kept.
    used: AtomicU64,
    /// Cells that have not ended.
    pub live: AtomicUsize,
}

impl Budget {
    fn take(&self, bytes: u64) -> bool {
        let taken = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            used.checked_add(bytes).filter(|used| *used <= TOTAL_LIMIT)
        });
        taken.is_ok()
    }

    fn give(&self, bytes: u64) {
        let _never_none = self
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| Some(used.saturating_sub(bytes)));
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Queued,
    Running,
    Done,
}

impl State {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Done => "done",
        }
    }
}

/// How far a cell has come.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    pub state: State,
    /// Bytes of lines.
    length: u64,
    /// Lines.
    pub events: u64,
}

/// What a client asks for.
#[derive(Debug)]
pub struct Request {
    pub code: String,
    /// For this cell alone.
    pub variables: BTreeMap<String, String>,
    /// From the start of its run.
    pub timeout: Option<Duration>,
}

#[derive(Debug)]
struct Lines {
    file: Option<File>,
    /// Before it everything was given back.
    begin: u64,
    /// Some output found no room.
    cut: bool,
}

#[derive(Debug)]
pub struct Cell {
    pub id: String,
    pub context: String,
    pub language: String,
    pub request: Request,
    /// Its lines are kept for who asks later.
    pub kept: bool,
    pub created: SystemTime,
    times: Mutex<(Option<SystemTime>, Option<SystemTime>)>,
    ended: Mutex<Option<Instant>>,
    lines: Mutex<Lines>,
    progress: watch::Sender<Progress>,
    stopped: CancellationToken,
    hold: Mutex<Option<HoldGuard>>,
    budget: Arc<Budget>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Cell {
    /// A cell that waits. `hold` lives until its result.
    pub fn new(
        id: String,
        (context, language): (String, String),
        request: Request,
        kept: bool,
        hold: HoldGuard,
        budget: Arc<Budget>,
    ) -> Arc<Self> {
        budget.live.fetch_add(1, Ordering::Relaxed);
        Arc::new(Self {
            id,
            context,
            language,
            request,
            kept,
            created: SystemTime::now(),
            times: Mutex::default(),
            ended: Mutex::default(),
            lines: Mutex::new(Lines { file: None, begin: 0, cut: false }),
            progress: watch::Sender::new(Progress { state: State::Queued, length: 0, events: 0 }),
            stopped: CancellationToken::new(),
            hold: Mutex::new(Some(hold)),
            budget,
        })
    }

    pub fn progress(&self) -> Progress {
        *self.progress.borrow()
    }

    /// When its run began and ended.
    pub fn times(&self) -> (Option<SystemTime>, Option<SystemTime>) {
        *lock(&self.times)
    }

    /// How long ago it ended.
    pub fn ended_for(&self) -> Option<Duration> {
        lock(&self.ended).map(|at| at.elapsed())
    }

    /// What its lines take, in bytes.
    pub fn size(&self) -> u64 {
        self.progress().length - lock(&self.lines).begin
    }

    /// Nobody wants it any more.
    pub fn stop(&self) {
        self.stopped.cancel();
    }

    pub fn is_stopped(&self) -> bool {
        self.stopped.is_cancelled()
    }

    pub async fn stopped(&self) {
        self.stopped.cancelled().await;
    }

    pub fn begin(&self) {
        lock(&self.times).0 = Some(SystemTime::now());
        self.progress.send_modify(|progress| progress.state = State::Running);
    }

    /// Adds a line of output; one that finds no room is left out, and the client told so once.
    pub fn output(&self, line: String) {
        // Before it is measured: it may grow.
        let line = one_line(line);
        let length = line.len() as u64 + 1;
        let mut lines = lock(&self.lines);
        if lines.cut {
            return;
        }
        let unread = self.progress().length - lines.begin;
        if unread + length > UNREAD_LIMIT || !self.budget.take(length) {
            lines.cut = true;
            drop(lines);
            let limit = UNREAD_LIMIT >> 20;
            self.say(&event::notice(&format!(
                "output is left out from here on: more than {limit} MiB were not read"
            )));
            return;
        }
        self.write(&mut lines, line);
    }

    /// Adds a short line that must not be missing.
    pub fn say(&self, line: &str) {
        let line = one_line(line.to_owned());
        let mut lines = lock(&self.lines);
        // Beyond the limit, if need be: there are few of these.
        self.budget.used.fetch_add(line.len() as u64 + 1, Ordering::Relaxed);
        self.write(&mut lines, line);
    }

    fn write(&self, lines: &mut Lines, mut line: String) {
        // Not twice the room: it may be many megabytes.
        line.reserve_exact(1);
        line.push('\n');
        let at = self.progress().length;
        let written = match &lines.file {
            Some(file) => file.write_all_at(line.as_bytes(), at),
            None => memory_file().and_then(|file| {
                file.write_all_at(line.as_bytes(), at)?;
                lines.file = Some(file);
                Ok(())
            }),
        };
        if let Err(error) = written {
            self.budget.give(line.len() as u64);
            lines.cut = true;
            tracing::error!(cell = self.id, %error, "a line of a cell's output is lost");
            return;
        }
        self.progress.send_modify(|progress| {
            progress.length += line.len() as u64;
            progress.events += 1;
        });
    }

    /// Adds the last line. The sandbox is not used by it any more.
    pub fn finish(&self) {
        if self.progress().state == State::Done {
            return;
        }
        self.say(&event::end());
        lock(&self.times).1 = Some(SystemTime::now());
        *lock(&self.ended) = Some(Instant::now());
        self.progress.send_modify(|progress| progress.state = State::Done);
        self.budget.live.fetch_sub(1, Ordering::Relaxed);
        drop(lock(&self.hold).take());
    }

    /// What there is from `at` on, at most [`CHUNK`].
    fn read(&self, at: u64) -> io::Result<Bytes> {
        let length = usize::try_from(self.progress().length.saturating_sub(at)).unwrap_or(CHUNK).min(CHUNK);
        let lines = lock(&self.lines);
        match &lines.file {
            Some(file) if length > 0 => {
                let mut chunk = vec![0; length];
                file.read_exact_at(&mut chunk, at)?;
                Ok(chunk.into())
            }
            _ => Ok(Bytes::new()),
        }
    }

    /// Its only client has read everything before `at`.
    fn give_back(&self, at: u64) {
        let mut lines = lock(&self.lines);
        let length = at - lines.begin;
        if length < GIVE_BACK {
            return;
        }
        let Some(file) = &lines.file else { return };
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (Ok(from), Ok(count)) = (i64::try_from(lines.begin), i64::try_from(length)) else { return };
        if fallocate(file.as_fd(), flags, from, count).is_ok() {
            lines.begin = at;
            self.budget.give(length);
        }
    }

    /// Where the `count`-th line begins.
    fn offset_of(&self, count: u64) -> io::Result<u64> {
        let progress = self.progress();
        if count > progress.events {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if count == progress.events {
            return Ok(progress.length);
        }
        let (mut at, mut left) = (0, count);
        while left > 0 {
            let chunk = self.read(at)?;
            let mut ends = memchr::memchr_iter(b'\n', &chunk);
            let here = ends.by_ref().take(usize::try_from(left).unwrap_or(usize::MAX)).last();
            match here {
                None if chunk.is_empty() => return Err(io::ErrorKind::UnexpectedEof.into()),
                None => at += chunk.len() as u64,
                Some(last) => {
                    let found = memchr::memchr_iter(b'\n', &chunk[..=last]).count() as u64;
                    left -= found;
                    at += if left == 0 { last as u64 + 1 } else { chunk.len() as u64 };
                }
            }
        }
        Ok(at)
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        if self.progress().state != State::Done {
            self.budget.live.fetch_sub(1, Ordering::Relaxed);
        }
        let begin = lock(&self.lines).begin;
        self.budget.give(self.progress().length - begin);
    }
}

/// Clients in Python end a line at these three, too; in JSON they stand in strings only, where an escape means the same.
fn one_line(mut line: String) -> String {
    for (end, escape) in [("\u{85}", "\\u0085"), ("\u{2028}", "\\u2028"), ("\u{2029}", "\\u2029")] {
        if line.contains(end) {
            line = line.replace(end, escape);
        }
    }
    line
}

fn memory_file() -> io::Result<File> {
    Ok(File::from(memfd_create(c"guestd-cell", MFdFlags::MFD_CLOEXEC)?))
}

/// How a client reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// It is the cell's own: when it goes before the end, the cell is stopped.
    Own,
    /// It comes and goes.
    Visitor { follow: bool },
}

/// Reads a cell's lines, from the `from`-th on.
///
/// # Errors
/// When the cell has not come that far.
pub fn events(
    cell: Arc<Cell>,
    from: u64,
    attachment: Attachment,
) -> io::Result<impl Stream<Item = io::Result<Bytes>>> {
    let at = cell.offset_of(from)?;
    let reader = Reader { heard: cell.progress.subscribe(), cell, at, attachment };
    Ok(futures_util::stream::unfold(reader, |mut reader| async move {
        let chunk = reader.next().await?;
        Some((chunk, reader))
    }))
}

struct Reader {
    cell: Arc<Cell>,
    heard: watch::Receiver<Progress>,
    at: u64,
    attachment: Attachment,
}

impl Reader {
    async fn next(&mut self) -> Option<io::Result<Bytes>> {
        let silent = Instant::now() + SILENCE;
        loop {
            let progress = *self.heard.borrow_and_update();
            match self.cell.read(self.at) {
                Ok(chunk) if chunk.is_empty() => {}
                Ok(chunk) => {
                    self.at += chunk.len() as u64;
                    if self.attachment == Attachment::Own {
                        self.cell.give_back(self.at);
                    }
                    return Some(Ok(chunk));
                }
                Err(error) => return Some(Err(error)),
            }
            if progress.state == State::Done || self.attachment == (Attachment::Visitor { follow: false }) {
                return None;
            }
            match timeout_at(silent, self.heard.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_closed)) => return None,
                Err(_elapsed) => return Some(Ok(Bytes::from_static(event::keepalive().as_bytes()))),
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        if self.attachment == Attachment::Own && self.cell.progress().state != State::Done {
            self.cell.stop();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt as _;
    use guestd_idle::{HoldClass, Policy};

    use super::*;
    use crate::activity::Activity;

    fn cell(kept: bool) -> (Arc<Cell>, Arc<Activity>, Arc<Budget>) {
        let activity = Activity::new(Policy::default());
        let hold = activity.hold(HoldClass::Code, "cell");
        let request = Request { code: String::new(), variables: BTreeMap::new(), timeout: None };
        let budget = Arc::new(Budget::default());
        let named = ("c".to_owned(), "python".to_owned());
        (Cell::new("x".to_owned(), named, request, kept, hold, Arc::clone(&budget)), activity, budget)
    }

    async fn all(cell: &Arc<Cell>, from: u64, attachment: Attachment) -> String {
        let mut stream = std::pin::pin!(events(Arc::clone(cell), from, attachment).unwrap());
        let mut text = String::new();
        while let Some(chunk) = stream.next().await {
            text.push_str(std::str::from_utf8(&chunk.unwrap()).unwrap());
        }
        text
    }

    #[tokio::test]
    async fn the_result_ends_the_hold_and_the_lines_stay() {
        let (cell, activity, _) = cell(true);
        cell.output("{\"a\":1}".to_owned());
        assert_eq!(activity.report().counting, 1);
        cell.finish();
        cell.finish();
        assert_eq!(activity.report().counting, 0);
        let end = "{\"type\":\"end_of_execution\"}\n";
        let visitor = Attachment::Visitor { follow: true };
        assert_eq!(all(&cell, 0, visitor).await, format!("{{\"a\":1}}\n{end}"));
        assert_eq!(all(&cell, 1, visitor).await, end);
        assert_eq!(all(&cell, 2, visitor).await, "");
        assert!(events(Arc::clone(&cell), 3, visitor).is_err());
        assert_eq!(cell.progress().events, 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_cell_says_every_five_seconds_that_it_lives() {
        let (cell, ..) = cell(false);
        let mut stream = std::pin::pin!(events(Arc::clone(&cell), 0, Attachment::Own).unwrap());
        let begun = Instant::now();
        for round in 1..=2 {
            assert_eq!(stream.next().await.unwrap().unwrap(), event::keepalive());
            assert_eq!(begun.elapsed(), SILENCE * round);
        }
    }

    #[tokio::test]
    async fn a_client_that_goes_stops_its_cell_and_a_visitor_does_not() {
        let (cell, ..) = cell(true);
        drop(events(Arc::clone(&cell), 0, Attachment::Visitor { follow: true }).unwrap());
        assert!(!cell.is_stopped());
        drop(events(Arc::clone(&cell), 0, Attachment::Own).unwrap());
        assert!(cell.is_stopped());
    }

    #[tokio::test]
    async fn a_line_is_found_again_wherever_it_begins() {
        let (cell, ..) = cell(true);
        let lines: Vec<_> =
            (0..200).map(|number| format!("\"{number}{}\"", "x".repeat(number * 13))).collect();
        for line in &lines {
            cell.output(line.clone());
        }
        cell.finish();
        for from in [0, 1, 2, 57, 99, 100, 101, 150, 199, 200] {
            let text = all(&cell, from as u64, Attachment::Visitor { follow: false }).await;
            let first = text.lines().next().unwrap();
            assert_eq!(first, lines.get(from).map_or("{\"type\":\"end_of_execution\"}", String::as_str));
        }
    }

    #[tokio::test]
    async fn no_character_ends_a_line_but_the_lines_own_end() {
        let (cell, _, budget) = cell(true);
        cell.output("\"a\u{85}b\u{2028}c\u{2029}d\"".to_owned());
        let text = all(&cell, 0, Attachment::Visitor { follow: false }).await;
        assert_eq!(text, "\"a\\u0085b\\u2028c\\u2029d\"\n");
        assert_eq!(serde_json::from_str::<String>(text.trim_end()).unwrap(), "a\u{85}b\u{2028}c\u{2029}d");
        drop(cell);
        assert_eq!(budget.used.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn what_nobody_reads_is_bounded_and_its_end_is_still_told() {
        let (cell, _, budget) = cell(false);
        let line = "x".repeat(1 << 20);
        for _ in 0..80 {
            cell.output(line.clone());
        }
        cell.finish();
        assert!(cell.size() <= UNREAD_LIMIT + 1024, "{}", cell.size());
        let text = all(&cell, 0, Attachment::Own).await;
        assert!(text.contains("output is left out") && text.ends_with("{\"type\":\"end_of_execution\"}\n"));
        assert!(cell.size() < 2 * GIVE_BACK, "what was read is given back");
        drop(cell);
        assert_eq!(budget.used.load(Ordering::Relaxed), 0);
    }
}
