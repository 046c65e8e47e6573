//! Starts hostd for the other commands, and ends it with them.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::deps;

/// From the start to the `ready` line. hostd may make a template's snapshot first, on an emulated machine.
const READY_DEADLINE: Duration = Duration::from_secs(120);
/// From the request to end until it is killed: it stops its sandboxes first.
const STOP_DEADLINE: Duration = Duration::from_secs(15);

/// How sandboxes are run. The words are hostd's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Runtime {
    Auto,
    Qemu,
    Container,
}

impl Runtime {
    pub fn word(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Qemu => "qemu",
            Self::Container => "container",
        }
    }

    pub fn purpose(self) -> deps::Purpose {
        match self {
            Self::Container => deps::Purpose::Container,
            Self::Auto | Self::Qemu => deps::Purpose::Demo,
        }
    }
}

/// What hostd is started with.
#[derive(Clone, Debug)]
pub struct Settings {
    pub program: PathBuf,
    pub data: PathBuf,
    pub images: PathBuf,
    pub api: SocketAddr,
    pub proxy: SocketAddr,
    pub runtime: Runtime,
    /// Further options, passed on as they are.
    pub more: Vec<String>,
}

/// A hostd that answers. Ends with this value.
#[derive(Debug)]
pub struct Supervisor {
    child: Child,
    pub api: String,
    pub proxy: String,
    /// With `--tls-listen`.
    pub tls: Option<String>,
}

impl Supervisor {
    /// Starts hostd and waits until it serves. `log` gets what it says on standard error; without one it says it here.
    pub fn start(settings: &Settings, log: Option<&Path>) -> Result<Self> {
        // Ctrl-C goes to the whole group of processes: hostd ends its sandboxes and itself, and we wait for that. A
        // handler, unlike a blocked or ignored signal, is not inherited by the processes that are to end.
        ctrlc::set_handler(|| ()).context("cannot handle Ctrl-C")?;
        let mut command = Command::new(&settings.program);
        command.arg("serve").arg("--data").arg(&settings.data).arg("--images").arg(&settings.images);
        command.args(["--api", &settings.api.to_string(), "--proxy", &settings.proxy.to_string()]);
        command.args(["--runtime", settings.runtime.word()]);
        if settings.runtime != Runtime::Container {
            command.arg("--vhost-device-vsock").arg(deps::vhost_device_vsock()?);
        }
        command.args(&settings.more).stdin(Stdio::null()).stdout(Stdio::piped());
        if let Some(log) = log {
            let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
            command.stderr(file);
        }
        let child = command.spawn().with_context(|| format!("cannot run {}", settings.program.display()))?;
        let mut supervisor = Self { child, api: String::new(), proxy: String::new(), tls: None };
        let stdout = supervisor.child.stdout.take().context("hostd has no standard output")?;
        match wait_for_ready(stdout) {
            Ok((api, proxy, tls)) => {
                (supervisor.api, supervisor.proxy, supervisor.tls) = (api, proxy, tls);
                Ok(supervisor)
            }
            Err(error) => {
                supervisor.stop();
                let said = log.and_then(|log| std::fs::read_to_string(log).ok()).unwrap_or_default();
                Err(error.context(format!("hostd did not start\n{said}")))
            }
        }
    }

    /// hostd's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until hostd ends by itself.
    pub fn wait(&mut self) -> Result<()> {
        let status = self.child.wait()?;
        if !status.success() {
            bail!("hostd ended with {status}");
        }
        Ok(())
    }

    /// Asks hostd to end, and kills it if it does not.
    pub fn stop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        let pid = i32::try_from(self.child.id()).map(Pid::from_raw);
        // It may have ended since the line above; then there is nothing to ask.
        let _ = pid.map(|pid| kill(pid, Signal::SIGTERM));
        let start = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) {
            if start.elapsed() > STOP_DEADLINE {
                eprintln!("     hostd did not end within {} s and is killed", STOP_DEADLINE.as_secs());
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Reads lines until the one that names the addresses, and goes on passing lines through after it.
fn wait_for_ready(stdout: ChildStdout) -> Result<Addresses> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            match ready_addresses(&line) {
                // The receiver is gone only when nobody waits any more.
                Some(addresses) => drop(sender.send(addresses)),
                None => println!("{line}"),
            }
        }
    });
    receiver.recv_timeout(READY_DEADLINE).map_err(|error| match error {
        mpsc::RecvTimeoutError::Timeout => {
            anyhow::anyhow!("hostd was not ready within {} s", READY_DEADLINE.as_secs())
        }
        mpsc::RecvTimeoutError::Disconnected => anyhow::anyhow!("hostd ended before it was ready"),
    })
}

/// Of the API, the proxy, and TLS if there is any.
type Addresses = (String, String, Option<String>);

fn ready_addresses(line: &str) -> Option<Addresses> {
    let words = line.strip_prefix("ready ")?;
    let value = |name: &str| words.split(' ').find_map(|word| word.strip_prefix(name)).map(str::to_owned);
    Some((value("api=")?, value("proxy=")?, value("tls=")))
}

/// An address on this machine that nothing listens on.
pub fn free_address() -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").context("cannot listen on this machine")?;
    Ok(listener.local_addr()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_addresses_are_read_from_the_ready_line() {
        let line = "ready api=http://127.0.0.1:3000 proxy=http://127.0.0.1:3002";
        let (api, proxy) = ("http://127.0.0.1:3000".to_owned(), "http://127.0.0.1:3002".to_owned());
        assert_eq!(ready_addresses(line), Some((api.clone(), proxy.clone(), None)));
        let tls = Some("https://127.0.0.1:3443".to_owned());
        assert_eq!(ready_addresses(&format!("{line} tls=https://127.0.0.1:3443")), Some((api, proxy, tls)));
        assert_eq!(ready_addresses("not ready api=x proxy=y"), None);
        assert_eq!(ready_addresses("ready api=x"), None);
    }
}
