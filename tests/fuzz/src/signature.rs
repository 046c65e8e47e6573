//! Signed file URLs: nothing but the signature that the token makes opens a file (contract: envd.md section 5).

use arbitrary::Unstructured;
use axum::body::Body;
use axum::http::{Request, StatusCode};
use guestd_protocol::signature::{Operation, Signed};

use super::agent;

const TOKEN: &str = "a-token-that-nobody-guesses";

pub fn run(data: &[u8]) {
    let _end_of_data = fetch(&mut Unstructured::new(data));
}

fn fetch(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let path: &str = input.arbitrary()?;
    let username = if input.arbitrary()? { "nobody" } else { input.arbitrary()? };
    let expiration = match input.int_in_range(0..=2_u8)? {
        0 => None,
        1 => Some("99999999999"),
        _ => Some(input.arbitrary()?),
    };
    let signed = Signed { path: path.as_bytes(), operation: Operation::Read, username, expiration };
    let right = signed.sign(TOKEN);
    let is_right = input.arbitrary()?;
    let signature = if is_right { right.clone() } else { input.arbitrary::<&str>()?.to_owned() };
    assert_eq!(signed.matches(&signature, TOKEN), signature == right);
    let mut query = vec![("path", path), ("username", username), ("signature", signature.as_str())];
    query.extend(expiration.map(|value| ("signature_expiration", value)));
    let mut query = serde_urlencoded::to_string(query).unwrap_or_default();
    if input.ratio(1, 4)? {
        // Whatever else stands in a query.
        query = format!("{}&{query}", input.arbitrary::<&str>()?);
    }
    let Ok(request) = Request::get(format!("/files?{query}")).body(Body::empty()) else { return Ok(()) };
    agent::block_on(async {
        let router = agent::fresh();
        let token = format!("{{\"accessToken\":\"{TOKEN}\"}}");
        let init = Request::post("/init").header("content-type", "application/json").body(Body::from(token));
        let (status, _) = agent::call(&router, init.expect("a request")).await;
        assert_eq!(status, StatusCode::NO_CONTENT);
        let (status, _) = agent::call(&router, request).await;
        let refused = matches!(status, StatusCode::UNAUTHORIZED | StatusCode::BAD_REQUEST);
        assert!(signature == right || refused, "{status} for {signature:?}");
    });
    Ok(())
}
