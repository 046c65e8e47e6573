//! The output of one process, between the task that reads its pipes and the clients that are attached.
//!
//! Chunks wait in one bounded queue; each client has a place in it. What all clients have seen is dropped, what nobody is attached for
//! is dropped at once (a client that attaches later sees new output only: contract, envd.md section 2.8). When the queue is full the
//! process waits for the slowest client, as it would for the reader of a pipe. One client that stalls may not hold up others for long:
//! after [`STALL_LIMIT`] it is cut off and told so.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;

use super::Attachment;

/// What may wait for the slowest client, in bytes. Small: 1,000 processes share the agent's memory promise.
const QUEUE_LIMIT: usize = 128 * 1024;

/// How long a client may hold up the process while others are waiting for its output.
const STALL_LIMIT: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    Stdout,
    Stderr,
}

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// The exit code, or the signal's number.
    pub status: Status,
    /// It was killed because its time (`Connect-Timeout-Ms`) was over.
    pub timed_out: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Exited(i32),
    Signalled { signal: i32, core_dumped: bool },
}

/// What a client sees, in order.
#[derive(Clone, Debug)]
pub enum Event {
    Data(Channel, Bytes),
    End(End),
    /// The client read too slowly while others waited.
    CutOff,
}

#[derive(Debug)]
struct State {
    chunks: VecDeque<(Channel, Bytes)>,
    /// The number of the first chunk in the queue.
    first: u64,
    queued: usize,
    end: Option<End>,
    /// The next chunk of each client.
    places: HashMap<u64, u64>,
    cut_off: Vec<u64>,
    next_client: u64,
    attachment: Attachment,
}

impl State {
    /// Drops what all clients have seen.
    fn trim(&mut self) {
        let slowest = self.places.values().copied().min();
        let end = self.first + self.chunks.len() as u64;
        for _ in self.first..slowest.unwrap_or(end) {
            let Some((_, bytes)) = self.chunks.pop_front() else { break };
            self.queued -= bytes.len();
            self.first += 1;
        }
    }

    /// Cuts off the clients that are furthest behind.
    fn cut_off_slowest(&mut self) {
        let Some(slowest) = self.places.values().copied().min() else { return };
        let behind: Vec<u64> =
            self.places.iter().filter(|(_, place)| **place == slowest).map(|(client, _)| *client).collect();
        for client in behind {
            self.places.remove(&client);
            self.cut_off.push(client);
        }
        self.trim();
    }
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// There is something new to read.
    readable: Notify,
    /// There may be room again.
    writable: Notify,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
pub(super) struct Output {
    shared: Arc<Shared>,
}

impl Output {
    pub(super) fn new(attachment: Attachment) -> Self {
        let state = State {
            chunks: VecDeque::new(),
            first: 0,
            queued: 0,
            end: None,
            places: HashMap::new(),
            cut_off: Vec::new(),
            next_client: 0,
            attachment,
        };
        Self {
            shared: Arc::new(Shared {
                state: Mutex::new(state),
                readable: Notify::new(),
                writable: Notify::new(),
            }),
        }
    }

    pub(super) fn attach(&self) -> Reader {
        let mut state = self.shared.lock();
        let client = state.next_client;
        state.next_client += 1;
        let place = state.first + state.chunks.len() as u64;
        state.places.insert(client, place);
        let count = state.places.len();
        state.attachment.clients(count);
        drop(state);
        // A writer that waits for a lone slow client has to learn that it holds up another now.
        self.shared.writable.notify_waiters();
        Reader { shared: Arc::clone(&self.shared), client, done: false }
    }

    /// Hands a chunk to the clients; waits while the slowest has too much before it.
    pub(super) async fn write(&self, channel: Channel, bytes: Bytes) {
        self.shared.lock().attachment.progress(bytes.len());
        loop {
            let room = self.shared.writable.notified();
            let rivals = {
                let mut state = self.shared.lock();
                if state.places.is_empty() {
                    return;
                }
                if state.queued == 0 || state.queued + bytes.len() <= QUEUE_LIMIT {
                    state.queued += bytes.len();
                    state.chunks.push_back((channel, bytes));
                    drop(state);
                    self.shared.readable.notify_waiters();
                    return;
                }
                state.places.len() > 1
            };
            if !rivals {
                room.await;
            } else if tokio::time::timeout(STALL_LIMIT, room).await.is_err() {
                self.shared.lock().cut_off_slowest();
                self.shared.readable.notify_waiters();
            }
        }
    }

    /// Nothing comes after this.
    pub(super) fn finish(&self, end: End) {
        let mut state = self.shared.lock();
        state.end = Some(end);
        let clients = state.places.len();
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
            let news = self.shared.readable.notified();
            tokio::pin!(news);
            // Registered before the look: what is written in between wakes it.
            news.as_mut().enable();
            if let Some(event) = self.poll() {
                self.done = matches!(event, Event::End(_) | Event::CutOff);
                return Some(event);
            }
            news.await;
        }
    }

    fn poll(&self) -> Option<Event> {
        let mut state = self.shared.lock();
        let Some(place) = state.places.get(&self.client).copied() else { return Some(Event::CutOff) };
        let index = usize::try_from(place - state.first).unwrap_or(usize::MAX);
        if let Some((channel, bytes)) = state.chunks.get(index).cloned() {
            state.places.insert(self.client, place + 1);
            if index == 0 {
                state.trim();
                drop(state);
                self.shared.writable.notify_waiters();
            }
            return Some(Event::Data(channel, bytes));
        }
        state.end.clone().map(Event::End)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.cut_off.retain(|client| *client != self.client);
        if state.places.remove(&self.client).is_some() {
            state.trim();
        }
        let count = state.places.len();
        state.attachment.clients(count);
        drop(state);
        self.shared.writable.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::activity::Activity;

    fn output() -> Arc<Output> {
        let activity = Activity::new(guestd_idle::Policy::default());
        Arc::new(Output::new(Attachment::of(activity.hold(guestd_idle::HoldClass::Command, "test"))))
    }

    fn chunk(size: usize) -> Bytes {
        Bytes::from(vec![b'x'; size])
    }

    async fn drain(mut reader: Reader) -> (usize, bool) {
        let mut total = 0;
        while let Some(event) = reader.next().await {
            match event {
                Event::Data(_, bytes) => total += bytes.len(),
                Event::End(_) => return (total, true),
                Event::CutOff => return (total, false),
            }
        }
        (total, false)
    }

    fn end() -> End {
        End { status: Status::Exited(0), timed_out: false }
    }

    #[tokio::test]
    async fn output_without_a_client_is_dropped_and_never_blocks() {
        let output = output();
        for _ in 0..100 {
            output.write(Channel::Stdout, chunk(32 * 1024)).await;
        }
        let late = output.attach();
        output.finish(end());
        assert_eq!(drain(late).await, (0, true));
    }

    #[tokio::test]
    async fn a_slow_client_alone_loses_nothing() {
        let output = output();
        let reader = output.attach();
        let writer = tokio::spawn({
            let output = Arc::clone(&output);
            async move {
                for _ in 0..64 {
                    output.write(Channel::Stdout, chunk(32 * 1024)).await;
                }
                output.finish(end());
            }
        });
        tokio::task::yield_now().await;
        assert!(!writer.is_finished(), "the queue is bounded");
        assert_eq!(drain(reader).await, (64 * 32 * 1024, true));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stalled_client_is_cut_off_and_the_live_one_loses_nothing() {
        let output = output();
        let stalled = output.attach();
        let live = tokio::spawn(drain(output.attach()));
        for _ in 0..64 {
            output.write(Channel::Stdout, chunk(32 * 1024)).await;
        }
        output.finish(end());
        assert_eq!(live.await.unwrap(), (64 * 32 * 1024, true));
        let (_, whole) = drain(stalled).await;
        assert!(!whole, "the stalled client is told that it lost output");
    }

    #[tokio::test]
    async fn a_client_that_goes_frees_the_process() {
        let output = output();
        let reader = output.attach();
        let writer = tokio::spawn({
            let output = Arc::clone(&output);
            async move {
                for _ in 0..64 {
                    output.write(Channel::Stdout, chunk(32 * 1024)).await;
                }
            }
        });
        tokio::task::yield_now().await;
        drop(reader);
        writer.await.unwrap();
    }

    #[tokio::test]
    async fn a_command_counts_while_a_client_is_attached_and_until_its_end_was_read() {
        let activity = Activity::new(guestd_idle::Policy::default());
        let hold = activity.hold(guestd_idle::HoldClass::Command, "test");
        let output = Output::new(Attachment::of(hold));
        let first = output.attach();
        assert_eq!(activity.report().counting, 1);
        drop(first);
        assert_eq!(activity.report().counting, 0, "detached");
        let second = output.attach();
        assert_eq!(activity.report().counting, 1);
        output.finish(end());
        assert_eq!(activity.report().counting, 1, "the end is not read yet");
        drop(second);
        assert_eq!((activity.report().counting, activity.report().holds.len()), (0, 0));
    }
}
