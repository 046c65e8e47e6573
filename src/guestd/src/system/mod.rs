//! The machine as a whole: `/health`, `/metrics`, `/envs`, `/init`, `/collapse`, the clock and the power switch.
//!
//! [`System`] owns what an `/init` sets. `request` checks what one asks for, `init` carries it out, `restore` is what happens when the
//! machine finds itself in another life than before.

mod clock;
mod collapse;
mod cpus;
mod entropy;
mod generation;
mod init;
mod kmsg;
mod metrics;
mod names;
mod request;
mod restore;

use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::access::Access;
use crate::agent::Config;
use crate::doors::Connections;
use crate::freeze::Freezer;
use crate::inhibit::Inhibition;
use crate::mmds::{Metadata, Mmds};
use crate::settings::Settings;
use crate::trust::TrustStore;
use crate::upgrade::{Report, Stamp};
use crate::volumes::{Kernel, Mounted, Volumes};

/// The longest body of an `/init`, in bytes (contract: envd.md section 12).
const INIT_LIMIT: usize = 1024 * 1024;

const CPU_FOLDER: &str = "/sys/devices/system/cpu";

/// What the handlers share.
#[derive(Debug)]
pub struct System {
    access: Arc<Access>,
    settings: Arc<Settings>,
    freezer: Arc<Freezer>,
    connections: Connections,
    inhibition: Arc<Inhibition>,
    metrics: metrics::Sampler,
    kills: Arc<kmsg::OomLog>,
    cpus: Arc<cpus::Cpus>,
    names: names::NameFiles,
    trust: Arc<TrustStore>,
    volumes: Volumes,
    mmds: Option<Arc<Mmds>>,
    /// Held by the one `/init` that is being carried out.
    history: Arc<tokio::sync::Mutex<History>>,
    /// The agent's own end of the machine's lifetime.
    guard: Mutex<Guard>,
    /// `/init` calls that thawed the machine and whose answer nobody waited for.
    unobserved: AtomicU32,
    /// What became of what the agent before this one handed over, until the first accepted `/init` was told.
    handover: Mutex<Option<Report>>,
    own_machine: bool,
    own_kernel: bool,
    power_off: fn(),
}

/// All of it that a next agent has to know.
#[derive(Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct SystemState {
    newest: Option<clock::Timestamp>,
    lifecycle: Option<String>,
    user_given: bool,
    /// The agent's own maximum lifetime, and when it is over.
    lifetime: Option<(Duration, Stamp)>,
    unobserved: u32,
    volumes: std::collections::BTreeMap<std::path::PathBuf, Mounted>,
}

/// What accepted `/init` calls said.
#[derive(Debug, Default)]
struct History {
    accepted: bool,
    /// The newest accepted one; older ones change nothing.
    newest: Option<clock::Timestamp>,
    lifecycle: Option<String>,
    /// A host has named the default user.
    user_given: bool,
}

/// The timer of the maximum lifetime.
#[derive(Debug, Default)]
struct Guard {
    length: Option<Duration>,
    ends: Option<Instant>,
    timer: Option<AbortHandle>,
}

impl System {
    pub fn new(
        access: Arc<Access>,
        settings: Arc<Settings>,
        freezer: Arc<Freezer>,
        connections: Connections,
        inhibition: Arc<Inhibition>,
        config: &Config,
    ) -> Arc<Self> {
        Arc::new(Self {
            access,
            settings,
            freezer,
            connections,
            inhibition,
            metrics: metrics::Sampler::default(),
            kills: Arc::default(),
            cpus: Arc::new(cpus::Cpus::new(Path::new(CPU_FOLDER).to_owned(), config.own_kernel)),
            names: names::NameFiles::new(config.root.clone()),
            trust: Arc::new(TrustStore::new(config.root.clone())),
            volumes: Volumes::new(Arc::new(Kernel)),
            mmds: config.mmds.map(|address| Arc::new(Mmds::new(address))),
            history: Arc::default(),
            guard: Mutex::default(),
            unobserved: AtomicU32::new(0),
            handover: Mutex::default(),
            own_machine: config.own_machine,
            own_kernel: config.own_kernel,
            power_off: config.power_off,
        })
    }

    /// Starts what runs beside the calls: the metadata service is asked, where there is one, and the generation id watched.
    pub fn start(self: &Arc<Self>) {
        self.ask_metadata();
        if self.own_kernel {
            restore::watch(Arc::clone(self));
        }
    }

    /// Whether an `/init` was accepted; None while one is being carried out.
    pub fn is_initialised(&self) -> Option<bool> {
        self.history.try_lock().ok().map(|history| history.accepted)
    }

    /// What the agent that takes this one's place has to know; None while an `/init` is being carried out.
    pub fn export(&self) -> Option<SystemState> {
        let history = self.history.try_lock().ok()?;
        let guard = self.guard.lock().unwrap_or_else(PoisonError::into_inner);
        Some(SystemState {
            newest: history.newest,
            lifecycle: history.lifecycle.clone(),
            user_given: history.user_given,
            lifetime: guard.length.zip(guard.ends.map(Stamp::of)),
            unobserved: self.unobserved.load(Ordering::Relaxed),
            volumes: self.volumes.export(),
        })
    }

    /// Goes on where the agent before this one was.
    pub async fn restore(&self, state: SystemState) {
        let mut history = self.history.lock().await;
        history.accepted = true;
        (history.newest, history.lifecycle) = (state.newest, state.lifecycle);
        history.user_given = state.user_given;
        drop(history);
        self.unobserved.store(state.unobserved, Ordering::Relaxed);
        self.volumes.restore(state.volumes);
        if let Some((length, ends)) = state.lifetime {
            self.guard_until(length, ends.instant());
        }
    }

    /// Tells the next `/init` what became of what the agent before this one handed over.
    pub fn tell_handover(&self, report: Report) {
        *self.handover.lock().unwrap_or_else(PoisonError::into_inner) = Some(report);
    }

    /// Asks the metadata service who this machine is, in the place of whoever asks already.
    fn ask_metadata(self: &Arc<Self>) {
        let Some(mmds) = &self.mmds else { return };
        let system = Arc::clone(self);
        mmds.poll(move |metadata| system.identify(metadata));
    }

    fn identify(&self, metadata: Metadata) {
        let given = |id: String| Some(id).filter(|id| names::is_name(id));
        self.take_names(names::Names {
            sandbox_id: given(metadata.sandbox_id),
            template_id: given(metadata.template_id),
            ..names::Names::default()
        });
    }

    /// Gives the names to the commands of clients at once, and to the files of the machine soon.
    fn take_names(&self, mut names: names::Names) {
        names.own_machine = self.own_machine;
        let events = names.events.map(|address| match address {
            std::net::IpAddr::V4(address) => format!("http://{address}"),
            std::net::IpAddr::V6(address) => format!("http://[{address}]"),
        });
        self.settings.update(|values| {
            for (name, value) in [
                ("E2B_SANDBOX_ID", names.sandbox_id.clone()),
                ("E2B_TEMPLATE_ID", names.template_id.clone()),
                ("E2B_EVENTS_ADDRESS", events),
            ] {
                if let Some(value) = value {
                    values.internal_environment.insert(name.to_owned(), value);
                }
            }
        });
        self.names.write_soon(names);
    }
}

pub fn routes(system: Arc<System>) -> Router {
    Router::new()
        .route("/health", get(health).head(not_allowed))
        .route("/metrics", get(measure).head(not_allowed))
        .route("/envs", get(environment).head(not_allowed))
        .route("/init", post(init::init).layer(DefaultBodyLimit::max(INIT_LIMIT)))
        .route("/collapse", post(collapse))
        .with_state(system)
}

/// `HEAD` is not `GET` (contract: envd.md section 4).
async fn not_allowed() -> Response {
    (StatusCode::METHOD_NOT_ALLOWED, [(header::ALLOW, HeaderValue::from_static("GET"))]).into_response()
}

async fn health() -> Response {
    (StatusCode::NO_CONTENT, [(header::CACHE_CONTROL, HeaderValue::from_static("no-store"))]).into_response()
}

async fn measure(State(system): State<Arc<System>>) -> Response {
    let kills = Arc::clone(&system.kills);
    let kills = tokio::task::spawn_blocking(move || kills.read()).await.unwrap_or_default();
    let headers = [(header::CACHE_CONTROL, HeaderValue::from_static("no-store"))];
    (headers, axum::Json(system.metrics.sample(&system.cpus.status(), kills))).into_response()
}

async fn environment(State(system): State<Arc<System>>) -> Response {
    let values = system.settings.snapshot();
    let mut all = values.environment;
    all.extend(values.internal_environment);
    axum::Json(all).into_response()
}

async fn collapse() -> Response {
    let counts = tokio::task::spawn_blocking(collapse::collapse).await.unwrap_or_default();
    axum::Json(counts).into_response()
}
