//! The calls beside the sockets: extend, kill, list (contract: deno.md section 4).

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Extension;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, RawQuery, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use serde::Serialize;
use serde_json::{Value, json};

use super::Door;
use super::config;
use super::error::DoorError;
use crate::clock;
use crate::ids;
use crate::tls::door::OverTls;

/// Most entries of one answer. The JavaScript SDK knows no further pages.
const PAGE: usize = 1000;

/// `PATCH {"stop_at_ms"}`: moves the end to that instant, at most to the maximum lifetime; the answer is where it went. A session stays
/// one.
pub(super) async fn extend(
    State(door): State<Arc<Door>>,
    Path(id): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Result<axum::Json<Value>, DoorError> {
    let body = body.map_err(|error| DoorError::request(error.body_text()))?;
    let body: Value = serde_json::from_slice(&body)
        .map_err(|error| DoorError::request(format!("the body must be JSON: {error}")))?;
    let left = config::left(&body["stop_at_ms"], clock::wall_ms()).map_err(DoorError::request)?;
    let sandbox = door.find(&id).await?;
    let end = sandbox.change(|lifetime| {
        if let Some((reason, _)) = lifetime.ended() {
            return Err(DoorError::ended(&sandbox.record.id, reason));
        }
        lifetime.set_left(left, clock::now()).map_err(|error| DoorError::request(error.to_string()))?;
        Ok(lifetime.terms().end)
    })?;
    door.sandboxes.save_terms(&sandbox).await?;
    Ok(axum::Json(json!({"stop_at_ms": clock::wall_ms_of(end)})))
}

/// `DELETE`: its sockets are closed and its machine is on its way out when this returns.
pub(super) async fn kill(
    State(door): State<Arc<Door>>,
    Path(id): Path<String>,
) -> Result<StatusCode, DoorError> {
    let sandbox = door.find(&id).await?;
    if !door.sandboxes.kill(&sandbox).await {
        return Err(DoorError::unknown(&id));
    }
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn not_yet(Path(parts): Path<Vec<String>>) -> DoorError {
    let what = parts.get(1).map_or("deploy", String::as_str);
    let what: String = what.chars().take(32).collect();
    let message = format!("{what}: this host cannot do that yet");
    DoorError::new(StatusCode::NOT_IMPLEMENTED, "NOT_IMPLEMENTED", message)
}

/// Apps, volumes and the rest of the cloud's console.
pub(super) async fn no_console(uri: Uri) -> DoorError {
    let path: String = uri.path().chars().take(200).collect();
    let message = format!("/api{path}: this host has sandboxes only");
    DoorError::new(StatusCode::NOT_IMPLEMENTED, "NOT_IMPLEMENTED", message)
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Entry {
    id: String,
    created_at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    stopped_at: Option<String>,
    region: &'static str,
    status: &'static str,
    labels: BTreeMap<String, String>,
    #[serde(skip)]
    created_ms: i64,
}

impl Entry {
    /// Newest first; ids make the order whole.
    fn key(&self) -> (i64, &str) {
        (self.created_ms, &self.id)
    }
}

/// The sandboxes of this door, newest first, those that ended within the hour included.
pub(super) async fn list(
    State(door): State<Arc<Door>>,
    headers: HeaderMap,
    uri: Uri,
    RawQuery(query): RawQuery,
    tls: Option<Extension<OverTls>>,
) -> Result<(HeaderMap, axum::Json<Vec<Entry>>), DoorError> {
    let query = Query::parse(query.as_deref().unwrap_or_default())?;
    let mut all = entries(&door);
    all.retain(|entry| query.wants(entry));
    all.sort_by(|a, b| b.key().cmp(&a.key()));
    let more = all.len() > query.limit;
    all.truncate(query.limit);
    let mut links = HeaderMap::new();
    if let (true, Some(last)) = (more, all.last()) {
        let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or("localhost");
        let cursor = format!("{}-{}", last.created_ms, last.id);
        let scheme = if tls.is_some() { "https" } else { "http" };
        let link = format!("<{scheme}://{host}/api{}?cursor={cursor}>; rel=\"next\"", uri.path());
        if let Ok(link) = HeaderValue::from_str(&link) {
            links.insert(header::LINK, link);
        }
    }
    Ok((links, axum::Json(all)))
}

fn entries(door: &Door) -> Vec<Entry> {
    let live = door.sandboxes.all_live();
    let live = live.iter().filter(|sandbox| ids::is_deno(&sandbox.record.id)).map(|sandbox| Entry {
        id: sandbox.record.id.clone(),
        created_at: clock::rfc3339(sandbox.record.started_wall_ms),
        stopped_at: None,
        region: ids::DENO_REGION,
        status: "running",
        labels: sandbox.record.labels.clone(),
        created_ms: sandbox.record.started_wall_ms,
    });
    let gone = door.sandboxes.tombstones();
    let gone = gone.iter().filter(|tombstone| ids::is_deno(&tombstone.id)).map(|tombstone| Entry {
        id: tombstone.id.clone(),
        created_at: clock::rfc3339(tombstone.started_wall_ms),
        stopped_at: Some(clock::rfc3339(tombstone.ended_wall_ms)),
        region: ids::DENO_REGION,
        status: "stopped",
        labels: tombstone.labels.clone(),
        created_ms: tombstone.started_wall_ms,
    });
    // Live ones were looked up first: one that ended since is in both, and its tombstone comes later.
    let mut all: BTreeMap<String, Entry> = BTreeMap::new();
    for entry in live.chain(gone) {
        all.insert(entry.id.clone(), entry);
    }
    all.into_values().collect()
}

#[derive(Debug)]
struct Query {
    labels: BTreeMap<String, String>,
    limit: usize,
    after: Option<(i64, String)>,
}

impl Query {
    fn parse(text: &str) -> Result<Self, DoorError> {
        let pairs: Vec<(String, String)> = serde_urlencoded::from_str(text)
            .map_err(|error| DoorError::request(format!("the query: {error}")))?;
        let mut query = Self { labels: BTreeMap::new(), limit: PAGE, after: None };
        for (name, value) in pairs {
            match name.as_str() {
                "limit" => {
                    let limit = value.parse().ok().filter(|limit| (1..=PAGE).contains(limit));
                    let rule =
                        || DoorError::request(format!("limit: must be a whole number from 1 to {PAGE}"));
                    query.limit = limit.ok_or_else(rule)?;
                }
                "cursor" if !value.is_empty() => {
                    let parsed = parse_cursor(&value);
                    let rule = || DoorError::request("cursor: is not one of ours");
                    query.after = Some(parsed.ok_or_else(rule)?);
                }
                "labels" => {
                    let parsed = parse_labels(&value);
                    let rule = || DoorError::request("labels: must be an object of strings");
                    query.labels.extend(parsed.ok_or_else(rule)?);
                }
                _ => {
                    let label = name.strip_prefix("labels[").and_then(|name| name.strip_suffix(']'));
                    if let Some(label) = label {
                        query.labels.insert(label.to_owned(), value);
                    }
                }
            }
        }
        Ok(query)
    }

    fn wants(&self, entry: &Entry) -> bool {
        self.labels.iter().all(|(name, value)| entry.labels.get(name) == Some(value))
            && self.after.as_ref().is_none_or(|(at, id)| entry.key() < (*at, id.as_str()))
    }
}

/// The place behind an entry; the Python SDK sends the whole address of the next page for it.
fn parse_cursor(value: &str) -> Option<(i64, String)> {
    let value = value.split_once("cursor=").map_or(value, |(_, cursor)| cursor);
    let (at, id) = value.split_once('-')?;
    Some((at.parse().ok()?, id.to_owned()))
}

/// The Python SDK writes its dictionary as Python does.
fn parse_labels(value: &str) -> Option<BTreeMap<String, String>> {
    let read = |text: &str| serde_json::from_str(text).ok();
    read(value).or_else(|| read(&value.replace('\'', "\"")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sdks_ways_to_ask_for_labels_are_understood() {
        for query in ["labels%5Ba%5D=b", "labels=%7B%27a%27%3A+%27b%27%7D", "labels=%7B%22a%22%3A%22b%22%7D"]
        {
            let labels = Query::parse(query).unwrap().labels;
            assert_eq!(labels, BTreeMap::from([("a".into(), "b".into())]), "{query}");
        }
    }

    #[test]
    fn a_cursor_is_taken_alone_and_as_a_whole_address() {
        for query in
            ["cursor=5-sbx_ord_x", "cursor=http%3A%2F%2Fh%2Fapi%2Fv3%2Fsandboxes%3Fcursor%3D5-sbx_ord_x"]
        {
            assert_eq!(Query::parse(query).unwrap().after, Some((5, "sbx_ord_x".to_owned())));
        }
    }

    #[test]
    fn a_bad_parameter_is_named() {
        for (query, name) in
            [("limit=0", "limit"), ("limit=x", "limit"), ("cursor=x", "cursor"), ("labels=1", "labels")]
        {
            assert!(format!("{:?}", Query::parse(query).unwrap_err()).contains(name));
        }
    }
}
