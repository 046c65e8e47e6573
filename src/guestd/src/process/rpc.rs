//! `process.Process` on the wire.

use std::sync::Arc;

use connectrpc::{
    ConnectError, Encodable, ErrorCode, InboundStream, RequestContext, Response, ServiceRequest,
    ServiceResult, ServiceStream,
};
use futures_util::{StreamExt, stream};
use guestd_protocol::wire::process as wire;
use nix::sys::signal::Signal;
use tokio::time::Instant;

use super::encode::Item;
use super::follow::{Follow, Wishes};
use super::{InputError, InputKind, Process, ProcessError, Processes, Selector, Spec, SpecError};
use crate::cgroup::GroupError;
use crate::identity::{Accounts, IdentityError, RequestUser, effective_user};
use crate::services::outlet::Outlet;
use crate::settings::Settings;

#[derive(Debug)]
pub struct ProcessService {
    processes: Arc<Processes>,
    accounts: Arc<Accounts>,
    settings: Arc<Settings>,
    /// What the keepalives of all streams are counted from.
    origin: Instant,
}

impl ProcessService {
    pub fn new(processes: Arc<Processes>, accounts: Arc<Accounts>, settings: Arc<Settings>) -> Self {
        Self { processes, accounts, settings, origin: Instant::now() }
    }
}

impl From<ProcessError> for ConnectError {
    fn from(error: ProcessError) -> Self {
        let code = match &error {
            ProcessError::NoPid(_) | ProcessError::NoTag(_) => ErrorCode::NotFound,
            ProcessError::Spawn { source, .. } => match source.raw_os_error() {
                Some(libc::EAGAIN | libc::ENOMEM | libc::EMFILE | libc::ENFILE | libc::ENOSPC) => {
                    ErrorCode::ResourceExhausted
                }
                _ if source.kind() == std::io::ErrorKind::TimedOut => ErrorCode::Unavailable,
                _ => ErrorCode::InvalidArgument,
            },
            ProcessError::Group { source: GroupError::Frozen(_), .. } => ErrorCode::Unavailable,
            ProcessError::Group { .. } => ErrorCode::FailedPrecondition,
            ProcessError::Input(InputError::Stalled { .. }) => ErrorCode::DeadlineExceeded,
            ProcessError::Input(InputError::Leaving { .. }) => ErrorCode::Unavailable,
            ProcessError::Input(InputError::NoCloseForTerminal) => ErrorCode::Unknown,
            ProcessError::Input(_)
            | ProcessError::Signal(_)
            | ProcessError::NoTerminal
            | ProcessError::Resize(_) => ErrorCode::Internal,
        };
        Self::new(code, error.to_string())
    }
}

impl From<SpecError> for ConnectError {
    fn from(error: SpecError) -> Self {
        Self::invalid_argument(error.to_string())
    }
}

impl From<IdentityError> for ConnectError {
    fn from(error: IdentityError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}

fn selector(selector: Option<wire::ProcessSelector>) -> Result<Selector, ConnectError> {
    use wire::process_selector::Selector as Wire;
    match selector.and_then(|selector| selector.selector) {
        Some(Wire::Pid(pid)) => Ok(Selector::Pid(pid)),
        Some(Wire::Tag(tag)) => Ok(Selector::Tag(tag)),
        None => {
            Err(ConnectError::unimplemented("invalid input type: process.selector must be a pid or a tag"))
        }
    }
}

impl wire::Process for ProcessService {
    async fn list(
        &self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, wire::ListRequest>,
    ) -> ServiceResult<impl Encodable<wire::ListResponse> + Send + use<>> {
        let processes = self.processes.list().into_iter().map(|process| wire::ProcessInfo {
            config: process.spec.config.clone().into(),
            pid: process.pid,
            tag: process.spec.tag.clone(),
            ..Default::default()
        });
        Response::ok(wire::ListResponse { processes: processes.collect(), ..Default::default() })
    }

    async fn start(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::StartRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<wire::StartResponse> + Send + use<>>> {
        let wishes = Wishes::of_start(&ctx)?;
        let request = request.to_owned_message();
        let named = ctx.extensions().get::<RequestUser>().cloned().unwrap_or_default();
        let user = effective_user(&named, &self.accounts, &self.settings)?;
        let spec = Spec::new(request, user, &self.settings.snapshot())?;
        let (process, reader) = self.processes.start(spec, wishes.pace.deadline)?;
        answer(&ctx, Follow::new(&process, reader, &wishes, self.origin))
    }

    async fn connect(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::ConnectRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<wire::ConnectResponse> + Send + use<>>> {
        let request = request.to_owned_message();
        let wishes = Wishes::of_connect(&ctx, request.from_offset)?;
        let process = self.processes.find_any(&selector(request.process.into_option())?)?;
        let reader = wishes.attach(&process)?;
        answer(&ctx, Follow::new(&process, reader, &wishes, self.origin))
    }

    async fn update(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::UpdateRequest>,
    ) -> ServiceResult<impl Encodable<wire::UpdateResponse> + Send + use<>> {
        let request = request.to_owned_message();
        let process = self.processes.find_live(&selector(request.process.into_option())?)?;
        if let Some(pty) = request.pty.into_option() {
            let size = pty.size.into_option().unwrap_or_default();
            process.resize(size.cols, size.rows)?;
        }
        Response::ok(wire::UpdateResponse::default())
    }

    async fn stream_input(
        &self,
        ctx: RequestContext,
        mut requests: InboundStream<wire::StreamInputRequest>,
    ) -> ServiceResult<impl Encodable<wire::StreamInputResponse> + Send + use<>> {
        use wire::stream_input_request::Event as Wire;
        let deadline = ctx.deadline().map(Instant::from_std);
        let mut target: Option<Arc<Process>> = None;
        let mut leaving = self.processes.leaving();
        let mut taken = 0;
        loop {
            let message = tokio::select! {
                biased;
                _ = leaving.wait_for(|leaving| *leaving) => return Err(ConnectError::unavailable(format!(
                    "StreamInput: the agent is being replaced: {taken} bytes of input were taken, send the rest on another stream"
                ))),
                message = requests.next() => message,
            };
            let Some(message) = message else { break };
            let message = message.map_err(broken_input)?.to_owned_message();
            match message.event {
                Some(Wire::Start(start)) => {
                    target = Some(self.processes.find_live(&selector(start.process.into_option())?)?);
                }
                Some(Wire::Data(data)) => {
                    let process = target
                        .as_ref()
                        .ok_or_else(|| ConnectError::failed_precondition("StreamInput: data before start"))?;
                    let (kind, bytes) = input_of(data.input.into_option())?;
                    let length = bytes.len();
                    process.write(kind, bytes.into(), deadline).await?;
                    taken += length;
                }
                Some(Wire::Keepalive(_)) => {}
                None => {
                    return Err(ConnectError::unimplemented("invalid event type: start, data or keepalive"));
                }
            }
        }
        Response::ok(wire::StreamInputResponse::default())
    }

    async fn send_input(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::SendInputRequest>,
    ) -> ServiceResult<impl Encodable<wire::SendInputResponse> + Send + use<>> {
        let request = request.to_owned_message();
        let process = self.processes.find_live(&selector(request.process.into_option())?)?;
        let (kind, bytes) = input_of(request.input.into_option())?;
        process.write(kind, bytes.into(), ctx.deadline().map(Instant::from_std)).await?;
        Response::ok(wire::SendInputResponse::default())
    }

    async fn send_signal(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::SendSignalRequest>,
    ) -> ServiceResult<impl Encodable<wire::SendSignalResponse> + Send + use<>> {
        let request = request.to_owned_message();
        let signal = match request.signal.as_known() {
            Some(wire::Signal::SIGNAL_SIGTERM) => Signal::SIGTERM,
            Some(wire::Signal::SIGNAL_SIGKILL) => Signal::SIGKILL,
            Some(wire::Signal::SIGNAL_UNSPECIFIED) | None => {
                return Err(ConnectError::unimplemented("invalid signal: SIGNAL_SIGTERM or SIGNAL_SIGKILL"));
            }
        };
        let process = self.processes.find_live(&selector(request.process.into_option())?)?;
        let named = ctx.extensions().get::<RequestUser>().cloned().unwrap_or_default();
        let by = named.0.map_or_else(|| self.settings.snapshot().default_user, |user| user.name);
        process.signal(signal, &by).await?;
        Response::ok(wire::SendSignalResponse::default())
    }

    async fn close_stdin(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::CloseStdinRequest>,
    ) -> ServiceResult<impl Encodable<wire::CloseStdinResponse> + Send + use<>> {
        let selector = selector(request.to_owned_message().process.into_option())?;
        self.processes.find_live(&selector)?.close_stdin().await?;
        Response::ok(wire::CloseStdinResponse::default())
    }
}

/// The answer of a Start or Connect: by the short way, where the request has one.
fn answer(ctx: &RequestContext, follow: Follow) -> ServiceResult<ServiceStream<Item>> {
    let Some(outlet) = Outlet::of(ctx) else { return Response::stream_ok(follow.events()) };
    let codec = outlet.codec();
    outlet.leave(Box::pin(follow.events().map(move |item| item?.message(codec))));
    Response::stream_ok(stream::empty())
}

/// A client that breaks off, or sends what is no message, has one code (contract: envd.md section 1.10); a message that is too large and
/// a deadline have their own.
fn broken_input(error: ConnectError) -> ConnectError {
    match error.code {
        ErrorCode::ResourceExhausted | ErrorCode::DeadlineExceeded => error,
        _ => ConnectError::new(ErrorCode::Unknown, format!("error streaming input: {error}")),
    }
}

fn input_of(input: Option<wire::ProcessInput>) -> Result<(InputKind, Vec<u8>), ConnectError> {
    use wire::process_input::Input;
    match input.and_then(|input| input.input) {
        Some(Input::Stdin(bytes)) => Ok((InputKind::Stdin, bytes)),
        Some(Input::Pty(bytes)) => Ok((InputKind::Terminal, bytes)),
        None => Err(ConnectError::unimplemented("invalid input type: input must be stdin or pty")),
    }
}
