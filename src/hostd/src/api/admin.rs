//! hostd's own calls: why a sandbox is alive or gone, and the metrics. Looking is never use.

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::IntoResponse;

use super::{Api, ApiError};
use crate::ids;
use crate::lifetime::Found;
use crate::lifetime::explain::{self, Explanation};
use crate::lifetime::upgrade::{UpgradeError, Upgraded};

pub(super) async fn explain(
    State(api): State<Api>,
    Path(id): Path<String>,
) -> Result<axum::Json<Explanation>, ApiError> {
    let known = ids::normalise(&id).ok_or_else(|| ApiError::bad_request("Invalid sandbox ID"))?;
    let explanation = match api.sandboxes.find(known) {
        Some(Found::Live(sandbox)) => explain::live(&sandbox),
        Some(Found::Gone(tombstone)) => explain::gone(&tombstone),
        None => return Err(ApiError::no_sandbox(known)),
    };
    Ok(axum::Json(explanation))
}

/// Replaces a sandbox's agent while everything in it runs on: by the program in the body, or by itself.
pub(super) async fn upgrade(
    State(api): State<Api>,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Result<axum::Json<Upgraded>, ApiError> {
    let sandbox = api.sandbox(&id)?;
    let passed = ["content-type", "content-length", "content-digest", "x-envd-upgrade-bin"];
    let headers = headers.into_iter().filter_map(|(name, value)| Some((name?, value)));
    let headers = headers.filter(|(name, _)| passed.contains(&name.as_str())).collect();
    let upgraded = sandbox.upgrade(headers, body).await;
    Ok(axum::Json(upgraded?))
}

impl From<UpgradeError> for ApiError {
    fn from(error: UpgradeError) -> Self {
        let status = match &error {
            UpgradeError::Refused { status, .. } => *status,
            UpgradeError::Link(_) | UpgradeError::Lost => StatusCode::BAD_GATEWAY,
        };
        Self::new(status, error.to_string())
    }
}

pub(super) async fn tombstones(State(api): State<Api>) -> axum::Json<Vec<Explanation>> {
    axum::Json(api.sandboxes.tombstones().iter().map(|tombstone| explain::gone(tombstone)).collect())
}

pub(super) async fn metrics(State(api): State<Api>) -> impl IntoResponse {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let holds: Vec<_> = api.sandboxes.all_live().iter().flat_map(|sandbox| explain::holds(sandbox)).collect();
    let holds = holds.iter().map(|hold| (hold.class.as_str(), hold.side.as_str()));
    ([(header::CONTENT_TYPE, kind)], api.sandboxes.metrics.text(holds))
}
