//! What a client of a process sees: start, data, end, with keepalives in between.

use std::collections::VecDeque;

use connectrpc::{ConnectError, RequestContext};
use futures_util::{Stream, stream};
use guestd_protocol::wire::process as wire;
use tokio::sync::watch;
use tokio::time::Instant;
use wire::process_event as event;

use super::encode::Item;
use super::output::{BeyondEnd, End, Event, Reader, Status};
use super::{Process, exit, signals};
use crate::services::pace::{Keepalive, Pace};

/// The header with which a client asks for offsets, and on Connect for the output from that offset on.
const OFFSET_HEADER: &str = "guestd-output-offset";

/// What a client asks of its stream, beside the process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wishes {
    pub(super) pace: Pace,
    offset: Option<u64>,
}

impl Wishes {
    /// Of a Start. Its output begins at 0, so a client can only ask for offsets as such.
    ///
    /// # Errors
    /// `invalid_argument` for an offset that cannot be read, `out_of_range` for an offset that is not 0.
    pub(super) fn of_start(ctx: &RequestContext) -> Result<Self, ConnectError> {
        let wishes = Self::of_connect(ctx, None)?;
        match wishes.offset {
            Some(asked @ 1..) => Err(beyond_end(OFFSET_HEADER, &BeyondEnd { asked, end: 0 })),
            _ => Ok(wishes),
        }
    }

    /// Of a Connect; the message's own offset goes before the header's.
    ///
    /// # Errors
    /// `invalid_argument` for an offset that cannot be read.
    pub(super) fn of_connect(ctx: &RequestContext, from_offset: Option<u64>) -> Result<Self, ConnectError> {
        let in_header = offset(ctx)?;
        Ok(Self { pace: Pace::of(ctx), offset: from_offset.or(in_header) })
    }

    /// Attaches to a process, at the offset if one was asked for.
    ///
    /// # Errors
    /// `out_of_range` when the output has not come that far.
    pub(super) fn attach(&self, process: &Process) -> Result<Reader, ConnectError> {
        match self.offset {
            None => Ok(process.attach()),
            Some(offset) => process.attach_at(offset).map_err(|error| beyond_end("from_offset", &error)),
        }
    }
}

fn beyond_end(field: &str, error: &BeyondEnd) -> ConnectError {
    ConnectError::out_of_range(format!("{field}: {error}"))
}

/// # Errors
/// `invalid_argument`: a client that wants no byte twice must not get new output only because of a misspelt number.
fn offset(ctx: &RequestContext) -> Result<Option<u64>, ConnectError> {
    let Some(value) = ctx.header(OFFSET_HEADER) else { return Ok(None) };
    let digits = value.to_str().ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    let offset = digits.and_then(|text| text.parse().ok());
    offset.map(Some).ok_or_else(|| {
        ConnectError::invalid_argument(format!("{OFFSET_HEADER}: must be a whole number of bytes below 2^64"))
    })
}

/// One client's stream.
#[derive(Debug)]
pub(super) struct Follow {
    reader: Reader,
    ready: VecDeque<Item>,
    /// The client asked for offsets.
    offsets: bool,
    pace: Pace,
    keepalive: Keepalive,
    leaving: watch::Receiver<bool>,
    done: bool,
}

impl Follow {
    pub(super) fn new(process: &Process, reader: Reader, wishes: &Wishes, origin: Instant) -> Self {
        let start = event::StartEvent { pid: process.pid, ..Default::default() };
        Self {
            reader,
            ready: VecDeque::from([item(start)]),
            offsets: wishes.offset.is_some(),
            pace: wishes.pace,
            keepalive: Keepalive::new(origin, &wishes.pace),
            leaving: process.leaving(),
            done: false,
        }
    }

    pub(super) fn events(self) -> impl Stream<Item = Result<Item, ConnectError>> + Send + use<> {
        stream::unfold(self, |mut follow| async move {
            let next = follow.next().await?;
            Some((next, follow))
        })
    }

    async fn next(&mut self) -> Option<Result<Item, ConnectError>> {
        if self.done {
            return None;
        }
        if let Some(event) = self.ready.pop_front() {
            return Some(Ok(event));
        }
        let event = tokio::select! {
            biased;
            _ = self.leaving.wait_for(|leaving| *leaving) => {
                self.done = true;
                return Some(Err(ConnectError::unavailable("the agent is being replaced: connect again")));
            }
            event = self.reader.next() => event?,
            () = self.pace.over() => {
                self.done = true;
                return Some(Err(timed_out()));
            }
            () = self.keepalive.due() => {
                self.keepalive.restart();
                return Some(Ok(item(event::KeepAlive::default())));
            }
        };
        match event {
            Event::Data { channel, offset, bytes } => {
                self.keepalive.restart();
                Some(Ok(Item::Data { channel, bytes, offset: self.offsets.then_some(offset) }))
            }
            Event::Gap { from, to } => Some(Ok(item(event::GapEvent { from, to, ..Default::default() }))),
            Event::End(end) => {
                self.done = true;
                // The stream whose deadline it was says so; a client that merely watched sees a killed process.
                if end.timed_out && self.pace.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                    return Some(Err(timed_out()));
                }
                Some(Ok(item(end_event(&end))))
            }
            Event::CutOff => {
                self.done = true;
                Some(Err(ConnectError::data_loss(
                    "this client read too slowly while others waited for the same output",
                )))
            }
        }
    }
}

fn item(event: impl Into<Option<event::Event>>) -> Item {
    Item::Event(wire::ProcessEvent { event: event.into(), ..Default::default() })
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
    let record = exit::to_wire(end).into();
    event::EndEvent { exit_code, exited, status, error, record, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_process_reads_as_envd_says_it() {
        let end = |status| end_event(&End { status, timed_out: false, record: Default::default() });
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
