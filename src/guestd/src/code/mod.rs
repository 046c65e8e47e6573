//! Running code cells: the server of port 49999 (contract: envd.md section 7), without a second server in the guest.
//!
//! [`Interpreter`] owns the contexts and the cells whose results are kept. Each context has one task and one kernel ([`context`]); the agent
//! speaks the Jupyter protocol to the kernel itself ([`link`], [`message`], [`zmtp`]), so that an image needs kernels and no more. `spec` finds
//! kernels, `kernel` starts them, `variables` is what the agent runs in them, `event` translates, `cell` keeps what came of a cell, `http`
//! is the wire.

mod cell;
mod context;
pub mod event;
mod hearing;
pub mod http;
mod kernel;
mod link;
pub mod message;
mod spec;
mod variables;
pub mod zmtp;

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use guestd_idle::HoldClass;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use crate::activity::{Activity, Gone};
use crate::identity::{Accounts, User};
use crate::settings::Settings;
use cell::{Budget, Cell, Request, State};
use context::{Context, Order};
use kernel::{Kernel, KernelState};
use spec::{Dialect, KernelSpec};

pub use kernel::Ground;

/// Where a context works when nobody says (contract: envd.md section 7.1).
const DIRECTORY: &str = "/home/user";

/// The languages that have a context from the start, where they have a kernel (contract: envd.md section 7.4).
const FIRST: [&str; 2] = ["python", "javascript"];

/// How many contexts there may be. A kernel takes tens of megabytes.
const CONTEXTS: usize = 256;

/// What is kept of cells that ended: so many, so much, so long.
const KEPT: usize = 64;
const KEPT_BYTES: u64 = 64 << 20;
const KEPT_FOR: Duration = Duration::from_secs(3600);

/// How many cells may be kept that have not ended.
const DETACHED: usize = 256;

/// How much memory must be free for a kernel to be started before anybody asks, in KiB; and for one more, once that has been handed out.
const FREE_FOR_FIRST: u64 = 192 * 1024;
const FREE_FOR_NEXT: u64 = 1024 * 1024;

/// Why a request is not carried out.
#[derive(Debug, thiserror::Error)]
pub enum CodeError {
    #[error("Only one of context_id or language can be provided")]
    Both,
    #[error("Context {0} not found")]
    NoContext(String),
    #[error("Execution {0} not found")]
    NoCell(String),
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    TooMany(String),
    /// No kernel could be had.
    #[error("{0}")]
    Kernel(String),
    /// The sandbox was released while the call waited.
    #[error("the sandbox was released")]
    Gone,
}

impl From<Gone> for CodeError {
    fn from(_: Gone) -> Self {
        Self::Gone
    }
}

/// Everything that an agent that takes this one's place needs.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct CodeState {
    contexts: Vec<ContextState>,
    defaults: Vec<(String, String)>,
}

#[derive(Debug, Serialize, Deserialize)]
struct ContextState {
    id: String,
    language: String,
    directory: PathBuf,
    kernel: Option<KernelState>,
}

impl CodeState {
    /// The kernels' processes.
    pub fn pids(&self) -> Vec<u32> {
        self.kernels().map(KernelState::pid).collect()
    }

    /// Their control groups.
    pub fn groups(&self) -> Vec<PathBuf> {
        self.kernels().filter_map(KernelState::group).cloned().collect()
    }

    fn kernels(&self) -> impl Iterator<Item = &KernelState> {
        self.contexts.iter().filter_map(|context| context.kernel.as_ref())
    }
}

/// A Python kernel that nobody has asked for yet.
#[derive(Debug, Default)]
struct Spare {
    /// Held while it is being started: the first to ask waits for that instead of starting another.
    kernel: tokio::sync::Mutex<Option<Kernel>>,
    first: AtomicBool,
}

/// All contexts of this agent.
#[derive(Debug)]
pub struct Interpreter {
    folders: Vec<PathBuf>,
    own_machine: bool,
    settings: Arc<Settings>,
    accounts: Arc<Accounts>,
    activity: Arc<Activity>,
    ground: Ground,
    contexts: Mutex<Vec<Arc<Context>>>,
    /// The default context of each language, by id. Held while one is being made.
    defaults: tokio::sync::Mutex<BTreeMap<String, String>>,
    cells: Mutex<VecDeque<Arc<Cell>>>,
    budget: Arc<Budget>,
    spare: Spare,
    /// Kernels that are being started: more at once only slow each other down.
    starts: Semaphore,
    starting: AtomicUsize,
}

/// Where the interpreter finds things.
#[derive(Debug)]
pub struct Place {
    pub folders: Vec<PathBuf>,
    /// The first `/init` says who the user is.
    pub own_machine: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The customary folders, where an agent is told nothing else.
pub fn customary_folders() -> Vec<PathBuf> {
    spec::FOLDERS.map(PathBuf::from).into()
}

/// A UUID of version 4 (RFC 9562): what kernels' ids are, and clients may check.
fn uuid() -> Result<String, CodeError> {
    let mut text = link::random().map_err(|error| CodeError::Kernel(format!("no randomness: {error}")))?;
    text.replace_range(12..13, "4");
    let variant = match text.as_bytes().get(16) {
        Some(b'0' | b'4' | b'8' | b'c') => "8",
        Some(b'1' | b'5' | b'9' | b'd') => "9",
        Some(b'2' | b'6' | b'a' | b'e') => "a",
        _ => "b",
    };
    text.replace_range(16..17, variant);
    for place in [20, 16, 12, 8] {
        text.insert(place, '-');
    }
    Ok(text)
}

impl Interpreter {
    pub fn new(
        place: Place,
        (settings, accounts): (Arc<Settings>, Arc<Accounts>),
        activity: Arc<Activity>,
        ground: Ground,
    ) -> Arc<Self> {
        let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        Arc::new(Self {
            folders: place.folders,
            own_machine: place.own_machine,
            settings,
            accounts,
            activity,
            ground,
            contexts: Mutex::default(),
            defaults: tokio::sync::Mutex::default(),
            cells: Mutex::default(),
            budget: Arc::default(),
            spare: Spare::default(),
            starts: Semaphore::new(cores.max(2)),
            starting: AtomicUsize::new(0),
        })
    }

    /// Starts a Python kernel before anybody asks, if the image has one and the machine has room.
    pub async fn start_ahead(self: Arc<Self>) {
        self.spare.first.store(true, Ordering::Relaxed);
        let mut slot = self.spare.kernel.lock().await;
        if self.own_machine {
            self.settings.first_change().await;
        }
        *slot = self.another(FREE_FOR_FIRST).await;
        drop(slot);
        self.spare.first.store(false, Ordering::Relaxed);
    }

    async fn another(&self, free: u64) -> Option<Kernel> {
        let Ok(spec) = self.find("python") else { return None };
        let available = available_memory();
        if available < free {
            tracing::info!(available_kib = available, "no kernel is started ahead: memory is short");
            return None;
        }
        match self.launch(spec, self.directory(None).ok()?).await {
            Ok(kernel) => Some(kernel),
            Err(error) => {
                tracing::warn!(error, "no kernel was started ahead");
                None
            }
        }
    }

    fn find(&self, language: &str) -> Result<KernelSpec, CodeError> {
        spec::find(&self.folders, language).map_err(|error| CodeError::Kernel(error.to_string()))
    }

    fn user(&self) -> Result<User, String> {
        self.accounts.user(&self.settings.snapshot().default_user).map_err(|error| error.to_string())
    }

    /// Where a context works: what its client says, or the customary place, or the user's home where that is not.
    fn directory(&self, given: Option<&str>) -> Result<PathBuf, CodeError> {
        let Some(given) = given else {
            let customary = self
                .settings
                .snapshot()
                .default_workdir
                .map_or_else(|| PathBuf::from(DIRECTORY), PathBuf::from);
            if customary.is_dir() {
                return Ok(customary);
            }
            return self.user().map(|user| user.home).map_err(CodeError::Kernel);
        };
        let path = Path::new(given);
        if !path.is_absolute() || given.contains('\0') {
            return Err(CodeError::Invalid(format!("cwd: {given:?} is not an absolute path")));
        }
        if !path.is_dir() {
            return Err(CodeError::Invalid(format!("cwd: the directory {given:?} does not exist")));
        }
        Ok(path.to_owned())
    }

    async fn launch(&self, spec: KernelSpec, directory: PathBuf) -> Result<Kernel, String> {
        let _counted = Counted::new(&self.starting);
        let _turn = self.starts.acquire().await.map_err(|error| error.to_string())?;
        let user = self.user()?;
        let values = self.settings.snapshot();
        Kernel::start(spec, user, directory, &values, &self.ground).await.map_err(|error| error.to_string())
    }

    /// A kernel for a context: the one that was started ahead, or a new one.
    async fn kernel(self: &Arc<Self>, context: &Context) -> Result<Kernel, String> {
        if context.language == "python"
            && let Some(kernel) = self.take_spare().await
        {
            return Ok(kernel);
        }
        let spec = self.find(&context.language).map_err(|error| error.to_string())?;
        self.launch(spec, context.directory.clone()).await
    }

    async fn take_spare(self: &Arc<Self>) -> Option<Kernel> {
        let mut slot = if self.spare.first.load(Ordering::Relaxed) {
            self.spare.kernel.lock().await
        } else {
            self.spare.kernel.try_lock().ok()?
        };
        let mut kernel = slot.take()?;
        if kernel.has_ended().await || self.user().ok().as_ref() != Some(&kernel.user) {
            drop(slot);
            kernel.end().await;
            return None;
        }
        drop(slot);
        let again = Arc::clone(self);
        tokio::spawn(async move {
            if let Ok(mut slot) = again.spare.kernel.try_lock()
                && slot.is_none()
            {
                *slot = again.another(FREE_FOR_NEXT).await;
            }
        });
        Some(kernel)
    }

    async fn resume(&self, context: &Context, state: KernelState) -> Result<Kernel, String> {
        let spec = self.find(&context.language).map_err(|error| error.to_string())?;
        Kernel::resume(spec, state).await.map_err(|error| error.to_string())
    }

    /// All contexts, oldest first; those of the first languages are there before anybody asks.
    pub async fn contexts(self: &Arc<Self>) -> Vec<Arc<Context>> {
        let mut defaults = self.defaults.lock().await;
        for language in FIRST {
            if !defaults.contains_key(language)
                && let Ok(spec) = self.find(language)
                && let Ok(directory) = self.directory(None)
                && let Ok(context) = self.create(language, spec.dialect, directory)
            {
                defaults.insert(language.to_owned(), context.id.clone());
            }
        }
        drop(defaults);
        lock(&self.contexts).clone()
    }

    fn create(
        self: &Arc<Self>,
        language: &str,
        dialect: Dialect,
        directory: PathBuf,
    ) -> Result<Arc<Context>, CodeError> {
        let id = uuid()?;
        let mut contexts = lock(&self.contexts);
        if contexts.len() >= CONTEXTS {
            return Err(CodeError::TooMany(format!(
                "there are {CONTEXTS} contexts already: delete one first"
            )));
        }
        let context = context::create(self, (id, language.to_owned()), dialect, directory, None);
        contexts.push(Arc::clone(&context));
        Ok(context)
    }

    fn by_id(&self, id: &str) -> Result<Arc<Context>, CodeError> {
        lock(&self.contexts)
            .iter()
            .find(|context| context.id == id)
            .cloned()
            .ok_or_else(|| CodeError::NoContext(id.chars().take(100).collect()))
    }

    /// The default context of a language; made when it is asked for the first time, or after it was deleted.
    async fn default_of(self: &Arc<Self>, language: &str) -> Result<Arc<Context>, CodeError> {
        self.contexts().await;
        let mut defaults = self.defaults.lock().await;
        if let Some(context) = defaults.get(language).and_then(|id| self.by_id(id).ok()) {
            return Ok(context);
        }
        let spec = self.find(language)?;
        let context = self.create(language, spec.dialect, self.directory(None)?)?;
        defaults.insert(language.to_owned(), context.id.clone());
        Ok(context)
    }

    /// Makes a context, with its kernel.
    ///
    /// # Errors
    /// [`CodeError`]; nothing is left behind.
    pub async fn add(
        self: &Arc<Self>,
        language: &str,
        directory: Option<&str>,
    ) -> Result<Arc<Context>, CodeError> {
        self.contexts().await;
        let language = spec::normalised(language);
        let spec = self.find(&language)?;
        let context = self.create(&language, spec.dialect, self.directory(directory)?)?;
        match context.order(Order::Start).await {
            Ok(()) => Ok(context),
            Err(error) => {
                let _gone = self.delete(&context.id).await;
                Err(CodeError::Kernel(error))
            }
        }
    }

    /// # Errors
    /// [`CodeError`].
    pub async fn restart(self: &Arc<Self>, id: &str) -> Result<(), CodeError> {
        self.contexts().await;
        self.by_id(id)?.order(Order::Restart).await.map_err(CodeError::Kernel)
    }

    /// # Errors
    /// [`CodeError::NoContext`].
    pub async fn interrupt(self: &Arc<Self>, id: &str) -> Result<(), CodeError> {
        self.contexts().await;
        self.by_id(id)?.interrupt().await;
        Ok(())
    }

    /// # Errors
    /// [`CodeError`].
    pub async fn delete(self: &Arc<Self>, id: &str) -> Result<(), CodeError> {
        self.contexts().await;
        let context = self.by_id(id)?;
        // Not found by anybody from here on.
        lock(&self.contexts).retain(|known| known.id != id);
        context.order(Order::Delete).await.map_err(CodeError::Kernel)
    }

    /// Takes code in: the cell runs when its turn comes.
    ///
    /// # Errors
    /// [`CodeError`]; nothing runs then.
    pub async fn submit(
        self: &Arc<Self>,
        context: Option<&str>,
        language: Option<&str>,
        request: Request,
        kept: bool,
    ) -> Result<Arc<Cell>, CodeError> {
        let context = match (context, language) {
            (Some(_), Some(_)) => return Err(CodeError::Both),
            (Some(id), None) => {
                self.contexts().await;
                self.by_id(id)?
            }
            (None, language) => self.default_of(&spec::normalised(language.unwrap_or_default())).await?,
        };
        if let Some(refusal) = variables::refusal(context.dialect, &request.variables) {
            return Err(CodeError::Invalid(refusal));
        }
        let origin = format!("code cell ({}) {}", context.language, first_line(&request.code));
        let hold = self.activity.admit(HoldClass::Code, &origin).await?;
        // Whoever cannot have a kernel is told before the stream begins.
        context.order(Order::Start).await.map_err(CodeError::Kernel)?;
        let named = (context.id.clone(), context.language.clone());
        let cell = Cell::new(uuid()?, named, request, kept, hold, Arc::clone(&self.budget));
        if kept {
            self.make_room()?;
        }
        context.submit(Arc::clone(&cell)).map_err(|why| CodeError::TooMany(why.to_owned()))?;
        if kept {
            lock(&self.cells).push_back(Arc::clone(&cell));
        }
        Ok(cell)
    }

    /// Makes room for one more cell.
    fn make_room(&self) -> Result<(), CodeError> {
        self.trim(KEPT - 1);
        let running = lock(&self.cells).iter().filter(|cell| cell.progress().state != State::Done).count();
        if running >= DETACHED {
            return Err(CodeError::TooMany(format!("{DETACHED} executions wait or run already")));
        }
        Ok(())
    }

    /// Forgets the oldest cells that ended until `count` are left and no more than the limits allow.
    fn trim(&self, count: usize) {
        let mut cells = lock(&self.cells);
        cells.retain(|cell| cell.ended_for().is_none_or(|ago| ago < KEPT_FOR));
        let is_done = |cell: &Arc<Cell>| cell.progress().state == State::Done;
        loop {
            let ended: Vec<_> = cells.iter().filter(|cell| is_done(cell)).collect();
            let bytes: u64 = ended.iter().map(|cell| cell.size()).sum();
            if ended.len() <= count && bytes <= KEPT_BYTES {
                return;
            }
            let Some(oldest) = cells.iter().position(is_done) else { return };
            cells.remove(oldest);
        }
    }

    /// Forgets what is beyond the limits.
    fn forget_old(&self) {
        self.trim(KEPT);
    }

    /// The cells whose results are kept, oldest first.
    pub fn cells(&self) -> Vec<Arc<Cell>> {
        self.trim(KEPT);
        lock(&self.cells).iter().cloned().collect()
    }

    /// # Errors
    /// [`CodeError::NoCell`].
    pub fn cell(&self, id: &str) -> Result<Arc<Cell>, CodeError> {
        let known = self.cells().into_iter().find(|cell| cell.id == id);
        known.ok_or_else(|| CodeError::NoCell(id.chars().take(100).collect()))
    }

    /// Stops a cell if it has not ended, and forgets it.
    ///
    /// # Errors
    /// [`CodeError::NoCell`].
    pub fn forget(&self, id: &str) -> Result<(), CodeError> {
        let cell = self.cell(id)?;
        cell.stop();
        lock(&self.cells).retain(|known| known.id != id);
        Ok(())
    }

    /// Interrupts a cell, or takes it out of the queue.
    ///
    /// # Errors
    /// [`CodeError::NoCell`].
    pub async fn interrupt_cell(&self, id: &str) -> Result<(), CodeError> {
        let cell = self.cell(id)?;
        match cell.progress().state {
            State::Running => {
                if let Ok(context) = self.by_id(&cell.context) {
                    context.interrupt().await;
                }
            }
            State::Queued => {
                cell.say(&event::error("KeyboardInterrupt", "interrupted before it ran"));
                cell.stop();
            }
            State::Done => {}
        }
        Ok(())
    }

    /// Everything as it is; None while a cell waits or runs or a kernel is being started: what a kernel says meanwhile would be lost.
    pub fn export(&self) -> Option<CodeState> {
        if self.starting.load(Ordering::Relaxed) > 0 || self.budget.live.load(Ordering::Relaxed) > 0 {
            return None;
        }
        let defaults = self.defaults.try_lock().ok()?.clone().into_iter().collect();
        let contexts = lock(&self.contexts)
            .iter()
            .map(|context| ContextState {
                id: context.id.clone(),
                language: context.language.clone(),
                directory: context.directory.clone(),
                kernel: context.state(),
            })
            .collect();
        Some(CodeState { contexts, defaults })
    }

    /// Goes on with the contexts of the agent before this one.
    pub async fn restore(self: &Arc<Self>, state: CodeState) {
        *self.defaults.lock().await = state.defaults.into_iter().collect();
        for ContextState { id, language, directory, kernel } in state.contexts {
            let dialect = self.find(&language).map_or(Dialect::Other, |spec| spec.dialect);
            let context = context::create(self, (id, language), dialect, directory, kernel);
            lock(&self.contexts).push(context);
        }
    }
}

/// Counts for as long as it lives.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(counter: &'a AtomicUsize) -> Self {
        counter.fetch_add(1, Ordering::Relaxed);
        Self(counter)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn first_line(code: &str) -> String {
    code.lines().find(|line| !line.trim().is_empty()).unwrap_or_default().trim().chars().take(80).collect()
}

/// In KiB; nothing where the kernel does not tell. proc_meminfo(5).
fn available_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    line.and_then(|rest| rest.trim().strip_suffix(" kB")?.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_a_uuid_of_version_4() {
        for _ in 0..100 {
            let id = uuid().unwrap();
            let parts: Vec<_> = id.split('-').map(str::len).collect();
            assert_eq!(parts, [8, 4, 4, 4, 12], "{id}");
            assert!(id[14..15] == *"4" && "89ab".contains(&id[19..20]), "{id}");
        }
        assert_ne!(uuid().unwrap(), uuid().unwrap());
    }

    #[test]
    fn the_blame_shows_the_first_line_of_a_cell_and_not_all_of_it() {
        assert_eq!(first_line("\n  \n  x = 1\ny = 2"), "x = 1");
        assert_eq!(first_line(&"é".repeat(1000)).chars().count(), 80);
        assert_eq!(first_line(""), "");
    }
}
