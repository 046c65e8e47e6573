//! guestd: the agent inside every microVM.
//!
//! As the first process of a machine or a container it takes no arguments: the kernel command line or the container's environment says
//! what is special. As an ordinary service: `guestd serve`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;

use guestd::agent::{self, Config};
use guestd::cgroup::Choice;
use guestd::init::{self, Place};
use guestd::logs::{self, Logs};
use guestd::memory;
use guestd::mmds;
use guestd::ports;
use guestd::upgrade::{self, Asked, Resumed};
use guestd_protocol::{CODE_PORT, ENVD_PORT, ENVD_VERSION};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

const USAGE: &str = "\
guestd: the agent inside every microVM

usage: guestd serve [--port N] [--code-port N|off] [--kernels FOLDER]... [--host ADDRESS] [--unix PATH] [--activity-socket PATH] [--machine]
                    [--insecure-open] [--forward-to ADDRESS]... [--mmds[=ADDRESS:PORT]]
                    [--cgroup-root PATH | --no-cgroups] [--root PATH]
       guestd busy [--why TEXT] [--ttl DURATION] [-- COMMAND]
       guestd idle [--json]
       guestd --version

  serve          run as an ordinary service
  --port N       TCP port (49983)
  --code-port N  TCP port for code cells; `off` for none (49999, or none where --port is another than its default)
  --kernels FOLDER
                 where Jupyter kernel specs are, instead of the customary folders; repeatable
  --host ADDRESS TCP address (127.0.0.1)
  --unix PATH    also listen on this Unix socket (its file lets only its owner in)
  --activity-socket PATH
                 the socket of `guestd busy` and `guestd idle`
  --machine      the machine is the sandbox's own: set its clock, name and processors; /init is taken
                 from its links and from root only
  --insecure-open
                 serve the network even while no access token is set
  --forward-to ADDRESS
                 make servers that listen on a loopback address only reachable on this one, at their ports;
                 repeatable; needs root and a kernel with BPF (5.9)
  --mmds         ask Firecracker's metadata service who this machine is (169.254.169.254:80)
  --cgroup-root PATH
                 make the control groups of commands in this folder of a cgroup v2 file system, and freeze
                 those below it (the service's own group, when the service manager delegated it)
  --no-cgroups   no control groups: no limits, and a kill reaches the process group
  --root PATH    where /init writes names and certificates (/)
  busy, idle     in the machine: keep the sandbox, or ask why it is alive; each has a --help

As the first process of a machine or a container it takes no arguments; `guestd.insecure_open=1` and `guestd.mmds=1`
on the kernel command line, and GUESTD_INSECURE_OPEN=1 in a container's environment, stand for those above.
";

/// Serves the network of a container while no token is set.
const CONTAINER_OPEN: &str = "GUESTD_INSECURE_OPEN";

/// Where the container runtime puts the socket of the link: a folder that it mounts.
const CONTAINER_SOCKET: &str = "GUESTD_UNIX";

fn main() -> ExitCode {
    if init::is_first_process() {
        init::run(init::Options { die_with_parent: true }, |environment| {
            let machine = environment.place == Place::Machine;
            let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
            let unix = if machine { None } else { std::env::var_os(CONTAINER_SOCKET).map(PathBuf::from) };
            let given = |name| environment.command_line.value(name) == Some("1");
            let open_container =
                !machine && std::env::var_os(CONTAINER_OPEN).is_some_and(|value| value == "1");
            let config = Config {
                tcp: vec![SocketAddr::new(any, ENVD_PORT)],
                code: Some(SocketAddr::new(any, CODE_PORT)),
                unix,
                machine_links: machine,
                forward_to: Some(ports::MACHINE_ADDRESS)
                    .filter(|address| machine && ports::is_ours(*address))
                    .into_iter()
                    .collect(),
                own_machine: true,
                own_kernel: machine,
                insecure_open: given("guestd.insecure_open") || open_container,
                mmds: given("guestd.mmds").then_some(mmds::ADDRESS),
                cgroups: if machine { Choice::Machine } else { Choice::Container },
                power_off,
                activity_socket: Some(PathBuf::from(guestd::inhibit::SOCKET_PATH)),
                ..Config::default()
            };
            run(config, None)
        });
    }
    match upgrade::asked(std::env::args_os().skip(1)) {
        Some(Ok(Asked::Schema)) => {
            upgrade::finish();
            return ExitCode::SUCCESS;
        }
        Some(Ok(Asked::GoOn(resumed))) => {
            let config = Config { power_off: power_off_or_exit(), ..resumed.handover.config.clone() };
            return ExitCode::from(u8::try_from(run(config, Some(*resumed))).unwrap_or(1));
        }
        Some(Err(error)) => {
            eprintln!("guestd: {error}");
            return ExitCode::from(2);
        }
        None => {}
    }
    if let Some(code) = guestd::inhibit::command::run(std::env::args_os().skip(1)) {
        return code;
    }
    match parse(lexopt::Parser::from_env()) {
        Ok(Some(config)) => ExitCode::from(u8::try_from(run(config, None)).unwrap_or(1)),
        Ok(None) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guestd: {error}\n\n{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn parse(mut arguments: lexopt::Parser) -> Result<Option<Config>, lexopt::Error> {
    use lexopt::prelude::{Long, Short, Value, ValueExt};
    let mut host = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let mut port = ENVD_PORT;
    let mut code = None;
    let mut kernels = Vec::new();
    let mut config = Config::default();
    let mut serve = false;
    let mut cgroups = Choice::Delegated;
    while let Some(argument) = arguments.next()? {
        match argument {
            // The builder of templates records the first line of it as the template's agent version.
            Long("version") | Short('V') => {
                println!("{ENVD_VERSION}");
                return Ok(None);
            }
            Long("help") | Short('h') => {
                print!("{USAGE}");
                return Ok(None);
            }
            Value(value) if value == "serve" => serve = true,
            Long("port") => port = arguments.value()?.parse()?,
            Long("code-port") => {
                let given = arguments.value()?;
                code = Some(if given == "off" { None } else { Some(given.parse()?) });
            }
            Long("kernels") => kernels.push(PathBuf::from(arguments.value()?)),
            Long("host") => host = arguments.value()?.parse()?,
            Long("activity-socket") => config.activity_socket = Some(PathBuf::from(arguments.value()?)),
            Long("unix") => config.unix = Some(PathBuf::from(arguments.value()?)),
            Long("machine") => (config.own_machine, config.own_kernel) = (true, true),
            Long("insecure-open") => config.insecure_open = true,
            Long("mmds") => {
                let given = arguments.optional_value().map(|address| address.parse()).transpose()?;
                config.mmds = Some(given.unwrap_or(mmds::ADDRESS));
            }
            Long("cgroup-root") => {
                config.cgroup_root = PathBuf::from(arguments.value()?);
                cgroups = Choice::At(config.cgroup_root.clone());
            }
            Long("forward-to") => config.forward_to.push(arguments.value()?.parse()?),
            Long("no-cgroups") => cgroups = Choice::Off,
            Long("root") => config.root = PathBuf::from(arguments.value()?),
            other => return Err(other.unexpected()),
        }
    }
    if !serve {
        return Err("nothing to do: say `serve`".into());
    }
    if !kernels.is_empty() {
        config.kernels = kernels;
    }
    // A second agent on a machine gets a port of its own, and would not get this one.
    let code = code.unwrap_or((port == ENVD_PORT).then_some(CODE_PORT));
    config.code = code.map(|port| SocketAddr::new(host, port));
    Ok(Some(Config { tcp: vec![SocketAddr::new(host, port)], cgroups, ..config }))
}

/// Runs the agent to its end; the result is its exit code.
fn run(config: Config, resumed: Option<Resumed>) -> i32 {
    memory::limit_heaps();
    let logs = Logs::new();
    let console = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .with_filter(filter_fn(|line| line.target() != logs::EACH_CALL));
    tracing_subscriber::registry().with(console).with(logs::layer(&logs)).with(LevelFilter::INFO).init();
    // One thread: an agent that is idle most of its life should be small, and its work waits for pipes and sockets.
    let runtime =
        match tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(32).build() {
            Ok(runtime) => runtime,
            Err(error) => {
                tracing::error!(%error, "the runtime could not start");
                return 1;
            }
        };
    match runtime.block_on(agent::serve(config, logs, resumed, terminated())) {
        Ok(()) => init::EXIT_POWER_OFF,
        Err(error) => {
            tracing::error!(%error, "guestd cannot serve");
            1
        }
    }
}

async fn terminated() {
    match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
        (Ok(mut terminate), Ok(mut interrupt)) => {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        }
        _ => std::future::pending().await,
    }
}

fn power_off_or_exit() -> fn() {
    if init::is_supervised() { power_off } else { Config::default().power_off }
}

fn power_off() {
    if let Err(error) = init::request_power_off() {
        tracing::error!(%error, "the machine could not be powered off; the agent ends, and the machine with it");
        std::process::exit(1);
    }
}
