//! `cargo xtask up`: hostd in the foreground, and what to set so that the SDKs use it.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Result;

use crate::supervisor::{Runtime, Settings, Supervisor};
use crate::{deps, image, steps, workspace};

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// How sandboxes are run
    #[arg(long, value_enum, default_value = "auto")]
    runtime: Runtime,
    /// Where the control plane listens
    #[arg(long, default_value = "127.0.0.1:3000")]
    api: SocketAddr,
    /// Where the traffic to the sandboxes goes
    #[arg(long, default_value = "127.0.0.1:3002")]
    proxy: SocketAddr,
    /// Where hostd keeps its records [default: target/hostd]
    #[arg(long)]
    data: Option<PathBuf>,
    /// Further options of `hostd serve`
    #[arg(last = true)]
    more: Vec<String>,
}

pub fn run(options: &Options) -> Result<()> {
    deps::ensure(options.runtime.purpose())?;
    let settings = Settings {
        program: steps::step("build hostd", || workspace::build("hostd", "release"))?,
        data: options.data.clone().unwrap_or_else(|| workspace::target().join("hostd")),
        images: image::images(),
        api: options.api,
        proxy: options.proxy,
        runtime: options.runtime,
        more: options.more.clone(),
    };
    image::run(&image::Options { tree: options.runtime == Runtime::Container, ..Default::default() })?;

    let mut supervisor = Supervisor::start(&settings, None)?;
    println!("{}", environment_lines(&supervisor.api, &supervisor.proxy));
    supervisor.wait()
}

/// The same two addresses under each SDK's own names.
fn environment_lines(api: &str, proxy: &str) -> String {
    let mut text =
        String::from("\nhostd is ready. In the shell that runs your code, for the SDK that you use:\n");
    for (sdk, prefix) in [("E2B", "E2B"), ("Novita", "NOVITA"), ("PPIO", "PPIO")] {
        text.push_str(&format!(
            "\n  # {sdk}\n  export {prefix}_API_KEY=any {prefix}_API_URL={api} {prefix}_SANDBOX_URL={proxy}\n"
        ));
    }
    text.push_str("\nCtrl-C ends it, and every sandbox with it.");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sdk_gets_both_addresses() {
        let text = environment_lines("http://a", "http://p");
        for prefix in ["E2B", "NOVITA", "PPIO"] {
            assert!(text.contains(&format!("{prefix}_API_URL=http://a")), "{text}");
            assert!(text.contains(&format!("{prefix}_SANDBOX_URL=http://p")), "{text}");
        }
    }
}
