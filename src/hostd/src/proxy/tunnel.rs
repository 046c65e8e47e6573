//! Carries a request to a server on a port inside the guest: HTTP/1.1 in a tunnel of the link, upgrades (WebSocket) included.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue, StatusCode, Version, header};
use axum::response::Response;
use guestd_idle::HoldClass;
use guestd_protocol::{CODE_PORT, CONTROL_HEADER};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::body::ProxiedBody;
use super::forward::gone;
use super::{Admitted, answers};
use crate::lifetime::{HostHold, Sandbox};
use crate::link::LinkError;

/// The agent's code door names the cell that it runs in its answer.
const EXECUTION_ID: &str = "x-execution-id";

/// Sends the request and streams the answer back.
pub(super) async fn to_port(admitted: Admitted, request: Request) -> Response {
    let Admitted { sandbox, port, hold, browser, .. } = admitted;
    let sandbox = &sandbox;
    let id = &sandbox.record.id;
    let answered = tokio::select! {
        biased;
        answered = exchange(sandbox, hold, port, request) => answered,
        () = sandbox.over() => return gone(sandbox, browser),
    };
    match answered {
        Ok(response) => response,
        Err(error) => {
            if sandbox.lifetime().ended().is_some() {
                return gone(sandbox, browser);
            }
            tracing::debug!(sandbox = id, port, %error, "a request did not reach its port");
            answers::port_closed(id, port, browser)
        }
    }
}

async fn exchange(
    sandbox: &Arc<Sandbox>,
    hold: Option<HostHold>,
    port: u16,
    mut request: Request,
) -> Result<Response, LinkError> {
    // A port of the guest is open to whoever can name it: the request is use as it is.
    if let Some(hold) = &hold {
        hold.confirm();
    }
    let stream = sandbox.link.tunnel(port).await?;
    let (mut sender, connection) = http1::handshake::<_, Body>(TokioIo::new(stream)).await?;
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "a connection to a guest port broke off");
        }
    });
    let wants_upgrade = is_upgrade(request.headers());
    let client = wants_upgrade.then(|| hyper::upgrade::on(&mut request));
    let hold = hold.map(Arc::new);
    let (mut parts, body) = request.into_parts();
    parts.version = Version::HTTP_11;
    parts.headers.remove(CONTROL_HEADER);
    join_cookies(&mut parts.headers);
    // The server sees the path, as it would without a proxy, and the host name that the client used.
    if let Some(authority) = parts.uri.authority().cloned()
        && !parts.headers.contains_key(header::HOST)
        && let Ok(host) = authority.as_str().parse()
    {
        parts.headers.insert(header::HOST, host);
    }
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
    parts.uri = path.parse().map_err(std::io::Error::other)?;
    if !wants_upgrade {
        parts.headers.remove(header::CONNECTION);
    }
    let request = Request::from_parts(parts, ProxiedBody::request(body, sandbox, hold.clone()));
    let mut response = sender.send_request(request).await?;
    // The agent's own hold tells from here on whether the cell runs: one that is over, and whose events nobody takes, is no use.
    let hold = hold.filter(|_| port != CODE_PORT || !response.headers().contains_key(EXECUTION_ID));
    if response.status() == StatusCode::SWITCHING_PROTOCOLS
        && let Some(client) = client
    {
        let server = hyper::upgrade::on(&mut response);
        tokio::spawn(carry(Arc::clone(sandbox), hold, client, server));
        return Ok(response.map(|_| Body::empty()));
    }
    Ok(response.map(|body| ProxiedBody::response(Body::new(body), sandbox, hold)))
}

/// HTTP/2 clients may send each cookie in a field of its own, HTTP/1.1 servers read one (RFC 9113 section 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let cookies: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(|value| value.as_bytes()).collect();
    if cookies.len() < 2 {
        return;
    }
    if let Ok(joined) = HeaderValue::from_bytes(&cookies.join(&b"; "[..])) {
        headers.insert(header::COOKIE, joined);
    }
}

fn is_upgrade(headers: &HeaderMap) -> bool {
    let connection =
        headers.get(header::CONNECTION).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let asks = connection.split(',').any(|token| token.trim().eq_ignore_ascii_case("upgrade"));
    asks && headers.contains_key(header::UPGRADE)
}

/// An upgraded connection is use at each byte, not for being open (DESIGN.md section 4, rule 2).
async fn carry(
    sandbox: Arc<Sandbox>,
    hold: Option<Arc<HostHold>>,
    client: hyper::upgrade::OnUpgrade,
    server: hyper::upgrade::OnUpgrade,
) {
    if let Some(hold) = &hold {
        hold.reclass(HoldClass::GuestStream);
    }
    let (Ok(client), Ok(server)) = (client.await, server.await) else { return };
    let mut client = Counted { stream: TokioIo::new(client), hold: hold.clone() };
    let mut server = Counted { stream: TokioIo::new(server), hold };
    tokio::select! {
        // Either side closing is how such a connection ends.
        _ended = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
        () = sandbox.over() => {}
    }
}

/// A stream whose received bytes are progress of a hold.
struct Counted<S> {
    stream: S,
    hold: Option<Arc<HostHold>>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        if let Some(hold) = &self.hold {
            hold.progress((buffer.filled().len() - before) as u64);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cookies_that_came_apart_arrive_together() {
        let mut headers = HeaderMap::new();
        headers.insert(header::COOKIE, HeaderValue::from_static("a=1; b=2"));
        join_cookies(&mut headers);
        assert_eq!(headers[header::COOKIE], "a=1; b=2");
        headers.append(header::COOKIE, HeaderValue::from_static("c=3"));
        headers.append(header::COOKIE, HeaderValue::from_static("d=4"));
        join_cookies(&mut headers);
        let joined: Vec<_> = headers.get_all(header::COOKIE).iter().collect();
        assert_eq!(joined, ["a=1; b=2; c=3; d=4"]);
    }
}
