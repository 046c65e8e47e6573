//! `cargo xtask simulate`: the whole of hostd under a thousand sandboxes whose guests are the real agent's library in this process.
//!
//! hostd is the shipped program, started with `--simulated-guests`: API, proxy, rules, store and a guard for each sandbox are real, only
//! the machines are not. `guests` are the agents, `client` what an SDK says, `traffic` uses sandboxes at random and times each release,
//! `race` aims requests at every window of the two-phase release, `plot` draws how late releases were.

mod client;
mod guests;
mod plot;
mod race;
mod traffic;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::supervisor::{self, Runtime, Settings, Supervisor};
use crate::{steps, workspace};
use client::Client;
use guests::Guests;

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// How many sandboxes live at the same time
    #[arg(long, default_value_t = 1000)]
    sandboxes: usize,
    /// How long new ones are begun
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// The idle timeout of each, in seconds
    #[arg(long, default_value_t = 60)]
    idle: u64,
    /// Where chance begins
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A hundred sandboxes with an idle timeout of five seconds, for a minute
    #[arg(long)]
    quick: bool,
    /// Draw how late the releases were (SVG)
    #[arg(long, value_name = "PATH")]
    plot: Option<PathBuf>,
    /// Instead: this many requests into the windows of the two-phase release
    #[arg(long, value_name = "TRIES")]
    race: Option<u64>,
    /// Try this hostd instead of building one
    #[arg(long, value_name = "PATH")]
    hostd: Option<PathBuf>,
}

/// What all parts of a simulation use.
#[derive(Debug)]
struct World {
    client: Client,
    guests: Guests,
    idle: Duration,
    seed: u64,
    hostd: u32,
}

/// Runs a simulation; fails when a promise was not kept.
pub fn run(options: &Options) -> Result<()> {
    let mut options = options.clone();
    if options.quick {
        (options.sandboxes, options.seconds, options.idle) = (options.sandboxes.min(100), 60, 5);
    }
    if options.race.is_some() {
        (options.sandboxes, options.idle) = (options.sandboxes.min(race::SANDBOXES), 1);
    }
    allow_files()?;
    let program = match &options.hostd {
        Some(path) => std::path::absolute(path)?,
        None => steps::step("build hostd", || workspace::build("hostd", "release"))?,
    };
    // A short path: the sockets below it must fit in 108 bytes.
    let folder = tempfile::Builder::new().prefix("sim-").tempdir_in("/tmp")?;
    let pause = if options.race.is_some() { race::PAUSE } else { Duration::ZERO };
    let mut supervisor = start(&program, folder.path(), &options, pause)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let outcome = runtime.block_on(async {
        let world = World {
            client: Client::new(&supervisor.api, &supervisor.proxy)?,
            guests: Guests::start(folder.path()).await?,
            idle: Duration::from_secs(options.idle),
            seed: options.seed,
            hostd: supervisor.pid(),
        };
        match options.race {
            Some(tries) => race::run(world, options.sandboxes, tries).await,
            None => {
                let length = Duration::from_secs(options.seconds);
                traffic::run(world, options.sandboxes, length, options.plot.as_deref()).await
            }
        }
    });
    supervisor.stop();
    outcome
}

fn start(program: &Path, folder: &Path, options: &Options, pause: Duration) -> Result<Supervisor> {
    let images = folder.join("images");
    std::fs::create_dir_all(images.join("base"))?;
    std::fs::write(images.join("base/image.json"), r#"{"format":1,"digests":{}}"#)?;
    let free = folder.join(guests::FREE);
    std::fs::create_dir(&free)?;
    let more = [
        ("--simulated-guests", free.display().to_string()),
        ("--idle-floor", options.idle.to_string()),
        ("--max-sandboxes", (options.sandboxes * 2 + 100).to_string()),
        ("--release-pause-ms", pause.as_millis().to_string()),
    ];
    let settings = Settings {
        program: program.to_owned(),
        data: folder.join("data"),
        images,
        api: supervisor::free_address()?,
        proxy: supervisor::free_address()?,
        runtime: Runtime::Container,
        more: more.into_iter().flat_map(|(name, value)| [name.to_owned(), value]).collect(),
    };
    Supervisor::start(&settings, Some(&folder.join("hostd.log")))
}

/// Each guest is a listener and a connection here, and its sandbox a few descriptors in hostd, which inherits the limit.
fn allow_files() -> Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("the limit of open files")?;
    ensure!(hard >= 16 * 1024, "the limit of open files is {hard}: a simulation needs 16384 (ulimit -Hn)");
    Ok(())
}

/// Chance that can be repeated: splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
#[derive(Debug)]
struct Chance(u64);

impl Chance {
    fn new(seed: u64, stream: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ stream.wrapping_mul(0xd1b5_4a32_d192_ed03))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    fn up_to(&mut self, length: Duration) -> Duration {
        length.mul_f64(self.below(1 << 32) as f64 / f64::from(u32::MAX))
    }
}
