//! Sandboxes that are used at random, left alone, and released: is each release within a second after the idle timeout?
//!
//! Two clocks judge it. The tombstone says for how long hostd knew it to be idle; the client knows when its last answer arrived, and asks
//! around the deadline until it hears of the end. Before the traffic all sandboxes are idle for a while: then hostd's processor time
//! and memory are measured.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::sync::{Barrier, Mutex};
use tokio::task::JoinSet;

use super::client::{Call, Outcome, Sandbox};
use super::{Chance, World, plot};
use crate::bench::proc::Process;
use crate::bench::stats::Samples;

/// How late a release may be.
const LATE: Duration = Duration::from_secs(1);

/// The last answer's way from hostd to the client; hostd counted before it.
const ON_ITS_WAY: Duration = Duration::from_millis(100);

/// One client in so many may be late: on a machine with other work some are, and all of them would be, were hostd early.
const LATE_CLIENTS: u64 = 100;

/// Before the deadline: the client looks whether it still runs. After it: how often it asks whether it ended.
const LOOK: Duration = Duration::from_millis(300);
const ASK: Duration = Duration::from_millis(50);

/// The shares of what may be used, with everything idle.
const CPU_LIMIT: f64 = 0.1;
const MEMORY_LIMIT: f64 = 64.0 * 1024.0;

/// One in so many sandboxes has an open watch: a user has 128 of them (inotify(7)).
const WATCHED: u64 = 20;

/// One release, in seconds after the idle timeout.
#[derive(Clone, Copy, Debug)]
pub struct Release {
    pub host: f64,
    pub client: f64,
}

#[derive(Debug)]
struct Shared {
    world: World,
    until: Mutex<Option<Instant>>,
    /// All are there; all are idle and measured.
    created: Barrier,
    measured: Barrier,
    ready: AtomicUsize,
    all: usize,
    calls: AtomicU64,
    releases: Mutex<Vec<Release>>,
    /// Released in time by hostd's count, and too early by their client's, which ran late itself.
    late_clients: AtomicU64,
}

pub async fn run(world: World, sandboxes: usize, length: Duration, picture: Option<&Path>) -> Result<()> {
    let hostd = Process::new(world.hostd);
    // Whatever the first one allocates for all is not the first one's.
    world.guests.add().await?;
    world.client.create(world.idle.as_secs()).await?;
    let before = hostd.memory()?.rss;
    let shared = Arc::new(Shared {
        until: Mutex::new(None),
        created: Barrier::new(sandboxes + 1),
        measured: Barrier::new(sandboxes + 1),
        ready: AtomicUsize::new(0),
        all: sandboxes,
        calls: AtomicU64::new(0),
        releases: Mutex::default(),
        late_clients: AtomicU64::new(0),
        world,
    });
    let begun = Instant::now();
    let mut users = JoinSet::new();
    for number in 0..sandboxes as u64 {
        let shared = Arc::clone(&shared);
        users.spawn(async move { use_one(&shared, number).await });
    }
    let idle = shared.world.idle;
    tokio::select! {
        _ = shared.created.wait() => {}
        failed = users.join_next() => failed.context("no user")???,
    }
    println!("{sandboxes} sandboxes after {:.1} s", begun.elapsed().as_secs_f64());
    // Each was used a moment ago, at most a quarter of the idle timeout: what is measured lies well before the first release.
    tokio::time::sleep(idle.mul_f64(0.15)).await;
    let (cpu, at) = (hostd.cpu()?, Instant::now());
    tokio::time::sleep(idle.mul_f64(0.4)).await;
    let quiet = hostd.cpu()?.saturating_sub(cpu).as_secs_f64() / at.elapsed().as_secs_f64();
    let memory = (hostd.memory()?.rss.saturating_sub(before)) as f64 / sandboxes as f64;
    println!("all idle: hostd uses {:.2} % of a core, {:.1} KiB a sandbox", quiet * 100.0, memory / 1024.0);
    *shared.until.lock().await = Some(Instant::now() + length);
    let (cpu, at) = (hostd.cpu()?, Instant::now());
    shared.measured.wait().await;
    while let Some(ended) = users.join_next().await {
        ended??;
    }
    let busy = (hostd.cpu()?.saturating_sub(cpu)).as_secs_f64() / at.elapsed().as_secs_f64();
    let releases = shared.releases.lock().await.clone();
    let late = shared.late_clients.load(Ordering::Relaxed);
    println!(
        "{late} clients were kept waiting by this machine for so long that they took their release for an early one"
    );
    ensure!(late * LATE_CLIENTS <= releases.len() as u64, "that many releases were early");
    report(&releases, shared.calls.load(Ordering::Relaxed), at.elapsed(), busy)?;
    if let Some(path) = picture {
        plot::draw(path, &releases, idle)?;
        println!("drawn: {}", path.display());
    }
    ensure!(quiet < CPU_LIMIT, "hostd uses more than a tenth of a core for idle sandboxes");
    ensure!(memory < MEMORY_LIMIT, "hostd uses more than 64 KiB for an idle sandbox");
    Ok(())
}

fn report(releases: &[Release], calls: u64, length: Duration, busy: f64) -> Result<()> {
    println!(
        "{calls} calls and {} releases in {:.0} s, hostd at {:.1} % of a core",
        releases.len(),
        length.as_secs_f64(),
        busy * 100.0
    );
    let mut outside = 0;
    for (who, low, values) in [
        ("tombstone", 0.0, releases.iter().map(|one| one.host).collect::<Vec<_>>()),
        ("client", -ON_ITS_WAY.as_secs_f64(), releases.iter().map(|one| one.client).collect()),
    ] {
        let late = LATE.as_secs_f64();
        outside += values.iter().filter(|lag| !(low..=late).contains(*lag)).count();
        let lag = Samples::new(values).context("nothing was released")?;
        let ms = |value: f64| value * 1000.0;
        println!(
            "{who}: released {:.0} to {:.0} ms after the idle timeout (p50 {:.0}, p99 {:.0})",
            ms(lag.min()),
            ms(lag.max()),
            ms(lag.median()),
            ms(lag.percentile(99.0))
        );
    }
    ensure!(outside == 0, "{outside} releases were not within a second after the idle timeout");
    Ok(())
}

async fn create(shared: &Shared) -> Result<Sandbox> {
    shared.world.guests.add().await?;
    shared.world.client.create(shared.world.idle.as_secs()).await
}

async fn use_one(shared: &Shared, number: u64) -> Result<()> {
    let mut chance = Chance::new(shared.world.seed, number);
    let idle = shared.world.idle;
    let mut sandbox = create(shared).await?;
    shared.ready.fetch_add(1, Ordering::Relaxed);
    // The first must not be released before the last is there.
    while shared.ready.load(Ordering::Relaxed) < shared.all {
        tokio::time::sleep(idle / 4).await;
        call(shared, &sandbox, Call::List, &format!("w{number}")).await?;
    }
    call(shared, &sandbox, Call::List, &format!("w{number}")).await?;
    shared.created.wait().await;
    shared.measured.wait().await;
    let until = shared.until.lock().await.context("nobody said until when")?;
    // Not all at once: the client of a call that waited behind a thousand others would take its sandbox for one that ended early.
    tokio::time::sleep(chance.up_to(idle.mul_f64(0.1))).await;
    for round in 0_u64.. {
        let mut last = call(shared, &sandbox, Call::List, &format!("f{number}-{round}")).await?;
        let watch = match number % WATCHED {
            0 => Some(shared.world.client.watch(&shared.world.guests, &sandbox).await?),
            _ => None,
        };
        if watch.is_some() {
            last = Instant::now();
        }
        for step in 0..chance.below(5) {
            tokio::time::sleep(chance.up_to(idle.mul_f64(0.7))).await;
            let what = match chance.below(5) {
                0 => Call::List,
                1 => Call::Stat,
                2 => Call::Upload,
                3 => Call::Download,
                _ => Call::Port { millis: chance.below(2_000) },
            };
            last = call(shared, &sandbox, what, &format!("t{number}-{round}-{step}")).await?;
        }
        let release = leave(shared, &sandbox, last, &mut chance).await?;
        drop(watch);
        shared.releases.lock().await.push(release);
        if Instant::now() >= until {
            break;
        }
        sandbox = create(shared).await?;
    }
    Ok(())
}

/// Makes a call that must be answered; when its answer had arrived.
async fn call(shared: &Shared, sandbox: &Sandbox, what: Call, name: &str) -> Result<Instant> {
    let outcome = shared.world.client.call(&shared.world.guests, sandbox, what, name).await?;
    let at = Instant::now();
    shared.calls.fetch_add(1, Ordering::Relaxed);
    ensure!(outcome == Outcome::Answered, "{what:?} {name}: {} was released while it was used", sandbox.id);
    Ok(at)
}

/// Leaves the sandbox alone, but for looks, and waits for its end.
async fn leave(shared: &Shared, sandbox: &Sandbox, last: Instant, chance: &mut Chance) -> Result<Release> {
    let (client, idle) = (&shared.world.client, shared.world.idle);
    let due = last + idle;
    // Status polling is no use.
    tokio::time::sleep_until((due - chance.up_to(idle).max(LOOK)).into()).await;
    client.health(sandbox).await?;
    tokio::time::sleep_until((due - LOOK).into()).await;
    let told = client.explain(sandbox).await?;
    if told["state"] == "ended" {
        let idle_for = told["ended"]["idle_for_s"].as_f64().unwrap_or_default();
        ensure!(idle_for >= idle.as_secs_f64(), "{} ended early: {told}", sandbox.id);
        shared.late_clients.fetch_add(1, Ordering::Relaxed);
    }
    loop {
        tokio::time::sleep_until((due.max(Instant::now()) + ASK).into()).await;
        let told = client.explain(sandbox).await?;
        let seen = Instant::now();
        if told["state"] == "ended" {
            ensure!(told["ended"]["reason"] == "idle", "{} ended: {told}", sandbox.id);
            let idle_for = told["ended"]["idle_for_s"].as_f64().context("no idle_for_s")?;
            let lag = |seconds: f64| seconds - idle.as_secs_f64();
            return Ok(Release { host: lag(idle_for), client: lag(seen.duration_since(last).as_secs_f64()) });
        }
        ensure!(seen < due + 10 * LATE, "{} was never released: {told}", sandbox.id);
    }
}
