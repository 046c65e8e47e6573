//! The Connect face of [`Filesystem`]: takes requests apart and puts replies together (contract: envd.md sections 1 and 3).

use connectrpc::{RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream};
use guestd_protocol::wire::filesystem as wire;

use super::Filesystem;
use super::watch::Options;
use crate::identity::RequestUser;
use crate::services::pace::Pace;

/// A server without the middleware that inserts it has no Basic users.
fn user(context: &RequestContext) -> RequestUser {
    context.extensions().get::<RequestUser>().cloned().unwrap_or_default()
}

#[expect(
    refining_impl_trait_reachable,
    reason = "the replies are plain messages, and saying so hides nothing"
)]
impl wire::Filesystem for Filesystem {
    async fn stat(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::StatRequest>,
    ) -> ServiceResult<wire::StatResponse> {
        let entry = self.stat(user(&context), request.path.to_owned()).await?;
        Response::ok(wire::StatResponse { entry: Some(entry).into(), ..Default::default() })
    }

    async fn make_dir(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::MakeDirRequest>,
    ) -> ServiceResult<wire::MakeDirResponse> {
        let entry = self.make_dir(user(&context), request.path.to_owned()).await?;
        Response::ok(wire::MakeDirResponse { entry: Some(entry).into(), ..Default::default() })
    }

    async fn r#move(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::MoveRequest>,
    ) -> ServiceResult<wire::MoveResponse> {
        let (source, destination) = (request.source.to_owned(), request.destination.to_owned());
        let entry = self.rename(user(&context), source, destination).await?;
        Response::ok(wire::MoveResponse { entry: Some(entry).into(), ..Default::default() })
    }

    async fn list_dir(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::ListDirRequest>,
    ) -> ServiceResult<wire::ListDirResponse> {
        let entries = self.list_dir(user(&context), request.path.to_owned(), request.depth).await?;
        Response::ok(wire::ListDirResponse { entries, ..Default::default() })
    }

    async fn remove(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::RemoveRequest>,
    ) -> ServiceResult<wire::RemoveResponse> {
        self.remove(user(&context), request.path.to_owned()).await?;
        Response::ok(wire::RemoveResponse::default())
    }

    async fn watch_dir(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::WatchDirRequest>,
    ) -> ServiceResult<ServiceStream<wire::WatchDirResponse>> {
        let pace = Pace::of(&context);
        let options = Options {
            recursive: request.recursive,
            include_entry: request.include_entry,
            allow_network_mounts: request.allow_network_mounts,
        };
        let spec = self.watch_spec(user(&context), request.path.to_owned(), options).await?;
        let stream = self.watchers.follow(spec, pace, &self.activity).await?;
        Response::stream_ok(stream)
    }

    async fn create_watcher(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::CreateWatcherRequest>,
    ) -> ServiceResult<wire::CreateWatcherResponse> {
        let options = Options {
            recursive: request.recursive,
            include_entry: request.include_entry,
            allow_network_mounts: request.allow_network_mounts,
        };
        let spec = self.watch_spec(user(&context), request.path.to_owned(), options).await?;
        let watcher_id = self.watchers.create(spec).await?;
        Response::ok(wire::CreateWatcherResponse { watcher_id, ..Default::default() })
    }

    async fn get_watcher_events(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, wire::GetWatcherEventsRequest>,
    ) -> ServiceResult<wire::GetWatcherEventsResponse> {
        let events = self.watchers.events(request.watcher_id).await?;
        let events = events.into_iter().map(wire::FilesystemEvent::from).collect();
        Response::ok(wire::GetWatcherEventsResponse { events, ..Default::default() })
    }

    async fn remove_watcher(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, wire::RemoveWatcherRequest>,
    ) -> ServiceResult<wire::RemoveWatcherResponse> {
        self.watchers.remove(request.watcher_id)?;
        Response::ok(wire::RemoveWatcherResponse::default())
    }
}
