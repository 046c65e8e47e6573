//! The bodies that SDKs read (contract: control-plane.md sections 1.2, 1.4, 1.5 and annex B).

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Map, Value};

use super::ApiError;
use crate::clock;
use crate::lifetime::Sandbox;

/// A constant that old SDKs expect.
pub const CLIENT_ID: &str = "6532622b";

/// The answer of create and connect.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SandboxBody {
    #[serde(rename = "templateID")]
    template_id: String,
    #[serde(rename = "sandboxID")]
    sandbox_id: String,
    #[serde(rename = "clientID")]
    client_id: &'static str,
    alias: String,
    envd_version: String,
    envd_access_token: String,
    traffic_access_token: Option<String>,
    domain: Option<String>,
}

impl SandboxBody {
    pub fn of(sandbox: &Sandbox) -> Self {
        let record = &sandbox.record;
        Self {
            template_id: record.template.clone(),
            sandbox_id: record.id.clone(),
            client_id: CLIENT_ID,
            alias: record.alias.clone(),
            envd_version: record.envd_version.clone(),
            envd_access_token: record.access_token.clone(),
            traffic_access_token: None,
            domain: None,
        }
    }
}

/// An entry of a list; with the rest of the fields, the answer of get.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ListedBody {
    #[serde(rename = "templateID")]
    template_id: String,
    #[serde(rename = "sandboxID")]
    pub sandbox_id: String,
    #[serde(rename = "clientID")]
    client_id: &'static str,
    alias: String,
    started_at: String,
    end_at: String,
    cpu_count: u32,
    #[serde(rename = "memoryMB")]
    memory_mb: u32,
    #[serde(rename = "diskSizeMB")]
    disk_size_mb: u32,
    state: &'static str,
    envd_version: String,
    pub metadata: BTreeMap<String, String>,
    #[serde(skip)]
    pub started_wall_ms: i64,
}

impl ListedBody {
    pub fn of(sandbox: &Sandbox) -> Self {
        let record = &sandbox.record;
        Self {
            template_id: record.template.clone(),
            sandbox_id: record.id.clone(),
            client_id: CLIENT_ID,
            alias: record.alias.clone(),
            started_at: clock::rfc3339(record.started_wall_ms),
            end_at: clock::rfc3339(sandbox.end_wall_ms()),
            cpu_count: record.cpu_count,
            memory_mb: record.memory_mb,
            disk_size_mb: record.disk_mb,
            state: "running",
            envd_version: record.envd_version.clone(),
            metadata: record.metadata.clone(),
            started_wall_ms: record.started_wall_ms,
        }
    }
}

impl ListedBody {
    /// By the template's name or by the alias that the client created it under.
    pub fn is_of(&self, template: &str) -> bool {
        self.template_id == template || self.alias == template
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Lifecycle {
    auto_resume: bool,
    on_timeout: &'static str,
}

/// The answer of get.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DetailBody {
    #[serde(flatten)]
    listed: ListedBody,
    envd_access_token: String,
    domain: Option<String>,
    lifecycle: Lifecycle,
}

impl DetailBody {
    pub fn of(sandbox: &Sandbox) -> Self {
        Self {
            listed: ListedBody::of(sandbox),
            envd_access_token: sandbox.record.access_token.clone(),
            domain: None,
            lifecycle: Lifecycle { auto_resume: false, on_timeout: "kill" },
        }
    }
}

/// A request's JSON object, read field by field so that an error names the field.
#[derive(Debug)]
pub struct Fields(Map<String, Value>);

impl Fields {
    /// An empty body is an empty object: some SDKs send none.
    ///
    /// # Errors
    /// When the body is no JSON object.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        if body.iter().all(u8::is_ascii_whitespace) {
            return Ok(Self(Map::new()));
        }
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Self(fields)),
            Ok(_) => Err(ApiError::bad_request("the body must be a JSON object")),
            Err(error) => Err(ApiError::bad_request(format!("the body is not JSON: {error}"))),
        }
    }

    fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    /// # Errors
    /// When the field is no string.
    pub fn string(&self, name: &str) -> Result<Option<&str>, ApiError> {
        self.get(name)
            .map(|value| {
                value.as_str().ok_or_else(|| ApiError::bad_request(format!("{name}: must be a string")))
            })
            .transpose()
    }

    /// # Errors
    /// When the field is no whole number.
    pub fn seconds(&self, name: &str) -> Result<Option<i64>, ApiError> {
        self.get(name)
            .map(|value| {
                let whole =
                    value.as_i64().or_else(|| value.as_f64().filter(|v| v.fract() == 0.0).map(|v| v as i64));
                whole.ok_or_else(|| {
                    ApiError::bad_request(format!("{name}: must be a whole number of seconds"))
                })
            })
            .transpose()
    }

    /// # Errors
    /// When the field is no boolean.
    pub fn flag(&self, name: &str) -> Result<Option<bool>, ApiError> {
        self.get(name)
            .map(|value| {
                value.as_bool().ok_or_else(|| ApiError::bad_request(format!("{name}: must be true or false")))
            })
            .transpose()
    }

    /// # Errors
    /// When the field is no object of strings.
    pub fn strings(&self, name: &str) -> Result<BTreeMap<String, String>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(BTreeMap::new()) };
        let Value::Object(fields) = value else {
            return Err(ApiError::bad_request(format!("{name}: must be an object of strings")));
        };
        fields
            .iter()
            .map(|(key, value)| match value {
                Value::String(text) => Ok((key.clone(), text.clone())),
                _ => Err(ApiError::bad_request(format!("{name}.{key}: must be a string"))),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_that_is_wrong_names_its_field() {
        let fields =
            Fields::parse(br#"{"timeout":"soon","metadata":{"a":1},"envVars":[],"templateID":7}"#).unwrap();
        let text = |error: ApiError| format!("{error:?}");
        assert!(text(fields.seconds("timeout").unwrap_err()).contains("timeout: must be a whole number"));
        assert!(text(fields.strings("metadata").unwrap_err()).contains("metadata.a: must be a string"));
        assert!(text(fields.strings("envVars").unwrap_err()).contains("envVars: must be an object"));
        assert!(text(fields.string("templateID").unwrap_err()).contains("templateID"));
    }

    #[test]
    fn an_empty_body_is_an_empty_object_and_a_list_is_not() {
        assert!(Fields::parse(b"").unwrap().seconds("timeout").unwrap().is_none());
        assert!(Fields::parse(b"null").is_err());
        assert!(Fields::parse(b"[]").is_err());
        assert!(Fields::parse(b"{").is_err());
    }
}
