//! What the proxy says for itself. The two 502 texts are what SDKs search for (contract: control-plane.md section 3.2).

use axum::body::Body;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use guestd_idle::EndReason;
use guestd_protocol::errors::{PortClosed, SandboxGone};
use serde::Serialize;
use serde_json::json;

const JSON: &str = "application/json; charset=utf-8";
const HTML: &str = "text/html; charset=utf-8";

/// The sandbox is gone, or never was. 502 and nothing else: any other status makes an SDK raise instead of saying "not running".
pub(super) fn gone(id: &str, reason: Option<EndReason>, browser: bool) -> Response {
    if browser {
        let why = reason.map(|reason| format!("<p>It ended: {reason}.</p>")).unwrap_or_default();
        return page("Sandbox Not Found", &format!("<p>The sandbox {} was not found.</p>{why}", escaped(id)));
    }
    json_answer(StatusCode::BAD_GATEWAY, &SandboxGone::new(id, reason.map(EndReason::name)))
}

/// The sandbox lives and nothing listens on the port.
pub(super) fn port_closed(id: &str, port: u16, browser: bool) -> Response {
    if browser {
        let text = format!(
            "<p>The sandbox {} is running, but there is no service running on port {port}.</p>",
            escaped(id)
        );
        return page("Closed Port", &text);
    }
    json_answer(StatusCode::BAD_GATEWAY, &PortClosed::new(id, port))
}

pub(super) fn host_only(path: &str) -> Response {
    let body = json!({ "message": "this path is the host's alone", "path": path, "code": 404 });
    json_answer(StatusCode::NOT_FOUND, &body)
}

pub(super) fn bad_request(message: &str) -> Response {
    (StatusCode::BAD_REQUEST, [(header::CONTENT_TYPE, "text/plain; charset=utf-8")], message.to_owned())
        .into_response()
}

fn json_answer(status: StatusCode, body: &impl Serialize) -> Response {
    let text = serde_json::to_vec(body).unwrap_or_default();
    (status, [(header::CONTENT_TYPE, JSON)], Body::from(text)).into_response()
}

fn page(title: &str, text: &str) -> Response {
    let html = format!("<html><head><title>{title}</title></head><body><h1>{title}</h1>{text}</body></html>");
    (StatusCode::BAD_GATEWAY, [(header::CONTENT_TYPE, HTML)], html).into_response()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Whether a person looks at the answer: a browser's own navigation, not a script's request.
pub(super) fn is_browser(headers: &HeaderMap) -> bool {
    let text = |name: &str| {
        headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_ascii_lowercase()
    };
    let agent = text("user-agent");
    let names = ["mozilla", "chrome", "safari", "firefox", "edge", "opera", "msie"];
    let accept = text("accept");
    let mode = text("sec-fetch-mode");
    names.iter().any(|name| agent.contains(name))
        && (!accept.contains("application/json") || accept.contains("text/html"))
        && !matches!(mode.as_str(), "cors" | "no-cors" | "same-origin" | "websocket")
        && (!headers.contains_key("x-requested-with") || mode == "navigate")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn browser(pairs: &[(&'static str, &'static str)]) -> bool {
        is_browser(
            &pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect(),
        )
    }

    #[test]
    fn a_script_in_a_browser_gets_json() {
        let agent = ("user-agent", "Mozilla/5.0");
        assert!(browser(&[agent]));
        assert!(!browser(&[agent, ("sec-fetch-mode", "cors")]));
        assert!(!browser(&[agent, ("accept", "application/json")]));
        assert!(!browser(&[agent, ("x-requested-with", "XMLHttpRequest")]));
        assert!(!browser(&[("user-agent", "e2b-js-sdk/2.51.0")]));
    }
}
