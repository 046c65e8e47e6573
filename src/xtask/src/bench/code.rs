//! Code cells: through the agent, and from a bare kernel.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::Bench;
use super::agent::Agent;
use super::client::Client;
use super::http;
use super::proc::Process;
use super::row::{Gate, MEBIBYTES, MILLISECONDS, Promise, Reading, Row};
use super::stats::{Paired, Samples};
use crate::python::Environment;
use crate::workspace;

pub const ROWS: &[Row] = &[
    Row {
        name: "code-cell",
        title: "code cell 1+1 on a warm kernel",
        promise: "<= 1.5 x the bare round trip",
        gate: Gate::Margin(2.0),
        measure: warm,
    },
    Row {
        name: "code-first",
        title: "agent's start to the result of its first cell",
        promise: "<= 1.5 x a bare kernel's",
        gate: Gate::Open,
        measure: first,
    },
    Row {
        name: "code-context",
        title: "a context with a kernel ready ahead",
        promise: "<= 0.2 x one without",
        gate: Gate::Open,
        measure: context,
    },
    Row {
        name: "code-memory",
        title: "agent's memory for an idle context",
        promise: "<= 0.25 MiB (the kernel's own is shown)",
        gate: Gate::Margin(2.0),
        measure: memory,
    },
    Row {
        name: "code-output",
        title: "agent's memory while a cell writes 10 MB",
        promise: "grows by <= 12 MiB, no byte lost",
        gate: Gate::Margin(2.0),
        measure: output,
    },
];

/// The floor's side, a client without anything between it and its kernel.
const BARE: &str = include_str!("bare_kernel.py");

/// How long a kernel may take until it is there.
const START_LIMIT: Duration = Duration::from_secs(60);

const MIB: f64 = 1024.0 * 1024.0;

/// Kernels of the tests' environment, and their spec for the agent.
struct Kernels {
    python: PathBuf,
    specs: PathBuf,
}

impl Kernels {
    fn prepare(bench: &Bench) -> Result<Self> {
        let requirements = workspace::root().join("tests/requirements.txt");
        let python = Environment::ensure("venv", &requirements)?.program("python");
        let specs = bench.work.path().join("kernels");
        let spec = json!({
            "argv": [python, "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            "display_name": "Python",
            "language": "python",
        });
        std::fs::create_dir_all(specs.join("python3"))?;
        std::fs::write(specs.join("python3/kernel.json"), spec.to_string())?;
        Ok(Self { python, specs })
    }

    fn agent(&self, bench: &Bench) -> Result<Agent> {
        Agent::start_with_kernels(&bench.program, bench.work.path(), &self.specs)
    }

    fn bare(&self, folder: &Path, arguments: &[&str]) -> Result<Command> {
        let script = folder.join("bare_kernel.py");
        std::fs::write(&script, BARE)?;
        let mut command = Command::new(&self.python);
        command.arg(script).arg(folder).args(arguments);
        Ok(command)
    }
}

/// A kernel that is asked directly.
struct Bare {
    child: Child,
    /// None once it is to end.
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
    _folder: tempfile::TempDir,
}

impl Bare {
    fn start(kernels: &Kernels, bench: &Bench) -> Result<Self> {
        let folder = tempfile::tempdir_in(bench.work.path())?;
        let mut child =
            kernels.bare(folder.path(), &[])?.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().context("no stdout")?);
        let mut bare = Self { child, stdin, stdout, _folder: folder };
        ensure!(bare.line()? == "ready", "the bare kernel does not start");
        Ok(bare)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }

    /// In milliseconds.
    fn cell(&mut self) -> Result<f64> {
        self.stdin.as_mut().context("no stdin")?.write_all(b"\n")?;
        let line = self.line()?;
        Ok(line.parse::<f64>().with_context(|| format!("the bare kernel said {line:?}"))? * 1e3)
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        // It ends its kernel when its input ends; killed, it would leave it behind.
        drop(self.stdin.take());
        let _ended = self.child.wait();
    }
}

fn request(path: &str, body: &Value) -> Vec<u8> {
    let body = body.to_string();
    let headers = [("Content-Type", "application/json")];
    let mut request = http::head("POST", path, &headers, Some(body.len() as u64));
    request.extend_from_slice(body.as_bytes());
    request
}

/// Runs a cell to its end: its events.
fn cell(client: &mut Client, body: &Value) -> Result<Vec<Value>> {
    let (status, answer) = client.call(&request("/execute", body))?;
    ensure!(status == 200, "status {status}: {}", String::from_utf8_lossy(&answer));
    let lines = answer.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let events: Vec<Value> = lines.map(serde_json::from_slice).collect::<Result<_, _>>()?;
    ensure!(events.last().is_some_and(|event| event["type"] == "end_of_execution"), "a cell without an end");
    if let Some(error) = events.iter().find(|event| event["type"] == "error") {
        bail!("a cell failed: {error}");
    }
    Ok(events)
}

fn two(client: &mut Client) -> Result<()> {
    let events = cell(client, &json!({"code": "1+1"}))?;
    ensure!(events.iter().any(|event| event["text"] == "2"), "1+1 is {events:?}");
    Ok(())
}

fn warm(bench: &Bench) -> Result<Reading> {
    let kernels = Kernels::prepare(bench)?;
    let agent = kernels.agent(bench)?;
    let mut client = agent.connect_code()?;
    let mut bare = Bare::start(&kernels, bench)?;
    for _ in 0..20 {
        two(&mut client)?;
        bare.cell()?;
    }
    let through = || {
        let begin = Instant::now();
        two(&mut client)?;
        Ok(begin.elapsed().as_secs_f64() * 1e3)
    };
    let paired = Paired::run(bench.scale(400, 60), through, || bare.cell())?;
    Ok(Reading::new(paired.measured.median(), MILLISECONDS, Promise::AtMost(1.5).of(&paired.ratio))
        .floor(paired.floor.median(), MILLISECONDS)
        .ratio(paired.ratio.median())
        .figure("p99", paired.measured.percentile(99.0), MILLISECONDS)
        .figure("floor_p99", paired.floor.percentile(99.0), MILLISECONDS)
        .note("floor: execute_request to reply and idle, over ZeroMQ from a program of its own in Python; the agent's: POST /execute to the last line"))
}

fn first(bench: &Bench) -> Result<Reading> {
    let kernels = Kernels::prepare(bench)?;
    let through = || {
        let begin = Instant::now();
        let agent = kernels.agent(bench)?;
        two(&mut agent.connect_code()?)?;
        Ok(begin.elapsed().as_secs_f64() * 1e3)
    };
    let bare = || {
        let folder = tempfile::tempdir_in(bench.work.path())?;
        let said = crate::steps::output(&mut kernels.bare(folder.path(), &["first"])?)?;
        Ok(said.trim().parse::<f64>()? * 1e3)
    };
    let paired = Paired::run(bench.scale(8, 3), through, bare)?;
    Ok(Reading::new(paired.measured.median(), MILLISECONDS, Promise::AtMost(1.5).of(&paired.ratio))
        .floor(paired.floor.median(), MILLISECONDS)
        .ratio(paired.ratio.median())
        .note("the agent starts its kernel ahead, as it does in a fresh sandbox; nobody waits before the first cell"))
}

/// Makes a context: its id and how long that took, in milliseconds.
fn create(client: &mut Client) -> Result<(String, f64)> {
    let begin = Instant::now();
    let (status, answer) = client.call(&request("/contexts", &json!({"language": "python"})))?;
    ensure!(status == 200, "status {status}: {}", String::from_utf8_lossy(&answer));
    let elapsed = begin.elapsed().as_secs_f64() * 1e3;
    let id = serde_json::from_slice::<Value>(&answer)?["id"]
        .as_str()
        .context("a context without an id")?
        .to_owned();
    Ok((id, elapsed))
}

/// Waits until the agent has a kernel among its children: the one that it starts ahead.
fn wait_for_kernel(agent: &Agent) -> Result<()> {
    let until = Instant::now() + START_LIMIT;
    while agent.process().children()?.is_empty() {
        ensure!(Instant::now() < until, "no kernel was started ahead");
        std::thread::sleep(Duration::from_millis(20));
    }
    // The process is there before its kernel answers: several times what that takes.
    std::thread::sleep(Duration::from_secs(3));
    Ok(())
}

fn context(bench: &Bench) -> Result<Reading> {
    let kernels = Kernels::prepare(bench)?;
    let mut pairs = Vec::new();
    for _ in 0..bench.scale(5, 2) {
        let agent = kernels.agent(bench)?;
        wait_for_kernel(&agent)?;
        let mut client = agent.connect_code()?;
        let (_, ready) = create(&mut client)?;
        let (_, cold) = create(&mut client)?;
        pairs.push((ready, cold));
    }
    let paired = Paired::of(&pairs).context("nothing was measured")?;
    Ok(Reading::new(paired.measured.median(), MILLISECONDS, Promise::AtMost(0.2).of(&paired.ratio))
        .floor(paired.floor.median(), MILLISECONDS)
        .ratio(paired.ratio.median())
        .note("floor: the next context, for which a kernel has to be started (another may be starting ahead beside it)"))
}

fn memory(bench: &Bench) -> Result<Reading> {
    let kernels = Kernels::prepare(bench)?;
    let agent = kernels.agent(bench)?;
    let mut client = agent.connect_code()?;
    two(&mut client)?;
    let before = agent.process().memory()?.rss;
    let count: u32 = bench.scale(16, 4);
    for _ in 0..count {
        create(&mut client)?;
    }
    let after = agent.process().memory()?.rss;
    let each = after.saturating_sub(before) as f64 / f64::from(count) / MIB;
    let shares: Vec<_> = agent
        .process()
        .children()?
        .into_iter()
        .filter_map(|pid| Some(Process::new(pid).memory().ok()?.pss as f64 / MIB))
        .collect();
    let kernel = Samples::new(shares).context("no kernels")?;
    Ok(Reading::new(each, MEBIBYTES, Promise::AtMost(0.25).exactly(each))
        .figure("kernel_pss", kernel.median(), MEBIBYTES)
        .figure("agent_rss", after as f64 / MIB, MEBIBYTES)
        .note(format!(
            "an idle ipykernel itself takes {:.1} MiB (its share of what {count} of them share counted once); the agent with all of them {:.1} MiB",
            kernel.median(),
            after as f64 / MIB
        )))
}

fn output(bench: &Bench) -> Result<Reading> {
    let kernels = Kernels::prepare(bench)?;
    let agent = kernels.agent(bench)?;
    let mut client = agent.connect_code()?;
    two(&mut client)?;
    let before = agent.process().memory()?.rss;
    let (peak, stop) = (std::sync::atomic::AtomicU64::new(before), std::sync::atomic::AtomicBool::new(false));
    let process = agent.process();
    let code = "import time\nfor i in range(10_000):\n    print('x' * 999)\n    if i % 100 == 0: time.sleep(0.005)\n";
    let events = std::thread::scope(|scope| -> Result<_> {
        scope.spawn(|| {
            use std::sync::atomic::Ordering::Relaxed;
            while !stop.load(Relaxed) {
                if let Ok(memory) = process.memory() {
                    peak.fetch_max(memory.rss, Relaxed);
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let events = cell(&mut client, &json!({"code": code}));
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        events
    })?;
    let stdout: String = events
        .iter()
        .filter(|event| event["type"] == "stdout")
        .filter_map(|event| event["text"].as_str())
        .collect();
    ensure!(stdout.len() == 10_000_000, "{} of 10,000,000 bytes came", stdout.len());
    let growth = (peak.into_inner() - before) as f64 / MIB;
    Ok(Reading::new(growth, MEBIBYTES, Promise::AtMost(12.0).exactly(growth))
        .note("10,000 lines of 1,000 bytes; looked at each 5 ms; a kernel sends what it printed in 0.2 s as one message"))
}
