//! What a watcher has to tell and its client has not heard yet: a bounded queue.
//!
//! When it is full, or when the kernel's own queue was, the events give way to one notice that some were lost. Nothing is queued
//! until the client has had the notice: it then lists the directory, which shows all of that anyway.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use guestd_protocol::wire::filesystem as wire;
use tokio::sync::Notify;

/// The most events that wait for one client.
pub(super) const EVENT_LIMIT: usize = 16_384;

/// The most memory that the events of one client take, and those of all clients together, in bytes.
const BYTE_LIMIT: usize = 4 * 1024 * 1024;
const TOTAL_BYTE_LIMIT: usize = 32 * 1024 * 1024;

#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Event {
    /// Relative to the root, `.` for the root itself.
    pub name: String,
    pub kind: wire::EventType,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entry: Option<Box<wire::EntryInfo>>,
}

impl Event {
    /// About what it takes in memory.
    fn size(&self) -> usize {
        let entry = self.entry.as_ref().map_or(0, |entry| {
            let metadata: usize =
                entry.metadata.iter().map(|(key, value)| key.len() + value.len() + 64).sum();
            size_of_val::<wire::EntryInfo>(entry) + entry.path.len() + entry.name.len() + metadata
        });
        size_of::<Self>() + self.name.len() + entry
    }
}

impl From<Event> for wire::FilesystemEvent {
    fn from(event: Event) -> Self {
        let entry = event.entry.map(|entry| *entry).into();
        Self { name: event.name, r#type: event.kind.into(), entry, ..Default::default() }
    }
}

/// What comes next for a client that follows.
#[derive(Debug, PartialEq)]
pub(super) enum Item {
    Event(Event),
    /// Why events were lost.
    Lost(String),
}

#[derive(Debug, Default)]
struct Queue {
    events: VecDeque<Event>,
    bytes: usize,
    lost: Option<String>,
}

#[derive(Debug)]
pub(super) struct Outbox {
    queue: Mutex<Queue>,
    ready: Notify,
    /// Bytes in all outboxes.
    total: Arc<AtomicUsize>,
}

impl Outbox {
    pub(super) fn new(total: Arc<AtomicUsize>) -> Self {
        Self { queue: Mutex::default(), ready: Notify::new(), total }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, event: Event) {
        let size = event.size();
        let mut queue = self.lock();
        if queue.lost.is_some() {
            return;
        }
        let full = queue.events.len() >= EVENT_LIMIT || queue.bytes + size > BYTE_LIMIT;
        if full {
            self.give_up(&mut queue, "the client did not take them in time");
        } else if self.total.load(Ordering::Relaxed) + size > TOTAL_BYTE_LIMIT {
            self.give_up(&mut queue, "too many events wait for all watchers together");
        } else {
            queue.bytes += size;
            self.total.fetch_add(size, Ordering::Relaxed);
            queue.events.push_back(event);
        }
        drop(queue);
        self.ready.notify_one();
    }

    /// Says that events are missing. The first reason stays until it was heard.
    pub(super) fn lose(&self, reason: &str) {
        self.give_up(&mut self.lock(), reason);
        self.ready.notify_one();
    }

    /// Whether nothing is queued until the client has had its notice.
    pub(super) fn has_lost(&self) -> bool {
        self.lock().lost.is_some()
    }

    fn give_up(&self, queue: &mut Queue, reason: &str) {
        queue.events = VecDeque::new();
        self.total.fetch_sub(std::mem::take(&mut queue.bytes), Ordering::Relaxed);
        queue.lost.get_or_insert_with(|| reason.to_owned());
    }

    /// Everything, which is then heard.
    ///
    /// # Errors
    /// Why events were lost, once.
    pub(super) fn take(&self) -> Result<Vec<Event>, String> {
        let mut queue = self.lock();
        if let Some(reason) = queue.lost.take() {
            return Err(reason);
        }
        self.total.fetch_sub(std::mem::take(&mut queue.bytes), Ordering::Relaxed);
        Ok(std::mem::take(&mut queue.events).into())
    }

    /// A copy of what waits, for another agent to go on with.
    pub(super) fn copy(&self) -> (Vec<Event>, Option<String>) {
        let queue = self.lock();
        (queue.events.iter().cloned().collect(), queue.lost.clone())
    }

    /// What another agent had not delivered comes before what was heard here.
    pub(super) fn put_back(&self, events: Vec<Event>, lost: Option<String>) {
        let newer = self.take();
        for event in events {
            self.push(event);
        }
        for reason in lost.into_iter().chain(newer.as_ref().err().cloned()) {
            self.lose(&reason);
        }
        for event in newer.unwrap_or_default() {
            self.push(event);
        }
    }

    pub(super) fn try_next(&self) -> Option<Item> {
        let mut queue = self.lock();
        if let Some(reason) = queue.lost.take() {
            return Some(Item::Lost(reason));
        }
        let event = queue.events.pop_front()?;
        let size = event.size().min(queue.bytes);
        queue.bytes -= size;
        self.total.fetch_sub(size, Ordering::Relaxed);
        Some(Item::Event(event))
    }

    /// Waits for the next one. For one waiter at a time; nothing is lost when the wait is given up.
    pub(super) async fn next(&self) -> Item {
        loop {
            if let Some(item) = self.try_next() {
                return item;
            }
            self.ready.notified().await;
        }
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        let bytes = self.lock().bytes;
        self.total.fetch_sub(bytes, Ordering::Relaxed);
    }
}
