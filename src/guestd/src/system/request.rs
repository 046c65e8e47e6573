//! What an `/init` asks for, checked as a whole before anything is changed (contract: envd.md section 4.3).

use std::net::IpAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use guestd_idle::Policy;
use guestd_protocol::init::{InitRequest, THAW_SKIP};
use serde::Deserialize;

use super::clock::Timestamp;
use super::entropy::SEED_LIMIT;
use super::names;
use crate::cgroup::Limits;
use crate::trust::Bundle;
use crate::volumes::Volume;

/// The longest access token, in bytes: what an HTTP header can carry with room to spare.
const TOKEN_LIMIT: usize = 4096;

/// A checked request: the fields that have a form of their own, and the rest as it came.
#[derive(Debug, Default)]
pub(super) struct Asked {
    pub(super) timestamp: Option<Timestamp>,
    pub(super) events: Option<IpAddr>,
    pub(super) bundle: Option<Bundle>,
    pub(super) volumes: Vec<Volume>,
    pub(super) entropy: Vec<u8>,
    pub(super) policy: Option<Policy>,
    pub(super) limits: Option<Limits>,
    pub(super) thaws: bool,
    pub(super) body: InitRequest,
}

/// envd refuses a token with JSON escapes, and hosts rely on the token being in the body as it is: borrowed text has none.
#[derive(Deserialize)]
struct PlainToken<'a> {
    #[serde(rename = "accessToken", borrow)]
    _access_token: Option<&'a str>,
}

impl Asked {
    /// # Errors
    /// The text of the 400: which field, and what its rule is.
    pub(super) fn parse(body: &[u8]) -> Result<Self, String> {
        if body.is_empty() {
            return Ok(Self { thaws: true, ..Self::default() });
        }
        // serde takes an array for a struct without names; nobody else does.
        if body.trim_ascii_start().first() != Some(&b'{') {
            return Err("invalid /init body: it must be a JSON object".to_owned());
        }
        let request: InitRequest =
            serde_json::from_slice(body).map_err(|error| format!("invalid /init body: {error}"))?;
        check_token(&request, body)?;
        check_environment(&request)?;
        let timestamp = match &request.timestamp {
            None => None,
            Some(text) => {
                let parsed = Timestamp::parse(text);
                Some(parsed.ok_or_else(|| format!("timestamp is not RFC 3339: {text:?}"))?)
            }
        };
        for (field, id) in [("sandboxID", &request.sandbox_id), ("templateID", &request.template_id)] {
            if let Some(id) = id.as_deref().filter(|id| !names::is_name(id)) {
                return Err(format!("{field} must be 1 to 64 letters, digits, '-', '_' or '.': {id:?}"));
            }
        }
        let events = match request.hyperloop_ip.as_deref().filter(|address| !address.is_empty()) {
            None => None,
            Some(address) => {
                Some(address.parse().map_err(|_| format!("hyperloopIP is no IP address: {address:?}"))?)
            }
        };
        let bundle = request.ca_bundle.as_deref().filter(|bundle| !bundle.is_empty());
        let bundle = bundle.map(Bundle::parse).transpose().map_err(|error| error.to_string())?;
        let volumes = Volume::parse_all(request.volume_mounts.as_deref().unwrap_or_default())
            .map_err(|error| error.to_string())?;
        let entropy = match &request.entropy {
            None => Vec::new(),
            Some(text) => {
                let bytes = STANDARD.decode(text).map_err(|_| "entropy is not base64".to_owned())?;
                if bytes.len() > SEED_LIMIT {
                    return Err(format!("entropy has more than {SEED_LIMIT} bytes"));
                }
                bytes
            }
        };
        // Read on this one word: what a newer host may invent thaws (contract: envd.md section 12).
        let thaws = request.thaw.as_deref() != Some(THAW_SKIP);
        let policy = request.idle_policy.as_ref().map(Policy::from_words).transpose();
        let policy = policy.map_err(|error| error.to_string())?;
        let limits = request.process_limits.as_ref().map(Limits::of_init).transpose();
        let limits = limits.map_err(|error| error.to_string())?;
        Ok(Self { timestamp, events, bundle, volumes, entropy, policy, limits, thaws, body: request })
    }
}

fn check_token(request: &InitRequest, body: &[u8]) -> Result<(), String> {
    let Some(token) = &request.access_token else { return Ok(()) };
    if token.is_empty() {
        return Err("accessToken must not be empty: leave it out to have none".to_owned());
    }
    if token.len() > TOKEN_LIMIT {
        return Err(format!("accessToken has more than {TOKEN_LIMIT} bytes"));
    }
    let plain = serde_json::from_slice::<PlainToken<'_>>(body);
    plain.map(drop).map_err(|_| "accessToken must be written without JSON escapes".to_owned())
}

fn check_environment(request: &InitRequest) -> Result<(), String> {
    for (name, value) in request.env_vars.iter().flatten() {
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(format!("envVars: {name:?} cannot be the name of a variable"));
        }
        if value.contains('\0') {
            return Err(format!("envVars: the value of {name:?} contains a zero byte"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_that_cannot_be_carried_out_names_its_field() {
        let cases = [
            (r#"{"#, "/init body"),
            (r#"[]"#, "/init body"),
            (r#"{"accessToken":""}"#, "accessToken"),
            (r#"{"accessToken":5}"#, "invalid"),
            (r#"{"accessToken":"a\u0062c"}"#, "accessToken"),
            (r#"{"accessToken":"a\"c"}"#, "accessToken"),
            (r#"{"timestamp":"soon"}"#, "timestamp"),
            (r#"{"envVars":[1]}"#, "invalid"),
            (r#"{"envVars":{"":"x"}}"#, "envVars"),
            (r#"{"envVars":{"A=B":"x"}}"#, "envVars"),
            (r#"{"envVars":{"A":"\u0000"}}"#, "envVars"),
            (r#"{"sandboxID":"a\nb"}"#, "sandboxID"),
            (r#"{"hyperloopIP":"localhost"}"#, "hyperloopIP"),
            (r#"{"caBundle":"trust me"}"#, "caBundle"),
            (r#"{"volumeMounts":[{"nfs_target":"x","path":"/m"}]}"#, "nfs_target"),
            (r#"{"volumeMounts":[{"path":"/m"}]}"#, "nfs_target"),
            (r#"{"entropy":"?"}"#, "entropy"),
        ];
        for (body, names) in cases {
            let error = Asked::parse(body.as_bytes()).unwrap_err();
            assert!(error.contains(names), "{body}: {error}");
        }
    }

    #[test]
    fn what_is_absent_null_or_unknown_is_left_alone() {
        for body in
            ["", "{}", r#"{"envVars":null,"accessToken":null,"caBundle":"","hyperloopIP":"","new":{"a":1}}"#]
        {
            let asked = Asked::parse(body.as_bytes()).unwrap();
            assert!(asked.body.env_vars.is_none() && asked.body.access_token.is_none(), "{body}");
            assert!(asked.bundle.is_none() && asked.events.is_none() && asked.thaws, "{body}");
        }
    }

    #[test]
    fn only_the_word_skip_leaves_a_machine_frozen() {
        for (body, thaws) in
            [(r#"{"thaw":"skip"}"#, false), (r#"{"thaw":"inline"}"#, true), (r#"{"thaw":"later"}"#, true)]
        {
            assert_eq!(Asked::parse(body.as_bytes()).unwrap().thaws, thaws, "{body}");
        }
    }
}
