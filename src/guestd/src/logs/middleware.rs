//! A line for each call that failed: its path and its status, nothing that was sent.

use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use guestd_protocol::routes;

use super::EACH_CALL;

/// Tells of answers that are errors. A path that is not in the routes table is nobody's call and could say anything: it is not told.
pub async fn tell_failures(request: Request, next: Next) -> Response {
    let method = request.method().clone();
    let route = routes::find(request.uri().path());
    let response = next.run(request).await;
    if let Some(route) = route {
        let status = response.status();
        if status.is_server_error() {
            tracing::warn!(%method, path = route.path, status = status.as_u16(), "a call failed");
        } else if status.is_client_error() {
            tracing::info!(target: EACH_CALL, %method, path = route.path, status = status.as_u16(), "a call was refused");
        }
    }
    response
}
