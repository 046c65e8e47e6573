//! The idle and lifetime rules. Pure: no I/O and no clock of its own; every function that depends on time takes the [`Moment`].
//!
//! ```text
//!   guest                                   host
//!   ┌──────────┐   reports, answers    ┌──────────────┐
//!   │ Ledger   │ ────────────────────► │ Lifetime     │──► release, end
//!   │ Admission│ ◄──────────────────── │  └ Ledger    │
//!   └──────────┘  prepare/commit/abort └──────────────┘
//! ```
//!
//! - [`ledger`]: holds, what of them counts, and how long nothing has counted.
//! - [`admission`]: the guest's fence: while a release is being prepared, counting calls wait.
//! - [`gate`]: both as one value, which the guest keeps under one lock.
//! - [`lifetime`]: the host's state machine: when a sandbox ends, and why.
//! - [`policy`]: what counts, by class, and how a sandbox's metadata changes it.
//! - [`inhibitor`]: use declared from inside the guest, within a budget.
//! - [`terms`]: how `timeout` and `metadata.idle_timeout` become deadlines, and what is refused.
//!
//! Invariants, each with the test that breaks when it does. `schedules` is `tests/schedules.rs`: both halves in simulated time under random
//! calls, delays, lost and repeated messages, machines that stand still and supervisors that are killed. `fence` is `tests/fence.rs`: the
//! gate under random schedules of threads. The rest are unit tests.
//!
//! 1. No accepted call is lost: a release never commits while a counting hold lives on either side.
//!    (`schedules::no_accepted_call_is_lost_whatever_the_network_does`,
//!    `schedules::a_machine_that_stands_still_and_a_supervisor_that_is_killed_lose_no_call`)
//! 2. With nobody using it, a sandbox is released within one second after its idle timeout, and never before it.
//!    (`schedules::an_idle_sandbox_is_released_within_a_second_on_a_working_network`)
//! 3. Nothing outlives its hard end by more than a second, whatever the guest says or does not say.
//!    (`schedules::a_lying_guest_gains_nothing_beyond_the_hard_end`)
//! 4. No call is admitted behind a committed fence, and none between the "ready" that was asked for and its commit.
//!    (`fence::no_schedule_of_threads_admits_a_call_behind_a_committed_fence`)
//! 5. A commit never succeeds in a guest while a hold counts that passed its fence. (the same)
//! 6. No call waits at the fence for ever: it is admitted or told that the sandbox is gone, though the host falls silent.
//!    (the same: a schedule that leaves a thread waiting is a deadlock, which fails)
//! 7. An epoch is used once: a late, repeated or foreign prepare, commit or abort changes nothing.
//!    (the same, and `admission::tests`)
//! 8. Old news never replaces newer: neither a report that was overtaken nor a first word about an earlier life.
//!    (`lifetime::tests::an_old_report_does_not_replace_a_newer_one`)
//! 9. Silence is not idleness: a guest that does not answer is not released as idle, and one that was busy is kept to its hard end.
//!    (`lifetime::tests::a_silent_guest_is_given_up_as_crashed`, `lifetime::tests::a_silent_guest_that_was_busy_is_kept_until_the_hard_end`)
//! 10. What is only open is no use: classes that count by progress leave the idle clock running.
//!     (`ledger::tests`, `policy::tests`)
//! 11. A caller who may not call leaves the idle clock as it was. (`ledger::tests`)
//! 12. Inhibitors end with their time and with the budget, whichever is first. (`inhibitor::tests`)

pub mod admission;
pub mod gate;
pub mod inhibitor;
pub mod ledger;
pub mod lifetime;
pub mod moment;
pub mod policy;
pub mod terms;

pub use admission::Admission;
pub use gate::{Gate, Passage};
pub use inhibitor::Inhibitors;
pub use ledger::{Hold, HoldClass, HoldId, Ledger, LedgerState};
pub use lifetime::{EndReason, GuestReport, Lifetime, Step};
pub use moment::Moment;
pub use policy::{Counting, IdleSettings, Policy, PolicyError};
pub use terms::{Limits, Terms, TermsError};
