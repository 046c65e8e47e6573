//! `/freeze`, `/unfreeze`, `/fsfreeze`, `/fsthaw` on the wire, and the commands that wait while a freeze runs.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request as HttpRequest, State};
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use guestd_protocol::errors::ErrorBody;
use serde::Deserialize;

use super::{Busy, DEFAULT_GROUPS, Freezer, Mode, Request};

pub fn routes(freezer: Arc<Freezer>) -> Router {
    Router::new()
        .route("/freeze", post(freeze))
        .route("/unfreeze", post(unfreeze))
        .route("/fsfreeze", post(freeze_disk))
        .route("/fsthaw", post(thaw_disk))
        .with_state(freezer)
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Parameters {
    mode: Option<Mode>,
    max_cgroups: Option<usize>,
    max_wait_ms: Option<u64>,
}

impl<'de> Deserialize<'de> for Mode {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match String::deserialize(deserializer)?.as_str() {
            "" | "legacy" => Ok(Self::Legacy),
            "hierarchy" => Ok(Self::Hierarchy),
            other => Err(serde::de::Error::custom(format!("mode is legacy or hierarchy, not {other:?}"))),
        }
    }
}

async fn freeze(
    State(freezer): State<Arc<Freezer>>,
    parameters: Result<Query<Parameters>, QueryRejection>,
) -> Response {
    let parameters = match parameters {
        Ok(Query(parameters)) => parameters,
        Err(rejection) => return (StatusCode::BAD_REQUEST, rejection.body_text()).into_response(),
    };
    let max_wait = parameters.max_wait_ms.filter(|wait| *wait > 0).map(Duration::from_millis);
    let request = Request {
        mode: parameters.mode.unwrap_or_default(),
        max_groups: parameters.max_cgroups.filter(|count| *count > 0).unwrap_or(DEFAULT_GROUPS),
        max_wait,
    };
    match freezer.freeze(request).await {
        // Who did not wait for the result does not get one (contract: envd.md section 4.8).
        Ok(_) if max_wait.is_none() => StatusCode::NO_CONTENT.into_response(),
        Ok(outcome) => axum::Json(outcome).into_response(),
        Err(busy) => unavailable(busy),
    }
}

async fn unfreeze(State(freezer): State<Arc<Freezer>>) -> Response {
    match freezer.thaw().await {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(busy) => unavailable(busy),
    }
}

async fn freeze_disk(State(freezer): State<Arc<Freezer>>) -> Response {
    answer("the root file system could not be frozen", freezer.freeze_disk().await)
}

async fn thaw_disk(State(freezer): State<Arc<Freezer>>) -> Response {
    answer("the root file system could not be thawed", freezer.thaw_disk().await)
}

fn answer(what: &str, result: io::Result<()>) -> Response {
    match result {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, format!("{what}: {error}")),
    }
}

fn unavailable(busy: Busy) -> Response {
    failure(StatusCode::SERVICE_UNAVAILABLE, busy.to_string())
}

fn failure(status: StatusCode, message: String) -> Response {
    (status, axum::Json(ErrorBody { code: status.as_u16(), message })).into_response()
}

/// Keeps a command from being started in the middle of a freeze, where it would miss it; and a freeze from overlooking one.
pub async fn hold_back(State(freezer): State<Arc<Freezer>>, request: HttpRequest, next: Next) -> Response {
    if request.uri().path() != "/process.Process/Start" {
        return next.run(request).await;
    }
    // The answer's head comes when the command runs.
    let _starting = freezer.spawning().await;
    next.run(request).await
}
