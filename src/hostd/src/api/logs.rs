//! A sandbox's log, alive or over (contract: control-plane.md section 1.9). Looking is never use.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::{Path, RawQuery, State};
use serde::{Deserialize, Serialize};

use super::{Api, ApiError};
use crate::lifetime::Found;
use crate::logs::{CONSOLE_SHOWN, Entry, Level, SandboxLog};
use crate::{clock, ids};

/// The most lines of one answer, and how many it has when nobody says.
const LIMIT: usize = 1000;

/// Longest text that is searched for, in bytes.
const SEARCH_LIMIT: usize = 256;

/// One line, as both versions tell it.
#[derive(Debug, Serialize, Deserialize)]
pub struct EntryBody {
    /// RFC 3339.
    pub timestamp: String,
    pub level: Level,
    pub message: String,
    pub fields: BTreeMap<String, String>,
}

impl EntryBody {
    fn of(entry: &Entry) -> Self {
        Self {
            timestamp: clock::rfc3339(entry.at_ms),
            level: entry.level,
            message: entry.message.clone(),
            fields: entry.fields.clone(),
        }
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut text = self.message.clone();
        for (name, value) in &self.fields {
            text.push_str(&format!(" {name}={value}"));
        }
        text
    }
}

#[derive(Debug, Serialize)]
struct LineBody {
    timestamp: String,
    line: String,
}

/// The old answer: the lines as text, and once more with their fields.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct LogsV1 {
    logs: Vec<LineBody>,
    log_entries: Vec<EntryBody>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct LogsV2 {
    pub logs: Vec<EntryBody>,
}

pub(super) async fn v1(
    State(api): State<Api>,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<axum::Json<LogsV1>, ApiError> {
    let log_entries = read(&api, &id, &Query::parse(query.as_deref().unwrap_or_default())?).await?;
    let logs = log_entries
        .iter()
        .map(|entry| LineBody { timestamp: entry.timestamp.clone(), line: entry.text() })
        .collect();
    Ok(axum::Json(LogsV1 { logs, log_entries }))
}

pub(super) async fn v2(
    State(api): State<Api>,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<axum::Json<LogsV2>, ApiError> {
    let logs = read(&api, &id, &Query::parse(query.as_deref().unwrap_or_default())?).await?;
    Ok(axum::Json(LogsV2 { logs }))
}

async fn read(api: &Api, id: &str, query: &Query) -> Result<Vec<EntryBody>, ApiError> {
    let known = ids::normalise(id).ok_or_else(|| ApiError::bad_request("Invalid sandbox ID"))?;
    let found = api.sandboxes.find(known).ok_or_else(|| ApiError::no_sandbox(known))?;
    let (log, live, started) = match found {
        Found::Live(sandbox) => {
            let started = sandbox.record.started_wall_ms;
            (Some(Arc::clone(&sandbox.log)), Some(sandbox), started)
        }
        Found::Gone(tombstone) => (api.sandboxes.ended_logs.find(known), None, tombstone.started_wall_ms),
    };
    let Some(log) = log else { return Ok(Vec::new()) };
    if !query.console {
        return Ok(query.select(&log));
    }
    let kept = log.last_console();
    let text = match (kept, live) {
        (Some(text), _) => text,
        (None, Some(sandbox)) => {
            let read = tokio::task::spawn_blocking(move || sandbox.console(CONSOLE_SHOWN));
            read.await.ok().flatten().unwrap_or_default()
        }
        (None, None) => String::new(),
    };
    let lines: Vec<_> = text.lines().collect();
    let first = lines.len().saturating_sub(query.limit);
    // A console tells no times: its lines are in order after the start.
    let entry = |(number, line): (i64, &&str)| Entry {
        at_ms: started.saturating_add(number),
        level: Level::Info,
        message: line.replace(char::is_control, " "),
        fields: BTreeMap::from([("source".to_owned(), "console".to_owned())]),
    };
    Ok((0..).zip(&lines[first..]).map(entry).map(|entry| EntryBody::of(&entry)).collect())
}

/// What a client asks for. `start` is the old name of `cursor`.
#[derive(Debug, PartialEq, Eq)]
struct Query {
    /// The time of the first line, or of the last one for `backward`; milliseconds since 1970.
    cursor: Option<i64>,
    limit: usize,
    backward: bool,
    /// The least weight.
    level: Level,
    search: String,
    console: bool,
}

impl Query {
    fn parse(query: &str) -> Result<Self, ApiError> {
        let pairs: Vec<(String, String)> = serde_urlencoded::from_str(query)
            .map_err(|error| ApiError::bad_request(format!("the query cannot be read: {error}")))?;
        let bad = |name: &str, rule: &str| ApiError::bad_request(format!("{name}: {rule}"));
        let mut parsed = Self {
            cursor: None,
            limit: LIMIT,
            backward: false,
            level: Level::Debug,
            search: String::new(),
            console: false,
        };
        for (name, value) in pairs {
            match name.as_str() {
                "start" | "cursor" => {
                    let time = value.parse().ok().filter(|time| *time >= 0);
                    let rule = "must be a time in milliseconds since 1970";
                    parsed.cursor = Some(time.ok_or_else(|| bad(&name, rule))?);
                }
                "limit" => {
                    let limit = value.parse().ok().filter(|limit| *limit <= LIMIT);
                    parsed.limit =
                        limit.ok_or_else(|| bad("limit", "must be a whole number from 0 to 1000"))?;
                }
                "direction" => {
                    parsed.backward = match value.as_str() {
                        "forward" => false,
                        "backward" => true,
                        _ => return Err(bad("direction", "must be forward or backward")),
                    };
                }
                "level" => {
                    parsed.level = match value.as_str() {
                        "debug" => Level::Debug,
                        "info" => Level::Info,
                        "warn" => Level::Warn,
                        "error" => Level::Error,
                        _ => return Err(bad("level", "must be debug, info, warn or error")),
                    };
                }
                "search" if value.len() > SEARCH_LIMIT => {
                    return Err(bad("search", "must be 256 bytes or shorter"));
                }
                "search" => parsed.search = value,
                "source" => {
                    parsed.console = match value.as_str() {
                        "agent" => false,
                        "console" => true,
                        _ => return Err(bad("source", "must be agent or console")),
                    };
                }
                _ => {}
            }
        }
        Ok(parsed)
    }

    fn wants(&self, entry: &Entry) -> bool {
        let in_time = self
            .cursor
            .is_none_or(|cursor| if self.backward { entry.at_ms <= cursor } else { entry.at_ms >= cursor });
        in_time && entry.level >= self.level && entry.message.contains(&self.search)
    }

    /// Oldest first, or newest first for `backward`. Where older lines are not kept any more, the first line says so.
    fn select(&self, log: &SandboxLog) -> Vec<EntryBody> {
        let ring = log.ring();
        let missing = (ring.dropped() > 0).then(|| Entry {
            at_ms: ring.entries().next().map_or(0, |oldest| oldest.at_ms - 1),
            level: Level::Warn,
            message: format!("{} earlier lines are not kept any more", ring.dropped()),
            fields: BTreeMap::new(),
        });
        let page = |entries: &mut dyn Iterator<Item = &Entry>| {
            entries.filter(|entry| self.wants(entry)).take(self.limit).map(EntryBody::of).collect()
        };
        if self.backward {
            page(&mut ring.entries().rev().chain(&missing))
        } else {
            page(&mut missing.iter().chain(ring.entries()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selected(log: &SandboxLog, query: &str) -> Vec<String> {
        let entries = Query::parse(query).unwrap().select(log);
        entries.into_iter().map(|entry| entry.message).collect()
    }

    #[test]
    fn a_page_continues_behind_the_last_line_of_the_one_before() {
        let log = SandboxLog::default();
        for message in ["a", "b", "c"] {
            log.note(Level::Info, message, &[]);
        }
        assert_eq!(selected(&log, "limit=2"), ["a", "b"]);
        let second = log.ring().entries().nth(1).unwrap().at_ms;
        assert_eq!(selected(&log, &format!("cursor={}&limit=2", second + 1)), ["c"]);
        assert_eq!(selected(&log, &format!("start={}", second + 1)), ["c"]);
        assert_eq!(selected(&log, &format!("cursor={second}&direction=backward")), ["b", "a"]);
    }

    #[test]
    fn level_and_search_choose() {
        let log = SandboxLog::default();
        log.note(Level::Info, "process started", &[("pid", "7")]);
        log.note(Level::Error, "process lost", &[]);
        assert_eq!(selected(&log, "level=warn"), ["process lost"]);
        assert_eq!(selected(&log, "search=started"), ["process started"]);
        assert!(selected(&log, "limit=0").is_empty());
    }

    #[test]
    fn a_log_that_lost_its_beginning_says_so_first() {
        let log = SandboxLog::default();
        for _ in 0..3000 {
            log.note(Level::Info, &"x".repeat(100), &[]);
        }
        assert!(selected(&log, "")[0].contains("earlier lines are not kept"));
        assert!(selected(&log, "direction=backward").last().unwrap().contains("earlier lines are not kept"));
    }

    #[test]
    fn a_bad_parameter_is_named() {
        for (query, name) in [
            ("limit=1001", "limit"),
            ("cursor=-1", "cursor"),
            ("start=x", "start"),
            ("direction=up", "direction"),
            ("level=loud", "level"),
            ("source=x", "source"),
        ] {
            assert!(format!("{:?}", Query::parse(query).unwrap_err()).contains(name), "{query}");
        }
    }
}
