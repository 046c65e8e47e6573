//! Streams whose framing is anything: flags, lengths that are too long or too short, compression that is announced or not, pieces cut
//! anywhere.

use std::time::Duration;

use arbitrary::Unstructured;
use axum::body::{Body, Bytes};
use axum::http::Request;
use http_body_util::StreamBody;

use super::agent;

/// Commands are not started here: what a command would be is not for a fuzzer to choose.
const ROUTES: [&str; 6] = [
    "/filesystem.Filesystem/WatchDir",
    "/process.Process/Connect",
    "/process.Process/StreamInput",
    "/process.Process/StreamInput",
    "/activity.v1.Activity/Watch",
    "/logs.v1.Logs/Follow",
];
const TYPES: [&str; 5] = [
    "application/connect+json",
    "application/connect+proto",
    "application/grpc",
    "application/grpc-web+proto",
    "application/connect+",
];
const ENCODINGS: [&str; 4] = ["identity", "gzip", "zstd", ""];

/// Messages that mean something, so that the framing around them is what is wrong.
const MESSAGES: [&[u8]; 5] = [
    br#"{"path":"/mnt"}"#,
    br#"{"process":{"pid":1},"fromOffset":"0"}"#,
    br#"{"start":{"process":{"tag":"t"}}}"#,
    br#"{"data":{"input":{"stdin":"eA=="}}}"#,
    br#"{"keepalive":{}}"#,
];

pub fn run(data: &[u8]) {
    let _end_of_data = stream(&mut Unstructured::new(data));
}

fn stream(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let mut request = Request::post(*input.choose(&ROUTES)?)
        .header("content-type", *input.choose(&TYPES)?)
        .header("connect-protocol-version", "1");
    if input.arbitrary()? {
        request = request.header("connect-content-encoding", *input.choose(&ENCODINGS)?);
    }
    if input.arbitrary()? {
        request = request.header("connect-timeout-ms", input.int_in_range(0..=50_u32)?.to_string());
    }
    let mut bytes = Vec::new();
    for _ in 0..input.int_in_range(0..=4)? {
        let message = match input.int_in_range(0..=2_u8)? {
            0 => input.choose(&MESSAGES)?.to_vec(),
            _ => {
                let length = input.int_in_range(0..=200)?;
                input.bytes(usize::min(length, input.len()))?.to_vec()
            }
        };
        let mut framed = agent::envelope(input.arbitrary()?, &message);
        if input.ratio(1, 4)? {
            framed[1..5].copy_from_slice(&input.arbitrary::<[u8; 4]>()?);
        }
        bytes.extend(framed);
    }
    bytes.extend(input.peek_bytes(input.len().min(64)).unwrap_or_default());
    let cut = input.int_in_range(1..=64)?;
    let chunks: Vec<_> = bytes.chunks(cut).map(Bytes::copy_from_slice).collect();
    let frames = chunks.into_iter().map(|chunk| Ok::<_, std::io::Error>(http_body::Frame::data(chunk)));
    let body = Body::new(StreamBody::new(futures_util::stream::iter(frames)));
    let Ok(request) = request.body(body) else { return Ok(()) };
    agent::block_on(async {
        let router = agent::fresh();
        let answer = agent::send(&router, request).await;
        agent::taste(answer, Duration::from_millis(1)).await;
    });
    Ok(())
}
