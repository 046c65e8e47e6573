//! The front door for the Deno Sandbox SDKs (contract: deno.md): a WebSocket handshake creates or finds a sandbox, REST calls extend, kill
//! and list. It serves below `/api/` of the control plane's listener, over the same sandboxes and lifetime rules (DESIGN.md section 4,
//! rule 6).
//!
//! `config` reads what a create call asks for, `handshake` turns a request into a socket, `socket` is that socket's life, `rpc` answers what
//! is said on it, `rest` has the calls beside it. What a sandbox does inside is not carried yet: each such call gets a protocol error.
//!
//! A *session* is tied to the socket that created it ([`guestd_idle::terms::Asked::session`]); sockets that connect later never end anything.

mod config;
mod error;
mod handshake;
mod rest;
mod rpc;
mod socket;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, delete, get, patch, post};
use tokio::sync::{Semaphore, watch};

use crate::api;
use crate::ids;
use crate::lifetime::{Found, Sandbox, Sandboxes};
use error::DoorError;

/// Sockets at the same time, of all sandboxes: each may hold a message of [`socket::MESSAGE_LIMIT`].
const SOCKETS: usize = 4096;

/// Largest body of a REST call, in bytes.
const BODY_LIMIT: usize = 64 * 1024;

/// How long a REST call waits for a sandbox that is still booting. The Python SDK gives up after 10 s.
const COMING_LIMIT: Duration = Duration::from_secs(9);

/// How the operator set the door up.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The template of each sandbox: the SDKs name none.
    pub template: String,
    /// How long a client may be silent before it counts as gone.
    pub liveness: Duration,
}

/// Boots that a REST call can wait for, by sandbox id.
#[derive(Clone, Debug, Default)]
struct Coming(Arc<Mutex<HashMap<String, watch::Receiver<()>>>>);

impl Coming {
    fn table(&self) -> MutexGuard<'_, HashMap<String, watch::Receiver<()>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the handlers share.
#[derive(Debug)]
pub struct Door {
    sandboxes: Arc<Sandboxes>,
    keys: Arc<Vec<String>>,
    settings: Settings,
    sockets: Arc<Semaphore>,
    /// Sandboxes whose ids are known to their clients, but that still boot.
    coming: Coming,
}

impl Door {
    pub fn new(sandboxes: Arc<Sandboxes>, keys: Arc<Vec<String>>, settings: Settings) -> Arc<Self> {
        Arc::new(Self {
            sandboxes,
            keys,
            settings,
            sockets: Arc::new(Semaphore::new(SOCKETS)),
            coming: Coming::default(),
        })
    }

    /// The live sandbox that a path names; waits for one that is still booting.
    ///
    /// # Errors
    /// 404 for what is unknown, not this door's, or over; the message says why it is over.
    async fn find(&self, id: &str) -> Result<Arc<Sandbox>, DoorError> {
        let known = ids::normalise(id).filter(|id| ids::is_deno(id)).ok_or_else(|| DoorError::unknown(id))?;
        let coming = self.coming.table().get(known).cloned();
        if let Some(mut coming) = coming {
            // Ends with an error when the boot ended, which is what is waited for.
            let _ended = tokio::time::timeout(COMING_LIMIT, coming.changed()).await;
        }
        if let Some(sandbox) = self.sandboxes.live(known) {
            return Ok(sandbox);
        }
        Err(match self.sandboxes.find(known) {
            Some(Found::Gone(tombstone)) => DoorError::ended(known, tombstone.reason),
            Some(Found::Live(sandbox)) => match sandbox.lifetime().ended() {
                Some((reason, _)) => DoorError::ended(known, reason),
                None => DoorError::unknown(known),
            },
            None => DoorError::unknown(known),
        })
    }
}

/// The routes, for nesting at `/api`.
pub fn router(door: Arc<Door>) -> Router {
    let sandbox = || delete(rest::kill).merge(patch(rest::extend));
    Router::new()
        .route("/v3/sandboxes/create", get(handshake::create))
        .route("/v3/sandbox/{id}/connect", get(handshake::connect))
        .route("/v3/sandbox/{id}", sandbox())
        .route("/v3/sandboxes/{id}", sandbox())
        .route("/v2/sandboxes", get(rest::list))
        .route("/v3/sandboxes", get(rest::list))
        .route("/v3/sandbox/{id}/expose/{what}", post(rest::not_yet))
        .route("/v2/sandboxes/{id}/deploy", post(rest::not_yet))
        .route("/v2/{*rest}", any(rest::no_console))
        .fallback(unknown_route)
        .method_not_allowed_fallback(unknown_method)
        .layer(middleware::from_fn_with_state(Arc::clone(&door), authorize))
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .with_state(door)
}

async fn authorize(State(door): State<Arc<Door>>, request: Request, next: Next) -> Response {
    if api::is_allowed(&door.keys, request.headers()) {
        return next.run(request).await;
    }
    DoorError::new(StatusCode::UNAUTHORIZED, "INVALID_TOKEN", "the access token is missing or wrong")
        .into_response()
}

async fn unknown_route(request: Request) -> DoorError {
    let path: String = request.uri().path().chars().take(200).collect();
    DoorError::new(
        StatusCode::NOT_FOUND,
        "NOT_FOUND",
        format!("no such route: {} /api{path}", request.method()),
    )
}

async fn unknown_method(request: Request) -> DoorError {
    let message = format!("{} is not possible here", request.method());
    DoorError::new(StatusCode::METHOD_NOT_ALLOWED, "METHOD_NOT_ALLOWED", message)
}
