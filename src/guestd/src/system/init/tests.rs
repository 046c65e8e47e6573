use super::*;
use crate::access::{Access, Rules};
use crate::activity::Activity;
use crate::agent::Config;
use crate::doors::Connections;
use crate::freeze::{Freezer, Request};
use crate::inhibit::Inhibition;
use crate::settings::Settings;

/// An agent whose machine is a folder.
struct Machine {
    system: Arc<System>,
    root: tempfile::TempDir,
}

impl Machine {
    fn new(own_machine: bool) -> Self {
        let root = tempfile::tempdir().unwrap();
        let config = Config {
            own_machine,
            root: root.path().to_owned(),
            cgroup_root: root.path().join("cgroup"),
            power_off: || {},
            ..Config::default()
        };
        let access = Arc::new(Access::new(Rules { insecure_open: false, own_machine }));
        let settings = Arc::new(Settings::new(own_machine));
        let freezer = Freezer::new(config.cgroup_root.clone(), "/proc".into());
        let inhibition = Inhibition::new(Activity::new(guestd_idle::Policy::default()));
        let system = System::new(access, settings, freezer, Connections::default(), inhibition, &config);
        Self { system, root }
    }

    fn group(&self, name: &str) -> std::path::PathBuf {
        let path = self.root.path().join("cgroup").join(name);
        std::fs::create_dir_all(&path).unwrap();
        std::fs::write(self.root.path().join("cgroup/cgroup.controllers"), "").unwrap();
        std::fs::write(path.join("cgroup.freeze"), "0").unwrap();
        path.join("cgroup.freeze")
    }

    async fn init(&self, body: &str) -> Reply {
        let caller = Caller { peer: Some(Peer::Unix), ..Caller::default() };
        take(&self.system, caller, body.as_bytes()).await
    }

    async fn status(&self, body: &str) -> u16 {
        self.init(body).await.failure.map_or(204, |(status, _)| status.as_u16())
    }
}

fn header<'a>(reply: &'a Reply, name: &HeaderName) -> Option<&'a str> {
    reply.headers.get(name).map(|value| value.to_str().unwrap())
}

#[tokio::test]
async fn an_older_call_does_not_undo_a_newer_one_and_an_equal_one_is_taken() {
    let machine = Machine::new(false);
    let call = |value: &str, second: u32| {
        format!(
            r#"{{"envVars":{{"A":"{value}"}},"timestamp":"2020-01-01T00:00:{second:02}Z","accessToken":"t"}}"#
        )
    };
    for (value, second, expected) in [("new", 10, "new"), ("old", 9, "new"), ("equal", 10, "equal")] {
        assert_eq!(machine.status(&call(value, second)).await, 204);
        assert_eq!(machine.system.settings.snapshot().environment["A"], expected);
    }
    assert_eq!(
        machine.status(r#"{"envVars":{"A":"x"},"accessToken":"t"}"#).await,
        204,
        "no timestamp always applies"
    );
    assert_eq!(machine.system.settings.snapshot().environment["A"], "x");
}

#[tokio::test]
async fn an_older_call_without_the_token_is_refused_all_the_same() {
    let machine = Machine::new(false);
    let frozen = machine.group("user");
    machine.init(r#"{"timestamp":"2020-01-01T00:00:10Z","accessToken":"t"}"#).await;
    machine.system.freezer.freeze(Request::default()).await.unwrap();
    let old = r#"{"timestamp":"2020-01-01T00:00:09Z","accessToken":"wrong"}"#;
    assert_eq!(machine.status(old).await, 401);
    assert_eq!(std::fs::read_to_string(&frozen).unwrap(), "1", "whoever may not initialise may not thaw");
    assert_eq!(machine.status(&old.replace("wrong", "t")).await, 204);
    assert_eq!(std::fs::read_to_string(&frozen).unwrap(), "0", "dropped for its age, it still thaws");
}

#[tokio::test]
async fn a_call_that_fails_after_it_was_authorized_leaves_the_machine_thawed() {
    let machine = Machine::new(false);
    let frozen = machine.group("user");
    machine.system.freezer.freeze(Request::default()).await.unwrap();
    let certificate = "-----BEGIN CERTIFICATE-----\\nMAIwAA==\\n-----END CERTIFICATE-----";
    std::fs::write(machine.root.path().join("etc"), "no folder").unwrap();
    let reply = machine.init(&format!(r#"{{"caBundle":"{certificate}","envVars":{{"A":"set"}}}}"#)).await;
    let (status, text) = reply.failure.as_ref().unwrap();
    assert_eq!(*status, StatusCode::BAD_REQUEST);
    assert!(text.contains("caBundle"), "{text}");
    assert_eq!(machine.system.settings.snapshot().environment["A"], "set", "what came before it stays");
    assert_eq!(std::fs::read_to_string(&frozen).unwrap(), "0");
    assert!(header(&reply, &AUDIT).unwrap().contains(r#""violations":0"#));
}

#[tokio::test]
async fn a_call_that_skips_the_thaw_says_so() {
    let machine = Machine::new(false);
    let frozen = machine.group("user");
    machine.system.freezer.freeze(Request::default()).await.unwrap();
    let reply = machine.init(r#"{"thaw":"skip"}"#).await;
    assert_eq!(header(&reply, &THAW), Some("skip"));
    assert!(!reply.thawed);
    assert_eq!(std::fs::read_to_string(&frozen).unwrap(), "1");
    let reply = machine.init("").await;
    assert_eq!((header(&reply, &THAW), reply.thawed), (None, true));
    assert_eq!(std::fs::read_to_string(&frozen).unwrap(), "0");
}

#[tokio::test]
async fn another_lifecycle_cuts_other_connections_and_the_first_and_the_same_do_not() {
    let machine = Machine::new(false);
    let mut history = History::default();
    for (lifecycle, restored) in [
        (Some("a"), false),
        (Some("a"), false),
        (None, false),
        (Some("b"), true),
        (Some("b"), false),
        (Some("a"), true),
    ] {
        assert_eq!(history.begin(None, lifecycle), restored, "{lifecycle:?}");
    }
    // A template that was set up without a name, and a clone of it that has one.
    let mut history = History::default();
    assert!(!history.begin(None, None));
    assert!(history.begin(None, Some("clone")));
    assert_eq!(machine.status(r#"{"lifecycleID":"a"}"#).await, 204);
}

#[tokio::test]
async fn the_answer_says_what_is_in_force() {
    let machine = Machine::new(false);
    let reply = machine.init(r#"{"cpuCount":1}"#).await;
    assert_eq!(header(&reply, &DEFAULTS), Some(r#"{"user":"root","fallback":true}"#));
    assert!(header(&reply, &CPUS).unwrap().contains("not the agent's to change"));
    assert_eq!(header(&reply, &CLOCK_CORRECTION), None);
    let reply = machine
        .init(r#"{"defaultUser":"root","defaultWorkdir":"/ü","timestamp":"2020-01-01T00:00:00Z"}"#)
        .await;
    assert_eq!(header(&reply, &DEFAULTS), Some(r#"{"user":"root","workdir":"/\u00fc","fallback":false}"#));
    assert!(header(&reply, &CLOCK_CORRECTION).unwrap().parse::<u64>().is_ok());
}

#[tokio::test]
async fn internal_variables_are_not_the_callers_to_change() {
    let machine = Machine::new(false);
    let body =
        r#"{"sandboxID":"real","hyperloopIP":"192.0.2.1","envVars":{"E2B_SANDBOX_ID":"forged","A":"b"}}"#;
    assert_eq!(machine.status(body).await, 204);
    let values = machine.system.settings.snapshot();
    assert_eq!(values.internal_environment["E2B_SANDBOX_ID"], "real");
    assert_eq!(values.internal_environment["E2B_EVENTS_ADDRESS"], "http://192.0.2.1");
    assert_eq!(machine.status("{}").await, 204);
    assert_eq!(machine.system.settings.snapshot().environment["A"], "b", "absent leaves them");
    assert_eq!(machine.status(r#"{"envVars":{}}"#).await, 204);
    assert!(machine.system.settings.snapshot().environment.is_empty(), "empty is a set of variables");
}

#[tokio::test]
async fn a_call_that_comes_while_another_hangs_waits_and_is_told_when_it_takes_too_long() {
    let machine = Machine::new(false);
    let turn = Arc::clone(&machine.system.history).lock_owned().await;
    tokio::time::pause();
    assert_eq!(machine.status("{}").await, 503);
    drop(turn);
    assert_eq!(machine.status("{}").await, 204);
}

#[tokio::test]
async fn a_host_that_hung_up_does_not_leave_a_call_half_done() {
    let machine = Machine::new(false);
    let turn = Arc::clone(&machine.system.history).lock_owned().await;
    let call = machine.init(r#"{"envVars":{"A":"b"}}"#);
    tokio::pin!(call);
    assert!(futures_util::poll!(call.as_mut()).is_pending());
    drop(turn);
    // It has its turn now, and its host is gone before it is done.
    assert!(futures_util::poll!(call.as_mut()).is_pending());
    #[allow(clippy::drop_non_drop)]
    drop(call);
    let _next = Arc::clone(&machine.system.history).lock_owned().await;
    assert_eq!(machine.system.settings.snapshot().environment["A"], "b");
}

#[tokio::test]
async fn code_of_a_user_on_the_agents_own_machine_cannot_initialise_it() {
    let machine = Machine::new(true);
    let stranger = Caller { peer: Some(Peer::Vsock { cid: 1 }), ..Caller::default() };
    let reply = take(&machine.system, stranger, br#"{"accessToken":"mine"}"#).await;
    assert_eq!(reply.failure.unwrap().0, StatusCode::UNAUTHORIZED);
    assert!(machine.system.access.access_token().is_none());
    assert_eq!(machine.status(r#"{"accessToken":"t"}"#).await, 204);
}
