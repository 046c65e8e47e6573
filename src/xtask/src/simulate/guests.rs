//! Agents of the real library in this process, each on a Unix socket of its own, and a web server that stands for a program in each guest.

use std::collections::HashSet;
use std::future::pending;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use guestd::agent;
use guestd::logs::Logs;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Where sockets wait for their sandbox.
pub const FREE: &str = "free";

/// Where an agent makes its socket: hostd takes one as soon as it is free.
const MAKING: &str = "making";

/// The longest request head that the web server reads, in bytes.
const HEAD_LIMIT: usize = 8 * 1024;

#[derive(Debug)]
pub struct Guests {
    folder: PathBuf,
    next: AtomicU64,
    /// Where the web server in "each guest" listens: tunnels end on this machine's loopback interface.
    pub port: u16,
    seen: Arc<Mutex<HashSet<String>>>,
}

impl Guests {
    pub async fn start(folder: &Path) -> Result<Self> {
        for name in [MAKING, "root", "files", "quiet"] {
            std::fs::create_dir(folder.join(name))?;
        }
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let seen: Arc<Mutex<HashSet<String>>> = Arc::default();
        tokio::spawn(serve(listener, Arc::clone(&seen)));
        Ok(Self { folder: folder.to_owned(), next: AtomicU64::new(0), port, seen })
    }

    /// One more agent, for the next sandbox that is created.
    pub async fn add(&self) -> Result<()> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let name = format!("{number}.sock");
        let socket = self.folder.join(MAKING).join(&name);
        let config = agent::Config {
            unix: Some(socket.clone()),
            root: self.folder.join("root"),
            // Their machine is this process.
            power_off: || (),
            ..agent::Config::default()
        };
        tokio::spawn(async move {
            if let Err(error) = agent::serve(config, Logs::new(), None, pending()).await {
                eprintln!("an agent did not start: {error}");
            }
        });
        for _ in 0..2000 {
            if socket.exists() {
                return Ok(std::fs::rename(&socket, self.folder.join(FREE).join(&name))?);
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        anyhow::bail!("an agent did not listen")
    }

    pub fn file(&self, name: &str) -> String {
        self.folder.join("files").join(name).display().to_string()
    }

    /// A folder in which nothing ever happens.
    pub fn quiet_folder(&self) -> String {
        self.folder.join("quiet").display().to_string()
    }

    /// Whether the request of that name arrived at the web server.
    pub fn saw(&self, name: &str) -> bool {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).contains(name)
    }
}

async fn serve(listener: TcpListener, seen: Arc<Mutex<HashSet<String>>>) {
    while let Ok((stream, _)) = listener.accept().await {
        let seen = Arc::clone(&seen);
        tokio::spawn(async move { answer(stream, &seen).await });
    }
}

/// `GET /<name>/<milliseconds>`: takes so long, and answers the name.
async fn answer(mut stream: TcpStream, seen: &Mutex<HashSet<String>>) -> Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") && head.len() < HEAD_LIMIT {
        head.push(stream.read_u8().await?);
    }
    let head = String::from_utf8(head)?;
    let (name, delay) = head
        .split(' ')
        .nth(1)
        .and_then(|path| path.strip_prefix('/')?.split_once('/'))
        .context("not a request of ours")?;
    seen.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
    tokio::time::sleep(Duration::from_millis(delay.parse()?)).await;
    let length = name.len();
    let text = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{name}");
    stream.write_all(text.as_bytes()).await?;
    Ok(stream.shutdown().await?)
}
