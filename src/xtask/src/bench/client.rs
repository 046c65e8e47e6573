//! One keep-alive connection to the agent, blocking, with a limit on every wait.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::connect::{Codec, Event, StreamReader};
use super::http::{self, Response};

/// No answer takes so long, whatever the machine does.
const LIMIT: Duration = Duration::from_secs(60);

/// What is read at once: several of the agent's frames.
const BUFFER: usize = 256 * 1024;

#[derive(Debug)]
pub struct Client {
    socket: TcpStream,
    buffer: Vec<u8>,
}

impl Client {
    /// # Errors
    /// When the socket takes no options.
    pub fn over(socket: TcpStream) -> Result<Self> {
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(LIMIT))?;
        socket.set_write_timeout(Some(LIMIT))?;
        Ok(Self { socket, buffer: vec![0; BUFFER] })
    }

    /// # Errors
    /// When the answer is not 204.
    pub fn health(&mut self) -> Result<()> {
        let (status, _) = self.call(&http::head("GET", "/health", &[], None))?;
        ensure!(status == 204, "/health answered with status {status}");
        Ok(())
    }

    /// Sends a whole request and returns status and body.
    ///
    /// # Errors
    /// When the connection or its framing breaks.
    pub fn call(&mut self, request: &[u8]) -> Result<(u16, Vec<u8>)> {
        self.socket.write_all(request)?;
        let mut body = Vec::new();
        let status = self.answer(&mut |piece| body.extend_from_slice(piece))?;
        Ok((status, body))
    }

    /// As [`Client::call`], for a request that has to succeed.
    ///
    /// # Errors
    /// Also when the status is not 200.
    pub fn unary(&mut self, request: &[u8]) -> Result<()> {
        let (status, body) = self.call(request)?;
        ensure!(status == 200, "status {status}: {}", String::from_utf8_lossy(&body));
        Ok(())
    }

    fn answer(&mut self, on_body: &mut dyn FnMut(&[u8])) -> Result<u16> {
        let mut response = Response::new();
        while !response.is_done() {
            let count = self.read()?;
            let taken = response.feed(&self.buffer[..count], on_body)?;
            ensure!(taken == count, "{} bytes after the end of a response", count - taken);
        }
        Ok(response.status())
    }

    fn read(&mut self) -> Result<usize> {
        let count = self.socket.read(&mut self.buffer).context("the agent does not answer")?;
        if count == 0 {
            bail!("the agent closed the connection");
        }
        Ok(count)
    }

    /// Sends a request for a stream and hands its events on until its end.
    ///
    /// # Errors
    /// When the stream breaks, ends with an error, or `on` fails.
    pub fn stream(
        &mut self,
        codec: Codec,
        request: &[u8],
        on: &mut dyn FnMut(Event<'_>) -> Result<()>,
    ) -> Result<()> {
        self.socket.write_all(request)?;
        let mut reader = StreamReader::new(codec);
        while !reader.is_done() {
            let count = self.read()?;
            reader.feed(&self.buffer[..count], on)?;
        }
        Ok(())
    }

    /// Runs a command to its end: its exit code and how much it wrote.
    ///
    /// # Errors
    /// As [`Client::stream`]; also when its end is missing.
    pub fn run(&mut self, codec: Codec, request: &[u8]) -> Result<(i32, u64)> {
        let mut bytes = 0;
        let mut exit = None;
        self.stream(codec, request, &mut |event| {
            match event {
                Event::Output(output) => bytes += output.len() as u64,
                Event::End { exit_code } => exit = Some(exit_code),
                Event::Start { .. } | Event::Other => {}
            }
            Ok(())
        })?;
        Ok((exit.context("a command without an end")?, bytes))
    }

    /// Writes `length` bytes to `path` with one request.
    ///
    /// # Errors
    /// When the agent refuses or the connection breaks.
    pub fn upload(&mut self, path: &str, length: u64) -> Result<()> {
        let target = format!("/files?path={}", http::escape(path));
        let headers = [("Content-Type", "application/octet-stream")];
        self.socket.write_all(&http::head("POST", &target, &headers, Some(length)))?;
        send_pattern(&mut self.socket, length)?;
        let mut body = Vec::new();
        let status = self.answer(&mut |piece| body.extend_from_slice(piece))?;
        ensure!(status == 200, "an upload answered with status {status}: {}", String::from_utf8_lossy(&body));
        Ok(())
    }

    /// Reads `path` as it is, without compression, and returns how much it was.
    ///
    /// # Errors
    /// When the agent refuses or the connection breaks.
    pub fn download(&mut self, path: &str) -> Result<u64> {
        let mut target = "/files?path=".to_owned();
        write!(target, "{}", http::escape(path))?;
        self.socket.write_all(&http::head("GET", &target, &[("Accept-Encoding", "identity")], None))?;
        let mut bytes = 0;
        let status = self.answer(&mut |piece| bytes += piece.len() as u64)?;
        ensure!(status == 200, "a download answered with status {status}");
        Ok(bytes)
    }
}

/// Bytes that no file system stores as a hole.
pub fn send_pattern(socket: &mut TcpStream, length: u64) -> Result<()> {
    let pattern: Vec<u8> = (0..BUFFER).map(|index| ((index * 131) >> 3) as u8).collect();
    let mut left = length;
    while left > 0 {
        let count = usize::try_from(left).unwrap_or(usize::MAX).min(pattern.len());
        socket.write_all(&pattern[..count])?;
        left -= count as u64;
    }
    Ok(())
}
