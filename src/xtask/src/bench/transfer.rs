//! A file up and down, against a plain copy between a socket and the same file system.

use std::fs::File;
use std::io::Read;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::Bench;
use super::client::{Client, send_pattern};
use super::floor::Floor;
use super::row::{Gate, MEGABYTES_PER_SECOND, Promise, Reading, Row};
use super::stats::{Paired, Samples};

pub const ROWS: &[Row] = &[
    Row {
        name: "upload",
        title: "upload of a file",
        promise: ">= 70 % of socket to file",
        gate: Gate::Margin(2.0),
        measure: upload,
    },
    Row {
        name: "download",
        title: "download of a file",
        promise: ">= 70 % of file to socket",
        gate: Gate::Margin(2.0),
        measure: download,
    },
];

const PROMISE: Promise = Promise::AtLeast(0.7);

fn length(bench: &Bench) -> u64 {
    bench.scale(1 << 30, 256 << 20)
}

fn rate(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / 1e6 / time.as_secs_f64()
}

fn upload(bench: &Bench) -> Result<Reading> {
    let length = length(bench);
    let agent = bench.agent()?;
    let mut client = agent.connect()?;
    let path = agent.folder().join("file");
    // Nothing of the last round waits to be written while the next is timed.
    let forget = || -> Result<()> {
        File::open(&path)?.sync_all()?;
        std::fs::remove_file(&path)?;
        Ok(())
    };
    let (mut synced, mut floor_synced) = (Vec::new(), Vec::new());
    let mut cpu = Duration::ZERO;
    let paired = Paired::run(
        bench.scale(5, 4),
        || {
            let before = agent.process().cpu()?;
            let begin = Instant::now();
            client.upload(&path.to_string_lossy(), length)?;
            let time = begin.elapsed();
            cpu += agent.process().cpu()?.saturating_sub(before);
            File::open(&path)?.sync_all()?;
            synced.push(rate(length, begin.elapsed()));
            ensure!(path.metadata()?.len() == length, "an upload lost bytes");
            forget()?;
            Ok(rate(length, time))
        },
        || {
            let mut floor = Floor::receive(&path)?;
            let begin = Instant::now();
            socket_to_file(&mut floor, length)?;
            let time = begin.elapsed();
            File::open(&path)?.sync_all()?;
            floor_synced.push(rate(length, begin.elapsed()));
            floor.finish()?;
            forget()?;
            Ok(rate(length, time))
        },
    )?;
    let (synced, floor_synced) = (median(synced)?, median(floor_synced)?);
    let rounds = bench.scale(5.0, 4.0);
    let of_cpu = rounds * length as f64 / 1e6 / cpu.as_secs_f64();
    Ok(reading(&paired)
        .figure("synced", synced, MEGABYTES_PER_SECOND)
        .figure("floor_synced", floor_synced, MEGABYTES_PER_SECOND)
        .figure("of_cpu", of_cpu, MEGABYTES_PER_SECOND)
        .note(format!(
            "{} MiB to a new file, to the answer, mostly into the page cache; to the disk (fsync) {synced:.0} against {floor_synced:.0} MB/s; {of_cpu:.0} MB by a second of the agent's processor time",
            length >> 20
        )))
}

fn socket_to_file(floor: &mut Floor, length: u64) -> Result<()> {
    send_pattern(&mut floor.socket, length)?;
    floor.socket.shutdown(std::net::Shutdown::Write)?;
    let mut answer = [0];
    floor.socket.read_exact(&mut answer).context("a floor without an answer")
}

fn download(bench: &Bench) -> Result<Reading> {
    let length = length(bench);
    let agent = bench.agent()?;
    let mut client = agent.connect()?;
    let path = agent.folder().join("file");
    client.upload(&path.to_string_lossy(), length)?;
    let file = File::open(&path)?;
    file.sync_all()?;

    let through_agent = |client: &mut Client| {
        let begin = Instant::now();
        let bytes = client.download(&path.to_string_lossy())?;
        ensure!(bytes == length, "a download lost bytes: {bytes} of {length}");
        Ok(rate(length, begin.elapsed()))
    };
    let plain = |sendfile| {
        let mut floor = Floor::send(&path, sendfile)?;
        let begin = Instant::now();
        ensure!(floor.drain()? == length, "a floor lost bytes");
        let time = begin.elapsed();
        floor.finish()?;
        Ok(rate(length, time))
    };
    let forget = || posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);

    through_agent(&mut client)?;
    let before = agent.process().cpu()?;
    let rounds = bench.scale(5, 4);
    let mut sendfile = Vec::new();
    let warm = Paired::run(
        rounds,
        || through_agent(&mut client),
        || {
            sendfile.push(plain(true)?);
            plain(false)
        },
    )?;
    let cpu = agent.process().cpu()?.saturating_sub(before);
    let of_cpu = rounds as f64 * length as f64 / 1e6 / cpu.as_secs_f64();
    let cold = Paired::run(
        bench.scale(3, 2),
        || {
            forget()?;
            through_agent(&mut client)
        },
        || {
            forget()?;
            plain(false)
        },
    )?;
    let sendfile = median(sendfile)?;
    Ok(reading(&warm)
        .figure("sendfile_floor", sendfile, MEGABYTES_PER_SECOND)
        .figure("cold", cold.measured.median(), MEGABYTES_PER_SECOND)
        .figure("cold_floor", cold.floor.median(), MEGABYTES_PER_SECOND)
        .figure("of_cpu", of_cpu, MEGABYTES_PER_SECOND)
        .note(format!(
            "{} MiB in the page cache; floor: read and write; with sendfile(2) {sendfile:.0} MB/s; not in the page cache {:.0} against {:.0} MB/s; {of_cpu:.0} MB by a second of the agent's processor time",
            length >> 20,
            cold.measured.median(),
            cold.floor.median(),
        )))
}

fn reading(paired: &Paired) -> Reading {
    let (low, high) = paired.ratio.spread();
    Reading::new(paired.measured.median(), MEGABYTES_PER_SECOND, PROMISE.of(&paired.ratio))
        .floor(paired.floor.median(), MEGABYTES_PER_SECOND)
        .ratio(paired.ratio.median())
        .note(format!("ratio {low:.2} to {high:.2} in the middle half of the rounds"))
}

fn median(values: Vec<f64>) -> Result<f64> {
    Ok(Samples::new(values).context("nothing was measured")?.median())
}
