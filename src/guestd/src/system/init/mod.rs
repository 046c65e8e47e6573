//! `POST /init`: credentials, environment, defaults, clock, certificates, volumes (contract: envd.md sections 4.3 and 12).
//!
//! One call at a time is carried out, by a task of its own: a host that asks again every few milliseconds and hangs up in between never
//! leaves one half done.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use axum::Extension;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use guestd_protocol::init::{InitRequest, THAW_SKIP};
use guestd_protocol::{CONTROL_HEADER, ENVD_VERSION};
use serde::Serialize;
use tokio::sync::OwnedMutexGuard;

use super::names::Names;
use super::request::Asked;
use super::{History, INIT_LIMIT, System, clock};
use crate::access::{Claim, Peer, Voucher};
use crate::doors::Connection;

const VERSION: HeaderName = HeaderName::from_static("x-envd-version");
const AUDIT: HeaderName = HeaderName::from_static("x-envd-freeze-audit");
const THAW: HeaderName = HeaderName::from_static("x-envd-thaw");
const CLOCK_CORRECTION: HeaderName = HeaderName::from_static("x-envd-init-clock-correction");
const UNOBSERVED: HeaderName = HeaderName::from_static("x-envd-init-unobserved");
const DEFAULTS: HeaderName = HeaderName::from_static("x-envd-defaults");
const HANDOVER: HeaderName = HeaderName::from_static("x-envd-handover");
const CPUS: HeaderName = HeaderName::from_static("x-envd-cpus");

/// How long a call waits for the one before it; longer than volumes may take to mount.
const TURN_LIMIT: Duration = Duration::from_secs(15);

/// Who brings an `/init`, and over what.
#[derive(Clone, Debug, Default)]
struct Caller {
    peer: Option<Peer>,
    connection: Option<Connection>,
    control: Option<String>,
}

/// An answer in the making.
#[derive(Debug, Default)]
struct Reply {
    /// `None` is success.
    failure: Option<(StatusCode, String)>,
    headers: HeaderMap,
    /// It was authorized, and the workload was thawed for it.
    thawed: bool,
}

impl Reply {
    fn failed(status: StatusCode, text: impl ToString) -> Self {
        Self { failure: Some((status, text.to_string())), ..Self::default() }
    }

    fn put(&mut self, name: HeaderName, value: &impl Serialize) {
        // Every value is numbers, or JSON with its text escaped down to ASCII.
        let text = serde_json::to_string(value).unwrap_or_default();
        if let Ok(value) = HeaderValue::from_str(&ascii_json(&text)) {
            self.headers.insert(name, value);
        }
    }
}

/// A header is ASCII: other letters are written as JSON escapes.
fn ascii_json(text: &str) -> String {
    let mut units = [0; 2];
    let mut ascii = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_ascii() && !c.is_ascii_control() {
            ascii.push(c);
        } else {
            ascii.extend(c.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04x}")));
        }
    }
    ascii
}

pub(super) async fn init(
    State(system): State<Arc<System>>,
    peer: Option<Extension<Peer>>,
    connection: Option<Extension<Connection>>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    let control = headers.get(CONTROL_HEADER).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let caller = Caller {
        peer: peer.map(|peer| peer.0),
        connection: connection.map(|connection| connection.0),
        control,
    };
    let mut reply = match body {
        Ok(body) => take(&system, caller, &body).await,
        Err(rejection) if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE => {
            let text = format!("an /init has at most {INIT_LIMIT} bytes");
            Reply::failed(StatusCode::PAYLOAD_TOO_LARGE, text)
        }
        Err(rejection) => Reply::failed(rejection.status(), rejection.body_text()),
    };
    reply.headers.insert(VERSION, HeaderValue::from_static(ENVD_VERSION));
    match reply.failure {
        Some((status, text)) => (status, reply.headers, text).into_response(),
        None => {
            if reply.thawed {
                // This answer is being read, so it is not one of those that were not.
                let unread = system.unobserved.swap(0, Ordering::Relaxed).saturating_sub(1);
                reply.headers.insert(UNOBSERVED, HeaderValue::from(unread));
            }
            reply.headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
            (StatusCode::NO_CONTENT, reply.headers).into_response()
        }
    }
}

async fn take(system: &Arc<System>, caller: Caller, body: &[u8]) -> Reply {
    let received = Instant::now();
    let asked = match Asked::parse(body) {
        Ok(asked) => asked,
        Err(text) => return Reply::failed(StatusCode::BAD_REQUEST, text),
    };
    // A freeze that is asked for from now on is not this call's to undo.
    let generation = system.freezer.generation();
    let Ok(turn) = tokio::time::timeout(TURN_LIMIT, Arc::clone(&system.history).lock_owned()).await else {
        return Reply::failed(StatusCode::SERVICE_UNAVAILABLE, "another /init is still being carried out");
    };
    let system = Arc::clone(system);
    let carried_out =
        tokio::spawn(async move { system.carry_out(turn, caller, asked, received, generation).await });
    carried_out.await.unwrap_or_else(|error| {
        Reply::failed(StatusCode::INTERNAL_SERVER_ERROR, format!("/init ended early: {error}"))
    })
}

impl System {
    async fn carry_out(
        self: Arc<Self>,
        mut history: OwnedMutexGuard<History>,
        caller: Caller,
        asked: Asked,
        received: Instant,
        generation: u64,
    ) -> Reply {
        let access_token = asked.body.access_token.as_deref();
        let voucher = self.voucher(access_token).await;
        let control = caller.control.as_deref();
        let standing = match self.access.standing_for_init(control, caller.peer.as_ref()).await {
            Ok(standing) => standing,
            Err(refusal) => return Reply::failed(refusal.status(), refusal),
        };
        let claim = Claim { control, access_token, standing, voucher };
        // A call that was on its way for long must not undo a newer one; it is not an error either, and it thaws.
        let stale = matches!((history.newest, asked.timestamp), (Some(newest), Some(this)) if this < newest);
        let allowed = if stale { self.access.check(claim) } else { self.access.initialise(claim) };
        if let Err(refusal) = allowed {
            return Reply::failed(refusal.status(), refusal);
        }
        let mut reply = Reply::default();
        if let Some(report) = self.handover.lock().unwrap_or_else(PoisonError::into_inner).take() {
            reply.put(HANDOVER, &report);
        }
        let delay = received.elapsed();
        if let Some(timestamp) = asked.timestamp {
            reply.put(CLOCK_CORRECTION, &u64::try_from(delay.as_millis()).unwrap_or(u64::MAX));
            if !stale && self.own_kernel {
                clock::set(timestamp + delay);
            }
        }
        let thaws = asked.thaws;
        let rejected = asked.body.cpu_count.filter(|_| !stale).and_then(|count| self.cpus.ask(count).err());
        if !stale {
            history.user_given |= asked.body.default_user.as_deref().is_some_and(|user| !user.is_empty());
            let restored = history.begin(asked.timestamp, asked.body.lifecycle_id.as_deref());
            if restored {
                self.begin_new_life(caller.connection.as_ref());
            }
            if let Err(text) = self.apply(asked, history.lifecycle.clone()).await {
                reply.failure = Some((StatusCode::BAD_REQUEST, text));
            }
            self.ask_metadata();
        }
        self.report(&mut reply, history.user_given, rejected.map(|rejection| rejection.to_string()));
        match self.freezer.resume(generation, thaws).await {
            Ok(audit) => {
                if let Some(audit) = audit {
                    reply.put(AUDIT, &audit);
                }
            }
            Err(busy) => reply.failure = Some((StatusCode::SERVICE_UNAVAILABLE, busy.to_string())),
        }
        if !thaws {
            reply.headers.insert(THAW, HeaderValue::from_static(THAW_SKIP));
        } else if self.freezer.generation() == generation {
            reply.thawed = true;
            self.unobserved.fetch_add(1, Ordering::Relaxed);
        } else {
            // A freeze begins another life of the count.
            self.unobserved.store(0, Ordering::Relaxed);
        }
        reply
    }

    /// What the metadata service says, where there is one and the token alone does not decide.
    async fn voucher(&self, access_token: Option<&str>) -> Voucher {
        let decided = self.access.has_host() || self.access.is_current(access_token);
        let Some(mmds) = self.mmds.as_ref().filter(|_| !decided) else {
            return Voucher::Absent;
        };
        match mmds.fetch().await {
            Ok(metadata) => metadata.voucher(access_token),
            Err(error) => {
                tracing::debug!(%error, "the metadata service vouches for nobody");
                Voucher::Absent
            }
        }
    }

    /// Sets everything but the credentials. The order is the contract's; what fails leaves what was set before.
    async fn apply(&self, asked: Asked, lifecycle: Option<String>) -> Result<(), String> {
        tracing::info!(target: crate::logs::EACH_CALL, fields = fields_of(&asked.body), "init applied");
        let Asked { events, bundle, volumes, entropy, policy, limits, body, .. } = asked;
        let InitRequest {
            env_vars,
            default_user,
            default_workdir,
            sandbox_id,
            template_id,
            max_lifetime_ms,
            inhibitor_budget_ms,
            ..
        } = body;
        if !entropy.is_empty() {
            self.renew_entropy(entropy);
        }
        if let Some(length) = max_lifetime_ms {
            self.guard_lifetime(Some(Duration::from_millis(length)));
        }
        self.inhibition.configure(policy, inhibitor_budget_ms.map(Duration::from_millis));
        self.settings.update(|values| {
            if let Some(limits) = limits {
                values.process_limits = limits;
            }
            if let Some(variables) = env_vars {
                values.set_environment(variables);
            }
            if let Some(user) = default_user.filter(|user| !user.is_empty()) {
                values.default_user = user;
            }
            if let Some(workdir) = default_workdir.filter(|workdir| !workdir.is_empty()) {
                values.default_workdir = Some(workdir);
            }
        });
        self.take_names(Names { sandbox_id, template_id, events, ..Names::default() });
        if let Some(bundle) = bundle {
            let trust = Arc::clone(&self.trust);
            let installed = tokio::task::spawn_blocking(move || trust.install(&bundle)).await;
            installed.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
        }
        self.volumes.apply(volumes, lifecycle).await.map_err(|error| error.to_string())
    }

    /// Says what is in force now, whatever became of the request.
    fn report(&self, reply: &mut Reply, user_given: bool, rejected: Option<String>) {
        #[derive(Serialize)]
        struct Defaults {
            user: String,
            #[serde(skip_serializing_if = "Option::is_none")]
            workdir: Option<String>,
            /// The user is the built-in one, because no host named one.
            fallback: bool,
        }
        #[derive(Serialize)]
        struct Cpus {
            online: u32,
            possible: u32,
            target: u32,
            #[serde(skip_serializing_if = "Option::is_none")]
            rejected: Option<String>,
        }
        let values = self.settings.snapshot();
        let defaults =
            Defaults { user: values.default_user, workdir: values.default_workdir, fallback: !user_given };
        reply.put(DEFAULTS, &defaults);
        let status = self.cpus.status();
        let (online, possible, target) = (status.online, status.possible, status.target);
        reply.put(CPUS, &Cpus { online, possible, target, rejected });
    }
}

impl History {
    /// Notes an accepted call; whether the machine is in another life than at the call before. The first call is none's successor.
    fn begin(&mut self, timestamp: Option<clock::Timestamp>, lifecycle: Option<&str>) -> bool {
        let restored =
            self.accepted && lifecycle.is_some_and(|lifecycle| self.lifecycle.as_deref() != Some(lifecycle));
        self.accepted = true;
        self.newest = timestamp.or(self.newest);
        if let Some(lifecycle) = lifecycle {
            self.lifecycle = Some(lifecycle.to_owned());
        }
        restored
    }
}

/// The names of what was sent, for the log. The values are credentials and people's secrets.
fn fields_of(request: &InitRequest) -> String {
    match serde_json::to_value(request) {
        Ok(serde_json::Value::Object(fields)) => {
            fields.keys().map(String::as_str).collect::<Vec<_>>().join(" ")
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests;
