//! The query of `/files` (contract: envd.md sections 4.5, 4.6 and 5).
//!
//! A file's name is bytes (path_resolution(7)), and so is `path`: decoded as text, all names that are no UTF-8 would become one. Whoever
//! checks the signature and whoever opens the file read the query here, so that both have the same bytes.

use std::borrow::Cow;

use percent_encoding::percent_decode;

/// The parameters, decoded. Others are left alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FilesQuery {
    path: Option<Vec<u8>>,
    username: Option<String>,
    pub signature: Option<String>,
    pub expiration: Option<Expiration>,
}

/// `signature_expiration`: as it is signed, and in seconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expiration {
    pub text: String,
    pub at: i64,
}

/// A query that means nothing; the text of a 400.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilesQueryError {
    #[error("query parameter '{name}' is given more than once")]
    Twice { name: &'static str },
    #[error("query parameter '{name}' is not UTF-8")]
    NotText { name: &'static str },
    #[error("query parameter 'signature_expiration' must be an integer of seconds since 1970, not '{value}'")]
    Expiration { value: String },
}

impl FilesQuery {
    /// Reads what follows the question mark of a URI.
    ///
    /// # Errors
    ///
    /// One variant for each rule.
    pub fn parse(query: &str) -> Result<Self, FilesQueryError> {
        let mut found = Self::default();
        for pair in query.split('&') {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            match decode(name).as_ref() {
                b"path" => set("path", &mut found.path, decode(value).into_owned())?,
                b"username" => set("username", &mut found.username, text("username", value)?)?,
                b"signature" => set("signature", &mut found.signature, text("signature", value)?)?,
                b"signature_expiration" => {
                    let name = "signature_expiration";
                    let text = text(name, value)?;
                    let Ok(at) = text.parse() else {
                        return Err(FilesQueryError::Expiration { value: text });
                    };
                    set(name, &mut found.expiration, Expiration { text, at })?;
                }
                _ => {}
            }
        }
        Ok(found)
    }

    /// An empty path is an absent one, as SDKs that build their queries from optional values send it.
    pub fn path(&self) -> Option<&[u8]> {
        self.path.as_deref().filter(|path| !path.is_empty())
    }

    /// An empty name is an absent one, too.
    pub fn username(&self) -> Option<&str> {
        self.username.as_deref().filter(|name| !name.is_empty())
    }
}

/// As browsers write forms: `+` is a space, and what is no escape stands for itself.
fn decode(text: &str) -> Cow<'_, [u8]> {
    if text.contains('+') {
        return percent_decode(text.replace('+', " ").as_bytes()).collect::<Vec<_>>().into();
    }
    percent_decode(text.as_bytes()).into()
}

fn text(name: &'static str, value: &str) -> Result<String, FilesQueryError> {
    String::from_utf8(decode(value).into_owned()).map_err(|_| FilesQueryError::NotText { name })
}

fn set<T>(name: &'static str, place: &mut Option<T>, value: T) -> Result<(), FilesQueryError> {
    if place.replace(value).is_some() { Err(FilesQueryError::Twice { name }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(query: &str) -> Vec<u8> {
        FilesQuery::parse(query).unwrap().path().unwrap_or_default().to_owned()
    }

    #[test]
    fn every_byte_of_a_path_is_kept() {
        let cases: [(&str, &[u8]); 9] = [
            ("path=a/b", b"a/b"),
            ("path=a%2Fb+c%20d%2b", b"a/b c d+"),
            ("path=%fe", b"\xfe"),
            ("path=%FF", b"\xff"),
            ("path=%ef%bf%bd", "\u{fffd}".as_bytes()),
            ("path=a%zz%1", b"a%zz%1"),
            ("x=y&p%61th=a=b", b"a=b"),
            ("path=&username=", b""),
            ("", b""),
        ];
        for (query, expected) in cases {
            assert_eq!(path(query), expected, "{query}");
        }
    }

    #[test]
    fn a_query_that_means_nothing_is_refused_with_its_parameter() {
        use FilesQueryError::{Expiration, NotText, Twice};
        let expiration = |value: &str| Expiration { value: value.to_owned() };
        let cases = [
            ("path=a&path=a", Twice { name: "path" }),
            ("signature=a&signature=b", Twice { name: "signature" }),
            ("username=%ff", NotText { name: "username" }),
            ("signature=%ff", NotText { name: "signature" }),
            ("signature_expiration=%ff", NotText { name: "signature_expiration" }),
            ("signature_expiration=abc", expiration("abc")),
            ("signature_expiration=", expiration("")),
            ("signature_expiration=1e12", expiration("1e12")),
            ("signature_expiration=9223372036854775808", expiration("9223372036854775808")),
        ];
        for (query, expected) in cases {
            assert_eq!(FilesQuery::parse(query), Err(expected), "{query}");
        }
        let found = FilesQuery::parse("signature_expiration=-5").unwrap();
        assert_eq!(found.expiration, Some(super::Expiration { text: "-5".to_owned(), at: -5 }));
    }
}
