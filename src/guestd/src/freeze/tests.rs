use std::fs;
use std::path::Path;

use super::*;

/// A tree of files that looks like one of control groups.
struct Fake(tempfile::TempDir);

impl Fake {
    fn new(groups: &[&str]) -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("cgroup.controllers"), "").unwrap();
        for group in groups {
            let path = root.path().join(group);
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("cgroup.freeze"), "0").unwrap();
            fs::write(path.join("cgroup.events"), "populated 1\nfrozen 1\n").unwrap();
        }
        Self(root)
    }

    fn freezer(&self) -> Arc<Freezer> {
        Freezer::new(self.0.path().to_owned(), "/proc".into())
    }

    fn set(&self, group: &str, value: &str) {
        fs::write(self.0.path().join(group).join("cgroup.freeze"), value).unwrap();
    }

    fn is_frozen(&self, group: &str) -> bool {
        groups::is_requested(&self.0.path().join(group))
    }
}

fn waiting(mode: Mode) -> Request {
    Request { mode, max_wait: Some(Duration::from_millis(50)), ..Request::default() }
}

#[tokio::test]
async fn legacy_freezes_what_clients_started_and_nothing_else() {
    let fake = Fake::new(&["user", "ptys", "socats", "other"]);
    let freezer = fake.freezer();
    let outcome = freezer.freeze(waiting(Mode::Legacy)).await.unwrap();
    assert_eq!((outcome.requested, outcome.frozen, outcome.visited), (2, 2, 2));
    assert!(fake.is_frozen("user") && fake.is_frozen("ptys"));
    assert!(!fake.is_frozen("socats") && !fake.is_frozen("other"));
    freezer.thaw().await.unwrap();
    assert!(!fake.is_frozen("user") && !fake.is_frozen("ptys"));
}

#[tokio::test]
async fn what_the_guest_froze_itself_stays_frozen_after_the_thaw_even_after_two_freezes() {
    let fake = Fake::new(&["user", "ptys", "init.scope", "docker"]);
    fake.set("docker", "1");
    let freezer = fake.freezer();
    for _twice in 0..2 {
        let outcome = freezer.freeze(waiting(Mode::Hierarchy)).await.unwrap();
        assert_eq!((outcome.pre_frozen, outcome.requested, outcome.allowlisted), (1, 2, 1));
    }
    assert!(!fake.is_frozen("init.scope"));
    freezer.thaw().await.unwrap();
    freezer.thaw().await.unwrap();
    assert!(fake.is_frozen("docker"));
    assert!(!fake.is_frozen("user") && !fake.is_frozen("ptys"));
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_nobody_thaws_thaws_itself() {
    let fake = Fake::new(&["user", "ptys"]);
    let freezer = fake.freezer();
    freezer.freeze(Request::default()).await.unwrap();
    tokio::time::sleep(WATCHDOG - Duration::from_secs(1)).await;
    assert!(fake.is_frozen("user"));
    tokio::time::sleep(Duration::from_secs(2)).await;
    // The watchdog's thaw holds the lock until it is done.
    drop(freezer.lock().await.unwrap());
    assert!(!fake.is_frozen("user"));
}

#[tokio::test(start_paused = true)]
async fn no_timer_is_left_after_a_thaw() {
    let fake = Fake::new(&["user"]);
    let freezer = fake.freezer();
    freezer.freeze(Request::default()).await.unwrap();
    freezer.thaw().await.unwrap();
    assert!(freezer.state.lock().await.watchdog.is_none());
    fake.set("user", "1");
    tokio::time::sleep(WATCHDOG * 2).await;
    assert!(fake.is_frozen("user"), "somebody else's freeze is not ours to undo");
}

#[tokio::test]
async fn an_init_that_came_before_a_freeze_does_not_undo_it() {
    let fake = Fake::new(&["user"]);
    let freezer = fake.freezer();
    let early = freezer.generation();
    freezer.freeze(Request::default()).await.unwrap();
    freezer.resume(early, true).await.unwrap();
    assert!(fake.is_frozen("user"));
    let audit = freezer.resume(freezer.generation(), false).await.unwrap().unwrap();
    assert!(fake.is_frozen("user"), "told to skip the thaw");
    assert_eq!(audit, Audit { visited: 1, frozen: 1, ..Audit::default() });
    freezer.resume(freezer.generation(), true).await.unwrap();
    assert!(!fake.is_frozen("user"));
    assert_eq!(
        freezer.resume(freezer.generation(), true).await.unwrap(),
        None,
        "nothing was frozen any more"
    );
}

#[tokio::test]
async fn the_audit_finds_what_escaped() {
    let fake = Fake::new(&["user", "init.scope", "a"]);
    let path = |group: &str| fake.0.path().join(group).join("cgroup.events");
    fs::write(path("init.scope"), "frozen 0\n").unwrap();
    let freezer = fake.freezer();
    freezer.freeze(waiting(Mode::Hierarchy)).await.unwrap();
    fs::write(path("a"), "frozen 0\n").unwrap();
    fs::write(path("init.scope"), "frozen 1\n").unwrap();
    let audit = freezer.resume(freezer.generation(), true).await.unwrap().unwrap();
    assert_eq!(audit, Audit { visited: 3, frozen: 1, escaped: 1, violations: 1, truncated: false });
}

#[tokio::test]
async fn an_agent_that_was_started_again_thaws_what_the_last_one_left() {
    let fake = Fake::new(&["user", "ptys"]);
    fake.set("user", "1");
    let freezer = fake.freezer();
    freezer.resume(freezer.generation(), true).await.unwrap();
    assert!(!fake.is_frozen("user"));
    fake.set("user", "1");
    freezer.resume(freezer.generation(), true).await.unwrap();
    assert!(fake.is_frozen("user"), "only the first time");
}

#[tokio::test]
async fn a_workload_that_the_guest_froze_itself_is_not_taken_for_an_earlier_agents() {
    let fake = Fake::new(&["user", "ptys"]);
    fake.set("user", "1");
    let freezer = fake.freezer();
    assert_eq!(freezer.freeze(waiting(Mode::Legacy)).await.unwrap().pre_frozen, 1);
    freezer.thaw().await.unwrap();
    assert!(fake.is_frozen("user") && !fake.is_frozen("ptys"));
}

#[tokio::test]
async fn without_control_groups_a_freeze_counts_nothing() {
    let empty = tempfile::tempdir().unwrap();
    let freezer = Freezer::new(empty.path().join("none"), "/proc".into());
    assert_eq!(freezer.freeze(waiting(Mode::Legacy)).await.unwrap(), Outcome::default());
    freezer.thaw().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_command_that_is_being_started_is_waited_for_but_not_for_ever() {
    let fake = Fake::new(&["user"]);
    let freezer = fake.freezer();
    let starting = freezer.spawning().await;
    let frozen = freezer.freeze(Request::default()).await.unwrap();
    assert_eq!(frozen.requested, 1, "a start that hangs does not keep a machine from its snapshot");
    drop(starting);
    let _next = freezer.spawning().await;
}

/// Over groups that this test made, where the machine has a hierarchy that may be written to.
#[tokio::test]
async fn a_real_group_stands_still_and_goes_on() {
    let Some(root) =
        ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].iter().map(Path::new).find_map(|hierarchy| {
            let root = hierarchy.join(format!("guestd-freeze-test-{}", std::process::id()));
            hierarchy.join("cgroup.controllers").is_file().then_some(())?;
            fs::create_dir(&root).and_then(|()| fs::create_dir(root.join("user"))).ok()?;
            Some(root)
        })
    else {
        return;
    };
    let mut child = std::process::Command::new("/bin/sleep").arg("100").spawn().unwrap();
    fs::write(root.join("user/cgroup.procs"), child.id().to_string()).unwrap();
    let freezer = Freezer::new(root.clone(), "/proc".into());
    let request =
        Request { mode: Mode::Hierarchy, max_wait: Some(Duration::from_secs(5)), ..Request::default() };
    let outcome = freezer.freeze(request).await.unwrap();
    let audit = freezer.resume(freezer.generation(), true).await.unwrap();
    let after = groups::stands_still(&root.join("user"));
    child.kill().unwrap();
    child.wait().unwrap();
    // The kernel needs a moment to see that the group is empty.
    while fs::remove_dir(root.join("user")).is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY)) {}
    fs::remove_dir(&root).unwrap();
    assert_eq!((outcome.requested, outcome.frozen, outcome.not_frozen), (1, 1, 0));
    assert_eq!(audit, Some(Audit { visited: 1, frozen: 1, ..Audit::default() }));
    assert!(!after);
}
