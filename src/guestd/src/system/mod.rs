//! The machine as a whole: `/health`, `/metrics`, `/envs`, `/init`, the clock and the power switch.

mod clock;
mod host_name;
mod init;
mod metrics;

use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tokio::task::AbortHandle;

use crate::access::Access;
use crate::agent::Config;
use crate::inhibit::Inhibition;
use crate::settings::Settings;

/// What the handlers share.
#[derive(Debug)]
pub struct System {
    access: Arc<Access>,
    settings: Arc<Settings>,
    inhibition: Arc<Inhibition>,
    metrics: metrics::Sampler,
    /// The newest accepted `/init`; older ones change nothing.
    last_init: Mutex<Option<clock::Timestamp>>,
    /// The agent's own end of the machine's lifetime.
    last_guard: Mutex<Option<AbortHandle>>,
    own_machine: bool,
    own_kernel: bool,
    power_off: fn(),
}

impl System {
    pub fn new(
        access: Arc<Access>,
        settings: Arc<Settings>,
        inhibition: Arc<Inhibition>,
        config: &Config,
    ) -> Self {
        Self {
            access,
            settings,
            inhibition,
            metrics: metrics::Sampler::default(),
            last_init: Mutex::new(None),
            last_guard: Mutex::new(None),
            own_machine: config.own_machine,
            own_kernel: config.own_kernel,
            power_off: config.power_off,
        }
    }

    fn set_guard(&self, guard: AbortHandle) {
        let earlier = self.last_guard.lock().unwrap_or_else(PoisonError::into_inner).replace(guard);
        if let Some(earlier) = earlier {
            earlier.abort();
        }
    }
}

pub fn routes(system: Arc<System>) -> Router {
    Router::new()
        .route("/health", get(health))
        .route("/metrics", get(measure))
        .route("/envs", get(environment))
        .route("/init", post(init::init))
        .with_state(system)
}

async fn health() -> Response {
    (StatusCode::NO_CONTENT, [(header::CACHE_CONTROL, HeaderValue::from_static("no-store"))]).into_response()
}

async fn measure(State(system): State<Arc<System>>) -> Response {
    let headers = [(header::CACHE_CONTROL, HeaderValue::from_static("no-store"))];
    (headers, axum::Json(system.metrics.sample())).into_response()
}

async fn environment(State(system): State<Arc<System>>) -> Response {
    let values = system.settings.snapshot();
    let mut all = values.environment;
    all.extend(values.internal_environment);
    axum::Json(all).into_response()
}
