//! How a create call's `timeout` and `metadata.idle_timeout` become deadlines, and what is refused (DESIGN.md section 4, rule 5).

use std::time::Duration;

use crate::Moment;

/// The metadata key that the SDKs' users set.
pub const IDLE_TIMEOUT_KEY: &str = "idle_timeout";

/// What the operator allows.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The lowest `idle_timeout` accepted.
    pub idle_floor: Duration,
    /// No sandbox outlives this.
    pub max_lifetime: Duration,
    /// The lifetime of a create call that names none.
    pub default_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            idle_floor: Duration::from_secs(60),
            max_lifetime: Duration::from_secs(3600),
            default_timeout: Duration::from_secs(300),
        }
    }
}

/// Why terms were refused. The text names the field and the rule, for the 400 answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TermsError {
    #[error(
        "metadata.idle_timeout must be a string of whole seconds from {floor} (the minimum) to {max} (the maximum lifetime), \
         for example \"{floor}\"; got {got:?}"
    )]
    IdleTimeout { got: String, floor: u64, max: u64 },
    #[error("timeout: Timeout must be greater than 0")]
    TimeoutNotPositive,
    #[error("timeout: Timeout cannot be greater than {} (the maximum lifetime); got {got} s", in_words(*.max))]
    TimeoutTooLong { got: u64, max: u64 },
    #[error("timeout: Max instance length exceeded: the sandbox has reached its maximum lifetime of {max} s")]
    LifetimeSpent { max: u64 },
}

/// Hours where they are whole, as the clouds' own text has it, else seconds.
fn in_words(seconds: u64) -> String {
    match seconds {
        s if s > 0 && s % 3600 == 0 => format!("{} hours", s / 3600),
        s => format!("{s} seconds"),
    }
}

/// The deadlines of one sandbox, on its host's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    pub started: Moment,
    /// When it ends whatever happens; never after [`Terms::last_end`].
    pub end: Moment,
    /// `started` and the maximum lifetime.
    pub last_end: Moment,
    pub idle_timeout: Option<Duration>,
    /// A session: it ends with the connection that created it, or when nothing was heard from there for so long.
    pub session: Option<Duration>,
}

/// What a create call asked for, already checked. It becomes [`Terms`] when the sandbox is ready, so that the time to boot is not the user's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    timeout: Duration,
    idle_timeout: Option<Duration>,
    session: Option<Duration>,
}

impl Asked {
    /// A sandbox that lives as long as the connection that creates it, and no longer than the maximum lifetime; `liveness` is how long its
    /// client may be silent (DESIGN.md section 4, rule 6).
    pub fn session(liveness: Duration) -> Self {
        Self { timeout: Duration::MAX, idle_timeout: None, session: Some(liveness) }
    }

    /// A sandbox that lives so long, whoever is connected; more than the maximum lifetime is shortened to it. It is never idle.
    pub fn lasting(length: Duration) -> Self {
        Self { timeout: length, idle_timeout: None, session: None }
    }

    /// Checks a create call's fields.
    ///
    /// # Errors
    /// A [`TermsError`] for the 400 answer.
    pub fn parse(
        timeout: Option<i64>,
        idle_timeout: Option<&str>,
        limits: &Limits,
    ) -> Result<Self, TermsError> {
        let timeout = match timeout {
            None => limits.default_timeout.min(limits.max_lifetime),
            Some(seconds) => {
                let length = length(seconds, limits)?;
                if length.is_zero() {
                    return Err(TermsError::TimeoutNotPositive);
                }
                length
            }
        };
        let idle_timeout = idle_timeout.map(|text| parse_idle_timeout(text, limits)).transpose()?;
        Ok(Self { timeout, idle_timeout, session: None })
    }

    pub fn idle_timeout(&self) -> Option<Duration> {
        self.idle_timeout
    }

    /// The deadlines of a sandbox that became ready at `started`.
    ///
    /// With an idle timeout the SDKs' always-sent default `timeout` is not the limit: the end is the maximum lifetime.
    pub fn starting(self, started: Moment, limits: &Limits) -> Terms {
        let last_end = started + limits.max_lifetime;
        let timeout = self.timeout.min(limits.max_lifetime);
        let end = if self.idle_timeout.is_some() { last_end } else { started + timeout };
        Terms { started, end, last_end, idle_timeout: self.idle_timeout, session: self.session }
    }
}

impl Terms {
    /// `setTimeout`: counts from now, may shorten or extend, clamped to the maximum lifetime. Negative means now.
    ///
    /// # Errors
    /// When the maximum lifetime is already over.
    pub fn set_timeout(&mut self, seconds: i64, now: Moment) -> Result<(), TermsError> {
        self.set_left(Duration::from_secs(u64::try_from(seconds).unwrap_or(0)), now)
    }

    /// The same for any length.
    ///
    /// # Errors
    /// When the maximum lifetime is already over.
    pub fn set_left(&mut self, length: Duration, now: Moment) -> Result<(), TermsError> {
        if now >= self.last_end {
            return Err(TermsError::LifetimeSpent { max: self.last_end.since(self.started).as_secs() });
        }
        self.end = now + length.min(self.last_end.since(now));
        Ok(())
    }

    /// `connect`: only extends.
    ///
    /// # Errors
    /// When `seconds` is negative or above the maximum lifetime.
    pub fn extend(&mut self, seconds: i64, limits: &Limits, now: Moment) -> Result<(), TermsError> {
        let length = length(seconds, limits)?;
        self.end = self.end.max((now + length).min(self.last_end));
        Ok(())
    }
}

/// A length that a client asked for. The default that some SDKs always send cannot be told from a wish: where the operator's maximum is
/// below it, it is shortened instead of refused.
fn length(seconds: i64, limits: &Limits) -> Result<Duration, TermsError> {
    let seconds = u64::try_from(seconds).map_err(|_| TermsError::TimeoutNotPositive)?;
    let max = limits.max_lifetime.as_secs();
    if seconds == limits.default_timeout.as_secs() {
        return Ok(limits.default_timeout.min(limits.max_lifetime));
    }
    if seconds > max {
        return Err(TermsError::TimeoutTooLong { got: seconds, max });
    }
    Ok(Duration::from_secs(seconds))
}

fn parse_idle_timeout(text: &str, limits: &Limits) -> Result<Duration, TermsError> {
    let (floor, max) = (limits.idle_floor.as_secs(), limits.max_lifetime.as_secs());
    let digits_only = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse::<u64>()
        .ok()
        .filter(|seconds| digits_only && (floor..=max).contains(seconds))
        .map(Duration::from_secs)
        .ok_or_else(|| TermsError::IdleTimeout { got: text.chars().take(64).collect(), floor, max })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        idle_floor: Duration::from_secs(60),
        max_lifetime: Duration::from_secs(3600),
        default_timeout: Duration::from_secs(300),
    };

    fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn an_idle_timeout_outside_the_rule_is_refused_with_the_rule() {
        for bad in ["59", "abc", "-1", "60.5", "", "999999", "+60", " 60", "60 ", "0x60", "３６００", "3601"]
        {
            let refused = Asked::parse(None, Some(bad), &LIMITS).expect_err(bad);
            assert!(refused.to_string().contains("metadata.idle_timeout"), "{refused}");
            assert!(refused.to_string().contains("whole seconds from 60"), "{refused}");
        }
        for good in ["60", "3600", "0060"] {
            Asked::parse(None, Some(good), &LIMITS).expect(good);
        }
    }

    #[test]
    fn the_default_timeout_of_an_sdk_does_not_end_an_idle_mode_sandbox() {
        let start = Moment::from_millis(5_000);
        let terms = Asked::parse(Some(300), Some("60"), &LIMITS).unwrap().starting(start, &LIMITS);
        assert_eq!(terms.end, start + secs(3600));
        let plain = Asked::parse(Some(20), None, &LIMITS).unwrap().starting(start, &LIMITS);
        assert_eq!(plain.end, start + secs(20));
        let silent = Asked::parse(None, None, &LIMITS).unwrap().starting(start, &LIMITS);
        assert_eq!(silent.end, start + secs(300));
    }

    #[test]
    fn a_timeout_above_the_maximum_or_not_positive_is_refused() {
        assert_eq!(Asked::parse(Some(0), None, &LIMITS), Err(TermsError::TimeoutNotPositive));
        assert_eq!(Asked::parse(Some(-5), None, &LIMITS), Err(TermsError::TimeoutNotPositive));
        let refused = Asked::parse(Some(3601), None, &LIMITS).unwrap_err().to_string();
        assert!(refused.contains("Timeout cannot be greater than 1 hours"), "{refused}");
    }

    #[test]
    fn the_default_that_an_sdk_always_sends_is_never_refused() {
        let short = Limits { max_lifetime: secs(40), idle_floor: secs(1), ..LIMITS };
        let start = Moment::from_millis(0);
        assert_eq!(
            Asked::parse(Some(300), None, &short).unwrap().starting(start, &short).end,
            start + secs(40)
        );
        assert!(Asked::parse(Some(301), None, &short).is_err());
        assert!(Asked::parse(Some(41), None, &short).is_err());
    }

    #[test]
    fn a_session_and_a_long_duration_end_with_the_maximum_lifetime() {
        let start = Moment::from_millis(7);
        let session = Asked::session(secs(60)).starting(start, &LIMITS);
        assert_eq!((session.end, session.idle_timeout), (start + secs(3600), None));
        let lasting = Asked::lasting(Duration::MAX).starting(start, &LIMITS);
        assert_eq!((lasting.end, lasting.session), (start + secs(3600), None));
        assert_eq!(Asked::lasting(secs(90)).starting(start, &LIMITS).end, start + secs(90));
    }

    #[test]
    fn a_length_that_no_clock_can_count_is_clamped() {
        let start = Moment::from_millis(0);
        let mut terms = Asked::lasting(secs(5)).starting(start, &LIMITS);
        terms.set_left(Duration::MAX, start + secs(1)).unwrap();
        assert_eq!(terms.end, start + secs(3600));
        terms.set_left(Duration::from_millis(1500), start + secs(1)).unwrap();
        assert_eq!(terms.end, Moment::from_millis(2500));
    }

    #[test]
    fn set_timeout_counts_from_now_and_is_clamped() {
        let start = Moment::from_millis(0);
        let mut terms = Asked::parse(Some(60), None, &LIMITS).unwrap().starting(start, &LIMITS);
        let now = start + secs(10);
        terms.set_timeout(30, now).unwrap();
        assert_eq!(terms.end, now + secs(30));
        terms.set_timeout(100_000, now).unwrap();
        assert_eq!(terms.end, start + secs(3600));
        terms.set_timeout(-1, now).unwrap();
        assert_eq!(terms.end, now);
        assert!(terms.set_timeout(30, start + secs(3600)).is_err());
    }

    #[test]
    fn set_timeout_wins_over_an_idle_timeout_and_connect_never_shortens() {
        let start = Moment::from_millis(0);
        let mut terms = Asked::parse(None, Some("60"), &LIMITS).unwrap().starting(start, &LIMITS);
        terms.set_timeout(30, start + secs(1)).unwrap();
        assert_eq!(terms.end, start + secs(31));
        terms.extend(10, &LIMITS, start + secs(2)).unwrap();
        assert_eq!(terms.end, start + secs(31));
        terms.extend(300, &LIMITS, start + secs(2)).unwrap();
        assert_eq!(terms.end, start + secs(302));
        assert!(terms.extend(3601, &LIMITS, start).is_err());
    }
}
