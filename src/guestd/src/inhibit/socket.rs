//! The Unix socket for programs in the machine: one line in, one line out, in any language.
//!
//! | line | what it does | answer |
//! |---|---|---|
//! | `BUSY <seconds> [why]` | an inhibitor that ends with this connection, or after so many seconds | `OK <id> <granted seconds>` |
//! | `HOLD <seconds> [why]` | one that outlives the connection | `OK <id> <granted seconds>` |
//! | `DROP <id>` | ends one | `OK` |
//! | `IDLE` | the explain view | `OK <JSON>` |
//!
//! Anything else is answered with `ERR <text>`. Any user of the machine may use it: whoever can run a command can look busy.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use guestd_idle::inhibitor::InhibitorId;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use super::Inhibition;

/// Where a machine's programs find it.
pub const SOCKET_PATH: &str = "/run/guestd-activity.sock";

/// Longest line, in bytes, and most connections at once.
const LINE_LIMIT: u64 = 1024;
const CONNECTIONS: usize = 64;

/// The pause after a failed accept, so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Binds the socket, in place of one that an earlier agent left; every user of the machine may connect.
///
/// # Errors
/// Those of bind(2) and chmod(2).
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    let listener = crate::doors::bind_unix(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))?;
    Ok(listener)
}

/// Serves the socket for ever.
pub async fn serve(inhibition: Arc<Inhibition>, listener: UnixListener) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        // The listener's own queue holds back the rest.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let inhibition = Arc::clone(&inhibition);
                tokio::spawn(async move {
                    if let Err(error) = converse(&inhibition, stream, Vec::new()).await {
                        tracing::debug!(%error, "a conversation about idleness broke off");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accept failed on the activity socket");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Goes on with a connection of the agent before this one, and with what ends with it.
///
/// # Errors
/// When the descriptor is no socket.
pub fn resume(inhibition: &Arc<Inhibition>, connection: OwnedFd, ids: Vec<InhibitorId>) -> io::Result<()> {
    let stream = UnixStream::from_std(connection.into())?;
    let inhibition = Arc::clone(inhibition);
    tokio::spawn(async move {
        if let Err(error) = converse(&inhibition, stream, ids).await {
            tracing::debug!(%error, "a conversation about idleness broke off");
        }
    });
    Ok(())
}

/// Ends what the connection took when it is dropped.
struct Taken<'a> {
    inhibition: &'a Inhibition,
    connection: RawFd,
    ids: Vec<InhibitorId>,
}

impl Taken<'_> {
    fn tell(&self) {
        self.inhibition.conversations().insert(self.connection, self.ids.clone());
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.inhibition.conversations().remove(&self.connection);
        for id in &self.ids {
            self.inhibition.end(*id);
        }
    }
}

async fn converse(inhibition: &Arc<Inhibition>, stream: UnixStream, ids: Vec<InhibitorId>) -> io::Result<()> {
    let connection = stream.as_raw_fd();
    let pid = stream.peer_cred()?.pid().and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0);
    let (reading, mut writing) = stream.into_split();
    let mut reading = BufReader::new(reading);
    // Dropped before the stream is: its number is nobody else's meanwhile.
    let mut taken = Taken { inhibition, connection, ids };
    taken.tell();
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = (&mut reading).take(LINE_LIMIT).read_until(b'\n', &mut line).await?;
        if read == 0 {
            return Ok(());
        }
        if line.pop_if(|last| *last == b'\n').is_none() && line.len() as u64 >= LINE_LIMIT {
            writing.write_all(format!("ERR a line has at most {LINE_LIMIT} bytes\n").as_bytes()).await?;
            return Ok(());
        }
        let text = String::from_utf8_lossy(&line);
        let answer = match answer(inhibition, &mut taken, text.trim_end_matches('\r'), pid).await {
            Ok(answer) if answer.is_empty() => "OK\n".to_owned(),
            Ok(answer) => format!("OK {answer}\n"),
            Err(error) => format!("ERR {error}\n"),
        };
        writing.write_all(answer.as_bytes()).await?;
    }
}

async fn answer(
    inhibition: &Arc<Inhibition>,
    taken: &mut Taken<'_>,
    line: &str,
    pid: u32,
) -> Result<String, String> {
    let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
    match word {
        "BUSY" | "HOLD" => {
            let (seconds, why) = rest.split_once(' ').unwrap_or((rest, ""));
            let seconds =
                seconds.parse().map_err(|_| format!("{word} <seconds> [why]: {seconds:?} is no number"))?;
            let why: String = why.chars().filter(|c| !c.is_control()).collect();
            let why = if why.is_empty() { "no reason given" } else { &why };
            let taking = inhibition.take(Duration::from_secs(seconds), why, pid);
            let (id, granted) = taking.await.map_err(|error| error.to_string())?;
            if word == "BUSY" {
                taken.ids.push(id);
                taken.tell();
            }
            Ok(format!("{} {}", id.get(), granted.as_secs()))
        }
        "DROP" => {
            let id = rest.parse().map_err(|_| format!("DROP <id>: {rest:?} is no number"))?;
            let ended = inhibition.end(InhibitorId::new(id));
            taken.ids.retain(|taken| taken.get() != id);
            taken.tell();
            if ended { Ok(String::new()) } else { Err(format!("there is no inhibitor {id} (any more)")) }
        }
        "IDLE" => serde_json::to_string(&inhibition.explain()).map_err(|error| error.to_string()),
        _ => Err("the lines are BUSY, HOLD, DROP and IDLE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::activity::Activity;

    async fn connect() -> (Arc<Activity>, BufReader<UnixStream>) {
        let activity = Activity::new(guestd_idle::Policy::default());
        let inhibition = Inhibition::new(Arc::clone(&activity));
        let (ours, theirs) = UnixStream::pair().unwrap();
        tokio::spawn(async move { converse(&inhibition, theirs, Vec::new()).await });
        (activity, BufReader::new(ours))
    }

    async fn say(stream: &mut BufReader<UnixStream>, line: &str) -> String {
        stream.write_all(format!("{line}\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_line(&mut answer).await.unwrap();
        answer.trim_end().to_owned()
    }

    #[tokio::test]
    async fn a_program_that_dies_takes_its_inhibitor_with_it() {
        let (activity, mut stream) = connect().await;
        assert_eq!(say(&mut stream, "BUSY 60 training run 7").await, "OK 1 60");
        assert_eq!(activity.report().holds[0].origin, "training run 7");
        drop(stream);
        while activity.report().counting > 0 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_hold_outlives_its_connection_and_is_dropped_by_number() {
        let (activity, mut stream) = connect().await;
        assert_eq!(say(&mut stream, "HOLD 60").await, "OK 1 60");
        assert_eq!(activity.report().counting, 1);
        assert_eq!(say(&mut stream, "DROP 1").await, "OK");
        assert_eq!(activity.report().counting, 0);
        assert!(say(&mut stream, "DROP 1").await.starts_with("ERR"));
    }

    #[tokio::test]
    async fn a_bad_line_is_answered_and_the_conversation_goes_on() {
        let (_activity, mut stream) = connect().await;
        for bad in ["", "HELLO", "BUSY", "BUSY soon", "BUSY -1", "BUSY 0", "DROP", "DROP x", "busy 60"] {
            assert!(say(&mut stream, bad).await.starts_with("ERR "), "{bad:?}");
        }
        let explained = say(&mut stream, "IDLE").await;
        let json: serde_json::Value = serde_json::from_str(explained.strip_prefix("OK ").unwrap()).unwrap();
        assert_eq!(json["inhibitorBudgetMs"], "3600000");
    }

    #[tokio::test]
    async fn a_line_without_an_end_is_refused() {
        let (_activity, mut stream) = connect().await;
        stream.write_all(&vec![b'x'; 5000]).await.unwrap();
        let mut answer = String::new();
        stream.read_line(&mut answer).await.unwrap();
        assert!(answer.starts_with("ERR a line has at most"), "{answer}");
    }
}
