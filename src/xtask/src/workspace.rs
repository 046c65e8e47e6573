//! Where things are, and how the workspace's own programs are built.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::steps;

/// The root of the repository.
pub fn root() -> PathBuf {
    // This crate is two folders below it, and only ever runs from the tree that it was built in.
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_owned()
}

/// Cargo's target folder, where everything that the commands make is kept.
pub fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => std::path::absolute(&folder).unwrap_or(folder.into()),
        None => root().join("target"),
    }
}

/// The cargo that started us, run in the root of the repository.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    command.current_dir(root());
    command
}

/// Builds one of the workspace's programs and returns where cargo put it.
pub fn build(package: &str, profile: &str) -> Result<PathBuf> {
    let arguments =
        ["build", "--profile", profile, "--package", package, "--message-format", "json-render-diagnostics"];
    let messages = steps::output(cargo().args(arguments))?;
    let program = messages.lines().filter_map(|line| built_program(line, package)).next_back();
    program.with_context(|| format!("cargo built {package} but named no program"))
}

fn built_program(line: &str, package: &str) -> Option<PathBuf> {
    #[derive(Deserialize)]
    struct Message {
        reason: String,
        target: Option<Target>,
        executable: Option<PathBuf>,
    }
    #[derive(Deserialize)]
    struct Target {
        name: String,
    }
    let message: Message = serde_json::from_str(line).ok()?;
    let is_ours = message.reason == "compiler-artifact" && message.target?.name == package;
    message.executable.filter(|_| is_ours)
}

/// The first program of that name on PATH, or in the folders where distributions put what only root needs.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    let mut candidates = std::env::split_paths(&path).chain(system).map(|folder| folder.join(name));
    candidates.find(|candidate| is_executable(candidate))
}

pub fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Fails unless `path` is a program that needs no library and no interpreter: it has to run in any guest.
pub fn require_static(path: &Path) -> Result<()> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    if has_interpreter(&bytes).with_context(|| format!("{} is not a 64-bit ELF program", path.display()))? {
        bail!(
            "{} is not static. Flags of your own (RUSTFLAGS, or a cargo configuration) replace the repository's \
             `-C target-feature=+crt-static`; add it to them or unset them",
            path.display()
        );
    }
    Ok(())
}

/// Whether the program header table has a PT_INTERP entry; `None` when these bytes are no 64-bit little-endian ELF file.
fn has_interpreter(bytes: &[u8]) -> Option<bool> {
    const PT_INTERP: u32 = 3;
    let elf = crate::image::elf::File::parse(bytes)?;
    Some(elf.segment_kinds().any(|kind| kind == PT_INTERP))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_has_the_workspace_manifest() {
        assert!(root().join("Cargo.toml").is_file());
        assert!(root().join("rootfs").is_dir());
    }

    #[test]
    fn the_built_program_is_read_from_cargos_messages() {
        let line = r#"{"reason":"compiler-artifact","target":{"name":"guestd"},"executable":"/t/guestd"}"#;
        assert_eq!(built_program(line, "guestd"), Some("/t/guestd".into()));
        assert_eq!(built_program(line, "hostd"), None);
        let library = r#"{"reason":"compiler-artifact","target":{"name":"guestd"},"executable":null}"#;
        assert_eq!(built_program(library, "guestd"), None);
        assert_eq!(built_program(r#"{"reason":"build-finished","success":true}"#, "guestd"), None);
    }

    #[test]
    fn programs_that_only_root_needs_are_found_too() {
        assert!(find_program("sh").is_some());
        assert!(find_program("no-such-program-anywhere").is_none());
    }

    #[test]
    fn this_test_itself_is_static() {
        require_static(&std::env::current_exe().unwrap()).unwrap();
    }
}
