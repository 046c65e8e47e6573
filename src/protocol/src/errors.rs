//! The JSON error bodies that SDKs read.

use serde::{Deserialize, Serialize};

/// What a client looks for in a 502 to know that its sandbox is gone (contract: control-plane.md section 3.2).
pub const NOT_FOUND_MESSAGE: &str = "The sandbox was not found";

/// What a client looks for in a 502 to know that nothing listens on the port.
pub const PORT_CLOSED_MESSAGE: &str = "The sandbox is running but port is not open";

/// `code` is the HTTP status: the JavaScript SDKs decide by it, not by the status line.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ErrorBody {
    pub code: u16,
    pub message: String,
}

/// The proxy's 502 for a sandbox that is gone.
#[derive(Clone, Debug, Serialize)]
pub struct SandboxGone<'a> {
    #[serde(rename = "sandboxId")]
    pub sandbox_id: &'a str,
    pub message: &'static str,
    pub code: u16,
    /// Additive: why it ended, for whoever reads the body.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'a str>,
}

impl<'a> SandboxGone<'a> {
    pub fn new(sandbox_id: &'a str, reason: Option<&'a str>) -> Self {
        Self { sandbox_id, message: NOT_FOUND_MESSAGE, code: 502, reason }
    }
}

/// The proxy's 502 for a port that nothing listens on.
#[derive(Clone, Debug, Serialize)]
pub struct PortClosed<'a> {
    #[serde(rename = "sandboxId")]
    pub sandbox_id: &'a str,
    pub message: &'static str,
    pub port: u16,
    pub code: u16,
}

impl<'a> PortClosed<'a> {
    pub fn new(sandbox_id: &'a str, port: u16) -> Self {
        Self { sandbox_id, message: PORT_CLOSED_MESSAGE, port, code: 502 }
    }
}
