//! Carries a request to the agent's own services, over the sandbox's link.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::Request;
use axum::http::header::{self, HeaderMap, HeaderName};
use axum::http::uri::{Authority, Scheme, Uri};
use axum::http::{HeaderValue, StatusCode, Version};
use axum::response::Response;
use guestd_protocol::routes::Usage;
use guestd_protocol::{CONTROL_HEADER, ENVD_PORT};

use super::body::ProxiedBody;
use super::{Admitted, answers};
use crate::lifetime::{HostHold, Sandbox};
use crate::link::LinkError;

/// What concerns one connection only (RFC 9110, section 7.6.1) or must not come from outside.
const NOT_FORWARDED: [HeaderName; 8] = [
    header::CONNECTION,
    // Answered here already, by reading the body.
    header::EXPECT,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];
const KEEP_ALIVE: &str = "keep-alive";
const PROXY_CONNECTION: &str = "proxy-connection";

/// Sends the request and streams the answer back.
pub(super) async fn to_agent(admitted: Admitted, request: Request) -> Response {
    let Admitted { sandbox, usage, hold, browser, .. } = admitted;
    let sandbox = &sandbox;
    let id = &sandbox.record.id;
    let hold = hold.map(Arc::new);
    let request = match prepare(sandbox, hold.clone(), request) {
        Ok(request) => request,
        Err(error) => return answers::bad_request(&error.to_string()),
    };
    let answered = tokio::select! {
        biased;
        answered = sandbox.link.send(request) => answered,
        () = sandbox.over() => return gone(sandbox, browser),
    };
    match answered {
        Ok(response) => {
            // From here on the agent's own hold tells whether a process or a watch is in use; a stream that is merely open is not.
            if response.status() != StatusCode::UNAUTHORIZED
                && let Some(hold) = &hold
            {
                hold.confirm();
            }
            let hold = hold.filter(|_| !matches!(usage, Usage::Process | Usage::Watch));
            let mut response = response.map(|body| ProxiedBody::response(Body::new(body), sandbox, hold));
            *response.version_mut() = Version::HTTP_11;
            strip(response.headers_mut());
            response
        }
        Err(error) => {
            let ended = sandbox.lifetime().ended().is_some();
            log(id, &error);
            if ended { gone(sandbox, browser) } else { answers::port_closed(id, ENVD_PORT, browser) }
        }
    }
}

fn log(id: &str, error: &LinkError) {
    tracing::warn!(sandbox = id, %error, "a request did not reach the agent");
}

/// The answer once the sandbox has ended.
pub(super) fn gone(sandbox: &Sandbox, browser: bool) -> Response {
    let reason = sandbox.lifetime().ended().map(|(reason, _)| reason);
    answers::gone(&sandbox.record.id, reason, browser)
}

fn prepare(
    sandbox: &Arc<Sandbox>,
    hold: Option<Arc<HostHold>>,
    request: Request,
) -> Result<Request<Body>, axum::http::Error> {
    let (mut parts, body) = request.into_parts();
    let mut uri = parts.uri.clone().into_parts();
    uri.scheme = Some(Scheme::HTTP);
    uri.authority = Some(Authority::from_static("guest"));
    parts.uri = Uri::from_parts(uri)?;
    parts.version = Version::HTTP_2;
    strip(&mut parts.headers);
    parts.headers.remove(header::HOST);
    unshare(&mut parts.headers);
    parts.extensions = axum::http::Extensions::new();
    Ok(Request::from_parts(parts, ProxiedBody::request(body, sandbox, hold)))
}

/// Copies the values. The link's header table (RFC 7541, section 2.3.2) keeps some of them until others take their place, and each would keep
/// the whole buffer that its request arrived in: 16 KiB and more.
fn unshare(headers: &mut HeaderMap) {
    for value in headers.values_mut() {
        if let Ok(mut copy) = HeaderValue::from_bytes(value.as_bytes()) {
            copy.set_sensitive(value.is_sensitive());
            *value = copy;
        }
    }
}

/// Removes what concerns one connection only, and what a client must not say.
fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value: &HeaderValue| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().chain(&NOT_FORWARDED) {
        headers.remove(name);
    }
    for name in [KEEP_ALIVE, PROXY_CONNECTION, CONTROL_HEADER] {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clients_control_credential_and_connection_headers_stay_outside() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "keep-alive, x-secret-hop"),
            ("x-secret-hop", "1"),
            ("transfer-encoding", "chunked"),
            (CONTROL_HEADER, "stolen"),
            ("x-access-token", "kept"),
        ] {
            headers.insert(name.parse::<HeaderName>().unwrap(), value.parse().unwrap());
        }
        strip(&mut headers);
        assert_eq!(headers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["x-access-token"]);
    }
}
