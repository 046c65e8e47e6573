//! The operator's own certificate: read, and checked against everything that would otherwise be found out by a client.

use std::io;
use std::path::{Path, PathBuf};

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use crate::clock;

/// Files larger than this are no certificates, in bytes.
const SIZE_LIMIT: u64 = 1 << 20;

/// From when on the log warns of an end, in seconds.
const WARNED: i64 = 7 * 24 * 3600;

/// What is wrong with the operator's files. Each names the option and the rule.
#[derive(Debug, thiserror::Error)]
pub(super) enum PemError {
    #[error("{option} {path}: {error}", path = path.display())]
    Io { option: &'static str, path: PathBuf, error: io::Error },
    #[error(
        "--tls-certificate {0}: must hold a certificate in PEM (-----BEGIN CERTIFICATE-----), the server's own first"
    )]
    NoCertificate(String),
    #[error("--tls-certificate {path}: cannot be read as a certificate: {why}")]
    BadCertificate { path: String, why: String },
    #[error("--tls-key {0}: must hold a private key in PEM (-----BEGIN PRIVATE KEY-----, RSA or EC)")]
    NoKey(String),
    #[error(
        "--tls-key {0}: is encrypted, and nobody is here to type its password: decrypt it (openssl pkey -in ... -out ...)"
    )]
    Encrypted(String),
    #[error("--tls-key {path}: cannot be used: {why}")]
    BadKey { path: String, why: String },
    #[error("--tls-key {key}: does not belong to the first certificate of --tls-certificate {certificate}")]
    Mismatch { key: String, certificate: String },
    #[error("--tls-certificate {path}: has expired at {at}; it is {now} here")]
    Expired { path: String, at: String, now: String },
    #[error("--tls-certificate {path}: is valid from {at} on; it is {now} here")]
    NotYet { path: String, at: String, now: String },
    #[error(
        "--tls-certificate {path}: must be for *.{domain}, and is for {names}: bring another, or set --tls-domain"
    )]
    OtherName { path: String, domain: String, names: String },
}

/// Reads the two files; `now` is in seconds since 1970.
///
/// # Errors
/// The first rule that they break.
pub(super) fn load(certificate: &Path, key: &Path, domain: &str, now: i64) -> Result<CertifiedKey, PemError> {
    let chain_text = read("--tls-certificate", certificate)?;
    let key_text = read("--tls-key", key)?;
    let (path, key_path) = (certificate.display().to_string(), key.display().to_string());

    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&chain_text)
        .collect::<Result<_, _>>()
        .map_err(|error| PemError::BadCertificate { path: path.clone(), why: error.to_string() })?;
    let first = chain.first().ok_or_else(|| PemError::NoCertificate(path.clone()))?;
    check(first, &path, domain, now)?;

    if String::from_utf8_lossy(&key_text).contains("ENCRYPTED") {
        return Err(PemError::Encrypted(key_path));
    }
    let key = PrivateKeyDer::from_pem_slice(&key_text).map_err(|_| PemError::NoKey(key_path.clone()))?;
    let bad_key = |error: rustls::Error| PemError::BadKey { path: key_path.clone(), why: error.to_string() };
    let key = ring::default_provider().key_provider.load_private_key(key).map_err(bad_key)?;
    let certified = CertifiedKey::new(chain, key);
    certified.keys_match().map_err(|_| PemError::Mismatch { key: key_path, certificate: path })?;
    Ok(certified)
}

fn read(option: &'static str, path: &Path) -> Result<Vec<u8>, PemError> {
    let wrong = |error| PemError::Io { option, path: path.to_owned(), error };
    let found = std::fs::metadata(path).map_err(wrong)?;
    if !found.is_file() || found.len() > SIZE_LIMIT {
        return Err(wrong(io::Error::other(format!("must be a file of at most {SIZE_LIMIT} bytes"))));
    }
    std::fs::read(path).map_err(wrong)
}

fn check(certificate: &CertificateDer<'_>, path: &str, domain: &str, now: i64) -> Result<(), PemError> {
    let path = path.to_owned();
    let bad = |why: String| PemError::BadCertificate { path: path.clone(), why };
    let (_rest, certificate) =
        X509Certificate::from_der(certificate).map_err(|error| bad(error.to_string()))?;
    let [from, until] =
        [certificate.validity().not_before, certificate.validity().not_after].map(|at| at.timestamp());
    let time = |seconds: i64| clock::rfc3339(seconds.saturating_mul(1000));
    if now > until {
        return Err(PemError::Expired { path, at: time(until), now: time(now) });
    }
    if now < from {
        return Err(PemError::NotYet { path, at: time(from), now: time(now) });
    }
    if until - now < WARNED {
        tracing::warn!(path, until = time(until), "the TLS certificate ends soon");
    }
    let names = certificate.subject_alternative_name().map_err(|error| bad(error.to_string()))?;
    let names = names.map(|names| names.value.general_names.as_slice()).unwrap_or_default();
    let names: Vec<&str> = names
        .iter()
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some(*name),
            _ => None,
        })
        .collect();
    let wanted = format!("*.{domain}");
    if !names.iter().any(|name| name.eq_ignore_ascii_case(&wanted)) {
        let names = if names.is_empty() { "no name".to_owned() } else { names.join(", ") };
        return Err(PemError::OtherName { path, domain: domain.to_owned(), names });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    use super::*;

    const DAY: i64 = 24 * 3600;

    /// What is said of a certificate for these names, valid in 2026 and 2027, that is read so many days after the beginning of 2026.
    fn read_at(days: i64, names: &[&str], key: impl Fn(&KeyPair) -> String) -> Result<(), String> {
        let folder = tempfile::tempdir().unwrap();
        let own = KeyPair::generate().unwrap();
        let mut params =
            CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).unwrap();
        (params.not_before, params.not_after) = (date_time_ymd(2026, 1, 1), date_time_ymd(2028, 1, 1));
        let (certificate_path, key_path) = (folder.path().join("cert.pem"), folder.path().join("key.pem"));
        std::fs::write(&certificate_path, params.self_signed(&own).unwrap().pem()).unwrap();
        std::fs::write(&key_path, key(&own)).unwrap();
        let now = date_time_ymd(2026, 1, 1).unix_timestamp() + days * DAY;
        load(&certificate_path, &key_path, "sbx.example", now).map(drop).map_err(|error| error.to_string())
    }

    #[test]
    fn a_good_certificate_is_taken_whatever_the_case_of_its_names() {
        read_at(1, &["other.example", "*.SBX.example"], KeyPair::serialize_pem).unwrap();
    }

    #[test]
    fn a_certificate_out_of_its_time_is_refused_with_that_time() {
        let expired = read_at(731, &["*.sbx.example"], KeyPair::serialize_pem).unwrap_err();
        assert!(
            expired.contains("--tls-certificate") && expired.contains("expired at 2028-01-01T"),
            "{expired}"
        );
        let early = read_at(-1, &["*.sbx.example"], KeyPair::serialize_pem).unwrap_err();
        assert!(early.contains("valid from 2026-01-01T") && early.contains("2025-12-31T"), "{early}");
    }

    #[test]
    fn a_certificate_for_other_names_is_refused_with_both() {
        for names in [&["sbx.example"][..], &["*.example"], &["a.sbx.example", "127.0.0.1"]] {
            let error = read_at(1, names, KeyPair::serialize_pem).unwrap_err();
            assert!(
                error.contains("must be for *.sbx.example, and is for") && error.contains(names[0]),
                "{error}"
            );
        }
    }

    #[test]
    fn a_key_that_does_not_fit_is_refused_with_what_it_is() {
        let other = KeyPair::generate().unwrap();
        for (key, rule) in [
            (other.serialize_pem(), "does not belong"),
            (String::new(), "must hold a private key"),
            ("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n".to_owned(), "cannot be used"),
            (
                "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n"
                    .to_owned(),
                "is encrypted",
            ),
        ] {
            let error = read_at(1, &["*.sbx.example"], |_| key.clone()).unwrap_err();
            assert!(error.starts_with("--tls-key ") && error.contains(rule), "{error}");
        }
    }

    #[test]
    fn what_is_no_certificate_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cert.pem");
        for (text, rule) in [
            ("", "must hold a certificate"),
            (
                "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
                "cannot be read as a certificate",
            ),
            ("-----BEGIN CERTIFICATE-----\nAAAA\n", "cannot be read as a certificate"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = load(&path, &path, "sbx.example", 0).unwrap_err().to_string();
            assert!(error.starts_with("--tls-certificate ") && error.contains(rule), "{error}");
        }
    }
}
