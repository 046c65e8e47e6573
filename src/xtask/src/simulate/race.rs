//! Requests fired into every window of the two-phase release: before the guest is asked, between its "ready" and the decision, and
//! between the decision and the stop.
//!
//! hostd pauses in each window. Every try must get its whole answer from a live sandbox, or the typed "sandbox was not found"; nothing
//! hangs or breaks off, and what a guest has accepted is answered.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::task::JoinSet;

use super::client::{Call, Outcome};
use super::{Chance, World};

pub const PAUSE: Duration = Duration::from_millis(60);

/// How many at the same time.
pub const SANDBOXES: usize = 150;

/// From the idle timeout on: where the first request of a try may be. Three pauses and the rules' own margin lie in it.
const FROM: Duration = Duration::from_millis(100);
const LENGTH: Duration = Duration::from_millis(320);

#[derive(Debug, Default)]
struct Tally {
    begun: AtomicU64,
    answered: AtomicU64,
    gone: AtomicU64,
}

pub async fn run(world: World, sandboxes: usize, tries: u64) -> Result<()> {
    let begun = Instant::now();
    let (world, tally) = (Arc::new(world), Arc::new(Tally::default()));
    let mut racers = JoinSet::new();
    for number in 0..sandboxes as u64 {
        let (world, tally) = (Arc::clone(&world), Arc::clone(&tally));
        racers.spawn(async move { race(&world, &tally, number, tries).await });
    }
    while let Some(ended) = racers.join_next().await {
        ended??;
    }
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let (answered, gone) = (count(&tally.answered), count(&tally.gone));
    println!(
        "race: {} tries in {:.0} s: {answered} answered in full, {gone} told that the sandbox was not found, 0 lost",
        answered + gone,
        begun.elapsed().as_secs_f64(),
    );
    ensure!(answered + gone >= tries, "not all tries were made");
    ensure!(answered.min(gone) > tries / 20, "nearly all went one way: the windows were missed");
    Ok(())
}

async fn race(world: &World, tally: &Tally, number: u64, tries: u64) -> Result<()> {
    let mut chance = Chance::new(world.seed, number);
    loop {
        world.guests.add().await?;
        let sandbox = world.client.create(world.idle.as_secs()).await?;
        let mut last = Instant::now();
        loop {
            let this = tally.begun.fetch_add(1, Ordering::Relaxed);
            if this >= tries {
                return Ok(());
            }
            let at = last + world.idle + FROM + chance.up_to(LENGTH);
            tokio::time::sleep_until(at.into()).await;
            let call = match chance.below(5) {
                0 => Call::List,
                1 => Call::Stat,
                2 => Call::Upload,
                3 => Call::Download,
                _ => Call::Port { millis: chance.below(80) },
            };
            match world.client.call(&world.guests, &sandbox, call, &format!("r{this}")).await? {
                Outcome::Answered => {
                    tally.answered.fetch_add(1, Ordering::Relaxed);
                    last = Instant::now();
                }
                Outcome::Gone => {
                    tally.gone.fetch_add(1, Ordering::Relaxed);
                    let ended = world.client.explain(&sandbox).await?;
                    let reason = ended["ended"]["reason"].as_str().context("no tombstone")?;
                    ensure!(reason == "idle", "{} ended: {reason}", sandbox.id);
                    break;
                }
            }
        }
    }
}
