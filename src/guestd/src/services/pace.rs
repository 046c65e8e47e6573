//! What a client asks of its stream beside the message: when it ends, and how often it hears that it lives (contract: envd.md sections 2.9
//! and 2.10).

use std::time::Duration;

use axum::http::HeaderMap;
use connectrpc::{ConnectError, RequestContext};
use tokio::time::{Instant, sleep_until};

/// The header with which a client asks for keepalive messages, in whole seconds.
const KEEPALIVE_HEADER: &str = "keepalive-ping-interval";
const TIMEOUT_HEADER: &str = "connect-timeout-ms";
const KEEPALIVE_DEFAULT: Duration = Duration::from_secs(90);
/// As good as for ever, and still a time.
const KEEPALIVE_LIMIT: Duration = Duration::from_secs(100 * 365 * 86_400);

/// Into how many parts an interval is cut: keepalives fall on the cuts, and come earlier than asked by a part at most.
const CUTS: u32 = 4;

/// A timeout of 0 is none, on every call (contract: envd.md section 2.10); the services would take it for one that is over.
pub(super) fn drop_endless_deadline(headers: &mut HeaderMap) {
    let is_zero =
        |text: &[u8]| !text.is_empty() && text.len() <= 10 && text.iter().all(|digit| *digit == b'0');
    if headers.get(TIMEOUT_HEADER).is_some_and(|value| is_zero(value.as_bytes())) {
        headers.remove(TIMEOUT_HEADER);
    }
}

/// How a client wants its stream.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    pub keepalive: Duration,
    pub deadline: Option<Instant>,
}

impl Default for Pace {
    fn default() -> Self {
        Self { keepalive: KEEPALIVE_DEFAULT, deadline: None }
    }
}

impl Pace {
    /// # Errors
    /// `invalid_argument` when the timeout cannot be read: neither a command nor a stream may last for ever because its limit was
    /// misspelt.
    pub fn of(context: &RequestContext) -> Result<Self, ConnectError> {
        if let Some(value) = context.header(TIMEOUT_HEADER) {
            let text = value.to_str().unwrap_or_default();
            if text.is_empty() || text.len() > 10 || !text.bytes().all(|byte| byte.is_ascii_digit()) {
                return Err(ConnectError::invalid_argument(format!(
                    "{TIMEOUT_HEADER}: must be a whole number of milliseconds with at most ten digits"
                )));
            }
        }
        let asked = context
            .header(KEEPALIVE_HEADER)
            .and_then(|value| value.to_str().ok())
            .and_then(|text| text.parse().ok());
        Ok(Self { keepalive: interval(asked), deadline: context.deadline().map(Instant::from_std) })
    }

    /// Ends at the deadline; without one, never.
    pub async fn over(&self) {
        match self.deadline {
            Some(deadline) => sleep_until(deadline).await,
            None => std::future::pending().await,
        }
    }
}

/// Zero, negative and unreadable intervals are the default (contract: envd.md sections 2.9 and 11, weakness 9).
fn interval(asked: Option<u64>) -> Duration {
    let seconds = asked.filter(|seconds| *seconds > 0);
    seconds.map_or(KEEPALIVE_DEFAULT, |seconds| Duration::from_secs(seconds).min(KEEPALIVE_LIMIT))
}

/// When the next keepalive of one stream is due.
///
/// Streams that count from the same origin have them together: an agent with a thousand quiet streams wakes a few times in an interval,
/// not a thousand times.
#[derive(Debug)]
pub struct Keepalive {
    origin: Instant,
    interval: Duration,
    next: Instant,
}

impl Keepalive {
    pub fn new(origin: Instant, pace: &Pace) -> Self {
        let interval = pace.keepalive;
        Self { origin, interval, next: next(origin, interval) }
    }

    /// Something else was sent, or a keepalive was: the client waits anew.
    pub fn restart(&mut self) {
        self.next = next(self.origin, self.interval);
    }

    /// Ends when a keepalive is due. One that is given up and asked for again is due at the same time.
    pub async fn due(&self) {
        sleep_until(self.next).await;
    }
}

/// The last cut that is no later than the client asked for.
fn next(origin: Instant, interval: Duration) -> Instant {
    let due = origin.elapsed() + interval;
    let part = (interval / CUTS).max(Duration::from_millis(1));
    let beyond = due.as_nanos() % part.as_nanos();
    origin + due.saturating_sub(Duration::from_nanos(u64::try_from(beyond).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_of_zero_is_the_default() {
        assert_eq!(interval(Some(0)), KEEPALIVE_DEFAULT);
        assert_eq!(interval(None), KEEPALIVE_DEFAULT);
        assert_eq!(interval(Some(50)), Duration::from_secs(50));
        assert!(Instant::now().checked_add(interval(Some(u64::MAX))).is_some());
    }

    #[test]
    fn a_timeout_of_zero_is_none_and_any_other_stays() {
        for (text, stays) in
            [("0", false), ("0000000000", false), ("00000000000", true), ("", true), ("10", true)]
        {
            let mut headers = HeaderMap::new();
            headers.insert(TIMEOUT_HEADER, text.parse().unwrap());
            drop_endless_deadline(&mut headers);
            assert_eq!(headers.contains_key(TIMEOUT_HEADER), stays, "{text:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn keepalives_of_many_streams_fall_together_and_never_come_late() {
        let origin = Instant::now();
        let pace = Pace { keepalive: Duration::from_secs(50), deadline: None };
        let mut times = std::collections::BTreeSet::new();
        for _ in 0..50 {
            tokio::time::advance(Duration::from_millis(997)).await;
            let keepalive = Keepalive::new(origin, &pace);
            let wait = keepalive.next - Instant::now();
            assert!(
                wait <= pace.keepalive && wait > pace.keepalive * 3 / 4 - Duration::from_millis(1),
                "{wait:?}"
            );
            times.insert(keepalive.next);
        }
        assert!(times.len() <= 5, "{times:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_nothing_is_sent_on_keeps_its_pace() {
        let pace = Pace { keepalive: Duration::from_secs(1), deadline: None };
        let origin = Instant::now();
        tokio::time::advance(Duration::from_millis(137)).await;
        let began = Instant::now();
        let mut keepalive = Keepalive::new(origin, &pace);
        for _ in 0..3 {
            keepalive.due().await;
            keepalive.restart();
        }
        let took = began.elapsed();
        assert!((Duration::from_millis(2_750)..=Duration::from_secs(3)).contains(&took), "{took:?}");
    }
}
