//! What is written down about a sandbox, while it lives and after it ended.

use std::collections::BTreeMap;

use guestd_idle::EndReason;
use serde::{Deserialize, Serialize};

use crate::lifetime::explain::{HoldView, TransitionView};
use crate::runtime::Placement;

/// How far a sandbox had come when its record was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Not answered to anybody yet: a restarted supervisor removes it.
    Creating,
    Running,
}

/// The process that ends a sandbox when the supervisor cannot: its pid, and when it started, because pids come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuardId {
    pub pid: i32,
    pub start_ticks: u64,
}

/// A sandbox. Moments are nanoseconds since the boot named by `boot_id`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    pub id: String,
    pub stage: Stage,
    pub boot_id: String,
    pub template: String,
    pub alias: String,
    pub envd_version: String,
    pub access_token: String,
    pub control: String,
    pub metadata: BTreeMap<String, String>,
    pub started_wall_ms: i64,
    pub started: u64,
    pub end: u64,
    pub last_end: u64,
    pub idle_timeout_ms: Option<u64>,
    /// It ends with the connection that created it, or when nothing was heard from there for so long.
    #[serde(default)]
    pub session_ms: Option<u64>,
    /// What the Deno front door's clients call it by.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    pub cpu_count: u32,
    pub memory_mb: u32,
    pub disk_mb: u32,
    /// Where it runs; none until its guard has started.
    pub placement: Option<Placement>,
}

/// What is left of a sandbox.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Tombstone {
    pub id: String,
    pub template: String,
    pub metadata: BTreeMap<String, String>,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// So that a client which knows only its token gets the same answer as one that knows the id.
    pub access_token: String,
    pub reason: EndReason,
    /// More about the reason, where there is more: what the VM or the agent said.
    pub detail: Option<String>,
    pub started_wall_ms: i64,
    pub ended_wall_ms: i64,
    pub lived_ms: u64,
    pub idle_for_ms: u64,
    pub last_holds: Vec<HoldView>,
    pub transitions: Vec<TransitionView>,
}

#[cfg(test)]
impl Record {
    pub(super) fn example(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            stage: Stage::Running,
            boot_id: String::new(),
            template: "base".to_owned(),
            alias: "base".to_owned(),
            envd_version: "0.6.4".to_owned(),
            access_token: "t".to_owned(),
            control: "c".to_owned(),
            metadata: BTreeMap::new(),
            started_wall_ms: 0,
            started: 0,
            end: 0,
            last_end: 0,
            idle_timeout_ms: None,
            session_ms: None,
            labels: BTreeMap::new(),
            cpu_count: 1,
            memory_mb: 512,
            disk_mb: 512,
            placement: None,
        }
    }
}

#[cfg(test)]
impl Tombstone {
    pub(super) fn example(id: &str, ended_wall_ms: i64) -> Self {
        Self {
            id: id.to_owned(),
            template: "base".to_owned(),
            metadata: BTreeMap::new(),
            labels: BTreeMap::new(),
            access_token: "t".to_owned(),
            reason: EndReason::Idle,
            detail: None,
            started_wall_ms: 0,
            ended_wall_ms,
            lived_ms: 0,
            idle_for_ms: 0,
            last_holds: Vec::new(),
            transitions: Vec::new(),
        }
    }
}
