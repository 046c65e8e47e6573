//! Holds for every call, by what the routes table says that the call means.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use guestd_idle::HoldClass;
use guestd_protocol::errors::{ErrorBody, NOT_FOUND_MESSAGE};
use guestd_protocol::routes::{self, Usage};

use super::Activity;
use super::body::HeldBody;

/// Admits the call, holds while it runs, and answers "sandbox was not found" when the sandbox was released while the call waited.
pub async fn hold(State(activity): State<Arc<Activity>>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    // A path that is not in the table becomes a 404 and nobody's use.
    let Some(route) = routes::find(path) else { return next.run(request).await };
    let class = match route.usage {
        Usage::Never => return next.run(request).await,
        Usage::Call | Usage::Process | Usage::Watch => HoldClass::Call,
        Usage::Transfer => HoldClass::Transfer,
    };
    let origin = format!("{} {path}", request.method());
    let Ok(hold) = activity.admit(class, &origin).await else { return gone() };
    let hold = Arc::new(hold);
    match route.usage {
        Usage::Transfer => {
            let request = request.map(|body| HeldBody::wrap(body, Arc::clone(&hold)));
            next.run(request).await.map(|body| HeldBody::wrap(body, hold))
        }
        Usage::Call => next.run(request).await.map(|body| HeldBody::wrap(body, hold)),
        // The process or the watch has a hold of its own by the time that the answer begins.
        Usage::Process | Usage::Watch | Usage::Never => next.run(request).await,
    }
}

fn gone() -> Response {
    let body = ErrorBody { code: 502, message: NOT_FOUND_MESSAGE.to_owned() };
    (StatusCode::BAD_GATEWAY, axum::Json(body)).into_response()
}
