//! What to start: a request, checked and completed (contract: envd.md sections 2.2 to 2.5).

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ffi::{CString, NulError};
use std::path::{Path, PathBuf};
use std::time::Instant;

use guestd_protocol::wire::process as wire;

use super::Size;
use crate::cgroup::{LimitError, Limits};
use crate::identity::{PathError, User, resolve_path};
use crate::settings::Values;

/// The search path of a command whose environment has none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The kind of terminal, where nobody says: what SDKs set (contract: envd.md section 2.3).
const DEFAULT_TERM: &str = "xterm-256color";

/// The most of a client's own text that is said again, in bytes.
const ECHO_LIMIT: usize = 1024;

#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    #[error("process: a start request names a process")]
    NoProcess,
    #[error("process.cmd: a command must not be empty")]
    NoCommand,
    #[error("{field}: must not contain a NUL byte")]
    Nul { field: &'static str },
    #[error("process.envs: {:?} cannot be the name of a variable", excerpt(.0))]
    Variable(String),
    #[error(transparent)]
    Limit(#[from] LimitError),
    #[error("process.cwd: {0}")]
    Path(#[from] PathError),
    #[error("cwd '{}' does not exist", excerpt(&.0.to_string_lossy()))]
    NoDirectory(PathBuf),
}

/// A command, ready to be started.
#[derive(Debug)]
pub struct Spec {
    /// As the client sent it, for `List`.
    pub config: wire::ProcessConfig,
    pub tag: Option<String>,
    pub user: User,
    pub directory: PathBuf,
    pub stdin: bool,
    /// Runs on a terminal of this size.
    pub terminal: Option<Size>,
    /// Asked for by the client.
    pub limits: Limits,
    /// What `/init` says for commands that ask for none.
    pub default_limits: Limits,
    pub started: Instant,
    pub(super) argv: Vec<CString>,
    pub(super) environment: Vec<CString>,
    /// The files to try in turn, as a shell would.
    pub(super) candidates: Vec<CString>,
}

impl Spec {
    /// Forgets what only the start needs: the rest is kept for as long as the process is remembered.
    pub(super) fn forget_start(&mut self) {
        self.argv = Vec::new();
        self.environment = Vec::new();
        self.candidates = Vec::new();
    }

    /// Checks a start request.
    ///
    /// # Errors
    /// A [`SpecError`] that names the field; all become `invalid_argument`.
    pub fn new(request: wire::StartRequest, user: User, settings: &Values) -> Result<Self, SpecError> {
        let config = request.process.into_option().ok_or(SpecError::NoProcess)?;
        if config.cmd.is_empty() {
            return Err(SpecError::NoCommand);
        }
        let limits = request.limits.into_option().unwrap_or_default();
        let limits = Limits::of_start(&limits)?;
        let cwd = config.cwd.as_deref().unwrap_or_default();
        let directory = resolve_path(cwd, &user, settings.default_workdir.as_deref())?;
        if std::fs::metadata(&directory).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound) {
            return Err(SpecError::NoDirectory(directory));
        }
        let terminal = request.pty.into_option().map(|pty| {
            let size = pty.size.into_option().unwrap_or_default();
            Size::from_wire(size.cols, size.rows, None)
        });
        // environ(7)
        if let Some(name) = config.envs.keys().find(|name| name.is_empty() || name.contains('=')) {
            return Err(SpecError::Variable(name.clone()));
        }
        let mut variables = environment(&config, &user, settings);
        if terminal.is_some() {
            variables.entry("TERM".to_owned()).or_insert_with(|| DEFAULT_TERM.to_owned());
        }
        let path = variables.get("PATH").map_or(DEFAULT_PATH, String::as_str);
        let nul = |field| move |_: NulError| SpecError::Nul { field };
        let candidates = candidates(&config.cmd, path, &directory);
        let mut argv = vec![CString::new(config.cmd.as_str()).map_err(nul("process.cmd"))?];
        for argument in &config.args {
            argv.push(CString::new(argument.as_str()).map_err(nul("process.args"))?);
        }
        Ok(Self {
            candidates: candidates
                .into_iter()
                .map(CString::new)
                .collect::<Result<_, _>>()
                .map_err(nul("process.cmd"))?,
            environment: variables
                .iter()
                .map(|(name, value)| CString::new(format!("{name}={value}")))
                .collect::<Result<_, _>>()
                .map_err(nul("process.envs"))?,
            argv,
            tag: request.tag,
            user,
            directory,
            stdin: request.stdin.unwrap_or(true),
            terminal,
            limits,
            default_limits: settings.process_limits,
            started: Instant::now(),
            config,
        })
    }

    /// The file name of the executable, for logs: arguments may hold secrets.
    pub fn name(&self) -> &str {
        let name = self.config.cmd.rsplit('/').next().unwrap_or_default();
        &name[..name.floor_char_boundary(ECHO_LIMIT)]
    }

    /// The command as one line, for people: the beginning of a long one.
    pub fn command_line(&self) -> String {
        let mut line = self.config.cmd.clone();
        for argument in &self.config.args {
            if line.len() > ECHO_LIMIT {
                break;
            }
            line.push(' ');
            line.push_str(argument);
        }
        excerpt(&line).into_owned()
    }
}

/// The beginning of a client's text, with an ellipsis where more follows.
pub(super) fn excerpt(text: &str) -> Cow<'_, str> {
    match text.floor_char_boundary(ECHO_LIMIT) {
        end if end < text.len() => Cow::Owned(format!("{}…", &text[..end])),
        _ => Cow::Borrowed(text),
    }
}

/// Later wins: the user's basics, the sandbox's own variables, those of `/init`, the request's.
fn environment(config: &wire::ProcessConfig, user: &User, settings: &Values) -> BTreeMap<String, String> {
    let path = std::env::var("PATH").unwrap_or_else(|_| DEFAULT_PATH.to_owned());
    let mut variables = BTreeMap::from([
        ("PATH".to_owned(), path),
        ("HOME".to_owned(), user.home.to_string_lossy().into_owned()),
        ("USER".to_owned(), user.name.clone()),
        ("LOGNAME".to_owned(), user.name.clone()),
    ]);
    variables.extend(settings.environment.clone());
    variables.extend(settings.internal_environment.clone());
    variables.extend(config.envs.iter().map(|(name, value)| (name.clone(), value.clone())));
    variables
}

/// A command with a slash is a path from its working directory, any other is looked for along PATH.
fn candidates(command: &str, path: &str, directory: &Path) -> Vec<String> {
    if command.contains('/') {
        return vec![command.to_owned()];
    }
    path.split(':')
        .map(|folder| match folder {
            "" => directory.join(command),
            folder => directory.join(folder).join(command),
        })
        .map(|candidate| candidate.to_string_lossy().into_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_that_is_said_again_is_short() {
        assert_eq!(excerpt("short"), "short");
        assert_eq!(excerpt(&"x".repeat(ECHO_LIMIT)), "x".repeat(ECHO_LIMIT));
        let long = format!("x{}", "é".repeat(ECHO_LIMIT));
        assert_eq!(excerpt(&long), format!("x{}…", "é".repeat(ECHO_LIMIT / 2 - 1)));
    }

    #[test]
    fn a_command_with_a_slash_is_not_searched_for() {
        assert_eq!(candidates("./run", "/bin", Path::new("/w")), ["./run"]);
        assert_eq!(candidates("run", "/bin::rel", Path::new("/w")), ["/bin/run", "/w/run", "/w/rel/run"]);
    }
}
