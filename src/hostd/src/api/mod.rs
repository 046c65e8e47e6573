//! The control plane: E2B's REST calls, which Novita's and PPIO's SDKs share, and hostd's own admin calls (contract: control-plane.md
//! section 1).
//!
//! Every answer that is not a success is JSON with the status in it, unknown routes included: the JavaScript SDKs decide by it.

mod admin;
mod error;
pub mod logs;
mod query;
mod sandboxes;
mod shapes;

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use subtle::ConstantTimeEq;

use crate::lifetime::Sandboxes;
pub use error::ApiError;

/// Longest error text of the framework's own, in bytes.
const ERROR_TEXT_LIMIT: usize = 4096;

/// What the handlers share.
#[derive(Clone, Debug)]
pub struct Api {
    pub sandboxes: Arc<Sandboxes>,
    /// The keys that are accepted; any, when there is none.
    pub keys: Arc<Vec<String>>,
}

/// The API's router.
pub fn router(api: Api) -> Router {
    Router::new()
        .route("/sandboxes", post(sandboxes::create).get(query::list_v1))
        .route("/v2/sandboxes", post(sandboxes::create).get(query::list_v2))
        .route("/sandboxes/{id}", get(query::detail).delete(sandboxes::kill))
        .route("/v2/sandboxes/{id}", delete(sandboxes::kill))
        .route("/sandboxes/{id}/timeout", post(sandboxes::set_timeout))
        .route("/sandboxes/{id}/connect", post(sandboxes::connect))
        .route("/v2/sandboxes/{id}/connect", post(sandboxes::connect))
        .route("/sandboxes/{id}/refreshes", post(sandboxes::refresh))
        .route("/sandboxes/{id}/pause", post(sandboxes::unsupported))
        .route("/sandboxes/{id}/resume", post(sandboxes::unsupported))
        .route("/sandboxes/{id}/snapshots", post(sandboxes::unsupported))
        .route("/sandboxes/{id}/fork", post(sandboxes::unsupported))
        .route("/sandboxes/{id}/metrics", get(query::metrics))
        .route("/sandboxes/{id}/logs", get(logs::v1))
        .route("/v2/sandboxes/{id}/logs", get(logs::v2))
        .route("/sandboxes/{id}/idle", get(admin::explain))
        .route("/sandboxes/{id}/upgrade", post(admin::upgrade))
        .route("/tombstones", get(admin::tombstones))
        .route("/metrics", get(admin::metrics))
        .layer(middleware::from_fn_with_state(api.clone(), authorize))
        .layer(middleware::map_response(json_errors))
        .route("/health", get(|| async { StatusCode::OK }))
        .fallback(unknown_route)
        .method_not_allowed_fallback(unknown_method)
        .with_state(api)
}

async fn unknown_route(request: Request) -> Response {
    ApiError::new(
        StatusCode::NOT_FOUND,
        format!("no such route: {} {}", request.method(), request.uri().path()),
    )
    .into_response()
}

async fn unknown_method(request: Request) -> Response {
    let message = format!("{} is not possible on {}", request.method(), request.uri().path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message).into_response()
}

/// What the framework refuses by itself (a body that is too large, a path that is no text) gets the form of our own errors.
async fn json_errors(response: Response) -> Response {
    let is_json = response
        .headers()
        .get(CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
    if is_json || !(response.status().is_client_error() || response.status().is_server_error()) {
        return response;
    }
    let (parts, body) = response.into_parts();
    let text = axum::body::to_bytes(body, ERROR_TEXT_LIMIT).await.unwrap_or_default();
    ApiError::new(parts.status, String::from_utf8_lossy(&text)).into_response()
}

async fn authorize(State(api): State<Api>, request: Request, next: Next) -> Response {
    // A page in a browser on this machine can send requests here, but not with a header of ours unless it asks first, which is refused.
    let headers = request.headers();
    if is_keyless_page(headers) {
        return ApiError::new(StatusCode::UNAUTHORIZED, "X-API-KEY: a request from a web page needs one")
            .into_response();
    }
    if !api.keys.is_empty() && !has_key(&api.keys, headers) {
        return ApiError::new(StatusCode::UNAUTHORIZED, "X-API-KEY: the API key is missing or wrong")
            .into_response();
    }
    next.run(request).await
}

fn is_keyless_page(headers: &HeaderMap) -> bool {
    let keyless = !headers.contains_key("x-api-key") && !headers.contains_key("authorization");
    keyless && headers.contains_key("origin")
}

/// Whether a request may be served: the rule of every door on this listener.
pub fn is_allowed(keys: &[String], headers: &HeaderMap) -> bool {
    !is_keyless_page(headers) && (keys.is_empty() || has_key(keys, headers))
}

fn has_key(keys: &[String], headers: &HeaderMap) -> bool {
    let key = headers.get("x-api-key").map(|value| value.as_bytes());
    let bearer = headers.get("authorization").and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
    let given = [key, bearer];
    // All are compared, whichever is found first.
    keys.iter().fold(false, |found, key| {
        let same = |given: &Option<&[u8]>| given.is_some_and(|given| bool::from(key.as_bytes().ct_eq(given)));
        given.iter().any(same) | found
    })
}
