//! The Connect face of [`Filesystem`]: takes requests apart and puts replies together (contract: envd.md sections 1 and 3).

use connectrpc::{ConnectError, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream};
use guestd_protocol::wire::filesystem as wire;

use super::Filesystem;
use crate::identity::RequestUser;

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
        _context: RequestContext,
        _request: ServiceRequest<'_, wire::WatchDirRequest>,
    ) -> ServiceResult<ServiceStream<wire::WatchDirResponse>> {
        Err(no_watching())
    }

    async fn create_watcher(
        &self,
        _context: RequestContext,
        _request: ServiceRequest<'_, wire::CreateWatcherRequest>,
    ) -> ServiceResult<wire::CreateWatcherResponse> {
        Err(no_watching())
    }

    async fn get_watcher_events(
        &self,
        _context: RequestContext,
        _request: ServiceRequest<'_, wire::GetWatcherEventsRequest>,
    ) -> ServiceResult<wire::GetWatcherEventsResponse> {
        Err(no_watching())
    }

    async fn remove_watcher(
        &self,
        _context: RequestContext,
        _request: ServiceRequest<'_, wire::RemoveWatcherRequest>,
    ) -> ServiceResult<wire::RemoveWatcherResponse> {
        Err(no_watching())
    }
}

fn no_watching() -> ConnectError {
    ConnectError::unimplemented("watching is not available in this version of guestd")
}
