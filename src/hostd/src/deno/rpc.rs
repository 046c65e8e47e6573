//! JSON-RPC on a socket (contract: deno.md section 3). No method is carried into the guest yet: each call gets "method not found".

use serde::Deserialize;
use serde_json::{Value, json};

/// Close codes that both SDKs know.
pub(super) const INVALID_JSON: u16 = 4000;
pub(super) const INVALID_RPC: u16 = 4001;

/// Longest id that is a string: it is sent back.
const ID_LIMIT: usize = 128;

#[derive(Deserialize)]
struct Message {
    jsonrpc: Option<String>,
    id: Option<Value>,
    method: Option<String>,
}

/// What a message leads to.
#[derive(Debug, PartialEq)]
pub(super) enum Outcome {
    Reply(String),
    Nothing,
    /// The socket closes with this code and reason.
    Close(u16, &'static str),
}

/// Answers one message.
pub(super) fn answer(text: &[u8]) -> Outcome {
    // Not JSON: the JavaScript SDK's sign of life. Only who says it gets an answer, the Python SDK would take it for a broken message.
    if text == b"ping" {
        return Outcome::Reply("pong".to_owned());
    }
    let message: Message = match serde_json::from_slice(text) {
        Ok(message) => message,
        Err(error) if error.is_data() => return Outcome::Close(INVALID_RPC, "invalid JSON-RPC"),
        Err(_) => return Outcome::Close(INVALID_JSON, "invalid JSON"),
    };
    let id_fits = match &message.id {
        None | Some(Value::Number(_)) => true,
        Some(Value::String(id)) => id.len() <= ID_LIMIT,
        Some(_) => false,
    };
    // A batch is no message here, even one that reads like the fields in their order.
    let is_object = text.trim_ascii_start().starts_with(b"{");
    if !is_object || message.jsonrpc.as_deref() != Some("2.0") || message.method.is_none() || !id_fits {
        return Outcome::Close(INVALID_RPC, "invalid JSON-RPC");
    }
    match message.id {
        // A notification: of streams, of which there are none.
        None => Outcome::Nothing,
        // The text is what the Python SDK knows the error by.
        Some(id) => Outcome::Reply(
            json!({"jsonrpc": "2.0", "id": id, "error": {"code": -32601, "message": "Method not found"}})
                .to_string(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_gets_its_own_id_back_in_the_same_type() {
        for id in ["7", "\"7\"", "0"] {
            let call =
                format!(r#"{{"jsonrpc":"2.0","id":{id},"method":"spawn","params":{{"command":"ls"}}}}"#);
            let Outcome::Reply(reply) = answer(call.as_bytes()) else { panic!("no reply") };
            let reply: Value = serde_json::from_str(&reply).unwrap();
            assert_eq!(reply["id"].to_string(), id);
            assert_eq!(reply["error"], json!({"code": -32601, "message": "Method not found"}));
        }
    }

    #[test]
    fn what_is_no_call_is_not_answered() {
        assert_eq!(answer(b"ping"), Outcome::Reply("pong".to_owned()));
        assert_eq!(
            answer(br#"{"jsonrpc":"2.0","method":"$sandbox.stream.end","params":{}}"#),
            Outcome::Nothing
        );
        for bad in ["", "{", "pong", "\u{0}", "{\"jsonrpc\":"] {
            assert!(matches!(answer(bad.as_bytes()), Outcome::Close(INVALID_JSON, _)), "{bad}");
        }
        assert!(matches!(answer(b"\"\xff\""), Outcome::Close(..)));
        for bad in [
            "[]",
            "1",
            "{}",
            r#"["2.0",1,"spawn"]"#,
            r#"{"jsonrpc":"1.0","id":1,"method":"a"}"#,
            r#"{"jsonrpc":"2.0","id":{},"method":"a"}"#,
        ] {
            assert!(matches!(answer(bad.as_bytes()), Outcome::Close(INVALID_RPC, _)), "{bad}");
        }
        let deep = "[".repeat(100_000);
        assert!(matches!(answer(deep.as_bytes()), Outcome::Close(..)));
    }
}
