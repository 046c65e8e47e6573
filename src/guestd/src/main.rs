//! guestd: the agent inside every microVM.
//!
//! As the first process of a machine or a container it takes no arguments: the kernel command line or the container's environment says
//! what is special. As an ordinary service: `guestd serve`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;

use guestd::agent::{self, Config};
use guestd::init::{self, Place};
use guestd_protocol::{ENVD_PORT, ENVD_VERSION};
use tokio::signal::unix::{SignalKind, signal};

const USAGE: &str = "\
guestd: the agent inside every microVM

usage: guestd serve [--port N] [--host ADDRESS] [--unix PATH] [--activity-socket PATH]
       guestd busy [--why TEXT] [--ttl DURATION] [-- COMMAND]
       guestd idle [--json]
       guestd --version

  serve          run as an ordinary service
  --port N       TCP port (49983)
  --host ADDRESS TCP address (127.0.0.1)
  --unix PATH    also listen on this Unix socket
  --activity-socket PATH
                 the socket of `guestd busy` and `guestd idle`
  busy, idle     in the machine: keep the sandbox, or ask why it is alive; each has a --help

As the first process of a machine or a container it takes no arguments.
";

/// Where the container runtime puts the socket of the link: a folder that it mounts.
const CONTAINER_SOCKET: &str = "GUESTD_UNIX";

fn main() -> ExitCode {
    if init::is_first_process() {
        init::run(init::Options { die_with_parent: true }, |environment| {
            let machine = environment.place == Place::Machine;
            let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
            let unix = if machine { None } else { std::env::var_os(CONTAINER_SOCKET).map(PathBuf::from) };
            run(Config {
                tcp: vec![SocketAddr::new(any, ENVD_PORT)],
                unix,
                machine_links: machine,
                own_machine: true,
                own_kernel: machine,
                power_off,
                activity_socket: Some(PathBuf::from(guestd::inhibit::SOCKET_PATH)),
            })
        });
    }
    if let Some(code) = guestd::inhibit::command::run(std::env::args_os().skip(1)) {
        return code;
    }
    match parse(lexopt::Parser::from_env()) {
        Ok(Some(config)) => ExitCode::from(u8::try_from(run(config)).unwrap_or(1)),
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
    let mut unix = None;
    let mut activity_socket = None;
    let mut serve = false;
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
            Long("host") => host = arguments.value()?.parse()?,
            Long("activity-socket") => activity_socket = Some(PathBuf::from(arguments.value()?)),
            Long("unix") => unix = Some(PathBuf::from(arguments.value()?)),
            other => return Err(other.unexpected()),
        }
    }
    if !serve {
        return Err("nothing to do: say `serve`".into());
    }
    let tcp = vec![SocketAddr::new(host, port)];
    Ok(Some(Config {
        tcp,
        unix,
        machine_links: false,
        own_machine: false,
        own_kernel: false,
        power_off: || std::process::exit(0),
        activity_socket,
    }))
}

/// Runs the agent to its end; the result is its exit code.
fn run(config: Config) -> i32 {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .with_max_level(tracing::Level::INFO)
        .init();
    // One thread: an agent that is idle most of its life should be small, and its work waits for pipes and sockets.
    let runtime =
        match tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(32).build() {
            Ok(runtime) => runtime,
            Err(error) => {
                tracing::error!(%error, "the runtime could not start");
                return 1;
            }
        };
    match runtime.block_on(agent::serve(config, terminated())) {
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

fn power_off() {
    if let Err(error) = init::request_power_off() {
        tracing::error!(%error, "the machine could not be powered off; the agent ends, and the machine with it");
        std::process::exit(1);
    }
}
