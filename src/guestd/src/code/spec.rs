//! Kernel specs: what kernels a machine has, and how each is started (Jupyter's `kernel.json`).

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Where distributions and administrators put kernel specs. A user's own folder is not read: the agent reads as root.
pub const FOLDERS: [&str; 2] = ["/usr/local/share/jupyter/kernels", "/usr/share/jupyter/kernels"];

/// The longest `kernel.json`, in bytes.
const FILE_LIMIT: u64 = 64 * 1024;

/// How the code of a cell reaches a kernel, and what it understands besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    Python,
    /// JavaScript and TypeScript.
    Script,
    Bash,
    /// Nothing is known: no variables for one cell, no change of directory.
    Other,
}

impl Dialect {
    fn of(language: &str) -> Self {
        match language.to_ascii_lowercase().as_str() {
            "python" => Self::Python,
            "javascript" | "typescript" => Self::Script,
            "bash" => Self::Bash,
            _ => Self::Other,
        }
    }
}

/// How a kernel is told to stop what it does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Interrupt {
    /// SIGINT to its process group.
    #[default]
    Signal,
    /// `interrupt_request` on the control channel.
    Message,
}

/// How its sockets are reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// Unix sockets in a folder of its own.
    #[default]
    Ipc,
    /// Ports on the loopback interface, for kernels that know nothing else.
    Tcp,
}

/// One way to start a kernel.
#[derive(Clone, Debug)]
pub struct KernelSpec {
    /// The name of its folder.
    pub name: String,
    /// `{connection_file}` and `{resource_dir}` are still in it.
    pub argv: Vec<String>,
    pub environment: BTreeMap<String, String>,
    pub dialect: Dialect,
    pub interrupt: Interrupt,
    pub transport: Transport,
    pub folder: PathBuf,
}

#[derive(Deserialize)]
struct File {
    argv: Vec<String>,
    #[serde(default)]
    language: String,
    #[serde(default)]
    env: BTreeMap<String, String>,
    #[serde(default)]
    interrupt_mode: Interrupt,
    #[serde(default)]
    metadata: Metadata,
}

#[derive(Default, Deserialize)]
struct Metadata {
    #[serde(default)]
    guestd: Own,
}

/// What a spec can say to this agent; other readers of specs skip it.
#[derive(Default, Deserialize)]
struct Own {
    #[serde(default)]
    transport: Transport,
}

/// Why there is no kernel for a language.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    #[error(
        "no kernel for {language}: this image carries none (the template code-interpreter-v1 has python, javascript, typescript and bash)"
    )]
    NoKernels { language: String },
    #[error("no kernel for {language}: there are {}", .present.join(", "))]
    Unknown { language: String, present: Vec<String> },
    #[error("the kernel spec {path} cannot be read: {source}")]
    Unreadable { path: PathBuf, source: io::Error },
}

/// The language of a request: lower case, with the short names that clients use (contract: envd.md section 7.4).
pub fn normalised(language: &str) -> String {
    match language.trim().to_lowercase().as_str() {
        "" => "python".to_owned(),
        "js" => "javascript".to_owned(),
        "ts" => "typescript".to_owned(),
        other => other.to_owned(),
    }
}

/// Finds the kernel of a normalised language: by the customary name of its spec, by name, or by the language that a spec names. Folders
/// are read each time: kernels can be installed while the machine runs.
///
/// # Errors
/// [`SpecError`], which names the kernels that there are.
pub fn find(folders: &[PathBuf], language: &str) -> Result<KernelSpec, SpecError> {
    let customary = match language {
        "python" => "python3",
        "javascript" | "typescript" => "deno",
        other => other,
    };
    // A name is one component of a path.
    let named = [customary, language]
        .into_iter()
        .filter(|name| !name.contains(['/', '\0']) && !name.starts_with('.'));
    for name in named {
        for folder in folders {
            if let Some(spec) = read(&folder.join(name), name)? {
                return Ok(spec.1);
            }
        }
    }
    let mut present = Vec::new();
    for folder in folders {
        let mut names: Vec<_> =
            std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.file_name()).collect();
        names.sort();
        for name in names.iter().filter_map(|name| name.to_str()) {
            match read(&folder.join(name), name) {
                Ok(Some((written, spec))) if written.eq_ignore_ascii_case(language) => return Ok(spec),
                Ok(Some(_)) => present.push(name.to_owned()),
                Ok(None) => {}
                Err(error) => tracing::debug!(%error, "skipped"),
            }
        }
    }
    let language = language.chars().take(64).collect();
    if present.is_empty() {
        Err(SpecError::NoKernels { language })
    } else {
        Err(SpecError::Unknown { language, present })
    }
}

/// The spec in `folder` with the language that it names; None when there is none.
fn read(folder: &Path, name: &str) -> Result<Option<(String, KernelSpec)>, SpecError> {
    use io::Read as _;
    let path = folder.join("kernel.json");
    let file = match std::fs::File::open(&path) {
        Ok(file) => file,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(source) => return Err(SpecError::Unreadable { path, source }),
    };
    let mut text = Vec::new();
    let parsed = file
        .take(FILE_LIMIT)
        .read_to_end(&mut text)
        .and_then(|_| serde_json::from_slice::<File>(&text).map_err(io::Error::from));
    let parsed = match parsed {
        Ok(parsed) if parsed.argv.is_empty() => {
            Err(io::Error::new(io::ErrorKind::InvalidData, "argv is empty"))
        }
        other => other,
    };
    let File { argv, language, env, interrupt_mode, metadata } =
        parsed.map_err(|source| SpecError::Unreadable { path, source })?;
    let spec = KernelSpec {
        name: name.to_owned(),
        argv,
        environment: env,
        dialect: Dialect::of(&language),
        interrupt: interrupt_mode,
        transport: metadata.guestd.transport,
        folder: folder.to_owned(),
    };
    Ok(Some((language, spec)))
}

impl KernelSpec {
    /// The command with its places filled in.
    pub fn command(&self, connection_file: &Path) -> Vec<String> {
        let (file, folder) = (connection_file.to_string_lossy(), self.folder.to_string_lossy());
        self.argv
            .iter()
            .map(|part| part.replace("{connection_file}", &file).replace("{resource_dir}", &folder))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(specs: &[(&str, &str)]) -> (tempfile::TempDir, Vec<PathBuf>) {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in specs {
            std::fs::create_dir(root.path().join(name)).unwrap();
            std::fs::write(root.path().join(name).join("kernel.json"), text).unwrap();
        }
        let folders = vec![root.path().join("missing"), root.path().to_owned()];
        (root, folders)
    }

    #[test]
    fn a_language_is_found_by_custom_by_name_and_by_what_the_spec_says() {
        let (_root, folders) = folder(&[
            ("python3", r#"{"argv": ["python3", "-f", "{connection_file}"], "language": "python"}"#),
            (
                "deno",
                r#"{"argv": ["deno"], "language": "typescript", "interrupt_mode": "message", "metadata": {"guestd": {"transport": "tcp"}}}"#,
            ),
            ("ir", r#"{"argv": ["R", "{resource_dir}"], "language": "R"}"#),
        ]);
        let python = find(&folders, "python").unwrap();
        assert_eq!(
            (python.dialect, python.interrupt, python.transport),
            (Dialect::Python, Interrupt::Signal, Transport::Ipc)
        );
        assert_eq!(python.command(Path::new("/c.json")), ["python3", "-f", "/c.json"]);
        for language in ["javascript", "typescript"] {
            let deno = find(&folders, language).unwrap();
            assert_eq!(
                (deno.dialect, deno.interrupt, deno.transport),
                (Dialect::Script, Interrupt::Message, Transport::Tcp)
            );
        }
        let r = find(&folders, "r").unwrap();
        assert_eq!((r.name.as_str(), r.dialect), ("ir", Dialect::Other));
        assert_eq!(find(&folders, "python3").unwrap().name, "python3");
    }

    #[test]
    fn who_asks_for_a_missing_kernel_learns_which_there_are() {
        let (_root, folders) =
            folder(&[("bash", r#"{"argv": ["bash"], "language": "bash"}"#), ("broken", "{")]);
        let error = find(&folders, "java").unwrap_err().to_string();
        assert_eq!(error, "no kernel for java: there are bash");
        let error = find(&[], "python").unwrap_err().to_string();
        assert!(error.starts_with("no kernel for python: this image carries none"), "{error}");
        assert!(find(&folders, "broken").unwrap_err().to_string().contains("kernel.json cannot be read"));
    }

    #[test]
    fn a_language_is_no_path() {
        let (root, folders) = folder(&[("bash", r#"{"argv": ["bash"], "language": "bash"}"#)]);
        let path = root.path().join("bash");
        for language in ["../bash", path.to_str().unwrap(), ".", "..", "a\0b"] {
            assert!(matches!(find(&folders, language), Err(SpecError::Unknown { .. })), "{language}");
        }
    }

    #[test]
    fn short_names_and_case_mean_the_same() {
        for (given, meant) in
            [("JS", "javascript"), (" ts ", "typescript"), ("Python", "python"), ("", "python"), ("R", "r")]
        {
            assert_eq!(normalised(given), meant);
        }
    }
}
