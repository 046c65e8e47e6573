//! What `POST /init` sets and every other capability reads: default user, default working directory and environment.
//!
//! Owns nothing but these values. Access tokens live in [`crate::access`].

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

use crate::cgroup::Limits;

/// The user that an agent runs commands as until `/init` says otherwise (contract: envd.md section 0).
const BUILT_IN_USER: &str = "root";

/// One consistent set of values; a reader that needs two of them takes them from one snapshot.
#[derive(Clone, Debug)]
pub struct Values {
    pub default_user: String,
    pub default_workdir: Option<String>,
    /// Variables from `/init`, given to every command.
    pub environment: BTreeMap<String, String>,
    /// Variables of the agent's own (`E2B_SANDBOX` and the like), which `/init` cannot change.
    pub internal_environment: BTreeMap<String, String>,
    /// For commands that bring no limits of their own.
    pub process_limits: Limits,
}

/// The shared settings.
#[derive(Debug)]
pub struct Settings {
    values: RwLock<Values>,
}

impl Settings {
    pub fn new(in_vm: bool) -> Self {
        let internal = BTreeMap::from([("E2B_SANDBOX".to_owned(), in_vm.to_string())]);
        Self {
            values: RwLock::new(Values {
                default_user: BUILT_IN_USER.to_owned(),
                default_workdir: None,
                environment: BTreeMap::new(),
                internal_environment: internal,
                process_limits: Limits::default(),
            }),
        }
    }

    pub fn snapshot(&self) -> Values {
        self.values.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn update(&self, change: impl FnOnce(&mut Values)) {
        change(&mut self.values.write().unwrap_or_else(PoisonError::into_inner));
    }
}
