//! An output as data, for the program that takes this process's place.

use bytes::Bytes;

use super::budget::Budget;
use super::log::Log;
use super::{Channel, End, Output, Place, Reader};
use crate::process::{Attachment, exit};
use crate::upgrade::Store;

/// What another agent needs to go on with an output.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub(in crate::process) struct OutputState {
    /// The offset of the first byte that is kept.
    first: u64,
    /// What is kept, in order; the bytes themselves are in the store.
    chunks: Vec<(Channel, u64)>,
    /// Where they begin in the store.
    stored_at: u64,
    moved: exit::Bytes,
    pub(in crate::process) end: Option<End>,
    /// Where each client is that is waited for.
    places: Vec<u64>,
    /// The hold of the process, as the ledger numbers it.
    pub(in crate::process) hold: Option<guestd_idle::HoldId>,
}

impl Output {
    /// Everything as data; the kept bytes go into `store`.
    pub(in crate::process) fn export(&self, store: &mut Store) -> OutputState {
        let state = self.shared.lock();
        let stored_at = store.len();
        let waiting = state.waiting.iter().map(|(channel, bytes)| (*channel, bytes));
        let chunks = state.log.chunks().chain(waiting).map(|(channel, bytes)| {
            store.put(bytes);
            (channel, bytes.len() as u64)
        });
        OutputState {
            chunks: chunks.collect(),
            first: state.log.first(),
            stored_at,
            moved: state.moved,
            end: state.end.clone(),
            places: state.places.values().filter(|place| place.kept).map(|place| place.at).collect(),
            hold: state.attachment.hold.as_ref().map(crate::activity::HoldGuard::id),
        }
    }

    /// Goes on with an exported output. The second value stands for its clients, until they come back: what they have yet to read is
    /// kept for as long as it lives. None when the store has not what the state says.
    pub(in crate::process) fn restore(
        state: &OutputState,
        store: &Store,
        attachment: Attachment,
        budget: std::sync::Arc<Budget>,
    ) -> Option<(Self, Vec<Reader>)> {
        let mut log = Log::at(state.first);
        let mut at = state.stored_at;
        for (channel, length) in &state.chunks {
            log.append(*channel, Bytes::copy_from_slice(store.get(at, *length)?));
            at = at.checked_add(*length)?;
        }
        let output = Self::new(attachment, budget);
        output.shared.change(|inner, _| {
            inner.log = log;
            inner.moved = state.moved;
            inner.end.clone_from(&state.end);
        });
        let end = output.shared.lock().log.end();
        let places = state.places.iter().filter(|at| **at <= end);
        let readers = places.map(|at| output.stand_in(*at)).collect();
        Some((output, readers))
    }

    /// Somebody in the place of each client, where it is now.
    pub(in crate::process) fn stand_ins(&self) -> Vec<Reader> {
        let places: Vec<u64> = {
            let state = self.shared.lock();
            state.places.values().filter(|place| place.kept).map(|place| place.at).collect()
        };
        places.into_iter().map(|at| self.stand_in(at)).collect()
    }

    fn stand_in(&self, at: u64) -> Reader {
        self.enter(|_| Place { stand_in: true, ..Place::with_gaps(at) })
    }
}
