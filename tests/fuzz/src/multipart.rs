//! Uploads whose parts, boundaries, names and encodings are anything.

use arbitrary::Unstructured;
use axum::body::Body;
use axum::http::Request;

use super::agent;

const PIECES: [&[u8]; 10] = [
    b"--b\r\n",
    b"--b--\r\n",
    b"\r\n",
    b"\r\n\r\n",
    b"Content-Disposition: form-data; name=\"file\"; filename=\"",
    b"Content-Disposition: form-data; name=\"path\"\r\n\r\n",
    b"Content-Type: application/octet-stream\r\n",
    b"\"\r\n\r\n",
    b"/mnt/f",
    b"../",
];
const TYPES: [&str; 5] = [
    "multipart/form-data; boundary=b",
    "multipart/form-data; boundary=\"b\"",
    "multipart/form-data",
    "multipart/mixed; boundary=b",
    "application/octet-stream",
];

pub fn run(data: &[u8]) {
    let _end_of_data = upload(&mut Unstructured::new(data));
}

fn upload(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let mut query = format!("path={}", encode(input.arbitrary()?));
    if input.ratio(1, 2)? {
        query = String::from("path=%2Fmnt%2Ff");
    }
    if input.ratio(1, 4)? {
        query = String::new();
    }
    let kind = if input.ratio(4, 5)? { TYPES[0] } else { *input.choose(&TYPES)? };
    let mut request = Request::post(format!("/files?{query}")).header("content-type", kind);
    if input.ratio(1, 8)? {
        request = request.header("content-encoding", "gzip");
    }
    let mut body = Vec::new();
    while !input.is_empty() && body.len() < 8192 {
        if input.arbitrary()? {
            body.extend_from_slice(input.choose(&PIECES)?);
        } else {
            let length = input.int_in_range(0..=64)?;
            body.extend_from_slice(input.bytes(usize::min(length, input.len()))?);
        }
    }
    let Ok(request) = request.body(Body::from(body)) else { return Ok(()) };
    agent::block_on(async {
        let router = agent::fresh();
        agent::call(&router, request).await;
    });
    Ok(())
}

fn encode(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}
