//! `hostd logs`: prints a sandbox's log, and goes on as lines come.

use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::api::logs::{EntryBody, LogsV2};
use crate::config::Logs;
use crate::explain_command::ask;

/// How often `--follow` asks.
const FOLLOW_PAUSE: Duration = Duration::from_secs(1);

/// # Errors
/// When the supervisor cannot be reached, or does not know the sandbox.
pub async fn run(command: &Logs) -> Result<()> {
    let mut cursor: i64 = 0;
    loop {
        let source = if command.console { "console" } else { "agent" };
        let path = format!("/v2/sandboxes/{}/logs?source={source}&cursor={cursor}", command.id);
        let body = match ask(&command.api, command.api_key.as_deref(), &path).await {
            Ok(body) => body,
            // The end of what was followed: its tombstone is gone, or hostd is.
            Err(_) if cursor > 0 && command.follow => return Ok(()),
            Err(error) => return Err(error),
        };
        let page: LogsV2 = serde_json::from_slice(&body).context("the answer is not hostd's")?;
        print(&page.logs, command.json)?;
        let last = page.logs.last().and_then(|entry| entry.timestamp.parse::<jiff::Timestamp>().ok());
        cursor = last.map_or(cursor, |time| time.as_millisecond() + 1);
        let over = page.logs.last().is_some_and(|entry| entry.message == "sandbox ended");
        if !command.follow || over || command.console {
            return Ok(());
        }
        tokio::time::sleep(FOLLOW_PAUSE).await;
    }
}

fn print(entries: &[EntryBody], json: bool) -> Result<()> {
    let mut out = std::io::stdout().lock();
    for entry in entries {
        if json {
            serde_json::to_writer(&mut out, entry)?;
            writeln!(out)?;
        } else {
            let level = format!("{:?}", entry.level).to_uppercase();
            // Some of it was chosen by a guest: it must not speak to the operator's terminal.
            let text = entry.text().replace(char::is_control, "?");
            writeln!(out, "{} {level:>5} {text}", entry.timestamp)?;
        }
    }
    Ok(out.flush()?)
}
