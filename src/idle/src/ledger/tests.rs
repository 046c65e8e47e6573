use super::*;

fn at(millis: u64) -> Moment {
    Moment::from_millis(millis)
}

fn ledger() -> Ledger {
    Ledger::new(Policy::default(), at(0))
}

#[test]
fn a_long_call_is_not_idle_however_long_it_takes() {
    let mut ledger = ledger();
    let call = ledger.begin(HoldClass::Call, "/x", 0, at(10));
    assert_eq!(ledger.idle_for(at(1_000_000)), Duration::ZERO);
    ledger.end(call, at(1_000_000));
    assert_eq!(ledger.idle_for(at(1_000_500)), Duration::from_millis(500));
}

#[test]
fn an_open_terminal_without_bytes_is_idle() {
    let mut ledger = ledger();
    let terminal = ledger.begin(HoldClass::Terminal, "bash", 7, at(100));
    assert_eq!(ledger.idle_for(at(1_100)), Duration::from_secs(1));
    ledger.progress(terminal, 1, at(1_100));
    assert_eq!(ledger.idle_for(at(1_200)), Duration::from_millis(100));
    ledger.end(terminal, at(5_000));
    assert_eq!(ledger.idle_for(at(5_100)), Duration::from_millis(4_000), "closing is not use");
}

#[test]
fn a_detached_command_does_not_keep_the_sandbox() {
    let mut ledger = ledger();
    let command = ledger.begin(HoldClass::Command, "sleep", 3, at(0));
    ledger.reclass(command, HoldClass::Detached, at(2_000));
    assert_eq!(ledger.idle_for(at(3_000)), Duration::from_secs(1));
    ledger.reclass(command, HoldClass::Command, at(4_000));
    assert_eq!(ledger.idle_for(at(9_000)), Duration::ZERO, "a client came back");
}

#[test]
fn a_policy_can_keep_detached_commands() {
    let policy = Policy::default().with(HoldClass::Detached, Counting::WhileHeld);
    let mut ledger = Ledger::new(policy, at(0));
    let command = ledger.begin(HoldClass::Detached, "train", 3, at(0));
    assert_eq!(ledger.idle_for(at(9_000)), Duration::ZERO);
    ledger.end(command, at(9_000));
    assert_eq!(ledger.idle_for(at(9_001)), Duration::from_millis(1));
}

#[test]
fn a_detached_command_under_progress_counts_for_so_long_after_each_movement() {
    let linger = Duration::from_secs(10);
    let policy = Policy::default().with(HoldClass::Detached, Counting::OnProgress(linger));
    let mut ledger = Ledger::new(policy, at(0));
    let command = ledger.begin(HoldClass::Command, "train", 3, at(0));
    ledger.reclass(command, HoldClass::Detached, at(1_000));
    assert_eq!(ledger.sampled().collect::<Vec<_>>(), [(command, 3)]);
    ledger.progress(command, 0, at(5_000));
    assert_eq!(ledger.idle_for(at(15_000)), Duration::ZERO, "it moved ten seconds ago");
    assert_eq!(ledger.idle_for(at(17_000)), Duration::from_secs(2), "it hangs");
    let hold = ledger.by_blame()[0].1.clone();
    assert!(ledger.keeps(&hold, at(14_999)) && !ledger.keeps(&hold, at(15_000)));
    ledger.end(command, at(30_000));
    assert_eq!(ledger.idle_for(at(30_000)), Duration::from_secs(15), "its end is no use by itself");
}

#[test]
fn a_new_policy_counts_what_lives_already() {
    let mut ledger = ledger();
    ledger.begin(HoldClass::Detached, "train", 3, at(0));
    ledger.begin(HoldClass::Code, "cell", 0, at(0));
    assert_eq!(ledger.counting(), 1);
    let policy = Policy::default()
        .with(HoldClass::Detached, Counting::WhileHeld)
        .with(HoldClass::Code, Counting::WhileHeld);
    ledger.set_policy(policy, at(5_000));
    assert_eq!((ledger.counting(), ledger.idle_for(at(9_000))), (2, Duration::ZERO));
    let none =
        Policy::default().with(HoldClass::Detached, Counting::Never).with(HoldClass::Code, Counting::Never);
    ledger.set_policy(none, at(10_000));
    assert_eq!((ledger.counting(), ledger.idle_for(at(11_000))), (0, Duration::from_secs(1)));
}

#[test]
fn a_call_that_is_refused_does_not_keep_the_sandbox() {
    for class in [HoldClass::Call, HoldClass::Transfer] {
        let mut ledger = ledger();
        let stranger = ledger.begin_provisional(class, "stranger", at(5_000));
        assert_eq!(ledger.idle_for(at(6_000)), Duration::ZERO, "it may be somebody who may");
        ledger.progress(stranger, 10, at(6_000));
        ledger.end(stranger, at(7_000));
        assert_eq!((ledger.counting(), ledger.idle_for(at(8_000))), (0, Duration::from_secs(8)));
        let owner = ledger.begin_provisional(class, "owner", at(9_000));
        ledger.confirm(owner, at(9_000));
        ledger.end(owner, at(9_500));
        assert!(ledger.idle_for(at(10_000)) <= Duration::from_secs(1));
        assert_eq!(ledger.counting(), 0);
    }
}

#[test]
fn ending_a_hold_twice_counts_once() {
    let mut ledger = ledger();
    let first = ledger.begin(HoldClass::Call, "a", 0, at(0));
    let second = ledger.begin(HoldClass::Call, "b", 0, at(0));
    ledger.end(first, at(1));
    ledger.end(first, at(2));
    assert_eq!(ledger.counting(), 1);
    ledger.end(second, at(3));
    assert_eq!(ledger.counting(), 0);
}

#[test]
fn a_clock_that_steps_back_does_not_shorten_the_last_use() {
    let mut ledger = ledger();
    ledger.touch(HoldClass::Connect, "sdk", at(500));
    ledger.touch(HoldClass::Connect, "sdk", at(100));
    assert_eq!(ledger.last_activity(), at(500));
}

#[test]
fn the_history_keeps_the_newest_lines_only() {
    let mut ledger = ledger();
    for n in 0..100 {
        ledger.note(at(n), format!("{n}"));
    }
    let lines: Vec<_> = ledger.transitions().map(|t| t.what.clone()).collect();
    assert_eq!(lines.len(), REMEMBERED_TRANSITIONS);
    assert_eq!(lines.last().map(String::as_str), Some("99"));
}

#[test]
fn every_class_has_a_name_of_its_own() {
    for class in HoldClass::ALL {
        assert_eq!(HoldClass::from_name(class.name()), Some(class));
    }
}

#[test]
fn blame_lists_what_counts_first() {
    let mut ledger = ledger();
    ledger.begin(HoldClass::Terminal, "t", 0, at(0));
    ledger.begin(HoldClass::Command, "c", 0, at(1));
    let classes: Vec<_> = ledger.by_blame().iter().map(|(_, hold)| hold.class).collect();
    assert_eq!(classes, [HoldClass::Command, HoldClass::Terminal]);
}

#[test]
fn a_ledger_that_changes_hands_keeps_its_idle_clock_and_its_sequence_grows() {
    let mut before = ledger();
    let call = before.begin(HoldClass::Call, "a", 0, at(1_000));
    let job = before.begin(HoldClass::Detached, "job", 7, at(1_500));
    before.end(call, at(2_000));
    let text = serde_json::to_string(&before.export()).unwrap();
    let mut after = Ledger::restore(serde_json::from_str(&text).unwrap()).unwrap();
    assert_eq!(after.idle_for(at(9_000)), Duration::from_secs(7));
    assert!(after.sequence() > before.sequence());
    assert_eq!(after.ids().collect::<Vec<_>>(), [job]);
    assert_ne!(after.begin(HoldClass::Call, "b", 0, at(9_000)), job);
    assert_eq!(after.counting(), 1);
}
