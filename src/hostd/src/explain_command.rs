//! `hostd explain`: asks a running supervisor and prints the answer for people.

use std::io::Write;

use anyhow::{Context, Result, bail};
use axum::body::Body;
use http_body_util::BodyExt;
use hyper::Request;
use hyper_util::rt::TokioIo;

use crate::config::Explain;
use crate::lifetime::explain::{Explanation, describe};

/// # Errors
/// When the supervisor cannot be reached, or does not know the sandbox.
pub async fn run(command: &Explain) -> Result<()> {
    let uri: hyper::Uri = format!("{}/sandboxes/{}/idle", command.api.trim_end_matches('/'), command.id)
        .parse()
        .with_context(|| format!("--api {}: not a URL", command.api))?;
    let authority = uri.authority().context("--api: no host")?.as_str().to_owned();
    let address: std::net::SocketAddr = authority
        .replace("localhost", "127.0.0.1")
        .parse()
        .with_context(|| format!("--api {}: give an IP address and a port", command.api))?;
    let stream = tokio::net::TcpStream::connect(address)
        .await
        .with_context(|| format!("no hostd answers at {}", command.api))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driving = tokio::spawn(connection);
    let mut request = Request::get(uri.path()).header("host", authority);
    if let Some(key) = &command.api_key {
        request = request.header("x-api-key", key);
    }
    let response = sender.send_request(request.body(Body::empty())?).await?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    driving.abort();
    if !status.is_success() {
        bail!("{status}: {}", String::from_utf8_lossy(&body));
    }
    let mut out = std::io::stdout();
    if command.json {
        out.write_all(&body)?;
        writeln!(out)?;
    } else {
        let explanation: Explanation = serde_json::from_slice(&body).context("the answer is not hostd's")?;
        writeln!(out, "{}", describe(&explanation))?;
    }
    Ok(())
}
