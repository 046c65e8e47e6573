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
use std::time::{Duration, Instant};

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

/// How long a directory is looked for that is not where it should be. Clients that poll make many passes in that time.
const PATIENCE: Duration = Duration::from_secs(2);

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

/// A directory that came and was not found where it should be, or was met where the tree does not have it.
#[derive(Clone, Debug)]
struct Unreached {
    key: Key,
    parent: WatchDescriptor,
    name: OsString,
    since: Instant,
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
    /// The watcher has it under another name, which holds for now.
    Elsewhere,
    /// It is not to be watched: its parent is gone, or it is on a network.
    Not,
}

/// What is left to do after a pass.
#[derive(Debug, Default)]
pub(super) struct Pass {
    /// Another pass, a little later, decides about directories that were moved meanwhile, or goes on.
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
    /// What was heard from below directories that are being moved.
    late: Vec<(Key, InotifyEvent)>,
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
            late: Vec::new(),
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
        self.late.clear();
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

    /// Works through everything that the kernel has queued by now. It ends, however much goes on meanwhile.
    pub(super) fn pass(&mut self) -> Pass {
        let queue = self.kernel.as_ref().map_or(0, |kernel| kernel.queue_limit + 1);
        let mut budget = self.pending.len() + queue;
        self.pass += 1;
        let mut reached = false;
        while budget > 0 {
            if let Some(event) = self.pending.pop_front() {
                self.process(&event);
                budget -= 1;
            } else if self.fill() == 0 {
                if std::mem::replace(&mut reached, true) {
                    break;
                }
                self.reach();
            }
        }
        // Both halves of a move are queued in one go, so what an earlier pass saw leave has left the tree.
        let (left, moving) =
            std::mem::take(&mut self.moving).into_iter().partition::<Vec<_>, _>(|m| m.pass < self.pass);
        self.moving = moving;
        for moving in left {
            self.release(moving.key, moving.watch);
        }
        if self.moving.is_empty() {
            self.late.clear();
        }
        self.names = None;
        Pass { unsettled: self.is_unsettled() || budget == 0, stale: std::mem::take(&mut self.stale) }
    }

    /// Whether another pass has something to do although nothing happens.
    pub(super) fn is_unsettled(&self) -> bool {
        !self.moving.is_empty() || !self.unreached.is_empty()
    }

    fn process(&mut self, event: &InotifyEvent) {
        if event.mask.contains(Mask::IN_Q_OVERFLOW) {
            return self.overflow();
        }
        let Some(keys) = self.owners.get(&event.wd).cloned() else { return };
        for key in keys {
            self.process_for(key, event);
        }
    }

    fn process_for(&mut self, key: Key, event: &InotifyEvent) {
        match &event.name {
            Some(name) => match self.path(key, event.wd, name) {
                Some(path) if event.mask.contains(Mask::IN_ISDIR) => {
                    self.tell_directory(key, event, name, &path);
                }
                Some(path) => self.tell(key, &path, event.mask),
                // Somebody was at work below a directory between the two halves of its move.
                None if self.late.len() < PENDING_LIMIT => {
                    let InotifyEvent { wd, mask, cookie, .. } = *event;
                    self.late.push((key, InotifyEvent { wd, mask, cookie, name: Some(name.clone()) }));
                }
                None => self.lose(key, "too much happened in a directory that was being moved"),
            },
            None if self.is_root(key, event.wd) => self.tell(key, Path::new("."), event.mask),
            // Its parent says the same with its name.
            None => {}
        }
        if event.mask.contains(Mask::IN_IGNORED) {
            self.release(key, event.wd);
        }
    }

    /// Tells what was heard from below directories while they had no name.
    fn tell_late(&mut self) {
        for (key, event) in std::mem::take(&mut self.late) {
            if self.owners.get(&event.wd).is_some_and(|keys| keys.contains(&key)) {
                self.process_for(key, &event);
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
    fn tell_directory(&mut self, key: Key, event: &InotifyEvent, name: &OsStr, path: &Path) {
        let Some(watcher) = self.watchers.get_mut(&key) else { return };
        let known = watcher.tree.child(event.wd, name);
        if !watcher.spec.options.recursive {
            return self.tell(key, path, event.mask);
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
            return self.tell_arrival(key, event, name, path);
        }
        self.tell(key, path, event.mask);
    }

    fn tell_arrival(&mut self, key: Key, event: &InotifyEvent, name: &OsStr, path: &Path) {
        let opened = self.open(key, event.wd, name, Instant::now());
        let known = self.is_at(key, event.wd, name, opened.as_ref());
        if event.mask.contains(Mask::IN_CREATE) && known {
            // A listing has shown it, and it was told.
            return;
        }
        let cookie = event.cookie;
        let moved = self.moving.iter().position(|m| m.cookie == cookie && m.key == key && event.cookie != 0);
        let moved = moved.map(|index| self.moving.swap_remove(index).watch);
        self.tell(key, path, event.mask);
        let Some(watcher) = self.watchers.get(&key) else { return };
        let identity = moved.and_then(|watch| watcher.tree.identity(watch));
        match moved {
            // Moved within the tree: its watches go on under the new name. One that has gone on since is heard of again.
            Some(watch) if opened.as_ref().is_none_or(|directory| identity == Some(directory.identity)) => {
                if let Some(displaced) = watcher.tree.child(event.wd, name) {
                    self.release(key, displaced);
                }
                if let Some(watcher) = self.watchers.get_mut(&key) {
                    watcher.tree.attach(watch, event.wd, name);
                }
                return self.tell_late();
            }
            // What left was another one, which the events to come will find; by now this one has its name.
            Some(watch) => self.release(key, watch),
            None => {}
        }
        if let Some(directory) = opened.filter(|_| !known) {
            let is_elsewhere = self.appear(key, event.wd, name, directory);
            if is_elsewhere {
                self.look_again(key, event.wd, name, Instant::now());
            }
        }
    }

    /// Whether the tree has this directory under this name.
    fn is_at(&self, key: Key, parent: WatchDescriptor, name: &OsStr, directory: Option<&Directory>) -> bool {
        let (Some(watcher), Some(directory)) = (self.watchers.get(&key), directory) else { return false };
        let identity = watcher.tree.child(parent, name).and_then(|watch| watcher.tree.identity(watch));
        identity == Some(directory.identity)
    }

    /// The directory of this name in a watched one; None when there is none any more, or when it cannot be reached yet.
    fn open(&mut self, key: Key, parent: WatchDescriptor, name: &OsStr, since: Instant) -> Option<Directory> {
        let Watcher { spec, tree, .. } = self.watchers.get(&key)?;
        let root = tree.root().and_then(|root| tree.identity(root))?;
        let wanted = tree.identity(parent)?;
        let above = tree.path(parent);
        let found = match above.as_ref().map(|above| spec.open(root, above)) {
            // Only the directory that the event came from will do, and it may have moved since.
            Some(Ok(directory)) if directory.identity == wanted => Some(directory),
            Some(Err(error)) if !is_passing(&error) => {
                return self.passing(key, &above?.join(name), Err(error));
            }
            _ => None,
        };
        match found {
            Some(directory) => {
                let opened = spec.look(|| directory.child(name));
                self.passing(key, &above?.join(name), opened)
            }
            None if since.elapsed() < PATIENCE => {
                self.look_again(key, parent, name, since);
                None
            }
            None => {
                // A walk finds it, wherever it is.
                self.lose(key, "directories are moved faster than they can be followed");
                if !self.stale.contains(&key) {
                    self.stale.push(key);
                }
                None
            }
        }
    }

    /// Leaves a directory for when all that was queued is heard, and names are right.
    pub(super) fn look_again(&mut self, key: Key, parent: WatchDescriptor, name: &OsStr, since: Instant) {
        if self.unreached.len() < DIRECTORY_LIMIT {
            self.unreached.push(Unreached { key, parent, name: name.to_owned(), since });
        } else if !self.stale.contains(&key) {
            self.stale.push(key);
        }
    }

    /// Looks again for the directories that could not be reached: by now all that was queued is heard, and names are right.
    fn reach(&mut self) {
        for Unreached { key, parent, name, since } in std::mem::take(&mut self.unreached) {
            let Some(directory) = self.open(key, parent, &name, since) else { continue };
            if self.is_at(key, parent, &name, Some(&directory)) {
                continue;
            }
            let is_elsewhere = self.appear(key, parent, &name, directory);
            // If nothing has happened since all was heard, it is a mount; else its name may be wrong still.
            if is_elsewhere && self.fill() > 0 && since.elapsed() < PATIENCE {
                self.look_again(key, parent, &name, since);
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

    /// Watches a directory that came, and what is in it. Says whether nothing was done, because the tree has it elsewhere.
    pub(super) fn appear(
        &mut self,
        key: Key,
        parent: WatchDescriptor,
        name: &OsStr,
        directory: Directory,
    ) -> bool {
        let mut visits = Vec::new();
        let is_elsewhere = self.arrive(key, parent, name, directory, &mut visits);
        while let Some(visit) = visits.pop() {
            let opened = visit.within.child(&visit.name);
            if let Some(directory) = self.passing(key, Path::new(&visit.name), opened)
                && self.arrive(key, visit.parent, &visit.name, directory, &mut visits)
            {
                self.look_again(key, visit.parent, &visit.name, Instant::now());
            }
        }
        is_elsewhere
    }

    /// Says whether the tree has it elsewhere.
    fn arrive(
        &mut self,
        key: Key,
        parent: WatchDescriptor,
        name: &OsStr,
        directory: Directory,
        visits: &mut Vec<Visit>,
    ) -> bool {
        match self.enter(key, parent, name, &directory) {
            Ok(Entered::New(watch, from)) => self.list(key, watch, from, directory, visits),
            Ok(Entered::Elsewhere) => return true,
            Ok(Entered::Known(_) | Entered::Not) => {}
            Err(error) => self.lose(key, &error.to_string()),
        }
        false
    }

    /// Tells what is in a new directory, if the events to come do not.
    fn list(
        &mut self,
        key: Key,
        watch: WatchDescriptor,
        from: usize,
        directory: Directory,
        visits: &mut Vec<Visit>,
    ) {
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
                // Either a mount shows the same directory twice, and its first name stays; or it has just come here, and the events
                // that say so are still to come.
                tree.see(watch);
                return Ok(Entered::Elsewhere);
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

    /// Begins to walk a watcher's tree again: where it is, its root, and which walk it is.
    pub(super) fn begin_walk(&mut self, key: Key) -> Option<(Spec, Identity, WatchDescriptor, u32)> {
        let watcher = self.watchers.get_mut(&key)?;
        let root = watcher.tree.root()?;
        let walk = watcher.tree.begin_walk();
        Some((watcher.spec.clone(), watcher.tree.identity(root)?, root, walk))
    }

    /// Forgets the directories that a walk did not meet. A later walk that has begun meanwhile does so in its stead.
    pub(super) fn end_walk(&mut self, key: Key, walk: u32) {
        let unseen = self.watchers.get(&key).map(|watcher| watcher.tree.unseen(walk)).unwrap_or_default();
        for watch in unseen {
            self.release(key, watch);
        }
    }

    pub(super) fn lose(&self, key: Key, reason: &str) {
        if let Some(watcher) = self.watchers.get(&key) {
            watcher.outbox.lose(reason);
        }
    }

    /// The only watcher, and a directory in its root.
    #[cfg(test)]
    pub(super) fn first_child(&self, name: &str) -> (Key, WatchDescriptor) {
        let (key, watcher) = self.watchers.iter().next().unwrap();
        let root = watcher.tree.root().unwrap();
        (*key, watcher.tree.child(root, name.as_ref()).unwrap())
    }

    /// A pass that is interrupted after so many events.
    #[cfg(test)]
    pub(super) fn step(&mut self, events: usize) {
        self.fill();
        for _ in 0..events {
            let event = self.pending.pop_front().unwrap();
            self.process(&event);
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
