//! `/files` through its router, as a client sees it.

mod download;
mod failure;
mod upload;

use std::io::Read as _;
use std::sync::Arc;

use axum::body::Body;
use axum::response::Response;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::BodyExt as _;
use serde_json::Value;
use tower::ServiceExt as _;

use crate::filesystem::routes;
use crate::filesystem::tests::Fixture;

/// An answer with its whole body.
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Answer {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    fn json(&self) -> Value {
        assert_eq!(self.header("content-type"), "application/json");
        serde_json::from_slice(&self.body).unwrap()
    }

    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

async fn send(fixture: &Fixture, request: Request<Body>) -> Answer {
    let router = routes(Arc::clone(&fixture.filesystem));
    // Whatever blocks is a defect, and the test says so instead of hanging.
    let answer = async { collect(router.oneshot(request).await.unwrap()).await };
    tokio::time::timeout(std::time::Duration::from_secs(30), answer).await.unwrap()
}

async fn collect(response: Response) -> Answer {
    let (parts, body) = response.into_parts();
    let body = body.collect().await.unwrap().to_bytes().to_vec();
    Answer { status: parts.status, headers: parts.headers, body }
}

fn query(pairs: &[(&str, &str)]) -> String {
    let escape = |text: &str| text.bytes().map(|byte| format!("%{byte:02X}")).collect::<String>();
    let pairs: Vec<_> = pairs.iter().map(|(name, value)| format!("{name}={}", escape(value))).collect();
    format!("/files?{}", pairs.join("&"))
}

/// Compresses with the machine's own gzip, so that the tests need no other encoder than the one that they test.
fn gzip(bytes: &[u8]) -> Vec<u8> {
    through("gzip", &["-c"], bytes)
}

fn gunzip(bytes: &[u8]) -> Vec<u8> {
    through("gzip", &["-dc"], bytes)
}

fn through(program: &str, arguments: &[&str], bytes: &[u8]) -> Vec<u8> {
    use std::io::{Seek as _, Write as _};
    let mut input = tempfile::tempfile().unwrap();
    input.write_all(bytes).unwrap();
    input.rewind().unwrap();
    let mut child = std::process::Command::new(program)
        .args(arguments)
        .stdin(input)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut output).unwrap();
    assert!(child.wait().unwrap().success());
    output
}
