//! The handshakes: one creates a sandbox, the other finds it (contract: deno.md section 2).

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, Method, StatusCode, Version, header};
use axum::response::Response;
use hyper::upgrade::OnUpgrade;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::config::{CreateConfig, Wish};
use super::error::DoorError;
use super::socket::{self, Guest, Socket};
use super::{Coming, Door};
use crate::clock;
use crate::ids;
use crate::lifetime::Sandbox;
use crate::lifetime::create::{CreateError, CreateRequest};

const CONFIG_HEADER: &str = "x-deno-sandbox-config";
const ID_HEADER: &str = "x-deno-sandbox-id";

/// The Python SDK waits 10 s for its handshake, which a VM under emulation may need for itself: it gets its answer before that, and its
/// sandbox follows. Everybody else is answered when the sandbox is ready.
const PATIENCE: Duration = Duration::from_secs(7);

/// A boot that is waited for. The caller that drops it has gone: the sandbox is ended.
pub(super) type Boot = std::pin::Pin<Box<dyn Future<Output = Result<Arc<Sandbox>, CreateError>> + Send>>;

/// A sandbox that boots while its client has its id already; dropping it wakes whoever waits for the boot.
pub(super) struct Arrival {
    pub(super) boot: Boot,
    /// It is to outlive its client: the boot goes on when the client closes its socket meanwhile.
    pub(super) lasting: bool,
    coming: Coming,
    id: String,
    _waited_for: watch::Sender<()>,
}

impl Arrival {
    pub(super) fn new(coming: &Coming, id: &str, boot: Boot, lasting: bool) -> Self {
        let (sender, receiver) = watch::channel(());
        coming.table().insert(id.to_owned(), receiver);
        Self { boot, lasting, coming: coming.clone(), id: id.to_owned(), _waited_for: sender }
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        self.coming.table().remove(&self.id);
    }
}

/// A request that can become a socket.
struct Upgrade {
    accept: String,
    upgrade: OnUpgrade,
    place: OwnedSemaphorePermit,
}

impl Upgrade {
    /// Checks what RFC 6455 section 4.2.1 asks of a client. Extensions and subprotocols are not taken up.
    fn of(door: &Door, request: &mut Request) -> Result<Self, DoorError> {
        let headers = request.headers();
        let key = headers.get(header::SEC_WEBSOCKET_KEY).filter(|key| key.len() == 24);
        let version = headers.get(header::SEC_WEBSOCKET_VERSION);
        let asks = request.method() == Method::GET
            && request.version() == Version::HTTP_11
            && names(headers, header::CONNECTION, "upgrade")
            && names(headers, header::UPGRADE, "websocket");
        let wrong = |rule: &str| {
            DoorError::new(
                StatusCode::UPGRADE_REQUIRED,
                "NOT_A_WEBSOCKET",
                format!("this is a WebSocket: {rule}"),
            )
        };
        if !asks {
            return Err(wrong("the request must be an HTTP/1.1 GET that asks for the upgrade"));
        }
        if version.is_none_or(|version| version != "13") {
            return Err(wrong("sec-websocket-version must be 13"));
        }
        let accept = key.map(|key| derive_accept_key(key.as_bytes()));
        let accept = accept.ok_or_else(|| wrong("sec-websocket-key must be 16 bytes in base64"))?;
        let upgrade = request.extensions_mut().remove::<OnUpgrade>();
        let upgrade = upgrade.ok_or_else(|| wrong("this connection cannot be upgraded"))?;
        let place = Arc::clone(&door.sockets).try_acquire_owned().map_err(|_| {
            let message = "this host has as many WebSockets as it may";
            DoorError::new(StatusCode::SERVICE_UNAVAILABLE, "TOO_MANY_CONNECTIONS", message)
        })?;
        Ok(Self { accept, upgrade, place })
    }

    /// The 101, and the socket behind it.
    fn accept(self, door: &Door, id: &str, guest: Guest, created: bool) -> Result<Response, DoorError> {
        let response = Response::builder()
            .status(StatusCode::SWITCHING_PROTOCOLS)
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, "websocket")
            .header(header::SEC_WEBSOCKET_ACCEPT, self.accept)
            .header(ID_HEADER, id)
            .body(Body::empty())
            .map_err(|error| DoorError::request(error.to_string()))?;
        // From here on the socket is the client: whatever ends it ends a session.
        let socket = Socket::new(guest, created, door.settings.liveness, self.place);
        tokio::spawn(socket::serve(socket, self.upgrade));
        Ok(response)
    }
}

/// Whether a header's comma-separated list has a word.
fn names(headers: &HeaderMap, name: header::HeaderName, word: &str) -> bool {
    let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|given| given.trim().eq_ignore_ascii_case(word))
}

pub(super) async fn create(
    State(door): State<Arc<Door>>,
    mut request: Request,
) -> Result<Response, DoorError> {
    let upgrade = Upgrade::of(&door, &mut request)?;
    let config = request
        .headers()
        .get(CONFIG_HEADER)
        .ok_or_else(|| DoorError::config(format!("{CONFIG_HEADER}: is required")))?;
    let config = CreateConfig::parse(config.as_bytes(), clock::wall_ms())?;
    let id = ids::deno_sandbox_id().map_err(CreateError::from)?;
    let asked = CreateRequest {
        id: id.clone(),
        template: door.settings.template.clone(),
        asked: config.wish.asked(door.settings.liveness),
        metadata: std::collections::BTreeMap::new(),
        labels: config.labels,
        env_vars: config.env,
    };
    let sandboxes = Arc::clone(&door.sandboxes);
    let mut boot: Boot = Box::pin(async move { sandboxes.create(asked).await });
    let agent = request.headers().get(header::USER_AGENT).and_then(|agent| agent.to_str().ok());
    let guest = if agent.is_some_and(|agent| agent.contains("websockets")) {
        match tokio::time::timeout(PATIENCE, &mut boot).await {
            Ok(brought) => Guest::Ready(brought?),
            Err(_elapsed) => {
                Guest::Coming(Arrival::new(&door.coming, &id, boot, config.wish != Wish::Session))
            }
        }
    } else {
        Guest::Ready(boot.await?)
    };
    upgrade.accept(&door, &id, guest, true)
}

pub(super) async fn connect(
    State(door): State<Arc<Door>>,
    Path(id): Path<String>,
    mut request: Request,
) -> Result<Response, DoorError> {
    let upgrade = Upgrade::of(&door, &mut request)?;
    let sandbox = door.find(&id).await?;
    let id = sandbox.record.id.clone();
    upgrade.accept(&door, &id, Guest::Ready(sandbox), false)
}
