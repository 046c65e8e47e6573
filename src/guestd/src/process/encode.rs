//! Events as they go to a client: data events are put into their envelope by hand, everything else by the generated code.
//!
//! The generated message wants its bytes as a `Vec` of its own and makes a `String` of them for JSON; at a gigabyte a second each copy
//! counts. Here the binary codec passes the bytes on as they were read from the pipe, and JSON's base64 goes straight into the message.
//! A test holds both to the generated encoding, byte for byte.

use bytes::{BufMut, Bytes, BytesMut};
use connectrpc::{CodecFormat, ConnectError, Encodable, EncodedBody};
use guestd_protocol::wire::process as wire;

use super::output::Channel;

/// From this payload on the bytes are passed on instead of copied; below it the framing would copy them anyway.
const SEGMENT: usize = 16 * 1024;

/// An item of a Start or Connect stream; the two answer with messages of the same shape.
#[derive(Clone, Debug)]
pub enum Item {
    Data { channel: Channel, bytes: Bytes, offset: Option<u64> },
    Event(wire::ProcessEvent),
}

/// A length-delimited field's tag (protobuf encoding, wire type 2).
const fn delimited(field: u8) -> u8 {
    field << 3 | 2
}

/// The tag of `DataEvent.offset`: field 100, wire type 0.
const OFFSET_TAG: [u8; 2] = [0xA0, 0x06];

/// The number and the JSON name of a channel's field in `DataEvent`.
fn field(channel: Channel) -> (u8, &'static str) {
    match channel {
        Channel::Stdout => (1, "stdout"),
        Channel::Stderr => (2, "stderr"),
        Channel::Pty => (3, "pty"),
    }
}

fn put_varint(out: &mut impl BufMut, mut value: u64) {
    while value > 0x7F {
        out.put_u8(u8::try_from(value & 0x7F).unwrap_or(0) | 0x80);
        value >>= 7;
    }
    out.put_u8(u8::try_from(value).unwrap_or(0));
}

fn varint_length(value: u64) -> usize {
    let mut length = 1;
    let mut rest = value >> 7;
    while rest > 0 {
        length += 1;
        rest >>= 7;
    }
    length
}

/// `{event: {data: {<channel>: bytes, offset}}}`: what comes before the bytes, and what after.
fn proto_frame(channel: Channel, length: usize, offset: Option<u64>) -> (BytesMut, BytesMut) {
    let length = length as u64;
    let mut tail = BytesMut::new();
    if let Some(offset) = offset {
        tail.put_slice(&OFFSET_TAG);
        put_varint(&mut tail, offset);
    }
    let data = 1 + varint_length(length) as u64 + length + tail.len() as u64;
    let event = 1 + varint_length(data) as u64 + data;
    let mut head = BytesMut::with_capacity(32);
    head.put_u8(delimited(1));
    put_varint(&mut head, event);
    head.put_u8(delimited(2));
    put_varint(&mut head, data);
    head.put_u8(delimited(field(channel).0));
    put_varint(&mut head, length);
    (head, tail)
}

fn json(channel: Channel, bytes: &[u8], offset: Option<u64>) -> Bytes {
    let mut out = Vec::with_capacity(bytes.len().div_ceil(3) * 4 + 96);
    out.put_slice(br#"{"event":{"data":{"#);
    if let Some(offset) = offset {
        // 64-bit numbers are strings in JSON (contract: envd.md section 1.5).
        out.put_slice(br#""offset":""#);
        out.put_slice(offset.to_string().as_bytes());
        out.put_slice(br#"","#);
    }
    out.put_slice(b"\"");
    out.put_slice(field(channel).1.as_bytes());
    out.put_slice(br#"":""#);
    base64_simd::STANDARD.encode_append(bytes, &mut out);
    out.put_slice(b"\"}}}");
    out.into()
}

impl Item {
    /// The whole message, when it is a data event and the codec one of the two.
    fn data(&self, codec: CodecFormat) -> Option<EncodedBody> {
        let Self::Data { channel, bytes, offset } = self else { return None };
        Some(match codec {
            CodecFormat::Json => json(*channel, bytes, *offset).into(),
            CodecFormat::Proto => {
                let (mut head, tail) = proto_frame(*channel, bytes.len(), *offset);
                if bytes.len() < SEGMENT {
                    head.reserve(bytes.len() + tail.len());
                    head.put_slice(bytes);
                    head.put_slice(&tail);
                    return Some(head.freeze().into());
                }
                let segments = [head.freeze(), bytes.clone(), tail.freeze()];
                EncodedBody::from_segments(
                    segments.into_iter().filter(|segment| !segment.is_empty()).collect(),
                )
            }
            _ => return None,
        })
    }

    /// The whole message.
    pub(super) fn message(&self, codec: CodecFormat) -> Result<EncodedBody, ConnectError> {
        match self {
            Self::Event(event) => {
                let event = event.clone().into();
                wire::StartResponse { event, ..Default::default() }.encode_segments(codec)
            }
            data => {
                data.data(codec).ok_or_else(|| ConnectError::unimplemented("codec: must be proto or json"))
            }
        }
    }
}

impl Encodable<wire::StartResponse> for Item {
    fn encode(&self, codec: CodecFormat) -> Result<Bytes, ConnectError> {
        self.message(codec).map(EncodedBody::into_contiguous)
    }

    fn encode_segments(&self, codec: CodecFormat) -> Result<EncodedBody, ConnectError> {
        self.message(codec)
    }
}

impl Encodable<wire::ConnectResponse> for Item {
    fn encode(&self, codec: CodecFormat) -> Result<Bytes, ConnectError> {
        self.message(codec).map(EncodedBody::into_contiguous)
    }

    fn encode_segments(&self, codec: CodecFormat) -> Result<EncodedBody, ConnectError> {
        self.message(codec)
    }
}

#[cfg(test)]
mod tests {
    use wire::process_event as event;

    use super::*;

    fn generated(channel: Channel, bytes: &[u8], offset: Option<u64>) -> wire::ProcessEvent {
        let output = match channel {
            Channel::Stdout => event::data_event::Output::Stdout(bytes.to_vec()),
            Channel::Stderr => event::data_event::Output::Stderr(bytes.to_vec()),
            Channel::Pty => event::data_event::Output::Pty(bytes.to_vec()),
        };
        let data = event::DataEvent { output: Some(output), offset, ..Default::default() };
        wire::ProcessEvent { event: data.into(), ..Default::default() }
    }

    #[test]
    fn a_data_event_by_hand_is_the_generated_one_byte_for_byte() {
        let noise: Vec<u8> = (0..40_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        for channel in [Channel::Stdout, Channel::Stderr, Channel::Pty] {
            for length in [0, 1, 2, 3, 63, 100, 127, 128, 129, 8192, 16_383, 16_384, 32_768, 40_000] {
                for offset in [None, Some(0), Some(127), Some(128), Some(1 << 40), Some(u64::MAX)] {
                    let bytes = Bytes::copy_from_slice(&noise[..length]);
                    let event = generated(channel, &bytes, offset).into();
                    let start = wire::StartResponse { event, ..Default::default() };
                    let event = generated(channel, &bytes, offset).into();
                    let connect = wire::ConnectResponse { event, ..Default::default() };
                    let item = Item::Data { channel, bytes, offset };
                    for codec in [CodecFormat::Proto, CodecFormat::Json] {
                        let ours = Encodable::<wire::StartResponse>::encode(&item, codec).unwrap();
                        assert_eq!(
                            ours,
                            start.encode(codec).unwrap(),
                            "{channel:?} {length} {offset:?} {codec:?}"
                        );
                        let ours = Encodable::<wire::ConnectResponse>::encode_segments(&item, codec).unwrap();
                        assert_eq!(ours.into_contiguous(), connect.encode(codec).unwrap());
                    }
                }
            }
        }
    }

    #[test]
    fn a_large_chunk_is_passed_on_in_the_binary_codec_and_not_copied() {
        let bytes = Bytes::from(vec![7; 32 * 1024]);
        let item = Item::Data { channel: Channel::Stdout, bytes: bytes.clone(), offset: Some(9) };
        let body = Encodable::<wire::StartResponse>::encode_segments(&item, CodecFormat::Proto).unwrap();
        assert!(body.segments().iter().any(|segment| segment.as_ptr() == bytes.as_ptr()));
    }
}
