//! Simulated guests, for `cargo xtask simulate`: no machine is started. An agent already listens on each Unix socket of one folder; a
//! sandbox takes one of them into its run folder. The guard around it has nothing to run, but keeps the hard end as ever.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Image, Plan, Runtime, Size, StartError};
use crate::link::{Socket, Transport};

/// In the run folder.
const SOCKET: &str = "agent.sock";

/// The `simulated` runtime.
#[derive(Debug)]
pub struct Simulated {
    /// Where agents listen that no sandbox has taken yet.
    pub guests: PathBuf,
}

impl Runtime for Simulated {
    fn name(&self) -> &'static str {
        "simulated"
    }

    fn plan(&self, _id: &str, folder: &Path, _image: &Image, _size: Size) -> Result<Plan, StartError> {
        let at = |source| StartError::Folder { path: self.guests.clone(), source };
        for entry in fs::read_dir(&self.guests).map_err(at)? {
            // A socket stays what it is when it is moved, and only one sandbox can move it.
            if fs::rename(entry.map_err(at)?.path(), folder.join(SOCKET)).is_ok() {
                return Ok(Plan::default());
            }
        }
        Err(StartError::Missing(format!("no simulated guest is left in {}", self.guests.display())))
    }

    fn transport(&self, folder: &Path) -> Transport {
        Transport::Unix(Socket { folder: folder.to_owned(), name: SOCKET.to_owned() })
    }

    fn boot_limit(&self) -> Duration {
        Duration::from_secs(10)
    }
}
