//! An agent that is replaced while its sandbox lives: after it nobody is served before the host has said who it is.

use std::sync::PoisonError;
use std::time::Duration;

use axum::body::Body;
use guestd_protocol::init::InitRequest;
use http::{HeaderMap, StatusCode};
use serde::Serialize;

use super::Sandbox;
use crate::clock;
use crate::link::LinkError;

/// How long the new agent may take to come, and the pause between two tries.
const COME_LIMIT: Duration = Duration::from_secs(15);
const TRY_AGAIN: Duration = Duration::from_millis(20);

/// A replaced agent.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Upgraded {
    pub envd_version: String,
    /// What the new agent took over, as it says it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub handover: Option<serde_json::Value>,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum UpgradeError {
    #[error("{text}")]
    Refused { status: StatusCode, text: String },
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("the new agent did not answer within {} s", COME_LIMIT.as_secs())]
    Lost,
}

impl Sandbox {
    /// Replaces the agent: by the program in `body`, or by itself when that is empty.
    ///
    /// # Errors
    /// An [`UpgradeError`]; the old agent goes on, unless it is [`UpgradeError::Lost`].
    pub async fn upgrade(&self, headers: HeaderMap, body: Body) -> Result<Upgraded, UpgradeError> {
        self.handover.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((status, text)) = self.link.upgrade(headers, body).await? {
            return Err(UpgradeError::Refused { status, text });
        }
        let greeted = async {
            loop {
                match self.greet().await {
                    Ok(version) => return version,
                    Err(error) => {
                        tracing::debug!(sandbox = self.record.id, %error, "the new agent is not up yet")
                    }
                }
                tokio::time::sleep(TRY_AGAIN).await;
            }
        };
        let version =
            tokio::time::timeout(COME_LIMIT, greeted).await.map_err(|_elapsed| UpgradeError::Lost)?;
        let handover = self.handover.lock().unwrap_or_else(PoisonError::into_inner).take();
        let handover = handover.and_then(|text| serde_json::from_str(&text).ok());
        Ok(Upgraded { envd_version: version, handover })
    }

    /// Says to an agent that was replaced who its host is: the credentials are the same, and so is the machine's life.
    ///
    /// # Errors
    /// What the agent answered, or that it did not.
    pub(super) async fn greet(&self) -> Result<String, LinkError> {
        let request = InitRequest {
            access_token: Some(self.record.access_token.clone()),
            timestamp: Some(clock::rfc3339(clock::wall_ms())),
            lifecycle_id: Some(self.record.id.clone()),
            ..InitRequest::default()
        };
        let greeting = self.link.greet(&request).await?;
        if let Some(handover) = greeting.handover {
            tracing::info!(
                sandbox = self.record.id,
                handover,
                version = greeting.version,
                "the agent was replaced"
            );
            *self.handover.lock().unwrap_or_else(PoisonError::into_inner) = Some(handover);
        }
        Ok(greeting.version)
    }
}
