use std::sync::Mutex;

use super::*;

/// Records what is asked of it.
#[derive(Debug, Default)]
struct Recorder {
    calls: Mutex<Vec<String>>,
    mounted: Mutex<Vec<PathBuf>>,
    refuses: bool,
    hangs: bool,
}

impl Mounter for Recorder {
    fn mount(&self, source: &str, path: &Path, _options: &str) -> io::Result<()> {
        self.calls.lock().unwrap().push(format!("mount {source} {}", path.display()));
        if self.hangs {
            std::thread::sleep(Duration::from_millis(300));
        }
        if self.refuses {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        self.mounted.lock().unwrap().push(path.to_owned());
        Ok(())
    }

    fn unmount(&self, path: &Path) -> io::Result<()> {
        self.calls.lock().unwrap().push(format!("unmount {}", path.display()));
        self.mounted.lock().unwrap().retain(|mounted| mounted != path);
        Ok(())
    }

    fn is_mounted(&self, path: &Path) -> bool {
        self.mounted.lock().unwrap().iter().any(|mounted| mounted == path)
    }
}

fn volume(target: &str, path: &str) -> Result<Volume, VolumeError> {
    Volume::parse(&VolumeMount { nfs_target: target.to_owned(), path: path.to_owned() })
}

fn life(name: &str) -> Option<String> {
    Some(name.to_owned())
}

#[tokio::test]
async fn a_volume_is_mounted_again_only_in_another_life_of_the_machine() {
    let recorder = Arc::new(Recorder::default());
    let volumes = Volumes::new(recorder.clone());
    let one = || vec![volume("192.0.2.1:/a", "/mnt/a").unwrap()];
    for name in ["first", "first", "second", "second"] {
        volumes.apply(one(), life(name)).await.unwrap();
    }
    // The server's export changed, and somebody unmounted it.
    volumes.apply(vec![volume("192.0.2.1:/b", "/mnt/a").unwrap()], life("second")).await.unwrap();
    recorder.mounted.lock().unwrap().clear();
    volumes.apply(vec![volume("192.0.2.1:/b", "/mnt/a").unwrap()], life("second")).await.unwrap();
    assert_eq!(
        *recorder.calls.lock().unwrap(),
        [
            "mount 192.0.2.1:/a /mnt/a",
            "unmount /mnt/a",
            "mount 192.0.2.1:/a /mnt/a",
            "unmount /mnt/a",
            "mount 192.0.2.1:/b /mnt/a",
            "mount 192.0.2.1:/b /mnt/a",
        ]
    );
}

#[tokio::test]
async fn a_mount_that_failed_is_tried_again_and_the_error_names_it() {
    let recorder = Arc::new(Recorder { refuses: true, ..Recorder::default() });
    let volumes = Volumes::new(recorder.clone());
    for _again in 0..2 {
        let one = vec![volume("192.0.2.1:/a", "/mnt/a").unwrap()];
        let error = volumes.apply(one, life("first")).await.unwrap_err().to_string();
        assert!(error.contains("volumeMounts") && error.contains("/mnt/a"), "{error}");
    }
    assert_eq!(recorder.calls.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn mounts_that_hang_do_not_pile_up() {
    let volumes = Volumes::new(Arc::new(Recorder { hangs: true, ..Recorder::default() }));
    let one = || vec![volume("192.0.2.1:/a", "/mnt/a").unwrap()];
    let (first, second) = tokio::join!(volumes.apply(one(), None), volumes.apply(one(), None));
    assert!(first.is_ok());
    assert!(matches!(second, Err(VolumeError::Stuck)));
}

#[test]
fn the_options_are_those_of_the_contract() {
    let options = volume("192.0.2.1:/a", "/mnt/a").unwrap().options();
    for option in [
        "vers=3",
        "proto=tcp",
        "port=2049",
        "hard",
        "noac",
        "noacl",
        "lookupcache=none",
        "rsize=1048576",
        "wsize=1048576",
        "addr=192.0.2.1",
    ] {
        assert!(options.split(',').any(|given| given == option), "{option} in {options}");
    }
    assert!(volume("[2001:db8::1]:/a", "/m").unwrap().options().contains("proto=tcp6"));
}

#[test]
fn a_volume_that_makes_no_sense_is_refused_before_anything_is_mounted() {
    for target in ["", "192.0.2.1", "192.0.2.1:a", "server:/a", ":/a", "192.0.2.1:/a\0"] {
        assert!(matches!(volume(target, "/mnt"), Err(VolumeError::Target(_))), "{target:?}");
    }
    for path in ["", "/", "mnt", "/mnt/../etc", "/mnt\0"] {
        assert!(matches!(volume("192.0.2.1:/a", path), Err(VolumeError::Path(_))), "{path:?}");
    }
    let mount = VolumeMount { nfs_target: "192.0.2.1:/a".to_owned(), path: "/mnt/a".to_owned() };
    let again = VolumeMount { path: "/mnt/a/".to_owned(), ..mount.clone() };
    assert!(matches!(Volume::parse_all(&[mount.clone(), again]), Err(VolumeError::Twice(_))));
    assert!(matches!(Volume::parse_all(&vec![mount; VOLUMES_LIMIT + 1]), Err(VolumeError::TooMany)));
}
