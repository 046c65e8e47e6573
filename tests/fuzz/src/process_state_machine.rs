//! Any order of calls on a few harmless commands. After each: a stream starts once and first, ends once and last, and its offsets
//! leave nothing out; a call on a process answers. At the end nothing is left of any of it.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use arbitrary::{Arbitrary, Unstructured};
use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http_body_util::BodyExt as _;
use serde_json::{Value, json};

use super::agent;

/// The only commands that are ever started.
const COMMANDS: [(&str, &[&str]); 6] = [
    ("/bin/true", &[]),
    ("/bin/cat", &[]),
    ("/bin/sleep", &["0.01"]),
    ("/bin/sleep", &["30"]),
    ("/bin/echo", &["hello"]),
    ("/nonexistent", &[]),
];

/// How many processes live at a time.
const LIVE_LIMIT: usize = 8;

/// How long the end of everything may take.
const END: Duration = Duration::from_secs(8);

#[derive(Arbitrary, Debug)]
enum Step {
    Start { command: u8, pty: bool, stdin: bool, tag: Option<u8> },
    Connect { which: u8, offset: Option<u16> },
    SendInput { which: u8, size: u8, pty: bool },
    CloseStdin { which: u8 },
    SendSignal { which: u8, kill: bool },
    Update { which: u8, cols: u16, rows: u16 },
    List,
    DropClient { which: u8 },
    Advance { milliseconds: u8 },
}

/// One client's view of a process.
struct Stream {
    body: Body,
    bytes: Vec<u8>,
    started: bool,
    ended: bool,
    /// The trailer was there.
    closed: bool,
    /// Whether events carry offsets, and the next one if it is known.
    counted: bool,
    next: Option<u64>,
}

struct Machine {
    router: Router,
    streams: Vec<Stream>,
    pids: BTreeSet<u64>,
    /// Children that were there before: libFuzzer starts a symbolizer when an input reaches a new function, and keeps it.
    strangers: BTreeSet<u32>,
}

pub fn run(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let mut steps = Vec::new();
    while steps.len() < 24 && !input.is_empty() {
        match Step::arbitrary(&mut input) {
            Ok(step) => steps.push(step),
            Err(_) => break,
        }
    }
    agent::block_on(async {
        let strangers = children();
        let mut machine =
            Machine { router: agent::fresh(), streams: Vec::new(), pids: BTreeSet::new(), strangers };
        for step in steps {
            machine.take(&step).await;
            machine.look(Duration::ZERO).await;
        }
        machine.end().await;
    });
}

impl Machine {
    async fn take(&mut self, step: &Step) {
        match *step {
            Step::Start { command, pty, stdin, tag } => self.start(command, pty, stdin, tag).await,
            Step::Connect { which, offset } => {
                let mut request = json!({ "process": self.selector(which) });
                if let Some(offset) = offset {
                    request["fromOffset"] = json!(offset.to_string());
                }
                let next = offset.map(u64::from).filter(|offset| *offset == 0);
                self.follow("Connect", &request, offset.is_some(), next).await;
            }
            Step::SendInput { which, size, pty } => {
                let data = STANDARD.encode(vec![b'x'; usize::from(size)]);
                let input = if pty { json!({ "pty": data }) } else { json!({ "stdin": data }) };
                self.unary("SendInput", &json!({ "process": self.selector(which), "input": input })).await;
            }
            Step::CloseStdin { which } => {
                self.unary("CloseStdin", &json!({ "process": self.selector(which) })).await;
            }
            Step::SendSignal { which, kill } => {
                let signal = if kill { "SIGNAL_SIGKILL" } else { "SIGNAL_SIGTERM" };
                self.unary("SendSignal", &json!({ "process": self.selector(which), "signal": signal })).await;
            }
            Step::Update { which, cols, rows } => {
                let size = json!({ "size": { "cols": cols, "rows": rows } });
                self.unary("Update", &json!({ "process": self.selector(which), "pty": size })).await;
            }
            Step::List => {
                let listed = self.list().await;
                assert!(listed.is_subset(&self.pids), "{listed:?} of {:?}", self.pids);
            }
            Step::DropClient { which } => {
                if !self.streams.is_empty() {
                    let index = usize::from(which) % self.streams.len();
                    drop(self.streams.swap_remove(index));
                }
            }
            Step::Advance { milliseconds } => {
                tokio::time::sleep(Duration::from_millis(u64::from(milliseconds % 20))).await;
            }
        }
    }

    async fn start(&mut self, command: u8, pty: bool, stdin: bool, tag: Option<u8>) {
        if self.list().await.len() >= LIVE_LIMIT {
            return;
        }
        let (program, arguments) = COMMANDS[usize::from(command) % COMMANDS.len()];
        let mut request = json!({ "process": { "cmd": program, "args": arguments }, "stdin": stdin });
        if pty {
            request["pty"] = json!({ "size": { "cols": 80, "rows": 24 } });
        }
        if let Some(tag) = tag {
            request["tag"] = json!(format!("t{}", tag % 4));
        }
        self.follow("Start", &request, false, None).await;
    }

    async fn follow(&mut self, method: &str, request: &Value, counted: bool, next: Option<u64>) {
        let body = agent::envelope(0, request.to_string().as_bytes());
        let request = Request::post(format!("/process.Process/{method}"))
            .header("content-type", "application/connect+json")
            .header("connect-protocol-version", "1")
            .body(Body::from(body))
            .expect("a request");
        let answer = agent::send(&self.router, request).await;
        let body = answer.into_body();
        let bytes = Vec::new();
        self.streams.push(Stream { body, bytes, started: false, ended: false, closed: false, counted, next });
        if method == "Start" {
            // The first message says the pid, or why there is none.
            let started = Instant::now();
            let last = self.streams.len() - 1;
            while !self.streams[last].started && !self.streams[last].closed {
                assert!(started.elapsed() < END, "a start without an answer");
                self.look(Duration::from_millis(5)).await;
            }
        }
    }

    /// A pid that was once given, or a tag, or nobody's.
    fn selector(&self, which: u8) -> Value {
        match which % 4 {
            0 => json!({ "tag": format!("t{}", which / 4 % 5) }),
            _ => {
                let index = usize::from(which / 4) % self.pids.len().max(1);
                json!({ "pid": self.pids.iter().nth(index).copied().unwrap_or(4_000_000_000) })
            }
        }
    }

    async fn unary(&self, method: &str, request: &Value) -> (StatusCode, Value) {
        let request = Request::post(format!("/process.Process/{method}"))
            .header("content-type", "application/json")
            .body(Body::from(request.to_string()))
            .expect("a request");
        let (status, body) = agent::call(&self.router, request).await;
        (status, serde_json::from_slice(&body).expect("JSON"))
    }

    async fn list(&self) -> BTreeSet<u64> {
        let (status, listed) = self.unary("List", &json!({})).await;
        assert_eq!(status, StatusCode::OK);
        let processes = listed["processes"].as_array().cloned().unwrap_or_default();
        let pids: BTreeSet<u64> = processes.iter().filter_map(|process| process["pid"].as_u64()).collect();
        assert_eq!(pids.len(), processes.len(), "a pid twice, or none: {listed}");
        pids
    }

    /// Reads what the streams have to say.
    async fn look(&mut self, wait: Duration) {
        for stream in &mut self.streams {
            while !stream.closed {
                let Ok(frame) = tokio::time::timeout(wait, stream.body.frame()).await else { break };
                match frame {
                    Some(Ok(frame)) => {
                        stream.bytes.extend(frame.into_data().unwrap_or_default());
                        stream.parse(&mut self.pids);
                    }
                    _ => panic!("a stream without an end-of-stream message"),
                }
            }
        }
    }

    async fn end(mut self) {
        let begun = Instant::now();
        loop {
            let listed = self.list().await;
            if listed.is_empty() && self.streams.iter().all(|stream| stream.closed) {
                break;
            }
            for pid in &listed {
                let request = json!({ "process": { "pid": pid }, "signal": "SIGNAL_SIGKILL" });
                self.unary("SendSignal", &request).await;
            }
            self.look(Duration::from_millis(2)).await;
            assert!(begun.elapsed() < END, "{listed:?} or their streams do not end");
        }
        let strangers = std::mem::take(&mut self.strangers);
        drop(self);
        // What streams and processes held is let go of by tasks.
        while !children().is_subset(&strangers) {
            assert!(begun.elapsed() < END, "a child was not reaped");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        while open_descriptors() > DESCRIPTOR_LIMIT {
            assert!(begun.elapsed() < END, "{} descriptors are open", open_descriptors());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

/// More than the fuzzer, the test harness and the runtime have open; a leak from one input to the next soon gets there.
const DESCRIPTOR_LIMIT: usize = 48;

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

/// Living or dead, but not waited for (proc_pid_children(5)). Any thread may have started them.
fn children() -> BTreeSet<u32> {
    let tasks = std::fs::read_dir("/proc/self/task").expect("the own threads").flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect()
}

impl Stream {
    fn parse(&mut self, pids: &mut BTreeSet<u64>) {
        while self.bytes.len() >= 5 {
            let length = u32::from_be_bytes([self.bytes[1], self.bytes[2], self.bytes[3], self.bytes[4]]);
            let end = 5 + usize::try_from(length).expect("a length");
            if self.bytes.len() < end {
                return;
            }
            let flags = self.bytes[0];
            let message: Value = serde_json::from_slice(&self.bytes[5..end]).expect("JSON");
            self.bytes.drain(..end);
            assert!(!self.closed, "a message after the end of the stream");
            if flags == 2 {
                self.closed = true;
                let failed = message.get("error").is_some();
                assert!(
                    failed || (self.started && self.ended),
                    "an end without start and end event: {message}"
                );
                continue;
            }
            assert_eq!(flags, 0);
            self.event(&message["event"], pids);
        }
    }

    fn event(&mut self, event: &Value, pids: &mut BTreeSet<u64>) {
        assert!(!self.ended, "{event} after the end");
        if let Some(start) = event.get("start") {
            assert!(!self.started, "a second start");
            self.started = true;
            pids.insert(start["pid"].as_u64().expect("a pid"));
            return;
        }
        assert!(self.started, "{event} before the start");
        if event.get("end").is_some() {
            self.ended = true;
        } else if let Some(gap) = event.get("gap") {
            let (from, to) = (number(&gap["from"]), number(&gap["to"]));
            assert!(self.counted && from < to, "{gap}");
            assert!(self.next.is_none_or(|next| next == from), "{gap}, not from {:?}", self.next);
            self.next = Some(to);
        } else if let Some(data) = event.get("data") {
            let text = ["stdout", "stderr", "pty"].iter().find_map(|channel| data[channel].as_str());
            let length = STANDARD.decode(text.unwrap_or_default()).expect("base64").len() as u64;
            assert_eq!(data.get("offset").is_some(), self.counted, "{data}");
            if self.counted {
                let offset = number(&data["offset"]);
                assert!(self.next.is_none_or(|next| next == offset), "{data}, not at {:?}", self.next);
                self.next = Some(offset + length);
            }
        }
    }
}

/// 64-bit numbers are strings in protobuf's JSON.
fn number(value: &Value) -> u64 {
    value.as_str().map_or_else(|| value.as_u64(), |text| text.parse().ok()).expect("a number")
}
