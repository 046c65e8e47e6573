//! One HTTP/1.1 exchange with a server that is trusted to be simple: a status line, a Content-Length, a body.

use std::io;
use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The longest answer that is read, head and body, in bytes.
const ANSWER_LIMIT: usize = 64 * 1024;

/// Sends `line` (method and path) with these headers and returns the body of a 200. The caller bounds the time.
pub(super) async fn request(server: SocketAddr, line: &str, headers: &[(&str, &str)]) -> io::Result<Vec<u8>> {
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    // A token from the service goes back to it: nothing in it may end the header.
    if headers.iter().any(|(_, value)| value.bytes().any(|byte| !(b' '..=b'~').contains(&byte))) {
        return Err(bad("a header's value is not printable"));
    }
    let mut head = format!("{line} HTTP/1.1\r\nHost: {server}\r\nConnection: close\r\nContent-Length: 0\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    let mut stream = TcpStream::connect(server).await?;
    stream.write_all(head.as_bytes()).await?;
    let mut answer = Vec::new();
    loop {
        if let Some(body) = body_of(&answer)? {
            return Ok(body);
        }
        if answer.len() >= ANSWER_LIMIT {
            return Err(bad("the answer is too long"));
        }
        if stream.read_buf(&mut answer).await? == 0 {
            return Err(bad("the answer ended early"));
        }
    }
}

/// The body, when all of it is here.
fn body_of(answer: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let Some(end) = answer.windows(4).position(|window| window == b"\r\n\r\n") else { return Ok(None) };
    let head = std::str::from_utf8(&answer[..end]).map_err(|_| bad("the answer's head is not text"))?;
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).unwrap_or_default();
    if status != "200" {
        return Err(bad(&format!("status {status:?}")));
    }
    let length = lines
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, value)| value.trim().parse::<usize>().ok())
        .filter(|length| *length <= ANSWER_LIMIT)
        .ok_or_else(|| bad("no usable Content-Length"))?;
    let body = &answer[end + 4..];
    Ok((body.len() >= length).then(|| body[..length].to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_complete_at_its_length_and_nothing_else_is_taken_for_one() {
        let whole = b"HTTP/1.1 200 OK\r\nserver: x\r\ncontent-LENGTH: 2\r\n\r\nhi";
        assert_eq!(body_of(whole).unwrap().as_deref(), Some(&b"hi"[..]));
        for cut in 0..whole.len() {
            assert_eq!(body_of(&whole[..cut]).unwrap(), None, "{cut}");
        }
        for bad in [
            &b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"[..],
            b"HTTP/1.1 200 OK\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
            b"\xff\r\n\r\n",
        ] {
            assert!(body_of(bad).is_err());
        }
    }

    #[tokio::test]
    async fn a_server_that_never_stops_talking_is_left() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            while stream.write_all(&[b'x'; 4096]).await.is_ok() {}
        });
        assert!(request(address, "GET /", &[]).await.is_err());
    }
}
