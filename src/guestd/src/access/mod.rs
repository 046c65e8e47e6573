//! Who may call: the access token of SDKs and the control credential of the host (contract: envd.md section 5).
//!
//! A listener proves nothing: vsock, TCP and Unix sockets are all asked for the same credentials. Which route needs which is in
//! `guestd_protocol::routes`.

pub mod middleware;

use std::sync::{PoisonError, RwLock};

use subtle::ConstantTimeEq;

/// The longest credential accepted, in bytes.
const CREDENTIAL_LIMIT: usize = 4096;

#[derive(Debug, Default, Clone)]
struct Credentials {
    access_token: Option<String>,
    control: Option<String>,
}

/// The credentials in force. Nothing prints them.
#[derive(Default)]
pub struct Access {
    credentials: RwLock<Credentials>,
}

impl std::fmt::Debug for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Access").finish_non_exhaustive()
    }
}

/// Why a call was refused; the text is the 401's message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("unauthorized access, please provide a valid access token or method signing if supported")]
    AccessToken,
    #[error("access token present in header but does not match")]
    FileToken,
    #[error("missing signature query parameter")]
    SignatureMissing,
    #[error("invalid signature")]
    SignatureInvalid,
    #[error("signature is already expired")]
    SignatureExpired,
    #[error("this call is the host's: the control credential is missing or wrong")]
    Control,
    #[error("access token validation failed")]
    InitToken,
    #[error("access token reset not authorized")]
    InitReset,
}

impl Access {
    /// Whether `given` is the access token, or none is set.
    pub fn allows(&self, given: Option<&[u8]>) -> bool {
        match &self.read().access_token {
            None => true,
            Some(token) => given.is_some_and(|given| same(given, token.as_bytes())),
        }
    }

    pub fn access_token(&self) -> Option<String> {
        self.read().access_token.clone()
    }

    /// Whether `given` is the host's credential. Refused while none is set.
    pub fn is_host(&self, given: Option<&[u8]>) -> bool {
        match (&self.read().control, given) {
            (Some(control), Some(given)) => same(given, control.as_bytes()),
            _ => false,
        }
    }

    /// Decides on an `/init` and sets the credentials that it brings, in one step: two first calls cannot both win.
    ///
    /// With a control credential set, only its holder may; the first call that carries one sets it. Without one envd's rule holds: the
    /// body's token has to be the current one, if there is one.
    ///
    /// # Errors
    /// A [`Refusal`] for the 401 answer; nothing was changed.
    pub fn initialise(&self, control: Option<&str>, access_token: Option<&str>) -> Result<(), Refusal> {
        let mut credentials = self.credentials.write().unwrap_or_else(PoisonError::into_inner);
        match (&credentials.control, control) {
            (Some(set), given) => {
                if !given.is_some_and(|given| same(given.as_bytes(), set.as_bytes())) {
                    return Err(Refusal::Control);
                }
            }
            (None, given) => {
                if let Some(current) = &credentials.access_token {
                    match access_token {
                        Some(token) if same(token.as_bytes(), current.as_bytes()) => {}
                        Some(_) => return Err(Refusal::InitToken),
                        None => return Err(Refusal::InitReset),
                    }
                }
                credentials.control = given
                    .filter(|given| !given.is_empty() && given.len() <= CREDENTIAL_LIMIT)
                    .map(str::to_owned);
            }
        }
        credentials.access_token = access_token.map(str::to_owned);
        Ok(())
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Credentials> {
        self.credentials.read().unwrap_or_else(PoisonError::into_inner)
    }
}

fn same(a: &[u8], b: &[u8]) -> bool {
    a.ct_eq(b).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_the_host_before_a_credential_is_set() {
        let access = Access::default();
        assert!(!access.is_host(None));
        assert!(!access.is_host(Some(b"")));
    }

    #[test]
    fn the_first_control_credential_stays() {
        let access = Access::default();
        access.initialise(Some("host"), Some("token")).unwrap();
        assert_eq!(access.initialise(Some("other"), Some("token")), Err(Refusal::Control));
        assert_eq!(
            access.initialise(None, Some("token")),
            Err(Refusal::Control),
            "a guest knows the access token"
        );
        assert!(access.is_host(Some(b"host")));
        access.initialise(Some("host"), Some("renewed")).unwrap();
        assert!(access.allows(Some(b"renewed")) && !access.allows(Some(b"token")));
    }

    #[test]
    fn without_a_control_credential_the_current_token_is_asked_for() {
        let access = Access::default();
        access.initialise(None, Some("first")).unwrap();
        assert_eq!(access.initialise(None, Some("other")), Err(Refusal::InitToken));
        assert_eq!(access.initialise(None, None), Err(Refusal::InitReset));
        assert_eq!(access.initialise(Some("host"), Some("other")), Err(Refusal::InitToken));
        assert!(!access.is_host(Some(b"host")), "a refused call sets nothing");
        access.initialise(None, Some("first")).unwrap();
    }

    #[test]
    fn a_missing_header_is_a_refusal_once_a_token_is_set() {
        let access = Access::default();
        assert!(access.allows(None));
        access.initialise(None, Some("t")).unwrap();
        assert!(!access.allows(None) && !access.allows(Some(b"")) && access.allows(Some(b"t")));
    }
}
