//! The calls that only look: get, list and a sandbox's metrics. None of them is use.

use std::collections::BTreeMap;

use axum::extract::{Path, RawQuery, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use percent_encoding::percent_decode_str;
use serde_json::json;

use super::shapes::{DetailBody, ListedBody};
use super::{Api, ApiError};
use crate::clock;

const NEXT_TOKEN: HeaderName = HeaderName::from_static("x-next-token");
const TOTAL_RUNNING: HeaderName = HeaderName::from_static("x-total-running");

/// The most entries of one page.
const PAGE: usize = 100;

type Listing = (HeaderMap, axum::Json<Vec<ListedBody>>);

pub(super) async fn detail(
    State(api): State<Api>,
    Path(id): Path<String>,
) -> Result<axum::Json<DetailBody>, ApiError> {
    Ok(axum::Json(DetailBody::of(&*api.sandbox(&id)?)))
}

/// The old list: all that run, newest first.
pub(super) async fn list_v1(State(api): State<Api>, RawQuery(query): RawQuery) -> Result<Listing, ApiError> {
    let query = Query::parse(query.as_deref().unwrap_or_default())?;
    let all = matching(&api, &query);
    Ok((HeaderMap::new(), axum::Json(all)))
}

/// The list by pages.
pub(super) async fn list_v2(State(api): State<Api>, RawQuery(query): RawQuery) -> Result<Listing, ApiError> {
    let query = Query::parse(query.as_deref().unwrap_or_default())?;
    let all = matching(&api, &query);
    let mut headers = HeaderMap::new();
    headers.insert(TOTAL_RUNNING, HeaderValue::from(all.len()));
    let rest = all
        .into_iter()
        .skip_while(|entry| query.after.as_ref().is_some_and(|after| !query.is_after(entry, after)));
    let mut page: Vec<_> = rest.take(query.limit + 1).collect();
    if page.len() > query.limit {
        page.truncate(query.limit);
        if let Some(token) = page.last().and_then(|last| HeaderValue::from_str(&token_of(last)).ok()) {
            headers.insert(NEXT_TOKEN, token);
        }
    }
    Ok((headers, axum::Json(page)))
}

fn matching(api: &Api, query: &Query) -> Vec<ListedBody> {
    let all = api.sandboxes.all_live();
    let mut all: Vec<_> =
        all.iter().map(|sandbox| ListedBody::of(sandbox)).filter(|entry| query.wants(entry)).collect();
    all.sort_by(|a, b| order_key(a).cmp(&order_key(b)));
    if !query.ascending {
        all.reverse();
    }
    all
}

fn order_key(entry: &ListedBody) -> (i64, &str) {
    (entry.started_wall_ms, &entry.sandbox_id)
}

/// The place behind an entry, opaque to clients.
fn token_of(entry: &ListedBody) -> String {
    format!("{}-{}", entry.started_wall_ms, entry.sandbox_id)
}

#[derive(Debug)]
struct Query {
    metadata: BTreeMap<String, String>,
    running: bool,
    limit: usize,
    ascending: bool,
    after: Option<(i64, String)>,
    started_after_ms: Option<i64>,
    template: Option<String>,
}

impl Query {
    fn parse(text: &str) -> Result<Self, ApiError> {
        let bad = |name: &str, rule: &str| ApiError::bad_request(format!("{name}: {rule}"));
        let pairs: Vec<(String, String)> = serde_urlencoded::from_str(text)
            .map_err(|error| ApiError::bad_request(format!("the query: {error}")))?;
        let mut query = Self {
            metadata: BTreeMap::new(),
            running: true,
            limit: PAGE,
            ascending: false,
            after: None,
            started_after_ms: None,
            template: None,
        };
        for (name, value) in pairs {
            match name.as_str() {
                "metadata" => query.metadata = parse_metadata(&value),
                "state" => query.running = value.split(',').any(|state| state.trim() == "running"),
                "limit" => {
                    let limit = value.parse().ok().filter(|limit| (1..=PAGE).contains(limit));
                    query.limit =
                        limit.ok_or_else(|| bad("limit", "must be a whole number from 1 to 100"))?;
                }
                "order" => {
                    query.ascending = match value.as_str() {
                        "asc" => true,
                        "desc" => false,
                        _ => return Err(bad("order", "must be asc or desc")),
                    };
                }
                "nextToken" if !value.is_empty() => {
                    let parsed =
                        value.split_once('-').and_then(|(ms, id)| Some((ms.parse().ok()?, id.to_owned())));
                    query.after = Some(parsed.ok_or_else(|| bad("nextToken", "is not one of ours"))?);
                }
                "startedAfter" => {
                    let parsed: Result<jiff::Timestamp, _> = value.parse();
                    let parsed = parsed.map_err(|_| bad("startedAfter", "must be RFC 3339"))?;
                    query.started_after_ms = Some(parsed.as_millisecond());
                }
                "template" if !value.is_empty() => query.template = Some(value),
                _ => {}
            }
        }
        Ok(query)
    }

    fn wants(&self, entry: &ListedBody) -> bool {
        self.running
            && self.metadata.iter().all(|(key, value)| entry.metadata.get(key) == Some(value))
            && self.started_after_ms.is_none_or(|after| entry.started_wall_ms > after)
            && self.template.as_ref().is_none_or(|template| entry.is_of(template))
    }

    fn is_after(&self, entry: &ListedBody, after: &(i64, String)) -> bool {
        let (entry, after) = (order_key(entry), (after.0, after.1.as_str()));
        if self.ascending { entry > after } else { entry < after }
    }
}

/// Each key and value is percent-encoded, the whole again as one parameter, and once more on the wire: the last layer is gone already
/// (contract: control-plane.md section 1.4).
fn parse_metadata(value: &str) -> BTreeMap<String, String> {
    let decode = |text: &str| percent_decode_str(&text.replace('+', " ")).decode_utf8_lossy().into_owned();
    let whole = decode(value);
    // A client that encodes one layer less is understood as well: what is decoded twice and has no escapes stays as it is.
    whole
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(key, value)| (decode(key), decode(value)))
        .collect()
}

/// A sandbox's resources, as its agent sees them now: one sample. A look, not use.
pub(super) async fn metrics(
    State(api): State<Api>,
    Path(id): Path<String>,
) -> Result<axum::Json<serde_json::Value>, ApiError> {
    let sandbox = api.sandbox(&id)?;
    let sample = sandbox.link.metrics(&sandbox.record.access_token).await;
    let sample = sample.map_err(|error| {
        ApiError::new(axum::http::StatusCode::BAD_GATEWAY, format!("the agent did not say: {error}"))
    })?;
    let field = |name: &str| sample.get(name).cloned().unwrap_or(json!(0));
    let now = clock::wall_ms();
    Ok(axum::Json(json!([{
        "timestamp": clock::rfc3339(now),
        "timestampUnix": now / 1000,
        "cpuCount": field("cpu_count"),
        "cpuUsedPct": field("cpu_used_pct"),
        "memUsed": field("mem_used"),
        "memTotal": field("mem_total"),
        "memCache": field("mem_cache"),
        "diskUsed": field("disk_used"),
        "diskTotal": field("disk_total"),
    }])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metadata_filter_is_decoded_as_often_as_the_sdks_encode_it() {
        let parsed = Query::parse("metadata=a%3Db%252520c%26x%3Dy").unwrap().metadata;
        assert_eq!(parsed, BTreeMap::from([("a".into(), "b c".into()), ("x".into(), "y".into())]));
    }

    #[test]
    fn a_bad_parameter_is_named() {
        for (query, name) in
            [("limit=0", "limit"), ("limit=x", "limit"), ("order=up", "order"), ("nextToken=x", "nextToken")]
        {
            assert!(format!("{:?}", Query::parse(query).unwrap_err()).contains(name));
        }
    }
}
