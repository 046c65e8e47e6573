//! What the operator can set, as flags or environment variables.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use guestd_idle::Limits;

use crate::tls;

/// The host supervisor: boots microVMs, brings SDK traffic to them, and ends them when they are idle or due.
#[derive(Debug, Parser)]
#[command(name = "hostd", version, about)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the supervisor.
    Serve(Box<Serve>),
    /// Say why a sandbox is alive, or why it is gone.
    Explain(Explain),
    /// Idleness: try a policy on what happened.
    #[command(subcommand)]
    Idle(Idle),
    /// Print what a sandbox's agent said, alive or within an hour after its end.
    Logs(Logs),
    /// The process around one sandbox; started by `serve`.
    #[command(hide = true)]
    Guard,
}

#[derive(Debug, Args)]
pub struct Explain {
    /// The sandbox's id.
    pub id: String,
    /// Where the supervisor's API listens.
    #[arg(long, default_value = "http://127.0.0.1:3000", env = "HOSTD_API_URL")]
    pub api: String,
    /// The API key, if the supervisor asks for one.
    #[arg(long, env = "HOSTD_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// Show it again each second, until the sandbox has ended. Looking is never use.
    #[arg(long, conflicts_with = "json")]
    pub watch: bool,
}

#[derive(Debug, Subcommand)]
pub enum Idle {
    /// Replay recorded traces (`serve --idle-trace`) under another policy: what would have been released when, the time that saves and
    /// the work that it cuts.
    Replay(Replay),
}

#[derive(Debug, Args)]
pub struct Replay {
    /// Traces, `<sandbox>.jsonl` each.
    #[arg(required = true)]
    pub traces: Vec<PathBuf>,
    /// A JSON object as in metadata.idle_policy, or a file that holds one; what it does not name counts as by default.
    #[arg(long, default_value = "{}")]
    pub policy: String,
    /// Another idle timeout than the recorded one, in seconds.
    #[arg(long)]
    pub idle_timeout: Option<u64>,
    /// Print one JSON object for each trace.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Logs {
    /// The sandbox's id.
    pub id: String,
    /// Go on as lines come, until the sandbox ends.
    #[arg(long, short)]
    pub follow: bool,
    /// What the machine's console said instead, which tells no times.
    #[arg(long)]
    pub console: bool,
    /// Where the supervisor's API listens.
    #[arg(long, default_value = "http://127.0.0.1:3000", env = "HOSTD_API_URL")]
    pub api: String,
    /// The API key, if the supervisor asks for one.
    #[arg(long, env = "HOSTD_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Print JSON, a line each.
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RuntimeChoice {
    /// QEMU where it is installed, else containers.
    Auto,
    Qemu,
    Container,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AccelChoice {
    /// KVM where a probe shows that it boots a kernel, else emulation.
    Auto,
    Kvm,
    Tcg,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LinkChoice {
    /// vsock where vhost-device-vsock is installed, else the serial port.
    Auto,
    Vsock,
    Serial,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnExit {
    /// End all sandboxes, with the reason host_shutdown.
    Stop,
    /// Leave them running for the next start to take over.
    Keep,
}

#[derive(Debug, Args)]
pub struct Serve {
    /// Records and run folders; made if missing. One supervisor at a time.
    #[arg(long, env = "HOSTD_DATA", default_value = "/var/lib/hostd")]
    pub data: PathBuf,
    /// Templates, a folder each, as `cargo xtask image` makes them.
    #[arg(long, env = "HOSTD_IMAGES", default_value = "/var/lib/hostd/images")]
    pub images: PathBuf,
    /// Write down what happens in each sandbox, for `hostd idle replay`: a folder for files `<sandbox>.jsonl`, which nobody removes.
    #[arg(long, env = "HOSTD_IDLE_TRACE")]
    pub idle_trace: Option<PathBuf>,
    /// Where the control plane listens.
    #[arg(long, env = "HOSTD_API", default_value = "127.0.0.1:3000")]
    pub api: SocketAddr,
    /// Where the sandbox proxy listens.
    #[arg(long, env = "HOSTD_PROXY", default_value = "127.0.0.1:3002")]
    pub proxy: SocketAddr,
    /// Where both are served over TLS as well, such as 127.0.0.1:3443: sandboxes at `https://<port>-<id>.<domain>`, the control plane at
    /// `https://api.<domain>`.
    #[arg(long, env = "HOSTD_TLS_LISTEN")]
    pub tls_listen: Option<SocketAddr>,
    /// The domain that the TLS listener serves, without a port [default: sbx.localhost].
    #[arg(long, env = "HOSTD_TLS_DOMAIN", value_parser = tls::parse_domain, requires = "tls_listen")]
    pub tls_domain: Option<String>,
    /// A certificate for `*.<domain>` in PEM, with those that lead to its authority; read again each hour. Without one hostd signs its own,
    /// and clients have to trust `<data>/tls/<domain>/ca.pem`.
    #[arg(long, env = "HOSTD_TLS_CERTIFICATE", requires_all = ["tls_listen", "tls_key"])]
    pub tls_certificate: Option<PathBuf>,
    /// The certificate's private key in PEM.
    #[arg(long, env = "HOSTD_TLS_KEY", requires_all = ["tls_listen", "tls_certificate"])]
    pub tls_key: Option<PathBuf>,
    /// An API key to accept; repeatable. Without one any key is accepted, which is possible on a loopback address only.
    #[arg(long, env = "HOSTD_API_KEYS", value_delimiter = ',', hide_env_values = true)]
    pub api_key: Vec<String>,
    /// Accept any API key on an address that others can reach.
    #[arg(long)]
    pub insecure_open: bool,
    #[arg(long, env = "HOSTD_RUNTIME", value_enum, default_value_t = RuntimeChoice::Auto)]
    pub runtime: RuntimeChoice,
    #[arg(long, env = "HOSTD_ACCEL", value_enum, default_value_t = AccelChoice::Auto)]
    pub accel: AccelChoice,
    #[arg(long, env = "HOSTD_LINK", value_enum, default_value_t = LinkChoice::Auto)]
    pub link: LinkChoice,
    /// Seconds that no sandbox outlives.
    #[arg(long, env = "HOSTD_MAX_LIFETIME", default_value_t = 3600, value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    pub max_lifetime: u64,
    /// The lowest idle_timeout that is accepted, in seconds.
    #[arg(long, env = "HOSTD_IDLE_FLOOR", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub idle_floor: u64,
    /// How many sandboxes may be alive at once.
    #[arg(long, env = "HOSTD_MAX_SANDBOXES", default_value_t = 1000)]
    pub max_sandboxes: usize,
    /// The template of the sandboxes that the Deno SDKs create.
    #[arg(long, env = "HOSTD_DENO_TEMPLATE", default_value = "base")]
    pub deno_template: String,
    /// Seconds of silence after which the client of a Deno session counts as gone.
    #[arg(long, env = "HOSTD_DENO_LIVENESS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(2..=3600))]
    pub deno_liveness: u64,
    /// How long `guestd busy` and other inhibitors may hold a sandbox in all, in seconds. Never past the maximum lifetime.
    #[arg(long, env = "HOSTD_INHIBITOR_BUDGET", default_value_t = 3600)]
    pub inhibitor_budget: u64,
    /// Memory of a sandbox, in MiB.
    #[arg(long, env = "HOSTD_MEMORY_MB", default_value_t = 512, value_parser = clap::value_parser!(u32).range(128..=1_048_576))]
    pub memory_mb: u32,
    /// Processors of a sandbox. One is best under emulation.
    #[arg(long, env = "HOSTD_CPUS", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub cpus: u32,
    /// Serve one template under another name, as NAME=TEMPLATE; repeatable. A folder of that name wins.
    #[arg(long, value_parser = parse_alias, default_value = "code-interpreter-v1=base")]
    pub alias: Vec<(String, String)>,
    /// What to do with the sandboxes when this supervisor is asked to end. A killed one always leaves them.
    #[arg(long, env = "HOSTD_ON_EXIT", value_enum, default_value_t = OnExit::Stop)]
    pub on_exit: OnExit,
    #[arg(long, env = "HOSTD_QEMU", default_value = "qemu-system-x86_64")]
    pub qemu: PathBuf,
    #[arg(long, env = "HOSTD_VHOST_DEVICE_VSOCK", default_value = "vhost-device-vsock")]
    pub vhost_device_vsock: PathBuf,
    #[arg(long, env = "HOSTD_RUNC", default_value = "runc")]
    pub runc: PathBuf,
    /// Run each VM as a user of its own, from this number on; 0 runs them as the supervisor's user. Only as root.
    #[arg(long, env = "HOSTD_FIRST_UID", default_value_t = 2_000_000)]
    pub first_uid: u32,
    /// For tests of the two-phase release: a pause in each of its windows, in milliseconds.
    #[arg(long, env = "HOSTD_RELEASE_PAUSE_MS", default_value_t = 0, hide = true)]
    pub release_pause_ms: u64,
    /// For simulations: start no machines, but take an agent from this folder of Unix sockets for each sandbox.
    #[arg(long, hide = true)]
    pub simulated_guests: Option<PathBuf>,
}

impl Serve {
    pub fn limits(&self) -> Limits {
        let max_lifetime = Duration::from_secs(self.max_lifetime);
        Limits { idle_floor: Duration::from_secs(self.idle_floor), max_lifetime, ..Limits::default() }
    }

    pub fn deno(&self) -> crate::deno::Settings {
        crate::deno::Settings {
            template: self.deno_template.clone(),
            liveness: Duration::from_secs(self.deno_liveness),
        }
    }

    /// The domain of the TLS listener.
    pub fn tls_domain(&self) -> &str {
        self.tls_domain.as_deref().unwrap_or("sbx.localhost")
    }

    /// Where the TLS listener's certificate comes from; `data` is an absolute path.
    pub fn tls_source(&self, data: &Path) -> tls::Source {
        match (&self.tls_certificate, &self.tls_key) {
            (Some(certificate), Some(key)) => {
                tls::Source::Files { certificate: certificate.clone(), key: key.clone() }
            }
            _ => tls::Source::Own { folder: tls::own_folder(data, self.tls_domain()) },
        }
    }

    pub fn aliases(&self) -> BTreeMap<String, String> {
        self.alias.iter().cloned().collect()
    }

    /// # Errors
    /// With what is contradictory.
    pub fn check(&self) -> anyhow::Result<()> {
        let open = self.api_key.iter().all(|key| key.is_empty());
        for (option, address) in [("--api", Some(self.api)), ("--tls-listen", self.tls_listen)] {
            let Some(address) = address.filter(|address| !address.ip().is_loopback()) else { continue };
            anyhow::ensure!(
                !open || self.insecure_open,
                "{option} {address} can be reached by others and no --api-key is set: set one, or say --insecure-open"
            );
        }
        Ok(())
    }
}

fn parse_alias(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, target)) if !name.is_empty() && !target.is_empty() => {
            Ok((name.to_owned(), target.to_owned()))
        }
        _ => Err("an alias is NAME=TEMPLATE".to_owned()),
    }
}
