//! The wall clock, which only `/init` sets.

use std::ops::Add;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use buffa_types::google::protobuf::Timestamp as WireTimestamp;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

/// How far the guest may lag before its clock is set, and how far it may be ahead (contract: envd.md section 4.3).
const LAG: Duration = Duration::from_millis(50);
const LEAD: Duration = Duration::from_secs(5);

/// A point in time, as nanoseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub(super) struct Timestamp(i128);

impl Timestamp {
    /// Parses RFC 3339.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let parsed: WireTimestamp =
            serde_json::from_value(serde_json::Value::String(text.to_owned())).ok()?;
        Some(Self(i128::from(parsed.seconds) * 1_000_000_000 + i128::from(parsed.nanos)))
    }
}

impl Add<Duration> for Timestamp {
    type Output = Self;

    fn add(self, later: Duration) -> Self {
        Self(self.0.saturating_add(i128::try_from(later.as_nanos()).unwrap_or(i128::MAX)))
    }
}

/// Sets the clock if it is off by more than the contract allows.
pub(super) fn set(to: Timestamp) {
    let Ok(now) = SystemTime::now().duration_since(UNIX_EPOCH) else { return };
    let now = i128::try_from(now.as_nanos()).unwrap_or_default();
    if !is_off(now, to.0) {
        return;
    }
    let (Ok(seconds), Ok(nanos)) = (i64::try_from(to.0 / 1_000_000_000), i64::try_from(to.0 % 1_000_000_000))
    else {
        return;
    };
    if let Err(error) = clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::new(seconds, nanos)) {
        tracing::warn!(%error, "the clock could not be set");
    }
}

fn is_off(now: i128, to: i128) -> bool {
    let lag = i128::try_from(LAG.as_nanos()).unwrap_or_default();
    let lead = i128::try_from(LEAD.as_nanos()).unwrap_or_default();
    to - now > lag || now - to > lead
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_difference_does_not_step_the_clock() {
        let ms = 1_000_000;
        assert!(!is_off(1000 * ms, 1050 * ms));
        assert!(is_off(1000 * ms, 1051 * ms), "behind");
        assert!(!is_off(6000 * ms, 1000 * ms));
        assert!(is_off(6001 * ms, 1000 * ms), "ahead");
    }

    #[test]
    fn a_timestamp_is_rfc_3339() {
        let parsed = Timestamp::parse("1970-01-01T00:00:01.5Z").unwrap();
        assert_eq!(parsed, Timestamp(1_500_000_000));
        assert!(Timestamp::parse("yesterday").is_none());
        assert!(Timestamp::parse("2026-11-22T05:00:00+02:00") < Timestamp::parse("2026-11-22T05:00:00Z"));
    }
}
