//! The guest's gate under random schedules of threads, as the agent keeps it: under one lock, with whoever waits woken at each change.
//!
//! Callers pass the fence, hold, take a second hold inside (a call that starts a process) and go. A host prepares, commits, aborts, or
//! falls silent; its messages come late, twice, and for epochs that are not its own. A clock goes on whenever it likes. Each schedule is another
//! interleaving; one in which a caller is never woken is a deadlock, which shuttle reports.

use std::time::Duration;

use guestd_idle::{Gate, HoldClass, Moment, Passage, Policy};
use shuttle::rand::{Rng, thread_rng};
use shuttle::sync::{Arc, Condvar, Mutex};
use shuttle::thread;

const CALLERS: usize = 3;
const EPOCHS: u64 = 3;

/// How many schedules; `FENCE_SCHEDULES` changes it.
const SCHEDULES: usize = 100_000;

struct Guest {
    gate: Gate,
    now: Moment,
    /// Calls that were let in so far.
    admitted: usize,
    /// The newest epoch that the host has asked with, and the newest that arrived.
    asked: u64,
    arrived: u64,
    /// The epoch that was told "ready" last, and how many had been let in by then.
    ready: Option<(u64, usize)>,
    committed: bool,
    host_is_done: bool,
}

struct Shared {
    guest: Mutex<Guest>,
    changed: Condvar,
}

impl Shared {
    fn change<T>(&self, change: impl FnOnce(&mut Guest) -> T) -> T {
        let result = change(&mut self.guest.lock().unwrap());
        self.changed.notify_all();
        result
    }

    fn prepare(&self, epoch: u64) -> bool {
        self.change(|guest| {
            let before = guest.gate.state_name();
            let ready = guest.gate.prepare(epoch, Duration::ZERO, guest.now);
            if epoch <= guest.arrived {
                assert!(!ready, "ready for an epoch that was used");
                assert_eq!(guest.gate.state_name(), before, "an epoch that was used moved the fence");
            }
            guest.arrived = guest.arrived.max(epoch);
            if ready {
                assert_eq!(guest.gate.ledger.counting(), 0, "ready, though somebody holds");
                assert!(!guest.committed, "ready again after the end");
                guest.ready = Some((epoch, guest.admitted));
            }
            ready
        })
    }

    fn abort(&self, epoch: u64) {
        self.change(|guest| {
            let before = guest.gate.state_name();
            guest.gate.abort(epoch);
            if epoch != guest.arrived {
                assert_eq!(guest.gate.state_name(), before, "an abort of another epoch moved the fence");
            }
        });
    }

    fn commit(&self, epoch: u64) {
        self.change(|guest| {
            let committed = guest.gate.commit(epoch, guest.now);
            if committed && !guest.committed {
                assert_eq!(guest.gate.ledger.counting(), 0, "committed under a live hold");
                assert_eq!(guest.ready, Some((epoch, guest.admitted)), "somebody came in since it was ready");
            }
            assert!(committed || !guest.committed, "a committed release came undone");
            guest.committed |= committed;
        });
    }

    fn call(&self) {
        let mut guest = self.guest.lock().unwrap();
        let hold = loop {
            let now = guest.now;
            match guest.gate.admit(HoldClass::Call, "call", now) {
                Passage::Admitted(hold) => break hold,
                Passage::Gone => {
                    assert!(guest.committed, "told that it is gone, which it is not");
                    return;
                }
                Passage::Wait(until) => {
                    assert!(until > now, "a wait that is over already");
                    guest = self.changed.wait(guest).unwrap();
                }
            }
        };
        assert!(!guest.committed, "admitted behind a committed fence");
        guest.admitted += 1;
        drop(guest);
        let inner = thread_rng().r#gen::<bool>().then(|| {
            self.change(|guest| guest.gate.ledger.begin(HoldClass::Command, "command", 1, guest.now))
        });
        self.change(|guest| {
            assert!(!guest.committed, "released under a live call");
            guest.gate.ledger.end(hold, guest.now);
        });
        if let Some(inner) = inner {
            self.change(|guest| {
                assert!(!guest.committed, "released under a live command");
                guest.gate.ledger.end(inner, guest.now);
            });
        }
    }

    fn host(&self) {
        for epoch in 1..=EPOCHS {
            self.change(|guest| guest.asked = epoch);
            let ready = self.prepare(epoch);
            match thread_rng().gen_range(0..4) {
                0 | 1 if ready => self.commit(epoch),
                2 => self.abort(epoch),
                // Silence.
                _ => {}
            }
        }
    }

    /// What was under way for long: repeated messages, and another supervisor's.
    fn network(&self) {
        for _ in 0..3 {
            let asked = self.guest.lock().unwrap().asked;
            match thread_rng().gen_range(0..3) {
                0 => drop(self.prepare(thread_rng().gen_range(0..=asked))),
                1 => self.abort(thread_rng().gen_range(0..=EPOCHS)),
                // It succeeds for the epoch that is ready, and for no other.
                _ => self.commit(thread_rng().gen_range(0..=EPOCHS)),
            }
        }
    }

    /// Stands for each waiting caller's own timer.
    fn clock(&self) {
        for _ in 0..3 {
            self.change(|guest| guest.now = guest.now + Duration::from_millis(900));
        }
        let mut guest = self.guest.lock().unwrap();
        while !guest.host_is_done {
            guest = self.changed.wait(guest).unwrap();
        }
        guest.now = guest.now + Duration::from_secs(2);
        drop(guest);
        self.changed.notify_all();
    }
}

fn schedule() {
    let guest = Guest {
        gate: Gate::new(Policy::default(), Moment::default()),
        now: Moment::default(),
        admitted: 0,
        asked: 0,
        arrived: 0,
        ready: None,
        committed: false,
        host_is_done: false,
    };
    let shared = Arc::new(Shared { guest: Mutex::new(guest), changed: Condvar::new() });
    let start = |work: fn(&Shared)| {
        let shared = Arc::clone(&shared);
        thread::spawn(move || work(&shared))
    };
    let callers: Vec<_> = (0..CALLERS).map(|_| start(Shared::call)).collect();
    let clock = start(Shared::clock);
    let messages = [start(Shared::host), start(Shared::network)];
    for thread in messages {
        thread.join().unwrap();
    }
    shared.change(|guest| guest.host_is_done = true);
    for thread in callers.into_iter().chain([clock]) {
        thread.join().unwrap();
    }
    let guest = shared.guest.lock().unwrap();
    assert_eq!(guest.gate.ledger.counting(), 0, "a hold is left over");
}

#[test]
fn no_schedule_of_threads_admits_a_call_behind_a_committed_fence() {
    let schedules = std::env::var("FENCE_SCHEDULES").ok().and_then(|n| n.parse().ok()).unwrap_or(SCHEDULES);
    shuttle::check_random(schedule, schedules);
}
