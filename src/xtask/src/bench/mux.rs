//! Many streams in one thread: a thread for each would measure the scheduler.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use super::agent::Agent;
use super::connect::{Codec, Event, StreamReader};
use super::http::Response;

const READY_AT_ONCE: usize = 256;

#[derive(Debug)]
pub struct Mux {
    epoll: Epoll,
    buffer: Vec<u8>,
}

/// One connection, with one answer under way.
#[derive(Debug)]
pub struct Lane {
    socket: TcpStream,
    answer: Answer,
}

#[derive(Debug)]
enum Answer {
    Idle,
    Unary(Response),
    Stream(StreamReader),
}

impl Lane {
    /// Whether nothing is under way.
    pub fn is_idle(&self) -> bool {
        matches!(self.answer, Answer::Idle)
    }

    /// Asks for a stream.
    ///
    /// # Errors
    /// When the connection broke.
    pub fn open_stream(&mut self, codec: Codec, request: &[u8]) -> Result<()> {
        self.answer = Answer::Stream(StreamReader::new(codec));
        Ok(self.socket.write_all(request)?)
    }

    /// Sends a unary request.
    ///
    /// # Errors
    /// When the connection broke.
    pub fn call(&mut self, request: &[u8]) -> Result<()> {
        self.answer = Answer::Unary(Response::new());
        Ok(self.socket.write_all(request)?)
    }

    /// Reads what is there, once; epoll said that there is something.
    ///
    /// # Errors
    /// When the connection or the stream broke, or an answer was an error.
    pub fn read(&mut self, buffer: &mut [u8], on: &mut dyn FnMut(Event<'_>) -> Result<()>) -> Result<()> {
        let count = self.socket.read(buffer).context("the agent does not answer")?;
        if count == 0 {
            bail!("the agent closed the connection");
        }
        let done = match &mut self.answer {
            Answer::Idle => bail!("an answer that nobody asked for"),
            Answer::Unary(response) => {
                response.feed(&buffer[..count], &mut |_| ())?;
                if response.is_done() && response.status() != 200 {
                    bail!("a call answered with status {}", response.status());
                }
                response.is_done()
            }
            Answer::Stream(reader) => {
                reader.feed(&buffer[..count], on)?;
                reader.is_done()
            }
        };
        if done {
            self.answer = Answer::Idle;
        }
        Ok(())
    }
}

impl Mux {
    pub fn new() -> Result<Self> {
        Ok(Self { epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?, buffer: vec![0; 256 * 1024] })
    }

    /// Connects; `token` is what [`Mux::ready`] says when there is something to read.
    ///
    /// # Errors
    /// When the agent does not accept, or there are no descriptors left.
    pub fn connect(&self, agent: &Agent, token: usize) -> Result<Lane> {
        let socket = agent.socket().with_context(|| format!("connection number {token}"))?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(Duration::from_secs(60)))?;
        socket.set_write_timeout(Some(Duration::from_secs(60)))?;
        self.epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, token as u64))?;
        Ok(Lane { socket, answer: Answer::Idle })
    }

    /// The tokens of the lanes that can be read; none after `limit`.
    ///
    /// # Errors
    /// None that a correct program sees.
    pub fn ready(&self, limit: Duration) -> Result<Vec<usize>> {
        let mut events = [EpollEvent::empty(); READY_AT_ONCE];
        let limit = u16::try_from(limit.as_millis()).unwrap_or(u16::MAX);
        match self.epoll.wait(&mut events, limit) {
            Ok(count) => Ok(events[..count].iter().map(|event| event.data() as usize).collect()),
            Err(nix::errno::Errno::EINTR) => Ok(Vec::new()),
            Err(error) => Err(error).context("epoll"),
        }
    }

    /// Reads one lane with the buffer that all share.
    ///
    /// # Errors
    /// As [`Lane::read`].
    pub fn read(&mut self, lane: &mut Lane, on: &mut dyn FnMut(Event<'_>) -> Result<()>) -> Result<()> {
        lane.read(&mut self.buffer, on)
    }
}
