//! Bodies of calls: JSON that is nearly right, JSON that is not, and no JSON at all.

use arbitrary::Unstructured;
use axum::body::Body;
use axum::http::Request;
use serde_json::{Value, json};

use super::agent;

/// `Start` is not among them: what a command would be is not for a fuzzer to choose.
const ROUTES: [&str; 18] = [
    "/filesystem.Filesystem/Stat",
    "/filesystem.Filesystem/MakeDir",
    "/filesystem.Filesystem/Move",
    "/filesystem.Filesystem/ListDir",
    "/filesystem.Filesystem/Remove",
    "/filesystem.Filesystem/CreateWatcher",
    "/filesystem.Filesystem/GetWatcherEvents",
    "/filesystem.Filesystem/RemoveWatcher",
    "/process.Process/List",
    "/process.Process/Update",
    "/process.Process/SendInput",
    "/process.Process/SendSignal",
    "/process.Process/CloseStdin",
    "/files/compose",
    "/init",
    "/activity.v1.Activity/Get",
    "/activity.v1.Activity/Explain",
    "/activity.v1.Activity/PrepareRelease",
];
const FIELDS: [&str; 24] = [
    "path",
    "source",
    "destination",
    "depth",
    "recursive",
    "watcherId",
    "watcher_id",
    "includeEntry",
    "process",
    "pid",
    "tag",
    "input",
    "stdin",
    "pty",
    "size",
    "cols",
    "rows",
    "signal",
    "sources",
    "accessToken",
    "envVars",
    "defaultUser",
    "defaultWorkdir",
    "timestamp",
];
const TYPES: [&str; 3] = ["application/json", "application/proto", "text/plain"];

pub fn run(data: &[u8]) {
    let _end_of_data = calls(&mut Unstructured::new(data));
}

fn calls(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let router = agent::block_on(async { agent::fresh() });
    for _ in 0..input.int_in_range(1..=4)? {
        let route = *input.choose(&ROUTES)?;
        let kind = if input.ratio(4, 5)? { TYPES[0] } else { *input.choose(&TYPES)? };
        let body = match input.int_in_range(0..=3_u8)? {
            0 => {
                let length = input.int_in_range(0..=300)?;
                input.bytes(usize::min(length, input.len()))?.to_vec()
            }
            _ => object(input, 3)?.to_string().into_bytes(),
        };
        let mut request = Request::post(route).header("content-type", kind);
        if input.arbitrary()? {
            request = request.header("authorization", "Basic cm9vdDo=");
        }
        let Ok(request) = request.body(Body::from(body)) else { return Ok(()) };
        let (status, _) = agent::block_on(agent::call(&router, request));
        assert!(status.as_u16() >= 200, "{status}");
    }
    agent::block_on(async { drop(router) });
    Ok(())
}

fn object(input: &mut Unstructured<'_>, depth: u8) -> arbitrary::Result<Value> {
    let mut object = serde_json::Map::new();
    for _ in 0..input.int_in_range(0..=4)? {
        object.insert((*input.choose(&FIELDS)?).to_owned(), value(input, depth)?);
    }
    Ok(Value::Object(object))
}

fn value(input: &mut Unstructured<'_>, depth: u8) -> arbitrary::Result<Value> {
    Ok(match input.int_in_range(0..=8_u8)? {
        0 => Value::Null,
        1 => json!(input.arbitrary::<bool>()?),
        2 => json!(input.arbitrary::<i64>()?),
        3 => json!(input.arbitrary::<f64>()?),
        4 => json!(input.arbitrary::<&str>()?),
        5 => json!(format!("/mnt/{}", input.arbitrary::<&str>()?)),
        6 if depth > 0 => json!([value(input, depth - 1)?, value(input, depth - 1)?]),
        7 if depth > 0 => object(input, depth - 1)?,
        _ => json!(input.int_in_range(0..=70_000)?),
    })
}
