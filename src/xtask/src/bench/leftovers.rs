//! What many commands leave behind: nothing.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::Bench;
use super::connect::{self, Codec};
use super::proc::Held;
use super::row::{Gate, Promise, Reading, Row};

pub const ROWS: &[Row] = &[Row {
    name: "leftovers",
    title: "10,000 commands in a row leave nothing behind",
    promise: "0 left over",
    gate: Gate::Exact,
    measure,
}];

/// The end of a process is kept for a late client for 30 s (contract: envd.md section 2.8), blocking threads for 10 s.
const AFTERMATH: Duration = Duration::from_secs(32);

fn measure(bench: &Bench) -> Result<Reading> {
    let count = bench.scale(10_000, 2_000);
    let agent = bench.agent()?;
    let mut client = agent.connect()?;
    let request = connect::start(Codec::Json, &["/bin/sh", "-c", "echo out"], false);
    let mut run = || -> Result<()> {
        let (code, bytes) = client.run(Codec::Json, &request)?;
        ensure!(code == 0 && bytes == 4, "a command ended with {code} after {bytes} bytes");
        Ok(())
    };
    for _ in 0..100 {
        run()?;
    }
    let before = agent.process().held()?;
    let memory = agent.process().memory()?.rss;
    let begin = Instant::now();
    for _ in 0..count {
        run()?;
    }
    let elapsed = begin.elapsed().as_secs_f64();
    let at_once = left_over(before, agent.process().held()?);
    let grown = agent.process().memory()?.rss.saturating_sub(memory) as f64 / 1024.0;
    std::thread::sleep(AFTERMATH);
    let (text, left) = left_over(before, agent.process().held()?);
    let settled = agent.process().memory()?.rss;
    // What was freed but is still the agent's is used again; what leaked is not.
    for _ in 0..count / 2 {
        run()?;
    }
    let again = agent.process().memory()?.rss.saturating_sub(settled) as f64 / 1024.0;
    let settled = settled.saturating_sub(memory) as f64 / 1024.0;
    // Nothing by nothing is no ratio.
    let judged = Promise::AtMost(1.0).exactly(if left == 0 { 1.0 } else { 1.0 + left as f64 });
    Ok(Reading::new(left as f64, "left over", judged)
        .figure("commands", f64::from(count), "")
        .figure("left_at_once", at_once.1 as f64, "")
        .figure("rss_growth", grown, "kB")
        .figure("rss_growth_settled", settled, "kB")
        .figure("rss_growth_again", again, "kB")
        .note(format!(
            "{count} commands, {:.0} a second; left over {} s later: {text}; at once: {}; RSS grew by {grown:.0} kB, {settled:.0} kB after the wait, {again:.0} kB more with half as many again",
            f64::from(count) / elapsed,
            AFTERMATH.as_secs(),
            at_once.0,
        )))
}

/// What there is more of, in words and as a sum.
fn left_over(before: Held, after: Held) -> (String, usize) {
    let kinds = [
        ("descriptors", before.descriptors, after.descriptors),
        ("threads", before.threads, after.threads),
        ("children", before.children, after.children),
        ("zombies", before.zombies, after.zombies),
        ("cgroups", before.cgroups, after.cgroups),
    ];
    let more: Vec<_> = kinds
        .iter()
        .filter(|(_, before, after)| after > before)
        .map(|(name, before, after)| (name, after - before))
        .collect();
    let words: Vec<_> = more.iter().map(|(name, count)| format!("{count} {name}")).collect();
    let text = if words.is_empty() { "nothing".to_owned() } else { words.join(", ") };
    (text, more.iter().map(|(_, count)| count).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_there_is_more_of_is_left_over() {
        let held = |descriptors, threads, zombies| Held {
            descriptors,
            threads,
            zombies,
            children: zombies,
            cgroups: 5,
        };
        assert_eq!(left_over(held(9, 3, 0), held(9, 1, 0)), ("nothing".to_owned(), 0));
        let (text, left) = left_over(held(9, 1, 0), held(11, 1, 1));
        assert_eq!((text.as_str(), left), ("2 descriptors, 1 children, 1 zombies", 4));
    }
}
