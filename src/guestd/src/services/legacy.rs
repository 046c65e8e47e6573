//! Answers for one client that could not read newer ones.
//!
//! The first Python client (User-Agent exactly `connect-python`) fails at fields that it does not know. It gets every message as it was
//! then, and the header `X-E2B-Legacy-SDK: true` (contract: envd.md section 1.9). Messages are built anew from the fields of that time, so
//! what is added to them later stays away from it without anybody's doing.
//!
//! Everybody else's calls do not pass through here: rewriting costs a decode for each message.

use axum::http::{HeaderMap, HeaderName, header};
use connectrpc::interceptor::{Next, NextStream, PayloadStream, StreamRequest, StreamResponse};
use connectrpc::interceptor::{UnaryRequest, UnaryResponse};
use connectrpc::{ConnectError, Interceptor, Payload};
use futures_util::StreamExt;
use guestd_protocol::wire::{filesystem, process};

const USER_AGENT: &str = "connect-python";
pub(super) const MARK: HeaderName = HeaderName::from_static("x-e2b-legacy-sdk");

/// Whether a request comes from the old client.
pub(super) fn is_old(headers: &HeaderMap) -> bool {
    headers.get(header::USER_AGENT).is_some_and(|agent| agent == USER_AGENT)
}

/// Gives the old client what it knows.
pub(super) struct OldShape;

#[connectrpc::async_trait]
impl Interceptor for OldShape {
    async fn intercept_unary(
        &self,
        request: UnaryRequest,
        next: Next<'_>,
    ) -> Result<UnaryResponse, ConnectError> {
        use filesystem::{
            GetWatcherEventsResponse, ListDirResponse, MakeDirResponse, MoveResponse, StatResponse,
        };
        let path = request.ctx.path().unwrap_or_default().to_owned();
        let mut answer = next.run(request).await?;
        let body = &mut answer.body;
        match path.trim_start_matches('/') {
            "filesystem.Filesystem/Stat" => {
                rewrite(body, |old: StatResponse| StatResponse {
                    entry: old.entry.into_option().map(entry_info).into(),
                    ..Default::default()
                })?;
            }
            "filesystem.Filesystem/MakeDir" => rewrite(body, |old: MakeDirResponse| MakeDirResponse {
                entry: old.entry.into_option().map(entry_info).into(),
                ..Default::default()
            })?,
            "filesystem.Filesystem/Move" => {
                rewrite(body, |old: MoveResponse| MoveResponse {
                    entry: old.entry.into_option().map(entry_info).into(),
                    ..Default::default()
                })?;
            }
            "filesystem.Filesystem/ListDir" => rewrite(body, |old: ListDirResponse| ListDirResponse {
                entries: old.entries.into_iter().map(entry_info).collect(),
                ..Default::default()
            })?,
            "filesystem.Filesystem/GetWatcherEvents" => {
                rewrite(body, |old: GetWatcherEventsResponse| GetWatcherEventsResponse {
                    events: old.events.into_iter().map(filesystem_event).collect(),
                    ..Default::default()
                })?;
            }
            "process.Process/List" => rewrite(body, |old: process::ListResponse| process::ListResponse {
                processes: old.processes.into_iter().map(process_info).collect(),
                ..Default::default()
            })?,
            _ => {}
        }
        Ok(answer)
    }

    async fn intercept_streaming(
        &self,
        request: StreamRequest,
        inbound: PayloadStream,
        next: NextStream<'_>,
    ) -> Result<StreamResponse, ConnectError> {
        let path = request.ctx.path().unwrap_or_default().to_owned();
        let mut answer = next.run(request, inbound).await?;
        let change = match path.trim_start_matches('/') {
            "filesystem.Filesystem/WatchDir" => watch_answer,
            "process.Process/Start" => start_answer,
            "process.Process/Connect" => connect_answer,
            _ => return Ok(answer),
        };
        answer.body = Box::pin(answer.body.filter_map(move |message| async move {
            match message {
                Ok(mut payload) => match change(&mut payload) {
                    Ok(true) => Some(Ok(payload)),
                    Ok(false) => None,
                    Err(error) => Some(Err(error)),
                },
                Err(error) => Some(Err(error)),
            }
        }));
        Ok(answer)
    }
}

/// A message of either codec.
trait Message: buffa::Message + serde::Serialize + serde::de::DeserializeOwned + Clone + 'static {}
impl<M: buffa::Message + serde::Serialize + serde::de::DeserializeOwned + Clone + 'static> Message for M {}

fn rewrite<M: Message>(payload: &mut Payload, change: impl FnOnce(M) -> M) -> Result<(), ConnectError> {
    let message = payload.message::<M>()?.clone();
    payload.set_message(change(message));
    Ok(())
}

fn entry_info(entry: filesystem::EntryInfo) -> filesystem::EntryInfo {
    let filesystem::EntryInfo { name, r#type, path, .. } = entry;
    filesystem::EntryInfo { name, r#type, path, ..Default::default() }
}

fn filesystem_event(event: filesystem::FilesystemEvent) -> filesystem::FilesystemEvent {
    let filesystem::FilesystemEvent { name, r#type, .. } = event;
    filesystem::FilesystemEvent { name, r#type, ..Default::default() }
}

fn process_info(info: process::ProcessInfo) -> process::ProcessInfo {
    let process::ProcessInfo { config, pid, tag, .. } = info;
    process::ProcessInfo { config, pid, tag, ..Default::default() }
}

/// A message of a watch; false when the client knows nothing of the kind.
fn watch_answer(payload: &mut Payload) -> Result<bool, ConnectError> {
    use filesystem::watch_dir_response::Event;
    let event = match payload.message::<filesystem::WatchDirResponse>()?.event.clone() {
        Some(Event::Filesystem(event)) => Event::Filesystem(Box::new(filesystem_event(*event))),
        Some(event @ (Event::Start(_) | Event::Keepalive(_))) => event,
        _ => return Ok(false),
    };
    payload.set_message(filesystem::WatchDirResponse { event: Some(event), ..Default::default() });
    Ok(true)
}

fn start_answer(payload: &mut Payload) -> Result<bool, ConnectError> {
    let event = payload.message::<process::StartResponse>()?.event.clone().into_option();
    let Some(event) = event.and_then(process_event) else { return Ok(false) };
    payload.set_message(process::StartResponse { event: event.into(), ..Default::default() });
    Ok(true)
}

fn connect_answer(payload: &mut Payload) -> Result<bool, ConnectError> {
    let event = payload.message::<process::ConnectResponse>()?.event.clone().into_option();
    let Some(event) = event.and_then(process_event) else { return Ok(false) };
    payload.set_message(process::ConnectResponse { event: event.into(), ..Default::default() });
    Ok(true)
}

/// None when the client knows nothing of the kind.
fn process_event(event: process::ProcessEvent) -> Option<process::ProcessEvent> {
    use process::process_event::{DataEvent, EndEvent, Event};
    let event = match event.event? {
        Event::Data(data) => DataEvent { output: data.output, ..Default::default() }.into(),
        Event::End(end) => {
            let EndEvent { exit_code, exited, status, error, .. } = *end;
            EndEvent { exit_code, exited, status, error, ..Default::default() }.into()
        }
        event @ (Event::Start(_) | Event::Keepalive(_)) => event,
        _ => return None,
    };
    Some(process::ProcessEvent { event: Some(event), ..Default::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_that_the_old_client_does_not_know_is_left_out_and_new_fields_are_taken_off() {
        use process::process_event::{DataEvent, GapEvent, data_event::Output};
        let gap = GapEvent { from: 1, to: 2, ..Default::default() };
        assert!(process_event(process::ProcessEvent { event: gap.into(), ..Default::default() }).is_none());
        let output = Some(Output::Stdout(b"x".to_vec()));
        let data = DataEvent { output: output.clone(), offset: Some(7), ..Default::default() };
        let plain = DataEvent { output, ..Default::default() };
        assert_eq!(
            process_event(process::ProcessEvent { event: data.into(), ..Default::default() }),
            Some(process::ProcessEvent { event: plain.into(), ..Default::default() })
        );
    }
}
