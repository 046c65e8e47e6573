//! An authority of hostd's own, for machines where nobody brings a certificate. It may sign for one domain only, so that trusting it is no
//! risk elsewhere; its key never leaves its folder, and the server's key never reaches a disk.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, GeneralSubtree,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, NameConstraints, date_time_ymd,
};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// How long the authority is valid, and what it signs, in seconds. Clients refuse certificates of more than 398 days.
const AUTHORITY_LIFE: i64 = 3650 * DAY;
const LIFE: i64 = 90 * DAY;
/// Signatures are valid from a while ago on, for clients whose clocks are behind.
const SKEW: i64 = DAY;
const DAY: i64 = 24 * 3600;

const CERTIFICATE: &str = "ca.pem";
const KEY: &str = "ca.key";

/// Where the authority's certificate is.
pub(super) fn certificate_path(folder: &Path) -> PathBuf {
    folder.join(CERTIFICATE)
}

/// A new certificate for `*.<domain>`, signed by the authority in the folder, which is made if there is none that can be used. `now` is in
/// seconds since 1970.
///
/// # Errors
/// When the folder cannot be read or written, or the library fails.
pub(super) fn issue(folder: &Path, domain: &str, now: i64) -> anyhow::Result<CertifiedKey> {
    let (certificate, key) = match kept(folder, domain, now)? {
        Some(kept) => kept,
        None => make(folder, domain, now)?,
    };
    let mut params = CertificateParams::new(vec![format!("*.{domain}"), domain.to_owned()])?;
    params.distinguished_name = name("hostd");
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    params.not_before = date_time_ymd(1970, 1, 1) + seconds(now - SKEW);
    params.not_after = date_time_ymd(1970, 1, 1) + seconds(now + LIFE);
    let own_key = KeyPair::generate()?;
    let own = params.signed_by(&own_key, &Issuer::new(authority(domain), key))?;
    let own_key = PrivatePkcs8KeyDer::from(own_key.serialize_der()).into();
    Ok(CertifiedKey::from_der(vec![own.der().clone(), certificate], own_key, &ring::default_provider())?)
}

/// The authority in the folder, if it is whole and outlives what it signs.
fn kept(folder: &Path, domain: &str, now: i64) -> anyhow::Result<Option<(CertificateDer<'static>, KeyPair)>> {
    let (Some(certificate), Some(key)) = (read(&certificate_path(folder))?, read(&folder.join(KEY))?) else {
        return Ok(None);
    };
    let usable = || {
        let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).ok()?;
        let key = KeyPair::from_pem(&key).ok()?;
        let (_rest, parsed) = X509Certificate::from_der(&certificate).ok()?;
        let same_key = parsed.public_key().subject_public_key.data.as_ref() == key.public_key_raw();
        let same_name = parsed
            .subject()
            .iter_common_name()
            .any(|name| name.as_str().is_ok_and(|name| name == common_name(domain)));
        let validity = parsed.validity();
        let lasts = validity.not_before.timestamp() <= now && now + LIFE <= validity.not_after.timestamp();
        (same_key && same_name && lasts).then(|| (certificate.clone(), key))
    };
    let found = usable();
    if found.is_none() {
        tracing::warn!(folder = %folder.display(), "the TLS authority there is broken or near its end: clients have to trust a new one");
    }
    Ok(found)
}

fn read(path: &Path) -> anyhow::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        // Not text: broken, as above.
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(Some(String::new())),
        Err(error) => Err(error).with_context(|| path.display().to_string()),
    }
}

fn make(folder: &Path, domain: &str, now: i64) -> anyhow::Result<(CertificateDer<'static>, KeyPair)> {
    let mut params = authority(domain);
    params.not_before = date_time_ymd(1970, 1, 1) + seconds(now - SKEW);
    params.not_after = date_time_ymd(1970, 1, 1) + seconds(now + AUTHORITY_LIFE);
    let key = KeyPair::generate()?;
    let certificate = params.self_signed(&key)?;
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    // The key first: a certificate is there only when its key is.
    write(folder, KEY, &key.serialize_pem(), 0o600)?;
    write(folder, CERTIFICATE, &certificate.pem(), 0o644)?;
    Ok((certificate.der().clone(), key))
}

/// What the authority is, but for its key and its time.
fn authority(domain: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = name(&common_name(domain));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.name_constraints = Some(NameConstraints {
        permitted_subtrees: vec![GeneralSubtree::DnsName(domain.to_owned())],
        excluded_subtrees: vec![],
    });
    params
}

/// At most 64 characters (RFC 5280, appendix A.1).
fn common_name(domain: &str) -> String {
    format!("hostd for {domain}").chars().take(64).collect()
}

fn name(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    name
}

fn seconds(seconds: i64) -> Duration {
    Duration::from_secs(u64::try_from(seconds).unwrap_or_default())
}

/// Whole or not at all.
fn write(folder: &Path, name: &str, text: &str, mode: u32) -> anyhow::Result<()> {
    let path = folder.join(name);
    let written = || {
        let temporary = folder.join(format!("{name}.new"));
        // One that a crash left may have another mode.
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, &path)
    };
    written().with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const NOW: i64 = 1_800_000_000;

    fn validity(certificate: &CertificateDer<'_>) -> (i64, i64) {
        let (_rest, parsed) = X509Certificate::from_der(certificate).unwrap();
        (parsed.validity().not_before.timestamp(), parsed.validity().not_after.timestamp())
    }

    #[test]
    fn one_authority_signs_a_new_certificate_each_time() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("new");
        let first = issue(&folder, "sbx.localhost", NOW).unwrap();
        let second = issue(&folder, "sbx.localhost", NOW + 60 * DAY).unwrap();
        assert_eq!(first.cert[1], second.cert[1], "the authority");
        assert_ne!(first.cert[0], second.cert[0]);
        assert_eq!(validity(&second.cert[0]), (NOW + 59 * DAY, NOW + 150 * DAY));
        second.keys_match().unwrap();
        let mode = fs::metadata(folder.join(KEY)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(!folder.join("server.key").exists());
    }

    #[test]
    fn an_authority_that_cannot_be_used_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let make = |now| issue(folder, "sbx.localhost", now).unwrap().cert[1].clone();
        let mut last = make(NOW);
        for file in [KEY, CERTIFICATE] {
            for broken in
                [&b""[..], b"\xff", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
            {
                fs::write(folder.join(file), broken).unwrap();
                let next = make(NOW);
                assert_ne!(next, last, "a broken {file}");
                last = next;
            }
        }
        fs::write(folder.join(KEY), KeyPair::generate().unwrap().serialize_pem()).unwrap();
        assert_ne!(make(NOW), last, "another's key");
        last = make(NOW);
        assert_eq!(make(NOW + AUTHORITY_LIFE - LIFE), last);
        let next = make(NOW + AUTHORITY_LIFE - LIFE + DAY);
        assert_ne!(next, last, "near its end");
        assert_ne!(issue(folder, "other.localhost", NOW).unwrap().cert[1], next, "another domain's");
    }

    #[test]
    fn a_long_domain_fits_into_a_certificate() {
        let folder = tempfile::tempdir().unwrap();
        let domain = format!("{}.{}.example", "a".repeat(63), "b".repeat(63));
        let again = || issue(folder.path(), &domain, NOW).unwrap().cert[1].clone();
        assert_eq!(again(), again());
    }
}
