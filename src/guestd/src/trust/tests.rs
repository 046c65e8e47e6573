use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::*;

/// Something with the outer form of a certificate, different for each `seed`.
fn certificate(seed: u8) -> String {
    let mut der = vec![0x30, 0x81, 0x84, 0x30, 0x81, 0x81];
    der.extend(std::iter::repeat_n(seed, 0x81));
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", STANDARD.encode(der))
}

fn bundle(seed: u8) -> Bundle {
    Bundle::parse(&certificate(seed)).unwrap()
}

struct Machine(tempfile::TempDir);

impl Machine {
    fn new(store: &str) -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("etc/ssl/certs")).unwrap();
        fs::write(root.path().join(STORE), store).unwrap();
        Self(root)
    }

    fn store(&self) -> String {
        fs::read_to_string(self.0.path().join(STORE)).unwrap()
    }

    fn trust(&self) -> TrustStore {
        TrustStore::new(self.0.path().to_owned())
    }
}

#[test]
fn a_bundle_is_added_and_the_next_one_takes_its_place() {
    let machine = Machine::new("# the machine's\n");
    machine.trust().install(&bundle(1)).unwrap();
    assert_eq!(machine.store(), format!("# the machine's\n{}", bundle(1).text()));
    // The agent was started again: it knows from the disk.
    machine.trust().install(&bundle(2)).unwrap();
    assert_eq!(machine.store(), format!("# the machine's\n{}", bundle(2).text()));
    let persisted = fs::read_to_string(machine.0.path().join(PERSISTED)).unwrap();
    assert_eq!(persisted, bundle(2).text());
}

#[test]
fn the_same_bundle_again_changes_nothing() {
    let machine = Machine::new("");
    let trust = machine.trust();
    trust.install(&bundle(1)).unwrap();
    let path = machine.0.path().join(STORE);
    let before = fs::metadata(&path).unwrap().modified().unwrap();
    trust.install(&bundle(1)).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), before);
}

#[test]
fn a_certificate_that_the_machine_had_anyway_survives_the_replacement() {
    let machine = Machine::new(bundle(7).text());
    machine.trust().install(&bundle(7)).unwrap();
    machine.trust().install(&bundle(8)).unwrap();
    assert_eq!(machine.store(), format!("{}{}", bundle(7).text(), bundle(8).text()));
}

#[test]
fn a_store_behind_a_link_is_replaced_where_it_lies() {
    let machine = Machine::new("");
    let (path, real) = (machine.0.path().join(STORE), machine.0.path().join("real.pem"));
    fs::rename(&path, &real).unwrap();
    std::os::unix::fs::symlink(&real, &path).unwrap();
    machine.trust().install(&bundle(1)).unwrap();
    assert!(fs::symlink_metadata(&path).unwrap().is_symlink());
    assert_eq!(fs::read_to_string(&real).unwrap(), bundle(1).text());
    assert_eq!(fs::metadata(&real).unwrap().permissions().mode() & 0o777, 0o644);
}

#[test]
fn a_store_that_cannot_be_written_is_told_with_its_path() {
    let root = tempfile::tempdir().unwrap();
    fs::write(root.path().join("etc"), "a file").unwrap();
    let error = TrustStore::new(root.path().to_owned()).install(&bundle(1)).unwrap_err();
    assert!(error.to_string().contains("ca-certificates.crt"), "{error}");
}

#[test]
fn what_is_no_bundle_is_refused_and_the_error_says_why() {
    let private = certificate(1).replace("CERTIFICATE", "PRIVATE KEY");
    let cases = [
        (String::new(), PemError::Empty),
        ("hello".to_owned(), PemError::Empty),
        (private, PemError::OtherKind("PRIVATE KEY".to_owned())),
        (certificate(1) + "-----BEGIN CERTIFICATE-----\nMAA=\n", PemError::Unended(2)),
        ("-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n".to_owned(), PemError::NotBase64(1)),
        ("-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n".to_owned(), PemError::NotDer(1)),
        ("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n".to_owned(), PemError::NotDer(1)),
        (
            certificate(1).replace("\n-----END CERTIFICATE-----", "\n-----BEGIN CERTIFICATE-----"),
            PemError::Unended(1),
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(Bundle::parse(&text), Err(expected), "{text}");
    }
    let spaced = certificate(3).replace('\n', "  \r\n");
    assert_eq!(
        Bundle::parse(&format!("# comment\n{spaced}")).unwrap(),
        bundle(3),
        "one form for all spellings"
    );
}
