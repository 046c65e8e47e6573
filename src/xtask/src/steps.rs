//! Steps: a title, progress while it runs, and its time when it is done; and running other programs so that their
//! output is out of the way when they succeed and in front of you when they fail.
//!
//! On a terminal a step is a spinner; elsewhere (a log, CI) it is two plain lines.

use std::fs::File;
use std::io::{IsTerminal, Read, Seek, SeekFrom};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

/// How much of a failed program's output is shown.
const TAIL_LINES: usize = 40;
const LINE_WIDTH: usize = 300;
/// The system's own words, which every program passes on.
pub const DISK_FULL: &str = "No space left on device";

/// Runs `work` under a title. The error, if there is one, is said by `main`; here only that the step failed.
pub fn step<T>(title: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let spinner = spinner(title);
    if spinner.is_none() {
        eprintln!("==> {title}");
    }
    let start = Instant::now();
    let outcome = work();
    let seconds = start.elapsed().as_secs_f64();
    if let Some(spinner) = spinner {
        spinner.finish_and_clear();
    }
    match &outcome {
        Ok(_) => eprintln!("  ok {title} ({seconds:.1} s)"),
        Err(_) => eprintln!("FAIL {title} (after {seconds:.1} s)"),
    }
    outcome
}

fn spinner(title: &str) -> Option<ProgressBar> {
    if !std::io::stderr().is_terminal() {
        return None;
    }
    let style = ProgressStyle::with_template("{spinner} {msg} {elapsed}").ok()?;
    let bar = ProgressBar::new_spinner().with_style(style).with_message(title.to_owned());
    bar.enable_steady_tick(Duration::from_millis(100));
    Some(bar)
}

/// Runs a program to its end and returns what it printed on standard output. If it fails, the error carries the end of
/// everything that it printed.
pub fn output(command: &mut Command) -> Result<String> {
    let mut log = tempfile::tempfile().context("cannot make a temporary file for a program's output")?;
    let name = describe(command);
    let stdout = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log.try_clone()?)
        .spawn()
        .and_then(|mut child| {
            let mut text = Vec::new();
            if let Some(mut pipe) = child.stdout.take() {
                pipe.read_to_end(&mut text)?;
            }
            Ok((child.wait()?, text))
        })
        .with_context(|| format!("cannot run `{name}`"));
    let (status, text) = stdout?;
    let text = String::from_utf8_lossy(&text).into_owned();
    if !status.success() {
        bail!("`{name}` failed ({status}):\n{}{}", tail(&mut log), last_lines(&text));
    }
    Ok(text)
}

/// Runs a program to its end; its output is only seen if it fails.
pub fn quietly(command: &mut Command) -> Result<()> {
    let mut log = tempfile::tempfile().context("cannot make a temporary file for a program's output")?;
    let name = describe(command);
    let status = command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log.try_clone()?)
        .status()
        .with_context(|| format!("cannot run `{name}`"))?;
    if !status.success() {
        bail!("`{name}` failed ({status}):\n{}", tail(&mut log));
    }
    Ok(())
}

/// Runs a program to its end with its output where ours is: for test runners, whose output is the point.
pub fn openly(command: &mut Command) -> Result<()> {
    let name = describe(command);
    eprintln!("==> {name}");
    let status = command.status().with_context(|| format!("cannot run `{name}`"))?;
    if !status.success() {
        bail!("`{name}` failed ({status})");
    }
    Ok(())
}

/// The program and its arguments, shortened: some commands carry whole scripts.
fn describe(command: &Command) -> String {
    let program = std::path::Path::new(command.get_program());
    let program = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned();
    let mut words = vec![program];
    for argument in command.get_args() {
        let argument = argument.to_string_lossy();
        let line = argument.lines().next().unwrap_or_default();
        words.push(if line.len() < argument.len() { format!("{line}...") } else { line.to_owned() });
    }
    words.join(" ")
}

fn tail(log: &mut File) -> String {
    let mut bytes = Vec::new();
    let read = log.seek(SeekFrom::Start(0)).and_then(|_| log.read_to_end(&mut bytes));
    match read {
        Ok(_) => {
            let text = String::from_utf8_lossy(&bytes);
            disk_full_line(&text).unwrap_or_default() + &last_lines(&text)
        }
        Err(error) => format!("(its output cannot be read: {error})"),
    }
}

fn last_lines(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].iter().map(|line| indented(line)).collect()
}

/// Programs go on for a while after the disk was full, so the reason may be far above the end.
fn disk_full_line(text: &str) -> Option<String> {
    text.lines().find(|line| line.contains(DISK_FULL)).map(indented)
}

fn indented(line: &str) -> String {
    let end = line.char_indices().nth(LINE_WIDTH).map_or(line.len(), |(at, _)| at);
    format!("    {}{}\n", &line[..end], if end < line.len() { "..." } else { "" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_program_shows_its_own_words() {
        let error =
            quietly(Command::new("sh").args(["-c", "echo reason >&2; exit 3"])).unwrap_err().to_string();
        assert!(error.contains("reason") && error.contains('3'), "{error}");
    }

    #[test]
    fn a_full_disk_is_reported_however_long_ago_it_was() {
        let script = format!("echo 'cp: x: {DISK_FULL}'; seq 1000; exit 1");
        let error = quietly(Command::new("sh").args(["-c", &script])).unwrap_err().to_string();
        assert!(error.contains(&format!("x: {DISK_FULL}")) && error.contains("1000"), "{error}");
    }

    #[test]
    fn standard_output_is_returned_apart_from_the_rest() {
        let text = output(Command::new("sh").args(["-c", "echo out; echo noise >&2"])).unwrap();
        assert_eq!(text, "out\n");
    }

    #[test]
    fn a_script_among_the_arguments_is_shortened() {
        let mut command = Command::new("/usr/bin/sh");
        command.args(["-c", "first\nsecond"]);
        assert_eq!(describe(&command), "sh -c first...");
    }

    #[test]
    fn a_program_that_is_missing_is_named() {
        let error = format!("{:#}", output(&mut Command::new("/no/such/program")).unwrap_err());
        assert!(error.contains("program"), "{error}");
    }
}
