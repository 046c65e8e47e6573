//! The service over Connect with its JSON codec, as SDKs call it.

use std::sync::Arc;

use axum::body::Body;
use guestd_protocol::wire::filesystem::FilesystemExt as _;
use http::{Request, StatusCode};
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tower::ServiceExt as _;

use super::Fixture;
use crate::identity::RequestUser;

async fn call(
    fixture: &Fixture,
    method: &str,
    message: Value,
    user: Option<RequestUser>,
) -> (StatusCode, Value) {
    let router = Arc::clone(&fixture.filesystem).register(connectrpc::Router::new()).into_axum_router();
    let mut request = Request::post(format!("/filesystem.Filesystem/{method}"))
        .header("content-type", "application/json")
        .header("connect-protocol-version", "1")
        .body(Body::from(message.to_string()))
        .unwrap();
    if let Some(user) = user {
        request.extensions_mut().insert(user);
    }
    let response = router.oneshot(request).await.unwrap();
    let status = response.status();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&body).unwrap())
}

#[tokio::test]
async fn an_entry_has_the_json_that_sdks_expect() {
    let fixture = Fixture::new();
    let path = fixture.write("a.txt", "hello");
    let (status, reply) = call(&fixture, "Stat", json!({ "path": "a.txt" }), None).await;
    assert_eq!(status, StatusCode::OK);
    let entry = &reply["entry"];
    assert_eq!(entry["name"], "a.txt");
    assert_eq!(entry["type"], "FILE_TYPE_FILE");
    assert_eq!(entry["path"], path.to_str().unwrap());
    assert_eq!(entry["size"], "5");
    assert_eq!(entry["mode"], 0o644);
    assert_eq!(entry["permissions"], "-rw-r--r--");
    assert!(entry["modifiedTime"].as_str().unwrap().ends_with('Z'));
    assert_eq!(entry.get("symlinkTarget"), None);
    assert_eq!(entry.get("metadata"), None);
    assert_eq!(entry.get("isSymlink"), None);
}

#[tokio::test]
async fn every_call_reaches_its_operation() {
    let fixture = Fixture::new();
    let (_, reply) = call(&fixture, "MakeDir", json!({ "path": "d" }), None).await;
    assert_eq!(reply["entry"]["type"], "FILE_TYPE_DIRECTORY");
    let (_, reply) = call(&fixture, "ListDir", json!({ "path": "", "depth": 1 }), None).await;
    assert_eq!(reply["entries"][0]["name"], "d");
    let (_, reply) = call(&fixture, "Move", json!({ "source": "d", "destination": "e" }), None).await;
    assert_eq!(reply["entry"]["name"], "e");
    assert_eq!(call(&fixture, "Remove", json!({ "path": "e" }), None).await, (StatusCode::OK, json!({})));
    assert_eq!(call(&fixture, "ListDir", json!({}), None).await, (StatusCode::OK, json!({})));
}

#[tokio::test]
async fn a_failure_carries_its_code_and_status() {
    let fixture = Fixture::new();
    let (status, reply) = call(&fixture, "Stat", json!({ "path": "missing" }), None).await;
    assert_eq!((status, &reply["code"]), (StatusCode::NOT_FOUND, &json!("not_found")));
    let text = reply["message"].as_str().unwrap();
    assert!(text.starts_with("file not found: "), "{text}");
    call(&fixture, "MakeDir", json!({ "path": "d" }), None).await;
    let (status, reply) = call(&fixture, "MakeDir", json!({ "path": "d" }), None).await;
    assert_eq!((status, &reply["code"]), (StatusCode::CONFLICT, &json!("already_exists")));
}

#[tokio::test]
async fn the_user_of_the_request_owns_what_it_makes() {
    let fixture = Fixture::new();
    let Some(other) = fixture.other() else { return };
    fixture.mode("", 0o777);
    let (_, reply) = call(&fixture, "MakeDir", json!({ "path": "d" }), Some(other)).await;
    assert_eq!((&reply["entry"]["owner"], &reply["entry"]["group"]), (&json!("other"), &json!("others")));
}
