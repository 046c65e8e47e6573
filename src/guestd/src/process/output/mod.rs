//! The output of one process, between the task that reads its pipes and the clients that are attached.
//!
//! What the process writes goes to the end of a log of recent output ([`log`]) under one running byte offset for all its channels. The
//! log is bounded by [`LOG_LIMIT`] and, together with those of all other processes, by [`TOTAL_LIMIT`] ([`budget`]). It stays after the
//! last client went and, after the process's end, for as long as the process is remembered.
//!
//! Each client has a place of its own in the log, and its window is the log:
//!
//! - Without a client, output is logged and the oldest of it forgotten. The process never waits.
//! - Clients that are all a whole window behind hold the process back, as the reader of a pipe would, one alone included: they lose
//!   nothing, and there is no limit to the wait.
//! - While some are and others are not, the log grows up to [`window::FREE_LIMIT`] and nobody waits: a burst that the socket of a new client
//!   swallows does no harm to an old one.
//! - Then it grows slowly, up to [`window::STRETCHED_LIMIT`]: the others wait [`STEP`] for each piece, so that none of them waits for long and
//!   there is time to see who reads on. Whoever took nothing for [`window::GRACE`] stands still: it is cut off and told so, or, when it asked for
//!   offsets, goes on behind a gap. Sockets take what a slow client reads in bursts, so less time would not tell.
//! - When that is full, the slowest sets the pace, as long as it reads on.
//!
//! A client that asks for an offset gets what is kept from there on, each piece with its offset, and a gap for what is not kept. Who does
//! not ask sees new output only (contract: envd.md section 2.8).

pub(super) mod budget;
mod handover;
mod log;
pub(super) mod pipe;
mod window;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;
use tokio::task::yield_now;
use tokio::time::{Instant, timeout_at};

use super::Attachment;
use super::exit;
use budget::Budget;
use window::{LOG_LIMIT, Place, Room, State};

pub(super) use handover::OutputState;

/// What the logs of all processes may take together, in bytes. A log that is empty takes one small chunk all the same, so that a process
/// goes on when others hold everything.
pub const TOTAL_LIMIT: usize = 8 * 1024 * 1024;

/// How long others wait for each piece by which a log is stretched.
const STEP: Duration = Duration::from_millis(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Channel {
    Stdout,
    Stderr,
    Pty,
}

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct End {
    /// The exit code, or the signal's number.
    pub status: Status,
    /// It was killed because its time (`Connect-Timeout-Ms`) was over.
    pub timed_out: bool,
    pub record: super::Record,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Status {
    Exited(i32),
    Signalled { signal: i32, core_dumped: bool },
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exit status {code}"),
            Self::Signalled { signal, .. } => write!(f, "signal {signal}"),
        }
    }
}

/// What a client sees, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Bytes of one channel; the first of them is at `offset`.
    Data {
        channel: Channel,
        offset: u64,
        bytes: Bytes,
    },
    /// The bytes from `from` up to `to` are not kept any more. Only for who asked for offsets.
    Gap {
        from: u64,
        to: u64,
    },
    End(End),
    /// The client read too slowly while others waited.
    CutOff,
}

/// The offset that a client asks for is not reached yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{asked} is beyond the end of the output, which is at {end}")]
pub struct BeyondEnd {
    pub asked: u64,
    pub end: u64,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// There is something new to read.
    readable: Notify,
    /// There may be room again.
    writable: Notify,
    budget: Arc<Budget>,
    /// The log's number in the budget.
    number: u64,
    me: Weak<Shared>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `change` and tells the budget what it did to the log.
    fn change<T>(&self, change: impl FnOnce(&mut State, usize) -> T) -> T {
        let mut state = self.lock();
        let before = state.log.held();
        let result = change(&mut state, self.budget.used().saturating_sub(before));
        self.account(before, state.log.held());
        result
    }

    fn account(&self, before: usize, after: usize) {
        self.budget.account(before, after);
        match (before, after) {
            (0, 1..) => self.budget.enter(self.number, Weak::clone(&self.me)),
            (1.., 0) => self.budget.leave(self.number),
            _ => {}
        }
    }

    /// Forgets what nobody needs down to `share` bytes.
    fn shrink(&self, share: usize) {
        self.change(|state, _| state.forget_until(|log| log.held() <= share));
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let held = self.lock().log.held();
        self.account(held, 0);
    }
}

#[derive(Debug)]
pub(super) struct Output {
    shared: Arc<Shared>,
}

impl Output {
    pub(super) fn new(attachment: Attachment, budget: Arc<Budget>) -> Self {
        let state = State {
            log: log::Log::default(),
            waiting: Vec::new(),
            moved: exit::Bytes::default(),
            end: None,
            places: HashMap::new(),
            next_client: 0,
            attachment,
        };
        let shared = Arc::new_cyclic(|me| Shared {
            state: Mutex::new(state),
            readable: Notify::new(),
            writable: Notify::new(),
            number: budget.number(),
            budget,
            me: Weak::clone(me),
        });
        Self { shared }
    }

    /// How much the process wrote so far.
    pub(super) fn moved(&self) -> exit::Bytes {
        self.shared.lock().moved
    }

    /// A client that sees what comes from now on, and the end.
    pub(super) fn attach(&self) -> Reader {
        self.enter(Place::new)
    }

    /// A client that sees everything from `offset` on, as far as it is kept.
    ///
    /// # Errors
    /// When the output has not come that far.
    pub(super) fn attach_at(&self, offset: u64) -> Result<Reader, BeyondEnd> {
        let end = self.shared.lock().log.end();
        if offset > end {
            return Err(BeyondEnd { asked: offset, end });
        }
        Ok(self.enter(|_| Place::with_gaps(offset)))
    }

    fn enter(&self, place: impl FnOnce(u64) -> Place) -> Reader {
        let mut state = self.shared.lock();
        let client = state.next_client;
        state.next_client += 1;
        let place = place(state.log.end());
        state.places.insert(client, place);
        let count = state.clients();
        state.attachment.clients(count);
        drop(state);
        // A writer that waits for a lone slow client has to learn that it holds up another now.
        self.shared.writable.notify_waiters();
        Reader { shared: Arc::clone(&self.shared), client, done: false }
    }

    /// Bytes went the other way, to the process.
    pub(super) fn progress(&self, bytes: usize) {
        self.shared.lock().attachment.progress(bytes);
    }

    /// How much to read at once, in bytes: a log that is empty takes what was read, whatever others hold.
    pub(super) fn appetite(&self) -> usize {
        if self.shared.budget.is_over(pipe::LARGE) { pipe::SMALL } else { pipe::LARGE }
    }

    /// Puts a chunk at the end of the log; waits while that would take from a client what it has yet to read.
    pub(super) async fn write(&self, channel: Channel, bytes: Bytes) {
        let shared = &self.shared;
        {
            let mut state = shared.lock();
            state.attachment.progress(bytes.len());
            state.moved.add(channel, bytes.len());
            // In sight from here on, so that nothing is lost should the agent be replaced while this waits.
            state.waiting.push((channel, bytes.clone()));
        }
        let mut rest = bytes;
        let mut stretched = Instant::now();
        while !rest.is_empty() {
            let news = shared.writable.notified();
            let cost = log::cost(rest.len());
            shared.budget.make_room(cost);
            let may_stretch = stretched.elapsed() >= STEP;
            let room = shared.change(|state, used_by_others| {
                let mut room = state.room(cost, &shared.budget, used_by_others);
                if matches!(room, Room::Stretched | Room::Full(_)) && state.leave_behind() {
                    shared.readable.notify_waiters();
                    room = state.room(cost, &shared.budget, used_by_others);
                }
                let piece = match room {
                    Room::Free => std::mem::take(&mut rest),
                    Room::Stretched if may_stretch => rest.split_to(rest.len().min(log::EVENT)),
                    Room::Stretched | Room::Full(_) | Room::AllBehind => Bytes::new(),
                };
                if !piece.is_empty() {
                    state.waiting.retain(|(waiting, _)| *waiting != channel);
                    if !rest.is_empty() {
                        state.waiting.push((channel, rest.clone()));
                    }
                    state.append(channel, piece);
                }
                room
            });
            match room {
                Room::AllBehind => news.await,
                Room::Free => shared.readable.notify_waiters(),
                Room::Stretched if may_stretch => {
                    stretched = Instant::now();
                    shared.readable.notify_waiters();
                }
                Room::Stretched => {
                    let _no_news = timeout_at(stretched + STEP, news).await;
                }
                Room::Full(deadline) => {
                    if timeout_at(deadline, news).await.is_err() {
                        // The agent itself may have had no processor: what sockets take by now is read first.
                        yield_now().await;
                    }
                }
            }
        }
    }

    /// Shows attached clients a line that is not the process's. It is no progress, and a client that is behind is not waited for: then
    /// there is no line.
    pub(super) fn announce(&self, channel: Channel, bytes: Bytes) {
        let shared = &self.shared;
        let cost = log::cost(bytes.len());
        shared.budget.make_room(cost);
        shared.change(|state, used_by_others| {
            let clients = state.end.is_none() && !state.places.is_empty();
            if clients && state.room(cost, &shared.budget, used_by_others) == Room::Free {
                state.append(channel, bytes);
            }
        });
        shared.readable.notify_waiters();
    }

    /// Nothing comes after this.
    pub(super) fn finish(&self, end: End) {
        let mut state = self.shared.lock();
        state.end = Some(end);
        let clients = state.clients();
        state.attachment.ended(clients);
        drop(state);
        self.shared.readable.notify_waiters();
    }
}

/// One attached client. Dropping it detaches it.
#[derive(Debug)]
pub struct Reader {
    shared: Arc<Shared>,
    client: u64,
    done: bool,
}

impl Reader {
    /// The next event; None after [`Event::End`] or [`Event::CutOff`].
    pub async fn next(&mut self) -> Option<Event> {
        if self.done {
            return None;
        }
        loop {
            // Created before the look: what is written in between wakes it.
            let news = self.shared.readable.notified();
            if let Some(event) = self.poll() {
                self.done = matches!(event, Event::End(_) | Event::CutOff);
                return Some(event);
            }
            news.await;
        }
    }

    fn poll(&self) -> Option<Event> {
        let mut guard = self.shared.lock();
        let state = &mut *guard;
        let Some(place) = state.places.get_mut(&self.client) else { return Some(Event::CutOff) };
        let first = state.log.first();
        if place.at < first {
            let from = std::mem::replace(&mut place.at, first);
            return Some(Event::Gap { from, to: first });
        }
        let Some((channel, bytes)) = state.log.read(place.at) else {
            return state.end.clone().map(Event::End);
        };
        let offset = place.at;
        place.at += bytes.len() as u64;
        place.since = Instant::now();
        let at = place.at;
        // One that has caught up is waited for again.
        place.kept |= at == state.log.end();
        let passed = |mark| offset < mark && mark <= at;
        if passed(state.log.front_end().unwrap_or_default()) || passed(state.window()) {
            let before = state.log.held();
            // What was kept for this client alone.
            state.forget_until(|log| log.held() <= LOG_LIMIT);
            let after = state.log.held();
            self.shared.account(before, after);
            drop(guard);
            self.shared.writable.notify_waiters();
        }
        Some(Event::Data { channel, offset, bytes })
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.places.remove(&self.client);
        state.keep_the_only();
        let count = state.clients();
        state.attachment.clients(count);
        drop(state);
        self.shared.writable.notify_waiters();
    }
}

#[cfg(test)]
mod tests;
