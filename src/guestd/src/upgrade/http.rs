//! `/upgrade` on the wire, and the calls that wait while the agent is being replaced.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Extension, Router};
use http::{HeaderMap, Method, StatusCode};

use super::{DROP_PATH, UpgradeError, Upgrader, candidate};
use crate::doors::Connection;

const PATH: &str = "/upgrade";

/// Where the caller wants the program to be: the one place where it goes anyway.
const PROGRAM_HEADER: &str = "x-envd-upgrade-bin";

impl IntoResponse for UpgradeError {
    /// Plain text (contract: envd.md section 4.11).
    fn into_response(self) -> Response {
        let status = match &self {
            Self::NotInitialised | Self::Busy | Self::CodeRuns => StatusCode::CONFLICT,
            Self::Rejected(_) => StatusCode::BAD_REQUEST,
            Self::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, self.to_string()).into_response()
    }
}

pub fn routes(upgrader: Arc<Upgrader>) -> Router {
    Router::new().route(PATH, post(upgrade)).with_state(upgrader)
}

/// Before anybody is asked for a credential: an agent that no host has spoken to yet knows none. And while the agent is being replaced
/// every other call waits, for its connection to break or for the old agent to go on.
pub async fn guard(State(upgrader): State<Arc<Upgrader>>, request: Request, next: Next) -> Response {
    if request.uri().path() == PATH {
        if request.method() == Method::POST && upgrader.parts.system.is_initialised() == Some(false) {
            return UpgradeError::NotInitialised.into_response();
        }
        return next.run(request).await;
    }
    if *upgrader.shut.borrow() {
        let mut shut = upgrader.shut();
        drop(shut.wait_for(|shut| !*shut).await);
    }
    next.run(request).await
}

async fn upgrade(
    State(upgrader): State<Arc<Upgrader>>,
    connection: Option<Extension<Connection>>,
    headers: HeaderMap,
    body: Body,
) -> UpgradeError {
    let Ok(turn) = Arc::clone(&upgrader.turn).try_lock_owned() else { return UpgradeError::Busy };
    let asked = headers.get(PROGRAM_HEADER).map(|value| value.as_bytes()).unwrap_or_default();
    let wanted = format!("/{DROP_PATH}");
    if !asked.is_empty() && asked != wanted.as_bytes() {
        return UpgradeError::Rejected(format!("{PROGRAM_HEADER}: must be empty or {wanted}"));
    }
    let dropped = upgrader.drop_path();
    let path = match candidate::receive(&headers, body, &dropped).await {
        Ok(true) => dropped,
        Ok(false) => candidate::own(),
        Err(error) => return error,
    };
    // Goes on to its end when the caller goes away.
    let replacing = tokio::spawn(async move {
        let error = upgrader.replace(&path, connection.map(|connection| connection.0)).await;
        drop(turn);
        error
    });
    replacing.await.unwrap_or_else(|error| UpgradeError::Failed(error.to_string()))
}
