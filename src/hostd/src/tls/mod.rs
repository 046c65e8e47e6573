//! The same doors over TLS, on one listener with a wildcard certificate: sandboxes at `<port>-<id>.<domain>`, the control plane at
//! `api.<domain>` (contract: control-plane.md section 2.7, recipe R-B). SDKs that put the sandbox's id into the host name need this for
//! `run_code` and for the addresses of a guest's own servers.
//!
//! `authority` makes certificates where the operator brings none, `pem` reads and checks those that he brings, `door` tells the two doors
//! apart by host name.

mod authority;
pub mod door;
mod pem;

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use anyhow::Context as _;
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use crate::clock;

/// What is said first where a client can choose, the best first.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// How often the certificate is looked at: one of our own is replaced long before its end, one of the operator's when its files changed.
const REFRESH_PAUSE: Duration = Duration::from_secs(3600);

/// Where certificates come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// The operator's files, in PEM: the chain, the server's own first, and its private key.
    Files { certificate: PathBuf, key: PathBuf },
    /// An authority of our own, kept in this folder.
    Own { folder: PathBuf },
}

/// The certificate that is shown, and how it is renewed.
#[derive(Debug)]
pub struct Certificates {
    domain: String,
    source: Source,
    current: RwLock<Arc<CertifiedKey>>,
}

impl Certificates {
    /// Reads or makes the first certificate. Blocks on files.
    ///
    /// # Errors
    /// Which option is wrong, and what it must be.
    pub fn load(domain: &str, source: Source) -> anyhow::Result<Arc<Self>> {
        let current = RwLock::new(Arc::new(load(domain, &source)?));
        Ok(Arc::new(Self { domain: domain.to_owned(), source, current }))
    }

    /// The authority that clients have to trust; None where it is the operator's business.
    pub fn authority(&self) -> Option<PathBuf> {
        match &self.source {
            Source::Files { .. } => None,
            Source::Own { folder } => Some(authority::certificate_path(folder)),
        }
    }

    /// # Errors
    /// When the library refuses its own defaults.
    pub fn server(self: &Arc<Self>) -> anyhow::Result<Arc<ServerConfig>> {
        let builder = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let resolver = Arc::clone(self);
        let mut config =
            builder.with_safe_default_protocol_versions()?.with_no_client_auth().with_cert_resolver(resolver);
        config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).to_vec();
        Ok(Arc::new(config))
    }

    /// Keeps the certificate fresh, for ever. One that cannot be read leaves the last good one in use.
    pub async fn refresh(self: Arc<Self>) {
        loop {
            tokio::time::sleep(REFRESH_PAUSE).await;
            let this = Arc::clone(&self);
            let loaded = tokio::task::spawn_blocking(move || load(&this.domain, &this.source)).await;
            match loaded.map_err(anyhow::Error::from).and_then(|loaded| loaded) {
                Ok(key) => *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(key),
                Err(error) => {
                    tracing::warn!(error = format!("{error:#}"), "the TLS certificate is not renewed");
                }
            }
        }
    }
}

impl ResolvesServerCert for Certificates {
    /// One for all names: a client that asks for a wrong one finds out by itself.
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner)))
    }
}

fn load(domain: &str, source: &Source) -> anyhow::Result<CertifiedKey> {
    let now = clock::wall_ms() / 1000;
    match source {
        Source::Files { certificate, key } => Ok(pem::load(certificate, key, domain, now)?),
        Source::Own { folder } => authority::issue(folder, domain, now)
            .with_context(|| format!("a TLS certificate cannot be made in {}", folder.display())),
    }
}

/// A domain whose wildcard certificate clients accept: `*.localhost`, with two labels only, is refused by OpenSSL.
///
/// # Errors
/// The rule.
pub fn parse_domain(text: &str) -> Result<String, String> {
    let is_label = |label: &str| {
        let letters = label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        letters && (1..=63).contains(&label.len()) && !label.starts_with('-') && !label.ends_with('-')
    };
    // Room for `<port>-<id>.` in front.
    if text.len() > 180 || !text.split('.').all(is_label) || !text.contains('.') {
        return Err(
            "must be a domain of at least two labels, without a port or an asterisk, such as sbx.localhost"
                .to_owned(),
        );
    }
    Ok(text.to_ascii_lowercase())
}

/// The folder for an authority of our own: a domain each, because its authority can sign for nothing else.
pub fn own_folder(data: &Path, domain: &str) -> PathBuf {
    data.join("tls").join(domain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_is_one_that_a_wildcard_can_stand_before() {
        assert_eq!(parse_domain("SBX.localhost").unwrap(), "sbx.localhost");
        assert_eq!(parse_domain("a-1.b.example.com").unwrap(), "a-1.b.example.com");
        let long = format!("{}.localhost", "a".repeat(64));
        for bad in [
            "",
            "localhost",
            "*.localhost",
            "sbx.localhost:3443",
            ".localhost",
            "sbx.",
            "-a.b",
            "a_b.c",
            "ü.de",
            &long,
        ] {
            assert!(parse_domain(bad).unwrap_err().contains("at least two labels"), "{bad}");
        }
    }
}
