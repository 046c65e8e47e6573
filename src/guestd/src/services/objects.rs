//! A message in JSON is an object (contract: envd.md section 1.5; protobuf's JSON mapping).
//!
//! The decoder would take an array for a message, as a list of its fields, and an empty one for a message without any: a `Remove` of `[]`
//! would be one of the home folder.

use connectrpc::interceptor::{Next, NextStream, PayloadStream, StreamRequest, StreamResponse};
use connectrpc::interceptor::{UnaryRequest, UnaryResponse};
use connectrpc::{CodecFormat, ConnectError, Interceptor, Payload};
use futures_util::StreamExt;

/// Refuses each message whose JSON is not an object with `invalid_argument`.
pub(super) struct ObjectsOnly;

#[connectrpc::async_trait]
impl Interceptor for ObjectsOnly {
    async fn intercept_unary(
        &self,
        request: UnaryRequest,
        next: Next<'_>,
    ) -> Result<UnaryResponse, ConnectError> {
        check(&request.payload)?;
        next.run(request).await
    }

    async fn intercept_streaming(
        &self,
        request: StreamRequest,
        inbound: PayloadStream,
        next: NextStream<'_>,
    ) -> Result<StreamResponse, ConnectError> {
        let checked = inbound.map(|message| message.and_then(|payload| check(&payload).map(|()| payload)));
        next.run(request, Box::pin(checked)).await
    }
}

/// The first letter tells; whatever else is wrong is the decoder's to say.
fn check(payload: &Payload) -> Result<(), ConnectError> {
    if payload.format() != CodecFormat::Json {
        return Ok(());
    }
    let first = payload.bytes().trim_ascii_start().first();
    let kind = match first {
        None | Some(b'{') => return Ok(()),
        Some(b'[') => "an array",
        Some(b'"') => "a string",
        Some(b'n') => "null",
        Some(b't' | b'f') => "a boolean",
        Some(b'-' | b'0'..=b'9') => "a number",
        Some(_) => "something else",
    };
    Err(ConnectError::invalid_argument(format!("failed to decode JSON: a message is an object, not {kind}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_array_is_no_message_without_fields() {
        let told = |text: &'static str| check(&Payload::new(text.into(), CodecFormat::Json));
        for wrong in ["[]", " \t\r\n[\"/\"]", "null", "5", "-1", "\"x\"", "true", "\u{feff}{}"] {
            let error = told(wrong).unwrap_err();
            assert!(error.to_string().contains("a message is an object"), "{error}");
        }
        for right in ["{}", "\n {\"path\": []}", ""] {
            assert!(told(right).is_ok(), "{right:?}");
        }
        assert!(check(&Payload::new("[".into(), CodecFormat::Proto)).is_ok());
    }
}
