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
use guestd_protocol::{CODE_PORT, ENVD_PORT};

use crate::lifetime::{Found, Sandboxes};
use route::Target;

/// The proxy's router: everything goes to one handler.
pub fn router(sandboxes: Arc<Sandboxes>) -> Router {
    Router::new().fallback(handle).with_state(sandboxes)
}

async fn handle(State(sandboxes): State<Arc<Sandboxes>>, request: Request) -> Response {
    let browser = answers::is_browser(request.headers());
    if request.method() == Method::CONNECT {
        return answers::bad_request("CONNECT is not possible here");
    }
    let target = match route::find(&sandboxes, &request) {
        Ok(target) => target,
        Err(refusal) => return answers::bad_request(&refusal.to_string()),
    };
    let Target { id, found, port } = target;
    let sandbox = match found {
        Some(Found::Live(sandbox)) => sandbox,
        Some(Found::Gone(tombstone)) => return answers::gone(&id, Some(tombstone.reason), browser),
        None => return answers::gone(&id, None, browser),
    };
    let path = request.uri().path();
    if port == ENVD_PORT && routes::is_host_only(path) {
        return answers::host_only(path);
    }
    let usage = match port {
        ENVD_PORT => routes::find(path).map_or(Usage::Never, |route| route.usage),
        _ => Usage::Call,
    };
    let class = match (port, usage) {
        (ENVD_PORT, Usage::Transfer) => HoldClass::Transfer,
        (ENVD_PORT | CODE_PORT, _) => HoldClass::Call,
        _ => HoldClass::GuestPort,
    };
    let hold = if usage == Usage::Never {
        None
    } else {
        let origin = format!(
            "{} {}{path}",
            request.method(),
            if port == ENVD_PORT { String::new() } else { format!(":{port}") }
        );
        match sandbox.admit(class, &shortened(&origin)) {
            Ok(hold) => Some(hold),
            Err(reason) => return answers::gone(&id, Some(reason), browser),
        }
    };
    if usage == Usage::Never && sandbox.lifetime().ended().is_some() {
        return answers::gone(&id, None, browser);
    }
    if port == ENVD_PORT {
        forward::to_agent(&sandbox, hold, usage, request, browser).await
    } else {
        tunnel::to_port(&sandbox, hold, port, request, browser).await
    }
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
