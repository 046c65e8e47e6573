//! What an SDK says to hostd: creates, explains, and calls through the proxy, each with its whole answer checked.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use base64::Engine as _;
use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;

use super::guests::Guests;

/// The longest that anything may take: what takes longer hangs.
const LIMIT: Duration = Duration::from_secs(20);

const API_KEY: &str = "e2b_0000000000000000000000000000000000000000";

#[derive(Clone, Copy, Debug)]
pub struct Client {
    api: SocketAddr,
    proxy: SocketAddr,
}

#[derive(Clone, Debug)]
pub struct Sandbox {
    pub id: String,
    token: String,
}

/// A call that a client makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    List,
    Stat,
    Upload,
    Download,
    Port { millis: u64 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The whole answer came, and was right.
    Answered,
    /// The typed "sandbox was not found".
    Gone,
}

impl Client {
    pub fn new(api: &str, proxy: &str) -> Result<Self> {
        let address = |url: &str| -> Result<SocketAddr> {
            Ok(url.strip_prefix("http://").context("not an address of hostd")?.parse()?)
        };
        Ok(Self { api: address(api)?, proxy: address(proxy)? })
    }

    pub async fn create(&self, idle_seconds: u64) -> Result<Sandbox> {
        let body = json!({ "templateID": "base", "metadata": { "idle_timeout": idle_seconds.to_string() } });
        let (status, answer) = self.api(Method::POST, "/v2/sandboxes", Bytes::from(body.to_string())).await?;
        ensure!(status == StatusCode::CREATED, "create: {status} {answer}");
        let text = |name: &str| answer[name].as_str().map(str::to_owned).context("create: not an answer");
        Ok(Sandbox { id: text("sandboxID")?, token: text("envdAccessToken")? })
    }

    /// Why it lives or ended. Looking is never use.
    pub async fn explain(&self, sandbox: &Sandbox) -> Result<Value> {
        let (status, answer) =
            self.api(Method::GET, &format!("/sandboxes/{}/idle", sandbox.id), Bytes::new()).await?;
        ensure!(status == StatusCode::OK, "explain: {status} {answer}");
        Ok(answer)
    }

    /// What SDKs ask to learn whether it runs. Never use either.
    pub async fn health(&self, sandbox: &Sandbox) -> Result<Outcome> {
        let request = routed(sandbox, 49983, Method::GET, "/health").body(Full::default())?;
        let (status, body) = bounded(send(self.proxy, request)).await?;
        if status == StatusCode::NO_CONTENT { Ok(Outcome::Answered) } else { gone(status, &body) }
    }

    async fn api(&self, method: Method, path: &str, body: Bytes) -> Result<(StatusCode, Value)> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "hostd")
            .header("x-api-key", API_KEY)
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))?;
        // A create may wait for its turn for longer than a call.
        let (status, body) =
            tokio::time::timeout(3 * LIMIT, send(self.api, request)).await.context("no answer")??;
        Ok((status, serde_json::from_slice(&body).context("not JSON")?))
    }

    /// Makes one call. `name` is unique among all of a simulation.
    ///
    /// # Errors
    /// When it hangs, breaks off, or is answered by anything else than it should.
    pub async fn call(&self, guests: &Guests, sandbox: &Sandbox, call: Call, name: &str) -> Result<Outcome> {
        let outcome = bounded(self.try_call(guests, sandbox, call, name)).await;
        let outcome = outcome.with_context(|| format!("{call:?} {name} of {}", sandbox.id))?;
        let lost = outcome == Outcome::Gone && guests.saw(name);
        ensure!(!lost, "{call:?} {name} of {} was accepted, and then lost", sandbox.id);
        Ok(outcome)
    }

    async fn try_call(&self, guests: &Guests, sandbox: &Sandbox, call: Call, name: &str) -> Result<Outcome> {
        // Its size is odd, so that half of it is noticed.
        let content = Bytes::from(name.repeat(4099));
        let path = guests.file(&sandbox.id);
        let json = |path: &str, body: Value| {
            routed(sandbox, 49983, Method::POST, path)
                .header(header::CONTENT_TYPE, "application/json")
                .body(Full::new(Bytes::from(body.to_string())))
        };
        let files = format!("/files?username=root&path={path}");
        let request = match call {
            Call::List => json("/process.Process/List", json!({}))?,
            Call::Stat => json("/filesystem.Filesystem/Stat", json!({ "path": "/proc/self/stat" }))?,
            Call::Upload => routed(sandbox, 49983, Method::POST, &files)
                .header(header::CONTENT_TYPE, "application/octet-stream")
                .body(Full::new(content.clone()))?,
            // What is there is as long as its name says, whoever wrote it.
            Call::Download => routed(sandbox, 49983, Method::GET, "/files?username=root&path=/proc/version")
                .body(Full::default())?,
            Call::Port { millis } => routed(sandbox, guests.port, Method::GET, &format!("/{name}/{millis}"))
                .body(Full::default())?,
        };
        let (status, body) = send(self.proxy, request).await?;
        if status != StatusCode::OK {
            return gone(status, &body);
        }
        match call {
            Call::List => drop(serde_json::from_slice::<Value>(&body)?),
            Call::Stat => ensure!(serde_json::from_slice::<Value>(&body)?["entry"]["name"] == "stat"),
            Call::Upload => {
                ensure!(serde_json::from_slice::<Value>(&body)?[0]["path"] == path.as_str());
                ensure!(std::fs::read(&path)? == content, "the file is not what was sent");
            }
            Call::Download => {
                ensure!(body == std::fs::read("/proc/version")?, "the file is not what is there")
            }
            Call::Port { .. } => ensure!(body == name.as_bytes(), "not this request's answer"),
        }
        Ok(Outcome::Answered)
    }

    /// Opens a watch on a folder in which nothing happens. It lives until its value is dropped.
    pub async fn watch(&self, guests: &Guests, sandbox: &Sandbox) -> Result<Incoming> {
        let message = json!({ "path": guests.quiet_folder() }).to_string();
        let mut body = vec![0];
        body.extend_from_slice(&u32::try_from(message.len())?.to_be_bytes());
        body.extend_from_slice(message.as_bytes());
        let request = routed(sandbox, 49983, Method::POST, "/filesystem.Filesystem/WatchDir")
            .header(header::CONTENT_TYPE, "application/connect+json")
            .header("connect-protocol-version", "1")
            .body(Full::new(Bytes::from(body)))?;
        let answer = bounded(begin(self.proxy, request)).await?;
        ensure!(answer.status() == StatusCode::OK, "watch: {}", answer.status());
        Ok(answer.into_body())
    }
}

fn routed(sandbox: &Sandbox, port: u16, method: Method, path: &str) -> http::request::Builder {
    let root = base64::engine::general_purpose::STANDARD.encode("root:");
    Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "hostd")
        .header("e2b-sandbox-id", &sandbox.id)
        .header("e2b-sandbox-port", port)
        .header("x-access-token", &sandbox.token)
        .header(header::AUTHORIZATION, format!("Basic {root}"))
}

/// Anything but the typed answer is an error.
fn gone(status: StatusCode, body: &[u8]) -> Result<Outcome> {
    let told: Value = serde_json::from_slice(body).unwrap_or_default();
    if status == StatusCode::BAD_GATEWAY && told["message"] == "The sandbox was not found" {
        return Ok(Outcome::Gone);
    }
    bail!("{status} {}", String::from_utf8_lossy(&body[..body.len().min(300)]))
}

async fn bounded<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(LIMIT, work).await.context("no answer: it hangs")?
}

async fn begin(address: SocketAddr, request: Request<Full<Bytes>>) -> Result<http::Response<Incoming>> {
    let stream = TcpStream::connect(address).await.context("connect")?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender.send_request(request).await?)
}

async fn send(address: SocketAddr, request: Request<Full<Bytes>>) -> Result<(StatusCode, Bytes)> {
    let answer = begin(address, request).await?;
    let status = answer.status();
    Ok((status, answer.into_body().collect().await.context("the answer broke off")?.to_bytes()))
}
