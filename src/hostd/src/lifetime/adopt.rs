//! After a restart: what an earlier hostd left is taken over where it still runs, and buried where it does not.

use std::sync::Arc;
use std::time::Duration;

use guestd_idle::{EndReason, GuestReport, IdleSettings, Lifetime, Moment, Terms};
use http::HeaderValue;

use super::use_mark::UseMark;
use super::{Found, Sandbox, Sandboxes};
use crate::clock;
use crate::link::Link;
use crate::runtime::Machine;
use crate::store::{Record, Stage, Tombstone};

/// How long an adopted agent may take to say how idle it is. One that says nothing is taken as busy until its reports come.
const REPORT_LIMIT: Duration = Duration::from_secs(2);

/// Nothing could be learnt about a sandbox's guard.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot tell whether sandbox {id} still runs: {error}; raise the limit of open files (ulimit -n) and start again"
)]
struct Unknown {
    id: String,
    error: std::io::Error,
}

impl Sandboxes {
    /// Takes over what the store knows. Everything is in the table when this returns.
    ///
    /// # Errors
    /// When the store cannot be read, or a sandbox can be called neither alive nor gone.
    pub async fn adopt(self: &Arc<Self>) -> anyhow::Result<()> {
        for tombstone in self.store.tombstones()? {
            self.bury(&Arc::new(tombstone));
        }
        self.expire_tombstones().await;
        let boot = clock::boot_id();
        let adoptions = self.store.records()?.into_iter().map(|record| self.adopt_one(record, &boot));
        for adopted in futures_util::future::join_all(adoptions).await {
            adopted?;
        }
        self.remove_strays();
        Ok(())
    }

    async fn adopt_one(self: &Arc<Self>, record: Record, boot: &str) -> Result<(), Unknown> {
        let id = record.id.clone();
        let same_boot = record.boot_id == boot;
        let machine = match record.placement.clone().filter(|_| same_boot).map(Machine::adopt) {
            None => None,
            Some(Ok(machine)) => machine,
            // Out of descriptors, perhaps. It is not known to be gone, so nothing of it is touched.
            Some(Err(error)) => return Err(Unknown { id, error }),
        };
        let buried = matches!(self.find(&id), Some(Found::Gone(_)));
        match (record.stage, machine) {
            (Stage::Running, Some(machine)) if !buried => self.take_over(record, machine).await,
            (Stage::Running, None) if !buried => self.bury_lost(record, same_boot).await,
            // Ended, but its machine was still to be stopped; or nobody was ever told of it.
            (_, machine) => {
                if let Some(machine) = machine {
                    machine.stop().await;
                }
                tracing::info!(sandbox = id, buried, "removed what was left of a sandbox");
                self.forget(id).await;
            }
        }
        Ok(())
    }

    async fn forget(&self, id: String) {
        if let Err(error) = self.store.forget(id).await {
            tracing::error!(%error, "a record stays in the store");
        }
    }

    async fn take_over(self: &Arc<Self>, record: Record, machine: Machine) {
        let Ok(control) = HeaderValue::from_str(&record.control) else { return };
        let link = Link::new(machine.placement.transport.clone(), control);
        let terms = Terms {
            started: Moment::from_nanos(record.started),
            end: Moment::from_nanos(record.end),
            last_end: Moment::from_nanos(record.last_end),
            idle_timeout: record.idle_timeout_ms.map(Duration::from_millis),
            session: record.session_ms.map(Duration::from_millis),
        };
        let report = match tokio::time::timeout(REPORT_LIMIT, link.report()).await {
            Ok(Ok(report)) => GuestReport {
                sequence: report.sequence,
                idle_for: Duration::from_millis(report.idle_for_ms),
                counting: usize::try_from(report.counting).unwrap_or(usize::MAX),
            },
            Ok(Err(_)) | Err(_) => GuestReport { sequence: 0, idle_for: Duration::ZERO, counting: 0 },
        };
        let now = clock::now();
        // Larger than any epoch that the earlier supervisor can have used: it used one at most each quarter of a second.
        let epoch = now.as_nanos() / 1_000_000;
        // What was accepted once is read the same way again.
        let folder = self.setup.runs.join(&record.id);
        let settings = IdleSettings::parse(&record.metadata).unwrap_or_default();
        let mut lifetime = Lifetime::adopt(terms, &settings, epoch, report, UseMark::read(&folder, now), now);
        lifetime.note(now, "taken over by a restarted hostd");
        // Every live sandbox has a place, even if fewer are allowed now than before.
        let place = Arc::clone(&self.places).try_acquire_owned();
        let place = place.unwrap_or_else(|_| {
            self.places.add_permits(1);
            Arc::clone(&self.places)
                .try_acquire_owned()
                .unwrap_or_else(|_| unreachable!("a permit was just added"))
        });
        tracing::info!(sandbox = record.id, "took over a running sandbox");
        let trace = self.begin_trace(&record, &lifetime);
        self.enter(Sandbox::new(record, link, machine, lifetime, trace, UseMark::open(&folder)), place);
    }

    /// It ended while nobody looked: at its hard end if that is over, else by accident.
    async fn bury_lost(&self, record: Record, same_boot: bool) {
        let now = clock::now();
        let due = same_boot && now.as_nanos() >= record.last_end;
        let (reason, detail) = match (due, same_boot) {
            (true, _) => (EndReason::Lifetime, "its guard ended it while hostd was down".to_owned()),
            (false, true) => (EndReason::Crashed, "it ended while hostd was down".to_owned()),
            (false, false) => (EndReason::HostShutdown, "the host was rebooted".to_owned()),
        };
        let ended =
            if due { clock::wall_ms_of(Moment::from_nanos(record.last_end)) } else { clock::wall_ms() };
        let lived = u64::try_from(ended.saturating_sub(record.started_wall_ms)).unwrap_or(0);
        let tombstone = Arc::new(Tombstone {
            id: record.id,
            template: record.template,
            metadata: record.metadata,
            labels: record.labels,
            access_token: record.access_token,
            reason,
            detail: Some(detail),
            started_wall_ms: record.started_wall_ms,
            ended_wall_ms: ended,
            lived_ms: lived,
            idle_for_ms: 0,
            last_holds: Vec::new(),
            transitions: Vec::new(),
        });
        tracing::info!(sandbox = tombstone.id, %reason, "found a sandbox that had ended");
        self.bury(&tombstone);
        self.metrics.ended(reason);
        if let Err(error) = self.store.bury((*tombstone).clone()).await {
            tracing::error!(sandbox = tombstone.id, %error, "its tombstone is not on disk");
        }
        self.forget(tombstone.id.clone()).await;
    }

    /// Removes run folders that belong to nobody any more.
    fn remove_strays(&self) {
        let Ok(entries) = std::fs::read_dir(&self.setup.runs) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if self.read().live.contains_key(&name) {
                continue;
            }
            crate::runtime::guard::clean_up_after(&entry.path());
            if let Err(error) = std::fs::remove_dir_all(entry.path()) {
                tracing::warn!(folder = name, %error, "a stray run folder could not be removed");
            }
        }
    }
}
