//! The data plane: brings SDK traffic to the sandboxes (contract: control-plane.md sections 2 and 3).
//!
//! `route` finds out which sandbox and port a request means, `forward` carries it there, `answers` has what is said when it cannot be.
//! Each request takes a host hold before anything else, so that a release that is being prepared sees it.

mod answers;
mod body;
mod forward;
mod route;
mod tunnel;

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::Method;
use axum::response::Response;
use guestd_idle::HoldClass;
use guestd_protocol::routes::{self, Usage};
use guestd_protocol::{ACCESS_TOKEN_HEADER, CODE_PORT, ENVD_PORT};
use subtle::ConstantTimeEq;

use crate::lifetime::{Found, HostHold, Sandbox, Sandboxes};
use route::Target;
pub(crate) use route::host_of;

/// The proxy's router: everything goes to one handler.
pub fn router(sandboxes: Arc<Sandboxes>) -> Router {
    Router::new().fallback(handle).with_state(sandboxes)
}

async fn handle(State(sandboxes): State<Arc<Sandboxes>>, request: Request) -> Response {
    match admit(&sandboxes, &request) {
        Ok(admitted) if admitted.port == ENVD_PORT => forward::to_agent(admitted, request).await,
        Ok(admitted) => tunnel::to_port(admitted, request).await,
        Err(refusal) => {
            // A client that is still sending would not read the answer, but see its connection break.
            body::drain(request.into_body()).await;
            *refusal
        }
    }
}

/// A request that may go to its sandbox.
#[derive(Debug)]
struct Admitted {
    sandbox: Arc<Sandbox>,
    port: u16,
    usage: Usage,
    /// None for what is never use.
    hold: Option<HostHold>,
    browser: bool,
}

fn admit(sandboxes: &Arc<Sandboxes>, request: &Request) -> Result<Admitted, Box<Response>> {
    let browser = answers::is_browser(request.headers());
    if request.method() == Method::CONNECT {
        return Err(Box::new(answers::bad_request("CONNECT is not possible here")));
    }
    let target =
        route::find(sandboxes, request).map_err(|refusal| answers::bad_request(&refusal.to_string()))?;
    let Target { id, found, port } = target;
    let gone = |reason| Box::new(answers::gone(&id, reason, browser));
    let sandbox = match found {
        Some(Found::Live(sandbox)) => sandbox,
        Some(Found::Gone(tombstone)) => return Err(gone(Some(tombstone.reason))),
        None => return Err(gone(None)),
    };
    let path = request.uri().path();
    if port == ENVD_PORT && routes::is_host_only(path) {
        return Err(Box::new(answers::host_only(path)));
    }
    let usage = match port {
        // A browser's preflight is nobody's call.
        ENVD_PORT | CODE_PORT if request.method() == Method::OPTIONS => Usage::Never,
        CODE_PORT if path == "/health" => Usage::Never,
        ENVD_PORT => routes::find(path).map_or(Usage::Never, |route| route.usage),
        _ => Usage::Call,
    };
    let class = match (port, usage) {
        (ENVD_PORT, Usage::Transfer) => HoldClass::Transfer,
        // A cell, or the wait for one's events: what the agent counts it as, so that one policy is for both.
        (CODE_PORT, _) if is_below(path, "/execute") || is_below(path, "/executions") => HoldClass::Code,
        (ENVD_PORT | CODE_PORT, _) => HoldClass::Call,
        _ => HoldClass::GuestPort,
    };
    let hold = if usage == Usage::Never {
        if let Some((reason, _)) = sandbox.lifetime().ended() {
            return Err(gone(Some(reason)));
        }
        None
    } else {
        let at = if port == ENVD_PORT { String::new() } else { format!(":{port}") };
        let origin = shortened(&format!("{} {at}{path}", request.method()));
        let hold = sandbox.admit(class, &origin).map_err(|reason| gone(Some(reason)))?;
        // Who has the token is use at once. Others (a signed URL, a stranger) are when the agent has let them in; it, not this, is the check.
        let token = request.headers().get(ACCESS_TOKEN_HEADER).map(|token| token.as_bytes());
        if token.is_some_and(|token| bool::from(token.ct_eq(sandbox.record.access_token.as_bytes()))) {
            hold.confirm();
        }
        Some(hold)
    };
    Ok(Admitted { sandbox, port, usage, hold, browser })
}

/// Whether a path is this one or below it.
fn is_below(path: &str, top: &str) -> bool {
    path.strip_prefix(top).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// A path may be of any length; a hold's origin is for people.
fn shortened(origin: &str) -> String {
    const LIMIT: usize = 160;
    if origin.chars().count() <= LIMIT {
        origin.to_owned()
    } else {
        origin.chars().take(LIMIT).chain("…".chars()).collect()
    }
}
