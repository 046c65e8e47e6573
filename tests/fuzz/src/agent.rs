//! The agent's own router, called as its doors call it but without sockets.

use std::cell::OnceCell;
use std::path::PathBuf;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{Request, Response, StatusCode};
use guestd::access::Peer;
use guestd::agent::{Config, router};
use guestd::logs::Logs;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use tower::ServiceExt as _;

use super::sandbox::WORK;

/// No answer takes longer: what does hangs.
const PATIENCE: Duration = Duration::from_secs(8);

/// No answer to a small request is larger, in bytes.
const ANSWER_LIMIT: usize = 16 * 1024 * 1024;

thread_local! {
    static RUNTIME: OnceCell<tokio::runtime::Runtime> = const { OnceCell::new() };
}

/// Runs a future as the agent does: on one thread. The blocking threads are kept from one input to the next.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    RUNTIME.with(|runtime| {
        let runtime = runtime.get_or_init(|| {
            let mut builder = tokio::runtime::Builder::new_current_thread();
            builder.enable_all().max_blocking_threads(4).build().expect("a runtime")
        });
        runtime.block_on(future)
    })
}

/// An agent that nobody has set up yet.
pub fn fresh() -> Router {
    let config = Config {
        root: PathBuf::from(WORK),
        cgroup_root: PathBuf::from(WORK).join("cgroup"),
        power_off: || (),
        ..Config::default()
    };
    router(&config, Logs::new())
}

pub async fn send(router: &Router, mut request: Request<Body>) -> Response<Body> {
    request.extensions_mut().insert(Peer::Unix);
    let answer = tokio::time::timeout(PATIENCE, router.clone().oneshot(request)).await;
    answer.expect("an answer in time").unwrap_or_else(|never| match never {})
}

/// The whole answer of a call that is not a stream.
pub async fn call(router: &Router, request: Request<Body>) -> (StatusCode, Bytes) {
    let answer = send(router, request).await;
    let (parts, body) = answer.into_parts();
    let body = tokio::time::timeout(PATIENCE, Limited::new(body, ANSWER_LIMIT).collect()).await;
    match body.expect("an answer's end in time") {
        Ok(body) => (parts.status, body.to_bytes()),
        Err(error) => {
            assert!(!error.is::<LengthLimitError>(), "an answer without end");
            (parts.status, Bytes::new())
        }
    }
}

/// What a stream has to say for a moment; then it is given up, as by a client that goes.
pub async fn taste(answer: Response<Body>, moment: Duration) -> Vec<u8> {
    let mut body = answer.into_body();
    let mut seen = Vec::new();
    while let Ok(Some(Ok(frame))) = tokio::time::timeout(moment, body.frame()).await {
        if let Some(data) = frame.data_ref() {
            seen.extend_from_slice(data);
        }
        if seen.len() > ANSWER_LIMIT {
            break;
        }
    }
    seen
}

/// One message of a Connect stream: flags, length, payload (contract: envd.md section 2.2).
pub fn envelope(flags: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    [&[flags][..], &length.to_be_bytes(), payload].concat()
}
