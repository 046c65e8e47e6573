//! An agent of this run: started on a port of its own, ended with its owner.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::client::Client;
use super::http;
use super::proc::Process;
use crate::{steps, workspace};

/// How long a start may take before it counts as failed.
const START_LIMIT: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub struct Agent {
    child: Child,
    address: SocketAddr,
    /// Of code cells.
    code: Option<SocketAddr>,
    folder: tempfile::TempDir,
}

impl Agent {
    /// Starts `program` in a folder of its own under `work`, and waits for its first answer.
    ///
    /// # Errors
    /// When it ends or does not answer in time, with where its log is.
    pub fn start(program: &Path, work: &Path) -> Result<Self> {
        Ok(Self::start_timed(program, work)?.0)
    }

    /// As [`Agent::start`], with a port for code cells and the kernels in `specs`.
    ///
    /// # Errors
    /// As there.
    pub fn start_with_kernels(program: &Path, work: &Path, specs: &Path) -> Result<Self> {
        Ok(Self::launch(program, work, Some(specs))?.0)
    }

    /// As [`Agent::start`], with the time from before the fork to the first answer.
    ///
    /// # Errors
    /// As there.
    pub fn start_timed(program: &Path, work: &Path) -> Result<(Self, Duration)> {
        Self::launch(program, work, None)
    }

    fn launch(program: &Path, work: &Path, specs: Option<&Path>) -> Result<(Self, Duration)> {
        let folder = tempfile::tempdir_in(work).context("cannot make a folder for the agent")?;
        let address = free_address()?;
        let log = File::create(folder.path().join("log"))?;
        let mut command = Command::new(program);
        command.arg("serve").arg("--port").arg(address.port().to_string());
        let code = specs.map(|_| free_address()).transpose()?;
        if let (Some(code), Some(specs)) = (code, specs) {
            command.arg("--code-port").arg(code.port().to_string()).arg("--kernels").arg(specs);
        }
        command.current_dir(folder.path()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let begin = Instant::now();
        let child = command.spawn().with_context(|| format!("cannot run {}", program.display()))?;
        let mut agent = Self { child, address, code, folder };
        let socket = agent.first_connection(begin)?;
        Client::over(socket)?.health()?;
        let elapsed = begin.elapsed();
        if !workspace::is_root() {
            agent.run_commands_as_me()?;
        }
        Ok((agent, elapsed))
    }

    /// The agent's built-in default is root, which only root's agent can become.
    fn run_commands_as_me(&self) -> Result<()> {
        let name = steps::output(Command::new("id").arg("-un"))?;
        let body = serde_json::json!({"defaultUser": name.trim()}).to_string();
        let headers = [("Content-Type", "application/json")];
        let mut request = http::head("POST", "/init", &headers, Some(body.len() as u64));
        request.extend_from_slice(body.as_bytes());
        let (status, answer) = self.connect()?.call(&request)?;
        ensure!(status == 204, "/init answered with status {status}: {}", String::from_utf8_lossy(&answer));
        Ok(())
    }

    fn first_connection(&mut self, begin: Instant) -> Result<TcpStream> {
        loop {
            match TcpStream::connect(self.address) {
                Ok(socket) => return Ok(socket),
                Err(_) if begin.elapsed() < START_LIMIT => {
                    if let Some(status) = self.child.try_wait()? {
                        bail!("the agent ended with {status}: {}", self.log());
                    }
                    std::thread::sleep(Duration::from_micros(50));
                }
                Err(error) => bail!("the agent does not listen ({error}): {}", self.log()),
            }
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    pub fn connect(&self) -> Result<Client> {
        Client::over(self.socket()?)
    }

    /// To the port for code cells.
    ///
    /// # Errors
    /// When the agent has none.
    pub fn connect_code(&self) -> Result<Client> {
        Client::over(TcpStream::connect(self.code.context("this agent runs no code cells")?)?)
    }

    pub fn socket(&self) -> Result<TcpStream> {
        Ok(TcpStream::connect(self.address)?)
    }

    pub fn process(&self) -> Process {
        Process::new(self.child.id())
    }

    /// A folder on the file system of the build, which is gone with the agent.
    pub fn folder(&self) -> PathBuf {
        self.folder.path().to_owned()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let pid = i32::try_from(self.child.id()).map(Pid::from_raw);
        let asked = pid.is_ok_and(|pid| kill(pid, Signal::SIGTERM).is_ok());
        let limit = Instant::now() + Duration::from_secs(3);
        while asked && Instant::now() < limit {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        // Nothing to do about a failure: the agent is gone, or not ours to end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port that nobody listens on at this moment.
fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}
