//! Which processes the kernel killed when memory ran out, from its log. Read when somebody asks, without waiting (Linux's
//! ABI/testing/dev-kmsg).

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Mutex, PoisonError};

use serde::Serialize;

/// How many are remembered (contract: envd.md section 12).
const KILLS_LIMIT: usize = 32;

/// The longest record of the log, in bytes (the kernel's CONSOLE_EXT_LOG_MAX is smaller).
const RECORD_LIMIT: usize = 8192;

/// How many records one reading takes, so that a guest that floods the log cannot hold the reader.
const READ_LIMIT: usize = 100_000;

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct OomKill {
    /// The record's number in the log.
    seq: u64,
    /// The name of the process.
    process: String,
}

#[derive(Debug, Default)]
struct State {
    log: Option<File>,
    kills: VecDeque<OomKill>,
}

/// Follows the log from reading to reading.
#[derive(Debug, Default)]
pub(super) struct OomLog(Mutex<State>);

impl OomLog {
    /// The last kills. Blocks for as long as the log's new records take; empty where the log cannot be read.
    pub(super) fn read(&self) -> Vec<OomKill> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.log.is_none() {
            let log = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
                .open("/dev/kmsg");
            state.log = log.ok();
        }
        let State { log: Some(log), kills } = &mut *state else { return Vec::new() };
        take(log, kills);
        kills.iter().cloned().collect()
    }
}

fn take(log: &mut impl Read, kills: &mut VecDeque<OomKill>) {
    let mut record = [0; RECORD_LIMIT];
    for _ in 0..READ_LIMIT {
        match log.read(&mut record) {
            Ok(0) => return,
            Ok(length) => {
                if let Some(kill) = parse(&String::from_utf8_lossy(&record[..length])) {
                    if kills.len() == KILLS_LIMIT {
                        kills.pop_front();
                    }
                    kills.push_back(kill);
                }
            }
            // Records were overwritten before they were read: the next one is the oldest that is left.
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// `6,1234,5678,-;Memory cgroup out of memory: Killed process 42 (python3) total-vm:...`
fn parse(record: &str) -> Option<OomKill> {
    let (head, message) = record.split_once(';')?;
    let mut head = head.split(',');
    let priority: u32 = head.next()?.parse().ok()?;
    // What a process wrote into the log itself has another facility (syslog(2)): only the kernel's word counts.
    if priority >> 3 != 0 {
        return None;
    }
    let seq = head.next()?.parse().ok()?;
    let (why, killed) = message.split_once("Killed process ")?;
    if !why.to_ascii_lowercase().contains("out of memory") {
        return None;
    }
    let (_, name) = killed.split_once(" (")?;
    let (name, _) = name.rsplit_once(") total-vm")?;
    Some(OomKill { seq, process: name.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each read is one record, as the device has it.
    struct Log(Vec<Result<&'static str, i32>>);

    impl Read for Log {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            match if self.0.is_empty() { Err(libc::EAGAIN) } else { self.0.remove(0) } {
                Ok(record) => (&mut record.as_bytes()).read(buffer),
                Err(errno) => Err(io::Error::from_raw_os_error(errno)),
            }
        }
    }

    #[test]
    fn kills_are_found_among_other_records_and_after_a_gap() {
        let mut kills = VecDeque::new();
        let mut log = Log(vec![
            Ok("6,1,10,-;Linux version 6.1\n"),
            Ok("3,2,20,-;Out of memory: Killed process 42 (python3) total-vm:10kB, anon-rss:1kB\n"),
            Err(libc::EPIPE),
            Ok("3,9,30,-;Memory cgroup out of memory: Killed process 7 (a (b) c) total-vm:10kB\n"),
            Err(libc::EAGAIN),
            Ok("3,10,30,-;Out of memory: Killed process 8 (late) total-vm:1kB\n"),
        ]);
        take(&mut log, &mut kills);
        let kill = |seq, process: &str| OomKill { seq, process: process.to_owned() };
        assert_eq!(kills, [kill(2, "python3"), kill(9, "a (b) c")]);
    }

    #[test]
    fn a_process_cannot_write_a_kill_into_the_log() {
        let forged = "12,5,10,-;Out of memory: Killed process 42 (forged) total-vm:1kB\n";
        assert_eq!(parse(forged), None);
    }

    #[test]
    fn only_the_last_kills_are_kept() {
        let mut kills = VecDeque::new();
        let record = "3,2,20,-;Out of memory: Killed process 42 (x) total-vm:10kB\n";
        take(&mut Log(vec![Ok(record); KILLS_LIMIT + 5]), &mut kills);
        assert_eq!(kills.len(), KILLS_LIMIT);
    }
}
