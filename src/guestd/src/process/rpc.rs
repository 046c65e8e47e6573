//! `process.Process` on the wire.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use connectrpc::{
    ConnectError, Encodable, ErrorCode, InboundStream, RequestContext, Response, ServiceRequest,
    ServiceResult, ServiceStream,
};
use futures_util::{Stream, StreamExt, stream};
use guestd_protocol::wire::process as wire;
use nix::sys::signal::Signal;
use tokio::time::{Instant, sleep_until};
use wire::process_event as event;

use super::output::{Channel, End, Event, Reader, Status};
use super::{Process, ProcessError, Processes, Selector, Spec, SpecError, signals};
use crate::identity::{Accounts, IdentityError, RequestUser, effective_user};
use crate::settings::Settings;

/// The header with which a client asks for keepalive frames, in whole seconds.
const KEEPALIVE_HEADER: &str = "keepalive-ping-interval";
const TIMEOUT_HEADER: &str = "connect-timeout-ms";
const KEEPALIVE_DEFAULT: Duration = Duration::from_secs(90);

#[derive(Debug)]
pub struct ProcessService {
    processes: Arc<Processes>,
    accounts: Arc<Accounts>,
    settings: Arc<Settings>,
}

impl ProcessService {
    pub fn new(processes: Arc<Processes>, accounts: Arc<Accounts>, settings: Arc<Settings>) -> Self {
        Self { processes, accounts, settings }
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
                _ => ErrorCode::InvalidArgument,
            },
            ProcessError::StdinStalled => ErrorCode::DeadlineExceeded,
            ProcessError::StdinClosed | ProcessError::StdinBroken(_) | ProcessError::Signal(_) => {
                ErrorCode::Internal
            }
        };
        Self::new(code, error.to_string())
    }
}

impl From<SpecError> for ConnectError {
    fn from(error: SpecError) -> Self {
        Self::invalid_argument(error.to_string())
    }
}

fn unauthenticated(error: IdentityError) -> ConnectError {
    ConnectError::unauthenticated(error.to_string())
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
        let deadline = deadline(&ctx)?;
        let request = request.to_owned_message();
        if request.pty.is_set() {
            return Err(ConnectError::unimplemented(
                "pty: terminals are not available in this version of guestd",
            ));
        }
        let named = ctx.extensions().get::<RequestUser>().cloned().unwrap_or_default();
        let user = effective_user(&named, &self.accounts, &self.settings).map_err(unauthenticated)?;
        let spec = Spec::new(request, user, &self.settings.snapshot())?;
        let (process, reader) = self.processes.start(spec, deadline)?;
        let follow = Follow::new(&process, reader, keepalive(&ctx), deadline);
        Response::stream_ok(follow.events().map(|event| {
            event.map(|event| wire::StartResponse { event: event.into(), ..Default::default() })
        }))
    }

    async fn connect(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::ConnectRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<wire::ConnectResponse> + Send + use<>>> {
        let deadline = deadline(&ctx)?;
        let selector = selector(request.to_owned_message().process.into_option())?;
        let process = self.processes.find_any(&selector)?;
        let follow = Follow::new(&process, process.attach(), keepalive(&ctx), deadline);
        Response::stream_ok(follow.events().map(|event| {
            event.map(|event| wire::ConnectResponse { event: event.into(), ..Default::default() })
        }))
    }

    async fn update(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::UpdateRequest>,
    ) -> ServiceResult<impl Encodable<wire::UpdateResponse> + Send + use<>> {
        let request = request.to_owned_message();
        self.processes.find_live(&selector(request.process.into_option())?)?;
        if request.pty.is_set() {
            return Err(ConnectError::internal("error resizing tty: tty not assigned to process"));
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
        while let Some(message) = requests.next().await {
            let message = message?.to_owned_message();
            match message.event {
                Some(Wire::Start(start)) => {
                    target = Some(self.processes.find_live(&selector(start.process.into_option())?)?);
                }
                Some(Wire::Data(data)) => {
                    let process = target
                        .as_ref()
                        .ok_or_else(|| ConnectError::failed_precondition("StreamInput: data before start"))?;
                    let bytes = stdin_of(data.input.into_option())?;
                    process.write_stdin(&bytes, deadline).await?;
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
        let bytes = stdin_of(request.input.into_option())?;
        process.write_stdin(&bytes, ctx.deadline().map(Instant::from_std)).await?;
        Response::ok(wire::SendInputResponse::default())
    }

    async fn send_signal(
        &self,
        _ctx: RequestContext,
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
        process.signal(signal).await?;
        Response::ok(wire::SendSignalResponse::default())
    }

    async fn close_stdin(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::CloseStdinRequest>,
    ) -> ServiceResult<impl Encodable<wire::CloseStdinResponse> + Send + use<>> {
        let selector = selector(request.to_owned_message().process.into_option())?;
        self.processes.find_live(&selector)?.close_stdin().await;
        Response::ok(wire::CloseStdinResponse::default())
    }
}

fn stdin_of(input: Option<wire::ProcessInput>) -> Result<Vec<u8>, ConnectError> {
    use wire::process_input::Input;
    match input.and_then(|input| input.input) {
        Some(Input::Stdin(bytes)) => Ok(bytes),
        Some(Input::Pty(_)) => Err(ConnectError::internal(
            "tty not assigned to process: send stdin, this process has no terminal",
        )),
        None => Err(ConnectError::unimplemented("invalid input type: input must be stdin or pty")),
    }
}

/// Zero, negative and unreadable intervals are the default (contract: envd.md sections 2.9 and 11, weakness 9).
fn keepalive(ctx: &RequestContext) -> Duration {
    let asked =
        ctx.header(KEEPALIVE_HEADER).and_then(|value| value.to_str().ok()).and_then(|text| text.parse().ok());
    asked.filter(|seconds| *seconds > 0).map_or(KEEPALIVE_DEFAULT, Duration::from_secs)
}

/// The client's deadline (`Connect-Timeout-Ms`, at most ten digits).
///
/// # Errors
/// `invalid_argument` when it cannot be read: a command must not run for ever because its limit was misspelt.
fn deadline(ctx: &RequestContext) -> Result<Option<Instant>, ConnectError> {
    if let Some(value) = ctx.header(TIMEOUT_HEADER) {
        let text = value.to_str().unwrap_or_default();
        if text.is_empty() || text.len() > 10 || !text.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(ConnectError::invalid_argument(format!(
                "{TIMEOUT_HEADER}: must be a whole number of milliseconds with at most ten digits"
            )));
        }
    }
    Ok(ctx.deadline().map(Instant::from_std))
}

/// One client's stream: start, data, end, with keepalives in between.
struct Follow {
    reader: Reader,
    ready: VecDeque<wire::ProcessEvent>,
    interval: Duration,
    next_keepalive: Instant,
    deadline: Option<Instant>,
    done: bool,
}

impl Follow {
    fn new(process: &Process, reader: Reader, interval: Duration, deadline: Option<Instant>) -> Self {
        let start = event::StartEvent { pid: process.pid, ..Default::default() };
        let ready = VecDeque::from([wire::ProcessEvent { event: start.into(), ..Default::default() }]);
        Self { reader, ready, interval, next_keepalive: Instant::now() + interval, deadline, done: false }
    }

    fn events(self) -> impl Stream<Item = Result<wire::ProcessEvent, ConnectError>> + Send {
        stream::unfold(self, |mut follow| async move {
            let next = follow.next().await?;
            Some((next, follow))
        })
    }

    async fn next(&mut self) -> Option<Result<wire::ProcessEvent, ConnectError>> {
        if self.done {
            return None;
        }
        if let Some(event) = self.ready.pop_front() {
            return Some(Ok(event));
        }
        let event = tokio::select! {
            biased;
            event = self.reader.next() => event?,
            () = super::sleep_until(self.deadline) => {
                self.done = true;
                return Some(Err(timed_out()));
            }
            () = sleep_until(self.next_keepalive) => {
                self.next_keepalive = Instant::now() + self.interval;
                let keepalive = event::KeepAlive::default();
                return Some(Ok(wire::ProcessEvent { event: keepalive.into(), ..Default::default() }));
            }
        };
        match event {
            Event::Data(channel, bytes) => {
                self.next_keepalive = Instant::now() + self.interval;
                let output = match channel {
                    Channel::Stdout => event::data_event::Output::Stdout(bytes.into()),
                    Channel::Stderr => event::data_event::Output::Stderr(bytes.into()),
                };
                let data = event::DataEvent { output: Some(output), ..Default::default() };
                Some(Ok(wire::ProcessEvent { event: data.into(), ..Default::default() }))
            }
            Event::End(end) => {
                self.done = true;
                // The stream whose deadline it was says so; a client that merely watched sees a killed process.
                if end.timed_out && self.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                    return Some(Err(timed_out()));
                }
                Some(Ok(wire::ProcessEvent { event: end_event(&end).into(), ..Default::default() }))
            }
            Event::CutOff => {
                self.done = true;
                Some(Err(ConnectError::resource_exhausted(
                    "this client read too slowly while others waited for the same output",
                )))
            }
        }
    }
}

fn timed_out() -> ConnectError {
    ConnectError::deadline_exceeded("the command's timeout is over")
}

/// The texts are envd's (contract: envd.md section 2.7).
fn end_event(end: &End) -> event::EndEvent {
    let (exit_code, exited, status) = match end.status {
        Status::Exited(code) => (code, true, format!("exit status {code}")),
        Status::Signalled { signal, core_dumped } => {
            let core = if core_dumped { " (core dumped)" } else { "" };
            (-1, false, format!("signal: {}{core}", signals::name(signal)))
        }
    };
    let error = (!exited || exit_code != 0).then(|| status.clone());
    event::EndEvent { exit_code, exited, status, error, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_process_reads_as_envd_says_it() {
        let end = |status| end_event(&End { status, timed_out: false });
        let ok = end(Status::Exited(0));
        assert_eq!((ok.exit_code, ok.exited, ok.status.as_str(), ok.error), (0, true, "exit status 0", None));
        let three = end(Status::Exited(3));
        assert_eq!(three.error.as_deref(), Some("exit status 3"));
        let killed = end(Status::Signalled { signal: libc::SIGKILL, core_dumped: false });
        assert_eq!((killed.exit_code, killed.exited, killed.status.as_str()), (-1, false, "signal: killed"));
        let crashed = end(Status::Signalled { signal: libc::SIGSEGV, core_dumped: true });
        assert_eq!(crashed.status, "signal: segmentation fault (core dumped)");
    }
}
