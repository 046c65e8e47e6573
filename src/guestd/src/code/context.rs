//! One context: a kernel, and the cells that wait for it.
//!
//! Each context has one task ([`Driver`]) that owns its kernel and runs one cell after the other. A kernel that dies or does not obey is
//! replaced, and whoever depended on what it knew is told.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::cell::Cell;
use super::event;
use super::hearing::{Hearing, lost, rest};
use super::kernel::{Kernel, KernelState};
use super::link::Channel;
use super::spec::Dialect;
use super::{Interpreter, variables};

/// How many cells may wait in one context.
const QUEUE: usize = 256;

/// How long an interrupted kernel has before it is told again, and before it is replaced. Under emulation a traceback takes seconds.
const TELL_AGAIN: Duration = Duration::from_secs(2);
const GIVE_UP: Duration = Duration::from_secs(10);

/// How long a kernel may be silent before the second half of a cell's end: the reply and the idle state come on different sockets, and some kernels
/// forget one.
pub const SETTLE: Duration = Duration::from_secs(2);

/// How long the second half is waited for while the kernel still talks: what it has printed may be far behind its reply.
const HEAR_OUT: Duration = Duration::from_secs(120);

/// How long the agent's own code may take in a kernel.
const OWN_LIMIT: Duration = Duration::from_secs(30);

/// A reply to who waits; the error is a text for people.
pub type Reply = oneshot::Sender<Result<(), String>>;

#[derive(Debug)]
pub enum Order {
    /// Have a kernel.
    Start(Reply),
    Restart(Reply),
    Interrupt,
    Delete(Reply),
}

/// A context as others see it.
#[derive(Debug)]
pub struct Context {
    pub id: String,
    pub language: String,
    pub dialect: Dialect,
    pub directory: PathBuf,
    queue: mpsc::Sender<Arc<Cell>>,
    orders: mpsc::Sender<Order>,
    /// How its kernel is found by the agent after this one.
    state: Mutex<Option<KernelState>>,
}

impl Context {
    /// Puts a cell at the end of the queue; gives it back when there is no room.
    ///
    /// # Errors
    /// When too many wait, or the context is being deleted.
    pub fn submit(&self, cell: Arc<Cell>) -> Result<(), &'static str> {
        self.queue.try_send(cell).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => "too many cells wait in this context",
            mpsc::error::TrySendError::Closed(_) => "the context was deleted",
        })
    }

    /// Has the driver do something, and waits for it.
    ///
    /// # Errors
    /// A text for people.
    pub async fn order(&self, order: impl FnOnce(Reply) -> Order) -> Result<(), String> {
        let (reply, answer) = oneshot::channel();
        let gone = || "the context was deleted".to_owned();
        self.orders.send(order(reply)).await.map_err(|_| gone())?;
        answer.await.unwrap_or_else(|_| Err(gone()))
    }

    /// Interrupts what runs, if anything does.
    pub async fn interrupt(&self) {
        let _deleted = self.orders.send(Order::Interrupt).await;
    }

    fn set_state(&self, state: Option<KernelState>) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// How its kernel is found by the agent after this one.
    pub fn state(&self) -> Option<KernelState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Makes a context and its task.
pub fn create(
    interpreter: &Arc<Interpreter>,
    (id, language): (String, String),
    dialect: Dialect,
    directory: PathBuf,
    resumed: Option<KernelState>,
) -> Arc<Context> {
    let (queue, cells) = mpsc::channel(QUEUE);
    let (orders, incoming) = mpsc::channel(16);
    let context =
        Arc::new(Context { id, language, dialect, directory, queue, orders, state: Mutex::default() });
    let driver = Driver {
        interpreter: Arc::clone(interpreter),
        context: Arc::clone(&context),
        kernel: None,
        cells,
        orders: incoming,
        waiting: Vec::new(),
        loss: None,
        used: false,
        deleted: None,
    };
    tokio::spawn(driver.drive(resumed));
    context
}

/// Why a request to a kernel did not run to its own end.
#[derive(Debug)]
pub enum Stop {
    /// The kernel is gone, with everything that it knew.
    Lost(String),
    Restart(Reply),
    Deleted,
}

/// Why a kernel is being interrupted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    ClientGone,
    TimedOut,
    Asked,
}

#[derive(Debug)]
struct Driver {
    interpreter: Arc<Interpreter>,
    context: Arc<Context>,
    kernel: Option<Kernel>,
    cells: mpsc::Receiver<Arc<Cell>>,
    orders: mpsc::Receiver<Order>,
    /// Who waits for a kernel that is being started.
    waiting: Vec<Reply>,
    /// Variables were lost, and nobody was told yet.
    loss: Option<String>,
    /// A cell ran since the kernel was started.
    used: bool,
    deleted: Option<Reply>,
}

impl Driver {
    async fn drive(mut self, resumed: Option<KernelState>) {
        if let Some(state) = resumed {
            self.resume(state).await;
        }
        while self.deleted.is_none() {
            tokio::select! {
                cell = self.cells.recv() => match cell {
                    Some(cell) => self.run(&cell).await,
                    None => break,
                },
                order = self.orders.recv() => match order {
                    Some(order) => self.obey(order).await,
                    None => break,
                },
                why = rest(&mut self.kernel) => self.lost_at_rest(why).await,
            }
        }
        self.cells.close();
        self.drain("ExecutionAborted", "Execution was aborted: the context was deleted");
        self.drop_kernel().await;
        self.tell_waiting(&Err("the context was deleted".to_owned()));
        if let Some(reply) = self.deleted.take() {
            let _gone = reply.send(Ok(()));
        }
    }

    /// While no cell runs.
    async fn obey(&mut self, order: Order) {
        match order {
            Order::Interrupt => {}
            Order::Delete(reply) => self.deleted = Some(reply),
            Order::Start(reply) => {
                self.waiting.push(reply);
                let _told = self.ensure().await;
            }
            Order::Restart(reply) => self.restart(reply).await,
        }
    }

    async fn restart(&mut self, reply: Reply) {
        self.drain("ContextRestarting", "Context was restarted");
        self.drop_kernel().await;
        self.loss = None;
        self.waiting.push(reply);
        let _told = self.ensure().await;
    }

    /// Ends all cells that wait.
    fn drain(&mut self, name: &str, value: &str) -> usize {
        let mut count = 0;
        while let Ok(cell) = self.cells.try_recv() {
            if !cell.is_stopped() {
                count += 1;
            }
            cell.say(&event::error(name, value));
            cell.finish();
        }
        count
    }

    fn tell_waiting(&mut self, result: &Result<(), String>) {
        for reply in self.waiting.drain(..) {
            let _gone = reply.send(result.clone());
        }
    }

    async fn drop_kernel(&mut self) {
        self.context.set_state(None);
        if let Some(kernel) = self.kernel.take() {
            kernel.end().await;
        }
    }

    fn keep(&mut self, kernel: Kernel) {
        self.context.set_state(Some(kernel.export()));
        self.kernel = Some(kernel);
        self.used = false;
    }

    /// Has a kernel, and tells who waits. Orders are heard meanwhile.
    async fn ensure(&mut self) -> Result<(), String> {
        if self.kernel.is_none() && self.deleted.is_none() {
            let (interpreter, context) = (Arc::clone(&self.interpreter), Arc::clone(&self.context));
            let mut starting = std::pin::pin!(interpreter.kernel(&context));
            let started = loop {
                tokio::select! {
                    started = &mut starting => break started,
                    order = self.orders.recv() => match order {
                        Some(Order::Start(reply) | Order::Restart(reply)) => self.waiting.push(reply),
                        Some(Order::Interrupt) => {}
                        Some(Order::Delete(reply)) => {
                            self.deleted = Some(reply);
                            break Err("the context was deleted".to_owned());
                        }
                        None => break Err("the agent ends".to_owned()),
                    },
                }
            };
            match started {
                Ok(kernel) => {
                    self.keep(kernel);
                    self.move_in().await;
                }
                Err(error) => {
                    tracing::warn!(language = self.context.language, error, "no kernel");
                    self.tell_waiting(&Err(error.clone()));
                    return Err(error);
                }
            }
        }
        self.tell_waiting(&Ok(()));
        Ok(())
    }

    /// Makes a new kernel ready for cells. One that was started ahead may be somewhere else.
    async fn move_in(&mut self) {
        if let Some(code) = variables::prepare(self.context.dialect)
            && let Err(Stop::Restart(reply)) = self.own_code(&code).await
        {
            // It has just been started.
            self.waiting.push(reply);
        }
        let directory = self.context.directory.clone();
        if self.kernel.as_ref().is_none_or(|kernel| kernel.directory == directory) {
            return;
        }
        let Some(code) = variables::enter(self.context.dialect, &directory) else { return };
        match self.own_code(&code).await {
            Ok(()) => {}
            Err(Stop::Restart(reply)) => self.waiting.push(reply),
            Err(Stop::Lost(why)) => tracing::warn!(why, "a kernel was lost before its first cell"),
            Err(Stop::Deleted) => {}
        }
        if let Some(kernel) = &mut self.kernel {
            kernel.directory = directory;
            self.context.set_state(Some(kernel.export()));
        }
    }

    async fn resume(&mut self, state: KernelState) {
        let interpreter = Arc::clone(&self.interpreter);
        match interpreter.resume(&self.context, state).await {
            Ok(kernel) => self.keep(kernel),
            Err(error) => {
                tracing::warn!(
                    language = self.context.language,
                    error,
                    "a kernel of the agent before is lost"
                );
                self.loss = Some(error);
            }
        }
    }

    /// A kernel ended while nothing ran in it.
    async fn lost_at_rest(&mut self, why: String) {
        tracing::warn!(language = self.context.language, why, "a kernel ended while nothing ran in it");
        let was_used = self.used;
        self.drop_kernel().await;
        if was_used {
            self.loss = Some(why);
            let _told = self.ensure().await;
        }
    }

    async fn run(&mut self, cell: &Arc<Cell>) {
        if cell.is_stopped() {
            return cell.finish();
        }
        cell.begin();
        match self.steps(cell).await {
            Ok(()) => cell.finish(),
            Err(Stop::Lost(why)) => {
                let told = !cell.is_stopped();
                cell.finish();
                self.replace(&why, told).await;
            }
            Err(Stop::Restart(reply)) => {
                cell.say(&event::error("ContextRestarting", "Context was restarted"));
                cell.finish();
                self.restart(reply).await;
            }
            Err(Stop::Deleted) => {
                cell.say(&event::error("ExecutionAborted", "Execution was aborted: the context was deleted"));
                cell.finish();
            }
        }
        if cell.kept {
            self.interpreter.forget_old();
        }
    }

    /// Starts another kernel in place of one that was lost.
    async fn replace(&mut self, why: &str, told: bool) {
        tracing::warn!(language = self.context.language, why, "a kernel is replaced");
        let waited =
            self.drain("ContextRestarting", &format!("Context was restarted: {why}; its variables are lost"));
        self.drop_kernel().await;
        if !told && waited == 0 {
            self.loss = Some(why.to_owned());
        }
        let _told = self.ensure().await;
    }

    /// A cell from its first line to its last.
    async fn steps(&mut self, cell: &Arc<Cell>) -> Result<(), Stop> {
        if let Err(error) = self.ensure().await {
            if self.deleted.is_some() {
                return Err(Stop::Deleted);
            }
            cell.say(&event::error("KernelError", &error));
            return Ok(());
        }
        if let Some(why) = self.loss.take() {
            cell.say(&event::notice(&format!(
                "the kernel of this context was replaced: {why}; its variables are lost"
            )));
        }
        self.used = true;
        let own = |error: Stop| match error {
            Stop::Lost(why) => {
                cell.say(&event::error("KernelDied", &format!("{why}; its variables are lost")));
                Stop::Lost(why)
            }
            other => other,
        };
        self.refresh().await.map_err(own)?;
        let dialect = self.context.dialect;
        let given = &cell.request.variables;
        if let Some(code) = variables::set(dialect, given) {
            self.own_code(&code).await.map_err(own)?;
        }
        self.perform(&cell.request.code, Some(cell)).await?;
        // The client has its result; who comes next waits for this.
        cell.finish();
        if let Some(code) = variables::restore(dialect, given) {
            self.own_code(&code).await?;
        }
        Ok(())
    }

    /// Brings the variables of `/init` up to date.
    async fn refresh(&mut self) -> Result<(), Stop> {
        let wanted = self.interpreter.settings.snapshot().environment;
        let Some(kernel) = &self.kernel else { return Ok(()) };
        let changes = difference(&kernel.environment, &wanted);
        if let Some(code) = variables::change(self.context.dialect, &changes) {
            self.own_code(&code).await?;
        }
        if let Some(kernel) = self.kernel.as_mut().filter(|_| !changes.is_empty()) {
            kernel.environment = wanted;
            self.context.set_state(Some(kernel.export()));
        }
        Ok(())
    }

    /// Runs code of the agent's own, unseen.
    async fn own_code(&mut self, code: &str) -> Result<(), Stop> {
        self.perform(code, None).await
    }

    /// One request to the kernel. Without a cell, nothing is shown and its time is bounded.
    async fn perform(&mut self, code: &str, cell: Option<&Arc<Cell>>) -> Result<(), Stop> {
        let Self { kernel: Some(kernel), orders, context, .. } = self else {
            return Err(Stop::Lost("there is no kernel".to_owned()));
        };
        let request = serde_json::json!({
            "code": code,
            "silent": cell.is_none(),
            "store_history": cell.is_some(),
            "user_expressions": {},
            "allow_stdin": false,
            "stop_on_error": false,
        });
        let sent = kernel.link.send(Channel::Shell, "execute_request", &request.to_string()).await;
        let id = match sent {
            Ok(id) => id,
            Err(error) => return Err(lost(kernel, Some(&error), Hearing::of(String::new(), cell)).await),
        };
        let mut hearing = Hearing::of(id, cell);
        let limit = match cell {
            Some(cell) => cell.request.timeout.map(|timeout| Instant::now() + timeout),
            None => Some(Instant::now() + OWN_LIMIT),
        };
        let mut stopping: Option<(Why, Instant)> = None;
        let mut told_again = false;
        let mut settle: Option<Instant> = None;
        let mut heard_out: Option<Instant> = None;
        loop {
            let why = tokio::select! {
                // Not in order: a flood of output must not keep an order from being heard.
                received = kernel.link.receive() => {
                    match received {
                        Ok(said) => hearing.hear(&said),
                        Err(error) => return Err(lost(kernel, Some(&error), hearing).await),
                    }
                    if hearing.replied && hearing.idle {
                        break;
                    }
                    if hearing.replied || hearing.idle {
                        let last = *heard_out.get_or_insert_with(|| Instant::now() + HEAR_OUT);
                        settle = Some(last.min(Instant::now() + SETTLE));
                    }
                    continue;
                }
                _ended = kernel.service.wait() => return Err(lost(kernel, None, hearing).await),
                order = orders.recv() => match order {
                    Some(Order::Start(reply)) => {
                        let _gone = reply.send(Ok(()));
                        continue;
                    }
                    Some(Order::Restart(reply)) => return Err(Stop::Restart(reply)),
                    Some(Order::Delete(reply)) => {
                        self.deleted = Some(reply);
                        return Err(Stop::Deleted);
                    }
                    Some(Order::Interrupt) => Why::Asked,
                    None => return Err(Stop::Deleted),
                },
                () = gone(cell), if stopping.is_none_or(|(why, _)| why != Why::ClientGone) => Why::ClientGone,
                () = sleep(limit), if stopping.is_none() => Why::TimedOut,
                () = sleep(settle) => {
                    hearing.settled_half();
                    break;
                }
                // A kernel that replied has stopped, however much of its output is still to come.
                () = sleep(stopping.map(|(_, since)| since + if told_again { GIVE_UP } else { TELL_AGAIN })), if !hearing.replied => {
                    if told_again {
                        let why = format!("the kernel did not stop within {} s of an interrupt", GIVE_UP.as_secs());
                        if let Some(cell) = cell
                            && stopping.is_some_and(|(why, _)| why == Why::Asked)
                        {
                            cell.say(&event::error("ContextRestarting", &format!("Context was restarted: {why}; its variables are lost")));
                        }
                        return Err(Stop::Lost(why));
                    }
                    told_again = true;
                    if let Err(error) = kernel.interrupt().await {
                        return Err(lost(kernel, Some(&error), hearing).await);
                    }
                    continue;
                }
            };
            match why {
                // Nobody reads what it says from here on.
                Why::ClientGone => hearing.deaf = true,
                Why::TimedOut => {
                    if let Some(cell) = cell {
                        let after = cell.request.timeout.unwrap_or_default().as_secs_f64();
                        cell.say(&event::error(
                            "TimeoutError",
                            &format!("the cell ran for more than {after} s and was interrupted"),
                        ));
                    }
                    hearing.failed = true;
                }
                Why::Asked => {}
            }
            if stopping.is_none() {
                stopping = Some((why, Instant::now()));
                tracing::debug!(language = context.language, ?why, "interrupted");
                if let Err(error) = kernel.interrupt().await {
                    return Err(lost(kernel, Some(&error), hearing).await);
                }
            } else if let Some((known, _)) = &mut stopping {
                *known = why;
            }
        }
        if context.dialect == Dialect::Script && cell.is_some() {
            hearing.fence(kernel).await;
        }
        Ok(())
    }
}

async fn gone(cell: Option<&Arc<Cell>>) {
    match cell {
        Some(cell) => cell.stopped().await,
        None => std::future::pending().await,
    }
}

async fn sleep(until: Option<Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until).await,
        None => std::future::pending().await,
    }
}

/// What has to change for `now` to become `wanted`.
fn difference(now: &BTreeMap<String, String>, wanted: &BTreeMap<String, String>) -> variables::Change {
    let removed = now.keys().filter(|name| !wanted.contains_key(*name)).map(|name| (name.clone(), None));
    let set = wanted
        .iter()
        .filter(|(name, value)| now.get(*name) != Some(*value))
        .map(|(name, value)| (name.clone(), Some(value.clone())));
    removed.chain(set).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variable_that_init_took_back_goes_and_others_stay() {
        let of = |pairs: &[(&str, &str)]| {
            pairs.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect::<BTreeMap<_, _>>()
        };
        let changes = difference(
            &of(&[("A", "1"), ("B", "2"), ("C", "3")]),
            &of(&[("B", "2"), ("C", "4"), ("D", "5")]),
        );
        assert_eq!(
            changes,
            variables::Change::from([
                ("A".into(), None),
                ("C".into(), Some("4".into())),
                ("D".into(), Some("5".into()))
            ])
        );
    }
}
