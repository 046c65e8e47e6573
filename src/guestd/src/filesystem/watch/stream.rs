//! The answer to `WatchDir`: a start, then events, with keepalives while nothing happens (contract: envd.md sections 2.9 and 3.4).

use std::sync::Arc;
use std::time::Duration;

use connectrpc::{ConnectError, RequestContext};
use futures_util::{Stream, stream};
use guestd_idle::HoldClass;
use guestd_protocol::wire::filesystem as wire;
use tokio::time::{Instant, sleep_until};
use wire::watch_dir_response as response;

use super::outbox::Item;
use super::{Spec, Watch, WatchError, Watchers};
use crate::activity::{Activity, HoldGuard};

/// The header with which a client asks for keepalive messages, in whole seconds.
const KEEPALIVE_HEADER: &str = "keepalive-ping-interval";
const TIMEOUT_HEADER: &str = "connect-timeout-ms";
const KEEPALIVE_DEFAULT: Duration = Duration::from_secs(90);

/// How a client wants its stream.
#[derive(Clone, Copy, Debug)]
pub(in crate::filesystem) struct Manner {
    keepalive: Duration,
    deadline: Option<Instant>,
}

impl Manner {
    /// # Errors
    /// `invalid_argument` when the timeout cannot be read: a stream must not stay open for ever because its limit was misspelt.
    pub(in crate::filesystem) fn of(context: &RequestContext) -> Result<Self, ConnectError> {
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
}

/// Zero is the default, as is what cannot be read (contract: envd.md section 2.9); a century is as good as for ever, and still a time.
fn interval(asked: Option<u64>) -> Duration {
    let seconds = asked.filter(|seconds| *seconds > 0);
    seconds.map_or(KEEPALIVE_DEFAULT, |seconds| Duration::from_secs(seconds.min(100 * 365 * 86_400)))
}

/// One client's stream; the watch ends with it.
struct Follow {
    watch: Watch,
    hold: HoldGuard,
    origin: Instant,
    manner: Manner,
    keepalive: Instant,
    started: bool,
    done: bool,
}

impl Watchers {
    /// Watches for as long as the stream is held.
    ///
    /// # Errors
    /// Those of envd.md section 1.10, and the limits.
    pub(in crate::filesystem) async fn follow(
        &self,
        spec: Spec,
        manner: Manner,
        activity: &Arc<Activity>,
    ) -> Result<impl Stream<Item = Result<wire::WatchDirResponse, ConnectError>> + Send + use<>, WatchError>
    {
        let origin = format!("watch {}", spec.path.display());
        let watch = self.open(spec).await?;
        let follow = Follow {
            watch,
            hold: activity.hold(HoldClass::Watch, &origin),
            origin: self.origin,
            manner,
            keepalive: next_keepalive(self.origin, manner.keepalive),
            started: false,
            done: false,
        };
        Ok(stream::unfold(follow, |mut follow| async move {
            let next = follow.next().await?;
            Some((next, follow))
        }))
    }
}

impl Follow {
    async fn next(&mut self) -> Option<Result<wire::WatchDirResponse, ConnectError>> {
        if self.done {
            return None;
        }
        if !std::mem::replace(&mut self.started, true) {
            return Some(Ok(message(response::StartEvent::default())));
        }
        let item = tokio::select! {
            biased;
            () = until(self.manner.deadline) => {
                self.done = true;
                return Some(Err(ConnectError::deadline_exceeded("the watch's timeout is over")));
            }
            item = self.watch.outbox.next() => item,
            () = sleep_until(self.keepalive) => {
                self.keepalive = next_keepalive(self.origin, self.manner.keepalive);
                return Some(Ok(message(response::KeepAlive::default())));
            }
        };
        self.keepalive = next_keepalive(self.origin, self.manner.keepalive);
        self.hold.progress(1);
        Some(Ok(match item {
            Item::Event(event) => message(wire::FilesystemEvent::from(event)),
            Item::Lost(reason) => message(response::Overflow { reason, ..Default::default() }),
        }))
    }
}

fn message(event: impl Into<Option<response::Event>>) -> wire::WatchDirResponse {
    wire::WatchDirResponse { event: event.into(), ..Default::default() }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// The last half interval from `origin` that is no later than the client asked for. So the keepalives of a thousand streams fall
/// together, and an agent whose watches are quiet wakes twice in an interval at most, not a thousand times.
fn next_keepalive(origin: Instant, interval: Duration) -> Instant {
    let due = origin.elapsed() + interval;
    let half = (interval / 2).max(Duration::from_millis(1));
    let beyond = due.as_nanos() % half.as_nanos();
    origin + due.saturating_sub(Duration::from_nanos(u64::try_from(beyond).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt as _;

    use super::*;

    #[test]
    fn an_interval_of_zero_is_the_default() {
        assert_eq!(interval(Some(0)), KEEPALIVE_DEFAULT);
        assert_eq!(interval(None), KEEPALIVE_DEFAULT);
        assert_eq!(interval(Some(50)), Duration::from_secs(50));
        assert!(Instant::now().checked_add(interval(Some(u64::MAX))).is_some());
    }

    #[tokio::test]
    async fn an_open_watch_is_no_use_and_a_delivered_event_is() {
        let folder = tempfile::tempdir().unwrap();
        let accounts = Arc::new(crate::identity::Accounts::new(std::path::Path::new("/")));
        let user = accounts.user("root").unwrap();
        let spec = Spec { path: folder.path().to_owned(), options: Default::default(), user };
        let activity = Activity::new(guestd_idle::Policy::default());
        let manner = Manner { keepalive: KEEPALIVE_DEFAULT, deadline: None };
        let stream = Watchers::new(accounts).follow(spec, manner, &activity).await.unwrap();
        let mut stream = std::pin::pin!(stream);
        stream.next().await.unwrap().unwrap();
        let report = activity.report();
        let hold = &report.holds[0];
        assert_eq!((report.counting, hold.class.as_str(), hold.bytes), (0, "watch", 0));
        std::fs::write(folder.path().join("f"), "").unwrap();
        stream.next().await.unwrap().unwrap();
        let report = activity.report();
        assert_eq!((report.counting, report.holds[0].bytes), (0, 1));
        assert!(report.holds[0].since_progress_ms <= report.holds[0].age_ms);
    }

    #[tokio::test(start_paused = true)]
    async fn keepalives_of_many_streams_fall_together_and_never_come_late() {
        let origin = Instant::now();
        let interval = Duration::from_secs(50);
        let mut times = std::collections::BTreeSet::new();
        for _ in 0..50 {
            tokio::time::advance(Duration::from_millis(997)).await;
            let next = next_keepalive(origin, interval);
            let wait = next - Instant::now();
            assert!(wait <= interval && wait > interval / 2 - Duration::from_millis(1), "{wait:?}");
            times.insert(next);
        }
        assert!(times.len() <= 3, "{times:?}");
    }
}
