//! How a byte stream from host to guest begins, where the transport has no connections of its own.
//!
//! Hybrid vsock (Firecracker, Cloud Hypervisor, vhost-device-vsock) asks for `CONNECT <port>\n` and answers `OK <n>\n`. A virtio-serial
//! port is one stream for ever, so both ends need to agree where a conversation starts: the host sends the same line with a nonce and
//! throws away what it reads until the guest repeats the nonce. Everything after it is HTTP/2.

/// Longest line of a handshake, in bytes.
pub const MAX_LINE: usize = 128;

/// The line that opens a conversation on a serial port.
pub fn serial_request(nonce: &str) -> String {
    format!("CONNECT {} {nonce}\n", crate::VSOCK_PORT)
}

/// The guest's answer.
pub fn serial_answer(nonce: &str) -> String {
    format!("OK {nonce}\n")
}

/// The nonce of a request line (without its newline), wherever in the line the request starts: what precedes it is the rest of a
/// conversation that broke off.
pub fn parse_serial_request(line: &[u8]) -> Option<String> {
    let start = format!("CONNECT {} ", crate::VSOCK_PORT);
    let found = line.windows(start.len()).rposition(|window| window == start.as_bytes())?;
    let nonce = std::str::from_utf8(&line[found + start.len()..]).ok()?;
    let plain = !nonce.is_empty() && nonce.len() <= 64 && nonce.bytes().all(|b| b.is_ascii_alphanumeric());
    plain.then(|| nonce.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_behind_the_rest_of_a_broken_conversation_is_found() {
        let mut line = b"\x00\x00\x08PRI * junk".to_vec();
        line.extend_from_slice(serial_request("abc123").trim_end().as_bytes());
        assert_eq!(parse_serial_request(&line).as_deref(), Some("abc123"));
    }

    #[test]
    fn a_line_that_is_no_request_is_not_answered() {
        for line in [&b"CONNECT 22 abc"[..], b"CONNECT 49983 ", b"CONNECT 49983 a b", b"", b"GET / HTTP/1.1"]
        {
            assert_eq!(parse_serial_request(line), None);
        }
    }
}
