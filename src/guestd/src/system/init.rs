//! `POST /init`: credentials, environment, default user and clock (contract: envd.md section 4.3).

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use guestd_idle::Policy;
use guestd_protocol::init::InitRequest;
use guestd_protocol::{CONTROL_HEADER, ENVD_VERSION};

use super::clock::{self, Timestamp};
use super::{System, host_name};

const VERSION_HEADER: HeaderName = HeaderName::from_static("x-envd-version");

pub(super) async fn init(State(system): State<Arc<System>>, headers: HeaderMap, body: Bytes) -> Response {
    let mut response = match apply(&system, &headers, &body) {
        Ok(()) => (StatusCode::NO_CONTENT, [(header::CACHE_CONTROL, HeaderValue::from_static("no-store"))])
            .into_response(),
        Err((status, message)) => (status, message).into_response(),
    };
    response.headers_mut().insert(VERSION_HEADER, HeaderValue::from_static(ENVD_VERSION));
    response
}

fn apply(system: &System, headers: &HeaderMap, body: &[u8]) -> Result<(), (StatusCode, String)> {
    let bad = |message: String| (StatusCode::BAD_REQUEST, message);
    let request: InitRequest = if body.is_empty() {
        InitRequest::default()
    } else {
        serde_json::from_slice(body).map_err(|error| bad(format!("invalid /init body: {error}")))?
    };
    if request.access_token.as_deref() == Some("") {
        return Err(bad("accessToken must not be empty".to_owned()));
    }
    let timestamp = match &request.timestamp {
        None => None,
        Some(text) => {
            Some(Timestamp::parse(text).ok_or_else(|| bad(format!("timestamp is not RFC 3339: {text:?}")))?)
        }
    };
    let policy = request.idle_policy.as_ref().map(Policy::from_words).transpose();
    let policy = policy.map_err(|error| bad(error.to_string()))?;
    let control = headers.get(CONTROL_HEADER).and_then(|value| value.to_str().ok());
    let mut last = system.last_init.lock().unwrap_or_else(PoisonError::into_inner);
    // A call that was on its way for long must not undo a newer one; it is not an error either.
    if let (Some(last), Some(this)) = (*last, timestamp)
        && this < last
    {
        return Ok(());
    }
    system
        .access
        .initialise(control, request.access_token.as_deref())
        .map_err(|refusal| (StatusCode::UNAUTHORIZED, refusal.to_string()))?;
    *last = timestamp.or(*last);
    drop(last);
    if let Some(timestamp) = timestamp
        && system.own_kernel
    {
        clock::set(timestamp);
    }
    let budget = request.inhibitor_budget_ms.map(Duration::from_millis);
    system.inhibition.configure(policy, budget);
    settle(system, request);
    Ok(())
}

fn settle(system: &System, request: InitRequest) {
    if let Some(id) = &request.sandbox_id
        && system.own_machine
    {
        host_name::set(id);
    }
    if let Some(length) = request.max_lifetime_ms {
        let power_off = system.power_off;
        let guard = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(length)).await;
            tracing::warn!("the maximum lifetime is over and nobody stopped this machine");
            power_off();
        });
        system.set_guard(guard.abort_handle());
    }
    system.settings.update(|values| {
        if let Some(variables) = request.env_vars {
            values.environment = variables;
        }
        if let Some(user) = request.default_user.filter(|user| !user.is_empty()) {
            values.default_user = user;
        }
        if let Some(workdir) = request.default_workdir.filter(|workdir| !workdir.is_empty()) {
            values.default_workdir = Some(workdir);
        }
        for (name, value) in
            [("E2B_SANDBOX_ID", request.sandbox_id), ("E2B_TEMPLATE_ID", request.template_id)]
        {
            if let Some(value) = value {
                values.internal_environment.insert(name.to_owned(), value);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::Access;
    use crate::activity::Activity;
    use crate::agent::Config;
    use crate::inhibit::Inhibition;
    use crate::settings::Settings;

    fn system() -> System {
        let config = Config {
            tcp: Vec::new(),
            unix: None,
            machine_links: false,
            own_machine: false,
            own_kernel: false,
            power_off: || {},
            activity_socket: None,
        };
        let inhibition = Inhibition::new(Activity::new(Policy::default()));
        System::new(Arc::new(Access::default()), Arc::new(Settings::new(false)), inhibition, &config)
    }

    #[tokio::test]
    async fn an_older_call_does_not_undo_a_newer_one() {
        let system = system();
        let newer = br#"{"envVars":{"A":"new"},"timestamp":"2020-01-01T00:00:10Z","accessToken":"t"}"#;
        let older = br#"{"envVars":{"A":"old"},"timestamp":"2020-01-01T00:00:09Z","accessToken":"t"}"#;
        apply(&system, &HeaderMap::new(), newer).unwrap();
        apply(&system, &HeaderMap::new(), older).unwrap();
        assert_eq!(system.settings.snapshot().environment["A"], "new");
    }

    #[tokio::test]
    async fn a_bad_body_changes_nothing_and_names_the_field() {
        let system = system();
        for bad in [&b"{"[..], br#"{"accessToken":""}"#, br#"{"timestamp":"soon"}"#, br#"{"envVars":[1]}"#] {
            let (status, _) = apply(&system, &HeaderMap::new(), bad).unwrap_err();
            assert_eq!(status, StatusCode::BAD_REQUEST);
        }
        assert!(system.access.access_token().is_none());
        apply(&system, &HeaderMap::new(), b"").unwrap();
    }
}
