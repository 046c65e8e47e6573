//! Who waits for whom, who loses what, and what is remembered.

use tokio::task::yield_now;

use super::pipe::SMALL as CHUNK;
use super::window::{GRACE, SPARE, STRETCHED_LIMIT};
use super::*;
use crate::activity::Activity;

fn output_in(budget: &Arc<Budget>) -> Arc<Output> {
    let activity = Activity::new(guestd_idle::Policy::default());
    let hold = activity.hold(guestd_idle::HoldClass::Command, "test");
    Arc::new(Output::new(Attachment::of(hold), Arc::clone(budget)))
}

fn output() -> Arc<Output> {
    output_in(&Budget::new(TOTAL_LIMIT))
}

/// A chunk whose bytes tell where in the output they are.
fn chunk(number: usize) -> Bytes {
    (number * CHUNK..(number + 1) * CHUNK).map(|at| (at % 251) as u8).collect()
}

fn end() -> End {
    End { status: Status::Exited(0), timed_out: false, record: Default::default() }
}

async fn flood(output: &Output, chunks: std::ops::Range<usize>) {
    for number in chunks {
        output.write(Channel::Stdout, chunk(number)).await;
        // Its readers have a turn, as on the agent's one thread.
        yield_now().await;
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    from: Option<u64>,
    bytes: u64,
    gaps: Vec<(u64, u64)>,
    ended: bool,
    cut_off: bool,
}

/// Reads to the end, and holds each byte to its offset.
async fn drain(mut reader: Reader) -> Seen {
    let mut seen = Seen::default();
    let mut at = None;
    while let Some(event) = reader.next().await {
        match event {
            Event::Data { offset, bytes, .. } => {
                assert_eq!(*at.get_or_insert(offset), offset, "nothing is left out or repeated in silence");
                assert!(bytes.iter().zip(offset..).all(|(byte, at)| u64::from(*byte) == at % 251));
                seen.from.get_or_insert(offset);
                seen.bytes += bytes.len() as u64;
                at = Some(offset + bytes.len() as u64);
            }
            Event::Gap { from, to } => {
                assert_eq!(*at.get_or_insert(from), from);
                seen.gaps.push((from, to));
                at = Some(to);
            }
            Event::End(_) => seen.ended = true,
            Event::CutOff => seen.cut_off = true,
        }
    }
    seen
}

/// More than a log holds, stretched or not.
const LONG: usize = 2 * STRETCHED_LIMIT / CHUNK;
const LONG_BYTES: u64 = 2 * STRETCHED_LIMIT as u64;

#[tokio::test]
async fn output_without_a_client_never_blocks_and_is_not_shown_to_who_does_not_ask() {
    let output = output();
    flood(&output, 0..LONG).await;
    let late = output.attach();
    output.finish(end());
    assert_eq!(drain(late).await, Seen { ended: true, ..Seen::default() });
}

#[tokio::test(start_paused = true)]
async fn a_slow_client_alone_holds_the_process_back_for_as_long_as_it_likes_and_loses_nothing() {
    let output = output();
    let reader = output.attach();
    let writer = tokio::spawn({
        let output = Arc::clone(&output);
        async move {
            flood(&output, 0..LONG).await;
            output.finish(end());
        }
    });
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert!(!writer.is_finished(), "the log is bounded");
    assert!(output.shared.lock().log.held() <= LOG_LIMIT);
    assert_eq!(
        drain(reader).await,
        Seen { from: Some(0), bytes: LONG_BYTES, ended: true, ..Seen::default() }
    );
}

/// Reads to the end; also the longest time between two pieces.
async fn drain_timed(mut reader: Reader) -> (u64, Duration) {
    let (mut bytes, mut longest, mut last) = (0, Duration::ZERO, Instant::now());
    while let Some(event) = reader.next().await {
        if let Event::Data { bytes: piece, .. } = &event {
            bytes += piece.len() as u64;
            longest = longest.max(last.elapsed());
            last = Instant::now();
        }
        assert_ne!(event, Event::CutOff);
    }
    (bytes, longest)
}

#[tokio::test(start_paused = true)]
async fn a_stalled_client_is_cut_off_and_the_live_one_loses_nothing_and_waits_five_milliseconds() {
    let output = output();
    let stalled = output.attach();
    let live = tokio::spawn(drain_timed(output.attach()));
    let began = Instant::now();
    flood(&output, 0..LONG).await;
    assert!(began.elapsed() <= GRACE + 2 * STEP, "{:?}", began.elapsed());
    assert!(output.shared.lock().log.held() <= LOG_LIMIT, "what was kept for the stalled one is given back");
    output.finish(end());
    let (bytes, longest) = live.await.unwrap();
    assert_eq!(bytes, LONG_BYTES);
    assert!(longest <= STEP + Duration::from_millis(1), "{longest:?}");
    let stalled = drain(stalled).await;
    assert!(stalled.cut_off && !stalled.ended, "the stalled client is told that it lost output");
}

/// Rests after each event.
async fn creep(mut reader: Reader, rest: Duration) -> Seen {
    let mut seen = Seen::default();
    while let Some(event) = reader.next().await {
        match event {
            Event::Data { bytes, .. } => seen.bytes += bytes.len() as u64,
            Event::Gap { from, to } => seen.gaps.push((from, to)),
            Event::End(_) => seen.ended = true,
            Event::CutOff => seen.cut_off = true,
        }
        tokio::time::sleep(rest).await;
    }
    seen
}

#[tokio::test(start_paused = true)]
async fn a_client_that_is_slower_and_reads_on_loses_nothing() {
    // A socket takes what a slow client reads in bursts.
    for rest in [1, 20, 450] {
        let output = output();
        let slow = tokio::spawn(creep(output.attach(), Duration::from_millis(rest)));
        let live = tokio::spawn(drain(output.attach()));
        flood(&output, 0..LONG).await;
        output.finish(end());
        for seen in [live.await.unwrap(), slow.await.unwrap()] {
            assert!(seen.bytes == LONG_BYTES && seen.ended && !seen.cut_off, "{seen:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_takes_a_piece_now_and_then_does_not_set_the_pace() {
    let output = output();
    let creeping = tokio::spawn(creep(output.attach(), 2 * GRACE));
    let live = tokio::spawn(drain_timed(output.attach()));
    flood(&output, 0..LONG).await;
    output.finish(end());
    let (bytes, longest) = live.await.unwrap();
    assert_eq!(bytes, LONG_BYTES);
    assert!(longest <= STEP + Duration::from_millis(1), "{longest:?}");
    assert!(creeping.await.unwrap().cut_off);
}

#[tokio::test(start_paused = true)]
async fn a_new_client_whose_socket_swallows_a_burst_does_no_harm_to_one_that_pauses() {
    let output = output();
    let old = output.attach();
    let writer = tokio::spawn({
        let output = Arc::clone(&output);
        async move {
            flood(&output, 0..LONG).await;
            output.finish(end());
        }
    });
    // Alone it is a whole window behind, and has done no wrong.
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut new = output.attach();
    let mut swallowed = 0;
    while swallowed < 2 * LOG_LIMIT {
        let Some(Event::Data { bytes, .. }) = new.next().await else { panic!("nobody is cut off") };
        swallowed += bytes.len();
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    let seen = drain(old).await;
    assert_eq!(seen, Seen { from: Some(0), bytes: LONG_BYTES, ended: true, ..Seen::default() });
    writer.await.unwrap();
    assert!(drain(new).await.cut_off, "it stood still while the other read all");
    assert!(output.shared.lock().log.held() <= LOG_LIMIT, "what was kept for the slow is given back");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_had_nothing_to_read_for_long_does_not_count_as_stalled() {
    let output = output();
    let mut quiet = output.attach();
    let live = tokio::spawn(drain(output.attach()));
    output.write(Channel::Stdout, chunk(0)).await;
    assert!(matches!(quiet.next().await, Some(Event::Data { .. })));
    tokio::time::sleep(Duration::from_secs(60)).await;
    // It comes too late for what fits at once, and in time for everybody's patience.
    let writer = tokio::spawn({
        let output = Arc::clone(&output);
        async move {
            flood(&output, 1..LONG).await;
            output.finish(end());
        }
    });
    tokio::time::sleep(GRACE - STEP).await;
    let seen = drain(quiet).await;
    assert!(seen.ended && !seen.cut_off, "{seen:?}");
    assert_eq!(live.await.unwrap().bytes, LONG_BYTES);
    writer.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_log_is_not_stretched_into_what_others_have_a_right_to() {
    let budget = Budget::new(TOTAL_LIMIT);
    let outputs: Vec<_> = (0..3).map(|_| output_in(&budget)).collect();
    let mut readers = Vec::new();
    for output in &outputs {
        readers.push(tokio::spawn(drain(output.attach())));
        // Slow, so that each log is kept long.
        readers.push(tokio::spawn(creep(output.attach(), GRACE / 2)));
    }
    let floods = outputs.iter().map(|output| async {
        for number in 0..LONG / 4 {
            flood(output, number..number + 1).await;
            assert!(budget.used() <= TOTAL_LIMIT - TOTAL_LIMIT / SPARE + 3 * CHUNK, "{}", budget.used());
        }
        output.finish(end());
    });
    futures_util::future::join_all(floods).await;
    for reader in readers {
        let seen = reader.await.unwrap();
        assert!(seen.ended && !seen.cut_off && seen.bytes == LONG_BYTES / 4, "{seen:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_stalled_client_that_asked_for_offsets_goes_on_behind_a_gap() {
    let output = output();
    let mut stalled = output.attach_at(0).unwrap();
    let live = tokio::spawn(drain(output.attach()));
    output.write(Channel::Stdout, chunk(0)).await;
    let Some(Event::Data { offset: 0, .. }) = stalled.next().await else { panic!("the first chunk") };
    flood(&output, 1..LONG).await;
    output.finish(end());
    assert_eq!(live.await.unwrap().bytes, LONG_BYTES);
    let seen = drain(stalled).await;
    let [(from, to)] = seen.gaps[..] else { panic!("{seen:?}") };
    assert_eq!(from, CHUNK as u64);
    assert_eq!(seen.bytes, LONG_BYTES - to);
    assert!(seen.ended && !seen.cut_off);
}

#[tokio::test(start_paused = true)]
async fn two_clients_that_both_stall_hold_the_process_back_and_neither_is_cut_off() {
    let output = output();
    let readers = [output.attach(), output.attach()];
    let writer = tokio::spawn({
        let output = Arc::clone(&output);
        async move {
            flood(&output, 0..LONG).await;
            output.finish(end());
        }
    });
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(!writer.is_finished());
    let readers = readers.map(|reader| tokio::spawn(drain(reader)));
    for reader in readers {
        assert_eq!(reader.await.unwrap().bytes, LONG_BYTES);
    }
}

#[tokio::test(start_paused = true)]
async fn a_second_client_frees_the_process_from_a_stalled_first() {
    let output = output();
    let stalled = output.attach();
    let writer = tokio::spawn({
        let output = Arc::clone(&output);
        async move {
            flood(&output, 0..LONG).await;
            output.finish(end());
        }
    });
    tokio::time::sleep(Duration::from_secs(60)).await;
    let live = drain(output.attach()).await;
    writer.await.unwrap();
    assert!(live.ended && !live.cut_off);
    assert!(drain(stalled).await.cut_off);
}

#[tokio::test]
async fn a_client_that_goes_frees_the_process() {
    let output = output();
    let reader = output.attach();
    let writer = tokio::spawn({
        let output = Arc::clone(&output);
        async move { flood(&output, 0..LONG).await }
    });
    yield_now().await;
    drop(reader);
    writer.await.unwrap();
}

#[tokio::test]
async fn a_client_that_comes_back_at_its_offset_misses_nothing_and_sees_nothing_twice() {
    let output = output();
    let mut first = output.attach();
    flood(&output, 0..8).await;
    let mut read = 0;
    while read < 3 * CHUNK as u64 + 1 {
        let Some(Event::Data { bytes, .. }) = first.next().await else { panic!("data") };
        read += bytes.len() as u64;
    }
    drop(first);
    flood(&output, 8..16).await;
    let second = output.attach_at(read - 7).unwrap();
    flood(&output, 16..20).await;
    output.finish(end());
    let seen = drain(second).await;
    assert_eq!((seen.from, seen.bytes), (Some(read - 7), 20 * CHUNK as u64 - (read - 7)));
    assert!(seen.ended && seen.gaps.is_empty());
}

#[tokio::test]
async fn what_the_log_forgot_is_a_gap_and_what_is_not_there_yet_an_error() {
    let output = output();
    flood(&output, 0..LONG).await;
    assert_eq!(
        output.attach_at(LONG_BYTES + 1).unwrap_err(),
        BeyondEnd { asked: LONG_BYTES + 1, end: LONG_BYTES }
    );
    let at_the_end = output.attach_at(LONG_BYTES).unwrap();
    let late = output.attach_at(5).unwrap();
    output.finish(end());
    let seen = drain(late).await;
    let [(5, to)] = seen.gaps[..] else { panic!("{seen:?}") };
    assert_eq!(seen.bytes, LONG_BYTES - to);
    assert!(seen.bytes > LOG_LIMIT as u64 * 9 / 10, "{}", seen.bytes);
    assert_eq!(drain(at_the_end).await, Seen { ended: true, ..Seen::default() });
}

#[tokio::test]
async fn stdout_and_stderr_share_one_run_of_offsets() {
    let output = output();
    let mut reader = output.attach_at(0).unwrap();
    output.write(Channel::Stdout, Bytes::from_static(b"one")).await;
    output.write(Channel::Stderr, Bytes::from_static(b"two")).await;
    output.write(Channel::Stdout, Bytes::from_static(b"three")).await;
    let mut seen = Vec::new();
    for _ in 0..3 {
        let Some(Event::Data { channel, offset, bytes }) = reader.next().await else { panic!("data") };
        seen.push((channel, offset, bytes.to_vec()));
    }
    assert_eq!(
        seen,
        [
            (Channel::Stdout, 0, b"one".to_vec()),
            (Channel::Stderr, 3, b"two".to_vec()),
            (Channel::Stdout, 6, b"three".to_vec())
        ]
    );
}

#[tokio::test]
async fn logs_stay_within_their_budget_and_a_flood_does_not_take_the_history_of_the_quiet() {
    let budget = Budget::new(4 * LOG_LIMIT);
    let quiet = output_in(&budget);
    quiet.write(Channel::Stdout, chunk(0)).await;
    let floods: Vec<_> = (0..20).map(|_| output_in(&budget)).collect();
    for _ in 0..3 {
        for output in &floods {
            flood(output, 0..LONG).await;
            assert!(budget.used() <= 4 * LOG_LIMIT);
        }
    }
    let reader = quiet.attach_at(0).unwrap();
    quiet.finish(end());
    let seen = drain(reader).await;
    assert_eq!((seen.bytes, seen.gaps.len()), (CHUNK as u64, 0));
    drop((floods, quiet));
    assert_eq!(budget.used(), 0, "what is gone costs nothing");
}

#[tokio::test(start_paused = true)]
async fn stalled_clients_of_other_processes_leave_a_process_one_chunk_to_go_on_with() {
    let budget = Budget::new(LOG_LIMIT);
    let hog = output_in(&budget);
    let stalled = hog.attach();
    let hogging = tokio::spawn({
        let hog = Arc::clone(&hog);
        async move { flood(&hog, 0..LONG).await }
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    let other = output_in(&budget);
    let reader = tokio::spawn(drain(other.attach()));
    flood(&other, 0..LONG).await;
    other.finish(end());
    assert_eq!(reader.await.unwrap().bytes, LONG_BYTES);
    assert!(budget.used() <= LOG_LIMIT + 2 * CHUNK);
    drop(stalled);
    hogging.await.unwrap();
}

#[tokio::test]
async fn a_thousand_quiet_processes_hold_nothing() {
    let budget = Budget::new(TOTAL_LIMIT);
    let outputs: Vec<_> = (0..1000).map(|_| output_in(&budget)).collect();
    let readers: Vec<_> = outputs.iter().map(|output| output.attach()).collect();
    assert_eq!((budget.used(), readers.len()), (0, 1000));
}

#[tokio::test]
async fn a_command_counts_while_a_client_is_attached_and_until_its_end_was_read() {
    let activity = Activity::new(guestd_idle::Policy::default());
    let hold = activity.hold(guestd_idle::HoldClass::Command, "test");
    let output = Output::new(Attachment::of(hold), Budget::new(TOTAL_LIMIT));
    let first = output.attach();
    assert_eq!(activity.report().counting, 1);
    drop(first);
    assert_eq!(activity.report().counting, 0, "detached");
    let second = output.attach_at(0).unwrap();
    assert_eq!(activity.report().counting, 1);
    output.finish(end());
    assert_eq!(activity.report().counting, 1, "the end is not read yet");
    drop(second);
    assert_eq!((activity.report().counting, activity.report().holds.len()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_line_of_the_agents_own_reaches_who_is_attached_waits_for_nobody_and_is_no_use() {
    let activity = Activity::new(guestd_idle::Policy::default());
    let hold = activity.hold(guestd_idle::HoldClass::Terminal, "bash");
    let attachment = Attachment::new(hold, guestd_idle::HoldClass::Terminal);
    let output = Output::new(attachment, Budget::new(TOTAL_LIMIT));
    output.announce(Channel::Pty, Bytes::from_static(b"to nobody"));
    let mut reader = output.attach();
    tokio::time::advance(Duration::from_secs(5)).await;
    output.announce(Channel::Pty, Bytes::from_static(b"ends soon"));
    let seen = reader.next().await;
    assert!(
        matches!(&seen, Some(Event::Data { channel: Channel::Pty, bytes, .. }) if bytes == "ends soon"),
        "{seen:?}"
    );
    assert_eq!(activity.idle_for(), Duration::from_secs(5));
    // A client that has stopped reading holds the process back; it does not hold up the line, and loses nothing of what it has yet to read.
    for number in 0..LOG_LIMIT / CHUNK {
        let written = output.write(Channel::Pty, chunk(number));
        if tokio::time::timeout(Duration::from_millis(1), written).await.is_err() {
            break;
        }
    }
    output.announce(Channel::Pty, Bytes::from_static(b"once more"));
    output.finish(end());
    let mut last = None;
    while let Some(event) = reader.next().await {
        assert_ne!(event, Event::CutOff);
        last = Some(event);
    }
    assert!(matches!(last, Some(Event::End(_))));
}

#[tokio::test(start_paused = true)]
async fn an_output_that_changes_hands_keeps_what_clients_have_yet_to_read() {
    let before = output();
    let reader = before.attach();
    flood(&before, 0..20).await;
    // More than there is room for: the writer waits with a chunk that nobody else has.
    let writer = tokio::spawn({
        let before = Arc::clone(&before);
        async move { flood(&before, 20..40).await }
    });
    for _ in 0..100 {
        yield_now().await;
    }
    assert!(!writer.is_finished());
    let mut store = crate::upgrade::Store::default();
    let state = before.export(&mut store);
    let state: OutputState = serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap();
    writer.abort();
    let activity = Activity::new(guestd_idle::Policy::default());
    let attachment = || Attachment::of(activity.hold(guestd_idle::HoldClass::Command, "test"));
    let budget = Budget::new(TOTAL_LIMIT);
    let (after, stand_ins) = Output::restore(&state, &store, attachment(), Arc::clone(&budget)).unwrap();
    assert_eq!(after.moved(), before.moved());
    let written = after.moved().stdout;
    assert!(written > 20 * CHUNK as u64);
    // The client is not back yet, and the process is held back all the same.
    let flooded = tokio::time::timeout(Duration::from_secs(60), after.write(Channel::Stdout, chunk(0))).await;
    assert!(flooded.is_err() && stand_ins.len() == 1);
    let back = after.attach_at(0).unwrap();
    drop(stand_ins);
    after.finish(end());
    let seen = drain(back).await;
    assert_eq!((seen.from, seen.gaps.len(), seen.bytes), (Some(0), 0, written));
    drop(reader);
    assert!(Output::restore(&state, &crate::upgrade::Store::default(), attachment(), budget).is_none());
}
