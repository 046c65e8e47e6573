//! What `POST /init` sets and every other capability reads: default user, default working directory and environment.
//!
//! Owns nothing but these values. Access tokens live in [`crate::access`].

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

use tokio::sync::watch;

use crate::cgroup::Limits;

/// The user that an agent runs commands as until `/init` says otherwise (contract: envd.md section 0).
const BUILT_IN_USER: &str = "root";

/// The names of the agent's own variables. They say where a command runs, so nobody else may set them, even where the agent has no value.
const OWN_VARIABLES: [&str; 4] = ["E2B_SANDBOX", "E2B_SANDBOX_ID", "E2B_TEMPLATE_ID", "E2B_EVENTS_ADDRESS"];

/// One consistent set of values; a reader that needs two of them takes them from one snapshot.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
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

impl Values {
    /// Takes the variables of `/init` in place of earlier ones, but for those that are the agent's own (contract: envd.md section 4.3).
    pub fn set_environment(&mut self, mut variables: BTreeMap<String, String>) {
        variables.retain(|name, _| !OWN_VARIABLES.contains(&name.as_str()));
        self.environment = variables;
    }
}

/// The shared settings.
#[derive(Debug)]
pub struct Settings {
    values: RwLock<Values>,
    changed: watch::Sender<bool>,
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
            changed: watch::Sender::new(false),
        }
    }

    pub fn snapshot(&self) -> Values {
        self.values.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn update(&self, change: impl FnOnce(&mut Values)) {
        change(&mut self.values.write().unwrap_or_else(PoisonError::into_inner));
        self.changed.send_if_modified(|changed| !std::mem::replace(changed, true));
    }

    /// Waits until somebody has changed them.
    pub async fn first_change(&self) {
        // The sender lives as long as `self`.
        drop(self.changed.subscribe().wait_for(|changed| *changed).await);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_own_variables_cannot_come_from_a_host() {
        let mut values = Settings::new(false).snapshot();
        let given = OWN_VARIABLES.map(|name| (name.to_owned(), "mine".to_owned()));
        values.set_environment(given.into_iter().chain([("A".to_owned(), "1".to_owned())]).collect());
        assert_eq!(values.environment, BTreeMap::from([("A".to_owned(), "1".to_owned())]));
    }
}
