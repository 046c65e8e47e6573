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
//! - [`lifetime`]: the host's state machine: when a sandbox ends, and why.
//! - [`policy`]: what counts, by class, and how a sandbox's metadata changes it.
//! - [`inhibitor`]: use declared from inside the guest, within a budget.
//! - [`terms`]: how `timeout` and `metadata.idle_timeout` become deadlines, and what is refused.
//!
//! Invariants, each with a property test in `tests/schedules.rs`:
//! 1. No accepted call is lost: a release never commits while a counting hold lives on either side.
//! 2. With nobody using it, a sandbox is released within one second after its idle timeout, and never before it.
//! 3. Nothing outlives its hard end by more than a second, whatever the guest says or does not say.

pub mod admission;
pub mod inhibitor;
pub mod ledger;
pub mod lifetime;
pub mod moment;
pub mod policy;
pub mod terms;

pub use admission::Admission;
pub use inhibitor::Inhibitors;
pub use ledger::{Hold, HoldClass, HoldId, Ledger};
pub use lifetime::{EndReason, GuestReport, Lifetime, Step};
pub use moment::Moment;
pub use policy::{Counting, IdleSettings, Policy, PolicyError};
pub use terms::{Limits, Terms, TermsError};
