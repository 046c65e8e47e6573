//! The calls that change something: create, connect, set timeout, kill.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::StatusCode;

use guestd_idle::terms::Asked;
use guestd_idle::{Lifetime, Moment, TermsError};

use super::shapes::{Fields, SandboxBody};
use super::{Api, ApiError};
use crate::clock;
use crate::ids;
use crate::lifetime::Sandbox;
use crate::lifetime::create::{CreateError, CreateRequest};

/// The lifetime that a connect without one asks for (contract: control-plane.md section 1.3).
const CONNECT_SECONDS: i64 = 300;

/// What a refresh extends by at least.
const REFRESH_SECONDS: i64 = 15;

/// Largest total of metadata and variables, in bytes.
const TEXT_LIMIT: usize = 256 * 1024;

impl Api {
    /// The live sandbox that a path names.
    ///
    /// # Errors
    /// 400 for what is no id, 404 for what is not alive.
    pub fn sandbox(&self, given: &str) -> Result<Arc<Sandbox>, ApiError> {
        let id = ids::normalise(given).ok_or_else(|| ApiError::bad_request("Invalid sandbox ID"))?;
        self.sandboxes.live(id).ok_or_else(|| ApiError::no_sandbox(id))
    }
}

/// Changes a sandbox's terms, in one step with the look whether it still lives.
fn change_live(
    sandbox: &Sandbox,
    change: impl FnOnce(&mut Lifetime, Moment) -> Result<(), TermsError>,
) -> Result<(), ApiError> {
    sandbox.change(|lifetime| {
        if lifetime.ended().is_some() {
            return Err(ApiError::no_sandbox(&sandbox.record.id));
        }
        change(lifetime, clock::now()).map_err(ApiError::from)
    })
}

pub(super) async fn create(
    State(api): State<Api>,
    body: Bytes,
) -> Result<(StatusCode, axum::Json<SandboxBody>), ApiError> {
    let fields = Fields::parse(&body)?;
    let template = fields
        .string("templateID")?
        .filter(|name| !name.is_empty())
        .ok_or_else(|| ApiError::bad_request("templateID: is required"))?;
    if fields.flag("autoPause")? == Some(true) {
        return Err(ApiError::bad_request("autoPause: this host cannot pause sandboxes yet"));
    }
    fields.flag("secure")?;
    let metadata = fields.strings("metadata")?;
    let idle_timeout = metadata.get(guestd_idle::terms::IDLE_TIMEOUT_KEY).map(String::as_str);
    let asked = Asked::parse(fields.seconds("timeout")?, idle_timeout, &api.sandboxes.setup.limits);
    let request = CreateRequest {
        id: ids::sandbox_id().map_err(CreateError::from)?,
        template: template.to_owned(),
        asked: asked?,
        env_vars: fields.strings("envVars")?,
        metadata,
        labels: BTreeMap::new(),
    };
    let size: usize =
        request.metadata.iter().chain(&request.env_vars).map(|(name, value)| name.len() + value.len()).sum();
    if size > TEXT_LIMIT {
        return Err(ApiError::bad_request(format!(
            "metadata and envVars: more than {TEXT_LIMIT} bytes together"
        )));
    }
    let sandbox = api.sandboxes.create(request).await?;
    Ok((StatusCode::CREATED, axum::Json(SandboxBody::of(&sandbox))))
}

pub(super) async fn connect(
    State(api): State<Api>,
    Path(id): Path<String>,
    body: Bytes,
) -> Result<axum::Json<SandboxBody>, ApiError> {
    let fields = Fields::parse(&body)?;
    let asked = fields.seconds("timeout")?;
    let sandbox = api.sandbox(&id)?;
    let limits = api.sandboxes.setup.limits;
    let default = CONNECT_SECONDS.min(i64::try_from(limits.max_lifetime.as_secs()).unwrap_or(i64::MAX));
    change_live(&sandbox, |lifetime, now| {
        lifetime.extend(asked.unwrap_or(default), &limits, now)?;
        lifetime.touch("connect", now);
        Ok(())
    })?;
    sandbox.trace_touch("connect");
    api.sandboxes.save_terms(&sandbox).await?;
    Ok(axum::Json(SandboxBody::of(&sandbox)))
}

pub(super) async fn set_timeout(
    State(api): State<Api>,
    Path(id): Path<String>,
    body: Bytes,
) -> Result<StatusCode, ApiError> {
    let fields = Fields::parse(&body)?;
    let seconds = fields.seconds("timeout")?.ok_or_else(|| ApiError::bad_request("timeout: is required"))?;
    let sandbox = api.sandbox(&id)?;
    change_live(&sandbox, |lifetime, now| lifetime.set_timeout(seconds, now))?;
    api.sandboxes.save_terms(&sandbox).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn refresh(
    State(api): State<Api>,
    Path(id): Path<String>,
    body: Bytes,
) -> Result<StatusCode, ApiError> {
    let fields = Fields::parse(&body)?;
    let seconds = fields.seconds("duration")?.unwrap_or(REFRESH_SECONDS).max(REFRESH_SECONDS);
    let sandbox = api.sandbox(&id)?;
    let limits = api.sandboxes.setup.limits;
    change_live(&sandbox, |lifetime, now| lifetime.extend(seconds, &limits, now))?;
    api.sandboxes.save_terms(&sandbox).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn kill(State(api): State<Api>, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let sandbox = api.sandbox(&id)?;
    if !api.sandboxes.kill(&sandbox).await {
        return Err(ApiError::no_sandbox(&id));
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Not 404, which the SDKs read as "sandbox not found".
pub(super) async fn unsupported(
    State(api): State<Api>,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    api.sandbox(&id)?;
    Err(ApiError::new(StatusCode::NOT_IMPLEMENTED, "this host cannot pause, snapshot or fork sandboxes yet"))
}
