//! The answer to `WatchDir`: a start, then events, with keepalives while nothing happens (contract: envd.md sections 2.9 and 3.4).

use std::sync::Arc;

use connectrpc::ConnectError;
use futures_util::{Stream, stream};
use guestd_idle::HoldClass;
use guestd_protocol::wire::filesystem as wire;
use wire::watch_dir_response as response;

use super::outbox::Item;
use super::{Spec, Watch, WatchError, Watchers};
use crate::activity::{Activity, HoldGuard};
use crate::services::pace::{Keepalive, Pace};

/// One client's stream; the watch ends with it.
struct Follow {
    watch: Watch,
    hold: HoldGuard,
    pace: Pace,
    keepalive: Keepalive,
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
        pace: Pace,
        activity: &Arc<Activity>,
    ) -> Result<impl Stream<Item = Result<wire::WatchDirResponse, ConnectError>> + Send + use<>, WatchError>
    {
        let origin = format!("watch {}", spec.path.display());
        let watch = self.open(spec).await?;
        let follow = Follow {
            watch,
            hold: activity.hold(HoldClass::Watch, &origin),
            pace,
            keepalive: Keepalive::new(self.origin, &pace),
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
            () = self.pace.over() => {
                self.done = true;
                return Some(Err(ConnectError::deadline_exceeded("the watch's timeout is over")));
            }
            item = self.watch.outbox.next() => item,
            () = self.keepalive.due() => {
                self.keepalive.restart();
                return Some(Ok(message(response::KeepAlive::default())));
            }
        };
        self.keepalive.restart();
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

#[cfg(test)]
mod tests {
    use futures_util::StreamExt as _;

    use super::*;

    #[tokio::test]
    async fn an_open_watch_is_no_use_and_a_delivered_event_is() {
        let folder = tempfile::tempdir().unwrap();
        let accounts = Arc::new(crate::identity::Accounts::new(std::path::Path::new("/")));
        let user = accounts.user("root").unwrap();
        let spec = Spec { path: folder.path().to_owned(), options: Default::default(), user };
        let activity = Activity::new(guestd_idle::Policy::default());
        let pace = Pace::default();
        let stream = Watchers::new(accounts).follow(spec, pace, &activity).await.unwrap();
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
}
