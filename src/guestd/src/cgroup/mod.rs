//! Control groups (cgroup v2): one for each command, so that its limits are kept and its whole tree ends together.
//!
//! [`Cgroups`] finds a hierarchy that is the agent's to use, divides it into `user` and `ptys` (contract: envd.md section 2.13) and makes a
//! child of one of them for each command. The agent stays outside of both. Without such a hierarchy commands run without groups:
//! their process groups are signalled instead, and a request for limits is refused.
//!
//! Whose hierarchy it is: a machine's and a container's own; below the agent's own group when the service manager delegated that; or what
//! `--cgroup-root` names. Nothing else is written to.

mod group;
mod limits;
mod place;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

pub use group::{Group, GroupUsage};
pub use limits::{LimitError, Limits};
pub use place::Choice;

/// What commands are told to be limited by, where the kernel has it.
const CONTROLLERS: [&str; 4] = ["cpu", "io", "memory", "pids"];

/// How often a name is tried that somebody else took.
const NAME_ATTEMPTS: usize = 64;

/// The two kinds of commands, which weigh differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Command,
    Terminal,
}

impl Kind {
    const ALL: [Self; 2] = [Self::Command, Self::Terminal];

    /// Name, CPU weight and I/O weight (contract: envd.md section 2.13).
    const fn group(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Command => ("user", "50", "default 10"),
            Self::Terminal => ("ptys", "200", "default 50"),
        }
    }
}

/// Why a command gets no group.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// Somebody stopped all commands; a new one would hang.
    #[error("commands are frozen: the control group {} is", .0.display())]
    Frozen(PathBuf),
    #[error("limits: the {controller} limit cannot be kept here: {why}")]
    NoLimit { controller: &'static str, why: String },
    #[error("limits: a command with the tag _system runs in the agent's own group, which has none")]
    System,
    #[error("limits: {file} could not be set: {source}")]
    Refused { file: &'static str, source: io::Error },
}

/// The hierarchy of one agent.
#[derive(Debug)]
pub struct Cgroups {
    tree: Result<Tree, String>,
    /// It was said that limits of `/init` are not kept.
    warned: Once,
}

#[derive(Debug)]
struct Tree {
    root: PathBuf,
    /// What is enabled for the groups of commands.
    controllers: Vec<&'static str>,
    next: AtomicU64,
}

impl Cgroups {
    /// Prepares the hierarchy. One that cannot be used is none: said once, in the log.
    pub fn prepare(choice: &Choice) -> Self {
        Self::resume(choice, &[])
    }

    /// As [`Cgroups::prepare`], where some groups have commands in them that are this agent's, `kept`.
    pub fn resume(choice: &Choice, kept: &[PathBuf]) -> Self {
        let tree =
            place::find(choice).and_then(|root| Tree::new(&root, kept).map_err(|error| format!("{error:#}")));
        match &tree {
            Ok(tree) => {
                tracing::info!(root = %tree.root.display(), controllers = ?tree.controllers, "control groups");
            }
            Err(why) => tracing::info!(%why, "commands get no control groups"),
        }
        Self { tree, warned: Once::new() }
    }

    /// Makes the group of a new command. `asked` are its own limits, `defaults` those that `/init` gave.
    ///
    /// # Errors
    /// A [`GroupError`]. `Ok(None)` when there are no groups here and none is needed.
    pub fn make(&self, kind: Kind, asked: Limits, defaults: Limits) -> Result<Option<Group>, GroupError> {
        if let Some((controller, ..)) = defaults.files().find(|(needed, ..)| !self.has(needed)) {
            self.warned.call_once(|| {
                tracing::warn!(controller, "the limits of /init are not kept: the controller is missing");
            });
        }
        let tree = match &self.tree {
            Ok(tree) => tree,
            Err(why) => {
                return match asked.files().next() {
                    Some((controller, ..)) => Err(GroupError::NoLimit { controller, why: why.clone() }),
                    None => Ok(None),
                };
            }
        };
        tree.check_thawed(kind)?;
        if let Some((controller, ..)) = asked.files().find(|(needed, ..)| !tree.controllers.contains(needed))
        {
            let why = "the machine has no such controller in its cgroup v2 hierarchy".to_owned();
            return Err(GroupError::NoLimit { controller, why });
        }
        let group = match tree.make(kind) {
            Ok(group) => group,
            Err(source) if asked != Limits::default() => {
                return Err(GroupError::Refused { file: "a control group", source });
            }
            Err(error) => {
                tracing::warn!(%error, "a command runs without a control group");
                return Ok(None);
            }
        };
        for (controller, file, text) in asked.or(defaults).files() {
            if !tree.controllers.contains(&controller) {
                continue;
            }
            if let Err(source) = fs::write(group.path().join(file), text) {
                group.remove_when_empty();
                return Err(GroupError::Refused { file, source });
            }
        }
        Ok(Some(group))
    }

    /// How an agent that takes this one's place finds the same hierarchy: this one may have moved itself meanwhile.
    pub fn choice(&self) -> Choice {
        self.tree.as_ref().map_or(Choice::Off, |tree| Choice::At(tree.root.clone()))
    }

    fn has(&self, controller: &str) -> bool {
        self.tree.as_ref().is_ok_and(|tree| tree.controllers.contains(&controller))
    }

    /// The groups that hold all commands and all terminals, for whoever stops them; none without a hierarchy.
    pub fn directories(&self) -> Vec<PathBuf> {
        self.tree
            .as_ref()
            .map_or_else(|_| Vec::new(), |tree| Kind::ALL.map(|kind| tree.directory(kind)).into())
    }
}

impl Tree {
    fn new(root: &Path, kept: &[PathBuf]) -> io::Result<Self> {
        let mut tree = Self { root: root.to_owned(), controllers: Vec::new(), next: AtomicU64::new(1) };
        for kind in Kind::ALL {
            place::make_directory(&tree.directory(kind))?;
        }
        let mut controllers = enable(root, &CONTROLLERS)?;
        let memory = memory_for_commands();
        for kind in Kind::ALL {
            let (_, cpu, io) = kind.group();
            let directory = tree.directory(kind);
            for (controller, file, text) in [
                ("cpu", "cpu.weight", cpu.to_owned()),
                ("io", "io.weight", io.to_owned()),
                ("memory", "memory.high", memory.clone()),
                ("memory", "memory.max", memory.clone()),
            ] {
                if controllers.contains(&controller)
                    && let Err(error) = fs::write(directory.join(file), text)
                {
                    tracing::debug!(directory = %directory.display(), file, %error, "not set");
                }
            }
            controllers = enable(&directory, &controllers)?;
            tree.sweep(&directory, kept);
        }
        tree.controllers = controllers;
        Ok(tree)
    }

    fn directory(&self, kind: Kind) -> PathBuf {
        self.root.join(kind.group().0)
    }

    fn check_thawed(&self, kind: Kind) -> Result<(), GroupError> {
        let directory = self.directory(kind);
        // Frozen from here or from above.
        for group in [&directory, &self.root] {
            let state = fs::read(group.join("cgroup.freeze")).unwrap_or_default();
            if state.first() == Some(&b'1') {
                return Err(GroupError::Frozen(group.clone()));
            }
        }
        Ok(())
    }

    fn make(&self, kind: Kind) -> io::Result<Group> {
        let directory = self.directory(kind);
        let mut attempts = 0;
        loop {
            let path = directory.join(format!("c-{}", self.next.fetch_add(1, Ordering::Relaxed)));
            match fs::create_dir(&path) {
                Ok(()) => return Ok(Group::at(path)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && attempts < NAME_ATTEMPTS => {
                    attempts += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Removes what an agent before this one left empty, now or when it is, and keeps clear of the numbers of what still lives.
    fn sweep(&self, directory: &Path, kept: &[PathBuf]) {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let Some(number) = name.to_str().and_then(|name| name.strip_prefix("c-")?.parse::<u64>().ok())
            else {
                continue;
            };
            self.next.fetch_max(number.saturating_add(1), Ordering::Relaxed);
            if kept.contains(&entry.path()) || fs::remove_dir(entry.path()).is_ok() {
                continue;
            }
            if tokio::runtime::Handle::try_current().is_ok() {
                Group::at(entry.path()).remove_when_empty();
            }
        }
    }
}

/// Gives the children of `directory` the controllers of `wanted` that it has itself; returns those.
fn enable(directory: &Path, wanted: &[&'static str]) -> io::Result<Vec<&'static str>> {
    let available = fs::read_to_string(directory.join("cgroup.controllers"))?;
    let mut enabled: Vec<&'static str> = wanted
        .iter()
        .copied()
        .filter(|name| available.split_whitespace().any(|found| found == *name))
        .collect();
    let write = |text: String| fs::write(directory.join("cgroup.subtree_control"), text);
    // All at once: each write rebuilds the tree. One by one when one of them is refused.
    let all: Vec<_> = enabled.iter().map(|name| format!("+{name}")).collect();
    if !all.is_empty() && write(all.join(" ")).is_err() {
        enabled.retain(|controller| match write(format!("+{controller}")) {
            Ok(()) => true,
            Err(error) => {
                tracing::debug!(directory = %directory.display(), controller, %error, "controller not enabled");
                false
            }
        });
    }
    Ok(enabled)
}

/// The machine's memory without an eighth, and that without 128 MiB at most: the agent and the kernel keep some (contract: envd.md section
/// 2.13). Both groups get as much.
fn memory_for_commands() -> String {
    const RESERVE: u64 = 128 << 20;
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok())
        .map(|kib| kib * 1024);
    total.map_or_else(|| "max".to_owned(), |total| (total - (total / 8).min(RESERVE)).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder that looks like a hierarchy; writes to it are kept as files.
    fn hierarchy(controllers: &str) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for group in ["", "user", "ptys"] {
            let group = root.path().join(group);
            fs::create_dir_all(&group).unwrap();
            fs::write(group.join("cgroup.controllers"), controllers).unwrap();
            fs::write(group.join("cgroup.freeze"), "0\n").unwrap();
        }
        root
    }

    fn cgroups(root: &tempfile::TempDir) -> Cgroups {
        Cgroups { tree: Tree::new(root.path(), &[]).map_err(|error| error.to_string()), warned: Once::new() }
    }

    #[test]
    fn each_command_has_a_group_of_its_kind_with_its_limits() {
        let root = hierarchy("cpuset cpu io memory pids\n");
        let cgroups = cgroups(&root);
        let read = |path: &str| fs::read_to_string(root.path().join(path)).unwrap();
        assert_eq!((read("user/cpu.weight"), read("ptys/cpu.weight")), ("50".to_owned(), "200".to_owned()));
        let asked = Limits { pids: Some(7), ..Limits::default() };
        let defaults = Limits { pids: Some(9), cpu_percent: Some(50), ..Limits::default() };
        let first = cgroups.make(Kind::Command, asked, defaults).unwrap().unwrap();
        let second = cgroups.make(Kind::Terminal, Limits::default(), defaults).unwrap().unwrap();
        assert_eq!(
            (read("user/c-1/pids.max"), read("user/c-1/cpu.max")),
            ("7".into(), "50000 100000".into())
        );
        assert_eq!(read("ptys/c-2/pids.max"), "9");
        assert!(first.path().ends_with("user/c-1") && second.path().ends_with("ptys/c-2"));
    }

    #[test]
    fn a_limit_without_its_controller_is_refused_and_a_default_is_not() {
        let root = hierarchy("cpu pids\n");
        let cgroups = cgroups(&root);
        let memory = Limits { memory: Some(1 << 30), ..Limits::default() };
        let refused = cgroups.make(Kind::Command, memory, Limits::default()).unwrap_err();
        assert!(matches!(refused, GroupError::NoLimit { controller: "memory", .. }), "{refused}");
        assert!(cgroups.make(Kind::Command, Limits::default(), memory).unwrap().is_some());
        let none = Cgroups::prepare(&Choice::Off);
        assert!(none.make(Kind::Command, Limits::default(), memory).unwrap().is_none());
        assert!(none.make(Kind::Command, memory, Limits::default()).is_err());
    }

    #[test]
    fn a_frozen_group_takes_no_command() {
        let root = hierarchy("");
        let cgroups = cgroups(&root);
        fs::write(root.path().join("user/cgroup.freeze"), "1\n").unwrap();
        let refused = cgroups.make(Kind::Command, Limits::default(), Limits::default()).unwrap_err();
        assert!(matches!(refused, GroupError::Frozen(_)));
        assert!(cgroups.make(Kind::Terminal, Limits::default(), Limits::default()).is_ok());
    }

    #[test]
    fn what_an_agent_before_left_is_swept_and_not_mixed_up() {
        let root = hierarchy("");
        fs::create_dir_all(root.path().join("user/c-4/still-used")).unwrap();
        fs::create_dir_all(root.path().join("user/c-3")).unwrap();
        let group =
            cgroups(&root).make(Kind::Command, Limits::default(), Limits::default()).unwrap().unwrap();
        assert!(group.path().ends_with("user/c-5"));
        assert!(!root.path().join("user/c-3").exists());
    }
}
