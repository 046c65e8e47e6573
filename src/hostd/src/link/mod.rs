//! The link to an agent: byte streams over whatever the runtime offers, and HTTP/2 on them.
//!
//! [`Transport`] dials a byte stream; [`Link`] keeps one HTTP/2 connection on such a stream and dials again when it broke. Everything
//! that hostd says to an agent goes over it: control calls (`control`), proxied requests, and tunnels to guest ports.

pub mod control;
mod dial;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use guestd_protocol::CONTROL_HEADER;
use http::{HeaderValue, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper::rt::Executor;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::sync::Mutex;

pub use dial::{Hello, Socket, Transport};

/// As on the agent's side: streams are bounded one by one, the connection is not.
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = (1 << 31) - 1;

/// What an agent may have us remember of its headers, in bytes: an idle sandbox's link would hold it for a few bytes less in each answer.
const HEADER_TABLE: u32 = 0;

/// How long a new HTTP/2 connection may take to say hello.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_millis(1000);

#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("the agent cannot be reached: {0}")]
    Dial(#[from] io::Error),
    #[error("the agent broke the connection off: {0}")]
    Http(#[from] hyper::Error),
    #[error("nothing listens on port {0} of the guest")]
    PortClosed(u16),
    #[error("the agent answered {0}")]
    Status(StatusCode),
}

/// Runs hyper's tasks, each in a box. An open stream keeps the waker of the task that sent its request, and a waker keeps a finished task's memory,
/// but not that of a box which the task had: 1.5 KiB less for each open stream.
#[derive(Clone, Copy, Debug)]
struct InBoxes;

impl<F> Executor<F> for InBoxes
where
    F: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, task: F) {
        tokio::spawn(Box::pin(task));
    }
}

/// One sandbox's link. Clones share the connection.
#[derive(Clone)]
pub struct Link {
    shared: Arc<Shared>,
}

struct Shared {
    transport: Transport,
    control: HeaderValue,
    connection: Mutex<Option<SendRequest<Body>>>,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("transport", &self.shared.transport).finish_non_exhaustive()
    }
}

impl Link {
    /// `control` is the credential that the agent takes the host by.
    pub fn new(transport: Transport, control: HeaderValue) -> Self {
        let mut control = control;
        control.set_sensitive(true);
        Self { shared: Arc::new(Shared { transport, control, connection: Mutex::new(None) }) }
    }

    /// Sends a request to the agent's own services.
    ///
    /// # Errors
    /// When the agent cannot be reached or breaks off before the answer's head.
    pub async fn send(&self, request: Request<Body>) -> Result<Response<Incoming>, LinkError> {
        let mut sender = self.sender().await?;
        Ok(sender.send_request(request).await?)
    }

    /// Opens a byte stream to a TCP port inside the guest.
    ///
    /// # Errors
    /// [`LinkError::PortClosed`] when nothing listens there.
    pub async fn tunnel(&self, port: u16) -> Result<TokioIo<Upgraded>, LinkError> {
        let request = Request::connect(format!("127.0.0.1:{port}"))
            .header(CONTROL_HEADER, self.shared.control.clone())
            .body(Body::empty())
            .map_err(io::Error::other)?;
        let response = self.send(request).await?;
        match response.status() {
            StatusCode::OK => Ok(TokioIo::new(hyper::upgrade::on(response).await?)),
            StatusCode::BAD_GATEWAY => Err(LinkError::PortClosed(port)),
            status => Err(LinkError::Status(status)),
        }
    }

    fn control_header(&self) -> HeaderValue {
        self.shared.control.clone()
    }

    /// The live connection, or a new one. Callers that find it broken wait for the same dial.
    async fn sender(&self) -> Result<SendRequest<Body>, LinkError> {
        let mut connection = self.shared.connection.lock().await;
        if let Some(sender) = connection.as_ref().filter(|sender| !sender.is_closed()) {
            return Ok(sender.clone());
        }
        let stream = self.shared.transport.dial().await?;
        let handshake = Builder::new(InBoxes)
            .header_table_size(HEADER_TABLE)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buf_size(STREAM_WINDOW as usize)
            .handshake(TokioIo::new(stream));
        let timed_out = |_| io::Error::new(io::ErrorKind::TimedOut, "no HTTP/2 from the agent");
        let (mut sender, driver) =
            tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await.map_err(timed_out)??;
        tokio::spawn(async move {
            if let Err(error) = driver.await {
                tracing::debug!(%error, "a link broke off");
            }
        });
        sender.ready().await?;
        *connection = Some(sender.clone());
        Ok(sender)
    }
}
