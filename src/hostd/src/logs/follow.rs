//! The task that reads one agent's log, over the link.

use std::time::Duration;

use connectrpc::ErrorCode;

use super::{Cursor, Level, SandboxLog};
use crate::link::Link;

/// How many lines of one message are taken. An agent sends no more.
pub(super) const MESSAGE_LINES: usize = 256;

/// The pause after each message: whoever says more is held back by the stream's flow control, and loses lines in its own ring.
const MESSAGE_PAUSE: Duration = Duration::from_millis(300);

/// Between two tries to follow an agent: the first, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Follows until it is aborted, or the agent turns out to be one that keeps no log. Takes no hold: a log that is read is no use.
pub async fn follow(id: &str, link: &Link, log: &SandboxLog) {
    let mut cursor = Cursor::default();
    let mut pause = FIRST_PAUSE;
    loop {
        // Boxed: the task lives as long as the sandbox, and the call is a moment of it.
        match Box::pin(link.follow_logs(&cursor)).await {
            Ok(mut lines) => loop {
                match lines.message().await {
                    Ok(Some(message)) => {
                        pause = FIRST_PAUSE;
                        let message = message.to_owned_message();
                        if !cursor.life.is_empty() && cursor.life != message.life {
                            log.note(Level::Warn, "the agent started anew", &[]);
                        }
                        log.take(&message);
                        let after = message.lines.last().map_or(cursor.after, |line| line.sequence);
                        cursor = Cursor { life: shortened(message.life), after };
                        tokio::time::sleep(MESSAGE_PAUSE).await;
                    }
                    Ok(None) => break,
                    Err(error) if is_unknown(&error) => return,
                    Err(error) => {
                        tracing::debug!(sandbox = id, %error, "a log broke off");
                        break;
                    }
                }
            },
            Err(error) if is_unknown(&error) => return,
            Err(error) => tracing::debug!(sandbox = id, %error, "no log"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// An agent from before there were logs.
fn is_unknown(error: &connectrpc::ConnectError) -> bool {
    matches!(error.code, ErrorCode::Unimplemented | ErrorCode::NotFound)
}

/// A life is a short word; the guest is not trusted to know that.
fn shortened(life: String) -> String {
    if life.len() <= 64 { life } else { String::new() }
}
