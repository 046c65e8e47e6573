//! One listener, two doors: `api.<domain>` is the control plane, everything else goes to the sandboxes.

use axum::Router;
use axum::extract::Request;
use tower::ServiceExt as _;

use crate::proxy;

/// Marks a request that came over TLS, for answers that name addresses.
#[derive(Clone, Copy, Debug)]
pub struct OverTls;

/// The router of the TLS listener.
pub fn router(domain: &str, control: Router, sandboxes: Router) -> Router {
    let control_host = format!("api.{domain}");
    Router::new().fallback(move |mut request: Request| {
        let host = proxy::host_of(&request).unwrap_or_default();
        let name = host.rsplit_once(':').map_or(host, |(name, _port)| name);
        let door = if name.eq_ignore_ascii_case(&control_host) { &control } else { &sandboxes };
        let door = door.clone();
        request.extensions_mut().insert(OverTls);
        door.oneshot(request)
    })
}
