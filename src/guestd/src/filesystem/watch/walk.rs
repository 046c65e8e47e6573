//! The walk through a whole tree: at the start of a recursive watch, and when events were lost.
//!
//! The engine is held for one directory at a time, so that a tree of a hundred thousand does not keep the others from hearing.

use std::ffi::OsString;
use std::rc::Rc;
use std::time::Instant;

use nix::sys::inotify::WatchDescriptor;
use tokio::sync::Mutex;

use super::WatchError;
use super::directory::{Directory, is_passing};
use super::engine::{Engine, Entered, Key};

struct Visit {
    within: Rc<Directory>,
    parent: WatchDescriptor,
    name: OsString,
}

/// Watches every directory below the root of a watcher, and forgets those that are gone. Blocking.
///
/// # Errors
/// The limits of watchers and of the kernel, or a directory that cannot be read although it is there.
pub(super) fn walk(engine: &Mutex<Engine>, key: Key) -> Result<(), WatchError> {
    let Some((spec, identity, watch, number)) = engine.blocking_lock().begin_walk(key) else { return Ok(()) };
    let unreadable = |source| WatchError::io(&spec.path, source);
    let root = spec.open(identity, "".as_ref()).map_err(unreadable)?;
    let mut visits = Vec::new();
    let push = |directory: Directory, parent, visits: &mut Vec<Visit>| {
        let entries = match spec.look(|| directory.entries(0)) {
            Err(error) if is_passing(&error) => return Ok(()),
            entries => entries.map_err(unreadable)?,
        };
        let within = Rc::new(directory);
        visits.extend(entries.into_iter().rev().map(|entry| Visit {
            within: Rc::clone(&within),
            parent,
            name: entry.name,
        }));
        Ok::<_, WatchError>(())
    };
    push(root, watch, &mut visits)?;
    while let Some(visit) = visits.pop() {
        let directory = match spec.look(|| visit.within.child(&visit.name)) {
            Err(error) if is_passing(&error) => continue,
            opened => opened.map_err(unreadable)?,
        };
        let mut engine = engine.blocking_lock();
        match engine.enter(key, visit.parent, &visit.name, &directory)? {
            Entered::New(watch, _) | Entered::Known(watch) => {
                drop(engine);
                push(directory, watch, &mut visits)?;
            }
            Entered::Elsewhere => engine.look_again(key, visit.parent, &visit.name, Instant::now()),
            Entered::Not => {}
        }
    }
    engine.blocking_lock().end_walk(key, number);
    Ok(())
}
