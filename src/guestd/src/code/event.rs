//! What a kernel says, as the lines that SDKs read (contract: envd.md sections 7.2 and 7.3).
//!
//! Texts and results stay the JSON that the kernel wrote: nothing is decoded that is only passed on.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::message::Message;

/// A line of output, or what else a message means for its cell.
#[derive(Debug)]
pub enum Heard {
    Line(String),
    /// An error of the code.
    Error(String),
    Busy,
    Idle,
    /// Nothing that a client is told.
    Nothing,
}

#[derive(Deserialize)]
struct Stream<'a> {
    name: &'a str,
    #[serde(borrow)]
    text: &'a RawValue,
}

#[derive(Deserialize)]
struct Input {
    execution_count: Option<u64>,
}

#[derive(Deserialize)]
struct State<'a> {
    execution_state: &'a str,
}

#[derive(Deserialize)]
struct Data<'a> {
    #[serde(borrow)]
    data: BTreeMap<String, &'a RawValue>,
}

/// An error as kernels tell it: on its own, and in the reply to the request.
#[derive(Debug, Deserialize)]
pub struct Failure<'a> {
    #[serde(borrow, default)]
    ename: Option<&'a RawValue>,
    #[serde(borrow, default)]
    evalue: Option<&'a RawValue>,
    #[serde(borrow, default)]
    traceback: Option<Vec<&'a RawValue>>,
}

/// The names of the fields of a result by MIME type.
const FIELDS: [(&str, &str); 12] = [
    ("text/plain", "text"),
    ("text/html", "html"),
    ("text/markdown", "markdown"),
    ("image/svg+xml", "svg"),
    ("image/png", "png"),
    ("image/jpeg", "jpeg"),
    ("application/pdf", "pdf"),
    ("text/latex", "latex"),
    ("application/json", "json"),
    ("application/javascript", "javascript"),
    ("e2b/data", "data"),
    ("e2b/chart", "chart"),
];

/// The fields that hold any JSON; the others are text.
const STRUCTURED: [&str; 3] = ["json", "data", "chart"];

/// Translates a message of the iopub channel.
pub fn translate(message: &Message) -> Heard {
    let content = message.content();
    match message.kind.as_str() {
        "status" => match serde_json::from_str::<State<'_>>(content) {
            Ok(State { execution_state: "idle" }) => Heard::Idle,
            Ok(State { execution_state: "busy" }) => Heard::Busy,
            _ => Heard::Nothing,
        },
        "execute_input" => match serde_json::from_str(content) {
            Ok(Input { execution_count: Some(count) }) => {
                Heard::Line(format!(r#"{{"type":"number_of_executions","execution_count":{count}}}"#))
            }
            _ => Heard::Nothing,
        },
        "stream" => match serde_json::from_str(content) {
            Ok(Stream { name, text }) => {
                let kind = if name == "stderr" { "stderr" } else { "stdout" };
                match is_text(text) {
                    true => Heard::Line(output(kind, text.get(), message.date.as_deref())),
                    false => Heard::Nothing,
                }
            }
            Err(_) => Heard::Nothing,
        },
        kind @ ("display_data" | "execute_result") => match serde_json::from_str(content) {
            Ok(Data { data }) => Heard::Line(result(&data, kind == "execute_result")),
            Err(_) => Heard::Nothing,
        },
        "error" => match serde_json::from_str::<Failure<'_>>(content) {
            Ok(failure) => Heard::Error(failure.line()),
            Err(_) => Heard::Nothing,
        },
        _ => Heard::Nothing,
    }
}

fn is_text(value: &RawValue) -> bool {
    value.get().starts_with('"')
}

/// `text` is a JSON string.
fn output(kind: &str, text: &str, date: Option<&RawValue>) -> String {
    let now;
    let date = match date.filter(|date| is_text(date)) {
        Some(date) => date.get(),
        None => {
            now = serde_json::Value::from(timestamp()).to_string();
            &now
        }
    };
    // Clients in Python ask for the time of each.
    format!(r#"{{"type":"{kind}","text":{text},"timestamp":{date}}}"#)
}

/// Something that the agent has to say in the stderr of a cell.
pub fn notice(text: &str) -> String {
    output("stderr", &quoted(&format!("[guestd] {text}\n")), None)
}

/// An error that the agent tells.
pub fn error(name: &str, value: &str) -> String {
    format!(
        r#"{{"type":"error","name":{},"value":{},"traceback":{}}}"#,
        quoted(name),
        quoted(value),
        quoted(&format!("{name}: {value}"))
    )
}

pub fn end() -> String {
    r#"{"type":"end_of_execution"}"#.to_owned()
}

pub fn keepalive() -> &'static str {
    "{\"type\":\"keepalive\"}\n"
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// RFC 3339, in UTC.
fn timestamp() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let stamp = buffa_types::google::protobuf::Timestamp {
        seconds: i64::try_from(now.as_secs()).unwrap_or(0),
        nanos: i32::try_from(now.subsec_nanos()).unwrap_or(0),
        ..Default::default()
    };
    match serde_json::to_value(stamp) {
        Ok(serde_json::Value::String(text)) => text,
        _ => "1970-01-01T00:00:00Z".to_owned(),
    }
}

impl Failure<'_> {
    /// All three fields are there: clients in Python ask for each.
    pub fn line(&self) -> String {
        let text = |value: Option<&RawValue>| match value {
            Some(value) if is_text(value) => value.get().to_owned(),
            // A kernel that names an error by a number.
            Some(value) => quoted(value.get()),
            None => r#""""#.to_owned(),
        };
        let frames = self.traceback.as_deref().unwrap_or_default();
        let name = if self.is_unnamed() { r#""Error""#.to_owned() } else { text(self.ename) };
        format!(
            r#"{{"type":"error","name":{name},"value":{},"traceback":{}}}"#,
            text(self.evalue),
            joined(frames)
        )
    }

    fn is_unnamed(&self) -> bool {
        self.ename.is_none_or(|name| matches!(name.get(), r#""""# | "null"))
    }
}

/// JSON strings as one; what is no string is left out.
fn joined(parts: &[&RawValue]) -> String {
    let inner = parts.iter().filter_map(|part| part.get().strip_prefix('"')?.strip_suffix('"'));
    format!("\"{}\"", inner.collect::<String>())
}

fn result(data: &BTreeMap<String, &RawValue>, main: bool) -> String {
    let mut line = r#"{"type":"result""#.to_owned();
    let mut extra = Vec::new();
    for (mime, value) in data {
        if value.get() == "null" {
            continue;
        }
        match FIELDS.iter().find(|(known, _)| known == mime) {
            Some((_, field)) if STRUCTURED.contains(field) => push(&mut line, field, value.get()),
            Some((_, field)) => {
                let text = text_of(value);
                push(&mut line, field, if *field == "text" { without_quotes(&text) } else { text }.as_str());
            }
            None => extra.push(format!("{}:{}", quoted(mime), value.get())),
        }
    }
    if !extra.is_empty() {
        push(&mut line, "extra", &format!("{{{}}}", extra.join(",")));
    }
    push(&mut line, "is_main_result", if main { "true" } else { "false" });
    line.push('}');
    line
}

fn push(line: &mut String, field: &str, value: &str) {
    line.push_str(",\"");
    line.push_str(field);
    line.push_str("\":");
    // A kernel may write its JSON over several lines; ours are one each.
    if value.contains(['\n', '\r']) {
        line.extend(value.chars().map(|c| if matches!(c, '\n' | '\r') { ' ' } else { c }));
    } else {
        line.push_str(value);
    }
}

/// A text may come as a list of lines (nbformat: multi-line strings).
fn text_of(value: &RawValue) -> String {
    match serde_json::from_str::<Vec<&RawValue>>(value.get()) {
        Ok(lines) => joined(&lines),
        Err(_) if is_text(value) => value.get().to_owned(),
        Err(_) => quoted(value.get()),
    }
}

/// The representation of a string has quotes that are not the string's: one pair goes (contract: envd.md section 7.3). `text` is a JSON
/// string.
fn without_quotes(text: &str) -> String {
    let inner = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or_default();
    for quote in ["'", "\\\""] {
        if inner.len() >= 2 * quote.len()
            && let Some(bare) = inner.strip_prefix(quote).and_then(|text| text.strip_suffix(quote))
            // An escaped backslash before the closing quote is the string's own.
            && (quote == "'" || !ends_in_odd_backslashes(bare))
        {
            return format!("\"{bare}\"");
        }
    }
    text.to_owned()
}

fn ends_in_odd_backslashes(text: &str) -> bool {
    text.bytes().rev().take_while(|byte| *byte == b'\\').count() % 2 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(kind: &str, content: &str) -> Heard {
        let date = RawValue::from_string("\"2026-11-01T00:00:00Z\"".to_owned()).ok();
        translate(&Message::new(kind, date, content))
    }

    fn line(kind: &str, content: &str) -> serde_json::Value {
        match heard(kind, content) {
            Heard::Line(line) | Heard::Error(line) => {
                assert!(!line.contains('\n'), "{line}");
                serde_json::from_str(&line).unwrap()
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_result_has_the_fields_that_sdks_know_and_the_rest_as_extra() {
        let result = line(
            "execute_result",
            "{\"data\": {\"text/plain\": \"'it'\", \"image/png\": \"aGk=\", \"application/json\": {\"a\":\n [1]}, \"x/y\": 3, \"text/html\": [\"<b>\", \"</b>\"], \"e2b/chart\": null}, \"metadata\": {}}",
        );
        assert_eq!(
            result,
            serde_json::json!({"type": "result", "text": "it", "png": "aGk=", "json": {"a": [1]}, "html": "<b></b>", "extra": {"x/y": 3}, "is_main_result": true})
        );
        assert_eq!(
            line("display_data", r#"{"data": {}}"#),
            serde_json::json!({"type": "result", "is_main_result": false})
        );
    }

    #[test]
    fn one_pair_of_quotes_goes_and_no_more() {
        for (given, shown) in [
            (r#""'a'""#, r#""a""#),
            (r#""\"a'b\"""#, r#""a'b""#),
            (r#""''a''""#, r#""'a'""#),
            (r#""'""#, r#""'""#),
            (r#""\"""#, r#""\"""#),
            (r#""'a""#, r#""'a""#),
            (r#""12""#, r#""12""#),
            (r#""""#, r#""""#),
            (r#""\"a\\\"""#, r#""a\\""#),
        ] {
            let bare = without_quotes(given);
            assert_eq!(bare, shown);
            serde_json::from_str::<String>(&bare).unwrap();
        }
    }

    #[test]
    fn an_error_has_a_name_a_value_and_one_traceback() {
        let error = line(
            "error",
            r#"{"ename": "NameError", "evalue": "name 'x' is not defined", "traceback": ["one\n", "two"]}"#,
        );
        assert_eq!(
            error,
            serde_json::json!({"type": "error", "name": "NameError", "value": "name 'x' is not defined", "traceback": "one\ntwo"})
        );
        let bare = line("error", r#"{"evalue": 7, "traceback": [1, "x"]}"#);
        assert_eq!(
            bare,
            serde_json::json!({"type": "error", "name": "Error", "value": "7", "traceback": "x"})
        );
    }

    #[test]
    fn output_has_a_time_and_keeps_what_json_cannot_decode() {
        let stdout = line("stream", r#"{"name": "stdout", "text": "a\n"}"#);
        assert_eq!(
            stdout,
            serde_json::json!({"type": "stdout", "text": "a\n", "timestamp": "2026-11-01T00:00:00Z"})
        );
        let Heard::Line(surrogate) = heard("stream", r#"{"name": "stderr", "text": "\ud800"}"#) else {
            panic!()
        };
        assert!(surrogate.contains(r#""text":"\ud800""#), "{surrogate}");
        assert!(notice("x").contains(r#""timestamp":"20"#));
    }

    #[test]
    fn what_no_client_asks_for_is_nothing() {
        for (kind, content) in [
            ("update_display_data", r#"{"data": {"text/plain": "x"}}"#),
            ("clear_output", "{}"),
            ("comm_open", "{}"),
            ("stream", r#"{"name": "stdout", "text": 5}"#),
            ("stream", "nonsense"),
            ("status", r#"{"execution_state": "starting"}"#),
        ] {
            assert!(matches!(heard(kind, content), Heard::Nothing), "{kind}");
        }
        assert!(matches!(heard("status", r#"{"execution_state": "idle"}"#), Heard::Idle));
    }
}
