//! The life of each sandbox: who is in it, when it ends, and what is known afterwards.
//!
//! [`Sandboxes`] owns the table of live sandboxes and of tombstones. Each live one has a task (`driver`) that carries out what the pure
//! rules of `guestd_idle` say; the proxy and the API only take holds and change terms. `create` brings a sandbox up, `adopt` finds those
//! that an earlier hostd left, `explain` says why one is alive or gone.

mod adopt;
pub mod create;
mod driver;
pub mod explain;
pub mod upgrade;
mod use_mark;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use guestd_idle::{EndReason, HoldClass, HoldId, IdleSettings, Lifetime, Limits, Moment};
use guestd_protocol::wire::activity::v1 as wire;
use subtle::ConstantTimeEq;
use tokio::sync::{Notify, Semaphore, watch};

use crate::clock;
use crate::link::Link;
use crate::logs::{Ended, SandboxLog};
use crate::metrics::Metrics;
use crate::runtime::{Images, Machine, Runtime, Size};
use crate::store::{Record, Store, Tombstone};
use crate::trace::{Event, Trace};
use use_mark::UseMark;

/// How long a tombstone is kept (DESIGN.md section 4, rule 7).
const TOMBSTONE_LIFE: Duration = Duration::from_secs(3600);

/// How long a kill waits for its tombstone to be on disk.
const BURIAL_LIMIT: Duration = Duration::from_secs(10);

/// One live sandbox.
#[derive(Debug)]
pub struct Sandbox {
    pub record: Record,
    pub link: Link,
    pub log: Arc<SandboxLog>,
    machine: Machine,
    lifetime: Mutex<Lifetime>,
    /// The agent's newest report and when it came, for the explain view.
    report: Mutex<Option<(Moment, wire::Report)>>,
    trace: Option<Arc<Trace>>,
    use_mark: UseMark,
    /// Wakes the driver.
    changed: Notify,
    /// What a new agent said that it took over from the one before it, until somebody asks.
    handover: Mutex<Option<String>>,
    /// Turns true when its tombstone is on disk.
    buried: watch::Sender<bool>,
    /// Turns true when the sandbox is over: proxied connections are cut.
    over: watch::Sender<bool>,
}

impl Sandbox {
    fn new(
        record: Record,
        link: Link,
        machine: Machine,
        lifetime: Lifetime,
        trace: Option<Arc<Trace>>,
        use_mark: UseMark,
    ) -> Arc<Self> {
        Arc::new(Self {
            record,
            link,
            log: Arc::default(),
            handover: Mutex::default(),
            machine,
            lifetime: Mutex::new(lifetime),
            report: Mutex::default(),
            trace,
            use_mark,
            changed: Notify::new(),
            buried: watch::Sender::new(false),
            over: watch::Sender::new(false),
        })
    }

    pub fn lifetime(&self) -> MutexGuard<'_, Lifetime> {
        self.lifetime.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the terms and wakes the driver.
    pub fn change<T>(&self, change: impl FnOnce(&mut Lifetime) -> T) -> T {
        let result = change(&mut self.lifetime());
        self.changed.notify_one();
        result
    }

    /// Changes the host's own holds: the driver learns of it, and a supervisor that comes after this one.
    fn change_hold(&self, change: impl FnOnce(&mut Lifetime)) {
        self.change(|lifetime| {
            change(lifetime);
            self.use_mark.write(lifetime.host_ledger(), true);
        });
    }

    /// Takes a hold for a request that is being proxied.
    ///
    /// # Errors
    /// When the sandbox has ended.
    pub fn admit(self: &Arc<Self>, class: HoldClass, origin: &str) -> Result<HostHold, EndReason> {
        let id = self.change(|lifetime| lifetime.admit(class, origin, clock::now()))?;
        self.trace(|| Event::Hold {
            id: id.get(),
            class: class.name().to_owned(),
            origin: origin.to_owned(),
        });
        Ok(HostHold { sandbox: Arc::clone(self), id })
    }

    /// Writes a line of the trace, if there is one.
    fn trace(&self, event: impl FnOnce() -> Event) {
        if let Some(trace) = &self.trace {
            trace.say(clock::now(), event());
        }
    }

    /// Writes down a use without duration: an SDK's `connect`.
    pub fn trace_touch(&self, origin: &str) {
        let class = HoldClass::Connect.name().to_owned();
        self.trace(|| Event::Touched { class, origin: origin.to_owned() });
    }

    /// Writes down that the hard end moved.
    fn trace_end(&self) {
        let end_ms = {
            let lifetime = self.lifetime();
            millis(lifetime.terms().end.since(lifetime.terms().started))
        };
        self.trace(|| Event::End { end_ms });
    }

    /// The end of what its console said, at most so many bytes. Reads a file.
    pub fn console(&self, limit: usize) -> Option<String> {
        self.machine.console(limit)
    }

    /// Resolves when the sandbox is over.
    pub async fn over(&self) {
        let mut over = self.over.subscribe();
        // The sender lives as long as the sandbox, so this ends only when it is over.
        let _over = over.wait_for(|over| *over).await;
    }

    /// The deadline that clients see: as far from the start that they see as it really is, however the wall clock is set.
    pub fn end_wall_ms(&self) -> i64 {
        let lifetime = self.lifetime();
        let length = lifetime.terms().end.since(lifetime.terms().started);
        self.record.started_wall_ms.saturating_add(i64::try_from(length.as_millis()).unwrap_or(i64::MAX))
    }
}

/// A proxied request's hold; dropping it ends it.
#[derive(Debug)]
pub struct HostHold {
    sandbox: Arc<Sandbox>,
    id: HoldId,
}

impl HostHold {
    /// The caller may call: from now on the request is use.
    pub fn confirm(&self) {
        self.sandbox.change_hold(|lifetime| lifetime.confirm(self.id, clock::now()));
        self.sandbox.trace(|| Event::Confirmed { id: self.id.get() });
    }

    /// Bytes passed on an upgraded connection.
    pub fn progress(&self, bytes: u64) {
        let mut lifetime = self.sandbox.lifetime();
        lifetime.progress(self.id, bytes, clock::now());
        self.sandbox.use_mark.write(lifetime.host_ledger(), false);
        drop(lifetime);
        self.sandbox.trace(|| Event::Progress { id: self.id.get() });
    }

    /// From being open to being used: an upgraded connection counts at each byte only.
    pub fn reclass(&self, class: HoldClass) {
        self.sandbox.change_hold(|lifetime| lifetime.reclass(self.id, class, clock::now()));
        let class = class.name().to_owned();
        self.sandbox.trace(|| Event::Reclassed { id: self.id.get(), class });
    }
}

impl Drop for HostHold {
    fn drop(&mut self) {
        self.sandbox.change_hold(|lifetime| lifetime.release_hold(self.id, clock::now()));
        self.sandbox.trace(|| Event::Dropped { id: self.id.get() });
    }
}

fn millis(length: Duration) -> u64 {
    u64::try_from(length.as_millis()).unwrap_or(u64::MAX)
}

/// What a name or a token leads to.
#[derive(Clone, Debug)]
pub enum Found {
    Live(Arc<Sandbox>),
    Gone(Arc<Tombstone>),
}

#[derive(Debug, Default)]
struct Table {
    live: HashMap<String, Arc<Sandbox>>,
    gone: HashMap<String, Arc<Tombstone>>,
}

/// How sandboxes are run on this host.
#[derive(Debug)]
pub struct Setup {
    pub limits: Limits,
    pub size: Size,
    pub images: Arc<Images>,
    pub runtime: Box<dyn Runtime>,
    /// The folder of run folders.
    pub runs: std::path::PathBuf,
    /// How many sandboxes may be alive at once.
    pub max_sandboxes: usize,
    /// How long inhibitors may hold a sandbox in all.
    pub inhibitor_budget: Duration,
    /// The folder for traces of what happens.
    pub idle_trace: Option<std::path::PathBuf>,
    /// For tests: a pause in each window of the two-phase release.
    pub release_pause: Duration,
}

/// All sandboxes of this host.
#[derive(Debug)]
pub struct Sandboxes {
    pub setup: Setup,
    pub store: Store,
    pub metrics: Metrics,
    pub ended_logs: Ended,
    /// Told of each sandbox that is entered or left.
    pub came_or_went: Notify,
    table: RwLock<Table>,
    /// Boots under way: more at once than processors only make each slower.
    boots: Semaphore,
    /// A place for each sandbox, from its create to its end.
    places: Arc<Semaphore>,
    /// The supervisor is on its way out: nothing new begins.
    closing: AtomicBool,
}

impl Sandboxes {
    pub fn new(setup: Setup, store: Store, metrics: Metrics) -> Arc<Self> {
        let boots = std::thread::available_parallelism().map_or(2, |cores| cores.get().max(2));
        Arc::new(Self {
            places: Arc::new(Semaphore::new(setup.max_sandboxes)),
            closing: AtomicBool::new(false),
            boots: Semaphore::new(boots),
            table: RwLock::default(),
            ended_logs: Ended::default(),
            came_or_went: Notify::new(),
            setup,
            store,
            metrics,
        })
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// A live sandbox. One that is over but whose machine is still being ended is not live.
    pub fn live(&self, id: &str) -> Option<Arc<Sandbox>> {
        let sandbox = self.read().live.get(id).cloned()?;
        let over = sandbox.lifetime().ended().is_some();
        (!over).then_some(sandbox)
    }

    pub fn all_live(&self) -> Vec<Arc<Sandbox>> {
        let all: Vec<_> = self.read().live.values().cloned().collect();
        all.into_iter().filter(|sandbox| sandbox.lifetime().ended().is_none()).collect()
    }

    pub fn find(&self, id: &str) -> Option<Found> {
        let table = self.read();
        // The tombstone first: once it is there, it is the truth, though the machine may still be on its way out.
        let gone = table.gone.get(id).cloned().map(Found::Gone);
        gone.or_else(|| table.live.get(id).cloned().map(Found::Live))
    }

    /// Whose token this is. Looks at all of them in constant time each.
    pub fn find_by_token(&self, token: &[u8]) -> Option<Found> {
        let same = |other: &str| bool::from(other.as_bytes().ct_eq(token));
        self.find_where(|found| match found {
            Found::Live(sandbox) => same(&sandbox.record.access_token),
            Found::Gone(tombstone) => same(&tombstone.access_token),
        })
    }

    /// The first sandbox, live ones first, for which `wanted` holds.
    pub fn find_where(&self, wanted: impl Fn(&Found) -> bool) -> Option<Found> {
        let table = self.read();
        let live = table.live.values().cloned().map(Found::Live);
        let gone = table.gone.values().cloned().map(Found::Gone);
        live.chain(gone).find(wanted)
    }

    pub fn tombstones(&self) -> Vec<Arc<Tombstone>> {
        let mut all: Vec<_> = self.read().gone.values().cloned().collect();
        all.sort_by_key(|tombstone| std::cmp::Reverse(tombstone.ended_wall_ms));
        all
    }

    /// Ends a sandbox; false when it has ended already. Nothing brings it back once this returns, a crash of the supervisor included.
    pub async fn kill(&self, sandbox: &Sandbox) -> bool {
        let killed = sandbox.change(|lifetime| lifetime.kill(clock::now()));
        let mut buried = sandbox.buried.subscribe();
        // A disk that does not answer must not hold the caller for ever; the end itself goes on.
        let _slow_disk = tokio::time::timeout(BURIAL_LIMIT, buried.wait_for(|buried| *buried)).await;
        killed
    }

    /// Refuses new ones, ends all, those that are just coming up included, and waits until their machines are gone.
    pub async fn end_all(&self, reason: EndReason) {
        self.closing.store(true, Ordering::SeqCst);
        loop {
            let live: Vec<_> = self.read().live.values().cloned().collect();
            for sandbox in &live {
                sandbox.change(|lifetime| lifetime.end(reason, clock::now()));
            }
            if live.is_empty() && self.places.available_permits() >= self.setup.max_sandboxes {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The trace of a sandbox with these terms, if traces are written. A disk that fails costs the trace, not the sandbox.
    fn begin_trace(&self, record: &Record, lifetime: &Lifetime) -> Option<Arc<Trace>> {
        let folder = self.setup.idle_trace.as_ref()?;
        let terms = lifetime.terms();
        let trace = Trace::begin(folder, &record.id, terms.started)
            .inspect_err(|error| tracing::error!(sandbox = record.id, %error, "no trace can be written"))
            .ok()?;
        let started = Event::Started {
            sandbox: record.id.clone(),
            idle_timeout_ms: terms.idle_timeout.map(millis),
            end_ms: millis(terms.end.since(terms.started)),
            policy: IdleSettings::parse(&record.metadata).unwrap_or_default().policy.words(),
        };
        trace.say(terms.started, started);
        Some(trace)
    }

    /// Enters a sandbox that runs, and starts its driver.
    fn enter(self: &Arc<Self>, sandbox: Arc<Sandbox>, place: tokio::sync::OwnedSemaphorePermit) {
        self.write().live.insert(sandbox.record.id.clone(), Arc::clone(&sandbox));
        self.metrics.running.inc();
        self.came_or_went.notify_one();
        let sandboxes = Arc::clone(self);
        tokio::spawn(async move {
            driver::drive(&sandboxes, &sandbox).await;
            drop(place);
        });
    }

    /// Makes the tombstone known before the machine is ended: from now on every question has its answer.
    fn bury(&self, tombstone: &Arc<Tombstone>) {
        let mut table = self.write();
        table.gone.insert(tombstone.id.clone(), Arc::clone(tombstone));
    }

    fn leave(&self, id: &str) {
        if self.write().live.remove(id).is_some() {
            self.metrics.running.dec();
            self.came_or_went.notify_one();
        }
    }

    /// Forgets tombstones that are old enough.
    pub async fn expire_tombstones(&self) {
        let life = i64::try_from(TOMBSTONE_LIFE.as_millis()).unwrap_or(i64::MAX);
        let before = clock::wall_ms().saturating_sub(life);
        self.ended_logs.expire(before);
        self.write().gone.retain(|_, tombstone| tombstone.ended_wall_ms >= before);
        if let Err(error) = self.store.expire(before).await {
            tracing::error!(%error, "old tombstones stay in the store");
        }
    }
}
