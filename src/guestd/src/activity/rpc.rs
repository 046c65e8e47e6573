//! `activity.v1.Activity` on the wire.

use std::sync::Arc;
use std::time::Duration;

use connectrpc::{
    ConnectError, Encodable, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream,
};
use futures_util::stream;
use guestd_protocol::wire::activity::v1 as wire;
use tokio::time::Instant;

use super::Activity;
use crate::inhibit::Inhibition;
use crate::notice::{Given, Notices};

/// At most two reports a second (contract: activity.proto).
const REPORT_PAUSE: Duration = Duration::from_millis(500);

#[derive(Debug)]
pub struct ActivityService {
    activity: Arc<Activity>,
    inhibition: Arc<Inhibition>,
    notices: Arc<Notices>,
}

impl ActivityService {
    pub fn new(activity: Arc<Activity>, inhibition: Arc<Inhibition>, notices: Arc<Notices>) -> Self {
        Self { activity, inhibition, notices }
    }
}

impl wire::Activity for ActivityService {
    async fn watch(
        &self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, wire::WatchRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<wire::Report> + Send + use<>>> {
        let activity = Arc::clone(&self.activity);
        let mut changes = activity.changes();
        changes.mark_changed();
        let reports = stream::unfold((activity, changes, None), |(activity, mut changes, last)| async move {
            changes.changed().await.ok()?;
            if let Some(last) = last {
                // What happens meanwhile is in the report, which is made afterwards. No timer runs while nothing changes.
                tokio::time::sleep_until(last + REPORT_PAUSE).await;
                changes.mark_unchanged();
            }
            Some((Ok(activity.report()), (activity, changes, Some(Instant::now()))))
        });
        Response::stream_ok(reports)
    }

    async fn get(
        &self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, wire::GetRequest>,
    ) -> ServiceResult<impl Encodable<wire::Report> + Send + use<>> {
        Response::ok(self.activity.report())
    }

    async fn prepare_release(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::PrepareReleaseRequest>,
    ) -> ServiceResult<impl Encodable<wire::PrepareReleaseResponse> + Send + use<>> {
        let (ready, report) =
            self.activity.prepare(request.epoch, Duration::from_millis(request.idle_for_ms));
        Response::ok(wire::PrepareReleaseResponse { ready, report: report.into(), ..Default::default() })
    }

    async fn commit_release(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::CommitReleaseRequest>,
    ) -> ServiceResult<impl Encodable<wire::CommitReleaseResponse> + Send + use<>> {
        if !self.activity.commit(request.epoch) {
            let message = format!("release {} is not prepared (any more)", request.epoch);
            return Err(ConnectError::failed_precondition(message));
        }
        Response::ok(wire::CommitReleaseResponse::default())
    }

    async fn abort_release(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::AbortReleaseRequest>,
    ) -> ServiceResult<impl Encodable<wire::AbortReleaseResponse> + Send + use<>> {
        self.activity.abort(request.epoch);
        Response::ok(wire::AbortReleaseResponse::default())
    }

    async fn explain(
        &self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, wire::ExplainRequest>,
    ) -> ServiceResult<impl Encodable<wire::ExplainResponse> + Send + use<>> {
        Response::ok(self.inhibition.explain())
    }

    async fn notify(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::NotifyRequest>,
    ) -> ServiceResult<impl Encodable<wire::NotifyResponse> + Send + use<>> {
        let ends_in = Duration::from_millis(request.ends_in_ms);
        let given =
            self.notices.give(request.reason, ends_in, request.idle_for_ms.map(Duration::from_millis));
        let (told, hooks) = match given {
            Given::InUse => (false, 0),
            Given::Told { hooks } => (true, u32::try_from(hooks).unwrap_or(u32::MAX)),
        };
        let report = self.activity.report().into();
        Response::ok(wire::NotifyResponse { told, hooks, report, ..Default::default() })
    }
}
