//! The last use that this supervisor saw of a sandbox, in a file: a request to a port of the guest passes by its agent, so that after a
//! kill -9 of hostd nobody else knows of it.
//!
//! Two numbers of eight bytes: the moment, and how many requests were under way. It is written without a sync: what survives is the
//! death of this process, and a host that is rebooted has no sandboxes left.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use guestd_idle::{Ledger, Moment};

const NAME: &str = "last-use";

/// Between two writes while nothing but the time changes.
const PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(super) struct UseMark {
    file: Option<File>,
    written: AtomicU64,
}

impl UseMark {
    /// Opens the mark in a run folder. Without one the idle clock of an adopted sandbox is its agent's.
    pub(super) fn open(folder: &Path) -> Self {
        let file = File::options().create(true).truncate(false).write(true).open(folder.join(NAME));
        let file = file
            .inspect_err(
                |error| tracing::warn!(folder = %folder.display(), %error, "no mark of the last use"),
            )
            .ok();
        Self { file, written: AtomicU64::new(0) }
    }

    /// Writes what the ledger says. `settled` is a change of its holds, anything else is bytes that pass.
    pub(super) fn write(&self, ledger: &Ledger, settled: bool) {
        let Some(file) = &self.file else { return };
        let used = ledger.last_activity();
        let written = Moment::from_nanos(self.written.load(Ordering::Relaxed));
        if !settled && used.since(written) < PAUSE {
            return;
        }
        let mut mark = [0; 16];
        mark[..8].copy_from_slice(&used.as_nanos().to_le_bytes());
        mark[8..].copy_from_slice(&(ledger.counting() as u64).to_le_bytes());
        match file.write_all_at(&mark, 0) {
            Ok(()) => self.written.store(used.as_nanos(), Ordering::Relaxed),
            Err(error) => tracing::debug!(%error, "the last use is not marked"),
        }
    }

    /// The last use that an earlier supervisor marked: `now` when a request was under way.
    pub(super) fn read(folder: &Path, now: Moment) -> Option<Moment> {
        let read = || -> io::Result<[u8; 16]> {
            let mut mark = [0; 16];
            File::open(folder.join(NAME))?.read_exact_at(&mut mark, 0)?;
            Ok(mark)
        };
        let mark = read().ok()?;
        let number = |range: std::ops::Range<usize>| Some(u64::from_le_bytes(mark[range].try_into().ok()?));
        let (used, counting) = (number(0..8)?, number(8..16)?);
        Some(if counting > 0 { now } else { Moment::from_nanos(used).min(now) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guestd_idle::{HoldClass, Policy};

    #[test]
    fn a_request_that_was_under_way_is_use_until_the_restart() {
        let folder = tempfile::tempdir().unwrap();
        let at = Moment::from_millis;
        assert_eq!(UseMark::read(folder.path(), at(9)), None);
        let mark = UseMark::open(folder.path());
        let mut ledger = Ledger::new(Policy::default(), at(1_000));
        let hold = ledger.begin(HoldClass::GuestPort, "/", 0, at(2_000));
        mark.write(&ledger, true);
        assert_eq!(UseMark::read(folder.path(), at(90_000)), Some(at(90_000)));
        ledger.end(hold, at(3_000));
        mark.write(&ledger, true);
        assert_eq!(UseMark::read(folder.path(), at(90_000)), Some(at(3_000)));
    }
}
