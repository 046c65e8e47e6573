//! What happened in a sandbox, written down so that another policy can be tried on it.
//!
//! With `--idle-trace DIR`, each sandbox gets a file `<id>.jsonl` there: one JSON object a line, `at_ms` after its start on the host's
//! clock. [`replay`] reads such a file.

pub mod command;
pub mod replay;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use guestd_idle::Moment;
use serde::{Deserialize, Serialize};

/// How many lines may wait for the disk. More are left out, and the file says how many.
const QUEUE: usize = 4096;

/// One hold as a report of the guest shows it.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct GuestHold {
    pub id: u64,
    pub class: String,
    pub origin: String,
    pub age_ms: u64,
    pub since_progress_ms: u64,
}

/// What a line says.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The first line.
    Started {
        sandbox: String,
        idle_timeout_ms: Option<u64>,
        /// The hard end.
        end_ms: u64,
        policy: BTreeMap<String, String>,
    },
    /// The host began to proxy a request.
    Hold {
        id: u64,
        class: String,
        origin: String,
    },
    /// The agent took it: its caller may call.
    Confirmed {
        id: u64,
    },
    Reclassed {
        id: u64,
        class: String,
    },
    /// Bytes passed; at most one line a second and hold.
    Progress {
        id: u64,
    },
    Dropped {
        id: u64,
    },
    /// Use without duration.
    Touched {
        class: String,
        origin: String,
    },
    /// What the guest said of itself.
    Report {
        idle_for_ms: u64,
        last_class: String,
        holds: Vec<GuestHold>,
    },
    /// The hard end moved.
    End {
        end_ms: u64,
    },
    /// Lines that the disk was too slow for.
    Missing {
        lines: u64,
    },
    /// The last line.
    Ended {
        reason: String,
    },
}

/// A line of a trace.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Line {
    pub at_ms: u64,
    #[serde(flatten)]
    pub event: Event,
}

/// Writes the trace of one sandbox, from any thread, without ever waiting for the disk.
#[derive(Debug)]
pub struct Trace {
    lines: SyncSender<Line>,
    started: Moment,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    missing: u64,
    /// When each hold's progress was written last.
    progress: BTreeMap<u64, Moment>,
}

const PROGRESS_PAUSE: Duration = Duration::from_secs(1);

impl Trace {
    /// Begins the file of a sandbox that started at `started`.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn begin(folder: &Path, sandbox: &str, started: Moment) -> io::Result<Arc<Self>> {
        let file = File::options().create(true).append(true).open(folder.join(format!("{sandbox}.jsonl")))?;
        let (lines, queue) = sync_channel(QUEUE);
        std::thread::Builder::new().name("trace".to_owned()).spawn(move || write(file, &queue))?;
        Ok(Arc::new(Self { lines, started, state: Mutex::default() }))
    }

    /// Writes a line.
    pub fn say(&self, now: Moment, event: Event) {
        let at_ms = u64::try_from(now.since(self.started).as_millis()).unwrap_or(u64::MAX);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match &event {
            Event::Progress { id } => {
                let last = state.progress.get(id).copied();
                if last.is_some_and(|last| now.since(last) < PROGRESS_PAUSE) {
                    return;
                }
                state.progress.insert(*id, now);
            }
            Event::Dropped { id } => {
                state.progress.remove(id);
            }
            _ => {}
        }
        if state.missing > 0 {
            let missing = Line { at_ms, event: Event::Missing { lines: state.missing } };
            if self.lines.try_send(missing).is_ok() {
                state.missing = 0;
            }
        }
        match self.lines.try_send(Line { at_ms, event }) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => {}
            Err(TrySendError::Full(_)) => state.missing += 1,
        }
    }
}

fn write(file: File, queue: &Receiver<Line>) {
    let mut file = BufWriter::new(file);
    while let Ok(line) = queue.recv() {
        let mut next = Some(line);
        let written: io::Result<()> = (|| {
            while let Some(line) = next.take() {
                serde_json::to_writer(&mut file, &line)?;
                file.write_all(b"\n")?;
                next = queue.try_recv().ok();
            }
            file.flush()
        })();
        if let Err(error) = written {
            tracing::error!(%error, "a trace ends here");
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_is_lines_of_json_in_order_and_progress_is_thinned() {
        let folder = tempfile::tempdir().unwrap();
        let at = |seconds: u64| Moment::from_millis(seconds * 1000);
        let trace = Trace::begin(folder.path(), "sb", at(10)).unwrap();
        trace.say(at(11), Event::Hold { id: 1, class: "guest_stream".to_owned(), origin: "/".to_owned() });
        for millis in [11_000, 11_100, 11_900, 12_000] {
            trace.say(Moment::from_millis(millis), Event::Progress { id: 1 });
        }
        trace.say(at(13), Event::Ended { reason: "idle".to_owned() });
        drop(trace);
        let path = folder.path().join("sb.jsonl");
        let lines = loop {
            let text = std::fs::read_to_string(&path).unwrap();
            if text.contains("ended") {
                break text
                    .lines()
                    .map(|line| serde_json::from_str::<Line>(line).unwrap())
                    .collect::<Vec<_>>();
            }
            std::thread::yield_now();
        };
        let times: Vec<u64> = lines.iter().map(|line| line.at_ms).collect();
        assert_eq!(times, [1000, 1000, 2000, 3000]);
        assert_eq!(lines[3].event, Event::Ended { reason: "idle".to_owned() });
    }
}
