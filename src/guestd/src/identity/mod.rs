//! Who a request acts for, and what its paths mean to that user.
//!
//! Owns the lookup of users and groups in `/etc/passwd` and `/etc/group` ([`Accounts`]), the choice between the user that a
//! request names and the default one ([`effective_user`]), and the expansion of client paths ([`resolve_path`]).
//!
//! It identifies and never authenticates: a name in a Basic header says on whose behalf to act, and its password is ignored
//! (contract: envd.md sections 2.1 and 5). Access tokens are somebody else's subject. Nothing here calls the C library's name
//! service: the binary is static, and such a call would load the template's shared objects or crash.

mod accounts;
mod paths;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use connectrpc::ErrorCode;

use crate::settings::Settings;

pub use accounts::{Accounts, AccountsError, Names, User};
pub use paths::{PathError, clean, resolve_path};

/// Accepts both paddings: some clients strip the `=` signs.
const LENIENT: GeneralPurposeConfig =
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
const STANDARD: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, LENIENT);
const URL_SAFE: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, LENIENT);

/// The user that the Basic header of a request names; the HTTP middleware inserts one into the extensions of every request.
///
/// `None` means that the header is absent. An unknown name never gets here: the middleware refuses such a request itself.
#[derive(Clone, Debug, Default)]
pub struct RequestUser(pub Option<User>);

/// Why there is no user to act for; the texts are those of envd.md section 1.10.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The Basic header names somebody who is not in `/etc/passwd`.
    #[error("invalid username: '{name}'")]
    InvalidUsername { name: String },
    /// No user in the request, and the default user is not set.
    #[error("no user specified")]
    NoUser,
    /// No user in the request, and the default user is not in `/etc/passwd`.
    #[error("invalid default user: '{name}'")]
    InvalidDefaultUser { name: String },
    /// The account files cannot be read, so nobody can be looked up.
    #[error(transparent)]
    Accounts(AccountsError),
}

impl IdentityError {
    /// The Connect code of this failure (contract: envd.md section 1.10).
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Accounts(error) if error.is_exhaustion() => ErrorCode::ResourceExhausted,
            Self::Accounts(_) => ErrorCode::Internal,
            Self::InvalidUsername { .. } | Self::NoUser | Self::InvalidDefaultUser { .. } => {
                ErrorCode::Unauthenticated
            }
        }
    }
}

/// The user name in the value of an `Authorization` header of the form `Basic base64("name:anything")`.
///
/// Returns `None` for another scheme, for text that is not base64 or has no colon (as Go's parser has it), and for an empty name.
/// Unpadded and URL-safe base64 are accepted (contract: envd.md section 2.1).
pub fn basic_user_name(header: &str) -> Option<String> {
    let (scheme, credentials) = header.trim().split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let credentials = credentials.trim();
    let decoded = STANDARD.decode(credentials).or_else(|_| URL_SAFE.decode(credentials)).ok()?;
    let text = String::from_utf8(decoded).ok()?;
    let (name, _password) = text.split_once(':')?;
    (!name.is_empty()).then(|| name.to_owned())
}

/// The user that a Basic header names.
///
/// # Errors
///
/// [`IdentityError::InvalidUsername`] when the name is not in `/etc/passwd`, [`IdentityError::Accounts`] when that file cannot
/// be read (contract: envd.md section 1.10).
pub fn basic_user(name: &str, accounts: &Accounts) -> Result<User, IdentityError> {
    accounts.user(name).map_err(|error| match error {
        AccountsError::UnknownUser { name } => IdentityError::InvalidUsername { name },
        error @ AccountsError::Read { .. } => IdentityError::Accounts(error),
    })
}

/// The user that a request acts for: the one that it names, or the default user of the settings.
///
/// # Errors
///
/// [`IdentityError::NoUser`] and [`IdentityError::InvalidDefaultUser`] when the request names nobody and the default does not
/// resolve; [`IdentityError::Accounts`] when the account files cannot be read (contract: envd.md sections 1.10 and 2.1).
pub fn effective_user(
    request_user: &RequestUser,
    accounts: &Accounts,
    settings: &Settings,
) -> Result<User, IdentityError> {
    match &request_user.0 {
        Some(user) => Ok(user.clone()),
        None => default_user(accounts, &settings.snapshot().default_user),
    }
}

fn default_user(accounts: &Accounts, name: &str) -> Result<User, IdentityError> {
    if name.is_empty() {
        return Err(IdentityError::NoUser);
    }
    accounts.user(name).map_err(|error| match error {
        AccountsError::UnknownUser { name } => IdentityError::InvalidDefaultUser { name },
        error @ AccountsError::Read { .. } => IdentityError::Accounts(error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts() -> (tempfile::TempDir, Accounts) {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        let passwd = "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/bash\n";
        std::fs::write(root.path().join("etc/passwd"), passwd).unwrap();
        let accounts = Accounts::new(root.path());
        (root, accounts)
    }

    #[test]
    fn a_basic_header_yields_the_name_in_every_spelling_of_base64() {
        let cases: &[(&str, Option<&str>)] = &[
            ("Basic dXNlcjo=", Some("user")),
            ("Basic dXNlcjo", Some("user")),
            ("basic dXNlcjpwYXNz", Some("user")),
            ("Basic   dXNlcjpwYXNz  ", Some("user")),
            ("Basic dXNlcg==", None),
            ("Basic dXNlcjphOmI6Yw==", Some("user")),
            // "useþ:" differs between the two alphabets.
            ("Basic dXNlw746Pz8_", Some("useþ")),
            ("Basic dXNlw746Pz8/", Some("useþ")),
            ("Basic OnBhc3M=", None),
            ("Basic", None),
            ("Basic ", None),
            ("Basic !!!", None),
            ("Bearer dXNlcjo=", None),
            ("", None),
            ("Basic /////w==", None),
        ];
        for (header, expected) in cases {
            assert_eq!(basic_user_name(header).as_deref(), *expected, "{header:?}");
        }
    }

    #[test]
    fn the_named_user_wins_over_the_default_one() {
        let (_root, accounts) = accounts();
        let settings = Settings::new(false);
        let named = RequestUser(Some(accounts.user("user").unwrap()));
        assert_eq!(effective_user(&named, &accounts, &settings).unwrap().name, "user");
        assert_eq!(effective_user(&RequestUser(None), &accounts, &settings).unwrap().name, "root");
    }

    #[test]
    fn a_default_user_that_does_not_resolve_says_which() {
        let (_root, accounts) = accounts();
        let settings = Settings::new(false);
        settings.update(|values| values.default_user = "ghost".to_owned());
        let error = effective_user(&RequestUser(None), &accounts, &settings).unwrap_err();
        assert_eq!(error.to_string(), "invalid default user: 'ghost'");
        settings.update(|values| values.default_user.clear());
        let error = effective_user(&RequestUser(None), &accounts, &settings).unwrap_err();
        assert_eq!(error.to_string(), "no user specified");
    }

    #[test]
    fn an_unknown_basic_user_gets_the_text_of_the_contract() {
        let (_root, accounts) = accounts();
        assert_eq!(basic_user("ghost", &accounts).unwrap_err().to_string(), "invalid username: 'ghost'");
        assert_eq!(basic_user("user", &accounts).unwrap().uid, 1000);
    }
}
