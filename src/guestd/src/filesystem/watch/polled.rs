//! Watchers with an id, whose clients ask for events: `CreateWatcher`, `GetWatcherEvents`, `RemoveWatcher`.
//!
//! Nothing says that the client of such a watcher has gone, so one that nobody asks for is freed after [`TTL`]. It costs little until
//! then: its events are bounded.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::outbox::{Event, Outbox};
use super::{Options, Spec, Watch, WatchError, Watchers};

/// How long a watcher is kept that nobody asks for. envd keeps it for ever; this is a sandbox's longest life unless configured, so that
/// a program which looks once at its end still finds it.
pub(super) const TTL: Duration = Duration::from_secs(3600);

#[derive(Debug, Default)]
pub(super) struct Polled {
    watches: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    by_id: HashMap<String, Entry>,
    /// Whether a task waits for the first one to be freed.
    reaping: bool,
}

#[derive(Debug)]
struct Entry {
    spec: Spec,
    watch: Watch,
    asked: Instant,
}

/// A polled watcher as data: what another agent needs to go on with it.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct WatcherState {
    pub id: String,
    pub path: std::path::PathBuf,
    pub options: Options,
    /// Whom the watcher looks for.
    pub user: String,
    /// What its client has not heard yet.
    pub events: Vec<Event>,
    /// Why events were lost, if the client has not heard that yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<String>,
    /// How long ago its client asked last, in milliseconds.
    pub asked_ms: u64,
}

impl Polled {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.watches.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watchers {
    /// Makes a watcher that is asked for its events by id.
    ///
    /// # Errors
    /// Those of envd.md section 1.10, and the limits.
    pub async fn create(self: &Arc<Self>, spec: Spec) -> Result<String, WatchError> {
        let watch = self.open(spec.clone()).await?;
        let id = new_id().map_err(|source| WatchError::io(&spec.path, source))?;
        self.keep(id.clone(), Entry { spec, watch, asked: Instant::now() });
        Ok(id)
    }

    fn keep(self: &Arc<Self>, id: String, entry: Entry) {
        let mut table = self.polled.lock();
        table.by_id.insert(id, entry);
        if !std::mem::replace(&mut table.reaping, true) {
            tokio::spawn(reap(Arc::clone(self)));
        }
    }

    /// Everything since the last time, up to this moment.
    ///
    /// # Errors
    /// [`WatchError::UnknownWatcher`]; [`WatchError::Lost`] once, after which the watcher goes on.
    pub async fn events(&self, id: &str) -> Result<Vec<Event>, WatchError> {
        let outbox = self.asked(id)?;
        self.shared.catch_up().await;
        outbox.take().map_err(|reason| WatchError::Lost { reason })
    }

    fn asked(&self, id: &str) -> Result<Arc<Outbox>, WatchError> {
        let mut table = self.polled.lock();
        let entry =
            table.by_id.get_mut(id).ok_or_else(|| WatchError::UnknownWatcher { id: id.to_owned() })?;
        entry.asked = Instant::now();
        Ok(Arc::clone(&entry.watch.outbox))
    }

    /// # Errors
    /// [`WatchError::UnknownWatcher`].
    pub fn remove(&self, id: &str) -> Result<(), WatchError> {
        let removed = self.polled.lock().by_id.remove(id);
        removed.map(drop).ok_or_else(|| WatchError::UnknownWatcher { id: id.to_owned() })
    }

    /// All polled watchers as data, with everything that has happened by now. Streams end with their connections.
    pub async fn export(&self) -> Vec<WatcherState> {
        self.shared.catch_up().await;
        let table = self.polled.lock();
        let exported = table.by_id.iter().map(|(id, entry)| {
            let (events, lost) = entry.watch.outbox.copy();
            WatcherState {
                id: id.clone(),
                path: entry.spec.path.clone(),
                options: entry.spec.options,
                user: entry.spec.user.name.clone(),
                events,
                lost,
                asked_ms: u64::try_from(entry.asked.elapsed().as_millis()).unwrap_or(u64::MAX),
            }
        });
        exported.collect()
    }

    /// Goes on with an exported watcher. What happens between the two is not heard.
    ///
    /// # Errors
    /// Those of [`Watchers::create`]: the directory may be gone.
    pub async fn restore(
        self: &Arc<Self>,
        exported: WatcherState,
        user: crate::identity::User,
    ) -> Result<(), WatchError> {
        let spec = Spec { path: exported.path, options: exported.options, user };
        let watch = self.open(spec.clone()).await?;
        watch.outbox.put_back(exported.events, exported.lost);
        let now = Instant::now();
        let asked = now.checked_sub(Duration::from_millis(exported.asked_ms)).unwrap_or(now);
        self.keep(exported.id, Entry { spec, watch, asked });
        Ok(())
    }
}

/// Frees watchers that nobody asks for; ends with the last one. It wakes once for each that is freed, and at most once in a [`TTL`] for
/// those that are not.
async fn reap(watchers: Arc<Watchers>) {
    loop {
        let next = {
            let now = Instant::now();
            let mut table = watchers.polled.lock();
            table.by_id.retain(|_, entry| entry.asked + TTL > now);
            match table.by_id.values().map(|entry| entry.asked).min() {
                Some(oldest) => oldest + TTL,
                None => {
                    table.reaping = false;
                    return;
                }
            }
        };
        sleep_until(next).await;
    }
}

/// `w` and 20 of `[a-z0-9]` (contract: envd.md section 3.4): it is the whole of what protects one client's watcher from another.
fn new_id() -> io::Result<String> {
    const DIGITS: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    let mut id = String::from("w");
    while id.len() < 21 {
        let mut random = [0; 32];
        getrandom::fill(&mut random)
            .map_err(|error| io::Error::from_raw_os_error(error.raw_os_error().unwrap_or(libc::EIO)))?;
        // 252 is 7 times 36: above it, some digits would come more often than others.
        let digits = random.iter().filter(|byte| **byte < 252);
        id.extend(digits.map(|byte| char::from(DIGITS[usize::from(byte % 36)])).take(21 - id.len()));
    }
    Ok(id)
}
