//! The API's errors: `{"code": <status>, "message": "..."}`.

use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use guestd_idle::TermsError;
use guestd_protocol::errors::ErrorBody;

use crate::lifetime::create::CreateError;
use crate::runtime::ImageError;
use crate::store::StoreError;

/// An answer that is not a success.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    message: String,
}

impl ApiError {
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// The SDKs turn it into "false" for kill, and into a typed error elsewhere.
    pub fn no_sandbox(id: &str) -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            format!("sandbox \"{}\" not found", id.chars().take(64).collect::<String>()),
        )
    }
}

impl From<TermsError> for ApiError {
    fn from(error: TermsError) -> Self {
        Self::bad_request(error.to_string())
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
    }
}

impl From<CreateError> for ApiError {
    fn from(error: CreateError) -> Self {
        let status = match &error {
            CreateError::Terms(_) | CreateError::Policy(_) => StatusCode::BAD_REQUEST,
            CreateError::Image(ImageError::Unknown(_)) => StatusCode::NOT_FOUND,
            CreateError::Busy | CreateError::Closing => StatusCode::SERVICE_UNAVAILABLE,
            CreateError::Full(_) => StatusCode::TOO_MANY_REQUESTS,
            CreateError::Image(ImageError::Broken { .. })
            | CreateError::Start(_)
            | CreateError::Boot(_)
            | CreateError::Silent(_)
            | CreateError::Store(_)
            | CreateError::Io(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, error.to_string())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = ErrorBody { code: self.status.as_u16(), message: self.message };
        let mut response = (self.status, axum::Json(body)).into_response();
        // What cannot succeed by being repeated at once is not to be repeated: the Python SDK would, three times.
        response.headers_mut().insert("should-retry", HeaderValue::from_static("false"));
        response
    }
}
