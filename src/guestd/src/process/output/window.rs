//! Who is how far in the log, what of it may be forgotten, and whether the writer may go on: the rules that [`super`] tells.

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::budget::Budget;
use super::log::Log;
use super::{Channel, End};
use crate::process::{Attachment, exit};

/// What the log of one process may take, in bytes; also the window of each of its clients.
pub(super) const LOG_LIMIT: usize = 1024 * 1024;

/// What the log of one process may take, in bytes, while some of its clients are behind and others are not; so much at once ...
pub(super) const FREE_LIMIT: usize = 2 * LOG_LIMIT;

/// ... and so much in all, as long as all logs together leave [`SPARE`] of their limit.
pub(super) const STRETCHED_LIMIT: usize = 6 * LOG_LIMIT;

/// The share of the common limit that no log is stretched into: a quarter.
pub(super) const SPARE: usize = 4;

/// Who takes nothing for so long stands still. A log takes 600 ms from [`FREE_LIMIT`] to [`STRETCHED_LIMIT`].
pub(super) const GRACE: Duration = Duration::from_millis(500);

/// Where a client is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// The offset of the next byte.
    pub(super) at: u64,
    /// It asked for offsets and gets a gap instead of being cut off.
    pub(super) takes_gaps: bool,
    /// Its place is kept: the writer waits before it forgets what is there.
    pub(super) kept: bool,
    /// The client is not there, and may come back: its place is kept, and nobody is attached.
    pub(super) stand_in: bool,
    /// When it last took something, or began to have something to take.
    pub(super) since: Instant,
}

impl Place {
    pub(super) fn new(at: u64) -> Self {
        Self { at, takes_gaps: false, kept: true, stand_in: false, since: Instant::now() }
    }

    pub(super) fn with_gaps(at: u64) -> Self {
        Self { takes_gaps: true, ..Self::new(at) }
    }
}

/// Whether the writer may go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    Free,
    /// Every client is a whole window behind.
    AllBehind,
    /// Some are; there is room for pieces.
    Stretched,
    /// Some are, and there is room for nothing until they read on, or this time comes.
    Full(Instant),
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) log: Log,
    /// Read of the process already and not in the log yet, because there is no room: at most one chunk of each channel.
    pub(super) waiting: Vec<(Channel, Bytes)>,
    /// How much the process wrote, the waiting included.
    pub(super) moved: exit::Bytes,
    pub(super) end: Option<End>,
    pub(super) places: HashMap<u64, Place>,
    pub(super) next_client: u64,
    pub(super) attachment: Attachment,
}

impl State {
    /// How many clients are attached.
    pub(super) fn clients(&self) -> usize {
        self.places.values().filter(|place| !place.stand_in).count()
    }

    /// The offset from which on the log may not be forgotten.
    pub(super) fn needed(&self) -> u64 {
        self.places.values().filter(|place| place.kept).map(|place| place.at).min().unwrap_or(u64::MAX)
    }

    /// Forgets the oldest output until `enough` says so; false when a client needs it.
    pub(super) fn forget_until(&mut self, enough: impl Fn(&Log) -> bool) -> bool {
        let needed = self.needed();
        while !enough(&self.log) {
            match self.log.front_end() {
                Some(end) if end <= needed => self.log.drop_front(),
                Some(_) => return false,
                None => return true,
            }
        }
        true
    }

    /// The offset from which on a client is less than a whole window behind.
    pub(super) fn window(&self) -> u64 {
        self.log.front_end().unwrap_or_default().max(self.log.recent())
    }

    /// When the slowest will have taken nothing for too long, unless they read on.
    pub(super) fn deadline(&self) -> Instant {
        let end = self.log.front_end().unwrap_or_default();
        let slowest = self.places.values().filter(|place| place.kept && place.at < end);
        slowest.map(|place| place.since).min().unwrap_or_else(Instant::now) + GRACE
    }

    /// Cuts off, or leaves to their gaps, those that stand still while others wait; true when there are any.
    pub(super) fn leave_behind(&mut self) -> bool {
        let end = self.log.front_end().unwrap_or_default();
        if !self.places.values().any(|place| place.kept && place.at >= end) {
            return false;
        }
        let stalled = |place: &Place| place.kept && place.at < end && place.since.elapsed() >= GRACE;
        if !self.places.values().any(stalled) {
            return false;
        }
        self.places.retain(|_, place| {
            let stalled = stalled(place);
            place.kept &= !stalled;
            !stalled || place.takes_gaps
        });
        let clients = self.clients();
        self.attachment.clients(clients);
        self.keep_the_only();
        true
    }

    pub(super) fn append(&mut self, channel: Channel, bytes: Bytes) {
        let now = Instant::now();
        let end = self.log.end();
        // Who has read everything did not stand still until now.
        self.places.values_mut().filter(|place| place.at == end).for_each(|place| place.since = now);
        self.log.append(channel, bytes);
    }

    /// A client that is alone now is not left behind by anybody.
    pub(super) fn keep_the_only(&mut self) {
        if self.places.len() == 1 {
            self.places.values_mut().for_each(|place| place.kept = true);
        }
    }

    /// Sees to room for `cost` bytes.
    pub(super) fn room(&mut self, cost: usize, budget: &Budget, used_by_others: usize) -> Room {
        let fits = |log: &Log, own: usize, all: usize| {
            log.held() + cost <= own && used_by_others + log.held() + cost <= all
        };
        if self.forget_until(|log| fits(log, LOG_LIMIT, budget.limit())) {
            return Room::Free;
        }
        let window = self.window();
        if self.places.values().all(|place| !place.kept || place.at < window) {
            return Room::AllBehind;
        }
        let shared = budget.limit() - budget.limit() / SPARE;
        if fits(&self.log, FREE_LIMIT, shared) {
            Room::Free
        } else if fits(&self.log, STRETCHED_LIMIT, shared) {
            Room::Stretched
        } else {
            Room::Full(self.deadline())
        }
    }
}
