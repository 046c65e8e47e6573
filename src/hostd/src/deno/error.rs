//! The door's errors: `{"code": "NAME", "message": "..."}` (contract: deno.md sections 2.5 and 4.1).

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use guestd_idle::EndReason;
use serde::Serialize;

use crate::lifetime::create::CreateError;
use crate::runtime::ImageError;
use crate::store::StoreError;

/// An answer that is not a success. Both SDKs read the two fields; only the code `INVALID_TOKEN` means something to them.
#[derive(Debug)]
pub(super) struct DoorError {
    status: StatusCode,
    code: &'static str,
    message: String,
}

#[derive(Serialize)]
struct Body<'a> {
    code: &'static str,
    message: &'a str,
}

impl DoorError {
    pub(super) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into() }
    }

    /// What is wrong with a create call.
    pub(super) fn config(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "INVALID_CONFIG", message)
    }

    pub(super) fn request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "INVALID_REQUEST", message)
    }

    pub(super) fn unknown(id: &str) -> Self {
        let id: String = id.chars().take(64).collect();
        Self::new(StatusCode::NOT_FOUND, "SANDBOX_NOT_FOUND", format!("sandbox \"{id}\" not found"))
    }

    pub(super) fn ended(id: &str, reason: EndReason) -> Self {
        let message = format!("sandbox \"{id}\" not found: it has ended ({reason})");
        Self::new(StatusCode::NOT_FOUND, "SANDBOX_NOT_FOUND", message)
    }
}

impl From<CreateError> for DoorError {
    fn from(error: CreateError) -> Self {
        let (status, code) = match &error {
            CreateError::Terms(_) | CreateError::Policy(_) => (StatusCode::BAD_REQUEST, "INVALID_CONFIG"),
            CreateError::Full(_) => (StatusCode::TOO_MANY_REQUESTS, "TOO_MANY_SANDBOXES"),
            CreateError::Busy | CreateError::Closing => (StatusCode::SERVICE_UNAVAILABLE, "UNAVAILABLE"),
            CreateError::Image(ImageError::Unknown(_) | ImageError::Broken { .. })
            | CreateError::Start(_)
            | CreateError::Boot(_)
            | CreateError::Silent(_)
            | CreateError::Store(_)
            | CreateError::Io(_) => (StatusCode::INTERNAL_SERVER_ERROR, "CREATE_FAILED"),
        };
        Self::new(status, code, error.to_string())
    }
}

impl From<StoreError> for DoorError {
    fn from(error: StoreError) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "INTERNAL", error.to_string())
    }
}

impl IntoResponse for DoorError {
    fn into_response(self) -> Response {
        (self.status, axum::Json(Body { code: self.code, message: &self.message })).into_response()
    }
}
