//! The wire of port 49999 (contract: envd.md section 7.1): `/execute`, `/contexts`, `/health`, and `/executions` for cells that outlive
//! their client.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::body::{Body, Bytes};
use axum::extract::rejection::{BytesRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, Path, Query, Request as HttpRequest, State};
use axum::http::{HeaderName, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use guestd_idle::HoldClass;
use guestd_protocol::ACCESS_TOKEN_HEADER;
use guestd_protocol::errors::{ErrorBody, NOT_FOUND_MESSAGE};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::cell::{self, Attachment, Cell, Request};
use super::context::Context;
use super::{CodeError, Interpreter};
use crate::access::{self, Access, Peer};
use crate::activity::Activity;

/// The longest body of a request, in bytes.
const BODY_LIMIT: usize = 64 << 20;

/// The longest time limit of a cell: longer than any sandbox lives.
const TIMEOUT_LIMIT: f64 = 30.0 * 86_400.0;

/// Tells who starts a cell how to find it again.
const EXECUTION_ID: HeaderName = HeaderName::from_static("x-execution-id");

const LINES: &str = "application/x-ndjson";

pub fn routes(interpreter: Arc<Interpreter>, access: Arc<Access>, activity: Arc<Activity>) -> Router {
    Router::new()
        .route("/health", get(|| async { Json("OK") }))
        .route("/execute", post(execute))
        .route("/contexts", get(list).post(create))
        .route("/contexts/{id}", axum::routing::delete(delete))
        .route("/contexts/{id}/restart", post(restart))
        .route("/contexts/{id}/interrupt", post(interrupt))
        .route("/executions", get(list_cells).post(detach))
        .route("/executions/{id}", get(show).delete(forget))
        .route("/executions/{id}/events", get(events))
        .route("/executions/{id}/interrupt", post(interrupt_cell))
        .with_state(interpreter)
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .layer(middleware::from_fn_with_state(activity, hold))
        .layer(middleware::from_fn_with_state(access, authorize))
}

/// SDKs send the access token with `/execute` alone: a context is made and listed by who reaches the port, and code is run, and read, by who has the
/// token. A wrong one opens nothing.
async fn authorize(State(access): State<Arc<Access>>, request: HttpRequest, next: Next) -> Response {
    let (head, body) = request.into_parts();
    let path = head.uri.path();
    let given = head.headers.get(ACCESS_TOKEN_HEADER).map(|value| value.as_bytes());
    let needed = path == "/execute" || path == "/executions" || path.starts_with("/executions/");
    let allowed = if path == "/health" {
        Ok(())
    } else if access.is_sealed() {
        Err(access::Refusal::Sealed)
    } else if needed || given.is_some() || access.access_token().is_none() {
        access.allows(given, head.extensions.get::<Peer>()).await
    } else {
        Ok(())
    };
    let length =
        head.headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    let request = HttpRequest::from_parts(head, body);
    match allowed {
        // Not after all of it was read.
        Ok(()) if length.is_some_and(|length| length > BODY_LIMIT as u64) => {
            let text = format!("the body is longer than {} MiB", BODY_LIMIT >> 20);
            (StatusCode::PAYLOAD_TOO_LARGE, [(header::CONNECTION, "close")], text).into_response()
        }
        Ok(()) => next.run(request).await,
        Err(refusal) => access::refuse(request, refusal).await,
    }
}

/// Calls about contexts and executions are use while they run. Cells hold for themselves.
async fn hold(State(activity): State<Arc<Activity>>, request: HttpRequest, next: Next) -> Response {
    let path = request.uri().path();
    if path == "/health" || path == "/execute" {
        return next.run(request).await;
    }
    match activity.admit(HoldClass::Call, &format!("{} {path}", request.method())).await {
        Ok(_hold) => next.run(request).await,
        Err(gone) => CodeError::from(gone).into_response(),
    }
}

impl IntoResponse for CodeError {
    fn into_response(self) -> Response {
        let status = match self {
            Self::Both | Self::Invalid(_) => StatusCode::BAD_REQUEST,
            Self::NoContext(_) | Self::NoCell(_) => StatusCode::NOT_FOUND,
            Self::TooMany(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::Kernel(_) => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Gone => {
                let body = ErrorBody { code: 502, message: NOT_FOUND_MESSAGE.to_owned() };
                return (StatusCode::BAD_GATEWAY, Json(body)).into_response();
            }
        };
        (status, self.to_string()).into_response()
    }
}

/// A body that is not what it should be; the form is the one that clients of the reference server know.
#[derive(Debug, PartialEq)]
struct Unprocessable {
    field: Option<&'static str>,
    kind: &'static str,
    message: String,
}

impl IntoResponse for Unprocessable {
    fn into_response(self) -> Response {
        let place: Vec<_> = std::iter::once("body").chain(self.field).collect();
        let body = json!({ "detail": [{ "type": self.kind, "loc": place, "msg": self.message }] });
        (StatusCode::UNPROCESSABLE_ENTITY, Json(body)).into_response()
    }
}

/// The fields of a body.
struct Fields(Map<String, Value>);

impl Fields {
    fn read(body: &[u8]) -> Result<Self, Unprocessable> {
        let wrong = |kind, message| Unprocessable { field: None, kind, message };
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Self(fields)),
            Ok(_) => Err(wrong("model_attributes_type", "Input should be an object".to_owned())),
            Err(error) => Err(wrong("json_invalid", format!("JSON decode error: {error}"))),
        }
    }

    /// A null is as good as nothing.
    fn text(&mut self, field: &'static str) -> Result<Option<String>, Unprocessable> {
        match self.0.remove(field) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(Unprocessable {
                field: Some(field),
                kind: "string_type",
                message: "Input should be a valid string".to_owned(),
            }),
        }
    }

    fn variables(&mut self) -> Result<BTreeMap<String, String>, Unprocessable> {
        let wrong = || Unprocessable {
            field: Some("env_vars"),
            kind: "dict_type",
            message: "Input should be an object of strings".to_owned(),
        };
        match self.0.remove("env_vars") {
            None | Some(Value::Null) => Ok(BTreeMap::new()),
            Some(Value::Object(fields)) => fields
                .into_iter()
                .map(|(name, value)| match value {
                    Value::String(value) => Ok((name, value)),
                    _ => Err(wrong()),
                })
                .collect(),
            Some(_) => Err(wrong()),
        }
    }

    fn timeout(&mut self) -> Result<Option<Duration>, Unprocessable> {
        match self.0.remove("timeout") {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64().filter(|seconds| *seconds > 0.0 && *seconds <= TIMEOUT_LIMIT)
            {
                Some(seconds) => Ok(Some(Duration::from_secs_f64(seconds))),
                None => Err(Unprocessable {
                    field: Some("timeout"),
                    kind: "greater_than",
                    message: "Input should be a number of seconds greater than 0".to_owned(),
                }),
            },
        }
    }
}

/// Reads a request for a cell and takes it in.
async fn submit(
    interpreter: &Arc<Interpreter>,
    body: Result<Bytes, BytesRejection>,
    kept: bool,
) -> Result<Arc<Cell>, Response> {
    let body = body.map_err(IntoResponse::into_response)?;
    let read = || -> Result<_, Unprocessable> {
        let mut fields = Fields::read(&body)?;
        let code = fields.text("code")?.ok_or_else(|| Unprocessable {
            field: Some("code"),
            kind: "missing",
            message: "Field required".to_owned(),
        })?;
        let request = Request { code, variables: fields.variables()?, timeout: fields.timeout()? };
        Ok((fields.text("context_id")?, fields.text("language")?, request))
    };
    let (context, language, request) = read().map_err(IntoResponse::into_response)?;
    // Clients of the reference server send an empty language for none.
    let language = language.filter(|language| !language.trim().is_empty());
    let context = context.filter(|context| !context.is_empty());
    let submitted = interpreter.submit(context.as_deref(), language.as_deref(), request, kept).await;
    submitted.map_err(IntoResponse::into_response)
}

async fn execute(
    State(interpreter): State<Arc<Interpreter>>,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    match submit(&interpreter, body, false).await {
        Ok(cell) => lines(cell, 0, Attachment::Own),
        Err(refused) => refused,
    }
}

fn lines(cell: Arc<Cell>, from: u64, attachment: Attachment) -> Response {
    let id = cell.id.clone();
    match cell::events(cell, from, attachment) {
        Ok(stream) => {
            let headers = [(header::CONTENT_TYPE, LINES.to_owned()), (EXECUTION_ID, id)];
            let unbuffered =
                [(HeaderName::from_static("x-accel-buffering"), "no"), (header::CACHE_CONTROL, "no-cache")];
            (headers, unbuffered, Body::from_stream(stream)).into_response()
        }
        Err(_) => {
            CodeError::Invalid("from: the execution has not that many events".to_owned()).into_response()
        }
    }
}

async fn detach(
    State(interpreter): State<Arc<Interpreter>>,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    match submit(&interpreter, body, true).await {
        Ok(cell) => (StatusCode::CREATED, Json(described(&cell))).into_response(),
        Err(refused) => refused,
    }
}

fn described(cell: &Cell) -> Value {
    let (started, ended) = cell.times();
    let seconds = |at: Option<SystemTime>| {
        at.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok()).map(|since| since.as_secs_f64())
    };
    let progress = cell.progress();
    json!({
        "id": cell.id,
        "context_id": cell.context,
        "language": cell.language,
        "state": progress.state.name(),
        "events": progress.events,
        "created_at": seconds(Some(cell.created)),
        "started_at": seconds(started),
        "ended_at": seconds(ended),
    })
}

async fn list_cells(State(interpreter): State<Arc<Interpreter>>) -> Json<Value> {
    Json(interpreter.cells().iter().map(|cell| described(cell)).collect())
}

async fn show(
    State(interpreter): State<Arc<Interpreter>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, CodeError> {
    interpreter.cell(&id).map(|cell| Json(described(&cell)))
}

#[derive(Debug, Deserialize)]
struct From {
    #[serde(default)]
    from: u64,
    #[serde(default = "yes")]
    follow: bool,
}

fn yes() -> bool {
    true
}

async fn events(
    State(interpreter): State<Arc<Interpreter>>,
    Path(id): Path<String>,
    query: Result<Query<From>, QueryRejection>,
) -> Response {
    let Query(From { from, follow }) = match query {
        Ok(query) => query,
        Err(rejection) => return CodeError::Invalid(rejection.body_text()).into_response(),
    };
    match interpreter.cell(&id) {
        Ok(cell) => lines(cell, from, Attachment::Visitor { follow }),
        Err(error) => error.into_response(),
    }
}

async fn forget(
    State(interpreter): State<Arc<Interpreter>>,
    Path(id): Path<String>,
) -> Result<Json<()>, CodeError> {
    interpreter.forget(&id).map(Json)
}

async fn interrupt_cell(
    State(interpreter): State<Arc<Interpreter>>,
    Path(id): Path<String>,
) -> Result<Json<()>, CodeError> {
    interpreter.interrupt_cell(&id).await.map(Json)
}

fn shown(context: &Context) -> Value {
    json!({ "id": context.id, "language": context.language, "cwd": context.directory.to_string_lossy() })
}

async fn list(State(interpreter): State<Arc<Interpreter>>) -> Json<Value> {
    Json(interpreter.contexts().await.iter().map(|context| shown(context)).collect())
}

async fn create(
    State(interpreter): State<Arc<Interpreter>>,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    let body = match body {
        Ok(body) if body.iter().all(u8::is_ascii_whitespace) => Bytes::from_static(b"{}"),
        Ok(body) => body,
        Err(rejection) => return rejection.into_response(),
    };
    let read = || -> Result<_, Unprocessable> {
        let mut fields = Fields::read(&body)?;
        Ok((fields.text("language")?, fields.text("cwd")?))
    };
    let (language, directory) = match read() {
        Ok(read) => read,
        Err(error) => return error.into_response(),
    };
    match interpreter.add(language.as_deref().unwrap_or_default(), directory.as_deref()).await {
        Ok(context) => Json(shown(&context)).into_response(),
        Err(error) => error.into_response(),
    }
}

async fn restart(
    State(interpreter): State<Arc<Interpreter>>,
    Path(id): Path<String>,
) -> Result<Json<()>, CodeError> {
    interpreter.restart(&id).await.map(Json)
}

async fn interrupt(
    State(interpreter): State<Arc<Interpreter>>,
    Path(id): Path<String>,
) -> Result<Json<()>, CodeError> {
    interpreter.interrupt(&id).await.map(Json)
}

async fn delete(
    State(interpreter): State<Arc<Interpreter>>,
    Path(id): Path<String>,
) -> Result<Json<()>, CodeError> {
    interpreter.delete(&id).await.map(Json)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(text: &str) -> Fields {
        Fields::read(text.as_bytes()).unwrap_or_else(|error| panic!("{error:?}"))
    }

    #[test]
    fn a_wrong_field_is_named_and_null_is_nothing() {
        let of = |field, kind| move |error: &Unprocessable| error.field == Some(field) && error.kind == kind;
        assert!(fields(r#"{"code": 1}"#).text("code").is_err_and(|error| of("code", "string_type")(&error)));
        assert_eq!(fields(r#"{"language": null}"#).text("language"), Ok(None));
        for wrong in [r#"{"env_vars": []}"#, r#"{"env_vars": {"A": 1}}"#] {
            assert!(
                fields(wrong).variables().is_err_and(|error| of("env_vars", "dict_type")(&error)),
                "{wrong}"
            );
        }
        for wrong in ["0", "-1", "\"5\"", "true", "1e300"] {
            let read = fields(&format!("{{\"timeout\": {wrong}}}")).timeout();
            assert!(read.is_err_and(|error| of("timeout", "greater_than")(&error)), "{wrong}");
        }
        assert_eq!(fields(r#"{"timeout": 1.5}"#).timeout(), Ok(Some(Duration::from_millis(1500))));
        for wrong in ["", "[]", "{", "\"x\""] {
            assert!(Fields::read(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }
}
