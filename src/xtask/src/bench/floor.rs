//! The floors: the same work without an agent, in a process of its own, so that its processor time can be told apart.
//!
//! Each is this program again with a hidden command: it says the port that it listens on, does its copy for one connection, and
//! says what processor time it took.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::fcntl::{SpliceFFlags, splice};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::sendfile::sendfile;

/// What `cat` and `cp` read at once.
const COPY: usize = 128 * 1024;

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    #[command(subcommand)]
    work: Work,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum Work {
    /// A pipe to the socket: what a command writes
    Pipe {
        #[arg(long)]
        splice: bool,
        blocks: u64,
    },
    /// The socket to a new file
    Receive { path: PathBuf },
    /// A file to the socket
    Send {
        #[arg(long)]
        sendfile: bool,
        path: PathBuf,
    },
}

/// The hidden command.
pub fn run(options: &Options) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    println!("{}", listener.local_addr()?.port());
    let (mut socket, _) = listener.accept()?;
    socket.set_nodelay(true)?;
    match &options.work {
        Work::Pipe { splice, blocks } => pipe_to_socket(&mut socket, *blocks, *splice)?,
        Work::Receive { path } => {
            copy(&mut socket, &mut File::create(path)?)?;
            // The answer of an upload.
            socket.write_all(b"\n")?;
        }
        Work::Send { sendfile: false, path } => copy(&mut File::open(path)?, &mut socket)?,
        Work::Send { sendfile: true, path } => {
            let file = File::open(path)?;
            while sendfile(&socket, &file, None, 1 << 20)? > 0 {}
        }
    }
    drop(socket);
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let times = [usage.user_time(), usage.system_time()];
    println!("{}", times.iter().map(|time| time.tv_sec() * 1_000_000 + time.tv_usec()).sum::<i64>());
    Ok(())
}

fn pipe_to_socket(socket: &mut TcpStream, blocks: u64, spliced: bool) -> Result<()> {
    let mut producer = Command::new(PRODUCER[0])
        .args(producer_arguments(blocks))
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run dd")?;
    let mut pipe = producer.stdout.take().context("no pipe")?;
    if spliced {
        while splice(&pipe, None, &*socket, None, 1 << 20, SpliceFFlags::empty())? > 0 {}
    } else {
        copy(&mut pipe, socket)?;
    }
    ensure!(producer.wait()?.success(), "dd failed");
    Ok(())
}

/// By hand: std::io::copy would use splice(2) or sendfile(2) behind our back.
fn copy(from: &mut impl Read, to: &mut impl Write) -> Result<()> {
    let mut buffer = vec![0; COPY];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            count => to.write_all(&buffer[..count])?,
        }
    }
}

/// What writes for the rows that measure output: a program that costs next to nothing.
const PRODUCER: [&str; 4] = ["dd", "if=/dev/zero", "bs=64k", "status=none"];

/// Of each block of [`PRODUCER`].
pub const BLOCK: u64 = 64 * 1024;

fn producer_arguments(blocks: u64) -> Vec<String> {
    PRODUCER[1..].iter().map(|word| (*word).to_owned()).chain([format!("count={blocks}")]).collect()
}

/// The producer's command line, for the agent.
pub fn producer(blocks: u64) -> Vec<String> {
    [PRODUCER[0].to_owned()].into_iter().chain(producer_arguments(blocks)).collect()
}

/// A floor at work.
#[derive(Debug)]
pub struct Floor {
    child: Child,
    said: BufReader<ChildStdout>,
    pub socket: TcpStream,
}

impl Floor {
    pub fn pipe(blocks: u64, splice: bool) -> Result<Self> {
        let blocks = blocks.to_string();
        let flag = splice.then_some("--splice");
        Self::start(["pipe"].into_iter().chain(flag).chain([blocks.as_str()]), None)
    }

    pub fn receive(path: &Path) -> Result<Self> {
        Self::start(["receive"].into_iter(), Some(path))
    }

    pub fn send(path: &Path, sendfile: bool) -> Result<Self> {
        Self::start(["send"].into_iter().chain(sendfile.then_some("--sendfile")), Some(path))
    }

    fn start<'a>(words: impl Iterator<Item = &'a str>, path: Option<&Path>) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("bench-floor").args(words).args(path).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().context("cannot start a floor")?;
        let mut said = BufReader::new(child.stdout.take().context("a floor without a pipe")?);
        let mut port = String::new();
        said.read_line(&mut port)?;
        let port: u16 = port.trim().parse().context("a floor that says no port")?;
        let socket = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(Duration::from_secs(60)))?;
        socket.set_write_timeout(Some(Duration::from_secs(60)))?;
        Ok(Self { child, said, socket })
    }

    /// Reads to the end of what the floor sends.
    ///
    /// # Errors
    /// When the connection breaks.
    pub fn drain(&mut self) -> Result<u64> {
        let mut buffer = vec![0; 256 * 1024];
        let mut bytes = 0;
        loop {
            match self.socket.read(&mut buffer)? {
                0 => return Ok(bytes),
                count => bytes += count as u64,
            }
        }
    }

    /// Its processor time.
    ///
    /// # Errors
    /// When it failed.
    pub fn finish(mut self) -> Result<Duration> {
        drop(self.socket);
        let mut line = String::new();
        self.said.read_line(&mut line)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "a floor failed ({status})");
        Ok(Duration::from_micros(line.trim().parse().context("a floor that says no time")?))
    }
}
