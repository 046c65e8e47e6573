//! Random names and credentials.

use std::io;

const ID_LETTERS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
const ID_LENGTH: usize = 20;

/// `length` random bytes in hexadecimal.
///
/// # Errors
/// When the system has no randomness.
pub fn random_hex(length: usize) -> io::Result<String> {
    let mut bytes = vec![0; length];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A sandbox id: `i` and 20 of [a-z0-9], as the SDKs know them (contract: control-plane.md section 1.1).
///
/// # Errors
/// When the system has no randomness.
pub fn sandbox_id() -> io::Result<String> {
    let mut id = String::from("i");
    while id.len() <= ID_LENGTH {
        let mut byte = [0];
        getrandom::fill(&mut byte).map_err(io::Error::other)?;
        // 252 is the largest multiple of 36 in a byte: above it some letters would come more often.
        if byte[0] < 252 {
            id.push(char::from(ID_LETTERS[usize::from(byte[0]) % ID_LETTERS.len()]));
        }
    }
    Ok(id)
}

/// The region in the ids of Deno sandboxes; there is one.
pub const DENO_REGION: &str = "ord";

/// Digits and letters without those that look like others. 32: a byte's lower bits choose evenly.
const DENO_LETTERS: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";

/// An id that the Deno SDKs take: `sbx_<region>_` and 20 of [0-9a-hjkmnp-z] (contract: deno.md section 2.3).
///
/// # Errors
/// When the system has no randomness.
pub fn deno_sandbox_id() -> io::Result<String> {
    let mut bytes = [0; ID_LENGTH];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    let letter = |byte: &u8| char::from(DENO_LETTERS[usize::from(byte % 32)]);
    Ok(format!("sbx_{DENO_REGION}_{}", bytes.iter().map(letter).collect::<String>()))
}

/// Whether the Deno front door created it.
pub fn is_deno(id: &str) -> bool {
    id.starts_with("sbx_")
}

/// The id without the client id that older SDKs append (`<id>-<clientID>`); None when it is no id.
pub fn normalise(given: &str) -> Option<&str> {
    let id = match given.split_once('-') {
        None => given,
        Some((id, rest)) if !rest.contains('-') => id,
        Some(_) => return None,
    };
    let valid = !id.is_empty()
        && id.len() <= 64
        && id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    valid.then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_survives_its_own_check() {
        let id = sandbox_id().unwrap();
        assert_eq!(id.len(), 21);
        assert_eq!(normalise(&id), Some(id.as_str()));
        assert_eq!(normalise(&format!("{id}-6532622b")), Some(id.as_str()));
    }

    #[test]
    fn a_deno_id_has_the_form_that_its_sdk_checks() {
        let id = deno_sandbox_id().unwrap();
        let letters = id.strip_prefix("sbx_ord_").unwrap();
        assert_eq!(letters.len(), 20);
        assert!(
            letters.bytes().all(|b| b.is_ascii_digit() || (b.is_ascii_lowercase() && !b"ilo".contains(&b)))
        );
        assert_eq!(normalise(&id), Some(id.as_str()));
        assert!(is_deno(&id) && !is_deno(&sandbox_id().unwrap()));
    }

    #[test]
    fn what_is_no_id_is_refused() {
        for bad in ["", "a-b-c", "../x", "A", "a b", "-x", "ä"] {
            assert_eq!(normalise(bad), None, "{bad}");
        }
    }
}
