//! The calls that only the host may make: `/init` and the activity service.

use std::io;
use std::time::Duration;

use axum::body::Body;
use connectrpc::ConnectError;
use connectrpc::client::{CallOptions, ClientBody, ClientConfig, ServiceTransport};
use futures_util::future::BoxFuture;
use guestd_protocol::CONTROL_HEADER;
use guestd_protocol::init::InitRequest;
use guestd_protocol::wire::activity::v1 as wire;
use http::{HeaderMap, Request, Response, StatusCode, Uri, header};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use wire::ActivityClient;

use super::{Link, LinkError};

/// The header in which an agent says which envd it is compatible with.
const VERSION_HEADER: &str = "x-envd-version";

/// The header in which an agent that took another's place says what it took over, in JSON.
const HANDOVER_HEADER: &str = "x-envd-handover";

/// How long an upgrade may take, the way of the program included.
const UPGRADE_TIMEOUT: Duration = Duration::from_secs(180);

/// A call that is answered from memory takes no longer, even in an emulated machine under load.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// How long an answer's body may be, in bytes: the guest is not trusted.
const ANSWER_LIMIT: usize = 64 * 1024;

/// What the generated client sends through: a link as a tower service.
#[derive(Clone, Debug)]
pub struct Through(Link);

impl tower::Service<Request<ClientBody>> for Through {
    type Response = Response<Incoming>;
    type Error = LinkError;
    type Future = BoxFuture<'static, Result<Response<Incoming>, LinkError>>;

    fn poll_ready(&mut self, _cx: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), LinkError>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<ClientBody>) -> Self::Future {
        let link = self.0.clone();
        Box::pin(async move { link.send(request.map(Body::new)).await })
    }
}

/// What an agent answers to an `/init`.
#[derive(Clone, Debug)]
pub struct Greeting {
    /// The envd version that it is compatible with.
    pub version: String,
    /// After an upgrade: what was taken over.
    pub handover: Option<String>,
}

/// A report stream of an agent.
pub type Reports = connectrpc::client::ServerStream<Incoming, wire::ReportView<'static>>;

impl Link {
    /// `POST /init`; the result is the agent's envd version.
    ///
    /// # Errors
    /// When the agent cannot be reached, or what it answered.
    pub async fn init(&self, request: &InitRequest) -> Result<String, LinkError> {
        self.greet(request).await.map(|greeting| greeting.version)
    }

    /// `POST /init`, and everything that the agent answers.
    ///
    /// # Errors
    /// When the agent cannot be reached, or what it answered.
    pub async fn greet(&self, request: &InitRequest) -> Result<Greeting, LinkError> {
        let body = serde_json::to_vec(request).map_err(io::Error::other)?;
        let request = Request::post("http://guest/init")
            .header(header::CONTENT_TYPE, "application/json")
            .header(CONTROL_HEADER, self.control_header())
            .body(Body::from(body))
            .map_err(io::Error::other)?;
        let timed_out = |_| io::Error::new(io::ErrorKind::TimedOut, "no answer to /init");
        let response = tokio::time::timeout(CALL_TIMEOUT, self.send(request)).await.map_err(timed_out)??;
        let (parts, body) = response.into_parts();
        if parts.status != StatusCode::NO_CONTENT {
            let text = http_body_util::Limited::new(body, ANSWER_LIMIT).collect().await;
            let text =
                text.map(|text| String::from_utf8_lossy(&text.to_bytes()).into_owned()).unwrap_or_default();
            tracing::warn!(status = %parts.status, text, "the agent refused /init");
            return Err(LinkError::Status(parts.status));
        }
        let text = |name| parts.headers.get(name).and_then(|value: &http::HeaderValue| value.to_str().ok());
        Ok(Greeting {
            version: text(VERSION_HEADER).unwrap_or(guestd_protocol::ENVD_VERSION).to_owned(),
            handover: text(HANDOVER_HEADER).map(str::to_owned),
        })
    }

    /// `POST /upgrade`: None when the agent broke off, which is what it does when another takes its place; else what it answered.
    ///
    /// # Errors
    /// When the agent cannot be reached, or says nothing at all.
    pub async fn upgrade(
        &self,
        headers: HeaderMap,
        body: Body,
    ) -> Result<Option<(StatusCode, String)>, LinkError> {
        let mut request = Request::post("http://guest/upgrade").body(body).map_err(io::Error::other)?;
        *request.headers_mut() = headers;
        request.headers_mut().insert(CONTROL_HEADER, self.control_header());
        let timed_out = |_| io::Error::new(io::ErrorKind::TimedOut, "no answer to /upgrade");
        let answer = tokio::time::timeout(UPGRADE_TIMEOUT, self.send(request)).await.map_err(timed_out)?;
        let response = match answer {
            Ok(response) => response,
            Err(LinkError::Http(error)) => {
                tracing::debug!(%error, "the agent broke off: another takes its place");
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let (parts, body) = response.into_parts();
        let text = http_body_util::Limited::new(body, ANSWER_LIMIT).collect().await;
        let text =
            text.map(|text| String::from_utf8_lossy(&text.to_bytes()).into_owned()).unwrap_or_default();
        Ok(Some((parts.status, text)))
    }

    /// The agent's `GET /metrics`.
    ///
    /// # Errors
    /// When the agent cannot be reached, or answers something else.
    pub async fn metrics(&self, access_token: &str) -> Result<serde_json::Value, LinkError> {
        let request = Request::get("http://guest/metrics")
            .header(guestd_protocol::ACCESS_TOKEN_HEADER, access_token)
            .body(Body::empty())
            .map_err(io::Error::other)?;
        let timed_out = |_| io::Error::new(io::ErrorKind::TimedOut, "no answer to /metrics");
        let response = tokio::time::timeout(CALL_TIMEOUT, self.send(request)).await.map_err(timed_out)??;
        if response.status() != StatusCode::OK {
            return Err(LinkError::Status(response.status()));
        }
        let body = http_body_util::Limited::new(response.into_body(), ANSWER_LIMIT).collect();
        let body =
            tokio::time::timeout(CALL_TIMEOUT, body).await.map_err(timed_out)?.map_err(io::Error::other)?;
        Ok(serde_json::from_slice(&body.to_bytes()).map_err(io::Error::other)?)
    }

    /// What a generated client of an agent's service is made of.
    pub fn client(&self) -> (ServiceTransport<Through>, ClientConfig) {
        let config = ClientConfig::new(Uri::from_static("http://guest"))
            .proto()
            .with_default_header(CONTROL_HEADER, self.control_header())
            .with_default_max_message_size(ANSWER_LIMIT);
        (ServiceTransport::new(Through(self.clone())), config)
    }

    fn activity(&self) -> ActivityClient<ServiceTransport<Through>> {
        let (transport, config) = self.client();
        ActivityClient::new(transport, config)
    }

    /// # Errors
    /// What the agent answered, or that it did not.
    pub async fn report(&self) -> Result<wire::Report, ConnectError> {
        let options = CallOptions::default().with_timeout(CALL_TIMEOUT);
        Ok(self.activity().get_with_options(wire::GetRequest::default(), options).await?.into_owned())
    }

    /// # Errors
    /// What the agent answered, or that it did not.
    pub async fn watch(&self) -> Result<Reports, ConnectError> {
        self.activity().watch(wire::WatchRequest::default()).await
    }

    /// Whether the agent is ready to go, and its report.
    ///
    /// # Errors
    /// What the agent answered, or that it did not.
    pub async fn prepare_release(
        &self,
        epoch: u64,
        idle_for: Duration,
    ) -> Result<(bool, wire::Report), ConnectError> {
        let idle_for_ms = u64::try_from(idle_for.as_millis()).unwrap_or(u64::MAX);
        let request = wire::PrepareReleaseRequest { epoch, idle_for_ms, ..Default::default() };
        let answer = self.activity().prepare_release(request).await?.into_owned();
        Ok((answer.ready, answer.report.into_option().unwrap_or_default()))
    }

    /// Tells the agent that its sandbox ends soon. Whether it told the machine, and its report.
    ///
    /// # Errors
    /// What the agent answered, or that it did not.
    pub async fn notify(
        &self,
        reason: &str,
        ends_in: Duration,
        idle_for: Option<Duration>,
    ) -> Result<(bool, wire::Report), ConnectError> {
        let millis = |length: Duration| u64::try_from(length.as_millis()).unwrap_or(u64::MAX);
        let request = wire::NotifyRequest {
            reason: reason.to_owned(),
            ends_in_ms: millis(ends_in),
            idle_for_ms: idle_for.map(millis),
            ..Default::default()
        };
        let options = CallOptions::default().with_timeout(CALL_TIMEOUT);
        let answer = self.activity().notify_with_options(request, options).await?.into_owned();
        Ok((answer.told, answer.report.into_option().unwrap_or_default()))
    }

    /// # Errors
    /// What the agent answered, or that it did not.
    pub async fn commit_release(&self, epoch: u64) -> Result<(), ConnectError> {
        let request = wire::CommitReleaseRequest { epoch, ..Default::default() };
        self.activity().commit_release(request).await.map(drop)
    }

    /// # Errors
    /// What the agent answered, or that it did not.
    pub async fn abort_release(&self, epoch: u64) -> Result<(), ConnectError> {
        let options = CallOptions::default().with_timeout(CALL_TIMEOUT);
        let request = wire::AbortReleaseRequest { epoch, ..Default::default() };
        self.activity().abort_release_with_options(request, options).await.map(drop)
    }
}
