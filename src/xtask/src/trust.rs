//! What a client of hostd's TLS listener has to trust, and whether its names lead here.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::{steps, workspace};

/// The domain that hostd serves unless told otherwise.
pub const DOMAIN: &str = "sbx.localhost";

/// Where distributions keep the authorities that everybody trusts.
const SYSTEM: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// Copies that every user of this machine can read; hostd's own folder is closed.
#[derive(Debug)]
pub struct Trust {
    /// hostd's authority alone, for clients that add it to their own.
    pub authority: PathBuf,
    /// The system's authorities with it, for clients that have one file.
    pub bundle: PathBuf,
}

impl Trust {
    /// Of the hostd with this data folder; None when it has no authority of its own.
    ///
    /// # Errors
    /// When the copies cannot be made.
    pub fn prepare(data: &Path) -> Result<Option<Self>> {
        let own = data.join("tls").join(DOMAIN).join("ca.pem");
        if !own.exists() {
            return Ok(None);
        }
        let own = fs::read_to_string(&own).with_context(|| format!("cannot read {}", own.display()))?;
        let system = SYSTEM.iter().find_map(|path| fs::read_to_string(path).ok()).unwrap_or_default();
        let folder = workspace::target().join("tls");
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let write = |name: &str, text: &str| {
            let path = folder.join(name);
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
            Ok::<_, anyhow::Error>(path)
        };
        Ok(Some(Self {
            authority: write("ca.pem", &own)?,
            bundle: write("bundle.pem", &bundle(&system, &own))?,
        }))
    }
}

fn bundle(system: &str, own: &str) -> String {
    let gap = if system.is_empty() || system.ends_with('\n') { "" } else { "\n" };
    format!("{system}{gap}{own}")
}

/// Whether programs on this machine find names below the domain here: systemd-resolved sees to it, glibc alone does not.
pub fn names_lead_here() -> bool {
    let found = steps::output(Command::new("getent").args(["ahosts", &format!("any.{DOMAIN}")]));
    found.is_ok_and(|found| found.lines().any(|line| line.starts_with("127.0.0.1")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_keeps_its_certificates_on_lines_of_their_own() {
        assert_eq!(bundle("a\n", "b\n"), "a\nb\n");
        assert_eq!(bundle("a", "b\n"), "a\nb\n");
        assert_eq!(bundle("", "b\n"), "b\n");
    }
}
