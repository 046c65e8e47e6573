//! The body of `POST /init` (contract: envd.md section 4.3).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The value of [`InitRequest::thaw`] that leaves the workload frozen.
pub const THAW_SKIP: &str = "skip";

/// An NFS export and where it goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeMount {
    /// `<address>:<path of the export>`.
    pub nfs_target: String,
    pub path: String,
}

/// All fields are optional; an empty body is valid. Unknown fields are ignored, as in envd.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct InitRequest {
    /// Replaces all variables of the user; absent leaves them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env_vars: Option<BTreeMap<String, String>>,
    /// Absent on an accepted request clears the token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access_token: Option<String>,
    /// RFC 3339: sets the clock, and orders the calls.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timestamp: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_user: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_workdir: Option<String>,
    /// The address of the platform's event gateway: a line of `/etc/hosts` and `E2B_EVENTS_ADDRESS`.
    #[serde(rename = "hyperloopIP", skip_serializing_if = "Option::is_none")]
    pub hyperloop_ip: Option<String>,
    /// Certificates in PEM that the machine trusts from now on, in place of the ones that an earlier call brought.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_bundle: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volume_mounts: Option<Vec<VolumeMount>>,
    /// Names one life of the machine: another one than before says that it was restored from a snapshot.
    #[serde(rename = "lifecycleID", skip_serializing_if = "Option::is_none")]
    pub lifecycle_id: Option<String>,
    /// How many processors shall be online (contract: envd.md section 12).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_count: Option<u32>,
    /// [`THAW_SKIP`] leaves a frozen workload frozen; anything else thaws before the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thaw: Option<String>,
    /// Ours, additive: random bytes in base64, so that two clones of one snapshot do not draw the same numbers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entropy: Option<String>,
    /// Ours, additive: the sandbox's id and template, for `E2B_SANDBOX_ID`, `E2B_TEMPLATE_ID` and the host name.
    #[serde(rename = "sandboxID", skip_serializing_if = "Option::is_none")]
    pub sandbox_id: Option<String>,
    #[serde(rename = "templateID", skip_serializing_if = "Option::is_none")]
    pub template_id: Option<String>,
    /// Ours, additive: the agent powers the machine off after so many milliseconds by itself, should every guard outside have failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_lifetime_ms: Option<u64>,
    /// Ours, additive: how classes of use count in this sandbox, as `guestd_idle::Policy::words` has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle_policy: Option<BTreeMap<String, String>>,
    /// Ours, additive: how long inhibitors may hold this sandbox in all, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inhibitor_budget_ms: Option<u64>,
    /// Ours, additive: limits of each command that brings none of its own. Replaces all three; absent leaves them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process_limits: Option<ProcessLimits>,
}

/// What one command may use with all that it starts; what is absent is not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ProcessLimits {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Of one processor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_percent: Option<u32>,
    /// Processes and threads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pids: Option<u32>,
}
