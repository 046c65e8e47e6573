//! `CONNECT 127.0.0.1:<port>`: a byte stream to any TCP port inside the guest, for the host alone (DESIGN.md section 3).

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use guestd_protocol::CONTROL_HEADER;
use guestd_protocol::errors::PORT_CLOSED_MESSAGE;
use hyper::body::Incoming;
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;

use super::Connection;
use crate::access::middleware::answer;
use crate::access::{Access, Peer, Refusal};
use crate::ports;

/// Answers a `CONNECT`: 200 and a tunnel, 401 (503 when it cannot be told who calls), 400 for an address that is not this machine, 502 when nothing listens.
pub(super) async fn open(access: &Access, request: Request<Incoming>) -> Response {
    if access.is_sealed() {
        return answer(Refusal::Sealed);
    }
    let given = request.headers().get(CONTROL_HEADER).map(|value| value.as_bytes());
    if let Err(refusal) = access.admit_host(given, request.extensions().get::<Peer>()).await {
        return answer(refusal);
    }
    let Some(port) = loopback_port(request.uri()) else {
        return (StatusCode::BAD_REQUEST, "CONNECT takes 127.0.0.1:<port>").into_response();
    };
    let Some(target) = ports::dial(port).await else {
        return (StatusCode::BAD_GATEWAY, PORT_CLOSED_MESSAGE).into_response();
    };
    let connection = request.extensions().get::<Connection>().cloned();
    tokio::spawn(async move {
        match hyper::upgrade::on(request).await {
            Ok(upgraded) => {
                let (mut upgraded, mut target) = (TokioIo::new(upgraded), target);
                let copied = tokio::io::copy_bidirectional(&mut upgraded, &mut target);
                let cut = async move {
                    match connection {
                        Some(connection) => connection.cut().await,
                        None => std::future::pending().await,
                    }
                };
                // Both ends closing is how a tunnel ends; there is nobody to tell about it.
                tokio::select! {
                    _ended = copied => {}
                    () = cut => {}
                }
            }
            Err(error) => tracing::debug!(%error, port, "a tunnel broke off"),
        }
    });
    Response::new(Body::empty())
}

fn loopback_port(uri: &Uri) -> Option<u16> {
    let authority = uri.authority()?;
    let port = authority.port_u16().filter(|port| *port != 0)?;
    let local = matches!(authority.host(), "127.0.0.1" | "localhost" | "[::1]");
    local.then_some(port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tunnel_leads_to_this_machine_only() {
        for good in ["127.0.0.1:80", "localhost:8080", "[::1]:443"] {
            assert!(loopback_port(&good.parse().unwrap()).is_some(), "{good}");
        }
        for bad in ["10.0.0.1:80", "example.com:80", "127.0.0.1", "127.0.0.1:0", "0.0.0.0:80"] {
            assert!(loopback_port(&bad.parse().unwrap()).is_none(), "{bad}");
        }
    }
}
