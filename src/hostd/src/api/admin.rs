//! hostd's own calls: why a sandbox is alive or gone, and the metrics. Looking is never use.

use axum::extract::{Path, State};
use axum::http::header;
use axum::response::IntoResponse;

use super::{Api, ApiError};
use crate::ids;
use crate::lifetime::Found;
use crate::lifetime::explain::{self, Explanation};

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

pub(super) async fn tombstones(State(api): State<Api>) -> axum::Json<Vec<Explanation>> {
    axum::Json(api.sandboxes.tombstones().iter().map(|tombstone| explain::gone(tombstone)).collect())
}

pub(super) async fn metrics(State(api): State<Api>) -> impl IntoResponse {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let holds: Vec<_> = api.sandboxes.all_live().iter().flat_map(|sandbox| explain::holds(sandbox)).collect();
    let holds = holds.iter().map(|hold| (hold.class.as_str(), hold.side.as_str()));
    ([(header::CONTENT_TYPE, kind)], api.sandboxes.metrics.text(holds))
}
