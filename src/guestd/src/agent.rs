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
use guestd_protocol::{CODE_PORT, ENVD_PORT, SERIAL_PORT_NAME, VSOCK_PORT};
use tower_http::cors::{AllowHeaders, Any, CorsLayer};

use crate::access::{self, Access, Rules};
use crate::activity::rpc::ActivityService;
use crate::activity::{self, Activity};
use crate::cgroup::{self, Cgroups};
use crate::doors::{self, Connections, Doors};
use crate::filesystem::{self, Filesystem};
use crate::freeze::{self, Freezer};
use crate::identity::Accounts;
use crate::inhibit::{self, Inhibition};
use crate::logs::{self, LogService, Logs};
use crate::notice::{self, Notices};
use crate::ports::Ports;
use crate::process::{ProcessService, Processes};
use crate::services::Services;
use crate::settings::Settings;
use crate::system::{self, System};

/// The largest request message, in bytes. envd has no limit; a machine that runs out of memory has one.
const MESSAGE_LIMIT: usize = 64 * 1024 * 1024;

/// Where the machine's control groups are (cgroups(7)).
const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// How long a browser may remember a preflight's answer (contract: envd.md section 4.1).
const PREFLIGHT_LIFE: Duration = Duration::from_secs(7200);

/// How an agent is started.
#[derive(Clone, Debug)]
pub struct Config {
    /// TCP addresses to listen on; all must be free.
    pub tcp: Vec<SocketAddr>,
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
    pub power_off: fn(),
    /// Where programs of the machine say that they are busy.
    pub activity_socket: Option<PathBuf>,
}

impl Default for Config {
    /// An ordinary service that listens nowhere.
    fn default() -> Self {
        Self {
            tcp: Vec::new(),
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
            power_off: || std::process::exit(0),
        }
    }
}

/// What [`serve`] puts behind the doors.
struct Built {
    router: Router,
    access: Arc<Access>,
    connections: Connections,
    activity: Arc<Activity>,
    inhibition: Arc<Inhibition>,
    system: Arc<System>,
}

/// The capabilities and the router in front of them.
fn build(config: &Config, logs: Arc<Logs>) -> Built {
    let accounts = Arc::new(Accounts::new(Path::new("/")));
    let settings = Arc::new(Settings::new(config.own_machine));
    let rules = Rules { insecure_open: config.insecure_open, own_machine: config.own_machine };
    let access = Arc::new(Access::new(rules));
    let connections = Connections::default();
    let freezer = Freezer::new(config.cgroup_root.clone(), config.root.clone());
    let activity = Activity::new(Policy::default());
    let inhibition = Inhibition::new(Arc::clone(&activity));
    let cgroups = Arc::new(Cgroups::prepare(&config.cgroups));
    let processes = Processes::new(Arc::clone(&activity), Arc::clone(&cgroups));
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
        .fallback_service(Services::new(ConnectRpcService::new(rpc).with_limits(limits)))
        .layer(middleware::map_response(unbuffered))
        .layer(middleware::from_fn_with_state(freezer, freeze::http::hold_back))
        .layer(middleware::from_fn_with_state(Arc::clone(&activity), activity::middleware::hold))
        .layer(middleware::from_fn_with_state(accounts, access::middleware::identify))
        .layer(middleware::from_fn_with_state(Arc::clone(&access), access::middleware::authorize))
        .layer(cors())
        .layer(middleware::from_fn(answer_preflight))
        .layer(middleware::from_fn(logs::middleware::tell_failures));
    Built { router, access, connections, activity, inhibition, system }
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

/// Opens the doors and serves until `stop` is done.
///
/// # Errors
/// When a TCP address or the Unix socket cannot be listened on. A machine without vsock or serial link is served by what it has.
pub async fn serve(config: Config, logs: Arc<Logs>, stop: impl Future<Output = ()>) -> io::Result<()> {
    let Built { router, access, connections, activity, inhibition, system } = build(&config, logs);
    let doors = Doors::new(router, access, connections);
    for address in &config.tcp {
        let listener = doors::bind_tcp(*address)?;
        tracing::info!(address = %listener.local_addr()?, "listening");
        tokio::spawn(doors.clone().tcp(listener));
    }
    if let Some(path) = &config.unix {
        let listener = doors::bind_unix(path)?;
        tracing::info!(path = %path.display(), "listening");
        tokio::spawn(doors.clone().unix(listener));
    }
    if let Some(path) = &config.activity_socket {
        let listener = inhibit::listen(path)?;
        tokio::spawn(inhibit::serve(inhibition, listener));
    }
    if config.machine_links {
        match doors::bind_vsock(VSOCK_PORT) {
            Ok(listener) => {
                tokio::spawn(doors.clone().vsock(listener));
                tokio::spawn(doors::say_hello());
            }
            Err(error) => tracing::info!(%error, "no vsock"),
        }
        if let Some(device) = doors::find_serial(SERIAL_PORT_NAME) {
            tokio::spawn(doors.serial(device));
        }
    }
    system.start();
    forward_ports(&config, &activity);
    stop.await;
    Ok(())
}

/// A machine that cannot forward is served all the same: hostd's tunnels reach every port.
fn forward_ports(config: &Config, activity: &Arc<Activity>) {
    if config.forward_to.is_empty() {
        return;
    }
    let own: Vec<u16> = config.tcp.iter().map(SocketAddr::port).chain([ENVD_PORT, CODE_PORT]).collect();
    match Ports::arm(&config.forward_to, &own, activity) {
        Ok(ports) => drop(tokio::spawn(ports.run())),
        Err(error) => tracing::warn!(%error, "ports on loopback addresses are not forwarded"),
    }
}
