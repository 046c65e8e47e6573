//! `logs.v1.Logs` on the wire.

use std::sync::Arc;
use std::time::{Duration, Instant};

use connectrpc::{Encodable, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream};
use futures_util::stream;
use guestd_protocol::wire::logs::v1 as wire;
use tracing::Level;

use super::{Line, Logs};

/// What one message carries: lines, and bytes of them. The host takes messages of 64 KiB.
const BATCH_LINES: usize = 256;
const BATCH_BYTES: usize = 32 * 1024;

/// The pause between two messages: lines that come close together travel together.
const BATCH_PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub struct LogService {
    logs: Arc<Logs>,
}

impl LogService {
    pub fn new(logs: Arc<Logs>) -> Self {
        Self { logs }
    }
}

impl wire::Logs for LogService {
    async fn follow(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::FollowRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<wire::FollowResponse> + Send + use<>>> {
        let logs = Arc::clone(&self.logs);
        // A cursor of another life means nothing in this one.
        let after = if request.life == logs.life() { request.after } else { 0 };
        let news = logs.news();
        let messages = stream::unfold((logs, news, after), |(logs, mut news, after)| async move {
            news.wait_for(|newest| *newest > after).await.ok()?;
            // Whatever is said meanwhile goes along. No timer runs while nothing is said.
            tokio::time::sleep(BATCH_PAUSE).await;
            let batch = logs.after(after, BATCH_LINES, BATCH_BYTES);
            let after = batch.lines.last().map_or(after, |line| line.sequence);
            let message = wire::FollowResponse {
                life: logs.life().to_owned(),
                lost: batch.lost,
                lines: batch.lines.into_iter().map(to_wire).collect(),
                ..Default::default()
            };
            Some((Ok(message), (logs, news, after)))
        });
        Response::stream_ok(messages)
    }
}

fn to_wire(line: Line) -> wire::Line {
    let age = Instant::now().saturating_duration_since(line.at);
    let level = match line.level {
        Level::ERROR => wire::Level::LEVEL_ERROR,
        Level::WARN => wire::Level::LEVEL_WARN,
        Level::INFO => wire::Level::LEVEL_INFO,
        _ => wire::Level::LEVEL_DEBUG,
    };
    wire::Line {
        sequence: line.sequence,
        age_ms: u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
        level: level.into(),
        message: line.message,
        fields: line.fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_batch_fits_into_a_message_of_the_hosts() {
        let logs = Logs::new();
        for _ in 0..10_000 {
            logs.say(Level::INFO, "a message".to_owned(), vec![("pid", "1234567".to_owned()); 4]);
        }
        let batch = logs.after(0, BATCH_LINES, BATCH_BYTES);
        let lines: Vec<_> = batch.lines.into_iter().map(to_wire).collect();
        let message = wire::FollowResponse { lines, ..Default::default() };
        assert!(buffa::Message::encode_to_vec(&message).len() <= BATCH_BYTES);
    }
}
