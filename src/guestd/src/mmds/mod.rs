//! Firecracker's metadata service, where the machine runs under one (contract: envd.md section 4.3, MMDS).
//!
//! [`Mmds`] asks it for the sandbox's identity, and for the hash of the token that may initialise the agent. Two small HTTP exchanges,
//! bounded in time and size. There is never more than one poller: a new one takes the place of the one before.

mod http;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use sha2::{Digest, Sha512};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::access::Voucher;

/// Where Firecracker answers.
pub const ADDRESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254)), 80);

/// How long one question may take. The service is in the hypervisor: it answers at once or not at all.
const FETCH_LIMIT: Duration = Duration::from_millis(500);

/// How long a poller goes on (contract: envd.md section 4.3), and its pauses.
const POLL_LIMIT: Duration = Duration::from_secs(60);
const POLL_PAUSE: Duration = Duration::from_millis(50);
const POLL_PAUSE_LIMIT: Duration = Duration::from_secs(2);

/// What the service tells.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Metadata {
    #[serde(rename = "instanceID")]
    pub sandbox_id: String,
    #[serde(rename = "envID")]
    pub template_id: String,
    /// Where log lines go.
    pub address: String,
    /// SHA-512 of the access token, in hexadecimal digits; empty when the host sets none.
    #[serde(rename = "accessTokenHash")]
    pub access_token_hash: String,
}

impl Metadata {
    /// What the service says about a token.
    pub fn voucher(&self, access_token: Option<&str>) -> Voucher {
        if self.access_token_hash.is_empty() {
            return Voucher::Absent;
        }
        let digest = Sha512::digest(access_token.unwrap_or_default().as_bytes());
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        let same = subtle::ConstantTimeEq::ct_eq(
            hex.as_bytes(),
            self.access_token_hash.to_ascii_lowercase().as_bytes(),
        );
        if same.into() { Voucher::Matches } else { Voucher::Differs }
    }
}

/// A client of the service.
#[derive(Debug)]
pub struct Mmds {
    address: SocketAddr,
    latest: watch::Sender<Option<Metadata>>,
    poller: Mutex<Option<AbortHandle>>,
}

impl Mmds {
    pub fn new(address: SocketAddr) -> Self {
        Self { address, latest: watch::Sender::new(None), poller: Mutex::new(None) }
    }

    /// What a poller heard last.
    pub fn latest(&self) -> watch::Receiver<Option<Metadata>> {
        self.latest.subscribe()
    }

    /// Asks once.
    ///
    /// # Errors
    /// When the service does not answer in time, or not as it should.
    pub async fn fetch(&self) -> io::Result<Metadata> {
        let exchange = async {
            let token = http::request(
                self.address,
                "PUT /latest/api/token",
                &[("X-metadata-token-ttl-seconds", "60")],
            )
            .await?;
            let token = String::from_utf8(token).map_err(io::Error::other)?;
            let headers = [("X-metadata-token", token.trim()), ("Accept", "application/json")];
            let body = http::request(self.address, "GET /", &headers).await?;
            serde_json::from_slice(&body).map_err(io::Error::other)
        };
        let late = |_| io::Error::from(io::ErrorKind::TimedOut);
        timeout(FETCH_LIMIT, exchange).await.map_err(late)?
    }

    /// Asks until the service knows the sandbox, for a minute, and calls `heard` with what it said.
    pub fn poll(self: &std::sync::Arc<Self>, heard: impl FnOnce(Metadata) + Send + 'static) {
        let mmds = std::sync::Arc::clone(self);
        let poller = tokio::spawn(async move {
            let (end, mut pause) = (Instant::now() + POLL_LIMIT, POLL_PAUSE);
            while Instant::now() < end {
                match mmds.fetch().await {
                    Ok(metadata) if !metadata.sandbox_id.is_empty() => {
                        mmds.latest.send_replace(Some(metadata.clone()));
                        return heard(metadata);
                    }
                    Ok(_) => tracing::trace!("the metadata service does not know this sandbox yet"),
                    Err(error) => tracing::trace!(%error, "the metadata service did not answer"),
                }
                sleep(pause).await;
                pause = (pause * 2).min(POLL_PAUSE_LIMIT);
            }
            tracing::warn!(address = %mmds.address, "the metadata service told nothing");
        });
        let mut current = self.poller.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(earlier) = current.replace(poller.abort_handle()) {
            earlier.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_vouched_for_by_its_hash_and_a_reset_by_that_of_nothing() {
        let of = |hash: &str| Metadata { access_token_hash: hash.to_owned(), ..Metadata::default() };
        // SHA-512 of "abc" and of nothing (FIPS 180-4's examples).
        let abc = "DDAF35A193617ABACC417349AE20413112E6FA4E89A97EA20A9EEEE64B55D39A\
                   2192992A274FC1A836BA3C23A3FEEBBD454D4423643CE80E2A9AC94FA54CA49F";
        let nothing = "cf83e1357eefb8bdf1542850d66d8007d620e4050b5715dc83f4a921d36ce9ce\
                       47d0d13c5d85f2b0ff8318d2877eec2f63b931bd47417a81a538327af927da3e";
        assert_eq!(of(abc).voucher(Some("abc")), Voucher::Matches);
        assert_eq!(of(abc).voucher(Some("abd")), Voucher::Differs);
        assert_eq!(of(abc).voucher(None), Voucher::Differs);
        assert_eq!(of(nothing).voucher(None), Voucher::Matches);
        assert_eq!(of("").voucher(Some("abc")), Voucher::Absent);
    }
}
