//! `cargo xtask up`: hostd in the foreground, and what to set so that the SDKs use it.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Result;

use crate::supervisor::{Runtime, Settings, Supervisor};
use crate::trust::{self, Trust};
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
    /// Where both are served over TLS
    #[arg(long, default_value = "127.0.0.1:3443")]
    tls: SocketAddr,
    /// Where hostd keeps its records [default: target/hostd]
    #[arg(long)]
    data: Option<PathBuf>,
    /// Further options of `hostd serve`
    #[arg(last = true)]
    more: Vec<String>,
}

pub fn run(options: &Options) -> Result<()> {
    deps::ensure(options.runtime.purpose())?;
    let tls = ["--tls-listen".to_owned(), options.tls.to_string()];
    let settings = Settings {
        program: steps::step("build hostd", || workspace::build("hostd", "release"))?,
        data: options.data.clone().unwrap_or_else(|| workspace::target().join("hostd")),
        images: image::images(),
        api: options.api,
        proxy: options.proxy,
        runtime: options.runtime,
        more: tls.into_iter().chain(options.more.clone()).collect(),
    };
    image::renew(options.runtime == Runtime::Container)?;

    let mut supervisor = Supervisor::start(&settings, None)?;
    println!("{}", environment_lines(&supervisor.api, &supervisor.proxy));
    if let (Some(tls), Some(trust)) = (&supervisor.tls, Trust::prepare(&settings.data)?) {
        println!("{}", tls_lines(tls, &trust, trust::names_lead_here()));
    }
    println!("\nCtrl-C ends it, and every sandbox with it.");
    supervisor.wait()
}

const SDKS: [(&str, &str); 3] = [("E2B", "E2B"), ("Novita", "NOVITA"), ("PPIO", "PPIO")];

/// The same two addresses under each SDK's own names.
fn environment_lines(api: &str, proxy: &str) -> String {
    let mut text =
        String::from("\nhostd is ready. In the shell that runs your code, for the SDK that you use:\n");
    for (sdk, prefix) in SDKS {
        text.push_str(&format!(
            "\n  # {sdk}\n  export {prefix}_API_KEY=any {prefix}_API_URL={api} {prefix}_SANDBOX_URL={proxy}\n"
        ));
    }
    text
}

/// The other way: a domain, and an authority to trust.
fn tls_lines(tls: &str, trust: &Trust, names_lead_here: bool) -> String {
    let port = tls.rsplit_once(':').map_or("443", |(_, port)| port);
    let mut text = String::from(
        "Or by a domain over TLS, which Novita's and PPIO's run_code needs, and addresses from get_host() in every SDK. In a shell \
         without the variables above:\n\n",
    );
    text.push_str(&format!(
        "  # Python; Node\n  export SSL_CERT_FILE={} NODE_EXTRA_CA_CERTS={}\n",
        trust.bundle.display(),
        trust.authority.display()
    ));
    for (sdk, prefix) in SDKS {
        let domain = trust::DOMAIN;
        text.push_str(&format!(
            "\n  # {sdk}\n  export {prefix}_API_KEY=any {prefix}_DOMAIN={domain}:{port}\n"
        ));
    }
    if !names_lead_here {
        text.push_str(&format!(
            "\nNames below {} do not lead to this machine yet: README.md, \"Wildcard TLS\", says how they do.\n",
            trust::DOMAIN
        ));
    }
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

    #[test]
    fn every_sdk_gets_the_domain_and_what_to_trust() {
        let trust = Trust { authority: "/t/ca.pem".into(), bundle: "/t/bundle.pem".into() };
        let text = tls_lines("https://127.0.0.1:3443", &trust, false);
        for prefix in ["E2B", "NOVITA", "PPIO"] {
            assert!(text.contains(&format!("{prefix}_DOMAIN=sbx.localhost:3443")), "{text}");
        }
        assert!(text.contains("SSL_CERT_FILE=/t/bundle.pem NODE_EXTRA_CA_CERTS=/t/ca.pem"), "{text}");
        assert!(
            text.contains("do not lead")
                && !tls_lines("https://[::1]:443", &trust, true).contains("do not lead")
        );
    }
}
