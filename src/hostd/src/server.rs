//! The supervisor from start to end: checks, opens, adopts, serves, leaves.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::api::{self, Api};
use crate::config::{AccelChoice, LinkChoice, OnExit, RuntimeChoice, Serve};
use crate::lifetime::{Sandboxes, Setup};
use crate::listen::Speaks;
use crate::metrics::Metrics;
use crate::runtime::container::Container;
use crate::runtime::qemu::{Accelerator, LinkDevice, Qemu, measure_tsc_khz};
use crate::runtime::simulated::Simulated;
use crate::runtime::{Images, Runtime, Size, kvm};
use crate::store::Store;
use crate::tls::Certificates;
use crate::{deno, listen, memory, proxy, tls};

/// How often old tombstones are looked for.
const EXPIRY_PAUSE: Duration = Duration::from_secs(60);

/// Where the system does not tell how many descriptors there are, and most connections of one listener.
const DESCRIPTORS: u64 = 1024;
const MOST_CONNECTIONS: usize = 16 * 1024;

/// The template that the KVM probe boots.
const PROBE_TEMPLATE: &str = "base";

/// Serves until a signal asks to end.
///
/// # Errors
/// One sentence that says what is wrong and what to do.
pub async fn serve(config: Serve) -> Result<()> {
    config.check()?;
    let descriptors = raise_descriptor_limit();
    let runs = prepare_folders(&config.data)?;
    // The store first: its lock keeps a second supervisor from touching anything of the first.
    let store = Store::open(&config.data)?;
    let api_listener = listen::bind("--api", config.api)?;
    let proxy_listener = listen::bind("--proxy", config.proxy)?;
    let tls = prepare_tls(&config)?;
    // Guards have working directories of their own, so no path may depend on this one.
    let images = std::path::absolute(&config.images).context("--images")?;
    if !images.is_dir() {
        tracing::warn!(images = %images.display(), "the folder of templates does not exist: make it with `cargo xtask image`");
    }
    let images = Arc::new(Images::new(images, config.aliases()));
    let runtime = choose_runtime(&config, Arc::clone(&images)).await?;
    tracing::info!(runtime = runtime.name(), ?runtime, "ready to run sandboxes");
    let idle_trace =
        config.idle_trace.as_deref().map(std::path::absolute).transpose().context("--idle-trace")?;
    if let Some(folder) = &idle_trace {
        std::fs::create_dir_all(folder).with_context(|| format!("--idle-trace {}", folder.display()))?;
    }
    let setup = Setup {
        limits: config.limits(),
        size: Size { cpu_count: config.cpus, memory_mb: config.memory_mb },
        images,
        runtime,
        runs,
        max_sandboxes: config.max_sandboxes,
        inhibitor_budget: Duration::from_secs(config.inhibitor_budget),
        idle_trace,
        release_pause: Duration::from_millis(config.release_pause_ms),
    };
    let sandboxes = Sandboxes::new(setup, store, Metrics::default());
    sandboxes.adopt().await.context("the records of an earlier run")?;

    let keys: Arc<Vec<_>> = Arc::new(config.api_key.iter().filter(|key| !key.is_empty()).cloned().collect());
    let door = deno::Door::new(Arc::clone(&sandboxes), Arc::clone(&keys), config.deno());
    let api = Api { sandboxes: Arc::clone(&sandboxes), keys };
    let control = api::router(api).nest("/api", deno::router(door));
    let data_plane = proxy::router(Arc::clone(&sandboxes));
    let mut ready = format!(
        "ready api=http://{} proxy=http://{}",
        api_listener.local_addr()?,
        proxy_listener.local_addr()?
    );
    let places = connections(descriptors);
    if let Some((listener, certificates)) = tls {
        write!(ready, " tls=https://{}", listener.local_addr()?)?;
        if let Some(authority) = certificates.authority() {
            tracing::info!(authority = %authority.display(), "clients of the TLS listener have to trust this authority");
        }
        let router = tls::door::router(config.tls_domain(), control.clone(), data_plane.clone());
        tokio::spawn(listen::serve(listener, Speaks::Tls(certificates.server()?), places, router));
        tokio::spawn(certificates.refresh());
    }
    tokio::spawn(listen::serve(api_listener, Speaks::Plain, places, control));
    tokio::spawn(listen::serve(proxy_listener, Speaks::Plain, places, data_plane));
    tokio::spawn(expire(Arc::clone(&sandboxes)));
    tokio::spawn(memory::give_back_at_rest(Arc::clone(&sandboxes)));
    let mut out = std::io::stdout();
    writeln!(out, "{ready}").and_then(|()| out.flush())?;

    asked_to_end().await?;
    match config.on_exit {
        OnExit::Stop => {
            tracing::info!("ending all sandboxes; ask again to leave them");
            tokio::select! {
                () = sandboxes.end_all(guestd_idle::EndReason::HostShutdown) => {}
                asked = asked_to_end() => {
                    asked?;
                    tracing::warn!("leaving at once; what still runs is ended by its guard, or taken over by the next start");
                }
            }
        }
        OnExit::Keep => {
            tracing::info!("leaving the sandboxes running; their guards end them when they are due")
        }
    }
    Ok(())
}

/// Each sandbox takes a few descriptors; a shell's soft limit is for a few hundred. Returns how many there are.
fn raise_descriptor_limit() -> u64 {
    let resource = nix::sys::resource::Resource::RLIMIT_NOFILE;
    let (soft, hard) = nix::sys::resource::getrlimit(resource).unwrap_or((DESCRIPTORS, DESCRIPTORS));
    match nix::sys::resource::setrlimit(resource, hard, hard) {
        Ok(()) => hard,
        Err(error) => {
            tracing::warn!(%error, "the limit of open files stays as it is");
            soft
        }
    }
}

/// How many connections each listener has at once: all three together leave the sandboxes a quarter of the descriptors.
fn connections(descriptors: u64) -> usize {
    usize::try_from(descriptors / 4).unwrap_or(MOST_CONNECTIONS).clamp(16, MOST_CONNECTIONS)
}

fn prepare_tls(config: &Serve) -> Result<Option<(TcpListener, Arc<Certificates>)>> {
    let Some(address) = config.tls_listen else { return Ok(None) };
    let source = config.tls_source(&config.data.canonicalize()?);
    let certificates = Certificates::load(config.tls_domain(), source)?;
    Ok(Some((listen::bind("--tls-listen", address)?, certificates)))
}

async fn expire(sandboxes: Arc<Sandboxes>) {
    loop {
        tokio::time::sleep(EXPIRY_PAUSE).await;
        sandboxes.expire_tombstones().await;
    }
}

async fn asked_to_end() -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

fn prepare_folders(data: &Path) -> Result<PathBuf> {
    let data_error = || format!("--data {} cannot be used", data.display());
    fs::create_dir_all(data).with_context(data_error)?;
    let data = data.canonicalize().with_context(data_error)?;
    let runs = data.join("run");
    for folder in [&data, &runs] {
        fs::create_dir_all(folder).with_context(data_error)?;
        // Tokens are in there.
        fs::set_permissions(folder, std::os::unix::fs::PermissionsExt::from_mode(0o700))
            .with_context(data_error)?;
    }
    Ok(runs)
}

async fn choose_runtime(config: &Serve, images: Arc<Images>) -> Result<Box<dyn Runtime>> {
    if let Some(guests) = &config.simulated_guests {
        tracing::warn!("guests are simulated: no machine is started");
        return Ok(Box::new(Simulated { guests: guests.clone() }));
    }
    let qemu = find_program(&config.qemu);
    match (config.runtime, qemu) {
        (RuntimeChoice::Qemu | RuntimeChoice::Auto, Some(qemu)) => {
            Ok(Box::new(prepare_qemu(config, qemu, images).await?))
        }
        (RuntimeChoice::Qemu, None) => bail!(
            "{} is not installed: install it (Debian, Ubuntu: qemu-system-x86), name it with --qemu, or use --runtime container",
            config.qemu.display()
        ),
        (RuntimeChoice::Auto, None) => {
            tracing::warn!("no QEMU: sandboxes are containers, which are no security boundary");
            prepare_container(config).map(|runtime| Box::new(runtime) as Box<dyn Runtime>)
        }
        (RuntimeChoice::Container, _) => {
            prepare_container(config).map(|runtime| Box::new(runtime) as Box<dyn Runtime>)
        }
    }
}

async fn prepare_qemu(config: &Serve, qemu: PathBuf, images: Arc<Images>) -> Result<Qemu> {
    let vhost = find_program(&config.vhost_device_vsock);
    let link = match (config.link, &vhost) {
        (LinkChoice::Serial, _) | (LinkChoice::Auto, None) => LinkDevice::Serial,
        (LinkChoice::Vsock | LinkChoice::Auto, Some(_)) => LinkDevice::Vsock,
        (LinkChoice::Vsock, None) => bail!(
            "{} is not installed, which --link vsock needs: install it (cargo install vhost-device-vsock), name it with \
             --vhost-device-vsock, or use --link serial",
            config.vhost_device_vsock.display()
        ),
    };
    let accelerator = match config.accel {
        AccelChoice::Kvm => Accelerator::Kvm,
        AccelChoice::Tcg => Accelerator::Tcg,
        AccelChoice::Auto => probe_kvm(&qemu, images, config.data.clone()).await?,
    };
    // SAFETY: geteuid cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    Ok(Qemu {
        program: qemu,
        vhost_device_vsock: vhost.unwrap_or_default(),
        accelerator,
        link,
        first_uid: (root && config.first_uid != 0).then_some(config.first_uid),
        tsc_khz: tokio::task::spawn_blocking(measure_tsc_khz).await?,
    })
}

async fn probe_kvm(qemu: &Path, images: Arc<Images>, data: PathBuf) -> Result<Accelerator> {
    let qemu = qemu.to_owned();
    let finding = tokio::task::spawn_blocking(move || match images.find(PROBE_TEMPLATE) {
        Ok(image) => Ok(kvm::find(&qemu, &image, &data)),
        Err(error) => Err(error),
    })
    .await?;
    match finding {
        Ok(finding) if finding.usable => Ok(Accelerator::Kvm),
        Ok(finding) => {
            tracing::warn!(why = finding.why, "no usable KVM: VMs are emulated, and slow");
            Ok(Accelerator::Tcg)
        }
        Err(error) => {
            tracing::warn!(%error, "KVM cannot be probed without a template: VMs are emulated, and slow");
            Ok(Accelerator::Tcg)
        }
    }
}

fn prepare_container(config: &Serve) -> Result<Container> {
    let Some(program) = find_program(&config.runc) else {
        bail!(
            "{} is not installed: install it (Debian, Ubuntu: runc), or name it with --runc",
            config.runc.display()
        );
    };
    // SAFETY: geteuid cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        bail!("the container runtime needs root, to mount each sandbox's file system");
    }
    Ok(Container { program, state: config.data.canonicalize()?.join("runc") })
}

/// A program as the shell would find it.
fn find_program(name: &Path) -> Option<PathBuf> {
    let is_program = |path: &Path| {
        let found = fs::metadata(path);
        found.is_ok_and(|found| {
            found.is_file() && std::os::unix::fs::PermissionsExt::mode(&found.permissions()) & 0o111 != 0
        })
    };
    if name.components().count() > 1 {
        return is_program(name).then(|| name.canonicalize().unwrap_or_else(|_| name.to_owned()));
    }
    let path = std::env::var_os("PATH")?;
    let standard = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(standard).map(|folder| folder.join(name)).find(|path| is_program(path))
}
