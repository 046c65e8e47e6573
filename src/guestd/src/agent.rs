//! Puts the capabilities together behind one router, and opens the doors.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use axum::{Router, middleware};
use connectrpc::{ConnectRpcService, Limits};
use guestd_idle::Policy;
use guestd_protocol::wire::activity::v1::ActivityExt;
use guestd_protocol::wire::filesystem::FilesystemExt;
use guestd_protocol::wire::logs::v1::LogsExt;
use guestd_protocol::wire::process::ProcessExt;
use guestd_protocol::{CODE_PORT, ENVD_PORT, MESSAGE_LIMIT, SERIAL_PORT_NAME, VSOCK_PORT};
use tokio::net::{TcpListener, UnixListener};
use tower_http::cors::{AllowHeaders, Any, CorsLayer};

use crate::access::{self, Access, Rules};
use crate::activity::rpc::ActivityService;
use crate::activity::{self, Activity};
use crate::cgroup::{self, Cgroups};
use crate::code::{self, Ground, Interpreter};
use crate::doors::{self, Connections, Doors};
use crate::filesystem::{self, Filesystem};
use crate::freeze::{self, Freezer};
use crate::identity::Accounts;
use crate::inhibit::{self, Inhibition};
use crate::logs::{self, LogService, Logs};
use crate::memory;
use crate::notice::{self, Notices};
use crate::ports::Ports;
use crate::process::{ProcessService, Processes};
use crate::services::Services;
use crate::settings::Settings;
use crate::system::{self, System};
use crate::upgrade::{self, Door, Parts, Resumed, Upgrader};

/// Where the machine's control groups are (cgroups(7)).
const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// How long a browser may remember a preflight's answer (contract: envd.md section 4.1).
const PREFLIGHT_LIFE: Duration = Duration::from_secs(7200);

/// How an agent is started.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Config {
    /// TCP addresses to listen on; all must be free.
    pub tcp: Vec<SocketAddr>,
    /// TCP address of the code door; none for an agent that runs no code cells.
    #[serde(default)]
    pub code: Option<SocketAddr>,
    /// Where kernel specs are.
    #[serde(default = "code::customary_folders")]
    pub kernels: Vec<PathBuf>,
    pub unix: Option<PathBuf>,
    /// Listen on vsock and on the virtio-serial link where the machine has them.
    pub machine_links: bool,
    /// Addresses whose ports lead to servers that listen on a loopback address only.
    pub forward_to: Vec<IpAddr>,
    /// The agent of a machine or a container of its own, not an ordinary service on somebody's: it may name it.
    pub own_machine: bool,
    /// A kernel of its own: it may set the clock. A container's clock is its host's.
    pub own_kernel: bool,
    /// While no token is set, serve the network as well (DESIGN.md section 3 has it closed).
    pub insecure_open: bool,
    /// Where `/init` writes names and certificates: `/`, but for tests.
    pub root: PathBuf,
    /// The cgroup v2 hierarchy that a freeze is about.
    pub cgroup_root: PathBuf,
    /// Firecracker's metadata service, where there is one.
    pub mmds: Option<SocketAddr>,
    /// Where commands get control groups of their own.
    pub cgroups: cgroup::Choice,
    /// Ends the machine.
    #[serde(skip, default = "exit")]
    pub power_off: fn(),
    /// Where programs of the machine say that they are busy.
    pub activity_socket: Option<PathBuf>,
}

impl Default for Config {
    /// An ordinary service that listens nowhere.
    fn default() -> Self {
        Self {
            tcp: Vec::new(),
            code: None,
            kernels: code::customary_folders(),
            forward_to: Vec::new(),
            unix: None,
            machine_links: false,
            own_machine: false,
            own_kernel: false,
            insecure_open: false,
            root: PathBuf::from("/"),
            cgroup_root: PathBuf::from(CGROUP_ROOT),
            mmds: None,
            cgroups: cgroup::Choice::Off,
            activity_socket: None,
            power_off: exit(),
        }
    }
}

fn exit() -> fn() {
    || std::process::exit(0)
}

/// What [`serve`] puts behind the doors.
struct Built {
    router: Router,
    code: Router,
    interpreter: Arc<Interpreter>,
    access: Arc<Access>,
    connections: Connections,
    activity: Arc<Activity>,
    inhibition: Arc<Inhibition>,
    system: Arc<System>,
    upgrader: Arc<Upgrader>,
    parts: Parts,
}

/// The activity of a new agent, or that of the one before it.
fn activity(resumed: Option<&mut Resumed>) -> Arc<Activity> {
    let restored = resumed.and_then(Resumed::take_activity).map(Activity::restore);
    match restored {
        None => Activity::new(Policy::default()),
        Some(Ok(activity)) => activity,
        Some(Err(error)) => {
            tracing::error!(%error, "the idle clock begins again");
            Activity::new(Policy::default())
        }
    }
}

/// All services without a door: for who brings requests some other way. Each needs a [`Peer`](crate::access::Peer) in its extensions.
pub fn router(config: &Config, logs: Arc<Logs>) -> Router {
    build(config, logs, None).router
}

/// The capabilities and the router in front of them.
fn build(config: &Config, logs: Arc<Logs>, resumed: Option<&mut Resumed>) -> Built {
    let accounts = Arc::new(Accounts::new(Path::new("/")));
    let settings = Arc::new(Settings::new(config.own_machine));
    let rules = Rules { insecure_open: config.insecure_open, own_machine: config.own_machine };
    let access = Arc::new(Access::new(rules));
    let connections = Connections::default();
    let freezer = Freezer::new(config.cgroup_root.clone(), config.root.clone());
    let kept = resumed.as_deref().map(|resumed| resumed.handover.groups()).unwrap_or_default();
    let activity = activity(resumed);
    let inhibition = Inhibition::new(Arc::clone(&activity));
    let cgroups = Arc::new(Cgroups::resume(&config.cgroups, &kept));
    let processes = Processes::new(Arc::clone(&activity), Arc::clone(&cgroups));
    let place = code::Place { folders: config.kernels.clone(), own_machine: config.own_machine };
    let ground = Ground { cgroups: Arc::clone(&cgroups), freezer: Arc::clone(&freezer) };
    let accounts_and = (Arc::clone(&settings), Arc::clone(&accounts));
    let interpreter = Interpreter::new(place, accounts_and, Arc::clone(&activity), ground);
    let notices = PathBuf::from(notice::HOOKS);
    let notices = Arc::new(Notices::new(Arc::clone(&activity), Arc::clone(&processes), notices));
    let files =
        Arc::new(Filesystem::new(Arc::clone(&accounts), Arc::clone(&settings), Arc::clone(&activity)));
    let system = System::new(
        Arc::clone(&access),
        Arc::clone(&settings),
        Arc::clone(&freezer),
        connections.clone(),
        Arc::clone(&inhibition),
        config,
    );

    let parts = Parts {
        access: Arc::clone(&access),
        settings: Arc::clone(&settings),
        activity: Arc::clone(&activity),
        inhibition: Arc::clone(&inhibition),
        processes: Arc::clone(&processes),
        files: Arc::clone(&files),
        freezer: Arc::clone(&freezer),
        cgroups,
        system: Arc::clone(&system),
        connections: connections.clone(),
        interpreter: Arc::clone(&interpreter),
    };
    let upgrader = Upgrader::new(parts.clone(), config.clone());

    let rpc = connectrpc::Router::new();
    let rpc = Arc::new(ProcessService::new(processes, Arc::clone(&accounts), settings)).register(rpc);
    let rpc = Arc::clone(&files).register(rpc);
    let service = ActivityService::new(Arc::clone(&activity), Arc::clone(&inhibition), notices);
    let rpc = Arc::new(service).register(rpc);
    let rpc = Arc::new(LogService::new(logs)).register(rpc);
    let limits =
        Limits::default().with_max_message_size(MESSAGE_LIMIT).with_max_request_body_size(MESSAGE_LIMIT);

    // The outermost layer is the last: CORS answers preflights before anybody is asked for a credential (contract: envd.md section 4.1).
    let router = system::routes(Arc::clone(&system))
        .merge(freeze::http::routes(Arc::clone(&freezer)))
        .merge(filesystem::routes(files))
        .merge(upgrade::http::routes(Arc::clone(&upgrader)))
        .fallback_service(Services::new(ConnectRpcService::new(rpc).with_limits(limits)))
        .layer(middleware::map_response(unbuffered))
        .layer(middleware::from_fn_with_state(freezer, freeze::http::hold_back))
        .layer(middleware::from_fn_with_state(Arc::clone(&activity), activity::middleware::hold))
        .layer(middleware::from_fn_with_state(accounts, access::middleware::identify))
        .layer(middleware::from_fn_with_state(Arc::clone(&access), access::middleware::authorize))
        .layer(middleware::from_fn_with_state(Arc::clone(&upgrader), upgrade::http::guard))
        .layer(cors())
        .layer(middleware::from_fn(answer_preflight))
        .layer(middleware::from_fn(logs::middleware::tell_failures));
    let code = code::http::routes(Arc::clone(&interpreter), Arc::clone(&access), Arc::clone(&activity))
        .layer(middleware::from_fn_with_state(Arc::clone(&upgrader), upgrade::http::guard))
        .layer(cors())
        .layer(middleware::from_fn(answer_preflight))
        .layer(middleware::from_fn(logs::middleware::tell_failures));
    Built { router, code, interpreter, access, connections, activity, inhibition, system, upgrader, parts }
}

/// Asks proxies to pass each message of a stream on at once (contract: envd.md section 12).
async fn unbuffered(mut answer: Response) -> Response {
    let kind = answer.headers().get(header::CONTENT_TYPE);
    if kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/connect+")) {
        answer.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    }
    answer
}

/// A preflight's answer has no content (contract: envd.md section 4.1); the CORS layer answers each OPTIONS itself, with a 200.
async fn answer_preflight(request: Request, next: Next) -> Response {
    let is_preflight = request.method() == Method::OPTIONS;
    let mut response = next.run(request).await;
    if is_preflight && response.status() == StatusCode::OK {
        *response.status_mut() = StatusCode::NO_CONTENT;
    }
    response
}

/// For SDKs in browsers. The headers that were asked for are named one by one: a `*` does not cover `Authorization` (Fetch standard).
fn cors() -> CorsLayer {
    let exposed = [
        "location",
        "cache-control",
        "x-content-type-options",
        "grpc-status",
        "grpc-message",
        "grpc-status-details-bin",
    ];
    CorsLayer::new()
        .allow_origin(Any)
        .allow_methods([Method::HEAD, Method::GET, Method::POST, Method::PUT, Method::PATCH, Method::DELETE])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(exposed.map(HeaderName::from_static))
        .max_age(PREFLIGHT_LIFE)
}

/// Opens the doors and serves until `stop` is done. An agent that took another's place has its open doors from it.
///
/// # Errors
/// When a TCP address or the Unix socket cannot be listened on. A machine without vsock or serial link is served by what it has.
pub async fn serve(
    config: Config,
    logs: Arc<Logs>,
    mut resumed: Option<Resumed>,
    stop: impl Future<Output = ()>,
) -> io::Result<()> {
    let Built {
        router,
        code,
        interpreter,
        access,
        connections,
        activity,
        inhibition,
        system,
        upgrader,
        parts,
    } = build(&config, Arc::clone(&logs), resumed.as_mut());
    let mut inherited = |door| resumed.as_mut().and_then(|resumed| resumed.door(&door));
    let code_doors = Doors::new(code, Arc::clone(&access), connections.clone(), upgrader.shut());
    let doors = Doors::new(router, access, connections, upgrader.shut());
    let mut tcp = Vec::new();
    for address in &config.tcp {
        let listener = match inherited(Door::Tcp) {
            Some(socket) => TcpListener::from_std(socket.into())?,
            None => doors::bind_tcp(*address)?,
        };
        tracing::info!(address = %listener.local_addr()?, "listening");
        upgrader.keep_open(Door::Tcp, &listener);
        tcp.push(listener);
    }
    let mut code = None;
    if let Some(address) = config.code {
        let listener = match inherited(Door::Code) {
            Some(socket) => TcpListener::from_std(socket.into())?,
            None => doors::bind_tcp(address)?,
        };
        tracing::info!(address = %listener.local_addr()?, "listening for code");
        upgrader.keep_open(Door::Code, &listener);
        code = Some(listener);
    }
    let mut unix = None;
    if let Some(path) = &config.unix {
        let listener = match inherited(Door::Unix) {
            Some(socket) => UnixListener::from_std(socket.into())?,
            None => doors::bind_unix(path)?,
        };
        tracing::info!(path = %path.display(), "listening");
        upgrader.keep_open(Door::Unix, &listener);
        unix = Some(listener);
    }
    let mut programs = None;
    if let Some(path) = &config.activity_socket {
        let listener = match inherited(Door::Activity) {
            Some(socket) => UnixListener::from_std(socket.into())?,
            None => inhibit::listen(path)?,
        };
        upgrader.keep_open(Door::Activity, &listener);
        programs = Some(listener);
    }
    let vsock = match config.machine_links.then(|| inherited(Door::Vsock)) {
        None => None,
        Some(Some(socket)) => Some(doors::resume_vsock(socket)),
        Some(None) => match doors::bind_vsock(VSOCK_PORT) {
            Ok(listener) => {
                tokio::spawn(doors::say_hello());
                Some(listener)
            }
            Err(error) => {
                tracing::info!(%error, "no vsock");
                None
            }
        },
    };
    let is_resumed = resumed.is_some();
    if let Some(resumed) = resumed {
        // Before anybody is served.
        parts.restore(resumed).await;
    }
    for listener in tcp {
        tokio::spawn(doors.clone().tcp(listener));
    }
    if let Some(listener) = code {
        tokio::spawn(code_doors.tcp(listener));
        if !is_resumed {
            tokio::spawn(interpreter.start_ahead());
        }
    }
    if let Some(listener) = unix {
        tokio::spawn(doors.clone().unix(listener));
    }
    if let Some(listener) = programs {
        tokio::spawn(inhibit::serve(inhibition, listener));
    }
    if let Some(listener) = vsock {
        upgrader.keep_open(Door::Vsock, &listener);
        tokio::spawn(doors.clone().vsock(listener));
    }
    if config.machine_links
        && let Some(device) = doors::find_serial(SERIAL_PORT_NAME)
    {
        tokio::spawn(doors.serial(device, is_resumed));
    }
    system.start();
    tokio::spawn(memory::give_back_at_rest(Arc::clone(&activity), logs));
    forward_ports(&config, &activity);
    // Starting is over, and its code not needed again.
    memory::unmap_program();
    stop.await;
    Ok(())
}

/// A machine that cannot forward is served all the same: hostd's tunnels reach every port.
fn forward_ports(config: &Config, activity: &Arc<Activity>) {
    if config.forward_to.is_empty() {
        return;
    }
    // Whoever came through the forwarding would be taken for the agent's own user there.
    let own = config.tcp.iter().chain(&config.code).map(SocketAddr::port).chain([ENVD_PORT, CODE_PORT]);
    let own: Vec<u16> = own.collect();
    match Ports::arm(&config.forward_to, &own, activity) {
        Ok(ports) => drop(tokio::spawn(ports.run())),
        Err(error) => tracing::warn!(%error, "ports on loopback addresses are not forwarded"),
    }
}
