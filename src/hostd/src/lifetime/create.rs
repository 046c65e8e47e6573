//! Bringing a sandbox up: boot, `/init`, and on disk before anybody hears of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use guestd_idle::terms::Asked;
use guestd_idle::{IdleSettings, Lifetime, PolicyError, TermsError};
use guestd_protocol::init::InitRequest;
use http::HeaderValue;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::use_mark::UseMark;
use super::{Sandbox, Sandboxes};
use crate::clock;
use crate::ids;
use crate::link::{Hello, Link, LinkError};
use crate::runtime::{self, Image, ImageError, Machine, StartError};
use crate::store::{Record, Stage, StoreError};

/// The pause between two tries to reach an agent that is still booting.
const TRY_AGAIN: Duration = Duration::from_millis(40);

/// How long a create may take, and how long of that it may wait for its turn to boot. The SDKs give up after 60 s.
const CREATE_LIMIT: Duration = Duration::from_secs(56);
const QUEUE_LIMIT: Duration = Duration::from_secs(40);

/// Random bytes in an access token and in a control credential.
const TOKEN_BYTES: usize = 32;

/// The user and the folder that SDKs expect to land in.
const DEFAULT_USER: &str = "user";

/// What a create call asks for.
#[derive(Debug)]
pub struct CreateRequest {
    pub id: String,
    pub template: String,
    pub asked: Asked,
    pub metadata: BTreeMap<String, String>,
    pub labels: BTreeMap<String, String>,
    pub env_vars: BTreeMap<String, String>,
}

#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    #[error(transparent)]
    Terms(#[from] TermsError),
    #[error(transparent)]
    Policy(#[from] PolicyError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("this host runs {0} sandboxes already, the most that it may (--max-sandboxes)")]
    Full(usize),
    #[error("too many sandboxes are being started; try again in a moment")]
    Busy,
    #[error("this host is shutting down")]
    Closing,
    #[error("the sandbox could not be started: {0}")]
    Start(#[from] StartError),
    #[error("the sandbox could not be started: {0}")]
    Boot(String),
    /// Its machine runs, and nothing is heard of the agent.
    #[error("the sandbox could not be started: {0}")]
    Silent(String),
    #[error("the sandbox could not be recorded: {0}")]
    Store(#[from] StoreError),
    #[error("the sandbox could not be started: {0}")]
    Io(#[from] std::io::Error),
}

impl Sandboxes {
    /// Creates a sandbox; it answers to its SDK when this returns. Runs to its end even if the caller goes away.
    ///
    /// # Errors
    /// What was wrong with the request, or why the sandbox did not come up; nothing is left behind.
    pub async fn create(self: &Arc<Self>, request: CreateRequest) -> Result<Arc<Sandbox>, CreateError> {
        let settings = IdleSettings::parse(&request.metadata)?;
        let images = Arc::clone(&self.setup.images);
        let name = request.template.clone();
        let image = tokio::task::spawn_blocking(move || images.find(&name))
            .await
            .map_err(|_| CreateError::Closing)??;
        if self.closing.load(Ordering::SeqCst) {
            return Err(CreateError::Closing);
        }
        let full = |_| CreateError::Full(self.setup.max_sandboxes);
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(full)?;
        let sandboxes = Arc::clone(self);
        let (answer, answered) = oneshot::channel();
        tokio::spawn(async move {
            let brought = sandboxes.bring_up(request, settings, image, place).await;
            if let Err(Ok(sandbox)) = answer.send(brought) {
                // Nobody knows its id: it would only take up room until its time is over.
                sandbox.change(|lifetime| {
                    let now = clock::now();
                    lifetime.note(now, "the client that asked for it went before it was ready");
                    lifetime.abandon(now)
                });
            }
        });
        answered.await.map_err(|_| CreateError::Closing)?
    }

    async fn bring_up(
        self: Arc<Self>,
        request: CreateRequest,
        settings: IdleSettings,
        image: Image,
        place: OwnedSemaphorePermit,
    ) -> Result<Arc<Sandbox>, CreateError> {
        let begun = Instant::now();
        let CreateRequest { id, template, asked, metadata, labels, env_vars } = request;
        let mut record = self.draft(id, template, &image, metadata, labels)?;
        let id = record.id.clone();
        let boot = match tokio::time::timeout(QUEUE_LIMIT, self.boots.acquire()).await {
            Ok(Ok(boot)) => boot,
            Ok(Err(_closed)) => return Err(CreateError::Closing),
            Err(_elapsed) => return Err(CreateError::Busy),
        };
        self.store.put(record.clone()).await?;
        let left = CREATE_LIMIT.saturating_sub(begun.elapsed());
        let limit = self.setup.runtime.boot_limit().min(left);
        let mut brought = self.boot(&mut record, asked, &settings, &image, &env_vars, limit / 2).await;
        if let Err(CreateError::Silent(words)) = &brought {
            // Of some hundred emulated machines one comes up with a link that carries nothing (ARCHITECTURE.md, the link).
            tracing::warn!(sandbox = id, words, "another machine is booted for a sandbox");
            brought = self.boot(&mut record, asked, &settings, &image, &env_vars, limit / 2).await;
        }
        drop(boot);
        match brought {
            Ok((machine, link, lifetime)) => {
                let trace = self.begin_trace(&record, &lifetime);
                let use_mark = UseMark::open(&self.setup.runs.join(&record.id));
                let sandbox = Sandbox::new(record, link, machine, lifetime, trace, use_mark);
                self.enter(Arc::clone(&sandbox), place);
                self.metrics.created(begun.elapsed());
                tracing::info!(sandbox = id, took_ms = begun.elapsed().as_millis(), "sandbox created");
                Ok(sandbox)
            }
            Err(error) => {
                tracing::error!(sandbox = id, %error, "a sandbox did not come up");
                self.metrics.failed.inc();
                if let Err(error) = self.store.forget(id).await {
                    tracing::error!(%error, "a failed create stays in the store until the next start");
                }
                Err(error)
            }
        }
    }

    async fn boot(
        &self,
        record: &mut Record,
        asked: Asked,
        settings: &IdleSettings,
        image: &Image,
        env_vars: &BTreeMap<String, String>,
        limit: Duration,
    ) -> Result<(Machine, Link, Lifetime), CreateError> {
        let setup = &self.setup;
        let machine = runtime::start(&*setup.runtime, &record.id, &setup.runs, image, setup.size)?;
        record.placement = Some(machine.placement.clone());
        let booted = async {
            // Long before the guest can get so far.
            let hello = machine.placement.transport.hello()?;
            // With its guard's number, so that a supervisor that dies now leaves something to be found by the next.
            self.store.put(record.clone()).await?;
            let control = HeaderValue::from_str(&record.control).map_err(std::io::Error::other)?;
            let link = Link::new(machine.placement.transport.clone(), control);
            let request = self.init_request(record, settings, env_vars.clone());
            record.envd_version = self.reach(&machine, hello, &link, request, limit).await?;
            let now = clock::now();
            let terms = asked.starting(now, &setup.limits);
            record.stage = Stage::Running;
            record.started_wall_ms = clock::wall_ms();
            record.started = terms.started.as_nanos();
            record.end = terms.end.as_nanos();
            record.last_end = terms.last_end.as_nanos();
            record.idle_timeout_ms = terms.idle_timeout.map(super::millis);
            record.session_ms = terms.session.map(super::millis);
            machine.set_deadline(terms.last_end)?;
            self.store.put(record.clone()).await?;
            let mut lifetime = Lifetime::new(terms, settings, 0, now);
            for key in &settings.unknown {
                lifetime.note(now, format!("metadata.{key} is not a setting of the idle rules"));
            }
            Ok((link, lifetime))
        };
        match booted.await {
            Ok((link, lifetime)) => Ok((machine, link, lifetime)),
            Err(error) => {
                machine.stop().await;
                Err(error)
            }
        }
    }

    /// Says `/init` until the agent takes it; the result is the agent's envd version.
    async fn reach(
        &self,
        machine: &Machine,
        hello: Option<Hello>,
        link: &Link,
        mut request: InitRequest,
        limit: Duration,
    ) -> Result<String, CreateError> {
        let listens = AtomicBool::new(hello.is_none());
        let reached = async {
            let _hello = match hello {
                Some(hello) => Some(hello.heard().await?),
                None => None,
            };
            listens.store(true, Ordering::Relaxed);
            loop {
                request.timestamp = Some(clock::rfc3339(clock::wall_ms()));
                match link.init(&request).await {
                    Ok(version) => return Ok(version),
                    Err(LinkError::Status(status)) => {
                        return Err(CreateError::Boot(format!("its agent refused /init with {status}")));
                    }
                    Err(error) => tracing::trace!(sandbox = request.sandbox_id, %error, "not up yet"),
                }
                tokio::time::sleep(TRY_AGAIN).await;
            }
        };
        tokio::select! {
            biased;
            reached = reached => reached,
            () = machine.exited() => Err(CreateError::Boot(machine.last_words())),
            () = tokio::time::sleep(limit) => {
                let words = machine.last_words();
                let missing = if listens.load(Ordering::Relaxed) { "answer" } else { "say that it listens" };
                Err(CreateError::Silent(format!("its agent did not {missing} within {} s; {words}", limit.as_secs())))
            }
        }
    }

    fn init_request(
        &self,
        record: &Record,
        settings: &IdleSettings,
        env_vars: BTreeMap<String, String>,
    ) -> InitRequest {
        let millis = |length: Duration| u64::try_from(length.as_millis()).unwrap_or(u64::MAX);
        // The agent's own end comes after the guard's: it is the last of three.
        let max = self.setup.limits.max_lifetime + Duration::from_secs(2);
        InitRequest {
            env_vars: Some(env_vars),
            access_token: Some(record.access_token.clone()),
            timestamp: None,
            default_user: Some(DEFAULT_USER.to_owned()),
            default_workdir: None,
            lifecycle_id: Some(record.id.clone()),
            sandbox_id: Some(record.id.clone()),
            template_id: Some(record.template.clone()),
            max_lifetime_ms: Some(millis(max)),
            idle_policy: Some(settings.policy.words()),
            inhibitor_budget_ms: Some(millis(self.setup.inhibitor_budget)),
            ..InitRequest::default()
        }
    }

    fn draft(
        &self,
        id: String,
        asked: String,
        image: &Image,
        metadata: BTreeMap<String, String>,
        labels: BTreeMap<String, String>,
    ) -> Result<Record, CreateError> {
        let size = self.setup.size;
        Ok(Record {
            id,
            stage: Stage::Creating,
            boot_id: clock::boot_id(),
            template: image.name.clone(),
            alias: asked,
            envd_version: String::new(),
            access_token: ids::random_hex(TOKEN_BYTES)?,
            control: ids::random_hex(TOKEN_BYTES)?,
            metadata,
            labels,
            started_wall_ms: 0,
            started: 0,
            end: 0,
            last_end: 0,
            idle_timeout_ms: None,
            session_ms: None,
            cpu_count: size.cpu_count,
            memory_mb: size.memory_mb,
            disk_mb: size.memory_mb / 2,
            placement: None,
        })
    }

    /// Writes the current deadlines of a sandbox down; a restarted supervisor enforces them.
    ///
    /// # Errors
    /// What the store said.
    pub async fn save_terms(&self, sandbox: &Sandbox) -> Result<(), StoreError> {
        let mut record = sandbox.record.clone();
        {
            let lifetime = sandbox.lifetime();
            if lifetime.ended().is_some() {
                return Ok(());
            }
            record.end = lifetime.terms().end.as_nanos();
        }
        sandbox.trace_end();
        self.store.update(record).await
    }
}
