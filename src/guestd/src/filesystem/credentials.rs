//! Acting as a user for the length of one piece of file work.
//!
//! The agent is root, and a user's directories are full of traps for root: links to swap, devices to name, files of others to
//! reach. Inside an [`ActingAs`] the kernel judges every call by the user's own rights, so nothing can be had through the agent
//! that could not be had without it (envd.md section 11, number 11).
//!
//! Credentials belong to threads. The calls here are the bare system calls, which change the calling thread; the C library's
//! functions of the same names would change every thread of the process, and with them the listeners. Only blocking threads
//! come here, and a thread that cannot get its own credentials back ends the process. A thread is born with the credentials of the
//! one that makes it, so nothing may start a thread, or a task that may need a new one, inside an [`ActingAs`].
//!
//! The *effective* ids change, not only the file-system ids: files in `/proc/sys` are judged by the effective ones. The real and the
//! saved user stay root, so that the way back is open, and so that the user can neither signal nor trace the thread. The
//! kernel takes every capability from the effective set when the effective user stops being root, and puts the permitted
//! ones back when it is root again (capabilities(7)).

use std::io;
use std::marker::PhantomData;
use std::sync::OnceLock;

use nix::unistd::{getegid, geteuid, getgroups};

use crate::identity::User;

/// For `setresuid` and its like: leave this one as it is.
const KEEP: u32 = u32::MAX;

/// The calling thread acts as a user until this is dropped.
///
/// Not `Send`: it must end on the thread where it began, so it cannot be held across an `await`.
#[derive(Debug)]
#[must_use = "the thread acts as the user only while this is alive"]
pub(super) struct ActingAs {
    switched: bool,
    _this_thread: PhantomData<*const ()>,
}

impl ActingAs {
    /// Makes the calling thread act as `user`. Nothing changes for root, and for an agent that is not root: it has nothing to
    /// give up, and what it may do for others is the kernel's to say.
    ///
    /// # Errors
    ///
    /// Those of setgroups(2), setresgid(2) and setresuid(2), and when the thread acts as somebody else; it is then as it was.
    pub(super) fn user(user: &User) -> io::Result<Self> {
        let mut acting = Self { switched: false, _this_thread: PhantomData };
        let (own, now) = (own()?, geteuid().as_raw());
        if own.user != now {
            return Err(io::Error::other(format!("the thread acts as user {now} already")));
        }
        if user.uid == 0 || own.user != 0 {
            return Ok(acting);
        }
        acting.switched = true;
        set_groups(&user.groups)?;
        set_effective_group(user.gid)?;
        set_effective_user(user.uid)?;
        Ok(acting)
    }

    /// Whether the calling thread acts as a user, and must therefore start nothing.
    pub(super) fn is_under_way() -> bool {
        own().is_ok_and(|own| own.user != geteuid().as_raw())
    }
}

impl Drop for ActingAs {
    fn drop(&mut self) {
        if !self.switched {
            return;
        }
        // The user first: being root again is what allows the rest.
        let restored = set_effective_user(0)
            .and_then(|()| own())
            .and_then(|own| set_effective_group(own.group).and_then(|()| set_groups(&own.groups)));
        if let Err(error) = restored {
            // This thread would do the next call's work as somebody else.
            tracing::error!(%error, "a thread could not get its own credentials back");
            std::process::abort();
        }
    }
}

/// What the agent's threads are when they act for nobody; it never changes.
struct Own {
    user: u32,
    group: u32,
    groups: Vec<u32>,
}

fn own() -> io::Result<&'static Own> {
    static OWN: OnceLock<Own> = OnceLock::new();
    if let Some(own) = OWN.get() {
        return Ok(own);
    }
    let groups = getgroups()?.into_iter().map(nix::unistd::Gid::as_raw).collect();
    Ok(OWN.get_or_init(|| Own { user: geteuid().as_raw(), group: getegid().as_raw(), groups }))
}

fn set_groups(groups: &[u32]) -> io::Result<()> {
    // SAFETY: the pointer is valid for as many ids as are announced, and the kernel only reads them.
    outcome(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) })
}

fn set_effective_group(gid: u32) -> io::Result<()> {
    // SAFETY: three numbers; no memory is touched.
    outcome(unsafe { libc::syscall(libc::SYS_setresgid, KEEP, gid, KEEP) })
}

fn set_effective_user(uid: u32) -> io::Result<()> {
    // SAFETY: three numbers; no memory is touched.
    outcome(unsafe { libc::syscall(libc::SYS_setresuid, KEEP, uid, KEEP) })
}

fn outcome(result: libc::c_long) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stranger() -> User {
        User {
            name: "stranger".to_owned(),
            uid: 12345,
            gid: 12346,
            home: "/".into(),
            shell: "/bin/sh".into(),
            groups: vec![12346, 777],
        }
    }

    /// The lines of /proc about the credentials of the calling thread.
    fn status() -> Vec<String> {
        let text = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let wanted = ["Uid:", "Gid:", "Groups:", "CapEff:", "CapPrm:"];
        text.lines()
            .filter(|line| wanted.iter().any(|name| line.starts_with(name)))
            .map(str::to_owned)
            .collect()
    }

    #[test]
    fn a_thread_acts_as_the_user_and_is_itself_again_afterwards() {
        if !geteuid().is_root() {
            return;
        }
        std::thread::spawn(|| {
            let before = status();
            let acting = ActingAs::user(&stranger()).unwrap();
            let during = status();
            assert_eq!(
                during[0].split_whitespace().collect::<Vec<_>>(),
                ["Uid:", "0", "12345", "0", "12345"]
            );
            assert_eq!(during[1].split_whitespace().nth(2), Some("12346"));
            assert_eq!(during[2].split_whitespace().collect::<Vec<_>>(), ["Groups:", "777", "12346"]);
            assert!(during.iter().any(|line| line == "CapEff:\t0000000000000000"), "{during:?}");
            drop(acting);
            assert_eq!(status(), before);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn other_threads_do_not_notice() {
        if !geteuid().is_root() {
            return;
        }
        let before = status();
        let other = std::thread::spawn(|| {
            let _acting = ActingAs::user(&stranger()).unwrap();
            std::fs::File::create("/proc/sys/kernel/core_pattern").unwrap_err().raw_os_error()
        });
        assert_eq!(other.join().unwrap(), Some(libc::EACCES), "a user must not write what root may");
        assert_eq!(status(), before);
    }

    #[test]
    fn a_thread_that_acts_already_acts_for_nobody_else() {
        if !geteuid().is_root() {
            return;
        }
        assert!(!ActingAs::is_under_way());
        let acting = ActingAs::user(&stranger()).unwrap();
        assert!(ActingAs::is_under_way());
        // Born with the credentials of this one, as a pool's thread would be.
        let born = std::thread::spawn(|| {
            let other = User { uid: 54321, ..stranger() };
            ActingAs::user(&other).unwrap_err().to_string()
        });
        assert_eq!(born.join().unwrap(), "the thread acts as user 12345 already");
        drop(acting);
        assert!(!ActingAs::is_under_way());
    }

    #[test]
    fn root_acts_as_itself() {
        let before = status();
        let root = User { uid: 0, ..stranger() };
        let _acting = ActingAs::user(&root).unwrap();
        assert_eq!(status(), before);
    }
}
