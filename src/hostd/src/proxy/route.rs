//! Which sandbox and port a request means. Five ways, in the order that makes every SDK work on one plain listener (contract:
//! control-plane.md section 2.5).

use std::sync::Arc;

use axum::extract::Request;
use axum::http::{HeaderMap, Method, Uri, header};
use guestd_protocol::files_query::FilesQuery;
use guestd_protocol::signature::{Operation, Signed};
use guestd_protocol::{ACCESS_TOKEN_HEADER, CODE_PORT, ENVD_PORT};

use super::is_below;
use crate::ids;
use crate::lifetime::{Found, Sandboxes};

/// The vendors whose SDKs send `<vendor>-Sandbox-Id` and `<vendor>-Sandbox-Port`.
const VENDORS: [(&str, &str); 3] = [
    ("e2b-sandbox-id", "e2b-sandbox-port"),
    ("novita-sandbox-id", "novita-sandbox-port"),
    ("ppio-sandbox-id", "ppio-sandbox-port"),
];

/// Paths of the code interpreter, for clients that name no port.
const CODE_PATHS: [&str; 3] = ["/execute", "/contexts", "/executions"];

/// The longest query in which a signature is looked for, in bytes: a path has at most 4096, and three for each in an escape.
const SIGNED_QUERY_LIMIT: usize = 16 * 1024;

/// What a request means.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) id: String,
    /// None when no sandbox of that id was ever here, or it was too long ago.
    pub(super) found: Option<Found>,
    pub(super) port: u16,
}

/// Why a request cannot be routed; the text of the 400.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("missing header: the sandbox's id and port headers go together")]
    HalfHeader,
    #[error("invalid sandbox id")]
    BadId,
    #[error("invalid port: must be a whole number from 1 to 65535")]
    BadPort,
    #[error(
        "no sandbox named: send the E2b-Sandbox-Id and E2b-Sandbox-Port headers, a host name of the form <port>-<id>.<domain>, \
         the sandbox's X-Access-Token, or a signed file URL"
    )]
    Unnamed,
}

/// # Errors
/// A [`Refusal`] when the request names no sandbox, or names one badly.
pub(super) fn find(sandboxes: &Arc<Sandboxes>, request: &Request) -> Result<Target, Refusal> {
    let headers = request.headers();
    if let Some((id, port)) = by_headers(headers)? {
        return Ok(Target { found: sandboxes.find(&id), id, port });
    }
    if let Some((id, port)) = host_of(request).and_then(by_host) {
        return Ok(Target { found: sandboxes.find(&id), id, port });
    }
    if let Some(found) =
        headers.get(ACCESS_TOKEN_HEADER).and_then(|token| sandboxes.find_by_token(token.as_bytes()))
    {
        return Ok(named(found, default_port(request.uri())));
    }
    by_signature(sandboxes, request).map(|found| named(found, ENVD_PORT)).ok_or(Refusal::Unnamed)
}

fn named(found: Found, port: u16) -> Target {
    let id = match &found {
        Found::Live(sandbox) => sandbox.record.id.clone(),
        Found::Gone(tombstone) => tombstone.id.clone(),
    };
    Target { id, found: Some(found), port }
}

fn default_port(uri: &Uri) -> u16 {
    if CODE_PATHS.iter().any(|path| is_below(uri.path(), path)) { CODE_PORT } else { ENVD_PORT }
}

fn by_headers(headers: &HeaderMap) -> Result<Option<(String, u16)>, Refusal> {
    for (id_name, port_name) in VENDORS {
        let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or_default().trim());
        match (text(id_name), text(port_name)) {
            (None, None) => {}
            (Some(id), Some(port)) => {
                let id = ids::normalise(id).ok_or(Refusal::BadId)?;
                return Ok(Some((id.to_owned(), parse_port(port).ok_or(Refusal::BadPort)?)));
            }
            _ => return Err(Refusal::HalfHeader),
        }
    }
    Ok(None)
}

/// Digits only, so that one port has one spelling: a proxy that compared the text once let `02280` through.
fn parse_port(text: &str) -> Option<u16> {
    let canonical = text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0');
    text.parse().ok().filter(|port| canonical && *port != 0)
}

/// The host name, and perhaps a port, that the client asked for.
pub(crate) fn host_of(request: &Request) -> Option<&str> {
    let header = request.headers().get(header::HOST).and_then(|value| value.to_str().ok());
    header.or_else(|| request.uri().authority().map(|authority| authority.as_str()))
}

/// `<port>-<id>[-<anything>].<domain>`.
fn by_host(host: &str) -> Option<(String, u16)> {
    let (label, _domain) = host.split_once('.')?;
    let (port, rest) = label.split_once('-')?;
    let id = rest.split('-').next()?;
    Some((ids::normalise(id)?.to_owned(), parse_port(port)?))
}

/// A signed file URL holds no id: it is the sandbox whose token reproduces the signature.
fn by_signature(sandboxes: &Arc<Sandboxes>, request: &Request) -> Option<Found> {
    if request.uri().path() != "/files" {
        return None;
    }
    let query = FilesQuery::parse(request.uri().query()?).ok()?;
    let signature = query.signature.as_deref()?;
    // Each sandbox's token is tried: what is tried has to be small.
    if request.uri().query()?.len() > SIGNED_QUERY_LIMIT || !signature.starts_with("v1_") {
        return None;
    }
    let signed = Signed {
        path: query.path().unwrap_or_default(),
        operation: if request.method() == Method::GET { Operation::Read } else { Operation::Write },
        username: query.username().unwrap_or_default(),
        expiration: query.expiration.as_ref().map(|expiration| expiration.text.as_str()),
    };
    sandboxes.find_where(|found| match found {
        Found::Live(sandbox) => signed.matches(signature, &sandbox.record.access_token),
        Found::Gone(tombstone) => signed.matches(signature, &tombstone.access_token),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn every_vendors_headers_route_and_the_legacy_suffix_is_cut() {
        for vendor in ["e2b", "novita", "ppio"] {
            let mut map = HeaderMap::new();
            map.insert(
                format!("{vendor}-sandbox-id").parse::<axum::http::HeaderName>().unwrap(),
                "iabc-6532622b".parse().unwrap(),
            );
            map.insert(
                format!("{vendor}-sandbox-port").parse::<axum::http::HeaderName>().unwrap(),
                "49983".parse().unwrap(),
            );
            assert_eq!(by_headers(&map), Ok(Some(("iabc".to_owned(), 49983))), "{vendor}");
        }
    }

    #[test]
    fn half_a_pair_and_odd_ports_are_refused() {
        assert_eq!(by_headers(&headers(&[("e2b-sandbox-id", "iabc")])), Err(Refusal::HalfHeader));
        assert_eq!(by_headers(&headers(&[("ppio-sandbox-port", "1")])), Err(Refusal::HalfHeader));
        for port in ["0", "02280", "+80", "65536", "x", "", " 80 0"] {
            let mut map = headers(&[("e2b-sandbox-id", "iabc")]);
            map.insert("e2b-sandbox-port", port.parse().unwrap());
            assert_eq!(by_headers(&map), Err(Refusal::BadPort), "{port}");
        }
        let bad = headers(&[("e2b-sandbox-id", "../etc"), ("e2b-sandbox-port", "80")]);
        assert_eq!(by_headers(&bad), Err(Refusal::BadId));
    }

    #[test]
    fn a_host_name_routes_with_and_without_the_old_client_id() {
        let expected = Some(("iabc".to_owned(), 8080));
        assert_eq!(by_host("8080-iabc.sbx.localhost:3443"), expected);
        assert_eq!(by_host("8080-iabc-00000000.example.dev"), expected);
        for other in ["localhost:3002", "127.0.0.1:3002", "sandbox.e2b.app", "x-iabc.dev", "8080-.dev"] {
            assert_eq!(by_host(other), None, "{other}");
        }
    }

    #[test]
    fn the_code_interpreters_paths_go_to_its_port() {
        let port = |path: &str| default_port(&path.parse().unwrap());
        for path in ["/execute", "/executions", "/executions/a/events", "/contexts/a/restart"] {
            assert_eq!(port(path), CODE_PORT, "{path}");
        }
        assert_eq!((port("/executes"), port("/health")), (ENVD_PORT, ENVD_PORT));
    }
}
