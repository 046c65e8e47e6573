//! Who may call: the access token of SDKs and the control credential of the host (contract: envd.md section 5).
//!
//! A listener proves nothing: vsock, TCP and Unix sockets are all asked for the same credentials. Which route needs which is in
//! `guestd_protocol::routes`. While none is set, where a caller comes from decides ([`Peer`]): the network is closed.

pub mod middleware;
mod owner;
mod peer;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};

use http::StatusCode;
use nix::errno::Errno;
use subtle::ConstantTimeEq;
use tokio::sync::watch;

pub use middleware::refuse;
pub use peer::{Peer, Standing};

/// The longest credential accepted, in bytes.
const CREDENTIAL_LIMIT: usize = 4096;

/// Who is who. Secrets: for memory only.
#[derive(Default, Clone, serde::Serialize, serde::Deserialize)]
pub struct Credentials {
    access_token: Option<String>,
    control: Option<String>,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").finish_non_exhaustive()
    }
}

/// What does not change while the agent runs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rules {
    /// Without a token, serve the network as well. What protects the machine then is the network.
    pub insecure_open: bool,
    /// Other people's code runs beside this agent: being on this machine proves nothing.
    pub own_machine: bool,
}

/// The credentials in force. Nothing prints them.
#[derive(Default)]
pub struct Access {
    credentials: RwLock<Credentials>,
    rules: Rules,
    sealed: watch::Sender<bool>,
    warned: AtomicBool,
}

impl std::fmt::Debug for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Access").field("rules", &self.rules).finish_non_exhaustive()
    }
}

/// Why a call was refused; the text is the answer's message.
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
    #[error(
        "no access token is set: until /init sets one, the host's link is served, and over loopback root and the agent's own user"
    )]
    NotNear,
    #[error("no access token is set: until /init sets one, an ordinary user of this machine is not served")]
    NotOwner,
    #[error("/init is taken from the host's link, or on this machine from root or the agent's own user")]
    InitPlace,
    #[error("this call is the host's: it is not taken from an ordinary user of this machine")]
    ControlPlace,
    #[error("envd not initialized")]
    Sealed,
    #[error("it cannot be told now who calls: {0}")]
    Untold(Errno),
}

impl Refusal {
    pub fn status(self) -> StatusCode {
        match self {
            Self::Untold(_) => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::UNAUTHORIZED,
        }
    }
}

/// What the platform's metadata service says about the token that an `/init` brings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Voucher {
    /// It was not asked, did not answer, or knows of no token.
    #[default]
    Absent,
    /// Its hash is that of the token, or of the empty string and there is no token.
    Matches,
    Differs,
}

/// An `/init` as far as access is concerned.
#[derive(Clone, Copy, Debug)]
pub struct Claim<'a> {
    pub control: Option<&'a str>,
    pub access_token: Option<&'a str>,
    pub standing: Standing,
    pub voucher: Voucher,
}

impl Access {
    pub fn new(rules: Rules) -> Self {
        Self { rules, ..Self::default() }
    }

    pub fn rules(&self) -> Rules {
        self.rules
    }

    /// Refuses everything but `/health` and `/init`, until an `/init` is accepted: after the agent was replaced under way.
    pub fn seal(&self) {
        self.sealed.send_replace(true);
    }

    /// Waits until it is not sealed (any more).
    pub async fn unsealed(&self) {
        // Its other end is this value's own.
        let mut sealed = self.sealed.subscribe();
        drop(sealed.wait_for(|sealed| !*sealed).await);
    }

    /// The credentials, for the agent that takes this one's place.
    pub fn export(&self) -> Credentials {
        self.read().clone()
    }

    /// Goes on with the credentials of the agent before this one, sealed.
    pub fn restore(&self, credentials: Credentials) {
        self.seal();
        *self.credentials.write().unwrap_or_else(PoisonError::into_inner) = credentials;
    }

    pub fn is_sealed(&self) -> bool {
        *self.sealed.borrow()
    }

    /// Whether `given` is the access token; with none set, whether the caller is the host, or whoever owns this machine: who may start a
    /// process as anybody may do whatever that process may, control calls included. `None` is a caller of whom nothing is known.
    ///
    /// # Errors
    /// A [`Refusal`] for the answer.
    pub async fn allows(&self, given: Option<&[u8]>, peer: Option<&Peer>) -> Result<(), Refusal> {
        if let Some(token) = &self.read().access_token {
            let shown = given.is_some_and(|given| same(given, token.as_bytes()));
            return if shown { Ok(()) } else { Err(Refusal::AccessToken) };
        }
        if self.rules.insecure_open {
            if !peer.is_some_and(Peer::is_near) && !self.warned.swap(true, Ordering::Relaxed) {
                tracing::warn!(?peer, "no access token is set and the network is served");
            }
            return Ok(());
        }
        let Some(peer) = peer else { return Err(Refusal::NotNear) };
        match self.standing(Some(peer)).await? {
            Standing::Trusted => Ok(()),
            Standing::Stranger => Err(Refusal::NotNear),
            Standing::Ordinary => Err(Refusal::NotOwner),
        }
    }

    pub fn access_token(&self) -> Option<String> {
        self.read().access_token.clone()
    }

    /// Whether a call that shows `given` as the control credential is the host's: no ordinary user of this machine is, however it came
    /// to know.
    ///
    /// # Errors
    /// A [`Refusal`] for the answer; always while no control credential is set.
    pub async fn admit_host(&self, given: Option<&[u8]>, peer: Option<&Peer>) -> Result<(), Refusal> {
        if !self.is_control(given) {
            return Err(Refusal::Control);
        }
        match self.standing(peer).await? {
            Standing::Ordinary => Err(Refusal::ControlPlace),
            Standing::Trusted | Standing::Stranger => Ok(()),
        }
    }

    /// What the caller of an `/init` is worth. Not looked for when the call is refused whoever makes it.
    ///
    /// # Errors
    /// [`Refusal::Untold`].
    pub async fn standing_for_init(
        &self,
        control: Option<&str>,
        peer: Option<&Peer>,
    ) -> Result<Standing, Refusal> {
        if self.has_host() && !self.is_control(control.map(str::as_bytes)) {
            return Ok(Standing::Ordinary);
        }
        self.standing(peer).await
    }

    async fn standing(&self, peer: Option<&Peer>) -> Result<Standing, Refusal> {
        let Some(peer) = peer else { return Ok(Standing::Ordinary) };
        peer.standing(self.rules.own_machine, self.rules.insecure_open).await.map_err(Refusal::Untold)
    }

    /// Whether `given` is the control credential. Nothing is while none is set.
    fn is_control(&self, given: Option<&[u8]>) -> bool {
        match (&self.read().control, given) {
            (Some(control), Some(given)) => same(given, control.as_bytes()),
            _ => false,
        }
    }

    /// Whether a control credential is set: from then on nothing but that decides on an `/init`.
    pub fn has_host(&self) -> bool {
        self.read().control.is_some()
    }

    /// Whether an `/init` with this token needs the metadata service's word: not when the token is the current one.
    pub fn is_current(&self, access_token: Option<&str>) -> bool {
        match (&self.read().access_token, access_token) {
            (Some(current), Some(given)) => same(given.as_bytes(), current.as_bytes()),
            _ => false,
        }
    }

    /// Decides on an `/init` and sets the credentials that it brings, in one step: two first calls cannot both win.
    ///
    /// An ordinary user of this machine never may: who is first decides whose the agent is. With a control credential set, only its holder
    /// may; the first call that carries one, of somebody who is trusted or vouched for, sets it. Without one envd's rule holds: the
    /// body's token has to be the current one if there is one, or vouched for; and on a machine of the agent's own the caller must be the
    /// host or root.
    ///
    /// # Errors
    /// A [`Refusal`] for the answer; nothing was changed.
    pub fn initialise(&self, claim: Claim<'_>) -> Result<(), Refusal> {
        let mut credentials = self.credentials.write().unwrap_or_else(PoisonError::into_inner);
        if !self.may_initialise(&credentials, claim)? {
            credentials.control = claim
                .control
                .filter(|given| !given.is_empty() && given.len() <= CREDENTIAL_LIMIT)
                .map(str::to_owned);
        }
        credentials.access_token = claim.access_token.map(str::to_owned);
        self.sealed.send_replace(false);
        Ok(())
    }

    /// Whether `claim` may, without changing anything: a call that is too old to be applied is asked, too.
    ///
    /// # Errors
    /// A [`Refusal`] for the answer.
    pub fn check(&self, claim: Claim<'_>) -> Result<(), Refusal> {
        self.may_initialise(&self.read(), claim).map(drop)
    }

    /// Whether it holds the control credential (else it may set one).
    fn may_initialise(&self, credentials: &Credentials, claim: Claim<'_>) -> Result<bool, Refusal> {
        if let Some(set) = &credentials.control {
            let is_host = claim.control.is_some_and(|given| same(given.as_bytes(), set.as_bytes()));
            return match claim.standing {
                _ if !is_host => Err(Refusal::Control),
                Standing::Ordinary => Err(Refusal::ControlPlace),
                Standing::Trusted | Standing::Stranger => Ok(true),
            };
        }
        let trusted = match claim.standing {
            Standing::Ordinary => return Err(Refusal::InitPlace),
            Standing::Trusted => true,
            Standing::Stranger => claim.voucher == Voucher::Matches,
        };
        if !trusted && (self.rules.own_machine || claim.control.is_some()) {
            return Err(Refusal::InitPlace);
        }
        let wrong = if claim.access_token.is_some() { Refusal::InitToken } else { Refusal::InitReset };
        match (&credentials.access_token, claim.access_token) {
            (Some(current), Some(given)) if same(given.as_bytes(), current.as_bytes()) => Ok(false),
            _ if claim.voucher == Voucher::Matches => Ok(false),
            (Some(_), _) => Err(wrong),
            (None, _) if claim.voucher == Voucher::Differs => Err(wrong),
            (None, _) if trusted => Ok(false),
            (None, _) => Err(Refusal::InitPlace),
        }
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

    const NEAR: Option<&Peer> = Some(&Peer::Unix);

    fn claim<'a>(control: Option<&'a str>, access_token: Option<&'a str>) -> Claim<'a> {
        Claim { control, access_token, standing: Standing::Trusted, voucher: Voucher::Absent }
    }

    fn own_machine() -> Access {
        Access::new(Rules { own_machine: true, insecure_open: false })
    }

    #[test]
    fn nobody_is_the_host_before_a_credential_is_set() {
        let access = Access::default();
        assert!(!access.is_control(None));
        assert!(!access.is_control(Some(b"")));
    }

    #[tokio::test]
    async fn the_first_control_credential_stays() {
        let access = Access::default();
        access.initialise(claim(Some("host"), Some("token"))).unwrap();
        assert_eq!(access.initialise(claim(Some("other"), Some("token"))), Err(Refusal::Control));
        assert_eq!(
            access.initialise(claim(None, Some("token"))),
            Err(Refusal::Control),
            "a guest knows the access token"
        );
        assert!(access.is_control(Some(b"host")));
        access.initialise(claim(Some("host"), Some("renewed"))).unwrap();
        assert!(
            access.allows(Some(b"renewed"), None).await.is_ok()
                && access.allows(Some(b"token"), None).await.is_err()
        );
    }

    #[test]
    fn without_a_control_credential_the_current_token_is_asked_for() {
        let access = Access::default();
        access.initialise(claim(None, Some("first"))).unwrap();
        assert_eq!(access.initialise(claim(None, Some("other"))), Err(Refusal::InitToken));
        assert_eq!(access.initialise(claim(None, None)), Err(Refusal::InitReset));
        assert_eq!(access.initialise(claim(Some("host"), Some("other"))), Err(Refusal::InitToken));
        assert!(!access.is_control(Some(b"host")), "a refused call sets nothing");
        access.initialise(claim(None, Some("first"))).unwrap();
    }

    #[test]
    fn code_of_a_user_cannot_be_the_first_to_initialise_a_machine() {
        let access = own_machine();
        let stranger = Claim { standing: Standing::Stranger, ..claim(Some("taken"), Some("taken")) };
        assert_eq!(access.initialise(stranger), Err(Refusal::InitPlace));
        access.initialise(claim(None, Some("token"))).unwrap();
        let knows_the_token = Claim { standing: Standing::Stranger, ..claim(Some("taken"), Some("token")) };
        assert_eq!(access.initialise(knows_the_token), Err(Refusal::InitPlace));
        assert!(!access.is_control(Some(b"taken")));
    }

    #[test]
    fn a_stranger_with_the_control_credential_is_the_host() {
        let access = own_machine();
        access.initialise(claim(Some("host"), Some("token"))).unwrap();
        let far = Claim { standing: Standing::Stranger, ..claim(Some("host"), Some("next")) };
        access.initialise(far).unwrap();
    }

    #[test]
    fn an_ordinary_user_of_this_machine_is_never_the_host_whatever_it_knows() {
        for access in [own_machine(), Access::default()] {
            let ordinary = |control, token| Claim { standing: Standing::Ordinary, ..claim(control, token) };
            for (control, token) in [(None, None), (None, Some("mine")), (Some("mine"), None)] {
                assert_eq!(access.initialise(ordinary(control, token)), Err(Refusal::InitPlace));
            }
            let vouched = Claim { voucher: Voucher::Matches, ..ordinary(Some("mine"), Some("token")) };
            assert_eq!(access.initialise(vouched), Err(Refusal::InitPlace));
            access.initialise(claim(None, Some("token"))).unwrap();
            assert_eq!(access.initialise(ordinary(Some("mine"), Some("token"))), Err(Refusal::InitPlace));
            access.initialise(claim(Some("host"), Some("token"))).unwrap();
            assert_eq!(access.initialise(ordinary(Some("host"), Some("token"))), Err(Refusal::ControlPlace));
            assert_eq!(access.initialise(ordinary(Some("guess"), Some("token"))), Err(Refusal::Control));
        }
    }

    #[test]
    fn who_knows_the_token_alone_does_not_become_the_host() {
        let access = Access::default();
        access.initialise(claim(None, Some("token"))).unwrap();
        let far = |control| Claim { standing: Standing::Stranger, ..claim(control, Some("token")) };
        assert_eq!(access.initialise(far(Some("mine"))), Err(Refusal::InitPlace));
        access.initialise(far(None)).unwrap();
        access.initialise(claim(Some("host"), Some("token"))).unwrap();
    }

    #[tokio::test]
    async fn a_control_call_needs_the_credential_and_a_caller_who_may_have_it() {
        let access = Access::default();
        let guest = Some(&Peer::Vsock { cid: 1 });
        assert_eq!(access.admit_host(Some(b"host"), NEAR).await, Err(Refusal::Control));
        access.initialise(claim(Some("host"), None)).unwrap();
        assert_eq!(access.admit_host(Some(b"host"), NEAR).await, Ok(()));
        assert_eq!(access.admit_host(Some(b"guess"), NEAR).await, Err(Refusal::Control));
        for nobody in [guest, None] {
            assert_eq!(access.admit_host(Some(b"host"), nobody).await, Err(Refusal::ControlPlace));
        }
    }

    #[test]
    fn the_metadata_service_can_vouch_for_a_token_and_refuse_one() {
        let access = own_machine();
        let of = |token, voucher| Claim { standing: Standing::Stranger, voucher, ..claim(None, token) };
        let near = |token, voucher| Claim { voucher, ..claim(None, token) };
        assert_eq!(access.initialise(near(Some("guess"), Voucher::Differs)), Err(Refusal::InitToken));
        access.initialise(of(Some("first"), Voucher::Matches)).unwrap();
        access.initialise(of(Some("second"), Voucher::Matches)).unwrap();
        assert_eq!(access.initialise(near(None, Voucher::Differs)), Err(Refusal::InitReset));
        access.initialise(of(None, Voucher::Matches)).unwrap();
        assert!(access.access_token().is_none(), "the hash of nothing allows a reset");
    }

    #[tokio::test]
    async fn the_network_is_served_only_with_a_token_or_when_that_was_asked_for() {
        let far = Peer::tcp("192.0.2.1:5".parse().unwrap(), "192.0.2.2:49983".parse().unwrap(), 1);
        let far = Some(&far);
        let closed = Access::default();
        assert_eq!(closed.allows(None, far).await, Err(Refusal::NotNear));
        assert_eq!(
            closed.allows(None, None).await,
            Err(Refusal::NotNear),
            "a caller of whom nothing is known"
        );
        closed.initialise(claim(None, Some("t"))).unwrap();
        assert_eq!(closed.allows(Some(b"t"), far).await, Ok(()));
        let open = Access::new(Rules { insecure_open: true, own_machine: false });
        assert_eq!(open.allows(None, far).await, Ok(()));
        open.initialise(claim(None, Some("t"))).unwrap();
        assert_eq!(open.allows(None, far).await, Err(Refusal::AccessToken));
    }

    /// Else it could start a process as root, and call as root from that.
    #[tokio::test]
    async fn without_a_token_an_ordinary_user_of_this_machine_is_not_served() {
        let (guest, host) = (Peer::Vsock { cid: 1 }, Peer::Vsock { cid: 2 });
        for access in [own_machine(), Access::default()] {
            assert_eq!(access.allows(None, Some(&guest)).await, Err(Refusal::NotOwner));
            assert_eq!(access.allows(None, Some(&host)).await, Ok(()));
            access.initialise(claim(None, Some("t"))).unwrap();
            assert_eq!(access.allows(Some(b"t"), Some(&guest)).await, Ok(()));
        }
        let open = Access::new(Rules { insecure_open: true, own_machine: true });
        assert_eq!(open.allows(None, Some(&guest)).await, Ok(()));
    }

    #[tokio::test]
    async fn a_missing_header_is_a_refusal_once_a_token_is_set() {
        let access = Access::default();
        assert_eq!(access.allows(None, NEAR).await, Ok(()));
        access.initialise(claim(None, Some("t"))).unwrap();
        for wrong in [None, Some(&b""[..]), Some(b"tt")] {
            assert_eq!(access.allows(wrong, NEAR).await, Err(Refusal::AccessToken));
        }
        assert_eq!(access.allows(Some(b"t"), NEAR).await, Ok(()));
    }

    #[test]
    fn a_seal_is_broken_by_an_accepted_init_alone() {
        let access = Access::default();
        access.initialise(claim(None, Some("t"))).unwrap();
        access.seal();
        assert!(access.initialise(claim(None, Some("x"))).is_err());
        assert!(access.is_sealed());
        access.initialise(claim(None, Some("t"))).unwrap();
        assert!(!access.is_sealed());
    }
}
