//! What a create call asks for: base64 over JSON in the header `x-deno-sandbox-config` (contract: deno.md section 2.2).

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use guestd_idle::terms::Asked;
use serde_json::{Map, Value};

use super::error::DoorError;

/// Most labels, and the longest name and value in bytes, as the cloud documents them.
const LABELS: usize = 5;
const LABEL_NAME: usize = 64;
const LABEL_VALUE: usize = 128;

/// How much of a wrong value an error shows, in characters.
const SHOWN: usize = 64;

/// How long a sandbox is to live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// As long as the connection that creates it.
    Session,
    For(Duration),
}

impl Wish {
    pub(super) fn asked(self, liveness: Duration) -> Asked {
        match self {
            Self::Session => Asked::session(liveness),
            Self::For(length) => Asked::lasting(length),
        }
    }
}

#[derive(Debug)]
pub(super) struct CreateConfig {
    pub(super) wish: Wish,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) env: BTreeMap<String, String>,
}

impl CreateConfig {
    /// Reads the header's value. `wall_ms` is now: the JavaScript SDK sends its deadline as an instant.
    ///
    /// Fields that are not known are ignored, as clients send subsets and supersets. `memory_mb` is the operator's choice here, and
    /// `allow_net` is kept because a sandbox of this host has no network. What would be lost in silence is refused.
    ///
    /// # Errors
    /// 400 with the field and the rule.
    pub(super) fn parse(header: &[u8], wall_ms: i64) -> Result<Self, DoorError> {
        let bytes = STANDARD
            .decode(header)
            .map_err(|_| DoorError::config("x-deno-sandbox-config: must be base64 over JSON"))?;
        // JavaScript's btoa writes one byte a character: Latin-1, which only ASCII has in common with UTF-8.
        let text = String::from_utf8(bytes)
            .unwrap_or_else(|error| error.into_bytes().into_iter().map(char::from).collect());
        let config: Map<String, Value> = serde_json::from_str(&text).map_err(|error| {
            DoorError::config(format!("x-deno-sandbox-config: must be a JSON object: {error}"))
        })?;
        for name in ["root", "volumes", "secrets", "ssh", "port"] {
            if !is_empty(config.get(name)) {
                return Err(DoorError::config(format!("{name}: this host cannot do that yet")));
            }
        }
        let labels = strings(&config, "labels")?;
        let fits = |(name, value): (&String, &String)| name.len() <= LABEL_NAME && value.len() <= LABEL_VALUE;
        if labels.len() > LABELS || !labels.iter().all(fits) {
            return Err(DoorError::config(format!(
                "labels: at most {LABELS}, with names up to {LABEL_NAME} and values up to {LABEL_VALUE} bytes"
            )));
        }
        Ok(Self { wish: wish(&config, wall_ms)?, labels, env: strings(&config, "env")? })
    }
}

/// Absent, null, or an empty or false value.
fn is_empty(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null | Value::Bool(false)) => true,
        Some(Value::Array(values)) => values.is_empty(),
        Some(Value::Object(values)) => values.is_empty(),
        Some(_) => false,
    }
}

fn strings(config: &Map<String, Value>, field: &str) -> Result<BTreeMap<String, String>, DoorError> {
    let wrong = || DoorError::config(format!("{field}: must be an object of strings"));
    match config.get(field) {
        None | Some(Value::Null) => Ok(BTreeMap::new()),
        Some(Value::Object(values)) => values
            .iter()
            .map(|(name, value)| Ok((name.clone(), value.as_str().ok_or_else(wrong)?.to_owned())))
            .collect(),
        Some(_) => Err(wrong()),
    }
}

/// JavaScript sends `stop_at_ms`, Python `timeout`, neither of them for a session.
fn wish(config: &Map<String, Value>, wall_ms: i64) -> Result<Wish, DoorError> {
    if let Some(stop_at) = config.get("stop_at_ms").filter(|value| !value.is_null()) {
        return left(stop_at, wall_ms).map(Wish::For).map_err(DoorError::config);
    }
    match config.get("timeout") {
        None | Some(Value::Null) => Ok(Wish::Session),
        Some(Value::String(text)) if text == "session" => Ok(Wish::Session),
        Some(value) => {
            let length = value.as_str().and_then(length).filter(|length| !length.is_zero());
            length.map(Wish::For).ok_or_else(|| {
                let got: String = value.to_string().chars().take(SHOWN).collect();
                DoorError::config(format!(
                    "timeout: must be \"session\" or a positive duration such as \"600s\" or \"15m\"; got {got}"
                ))
            })
        }
    }
}

/// `90s` or `15m`.
fn length(text: &str) -> Option<Duration> {
    let (digits, unit) = match (text.strip_suffix('s'), text.strip_suffix('m')) {
        (Some(digits), _) => (digits, 1),
        (_, Some(digits)) => (digits, 60),
        _ => return None,
    };
    let only_digits = digits.bytes().all(|byte| byte.is_ascii_digit());
    let count: u64 = digits.parse().ok().filter(|_| only_digits)?;
    Some(Duration::from_secs(count.checked_mul(unit)?))
}

/// How far a deadline in milliseconds since 1970 is from now.
///
/// # Errors
/// What is wrong with it. One that is past is refused: it would be a kill by a client whose clock is behind.
pub(super) fn left(stop_at: &Value, wall_ms: i64) -> Result<Duration, String> {
    let stop_at = stop_at.as_i64().or_else(|| stop_at.as_f64().map(|number| number as i64));
    let stop_at = stop_at.ok_or("stop_at_ms: must be a number of milliseconds since 1970")?;
    let left = u64::try_from(stop_at.saturating_sub(wall_ms)).ok().filter(|left| *left > 0);
    left.map(Duration::from_millis)
        .ok_or_else(|| format!("stop_at_ms: is not in the future; on this host it is {wall_ms} now"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(config: &Value) -> Result<CreateConfig, String> {
        let header = STANDARD.encode(config.to_string());
        CreateConfig::parse(header.as_bytes(), 1_000).map_err(|error| format!("{error:?}"))
    }

    #[test]
    fn both_sdks_ways_to_ask_for_a_lifetime_are_understood() {
        let wish = |config| parse(&config).unwrap().wish;
        assert_eq!(wish(json!({"memory_mb": 1280, "volumes": []})), Wish::Session);
        assert_eq!(wish(json!({"timeout": "session", "stop_at_ms": null})), Wish::Session);
        assert_eq!(wish(json!({"timeout": "5m"})), Wish::For(Duration::from_secs(300)));
        assert_eq!(wish(json!({"timeout": "90s"})), Wish::For(Duration::from_secs(90)));
        assert_eq!(wish(json!({"stop_at_ms": 3_500})), Wish::For(Duration::from_millis(2_500)));
    }

    #[test]
    fn a_lifetime_outside_the_rule_is_refused_with_the_field() {
        for bad in ["5h", "abc", "", "5", "0s", "-5m", "+5m", "1.5m", "10ms", "s", "99999999999999999999s"] {
            assert!(parse(&json!({"timeout": bad})).unwrap_err().contains("timeout: must be"), "{bad}");
        }
        assert!(parse(&json!({"timeout": 300})).is_err());
        for bad in [json!(1_000), json!(-5), json!("2000"), json!(i64::MIN), json!({})] {
            assert!(parse(&json!({"stop_at_ms": bad})).unwrap_err().contains("stop_at_ms: "), "{bad}");
        }
    }

    #[test]
    fn a_header_that_is_no_config_is_refused() {
        for bad in [&b"\xff"[..], b"", b"e", b"bnVsbA==", b"W10="] {
            CreateConfig::parse(bad, 0).unwrap_err();
        }
    }

    #[test]
    fn a_label_in_latin_1_is_read_as_its_client_meant_it() {
        let header = STANDARD.encode(b"{\"labels\":{\"caf\xe9\":\"x\"}}");
        let config = CreateConfig::parse(header.as_bytes(), 0).unwrap();
        assert_eq!(config.labels.keys().next().unwrap(), "café");
    }

    #[test]
    fn what_would_be_lost_in_silence_is_refused() {
        for (name, value) in [
            ("root", json!({"volume": "v"})),
            ("volumes", json!({"/data": "v"})),
            ("volumes", json!([{"volume": "v", "path": "/data"}])),
            ("secrets", json!({"A": {"hosts": [], "value": "x"}})),
            ("ssh", json!(true)),
            ("port", json!(8000)),
            ("env", json!({"A": 1})),
            ("labels", json!([])),
            ("labels", json!({"a": "x".repeat(129)})),
        ] {
            assert!(parse(&json!({name: value})).unwrap_err().contains(name), "{name}");
        }
        let six: Map<String, Value> = (0..6).map(|n| (n.to_string(), json!("x"))).collect();
        assert!(parse(&json!({"labels": six})).is_err());
        let taken =
            parse(&json!({"ssh": false, "debug": false, "allow_net": [], "env": {"A": "b"}, "new": 1}));
        assert_eq!(taken.unwrap().env["A"], "b");
    }
}
