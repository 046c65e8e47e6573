//! hostd: the host supervisor.

mod api;
mod clock;
mod config;
mod deno;
mod explain_command;
mod ids;
mod lifetime;
mod link;
mod listen;
mod logs;
mod logs_command;
mod memory;
mod metrics;
mod proxy;
mod runtime;
mod server;
mod store;
mod tls;
mod trace;

use std::process::ExitCode;

use clap::Parser;
use config::{Cli, Command};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Guard => runtime::guard::run(),
        Command::Serve(config) => with_runtime(async move {
            let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
            let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
            tracing_subscriber::fmt()
                .with_writer(std::io::stderr)
                .with_ansi(colours)
                .with_env_filter(filter)
                .init();
            server::serve(*config).await
        }),
        Command::Idle(config::Idle::Replay(command)) => trace::command::run(&command),
        Command::Logs(command) => with_runtime(async move { logs_command::run(&command).await }),
        Command::Explain(command) => with_runtime(async move { explain_command::run(&command).await }),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hostd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn with_runtime(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(work)
}
