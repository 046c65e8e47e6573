//! Listening to a kernel: what it says of one request, and what it died of.

use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tokio::time::{Instant, timeout_at};

use super::cell::Cell;
use super::context::{SETTLE, Stop};
use super::event::{self, Failure, Heard};
use super::kernel::{Kernel, how, is_idle};
use super::link::{Channel, LinkError, Said};

/// How long what a kernel sent before its end is read.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// How long a broken connection may be ahead of the end of its process.
const END_LIMIT: Duration = Duration::from_secs(1);

#[derive(Deserialize)]
struct Status<'a> {
    #[serde(borrow)]
    status: Option<&'a str>,
}

/// Waits until a kernel that rests is lost; what it says meanwhile is nobody's.
pub async fn rest(kernel: &mut Option<Kernel>) -> String {
    let Some(kernel) = kernel else { return std::future::pending().await };
    loop {
        tokio::select! {
            ended = kernel.service.wait() => return format!("the kernel {}", how(ended)),
            received = kernel.link.receive() => if let Err(error) = received {
                return death(kernel, Some(&error)).await;
            },
        }
    }
}

/// What a kernel that is gone died of. Its connection breaks a moment before its end is known, or the other way round.
async fn death(kernel: &mut Kernel, error: Option<&LinkError>) -> String {
    match tokio::time::timeout(END_LIMIT, kernel.service.wait()).await {
        Ok(ended) => {
            let memory = if kernel.service.ran_out_of_memory() { ", for want of memory" } else { "" };
            format!("the kernel {}{memory}", how(ended))
        }
        Err(_elapsed) => error.map_or_else(|| "the kernel ended".to_owned(), ToString::to_string),
    }
}

/// Tells the client of a cell that its kernel is gone, after what the kernel still said.
pub async fn lost(kernel: &mut Kernel, error: Option<&LinkError>, mut hearing: Hearing<'_>) -> Stop {
    let until = Instant::now() + LAST_WORDS;
    while let Ok(Ok(said)) = timeout_at(until, kernel.link.receive()).await {
        hearing.hear(&said);
    }
    let why = death(kernel, error).await;
    hearing.fail(&event::error("KernelDied", &format!("{why}; the variables of this context are lost")));
    Stop::Lost(why)
}

/// What has been heard of one request.
pub struct Hearing<'a> {
    id: String,
    cell: Option<&'a Arc<Cell>>,
    pub replied: bool,
    pub idle: bool,
    /// The client knows of an error.
    pub failed: bool,
    /// The client has gone.
    pub deaf: bool,
}

impl<'a> Hearing<'a> {
    pub fn of(id: String, cell: Option<&'a Arc<Cell>>) -> Self {
        Self { id, cell, replied: false, idle: false, failed: false, deaf: false }
    }

    pub fn hear(&mut self, said: &Said) {
        let (channel, message) = match said {
            Said::Message(channel, message) if message.parent == self.id => (*channel, message),
            Said::Message(..) => return,
            Said::TooMuch => {
                return self.show(event::notice("a message of the kernel was too long and is left out"));
            }
        };
        match channel {
            Channel::Iopub => match event::translate(message) {
                Heard::Line(line) => self.show(line),
                Heard::Error(line) => self.fail(&line),
                Heard::Idle => self.idle = true,
                Heard::Busy | Heard::Nothing => {}
            },
            Channel::Shell if message.kind == "execute_reply" => {
                self.replied = true;
                self.judge(message.content());
            }
            Channel::Shell | Channel::Control => {}
        }
    }

    fn show(&self, line: String) {
        if let Some(cell) = self.cell.filter(|_| !self.deaf) {
            cell.output(line);
        }
    }

    /// Only the first error of a cell is told (contract: envd.md section 7.2).
    fn fail(&mut self, line: &str) {
        if let Some(cell) = self.cell.filter(|_| !self.failed && !self.deaf) {
            cell.say(line);
        }
        self.failed = true;
    }

    /// Some kernels tell an error in the reply alone.
    fn judge(&mut self, content: &str) {
        let status = serde_json::from_str::<Status<'_>>(content)
            .ok()
            .and_then(|reply| reply.status.map(str::to_owned));
        match status.as_deref() {
            Some("ok") | None => {}
            Some("error") if self.failed => {}
            Some("error") => match serde_json::from_str::<Failure<'_>>(content) {
                Ok(failure) => self.fail(&failure.line()),
                Err(_) => self.fail(&event::error("Error", "Execution failed")),
            },
            // "abort" is what some kernels say of an interrupt.
            Some("abort") => self.fail(&event::error("KeyboardInterrupt", "")),
            Some(_) => self.fail(&event::error("ExecutionAborted", "Execution was aborted")),
        }
    }

    /// Idle without a reply, or a reply without the idle state.
    pub fn settled_half(&mut self) {
        if !self.replied && !self.failed {
            self.fail(&event::error(
                "UnexpectedEndOfExecution",
                "the kernel gave no reply: it may not have understood the code",
            ));
        }
    }

    /// Waits until everything that the kernel had to say of the cell is here: this kernel's output may come after its idle state. A
    /// question's own idle state comes behind it.
    pub async fn fence(&mut self, kernel: &mut Kernel) {
        let until = Instant::now() + SETTLE;
        let Ok(Ok(question)) =
            timeout_at(until, kernel.link.send(Channel::Shell, "kernel_info_request", "{}")).await
        else {
            return;
        };
        while let Ok(Ok(said)) = timeout_at(until, kernel.link.receive()).await {
            if let Said::Message(Channel::Iopub, message) = &said
                && message.parent == question
                && is_idle(message)
            {
                return;
            }
            self.hear(&said);
        }
    }
}
