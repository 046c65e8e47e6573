//! `guestd busy` and `guestd idle`: the socket's clients for people and shell scripts.

use std::ffi::OsString;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, ExitStatus};
use std::time::Duration;

use guestd_protocol::wire::activity::v1 as wire;

/// How long `guestd busy` without a command holds when it is not told.
const DEFAULT_TTL: Duration = Duration::from_secs(600);

/// With a command the hold ends with it, so it asks for all that it may have.
const WHILE_IT_RUNS: Duration = Duration::from_secs(7 * 24 * 3600);

/// How long the agent may take to answer. It may be preparing a release, which takes two seconds at most.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

const USAGE: &str = "\
usage: guestd busy [--why TEXT] [--ttl DURATION] [--socket PATH] [-- COMMAND [ARGUMENT]...]
       guestd idle [--json] [--socket PATH]

  busy           keep the sandbox while COMMAND runs, or for DURATION (10m) without one
  --why TEXT     what for, as the explain view shows it
  --ttl DURATION the longest time, for example 90s, 10m or 2h; the host's budget may be shorter
  idle           why this sandbox is alive, and for how long nobody has used it
  --json         for programs
";

#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error("no agent answers at {socket}: {source}")]
    NoAgent { socket: String, source: io::Error },
    #[error("the agent broke off: {0}")]
    Broken(#[from] io::Error),
    #[error("{0}")]
    Refused(String),
    #[error("the agent's answer makes no sense: {0:?}")]
    Answer(String),
    #[error("{command:?} could not be started: {source}")]
    Command { command: OsString, source: io::Error },
    #[error("{0}\n\n{USAGE}")]
    Usage(#[from] lexopt::Error),
    #[error("--ttl: {0:?} is not a duration; write 90, 90s, 10m or 2h")]
    Duration(String),
}

/// Runs `guestd busy` or `guestd idle`, when the arguments (without the program's own name) say so.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> Option<ExitCode> {
    let mut arguments = arguments.into_iter();
    let name = arguments.next()?;
    let parser = lexopt::Parser::from_args(arguments);
    let done = match name.as_encoded_bytes() {
        b"busy" => run_busy(parser),
        b"idle" => run_idle(parser),
        _ => return None,
    };
    Some(done.unwrap_or_else(|error| {
        eprintln!("guestd {}: {error}", name.display());
        ExitCode::from(if matches!(error, CommandError::Usage(_) | CommandError::Duration(_)) {
            2
        } else {
            1
        })
    }))
}

fn run_busy(mut parser: lexopt::Parser) -> Result<ExitCode, CommandError> {
    use lexopt::prelude::{Long, Short, Value, ValueExt as _};
    let mut asked = Busy::default();
    let mut socket = PathBuf::from(super::SOCKET_PATH);
    while let Some(argument) = parser.next()? {
        match argument {
            Long("why") => asked.why = Some(parser.value()?.string()?),
            Long("ttl") => asked.ttl = Some(parse_duration(&parser.value()?.string()?)?),
            Long("socket") => socket = PathBuf::from(parser.value()?),
            Long("help") | Short('h') => {
                print!("{USAGE}");
                return Ok(ExitCode::SUCCESS);
            }
            // The command and all that follows, options of its own included.
            Value(program) => {
                asked.command = std::iter::once(program).chain(parser.raw_args()?).collect();
                break;
            }
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(busy(&socket, &asked)?.map_or(ExitCode::SUCCESS, exit_code))
}

fn run_idle(mut parser: lexopt::Parser) -> Result<ExitCode, CommandError> {
    use lexopt::prelude::{Long, Short};
    let mut json = false;
    let mut socket = PathBuf::from(super::SOCKET_PATH);
    while let Some(argument) = parser.next()? {
        match argument {
            Long("json") => json = true,
            Long("socket") => socket = PathBuf::from(parser.value()?),
            Long("help") | Short('h') => {
                print!("{USAGE}");
                return Ok(ExitCode::SUCCESS);
            }
            other => return Err(other.unexpected().into()),
        }
    }
    idle(&socket, json)?;
    Ok(ExitCode::SUCCESS)
}

/// A signal reads as a shell has it: 128 and its number.
fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

struct Agent(BufReader<UnixStream>);

impl Agent {
    fn connect(socket: &Path) -> Result<Self, CommandError> {
        let no_agent = |source| CommandError::NoAgent { socket: socket.display().to_string(), source };
        let stream = UnixStream::connect(socket).map_err(no_agent)?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        Ok(Self(BufReader::new(stream)))
    }

    fn ask(&mut self, line: &str) -> Result<String, CommandError> {
        self.0.get_mut().write_all(format!("{line}\n").as_bytes())?;
        let mut answer = String::new();
        self.0.read_line(&mut answer)?;
        let answer = answer.trim_end();
        match answer.split_once(' ').unwrap_or((answer, "")) {
            ("OK", rest) => Ok(rest.to_owned()),
            ("ERR", why) => Err(CommandError::Refused(why.to_owned())),
            _ => Err(CommandError::Answer(answer.to_owned())),
        }
    }
}

/// What `guestd busy` was asked to do.
#[derive(Debug, Default)]
pub struct Busy {
    pub why: Option<String>,
    pub ttl: Option<Duration>,
    /// A program and its arguments; without one the hold outlives this call.
    pub command: Vec<OsString>,
}

/// Runs the command as busy, or holds for a while. The result is the command's exit status.
///
/// # Errors
/// When the agent refuses, or the command cannot be started. A command is started even if no agent answers or the budget is spent: its
/// work matters more than its hold; the reason is said on stderr.
pub fn busy(socket: &Path, busy: &Busy) -> Result<Option<ExitStatus>, CommandError> {
    let Some(program) = busy.command.first() else {
        let ttl = busy.ttl.unwrap_or(DEFAULT_TTL).as_secs();
        let why = busy.why.as_deref().unwrap_or("guestd busy");
        let answer = Agent::connect(socket)?.ask(&format!("HOLD {ttl} {}", one_line(why)))?;
        let (id, granted) = answer.split_once(' ').ok_or_else(|| CommandError::Answer(answer.clone()))?;
        println!("busy for {granted} s (inhibitor {id})");
        return Ok(None);
    };
    let ttl = busy.ttl.unwrap_or(WHILE_IT_RUNS).as_secs();
    let why = busy.why.clone().unwrap_or_else(|| program.to_string_lossy().into_owned());
    let taken = Agent::connect(socket).and_then(|mut agent| {
        agent.ask(&format!("BUSY {ttl} {}", one_line(&why)))?;
        Ok(agent)
    });
    // The hold lives as long as this connection.
    let _agent = taken.inspect_err(|error| eprintln!("guestd busy: not held: {error}")).ok();
    let status = std::process::Command::new(program).args(&busy.command[1..]).status();
    status.map(Some).map_err(|source| CommandError::Command { command: program.clone(), source })
}

fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(200).collect()
}

/// Prints the explain view: lines for people, or the agent's JSON.
///
/// # Errors
/// When no agent answers.
pub fn idle(socket: &Path, json: bool) -> Result<(), CommandError> {
    let answer = Agent::connect(socket)?.ask("IDLE")?;
    if json {
        println!("{answer}");
        return Ok(());
    }
    let explained = serde_json::from_str(&answer).map_err(|_| CommandError::Answer(answer.clone()))?;
    print!("{}", describe(&explained));
    Ok(())
}

fn describe(explained: &wire::ExplainResponse) -> String {
    let seconds = |millis: u64| format!("{:.1} s", millis as f64 / 1000.0);
    let mut lines = Vec::new();
    let report = explained.report.as_option().cloned().unwrap_or_default();
    lines.push(match report.counting {
        0 => format!("idle for {}", seconds(report.idle_for_ms)),
        count => format!("in use by {count}"),
    });
    if !report.last_class.is_empty() {
        lines.push(format!("last use: {} {}", report.last_class, report.last_origin));
    }
    lines.push(format!(
        "inhibitors may hold for {} of {} more",
        seconds(explained.inhibitor_left_ms),
        seconds(explained.inhibitor_budget_ms)
    ));
    lines.push(if report.holds.is_empty() { "holds: none".to_owned() } else { "holds:".to_owned() });
    for hold in &report.holds {
        let mark = if hold.counts { '*' } else { ' ' };
        let pid = if hold.pid == 0 { String::new() } else { format!(" pid {}", hold.pid) };
        lines.push(format!(
            "  {mark} {:<12} {:>10} since, {:>10} since it moved{pid}  {}",
            hold.class,
            seconds(hold.age_ms),
            seconds(hold.since_progress_ms),
            hold.origin
        ));
    }
    lines.push("history:".to_owned());
    for transition in &explained.transitions {
        lines.push(format!("  {:>10} ago  {}", seconds(transition.age_ms), transition.what));
    }
    lines.push(String::new());
    lines.join("\n")
}

/// Reads `90`, `90s`, `10m` or `2h`.
///
/// # Errors
/// [`CommandError::Duration`].
pub fn parse_duration(text: &str) -> Result<Duration, CommandError> {
    let bad = || CommandError::Duration(text.to_owned());
    let (digits, unit) = match text.strip_suffix(['s', 'm', 'h']) {
        Some(digits) => (digits, &text[digits.len()..]),
        None => (text, "s"),
    };
    let factor = match unit {
        "h" => 3600,
        "m" => 60,
        _ => 1,
    };
    let number: u64 = digits.parse().map_err(|_| bad())?;
    number.checked_mul(factor).map(Duration::from_secs).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_as_people_write_them() {
        for (text, seconds) in [("90", 90), ("90s", 90), ("10m", 600), ("2h", 7200)] {
            assert_eq!(parse_duration(text).unwrap(), Duration::from_secs(seconds));
        }
        for bad in ["", "m", "1.5h", "-1", "10 m", "10d", "99999999999999999999h", "9999999999999999999h"] {
            assert!(parse_duration(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_reason_stays_on_its_line() {
        assert_eq!(one_line("a\nDROP 1\r\n"), "a DROP 1  ");
    }

    #[test]
    fn the_view_marks_what_keeps_the_machine() {
        let hold = wire::Hold { class: "inhibitor".to_owned(), counts: true, pid: 7, ..Default::default() };
        let report = wire::Report { counting: 1, holds: vec![hold], ..Default::default() };
        let text = describe(&wire::ExplainResponse { report: report.into(), ..Default::default() });
        assert!(
            text.contains("in use by 1") && text.contains("* inhibitor") && text.contains("pid 7"),
            "{text}"
        );
    }
}
