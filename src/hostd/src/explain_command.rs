//! `hostd explain`: asks a running supervisor and prints the answer for people.

use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use axum::body::{Body, Bytes};
use http_body_util::BodyExt;
use hyper::Request;
use hyper_util::rt::TokioIo;

use crate::config::Explain;
use crate::lifetime::explain::{Explanation, describe};

/// The pause between two looks of `--watch`.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// To the top left corner, and away with what was there (ECMA-48: CUP, ED).
const CLEAR: &str = "\x1b[H\x1b[2J";

/// # Errors
/// When the supervisor cannot be reached, or does not know the sandbox.
pub async fn run(command: &Explain) -> Result<()> {
    let mut out = std::io::stdout();
    loop {
        let path = format!("/sandboxes/{}/idle", command.id);
        let body = ask(&command.api, command.api_key.as_deref(), &path).await?;
        if command.json {
            out.write_all(&body)?;
            writeln!(out)?;
            return Ok(());
        }
        let explanation: Explanation = serde_json::from_slice(&body).context("the answer is not hostd's")?;
        if command.watch && std::io::IsTerminal::is_terminal(&out) {
            write!(out, "{CLEAR}")?;
        }
        writeln!(out, "{}", describe(&explanation))?;
        out.flush()?;
        if !command.watch || explanation.ended.is_some() {
            return Ok(());
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// `GET`s a path of a running supervisor's API.
///
/// # Errors
/// When the supervisor cannot be reached, or its words when it refuses.
pub async fn ask(api: &str, api_key: Option<&str>, path: &str) -> Result<Bytes> {
    let uri: hyper::Uri = format!("{}{path}", api.trim_end_matches('/'))
        .parse()
        .with_context(|| format!("--api {api}: not a URL"))?;
    let authority = uri.authority().context("--api: no host")?.as_str().to_owned();
    let address: std::net::SocketAddr = authority
        .replace("localhost", "127.0.0.1")
        .parse()
        .with_context(|| format!("--api {api}: give an IP address and a port"))?;
    let stream = tokio::net::TcpStream::connect(address)
        .await
        .with_context(|| format!("no hostd answers at {api}"))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driving = tokio::spawn(connection);
    let mut request =
        Request::get(uri.path_and_query().map_or("/", |path| path.as_str())).header("host", authority);
    if let Some(key) = api_key {
        request = request.header("x-api-key", key);
    }
    let response = sender.send_request(request.body(Body::empty())?).await?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    driving.abort();
    if !status.is_success() {
        bail!("{status}: {}", String::from_utf8_lossy(&body));
    }
    Ok(body)
}
