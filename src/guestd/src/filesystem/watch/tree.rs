//! The directories that one watcher watches, by watch descriptor, and how each is called below the root.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use nix::sys::inotify::WatchDescriptor;

use super::directory::Identity;

#[derive(Debug)]
struct Node {
    /// None for the root, and for a directory that was moved away and has not arrived anywhere.
    parent: Option<WatchDescriptor>,
    name: OsString,
    children: HashMap<OsString, WatchDescriptor>,
    identity: Identity,
    /// The walk that saw it last.
    walk: u32,
}

#[derive(Debug, Default)]
pub(super) struct Tree {
    root: Option<WatchDescriptor>,
    nodes: HashMap<WatchDescriptor, Node>,
    walk: u32,
}

impl Tree {
    pub(super) fn plant(&mut self, watch: WatchDescriptor, identity: Identity) {
        self.root = Some(watch);
        self.put(watch, None, OsString::new(), identity);
    }

    fn put(
        &mut self,
        watch: WatchDescriptor,
        parent: Option<WatchDescriptor>,
        name: OsString,
        identity: Identity,
    ) {
        let node = Node { parent, name, children: HashMap::new(), identity, walk: self.walk };
        self.nodes.insert(watch, node);
    }

    /// None when the root is gone.
    pub(super) fn root(&self) -> Option<WatchDescriptor> {
        self.root
    }

    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    pub(super) fn contains(&self, watch: WatchDescriptor) -> bool {
        self.nodes.contains_key(&watch)
    }

    pub(super) fn identity(&self, watch: WatchDescriptor) -> Option<Identity> {
        self.nodes.get(&watch).map(|node| node.identity)
    }

    pub(super) fn child(&self, parent: WatchDescriptor, name: &OsStr) -> Option<WatchDescriptor> {
        self.nodes.get(&parent)?.children.get(name).copied()
    }

    pub(super) fn watches(&self) -> impl Iterator<Item = WatchDescriptor> {
        self.nodes.keys().copied()
    }

    /// The names from the root down to a directory; None when it is not below the root (any more).
    fn names(&self, watch: WatchDescriptor) -> Option<Vec<&OsStr>> {
        let mut names = Vec::new();
        let mut at = watch;
        while Some(at) != self.root {
            let node = self.nodes.get(&at)?;
            names.push(node.name.as_os_str());
            at = node.parent?;
        }
        names.reverse();
        Some(names)
    }

    /// Relative to the root, which is the empty path itself.
    pub(super) fn path(&self, watch: WatchDescriptor) -> Option<PathBuf> {
        Some(self.names(watch)?.into_iter().collect())
    }

    /// How many levels below the root.
    pub(super) fn depth(&self, watch: WatchDescriptor) -> usize {
        self.names(watch).map_or(0, |names| names.len())
    }

    /// Whether `above` is `watch` or one of the directories that it is in.
    pub(super) fn is_within(&self, watch: WatchDescriptor, above: WatchDescriptor) -> bool {
        let mut at = Some(watch);
        while let Some(watch) = at {
            if watch == above {
                return true;
            }
            at = self.nodes.get(&watch).and_then(|node| node.parent);
        }
        false
    }

    pub(super) fn insert(
        &mut self,
        parent: WatchDescriptor,
        name: &OsStr,
        watch: WatchDescriptor,
        identity: Identity,
    ) {
        self.put(watch, Some(parent), name.to_owned(), identity);
        self.attach(watch, parent, name);
    }

    /// Takes a directory with all below it out of its parent; it keeps its watches and has no path.
    pub(super) fn detach(&mut self, watch: WatchDescriptor) {
        let Some(node) = self.nodes.get_mut(&watch) else { return };
        let (parent, name) = (node.parent.take(), std::mem::take(&mut node.name));
        if let Some(parent) = parent.and_then(|parent| self.nodes.get_mut(&parent)) {
            parent.children.remove(&name);
        }
    }

    /// Puts a detached directory somewhere. Nothing may be there. A walk that has passed there counts all of it as seen.
    pub(super) fn attach(&mut self, watch: WatchDescriptor, parent: WatchDescriptor, name: &OsStr) {
        if let Some(node) = self.nodes.get_mut(&watch) {
            node.parent = Some(parent);
            node.name = name.to_owned();
        }
        let mut left = vec![watch];
        while let Some(node) = left.pop().and_then(|watch| self.nodes.get_mut(&watch)) {
            node.walk = self.walk;
            left.extend(node.children.values());
        }
        if let Some(parent) = self.nodes.get_mut(&parent) {
            parent.children.insert(name.to_owned(), watch);
        }
    }

    /// Forgets a directory and all below it, and says which watches that were.
    pub(super) fn remove(&mut self, watch: WatchDescriptor) -> Vec<WatchDescriptor> {
        self.detach(watch);
        if self.root == Some(watch) {
            self.root = None;
        }
        let mut removed = Vec::new();
        let mut left = vec![watch];
        while let Some(watch) = left.pop() {
            if let Some(node) = self.nodes.remove(&watch) {
                left.extend(node.children.into_values());
                removed.push(watch);
            }
        }
        removed
    }

    /// Begins to look at the whole tree again; see [`Tree::unseen`]. Says which walk it is.
    pub(super) fn begin_walk(&mut self) -> u32 {
        self.walk += 1;
        let (root, walk) = (self.root, self.walk);
        if let Some(root) = root.and_then(|root| self.nodes.get_mut(&root)) {
            root.walk = walk;
        }
        walk
    }

    pub(super) fn see(&mut self, watch: WatchDescriptor) {
        if let Some(node) = self.nodes.get_mut(&watch) {
            node.walk = self.walk;
        }
    }

    /// What this walk did not meet: it is not there any more. Nothing when another walk has begun since.
    pub(super) fn unseen(&self, walk: u32) -> Vec<WatchDescriptor> {
        let nodes = self.nodes.iter().filter(|(_, node)| walk == self.walk && node.walk != walk);
        nodes.map(|(watch, _)| *watch).collect()
    }
}
