//! What a command may use.

use guestd_protocol::init::ProcessLimits;
use guestd_protocol::wire::process as wire;

/// Below this not even an exec succeeds, and the kernel kills what nobody wanted to limit so far.
const MEMORY_FLOOR: u64 = 1 << 20;

/// A thousand processors, in percent of one.
const CPU_CEILING: u32 = 100_000;

/// The kernel's own ceiling of process numbers, PID_MAX_LIMIT.
const PIDS_CEILING: u32 = 4_194_304;

/// A limit that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: must be {rule}, got {got}")]
pub struct LimitError {
    pub field: &'static str,
    pub rule: String,
    pub got: u64,
}

/// Limits of one command with all that it starts; None is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Limits {
    /// In bytes.
    pub memory: Option<u64>,
    /// In percent of one processor.
    pub cpu_percent: Option<u32>,
    /// Processes and threads.
    pub pids: Option<u32>,
}

impl Limits {
    /// Those of a start request.
    ///
    /// # Errors
    /// Names the field and the rule.
    pub fn of_start(limits: &wire::Limits) -> Result<Self, LimitError> {
        let names = ["limits.memory_bytes", "limits.cpu_percent", "limits.pids"];
        Self::checked(names, limits.memory_bytes, limits.cpu_percent, limits.pids)
    }

    /// Those of `/init`, for commands that bring none.
    ///
    /// # Errors
    /// Names the field and the rule.
    pub fn of_init(limits: &ProcessLimits) -> Result<Self, LimitError> {
        let names = ["processLimits.memoryBytes", "processLimits.cpuPercent", "processLimits.pids"];
        Self::checked(names, limits.memory_bytes, limits.cpu_percent, limits.pids)
    }

    fn checked(
        names: [&'static str; 3],
        memory: Option<u64>,
        cpu_percent: Option<u32>,
        pids: Option<u32>,
    ) -> Result<Self, LimitError> {
        let within = |field, got: Option<u64>, floor, ceiling| match got {
            Some(got) if got < floor || got > ceiling => {
                Err(LimitError { field, rule: format!("from {floor} to {ceiling}"), got })
            }
            _ => Ok(()),
        };
        within(names[0], memory, MEMORY_FLOOR, i64::MAX.unsigned_abs())?;
        within(names[1], cpu_percent.map(u64::from), 1, u64::from(CPU_CEILING))?;
        within(names[2], pids.map(u64::from), 1, u64::from(PIDS_CEILING))?;
        Ok(Self { memory, cpu_percent, pids })
    }

    /// These, and where they say nothing `defaults`.
    #[must_use]
    pub fn or(self, defaults: Self) -> Self {
        Self {
            memory: self.memory.or(defaults.memory),
            cpu_percent: self.cpu_percent.or(defaults.cpu_percent),
            pids: self.pids.or(defaults.pids),
        }
    }

    /// Controller, file and text of each limit that is set; cgroup-v2(7), Documentation/admin-guide/cgroup-v2.rst.
    pub(super) fn files(&self) -> impl Iterator<Item = (&'static str, &'static str, String)> {
        /// The kernel's own default period, in microseconds.
        const PERIOD: u64 = 100_000;
        let memory = self.memory.map(|bytes| ("memory", "memory.max", bytes.to_string()));
        let cpu = self
            .cpu_percent
            .map(|percent| ("cpu", "cpu.max", format!("{} {PERIOD}", u64::from(percent) * PERIOD / 100)));
        let pids = self.pids.map(|pids| ("pids", "pids.max", pids.to_string()));
        [memory, cpu, pids].into_iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_out_of_its_range_names_the_field_and_the_rule() {
        let wrong = wire::Limits { memory_bytes: Some(0), ..Default::default() };
        assert_eq!(
            Limits::of_start(&wrong).unwrap_err().to_string(),
            "limits.memory_bytes: must be from 1048576 to 9223372036854775807, got 0"
        );
        let wrong = wire::Limits { cpu_percent: Some(100_001), ..Default::default() };
        assert_eq!(Limits::of_start(&wrong).unwrap_err().field, "limits.cpu_percent");
        let wrong = ProcessLimits { pids: Some(0), ..Default::default() };
        assert_eq!(Limits::of_init(&wrong).unwrap_err().field, "processLimits.pids");
    }

    #[test]
    fn a_limit_becomes_what_the_kernel_reads() {
        let limits = Limits { memory: Some(64 << 20), cpu_percent: Some(150), pids: Some(10) };
        let files: Vec<_> = limits.files().map(|(_, file, text)| (file, text)).collect();
        let expected = [("memory.max", "67108864"), ("cpu.max", "150000 100000"), ("pids.max", "10")];
        assert_eq!(files, expected.map(|(file, text)| (file, text.to_owned())));
        let own = Limits { pids: Some(5), ..Limits::default() };
        assert_eq!(own.or(limits), Limits { pids: Some(5), ..limits });
    }
}
