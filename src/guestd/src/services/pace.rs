//! What a client asks of its stream beside the message: when it ends, and how often it hears that it lives (contract: envd.md sections 2.9
//! and 2.10).

use std::time::Duration;

use axum::http::{HeaderMap, header};
use connectrpc::interceptor::{Next, NextStream, PayloadStream, StreamRequest, StreamResponse};
use connectrpc::interceptor::{UnaryRequest, UnaryResponse};
use connectrpc::{ConnectError, Interceptor, RequestContext};
use tokio::time::{Instant, sleep_until};

/// The header with which a client asks for keepalive messages, in whole seconds.
const KEEPALIVE_HEADER: &str = "keepalive-ping-interval";
const TIMEOUT_HEADER: &str = "connect-timeout-ms";
const GRPC_TIMEOUT_HEADER: &str = "grpc-timeout";
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

/// What is wrong with the timeout of a request, in its protocol's own header.
fn timeout_fault(headers: &HeaderMap) -> Option<&'static str> {
    let kind = headers.get(header::CONTENT_TYPE).map_or(&b""[..], |kind| kind.as_bytes());
    let is_number =
        |text: &[u8], digits| (1..=digits).contains(&text.len()) && text.iter().all(u8::is_ascii_digit);
    if kind.starts_with(b"application/grpc") {
        let value = headers.get(GRPC_TIMEOUT_HEADER)?.as_bytes();
        let good =
            value.split_last().is_some_and(|(unit, number)| b"HMSmun".contains(unit) && is_number(number, 8));
        return (!good).then_some(
            "grpc-timeout: must be a whole number of at most eight digits and one of H, M, S, m, u, n",
        );
    }
    let value = headers.get(TIMEOUT_HEADER)?.as_bytes();
    let good = is_number(value, 10);
    (!good).then_some("connect-timeout-ms: must be a whole number of milliseconds with at most ten digits")
}

/// Whether a request is for [`Refusal`].
pub(super) fn is_misspelt(headers: &HeaderMap) -> bool {
    timeout_fault(headers).is_some()
}

/// Refuses calls whose timeout cannot be read with `invalid_argument`: neither a command nor a call may last for ever because its limit was
/// misspelt.
pub(super) struct Refusal;

impl Refusal {
    fn of(context: &RequestContext) -> ConnectError {
        ConnectError::invalid_argument(
            timeout_fault(context.headers()).unwrap_or("the timeout cannot be read"),
        )
    }
}

#[connectrpc::async_trait]
impl Interceptor for Refusal {
    async fn intercept_unary(
        &self,
        request: UnaryRequest,
        _next: Next<'_>,
    ) -> Result<UnaryResponse, ConnectError> {
        Err(Self::of(&request.ctx))
    }

    async fn intercept_streaming(
        &self,
        request: StreamRequest,
        _inbound: PayloadStream,
        _next: NextStream<'_>,
    ) -> Result<StreamResponse, ConnectError> {
        Err(Self::of(&request.ctx))
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
    /// Of a request whose timeout can be read: others do not get this far.
    pub fn of(context: &RequestContext) -> Self {
        let asked = context
            .header(KEEPALIVE_HEADER)
            .and_then(|value| value.to_str().ok())
            .and_then(|text| text.parse().ok());
        Self { keepalive: interval(asked), deadline: context.deadline().map(Instant::from_std) }
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

    #[test]
    fn a_timeout_is_digits_in_its_protocols_own_header() {
        let told = |kind: &'static str, name: &'static str, value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, kind.parse().unwrap());
            headers.insert(name, value.parse().unwrap());
            timeout_fault(&headers)
        };
        for kind in ["application/json", "application/connect+proto", ""] {
            for value in ["abc", "", "-1", "+1", "1.5", "0x10", "12345678901", "1S"] {
                assert!(told(kind, TIMEOUT_HEADER, value).unwrap().starts_with(TIMEOUT_HEADER), "{value}");
            }
            assert_eq!(told(kind, TIMEOUT_HEADER, "1234567890"), None);
            assert_eq!(told(kind, GRPC_TIMEOUT_HEADER, "abc"), None, "not for this protocol");
        }
        for kind in ["application/grpc", "application/grpc-web+proto"] {
            for value in ["abc", "", "S", "5", "5X", "123456789S", "+5S", "5 S"] {
                assert!(
                    told(kind, GRPC_TIMEOUT_HEADER, value).unwrap().starts_with(GRPC_TIMEOUT_HEADER),
                    "{value}"
                );
            }
            for value in ["12345678H", "0S", "5m", "7u", "1n", "2M"] {
                assert_eq!(told(kind, GRPC_TIMEOUT_HEADER, value), None, "{value}");
            }
            assert_eq!(told(kind, TIMEOUT_HEADER, "abc"), None, "not for this protocol");
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
