//! The connections that are open, so that they can be cut: after a snapshot was restored, what is at their other ends is another machine's
//! past.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

/// The two ways to end a connection.
#[derive(Clone, Debug, Default)]
struct Ends {
    /// At once.
    cut: CancellationToken,
    /// When its calls are answered.
    close: CancellationToken,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    live: HashMap<u64, Ends>,
}

/// The table of open connections, shared by all doors.
#[derive(Clone, Debug, Default)]
pub struct Connections(Arc<Mutex<Table>>);

/// One open connection, in the table for as long as anybody holds it: a tunnel outlives the conversation that it was opened in. Each door puts
/// one into the extensions of every request.
#[derive(Clone, Debug)]
pub struct Connection(Arc<Entry>);

impl Connection {
    /// Waits until the connection is to be given up.
    pub async fn cut(&self) {
        self.0.ends.cut.cancelled().await;
    }

    /// Waits until the connection is to take no further call.
    pub async fn closed(&self) {
        self.0.ends.close.cancelled().await;
    }
}

#[derive(Debug)]
struct Entry {
    connections: Connections,
    id: u64,
    ends: Ends,
}

impl Connections {
    pub(super) fn enter(&self) -> Connection {
        let mut table = self.lock();
        let id = table.next;
        table.next += 1;
        let ends = Ends::default();
        table.live.insert(id, ends.clone());
        drop(table);
        Connection(Arc::new(Entry { connections: self.clone(), id, ends }))
    }

    /// Cuts every connection but `kept`, and what was tunnelled through them; the result says how many.
    pub fn cut_all_but(&self, kept: Option<&Connection>) -> usize {
        let others = self.others(kept);
        others.iter().for_each(|ends| ends.cut.cancel());
        others.len()
    }

    /// Closes every connection but `kept`, each when its calls are answered.
    pub fn close_all_but(&self, kept: Option<&Connection>) {
        self.others(kept).iter().for_each(|ends| ends.close.cancel());
    }

    /// How many connections there are besides `kept`.
    pub fn count_but(&self, kept: Option<&Connection>) -> usize {
        self.others(kept).len()
    }

    fn others(&self, kept: Option<&Connection>) -> Vec<Ends> {
        let kept = kept.map(|connection| connection.0.id);
        let table = self.lock();
        let others = table.live.iter().filter(|(id, _)| Some(**id) != kept);
        others.map(|(_, ends)| ends.clone()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.connections.lock().live.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_are_cut_but_the_one_that_asked() {
        let connections = Connections::default();
        let (asks, other) = (connections.enter(), connections.enter());
        drop(connections.enter());
        assert_eq!(connections.cut_all_but(Some(&asks)), 1, "one has ended by itself");
        other.cut().await;
        assert!(!asks.0.ends.cut.is_cancelled());
        drop((asks, other));
        assert!(connections.lock().live.is_empty());
    }
}
