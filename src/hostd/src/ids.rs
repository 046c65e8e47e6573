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

/// The id without the client id that older SDKs append (`<id>-<clientID>`); None when it is no id.
pub fn normalise(given: &str) -> Option<&str> {
    let id = match given.split_once('-') {
        None => given,
        Some((id, rest)) if !rest.contains('-') => id,
        Some(_) => return None,
    };
    let valid =
        !id.is_empty() && id.len() <= 64 && id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
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
    fn what_is_no_id_is_refused() {
        for bad in ["", "a-b-c", "../x", "A", "a b", "-x", "ä"] {
            assert_eq!(normalise(bad), None, "{bad}");
        }
    }
}
