//! How a sandbox is started, behind one small trait.
//!
//! A [`Runtime`] only plans: it says what is to be run and how the agent will be reached. The [`guard`], a process of its own for each
//! sandbox, does it, and ends it at its hard end even when hostd is dead. [`Machine`] is hostd's hold on a guard.

pub mod container;
pub mod guard;
pub mod image;
pub mod kvm;
mod machine;
pub mod qemu;
pub mod simulated;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::link::Transport;
use crate::store::GuardId;
pub use image::{Image, ImageError, Images};
pub use machine::{Machine, StartError, start};

/// What a sandbox gets.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    pub cpu_count: u32,
    pub memory_mb: u32,
}

/// Where a sandbox runs: all that a restarted supervisor needs to find it again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Placement {
    pub runtime: String,
    pub folder: PathBuf,
    pub guard: GuardId,
    pub transport: Transport,
}

/// What the guard is to do. Paths without a slash are in the run folder, which is its working directory.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Plan {
    /// Whom to run the programs as; the guard's own user when absent.
    pub run_as: Option<RunAs>,
    /// The programs' working directory, in the run folder; the run folder itself when absent. It is the only place that `run_as` may write to:
    /// what hostd and the guard read and write as themselves stays outside.
    pub folder: Option<String>,
    /// A writable view of a read-only tree, mounted before the start and unmounted at the end.
    pub overlay: Option<Overlay>,
    /// Files that the programs read through `/proc/self/fd/<n>`, opened before the user changes: their folders may be closed to it.
    pub inputs: Vec<Input>,
    /// A program that has to be up first: it is, when `socket` exists.
    pub helper: Option<Helper>,
    /// The program whose end is the sandbox's end; empty for a simulated guest.
    pub main: Vec<String>,
    /// Run at the end, one after the other, each for a few seconds at most.
    pub at_end: Vec<Vec<String>>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunAs {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Overlay {
    pub lower: PathBuf,
    pub upper: String,
    pub work: String,
    pub target: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Input {
    pub path: PathBuf,
    /// The descriptor's number in the programs.
    pub number: i32,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Helper {
    pub command: Vec<String>,
    pub socket: String,
}

/// A way to run sandboxes.
pub trait Runtime: Send + Sync + std::fmt::Debug {
    fn name(&self) -> &'static str;

    /// Plans a sandbox: writes what its programs need into `folder`, its run folder.
    ///
    /// # Errors
    /// With what is missing, for the operator.
    fn plan(&self, id: &str, folder: &Path, image: &Image, size: Size) -> Result<Plan, StartError>;

    /// How the agent will be reached.
    fn transport(&self, folder: &Path) -> Transport;

    /// How long from the start until the agent has to answer.
    fn boot_limit(&self) -> Duration;
}
