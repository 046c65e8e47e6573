//! `hostd idle replay`: tries a policy on recorded traces.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use guestd_idle::Policy;

use super::replay::{Outcome, parse, replay};
use crate::config::Replay;

/// # Errors
/// When the policy or a trace cannot be read.
pub fn run(command: &Replay) -> Result<()> {
    let policy = policy(&command.policy)?;
    let idle_timeout = command.idle_timeout.map(Duration::from_secs);
    let mut out = std::io::stdout().lock();
    let (mut saved, mut cut) = (0.0, 0);
    for path in &command.traces {
        let named = || path.display().to_string();
        let text = std::fs::read_to_string(path).with_context(named)?;
        let outcome =
            replay(&parse(&text).with_context(named)?, policy.clone(), idle_timeout).with_context(named)?;
        saved += outcome.saved_s;
        cut += outcome.cut.len();
        if command.json {
            serde_json::to_writer(&mut out, &outcome)?;
            writeln!(out)?;
        } else {
            writeln!(out, "{}", describe(&outcome))?;
        }
    }
    if !command.json && command.traces.len() > 1 {
        writeln!(out, "in all: {saved:.1} s saved, {cut} pieces of work cut")?;
    }
    Ok(())
}

/// A JSON object of class names and words, or a file that holds one.
fn policy(text: &str) -> Result<Policy> {
    let json = if text.trim_start().starts_with('{') {
        text.to_owned()
    } else {
        std::fs::read_to_string(Path::new(text)).with_context(|| format!("--policy {text}"))?
    };
    let words: BTreeMap<String, String> = serde_json::from_str(&json)
        .context("--policy: a JSON object of strings, as metadata.idle_policy has it")?;
    Ok(Policy::from_words(&words)?)
}

fn describe(outcome: &Outcome) -> String {
    let mut lines = vec![outcome.sandbox.clone()];
    let recorded = match (outcome.recorded_end_s, &outcome.recorded_reason) {
        (Some(end), Some(reason)) => format!("{end:.1} s ({reason})"),
        _ => "not in the trace".to_owned(),
    };
    lines.push(format!("  recorded end     {recorded}"));
    let more = if outcome.beyond_the_trace { ", if nothing more had happened" } else { "" };
    lines.push(format!("  with this policy {:.1} s ({}){more}", outcome.end_s, outcome.reason));
    lines.push(format!("  saved            {:.1} s", outcome.saved_s));
    lines.push(format!("  work cut         {}", if outcome.cut.is_empty() { "none" } else { "" }));
    for cut in &outcome.cut {
        let ended = cut.ended_s.map_or("the end".to_owned(), |ended| format!("{ended:.1} s"));
        lines.push(format!("    {:<12} {:.1} s to {ended}  {}", cut.class, cut.began_s, cut.origin));
    }
    // Some of it was chosen by a guest: it must not speak to the operator's terminal.
    lines.iter().map(|line| line.trim_end().replace(char::is_control, "?")).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_json_or_a_file() {
        assert_eq!(policy(r#"{"detached":"alive"}"#).unwrap().words()["detached"], "alive");
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), r#"{"terminal":"ignore"}"#).unwrap();
        assert_eq!(policy(file.path().to_str().unwrap()).unwrap().words()["terminal"], "ignore");
        assert!(policy("/no/such/file").is_err() && policy("{}x").is_err());
    }
}
