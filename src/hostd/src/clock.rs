//! The host's two clocks: one that decides, one that people read.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use guestd_idle::Moment;
use nix::time::{ClockId, clock_gettime};

/// Now, on the clock that counts since the machine's boot. It is the same for every process and goes on while the machine sleeps, so
/// that a restarted supervisor reads the deadlines of its predecessor.
pub fn now() -> Moment {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or_else(
        |_| Moment::default(),
        |time| {
            let nanos = Duration::from(time).as_nanos();
            Moment::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
        },
    )
}

/// The boot that moments belong to; none of another boot means anything.
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// Milliseconds since 1970, for people.
pub fn wall_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// The wall time of a moment, as the wall clock stands now.
pub fn wall_ms_of(moment: Moment) -> i64 {
    let now = now();
    let millis = |length: Duration| i64::try_from(length.as_millis()).unwrap_or(i64::MAX);
    if moment >= now {
        wall_ms().saturating_add(millis(moment.since(now)))
    } else {
        wall_ms().saturating_sub(millis(now.since(moment)))
    }
}

/// RFC 3339 in UTC with milliseconds.
pub fn rfc3339(wall_ms: i64) -> String {
    jiff::Timestamp::from_millisecond(wall_ms).map_or_else(|_| String::new(), |time| format!("{time:.3}"))
}
