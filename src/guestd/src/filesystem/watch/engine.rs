//! Turns what the kernel says into what clients hear (contract: envd.md section 3.4).
//!
//! One [`Engine`] for all watchers, used by one blocking thread at a time. A pass reads the kernel's queue to its end, so that whoever
//! asks afterwards hears of everything that happened before.
//!
//! inotify reports what happens in a directory only from the moment that it is watched. So each directory that appears is watched
//! first and listed then, and of what the listing shows, what the kernel has not queued is told here: nothing is missed, and
//! nothing is told twice. That works because the kernel queues a creation before it lets anybody list it.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use guestd_protocol::wire::filesystem::EventType;
use nix::sys::inotify::{AddWatchFlags as Mask, InotifyEvent, WatchDescriptor};

use super::directory::{Directory, Identity, is_passing};
use super::kernel::Kernel;
use super::outbox::{EVENT_LIMIT, Event, Outbox};
use super::tree::Tree;
use super::{DEPTH_LIMIT, DIRECTORY_LIMIT, Spec, WATCHER_LIMIT, WatchError};
use crate::filesystem::entry;
use crate::filesystem::place::Place;
use crate::identity::{Accounts, Names};

/// How often a directory is looked for that is not where it should be; the passes are 20 ms apart.
const TRIES: u32 = 10;

/// Which watcher it is, inside the agent.
pub(super) type Key = u64;

/// The most events that were read and wait here; more wait in the kernel.
const PENDING_LIMIT: usize = 65_536;

/// After so many watches were given up, their last events are read, so that they do not fill the kernel's queue.
const REMOVALS_IN_A_ROW: usize = 4096;

#[derive(Debug)]
struct Watcher {
    spec: Spec,
    tree: Tree,
    outbox: Arc<Outbox>,
}

/// A directory that was moved from its place, until its arrival is heard of or must have been.
#[derive(Debug)]
struct Moving {
    cookie: u32,
    key: Key,
    watch: WatchDescriptor,
    pass: u64,
}

/// A directory that came and was not found where it should be.
#[derive(Debug)]
struct Unreached {
    key: Key,
    parent: WatchDescriptor,
    name: OsString,
    tries: u32,
}

/// A directory that is to be looked at.
struct Visit {
    within: Rc<Directory>,
    parent: WatchDescriptor,
    name: OsString,
}

/// How a directory became part of a tree.
#[derive(Debug)]
pub(super) enum Entered {
    /// It is new to the watcher. What the kernel said about it begins at this place of the pending events.
    New(WatchDescriptor, usize),
    /// The watcher has it already.
    Known(WatchDescriptor),
    /// It is not to be watched: its parent is gone, it is a loop, or on a network.
    Not,
}

/// What is left to do after a pass.
#[derive(Debug, Default)]
pub(super) struct Pass {
    /// The kernel had more than its queue holds: pass again.
    pub(super) more: bool,
    /// Another pass, a little later, decides about directories that were moved meanwhile.
    pub(super) unsettled: bool,
    /// Watchers whose trees must be walked again: some directories may be new.
    pub(super) stale: Vec<Key>,
}

#[derive(Debug)]
pub(super) struct Engine {
    accounts: Arc<Accounts>,
    kernel: Option<Arc<Kernel>>,
    pending: VecDeque<InotifyEvent>,
    owners: HashMap<WatchDescriptor, Vec<Key>>,
    watchers: HashMap<Key, Watcher>,
    last_key: Key,
    moving: Vec<Moving>,
    /// Directories that came while those above them had other names than the events so far tell.
    unreached: Vec<Unreached>,
    stale: Vec<Key>,
    pass: u64,
    /// Names of owners, read once in a pass.
    names: Option<Names>,
    removals: usize,
}

impl Engine {
    pub(super) fn new(accounts: Arc<Accounts>) -> Self {
        Self {
            accounts,
            kernel: None,
            pending: VecDeque::new(),
            owners: HashMap::new(),
            watchers: HashMap::new(),
            last_key: 0,
            moving: Vec::new(),
            unreached: Vec::new(),
            stale: Vec::new(),
            pass: 0,
            names: None,
            removals: 0,
        }
    }

    pub(super) fn kernel(&self) -> Option<&Arc<Kernel>> {
        self.kernel.as_ref()
    }

    pub(super) fn set_kernel(&mut self, kernel: Arc<Kernel>) {
        self.kernel = Some(kernel);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.watchers.is_empty()
    }

    /// Lets go of the kernel's instance, and with it of every watch.
    pub(super) fn close(&mut self) {
        self.kernel = None;
        self.pending = VecDeque::new();
        self.owners = HashMap::new();
        self.moving.clear();
        self.unreached.clear();
        self.stale.clear();
    }

    /// Begins a watcher with its root alone. What happened before belongs to those who watched before.
    ///
    /// # Errors
    /// Too many watchers, or no room in the kernel.
    pub(super) fn begin(
        &mut self,
        spec: Spec,
        root: &Directory,
        outbox: Arc<Outbox>,
    ) -> Result<(Key, WatchDescriptor), WatchError> {
        if self.watchers.len() >= WATCHER_LIMIT {
            return Err(WatchError::TooManyWatchers);
        }
        let Some(kernel) = self.kernel.clone() else { return Err(WatchError::NoInstances) };
        let watch = kernel.add(root, &spec.path)?;
        self.last_key += 1;
        let key = self.last_key;
        let mut tree = Tree::default();
        tree.plant(watch, root.identity);
        self.owners.entry(watch).or_default().push(key);
        self.watchers.insert(key, Watcher { spec, tree, outbox });
        Ok((key, watch))
    }

    pub(super) fn remove(&mut self, key: Key) {
        let Some(watcher) = self.watchers.remove(&key) else { return };
        self.moving.retain(|moving| moving.key != key);
        if self.watchers.is_empty() {
            return self.close();
        }
        for watch in watcher.tree.watches() {
            self.disown(key, watch);
        }
    }

    fn disown(&mut self, key: Key, watch: WatchDescriptor) {
        let Some(owners) = self.owners.get_mut(&watch) else { return };
        owners.retain(|owner| *owner != key);
        if !owners.is_empty() {
            return;
        }
        self.owners.remove(&watch);
        if let Some(kernel) = &self.kernel {
            kernel.remove(watch);
        }
        self.removals += 1;
        if self.removals.is_multiple_of(REMOVALS_IN_A_ROW) {
            self.fill();
        }
    }

    /// Forgets a directory of a watcher and all below it.
    fn release(&mut self, key: Key, watch: WatchDescriptor) {
        let Some(watcher) = self.watchers.get_mut(&key) else { return };
        for watch in watcher.tree.remove(watch) {
            self.disown(key, watch);
        }
    }

    /// Reads what the kernel has; returns how many events it was.
    fn fill(&mut self) -> usize {
        let Some(kernel) = &self.kernel else { return 0 };
        let mut total = 0;
        while self.pending.len() < PENDING_LIMIT {
            match kernel.read() {
                Ok(events) if events.is_empty() => break,
                Ok(events) => {
                    total += events.len();
                    // A watch that was given up says goodbye; thousands of them are not worth keeping.
                    let owners = &self.owners;
                    let kept = |event: &InotifyEvent| {
                        !event.mask.contains(Mask::IN_IGNORED) || owners.contains_key(&event.wd)
                    };
                    self.pending.extend(events.into_iter().filter(kept));
                }
                Err(error) => {
                    tracing::error!(%error, "inotify cannot be read");
                    break;
                }
            }
        }
        total
    }

    /// Works through everything that the kernel has queued by now.
    pub(super) fn pass(&mut self) -> Pass {
        let limit = self.kernel.as_ref().map_or(0, |kernel| kernel.queue_limit + 1);
        self.pass += 1;
        let mut read = 0;
        let mut more = false;
        let mut reached = false;
        loop {
            if let Some(event) = self.pending.pop_front() {
                self.process(&event);
                continue;
            }
            if read > limit {
                more = true;
                break;
            }
            match self.fill() {
                0 if reached => break,
                0 => {
                    reached = true;
                    self.reach();
                }
                count => read += count,
            }
        }
        // Both halves of a move are queued in one go, so what an earlier pass saw leave has left the tree.
        let (left, moving) =
            std::mem::take(&mut self.moving).into_iter().partition::<Vec<_>, _>(|m| m.pass < self.pass);
        self.moving = moving;
        for moving in left {
            self.release(moving.key, moving.watch);
        }
        self.names = None;
        let unsettled = !self.moving.is_empty() || !self.unreached.is_empty();
        Pass { more, unsettled, stale: std::mem::take(&mut self.stale) }
    }

    fn process(&mut self, event: &InotifyEvent) {
        if event.mask.contains(Mask::IN_Q_OVERFLOW) {
            return self.overflow();
        }
        let Some(keys) = self.owners.get(&event.wd).cloned() else { return };
        for key in keys {
            match &event.name {
                Some(name) if event.mask.contains(Mask::IN_ISDIR) => self.tell_directory(key, event, name),
                Some(name) => {
                    if let Some(path) = self.path(key, event.wd, name) {
                        self.tell(key, &path, event.mask);
                    }
                }
                None if self.is_root(key, event.wd) => self.tell(key, Path::new("."), event.mask),
                // Its parent says the same with its name.
                None => {}
            }
            if event.mask.contains(Mask::IN_IGNORED) {
                self.release(key, event.wd);
            }
        }
    }

    fn overflow(&mut self) {
        for (key, watcher) in &self.watchers {
            watcher.outbox.lose("more happened than the kernel queues (fs.inotify.max_queued_events)");
            if watcher.spec.options.recursive && !self.stale.contains(key) {
                self.stale.push(*key);
            }
        }
    }

    fn is_root(&self, key: Key, watch: WatchDescriptor) -> bool {
        self.watchers.get(&key).is_some_and(|watcher| watcher.tree.root() == Some(watch))
    }

    fn path(&self, key: Key, parent: WatchDescriptor, name: &OsStr) -> Option<PathBuf> {
        Some(self.watchers.get(&key)?.tree.path(parent)?.join(name))
    }

    /// Something happened to a directory in a watched one.
    fn tell_directory(&mut self, key: Key, event: &InotifyEvent, name: &OsStr) {
        let Some(path) = self.path(key, event.wd, name) else { return };
        let Some(watcher) = self.watchers.get_mut(&key) else { return };
        let known = watcher.tree.child(event.wd, name);
        if !watcher.spec.options.recursive {
            return self.tell(key, &path, event.mask);
        }
        if event.mask.contains(Mask::IN_MOVED_FROM) {
            if let Some(watch) = known {
                watcher.tree.detach(watch);
                self.moving.push(Moving { cookie: event.cookie, key, watch, pass: self.pass });
            }
        } else if event.mask.contains(Mask::IN_DELETE) {
            if let Some(watch) = known {
                self.release(key, watch);
            }
        } else if event.mask.intersects(Mask::IN_CREATE | Mask::IN_MOVED_TO) {
            return self.tell_arrival(key, event, name, &path);
        }
        self.tell(key, &path, event.mask);
    }

    fn tell_arrival(&mut self, key: Key, event: &InotifyEvent, name: &OsStr, path: &Path) {
        let opened = self.open(key, event.wd, name, 0);
        let Some(watcher) = self.watchers.get_mut(&key) else { return };
        let tree = &mut watcher.tree;
        let known = tree.child(event.wd, name).filter(|watch| {
            opened.as_ref().is_some_and(|directory| tree.identity(*watch) == Some(directory.identity))
        });
        if event.mask.contains(Mask::IN_CREATE) && known.is_some() {
            // A listing has shown it, and it was told.
            return;
        }
        let cookie = event.cookie;
        let moved = self.moving.iter().position(|m| m.cookie == cookie && m.key == key && event.cookie != 0);
        let moved = moved.map(|index| self.moving.swap_remove(index).watch);
        self.tell(key, path, event.mask);
        let Some(directory) = opened else {
            if let Some(watch) = moved {
                self.release(key, watch);
            }
            return;
        };
        if known.is_some() {
            return;
        }
        if let Some(watch) = moved {
            let tree = self.watchers.get_mut(&key).map(|watcher| &mut watcher.tree);
            if tree.as_ref().and_then(|tree| tree.identity(watch)) == Some(directory.identity) {
                // Moved within the tree: its watches go on under the new name.
                if let Some(displaced) = tree.and_then(|tree| tree.child(event.wd, name)) {
                    self.release(key, displaced);
                }
                if let Some(watcher) = self.watchers.get_mut(&key) {
                    watcher.tree.attach(watch, event.wd, name);
                }
                return;
            }
            // By now something else has its name.
            self.release(key, watch);
        }
        self.appear(key, event.wd, name, directory);
    }

    /// The directory of this name in a watched one; None when there is none any more, or when it cannot be reached yet.
    fn open(&mut self, key: Key, parent: WatchDescriptor, name: &OsStr, tries: u32) -> Option<Directory> {
        let Watcher { spec, tree, .. } = self.watchers.get(&key)?;
        let root = tree.root().and_then(|root| tree.identity(root))?;
        let above = tree.path(parent)?;
        let found = match spec.open(root, &above) {
            // Only the directory that the event came from will do, and it may have moved since.
            Ok(directory) if tree.identity(parent) == Some(directory.identity) => Some(directory),
            Err(error) if !is_passing(&error) => return self.passing(key, &above.join(name), Err(error)),
            _ => None,
        };
        match found {
            Some(directory) => {
                let opened = spec.look(|| directory.child(name));
                self.passing(key, &above.join(name), opened)
            }
            None if tries < TRIES => {
                self.unreached.push(Unreached { key, parent, name: name.to_owned(), tries: tries + 1 });
                None
            }
            None => {
                let error = io::Error::other("it is not where it was said to be");
                self.passing(key, &above.join(name), Err(error))
            }
        }
    }

    /// Looks again for the directories that could not be reached: by now all that was queued is heard, and names are right.
    fn reach(&mut self) {
        for Unreached { key, parent, name, tries } in std::mem::take(&mut self.unreached) {
            let known = |watcher: &Watcher| watcher.tree.child(parent, &name).is_some();
            if self.watchers.get(&key).is_none_or(known) {
                continue;
            }
            if let Some(directory) = self.open(key, parent, &name, tries) {
                self.appear(key, parent, &name, directory);
            }
        }
    }

    /// Directories come and go; anything else that keeps one from being watched is told.
    fn passing<T>(&self, key: Key, path: &Path, result: io::Result<T>) -> Option<T> {
        let error = match result {
            Ok(value) => return Some(value),
            Err(error) => error,
        };
        if !is_passing(&error)
            && let Some(watcher) = self.watchers.get(&key)
        {
            watcher.outbox.lose(&format!("cannot watch {}: {error}", watcher.spec.path.join(path).display()));
        }
        None
    }

    /// Watches a directory that came, and what is in it.
    fn appear(&mut self, key: Key, parent: WatchDescriptor, name: &OsStr, directory: Directory) {
        let mut visits = Vec::new();
        self.arrive(key, parent, name, directory, &mut visits);
        while let Some(visit) = visits.pop() {
            let opened = visit.within.child(&visit.name);
            if let Some(directory) = self.passing(key, Path::new(&visit.name), opened) {
                self.arrive(key, visit.parent, &visit.name, directory, &mut visits);
            }
        }
    }

    fn arrive(
        &mut self,
        key: Key,
        parent: WatchDescriptor,
        name: &OsStr,
        directory: Directory,
        visits: &mut Vec<Visit>,
    ) {
        let (watch, from) = match self.enter(key, parent, name, &directory) {
            Ok(Entered::New(watch, from)) => (watch, from),
            Ok(Entered::Known(_) | Entered::Not) => return,
            Err(error) => {
                if let Some(watcher) = self.watchers.get(&key) {
                    watcher.outbox.lose(&error.to_string());
                }
                return;
            }
        };
        let Some(watcher) = self.watchers.get(&key) else { return };
        let Some(path) = watcher.tree.path(watch) else { return };
        let files = if watcher.outbox.has_lost() { 0 } else { EVENT_LIMIT + 1 };
        let entries = watcher.spec.look(|| directory.entries(files));
        let Some(entries) = self.passing(key, &path, entries) else { return };
        self.fill();
        let mut created = HashSet::new();
        let mut written = HashSet::new();
        for event in self.pending.range(from.min(self.pending.len())..).filter(|event| event.wd == watch) {
            let Some(name) = &event.name else { continue };
            if event.mask.intersects(Mask::IN_CREATE | Mask::IN_MOVED_TO) {
                created.insert(name.clone());
            } else if event.mask.contains(Mask::IN_MODIFY) {
                written.insert(name.clone());
            }
        }
        let directory = Rc::new(directory);
        for entry in entries.into_iter().filter(|entry| !created.contains(&entry.name)) {
            let path = path.join(&entry.name);
            self.tell(key, &path, Mask::IN_CREATE);
            if entry.has_content && !written.contains(&entry.name) {
                self.tell(key, &path, Mask::IN_MODIFY);
            }
            if entry.is_directory {
                visits.push(Visit { within: Rc::clone(&directory), parent: watch, name: entry.name });
            }
        }
    }

    /// Makes a directory part of a watcher's tree.
    ///
    /// # Errors
    /// The limits of watchers and of the kernel.
    pub(super) fn enter(
        &mut self,
        key: Key,
        parent: WatchDescriptor,
        name: &OsStr,
        directory: &Directory,
    ) -> Result<Entered, WatchError> {
        let from = self.pending.len();
        let (Some(watcher), Some(kernel)) = (self.watchers.get_mut(&key), &self.kernel) else {
            return Ok(Entered::Not);
        };
        let (spec, tree) = (&watcher.spec, &mut watcher.tree);
        let (Some(path), Some(above)) = (tree.path(parent), tree.identity(parent)) else {
            return Ok(Entered::Not);
        };
        let path = path.join(name);
        if !spec.options.allow_network_mounts
            && !directory.identity.same_file_system(above)
            && directory.is_network().unwrap_or(true)
        {
            return Ok(Entered::Not);
        }
        if tree.depth(parent) >= DEPTH_LIMIT || tree.len() >= DIRECTORY_LIMIT {
            return Err(WatchError::TooLarge { path: spec.path.clone() });
        }
        let watch = match kernel.add(directory, &spec.path.join(&path)) {
            Err(error) if error.source_error().is_some_and(is_passing) => return Ok(Entered::Not),
            added => added?,
        };
        let displaced = tree.child(parent, name);
        if displaced == Some(watch) {
            tree.see(watch);
            return Ok(Entered::Known(watch));
        }
        if tree.contains(watch) {
            if tree.is_within(parent, watch) || is_still_there(spec, tree, watch, directory.identity) {
                // A mount shows the same directory twice: its first name stays.
                tree.see(watch);
                return Ok(Entered::Not);
            }
            // It moved, and not all that happened in it meanwhile was heard with a name: it begins anew.
            self.moving.retain(|moving| moving.key != key || moving.watch != watch);
            self.release(key, watch);
            return self.enter(key, parent, name, directory);
        }
        if let Some(displaced) = displaced {
            self.release(key, displaced);
        }
        let Some(watcher) = self.watchers.get_mut(&key) else { return Ok(Entered::Not) };
        watcher.tree.insert(parent, name, watch, directory.identity);
        let owners = self.owners.entry(watch).or_default();
        // Others have watched it before: what they have not heard yet may be anywhere in the queue.
        let from = if owners.is_empty() { from } else { 0 };
        owners.push(key);
        Ok(Entered::New(watch, from))
    }

    /// Queues the events of one kernel event, in the contract's order.
    fn tell(&mut self, key: Key, path: &Path, mask: Mask) {
        let Some(watcher) = self.watchers.get(&key) else { return };
        if watcher.outbox.has_lost() {
            return;
        }
        for (bits, kind) in [
            (Mask::IN_CREATE | Mask::IN_MOVED_TO, EventType::Create),
            (Mask::IN_MOVED_FROM | Mask::IN_MOVE_SELF, EventType::Rename),
            (Mask::IN_ATTRIB, EventType::Chmod),
            (Mask::IN_MODIFY, EventType::Write),
            (Mask::IN_DELETE | Mask::IN_DELETE_SELF | Mask::IN_UNMOUNT, EventType::Remove),
        ] {
            if !mask.intersects(bits) {
                continue;
            }
            let described = watcher.spec.options.include_entry
                && matches!(kind, EventType::Create | EventType::Write | EventType::Chmod);
            let entry = if described {
                let names = self.names.get_or_insert_with(|| self.accounts.names());
                let full = if path == Path::new(".") {
                    watcher.spec.path.clone()
                } else {
                    watcher.spec.path.join(path)
                };
                let look = || {
                    let place = Place::open(&full)?;
                    entry::describe(&place.parent, &place.name, &full, names)
                };
                watcher.spec.look(look).ok().map(Box::new)
            } else {
                None
            };
            watcher.outbox.push(Event { name: path.to_string_lossy().into_owned(), kind, entry });
        }
    }

    /// Begins to walk a watcher's tree again: where it is, and its root.
    pub(super) fn begin_walk(&mut self, key: Key) -> Option<(Spec, Identity, WatchDescriptor)> {
        let watcher = self.watchers.get_mut(&key)?;
        let root = watcher.tree.root()?;
        watcher.tree.begin_walk();
        Some((watcher.spec.clone(), watcher.tree.identity(root)?, root))
    }

    /// Forgets the directories that a walk did not meet.
    pub(super) fn end_walk(&mut self, key: Key) {
        let unseen = self.watchers.get(&key).map(|watcher| watcher.tree.unseen()).unwrap_or_default();
        for watch in unseen {
            self.release(key, watch);
        }
    }

    pub(super) fn lose(&self, key: Key, reason: &str) {
        if let Some(watcher) = self.watchers.get(&key) {
            watcher.outbox.lose(reason);
        }
    }

    #[cfg(test)]
    pub(super) fn watched(&self) -> usize {
        self.owners.len()
    }
}

/// Whether a directory is where the tree has it, although it was just met elsewhere.
fn is_still_there(spec: &Spec, tree: &Tree, watch: WatchDescriptor, identity: Identity) -> bool {
    let root = tree.root().and_then(|root| tree.identity(root));
    let (Some(root), Some(path)) = (root, tree.path(watch)) else { return false };
    spec.open(root, &path).is_ok_and(|directory| directory.identity == identity)
}
