//! Watchers on real directories: what inotify says is the kernel's business, what clients hear is ours.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use guestd_protocol::wire::filesystem::EventType;
use tempfile::TempDir;

use super::outbox::Item;
use super::{Options, Spec, Watch, WatchError, Watchers};
use crate::identity::{Accounts, User};

struct Fixture {
    base: TempDir,
    root: PathBuf,
    watchers: Arc<Watchers>,
}

impl Fixture {
    fn new() -> Self {
        let base = tempfile::tempdir().unwrap();
        let root = base.path().join("root");
        fs::create_dir(&root).unwrap();
        let watchers = Watchers::new(Arc::new(Accounts::new(Path::new("/"))));
        Self { base, root, watchers }
    }

    fn spec(&self, recursive: bool) -> Spec {
        spec(&self.root, Options { recursive, ..Options::default() })
    }

    async fn create(&self, recursive: bool) -> String {
        self.watchers.create(self.spec(recursive)).await.unwrap()
    }

    async fn events(&self, id: &str) -> Vec<String> {
        let events = self.watchers.events(id).await.unwrap();
        events.iter().map(|event| text(event.kind, &event.name)).collect()
    }

    /// How many directories the kernel watches.
    async fn watched(&self) -> usize {
        self.watchers.shared.engine.lock().await.watched()
    }

    async fn settled(&self, watched: usize) {
        for _ in 0..200 {
            if self.watched().await == watched {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{} directories are watched, not {watched}", self.watched().await);
    }

    async fn has_kernel(&self) -> bool {
        self.watchers.shared.engine.lock().await.kernel().is_some()
    }
}

fn spec(path: &Path, options: Options) -> Spec {
    let user = User {
        name: "root".to_owned(),
        uid: 0,
        gid: 0,
        home: "/root".into(),
        shell: PathBuf::new(),
        groups: vec![0],
    };
    Spec { path: path.to_owned(), options, user }
}

fn text(kind: EventType, name: &str) -> String {
    let kind = format!("{kind:?}").to_uppercase();
    format!("{} {name}", kind.strip_prefix("EVENT_TYPE_").unwrap_or(&kind))
}

fn upload(path: impl AsRef<Path>) {
    let mut file = fs::File::create(path).unwrap();
    std::os::unix::fs::fchown(&file, None, Some(nix::unistd::getegid().as_raw())).unwrap();
    std::io::Write::write_all(&mut file, b"content").unwrap();
}

async fn next(watch: &Watch) -> String {
    match tokio::time::timeout(Duration::from_secs(5), watch.outbox.next()).await.unwrap() {
        Item::Event(event) => text(event.kind, &event.name),
        Item::Lost(reason) => format!("LOST {reason}"),
    }
}

#[tokio::test]
async fn an_upload_is_three_events_in_order_at_once() {
    let fixture = Fixture::new();
    let id = fixture.create(false).await;
    for round in 0..200 {
        let name = format!("f{round}");
        upload(fixture.root.join(&name));
        let expected = ["CREATE", "CHMOD", "WRITE"].map(|kind| format!("{kind} {name}"));
        assert_eq!(fixture.events(&id).await, expected);
    }
    assert!(fixture.events(&id).await.is_empty());
}

#[tokio::test]
async fn every_kind_of_change_has_its_name_and_type() {
    let fixture = Fixture::new();
    let (root, id) = (&fixture.root, fixture.create(false).await);
    upload(root.join("f"));
    fixture.events(&id).await;
    upload(root.join("f"));
    assert_eq!(fixture.events(&id).await, ["WRITE f", "CHMOD f", "WRITE f"]);
    fs::rename(root.join("f"), root.join("g")).unwrap();
    assert_eq!(fixture.events(&id).await, ["RENAME f", "CREATE g"]);
    fs::rename(root.join("g"), fixture.base.path().join("g")).unwrap();
    assert_eq!(fixture.events(&id).await, ["RENAME g"]);
    fs::rename(fixture.base.path().join("g"), root.join("g")).unwrap();
    assert_eq!(fixture.events(&id).await, ["CREATE g"]);
    fs::set_permissions(root.join("g"), fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(fixture.events(&id).await, ["CHMOD g"]);
    fs::set_permissions(root, fs::Permissions::from_mode(0o700)).unwrap();
    assert_eq!(fixture.events(&id).await, ["CHMOD ."]);
    fs::create_dir_all(root.join("d/e")).unwrap();
    fs::remove_dir_all(root.join("d")).unwrap();
    fs::read(root.join("g")).unwrap();
    fs::remove_file(root.join("g")).unwrap();
    assert_eq!(fixture.events(&id).await, ["CREATE d", "REMOVE d", "REMOVE g"]);
}

#[tokio::test]
async fn a_removed_root_is_told_and_its_watcher_stays() {
    let fixture = Fixture::new();
    let id = fixture.create(true).await;
    fs::remove_dir(&fixture.root).unwrap();
    assert_eq!(fixture.events(&id).await, ["REMOVE ."]);
    fs::create_dir(&fixture.root).unwrap();
    upload(fixture.root.join("f"));
    assert!(fixture.events(&id).await.is_empty());
    fixture.watchers.remove(&id).unwrap();
}

#[tokio::test]
async fn a_moved_root_is_told_and_still_heard() {
    let fixture = Fixture::new();
    fs::create_dir(fixture.root.join("d")).unwrap();
    let id = fixture.create(true).await;
    let elsewhere = fixture.base.path().join("elsewhere");
    fs::rename(&fixture.root, &elsewhere).unwrap();
    fs::write(elsewhere.join("d/f"), "").unwrap();
    assert_eq!(fixture.events(&id).await, ["RENAME .", "CREATE d/f"]);
    // Nobody knows where it is, so what is new in it cannot be watched: that is said, not kept silent.
    fs::create_dir(elsewhere.join("new")).unwrap();
    assert!(matches!(fixture.watchers.events(&id).await, Err(WatchError::Lost { .. })));
}

async fn burst(fixture: &Fixture, count: usize) -> Vec<String> {
    let root = fixture.root.clone();
    let work = tokio::task::spawn_blocking(move || {
        for number in 0..count {
            let directory = root.join(format!("d{number}/sub"));
            fs::create_dir_all(&directory).unwrap();
            upload(directory.join("f"));
        }
    });
    work.await.unwrap();
    (0..count)
        .flat_map(|number| ["", "/sub", "/sub/f"].map(|rest| format!("CREATE d{number}{rest}")))
        .chain((0..count).map(|number| format!("WRITE d{number}/sub/f")))
        .collect()
}

fn counted(events: impl IntoIterator<Item = String>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for event in events {
        *counts.entry(event).or_default() += 1;
    }
    counts
}

fn assert_all_once(counts: &BTreeMap<String, usize>, expected: &[String]) {
    let missed: Vec<_> = expected.iter().filter(|event| !counts.contains_key(*event)).collect();
    assert!(missed.is_empty(), "{} missed: {:?}", missed.len(), &missed[..missed.len().min(5)]);
    let twice: Vec<_> =
        counts.iter().filter(|(event, count)| event.starts_with("CREATE") && **count > 1).collect();
    assert!(twice.is_empty(), "told twice: {twice:?}");
}

#[tokio::test]
async fn a_burst_of_nested_creates_is_told_whole_and_once_to_a_poll() {
    let fixture = Fixture::new();
    let id = fixture.create(true).await;
    for _ in 0..3 {
        let expected = burst(&fixture, 1000).await;
        assert_all_once(&counted(fixture.events(&id).await), &expected);
        for entry in fs::read_dir(&fixture.root).unwrap() {
            fs::remove_dir_all(entry.unwrap().path()).unwrap();
        }
        let removed = counted(fixture.events(&id).await);
        assert!((0..1000).all(|number| removed.contains_key(&format!("REMOVE d{number}"))));
        assert_eq!(fixture.watched().await, 1);
    }
}

#[tokio::test]
async fn a_burst_of_nested_creates_is_told_whole_and_once_to_a_stream() {
    let fixture = Fixture::new();
    let watch = fixture.watchers.open(fixture.spec(true)).await.unwrap();
    let writing = burst(&fixture, 1000);
    let reading = async {
        let mut counts = BTreeMap::new();
        // Every one of them ends with a write of the last file or with silence.
        while let Ok(item) = tokio::time::timeout(Duration::from_millis(500), watch.outbox.next()).await {
            let Item::Event(event) = item else { panic!("{item:?}") };
            *counts.entry(text(event.kind, &event.name)).or_default() += 1;
        }
        counts
    };
    let (expected, counts) = tokio::join!(writing, reading);
    assert_all_once(&counts, &expected);
}

#[tokio::test]
async fn what_was_in_a_tree_before_it_came_is_told_with_it() {
    let fixture = Fixture::new();
    let id = fixture.create(true).await;
    let outside = fixture.base.path().join("outside");
    fs::create_dir_all(outside.join("a/b")).unwrap();
    fs::write(outside.join("a/full"), "x").unwrap();
    fs::write(outside.join("a/empty"), "").unwrap();
    std::os::unix::fs::symlink("/etc", outside.join("a/link")).unwrap();
    fs::rename(&outside, fixture.root.join("in")).unwrap();
    assert_eq!(
        fixture.events(&id).await,
        [
            "CREATE in",
            "CREATE in/a",
            "CREATE in/a/b",
            "CREATE in/a/empty",
            "CREATE in/a/full",
            "WRITE in/a/full",
            "CREATE in/a/link",
        ]
    );
    fs::write(fixture.root.join("in/a/b/f"), "").unwrap();
    assert_eq!(fixture.events(&id).await, ["CREATE in/a/b/f"]);
}

#[tokio::test]
async fn a_directory_that_moves_within_the_tree_keeps_its_watches_under_its_new_name() {
    let fixture = Fixture::new();
    fs::create_dir_all(fixture.root.join("a/x")).unwrap();
    fs::create_dir(fixture.root.join("other")).unwrap();
    let id = fixture.create(true).await;
    fs::rename(fixture.root.join("a"), fixture.root.join("other/b")).unwrap();
    fs::write(fixture.root.join("other/b/x/f"), "").unwrap();
    assert_eq!(fixture.events(&id).await, ["RENAME a", "CREATE other/b", "CREATE other/b/x/f"]);
    assert_eq!(fixture.watched().await, 4);
    // Two moves at once, and a new directory under the old name.
    fs::rename(fixture.root.join("other/b"), fixture.root.join("c")).unwrap();
    fs::rename(fixture.root.join("c"), fixture.root.join("d")).unwrap();
    fs::create_dir(fixture.root.join("c")).unwrap();
    fs::write(fixture.root.join("c/new"), "").unwrap();
    fs::write(fixture.root.join("d/x/g"), "").unwrap();
    let events: BTreeSet<_> = fixture.events(&id).await.into_iter().collect();
    for expected in ["RENAME other/b", "CREATE c", "RENAME c", "CREATE d", "CREATE c/new", "CREATE d/x/g"] {
        assert!(events.contains(expected), "{expected}: {events:?}");
    }
    fs::write(fixture.root.join("d/x/h"), "").unwrap();
    fs::write(fixture.root.join("c/h"), "").unwrap();
    assert_eq!(fixture.events(&id).await, ["CREATE d/x/h", "CREATE c/h"]);
}

#[tokio::test]
async fn a_directory_that_is_moved_out_is_let_go() {
    let fixture = Fixture::new();
    fs::create_dir_all(fixture.root.join("a/x/y")).unwrap();
    let id = fixture.create(true).await;
    assert_eq!(fixture.watched().await, 4);
    let out = fixture.base.path().join("out");
    fs::rename(fixture.root.join("a"), &out).unwrap();
    fs::write(out.join("x/f"), "").unwrap();
    assert_eq!(fixture.events(&id).await, ["RENAME a"]);
    fixture.settled(1).await;
    fs::write(out.join("x/g"), "").unwrap();
    assert!(fixture.events(&id).await.is_empty());
}

#[tokio::test]
async fn a_link_to_a_directory_is_not_followed_into_but_may_be_the_root() {
    let fixture = Fixture::new();
    let outside = fixture.base.path().join("outside");
    fs::create_dir(&outside).unwrap();
    std::os::unix::fs::symlink(&outside, fixture.root.join("old")).unwrap();
    let id = fixture.create(true).await;
    std::os::unix::fs::symlink(&outside, fixture.root.join("new")).unwrap();
    fixture.events(&id).await;
    fs::write(outside.join("f"), "").unwrap();
    assert!(fixture.events(&id).await.is_empty());
    let linked = spec(&fixture.root.join("old"), Options::default());
    let linked = fixture.watchers.create(linked).await.unwrap();
    fs::write(outside.join("g"), "").unwrap();
    assert_eq!(fixture.events(&linked).await, ["CREATE g"]);
}

#[tokio::test]
async fn two_watchers_of_one_tree_hear_the_same_and_only_what_is_theirs() {
    let fixture = Fixture::new();
    let first = fixture.create(true).await;
    fs::create_dir(fixture.root.join("a")).unwrap();
    fs::write(fixture.root.join("a/f"), "").unwrap();
    let second = fixture.create(true).await;
    let flat = fixture.create(false).await;
    fs::create_dir_all(fixture.root.join("b/c")).unwrap();
    fs::write(fixture.root.join("a/g"), "").unwrap();
    let new = ["CREATE b", "CREATE b/c", "CREATE a/g"];
    assert_eq!(fixture.events(&first).await, [&["CREATE a", "CREATE a/f"][..], &new[..]].concat());
    assert_eq!(fixture.events(&second).await, new);
    assert_eq!(fixture.events(&flat).await, ["CREATE b"]);
    fixture.watchers.remove(&first).unwrap();
    fs::write(fixture.root.join("b/c/f"), "").unwrap();
    assert_eq!(fixture.events(&second).await, ["CREATE b/c/f"]);
}

#[tokio::test]
async fn an_entry_comes_with_what_exists_and_only_when_asked_for() {
    let fixture = Fixture::new();
    let options = Options { include_entry: true, ..Options::default() };
    let id = fixture.watchers.create(spec(&fixture.root, options)).await.unwrap();
    upload(fixture.root.join("f"));
    let events = fixture.watchers.events(&id).await.unwrap();
    for event in &events {
        let entry = event.entry.as_ref().unwrap();
        assert_eq!(entry.path, fixture.root.join("f").to_str().unwrap());
        assert_eq!(entry.size, 7);
    }
    fs::rename(fixture.root.join("f"), fixture.root.join("g")).unwrap();
    fs::remove_file(fixture.root.join("g")).unwrap();
    fs::set_permissions(&fixture.root, fs::Permissions::from_mode(0o700)).unwrap();
    let events = fixture.watchers.events(&id).await.unwrap();
    let described: Vec<_> = events.iter().map(|event| event.entry.is_some()).collect();
    // The new name had gone again by the time that it was looked at.
    assert_eq!(described, [false, false, false, true]);
    assert_eq!(events[3].entry.as_ref().unwrap().name, "root");
}

#[tokio::test]
async fn a_full_kernel_queue_is_told_once_and_the_watchers_live_on() {
    let fixture = Fixture::new();
    let polled = fixture.create(true).await;
    let stream = fixture.watchers.open(fixture.spec(true)).await.unwrap();
    {
        // While somebody has the engine, nobody reads the queue.
        let engine = fixture.watchers.shared.engine.lock().await;
        let queue = engine.kernel().unwrap().queue_limit;
        for number in 0..=queue {
            fs::File::create(fixture.root.join(format!("f{number}"))).unwrap();
        }
        fs::create_dir_all(fixture.root.join("late/later")).unwrap();
    }
    let error = fixture.watchers.events(&polled).await.unwrap_err();
    assert!(error.to_string().starts_with("events were lost: "), "{error}");
    assert_eq!(error.code(), connectrpc::ErrorCode::Internal);
    assert!(fixture.events(&polled).await.is_empty());
    assert!(next(&stream).await.starts_with("LOST "));
    fs::write(fixture.root.join("late/later/f"), "").unwrap();
    assert_eq!(fixture.events(&polled).await, ["CREATE late/later/f"]);
    assert_eq!(next(&stream).await, "CREATE late/later/f");
    assert_eq!(fixture.watched().await, 3);
}

#[tokio::test]
async fn a_client_that_does_not_listen_loses_its_own_events_and_nobody_elses() {
    let fixture = Fixture::new();
    let stalled = fixture.watchers.open(fixture.spec(false)).await.unwrap();
    let live = fixture.watchers.open(fixture.spec(false)).await.unwrap();
    let count = super::outbox::EVENT_LIMIT / 100 + 1;
    for batch in 0..count {
        for number in 0..100 {
            fs::File::create(fixture.root.join(format!("f{batch}-{number}"))).unwrap();
        }
        for number in 0..100 {
            assert_eq!(next(&live).await, format!("CREATE f{batch}-{number}"));
        }
    }
    assert!(next(&stalled).await.starts_with("LOST the client did not take them"));
    fs::File::create(fixture.root.join("after")).unwrap();
    assert_eq!(next(&stalled).await, "CREATE after");
}

#[tokio::test]
async fn watchers_that_end_leave_no_watch_and_no_instance() {
    let fixture = Fixture::new();
    fs::create_dir(fixture.root.join("d")).unwrap();
    assert!(!fixture.has_kernel().await);
    let mut watches = Vec::new();
    for _ in 0..200 {
        watches.push(fixture.watchers.open(fixture.spec(true)).await.unwrap());
    }
    let flat = fixture.watchers.open(fixture.spec(false)).await.unwrap();
    assert_eq!(fixture.watched().await, 2);
    drop(watches);
    fixture.settled(1).await;
    assert!(fixture.has_kernel().await);
    drop(flat);
    fixture.settled(0).await;
    assert!(!fixture.has_kernel().await);
    let again = fixture.watchers.open(fixture.spec(false)).await.unwrap();
    fs::write(fixture.root.join("f"), "").unwrap();
    assert_eq!(next(&again).await, "CREATE f");
}

#[tokio::test]
async fn a_failed_watch_leaves_nothing() {
    let fixture = Fixture::new();
    fs::write(fixture.root.join("file"), "").unwrap();
    let try_path = async |path: &str| {
        let spec = spec(Path::new(path), Options::default());
        fixture.watchers.create(spec).await.unwrap_err().to_string()
    };
    let root = fixture.root.display().to_string();
    assert_eq!(try_path(&format!("{root}/none")).await, format!("path {root}/none not found"));
    assert_eq!(try_path(&format!("{root}/file")).await, format!("path {root}/file not a directory"));
    assert!(!fixture.has_kernel().await);
}

#[tokio::test]
async fn a_tree_that_is_too_deep_is_refused_and_says_so() {
    let fixture = Fixture::new();
    let deep: PathBuf = (0..=super::DEPTH_LIMIT).map(|_| "d").collect();
    fs::create_dir_all(fixture.root.join(&deep)).unwrap();
    let error = fixture.watchers.create(fixture.spec(true)).await.unwrap_err();
    assert_eq!(error.code(), connectrpc::ErrorCode::ResourceExhausted, "{error}");
    fixture.settled(0).await;
    // One that becomes so is watched as far as it goes.
    fs::remove_dir_all(fixture.root.join("d")).unwrap();
    let id = fixture.create(true).await;
    fs::create_dir_all(fixture.root.join(&deep)).unwrap();
    assert!(matches!(fixture.watchers.events(&id).await, Err(WatchError::Lost { .. })));
    fs::write(fixture.root.join("d/d/f"), "").unwrap();
    assert_eq!(fixture.events(&id).await, ["CREATE d/d/f"]);
}

#[tokio::test]
async fn the_number_of_watchers_is_bounded() {
    let fixture = Fixture::new();
    let mut watches = Vec::new();
    for _ in 0..super::WATCHER_LIMIT {
        watches.push(fixture.watchers.open(fixture.spec(false)).await.unwrap());
    }
    let error = fixture.watchers.open(fixture.spec(false)).await.unwrap_err();
    assert_eq!(error.code(), connectrpc::ErrorCode::ResourceExhausted, "{error}");
    watches.pop();
    for _ in 0..100 {
        if fixture.watchers.open(fixture.spec(false)).await.is_ok() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("a freed place stays taken");
}

#[tokio::test(start_paused = true)]
async fn a_watcher_that_nobody_asks_for_is_freed_and_one_that_is_asked_lives() {
    let fixture = Fixture::new();
    let (gone, asked) = (fixture.create(false).await, fixture.create(false).await);
    tokio::time::sleep(super::polled::TTL / 2).await;
    fixture.events(&asked).await;
    tokio::time::sleep(super::polled::TTL / 2 + Duration::from_secs(1)).await;
    assert!(matches!(fixture.watchers.events(&gone).await, Err(WatchError::UnknownWatcher { .. })));
    assert!(fixture.watchers.events(&asked).await.is_ok());
    tokio::time::sleep(super::polled::TTL + Duration::from_secs(1)).await;
    assert!(matches!(fixture.watchers.remove(&asked), Err(WatchError::UnknownWatcher { .. })));
    fixture.settled(0).await;
}

#[tokio::test]
async fn a_watcher_goes_on_in_another_agent_with_what_was_not_heard() {
    let fixture = Fixture::new();
    fs::create_dir(fixture.root.join("d")).unwrap();
    let options = Options { recursive: true, include_entry: true, ..Options::default() };
    let id = fixture.watchers.create(spec(&fixture.root, options)).await.unwrap();
    upload(fixture.root.join("d/f"));
    let exported = serde_json::to_string(&fixture.watchers.export().await).unwrap();
    let successor = Fixture::new();
    let exported: Vec<super::WatcherState> = serde_json::from_str(&exported).unwrap();
    assert_eq!((exported.len(), exported[0].user.as_str()), (1, "root"));
    for exported in exported {
        let user = spec(Path::new("/"), Options::default()).user;
        successor.watchers.restore(exported, user).await.unwrap();
    }
    fs::remove_file(fixture.root.join("d/f")).unwrap();
    let events = successor.watchers.events(&id).await.unwrap();
    let texts: Vec<_> = events.iter().map(|event| text(event.kind, &event.name)).collect();
    assert_eq!(texts, ["CREATE d/f", "CHMOD d/f", "WRITE d/f", "REMOVE d/f"]);
    assert!(events[0].entry.as_ref().unwrap().path.ends_with("root/d/f"));
}

#[tokio::test]
async fn an_id_is_a_letter_and_twenty_random_ones() {
    let fixture = Fixture::new();
    let mut ids = BTreeSet::new();
    for _ in 0..20 {
        let id = fixture.create(false).await;
        assert!(id.len() == 21 && id.starts_with('w'), "{id}");
        assert!(id.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit()), "{id}");
        assert!(ids.insert(id));
    }
}

/// What a pass sees when two moves come between its look at a directory and the kernel's watch on it: the tree has the directory below
/// one that is, by then, within it.
#[tokio::test]
async fn a_directory_that_moved_into_its_own_child_before_that_was_watched_is_found_again() {
    let fixture = Fixture::new();
    let root = &fixture.root;
    fs::create_dir(root.join("a")).unwrap();
    let id = fixture.create(true).await;
    {
        let mut engine = fixture.watchers.shared.engine.lock().await;
        let (key, a) = engine.first_child("a");
        fs::create_dir(root.join("a/n")).unwrap();
        let n = super::directory::Directory::root(&root.join("a/n")).unwrap();
        fs::rename(root.join("a/n"), root.join("n")).unwrap();
        fs::rename(root.join("a"), root.join("n/a")).unwrap();
        engine.appear(key, a, "n".as_ref(), n);
    }
    fixture.events(&id).await;
    fixture.settled(3).await;
    fs::write(root.join("n/a/f"), "").unwrap();
    assert_eq!(fixture.events(&id).await, ["CREATE n/a/f"]);
}

#[tokio::test]
async fn a_directory_that_was_taken_for_one_that_moved_is_not_watched_after_it_left() {
    let fixture = Fixture::new();
    let (root, outside) = (&fixture.root, fixture.base.path());
    for directory in ["p", "q", "b"] {
        fs::create_dir(root.join(directory)).unwrap();
    }
    let id = fixture.create(true).await;
    // Each event meets a disk that is ahead of it.
    fs::create_dir(root.join("q/y")).unwrap();
    fs::create_dir(root.join("p/x")).unwrap();
    fs::rename(root.join("p/x"), root.join("q/y")).unwrap();
    fs::create_dir(root.join("p/x")).unwrap();
    fixture.watchers.shared.engine.lock().await.step(2);
    fs::rename(root.join("p/x"), outside.join("x")).unwrap();
    fixture.events(&id).await;
    fixture.settled(5).await;
    fs::write(root.join("q/y/f"), "").unwrap();
    assert_eq!(fixture.events(&id).await, ["CREATE q/y/f"]);
}

#[tokio::test]
async fn a_flood_does_not_keep_a_poll_from_ending() {
    let fixture = Fixture::new();
    let id = fixture.create(true).await;
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (root, stopped) = (fixture.root.clone(), Arc::clone(&stop));
    let flood = std::thread::spawn(move || {
        while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
            let _ = fs::create_dir(root.join("d"));
            let _ = fs::write(root.join("d/f"), "x");
            let _ = fs::remove_dir_all(root.join("d"));
        }
    });
    for _ in 0..3 {
        let polled = tokio::time::timeout(Duration::from_secs(20), fixture.watchers.events(&id)).await;
        let _some_were_lost = polled.unwrap();
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    flood.join().unwrap();
}

/// Random numbers that come again with the same seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }

    /// A path of one to three names out of three, so that everything gets into everything's way.
    fn path(&mut self) -> PathBuf {
        (0..=self.roll(3)).map(|_| ["a", "b", "c"][self.roll(3) as usize]).collect()
    }
}

fn shake(root: &Path, outside: &Path, dice: &mut Dice) {
    for number in 0..400 {
        let (path, other) = (root.join(dice.path()), root.join(dice.path()));
        // Most of it fails at one time or another; what does not is what the watcher has to follow.
        let _ = match dice.roll(8) {
            0 | 1 => fs::create_dir_all(&path),
            2 => fs::write(&path, "x"),
            3 | 4 => fs::rename(&path, &other),
            5 => fs::remove_dir_all(&path),
            6 => fs::rename(&path, outside.join(number.to_string())),
            _ => fs::read_dir(outside).and_then(|mut entries| match entries.next() {
                Some(entry) => fs::rename(entry?.path(), &path),
                None => Ok(()),
            }),
        };
    }
}

fn directories(root: &Path, below: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(root.join(below)).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            found.push(below.join(entry.file_name()));
            directories(root, &below.join(entry.file_name()), found);
        }
    }
}

#[tokio::test]
async fn after_any_turmoil_every_directory_is_watched_under_its_name_and_no_other_is() {
    for seed in 1..=40 {
        let fixture = Fixture::new();
        let (root, outside) = (fixture.root.clone(), fixture.base.path().join("outside"));
        fs::create_dir(&outside).unwrap();
        let id = fixture.create(true).await;
        let work = tokio::task::spawn_blocking(move || shake(&root, &outside, &mut Dice(seed)));
        while !work.is_finished() {
            fixture.events(&id).await;
        }
        work.await.unwrap();
        fixture.events(&id).await;
        let mut expected = Vec::new();
        directories(&fixture.root, Path::new(""), &mut expected);
        fixture.settled(expected.len() + 1).await;
        for directory in &expected {
            fs::File::create(fixture.root.join(directory).join("probe")).unwrap();
        }
        let told: Vec<_> = fixture.events(&id).await;
        let expected: Vec<_> =
            expected.iter().map(|path| format!("CREATE {}", path.join("probe").display())).collect();
        assert_eq!(told, expected, "seed {seed}");
    }
}
