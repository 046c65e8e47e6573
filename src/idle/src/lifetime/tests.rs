use super::*;
use crate::terms::Asked;

const IDLE: Duration = Duration::from_secs(60);

fn at(millis: u64) -> Moment {
    Moment::from_millis(millis)
}

fn idle_sandbox() -> Lifetime {
    let limits = Limits::default();
    let terms = Asked::parse(None, Some("60"), &limits).unwrap().starting(at(0), &limits);
    Lifetime::new(terms, &IdleSettings::default(), 0, at(0))
}

fn idle_report(sequence: u64, idle: Duration) -> GuestReport {
    GuestReport { sequence, idle_for: idle, counting: 0 }
}

fn due(lifetime: &mut Lifetime, now: Moment) -> (u64, Moment) {
    let Step::Wait(due) = lifetime.step(now) else { panic!("not waiting") };
    let Step::Prepare { epoch, idle_for } = lifetime.step(due) else { panic!("not due") };
    assert_eq!(idle_for, IDLE);
    (epoch, due)
}

#[test]
fn an_unused_sandbox_is_released_between_its_timeout_and_a_second_later() {
    let mut lifetime = idle_sandbox();
    let (epoch, due) = due(&mut lifetime, at(0));
    assert!(due >= at(60_000) && due < at(61_000));
    assert_eq!(lifetime.answer(epoch, true, idle_report(1, IDLE), due), Verdict::Commit);
    assert_eq!(lifetime.step(due), Step::End(EndReason::Idle));
    assert_eq!(lifetime.admit(HoldClass::Call, "late", due), Err(EndReason::Idle));
}

#[test]
fn a_request_between_prepare_and_answer_calls_the_release_off() {
    let mut lifetime = idle_sandbox();
    let (epoch, due) = due(&mut lifetime, at(0));
    let hold = lifetime.admit(HoldClass::Call, "/x", due + Duration::from_millis(1)).unwrap();
    let answered = due + Duration::from_millis(2);
    assert_eq!(lifetime.answer(epoch, true, idle_report(1, IDLE), answered), Verdict::Abort);
    lifetime.confirm(hold, answered);
    lifetime.release_hold(hold, answered);
    assert_eq!(lifetime.releases_in(answered), Some(IDLE + MARGIN));
}

#[test]
fn a_request_that_came_and_went_during_the_prepare_counts() {
    let mut lifetime = idle_sandbox();
    let (epoch, due) = due(&mut lifetime, at(0));
    let hold = lifetime.admit(HoldClass::Call, "/x", due).unwrap();
    lifetime.confirm(hold, due);
    lifetime.release_hold(hold, due);
    assert_eq!(lifetime.answer(epoch, true, idle_report(1, IDLE), due), Verdict::Abort);
}

#[test]
fn an_answer_after_the_fence_may_have_opened_is_not_trusted() {
    let mut lifetime = idle_sandbox();
    let (epoch, due) = due(&mut lifetime, at(0));
    let late = due + PREPARE_DEADLINE;
    assert_eq!(lifetime.answer(epoch, true, idle_report(1, IDLE), late), Verdict::Abort);
    assert!(lifetime.ended().is_none());
}

#[test]
fn a_guest_that_says_busy_for_ever_ends_at_the_hard_end() {
    let mut lifetime = idle_sandbox();
    let mut now = at(0);
    loop {
        match lifetime.step(now) {
            Step::Wait(until) => now = until,
            Step::Prepare { epoch, .. } => {
                let busy = GuestReport { sequence: epoch, idle_for: Duration::ZERO, counting: 0 };
                assert_eq!(lifetime.answer(epoch, false, busy, now), Verdict::Abort);
            }
            Step::Notify { .. } => panic!("nobody asked for notice"),
            Step::End(reason) => {
                assert_eq!(reason, EndReason::Lifetime);
                assert!(now >= at(3_600_000) && now <= at(3_601_000));
                return;
            }
        }
    }
}

#[test]
fn a_silent_guest_is_given_up_as_crashed() {
    let mut lifetime = idle_sandbox();
    let mut now = at(0);
    loop {
        match lifetime.step(now) {
            Step::Wait(until) => now = until,
            Step::Prepare { .. } | Step::Notify { .. } => {}
            Step::End(reason) => {
                assert_eq!(reason, EndReason::Crashed);
                assert!(now < at(95_000), "{now:?}");
                return;
            }
        }
    }
}

#[test]
fn a_silent_guest_that_was_busy_is_kept_until_the_hard_end() {
    let mut lifetime = idle_sandbox();
    lifetime.report(GuestReport { sequence: 9, idle_for: Duration::ZERO, counting: 1 }, at(10));
    let Step::Wait(until) = lifetime.step(at(11)) else { panic!("not waiting") };
    assert_eq!(until, lifetime.terms().end + MARGIN);
}

#[test]
fn an_old_report_does_not_replace_a_newer_one() {
    let mut lifetime = idle_sandbox();
    lifetime.report(GuestReport { sequence: 9, idle_for: Duration::ZERO, counting: 1 }, at(10));
    lifetime.report(idle_report(8, IDLE), at(11));
    assert_eq!(lifetime.releases_in(at(12)), None);
}

#[test]
fn an_adopted_sandbox_keeps_its_idle_clock() {
    let limits = Limits::default();
    let terms = Asked::parse(None, Some("60"), &limits).unwrap().starting(at(0), &limits);
    let report = idle_report(40, Duration::from_secs(50));
    let lifetime = Lifetime::adopt(terms, &IdleSettings::default(), 3, report, None, at(100_000));
    assert_eq!(lifetime.releases_in(at(100_000)), Some(Duration::from_secs(10) + MARGIN));
    assert_eq!(lifetime.epoch(), 3);
    let settings = IdleSettings::default();
    let lifetime = Lifetime::adopt(terms, &settings, 3, report, Some(at(70_000)), at(100_000));
    assert_eq!(
        lifetime.releases_in(at(100_000)),
        Some(Duration::from_secs(30) + MARGIN),
        "a request to a port of the guest"
    );
}

#[test]
fn a_plain_timeout_ends_a_busy_sandbox() {
    let limits = Limits::default();
    let terms = Asked::parse(Some(20), None, &limits).unwrap().starting(at(0), &limits);
    let mut lifetime = Lifetime::new(terms, &IdleSettings::default(), 0, at(0));
    lifetime.admit(HoldClass::Call, "/x", at(1)).unwrap();
    assert_eq!(lifetime.step(at(21_000)), Step::End(EndReason::Timeout));
}

fn with_notice(seconds: u64) -> Lifetime {
    let limits = Limits::default();
    let terms = Asked::parse(None, Some("60"), &limits).unwrap().starting(at(0), &limits);
    let settings = IdleSettings { notice: Some(Duration::from_secs(seconds)), ..Default::default() };
    Lifetime::new(terms, &settings, 0, at(0))
}

fn wait(lifetime: &mut Lifetime, now: Moment) -> Moment {
    let Step::Wait(until) = lifetime.step(now) else { panic!("not waiting") };
    until
}

#[test]
fn a_notice_comes_once_and_the_release_is_not_later_for_it() {
    let mut lifetime = with_notice(30);
    let notify = wait(&mut lifetime, at(0));
    assert_eq!(notify, at(30_000) + MARGIN);
    let Step::Notify { reason, ends_in, idle_for } = lifetime.step(notify) else { panic!("no notice") };
    assert_eq!((reason, ends_in), (EndReason::Idle, Duration::from_secs(30)));
    assert_eq!(idle_for, Some(Duration::from_secs(30)));
    // A report that differs by a rounding is the same end.
    lifetime.report(idle_report(1, Duration::from_millis(30_148)), notify);
    let due = wait(&mut lifetime, notify);
    assert!(due <= at(60_000) + MARGIN + SAME_END);
    assert!(matches!(lifetime.step(due), Step::Prepare { .. }));
}

#[test]
fn use_during_the_notice_wins_and_the_next_idleness_is_announced_again() {
    let mut lifetime = with_notice(30);
    let notify = wait(&mut lifetime, at(0));
    assert!(matches!(lifetime.step(notify), Step::Notify { .. }));
    lifetime.touch("sdk", at(50_000));
    let again = wait(&mut lifetime, at(50_000));
    assert_eq!(again, at(80_000) + MARGIN);
    assert!(matches!(lifetime.step(again), Step::Notify { reason: EndReason::Idle, .. }));
}

#[test]
fn a_guest_that_is_in_use_gets_its_notice_when_it_is_not() {
    let mut lifetime = with_notice(30);
    let notify = wait(&mut lifetime, at(0));
    assert!(matches!(lifetime.step(notify), Step::Notify { .. }));
    // Somebody types in a terminal, which the host does not see.
    lifetime.refuse_notice(idle_report(2, Duration::from_secs(1)), notify);
    let again = wait(&mut lifetime, notify);
    assert_eq!(again, notify - Duration::from_secs(1) + Duration::from_secs(30) + MARGIN);
    assert!(matches!(lifetime.step(again), Step::Notify { .. }));
}

#[test]
fn the_hard_end_is_announced_to_a_busy_sandbox_and_comes_all_the_same() {
    let mut lifetime = with_notice(60);
    lifetime.admit(HoldClass::Call, "/x", at(1)).unwrap();
    let notify = wait(&mut lifetime, at(1));
    assert_eq!(notify, at(3_540_000) + MARGIN);
    assert!(matches!(
        lifetime.step(notify),
        Step::Notify { reason: EndReason::Lifetime, idle_for: None, .. }
    ));
    let end = wait(&mut lifetime, notify);
    assert_eq!(lifetime.step(end), Step::End(EndReason::Lifetime));
}

#[test]
fn a_liar_cannot_make_the_host_spin_with_notices() {
    let mut lifetime = with_notice(30);
    let mut now = at(0);
    let mut notices = 0;
    while now < at(100_000) {
        match lifetime.step(now) {
            Step::Wait(until) => now = until,
            Step::Notify { .. } => {
                notices += 1;
                lifetime.refuse_notice(idle_report(notices, Duration::from_secs(40)), now);
            }
            Step::Prepare { epoch, .. } => {
                lifetime.answer(epoch, false, idle_report(notices, Duration::from_secs(60)), now);
            }
            Step::End(_) => break,
        }
    }
    assert!(notices <= 100_000 / 250, "{notices}");
}

#[test]
fn a_sandbox_whose_client_left_during_the_boot_tells_a_session_from_a_kill() {
    assert_eq!(session().abandon(at(1)), EndReason::Session);
    assert_eq!(idle_sandbox().abandon(at(1)), EndReason::Killed);
}

fn session() -> Lifetime {
    let terms = Asked::session(Duration::from_secs(60)).starting(at(0), &Limits::default());
    Lifetime::new(terms, &IdleSettings::default(), 0, at(0))
}

#[test]
fn a_session_ends_when_its_connection_closes_and_a_late_sign_of_life_does_not_bring_it_back() {
    let mut lifetime = session();
    lifetime.close_session("closed", at(500));
    lifetime.hear(at(500), at(501));
    assert_eq!(lifetime.step(at(501)), Step::End(EndReason::Session));
}

#[test]
fn a_silent_client_of_a_session_is_given_up_at_the_liveness_limit() {
    let mut lifetime = session();
    assert_eq!(wait(&mut lifetime, at(0)), at(60_000));
    lifetime.hear(at(30_000), at(31_000));
    lifetime.hear(at(20_000), at(32_000));
    assert_eq!(wait(&mut lifetime, at(60_000)), at(90_000));
    assert_eq!(lifetime.session_ends_in(at(60_000)), Some(Duration::from_secs(30)));
    assert_eq!(lifetime.step(at(90_000)), Step::End(EndReason::Session));
}

#[test]
fn a_session_whose_end_was_moved_ends_there_while_its_client_is_still_connected() {
    let mut lifetime = session();
    lifetime.set_left(Duration::from_secs(10), at(1_000)).unwrap();
    let end = wait(&mut lifetime, at(1_000));
    assert_eq!(end, at(11_000) + MARGIN);
    lifetime.hear(end, end);
    assert_eq!(lifetime.step(end), Step::End(EndReason::Timeout));
}

#[test]
fn a_duration_sandbox_has_no_session_to_lose() {
    let terms = Asked::lasting(Duration::from_secs(300)).starting(at(0), &Limits::default());
    let mut lifetime = Lifetime::new(terms, &IdleSettings::default(), 0, at(0));
    lifetime.close_session("closed", at(1));
    assert_eq!(wait(&mut lifetime, at(2)), at(300_000) + MARGIN);
    assert_eq!(lifetime.session_ends_in(at(2)), None);
}

#[test]
fn an_adopted_session_ends_at_once_and_an_adopted_duration_at_its_own_end() {
    let (limits, settings) = (Limits::default(), IdleSettings::default());
    let report = idle_report(1, Duration::ZERO);
    let terms = Asked::session(Duration::from_secs(60)).starting(at(0), &limits);
    let mut lifetime = Lifetime::adopt(terms, &settings, 1, report, None, at(5_000));
    assert_eq!(lifetime.step(at(5_000)), Step::End(EndReason::Session));
    let terms = Asked::lasting(Duration::from_secs(20)).starting(at(0), &limits);
    let mut lifetime = Lifetime::adopt(terms, &settings, 1, report, None, at(5_000));
    assert_eq!(wait(&mut lifetime, at(5_000)), at(20_000) + MARGIN);
}

#[test]
fn the_first_reason_stays() {
    let mut lifetime = idle_sandbox();
    assert_eq!(lifetime.end(EndReason::Killed, at(5)), EndReason::Killed);
    assert_eq!(lifetime.end(EndReason::Crashed, at(6)), EndReason::Killed);
    assert_eq!(lifetime.step(at(7)), Step::End(EndReason::Killed));
}
