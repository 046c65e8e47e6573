//! Which encoding a download goes out in (contract: envd.md section 4.5).

use http::{HeaderMap, HeaderName, header};

/// The answer to `Accept-Encoding`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encoding {
    Identity,
    /// The client would rather have gzip; `only` when it refuses identity.
    Gzip {
        only: bool,
    },
    /// The client refuses everything that there is.
    None,
}

/// A range counts the bytes of the file itself and a condition compares its own date, so either asks for identity.
const NEEDS_IDENTITY: [HeaderName; 6] = [
    header::RANGE,
    header::IF_RANGE,
    header::IF_MATCH,
    header::IF_NONE_MATCH,
    header::IF_MODIFIED_SINCE,
    header::IF_UNMODIFIED_SINCE,
];

/// The encoding of the answer to this request.
pub(super) fn negotiate(headers: &HeaderMap) -> Encoding {
    let wishes = Wishes::read(headers);
    let needs_identity = NEEDS_IDENTITY.iter().any(|name| headers.contains_key(name));
    choose(wishes.gzip().filter(|_| !needs_identity), wishes.identity())
}

/// The encoding that the client would get the whole file in, were that all that it asks for.
pub(super) fn of_the_whole(headers: &HeaderMap) -> Encoding {
    let wishes = Wishes::read(headers);
    choose(wishes.gzip(), wishes.identity())
}

/// The highest weight wins, and of equals the first; a bare `*` means identity unless identity is refused.
fn choose(gzip: Option<Wish>, identity: Option<Wish>) -> Encoding {
    match (gzip, identity) {
        (Some(_), None) => Encoding::Gzip { only: true },
        (Some(gzip), Some(identity)) if gzip.beats(identity) => Encoding::Gzip { only: false },
        (_, Some(_)) => Encoding::Identity,
        (None, None) => Encoding::None,
    }
}

/// A named coding, or the star, in thousandths and with its place in the list.
#[derive(Clone, Copy, Debug)]
struct Wish {
    weight: u16,
    place: usize,
}

impl Wish {
    fn beats(self, other: Self) -> bool {
        (self.weight, other.place) > (other.weight, self.place)
    }
}

#[derive(Debug, Default)]
struct Wishes {
    gzip: Option<Wish>,
    identity: Option<Wish>,
    star: Option<Wish>,
}

impl Wishes {
    fn read(headers: &HeaderMap) -> Self {
        let mut wishes = Self::default();
        let values = headers.get_all(header::ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok());
        for (place, item) in values.flat_map(|value| value.split(',')).enumerate() {
            let mut parts = item.split(';').map(str::trim);
            let name = parts.next().unwrap_or_default();
            let wish = Wish { weight: parts.find_map(weight).unwrap_or(1000), place };
            if name.eq_ignore_ascii_case("gzip") || name.eq_ignore_ascii_case("x-gzip") {
                wishes.gzip = Some(wish);
            } else if name.eq_ignore_ascii_case("identity") {
                wishes.identity = Some(wish);
            } else if name == "*" {
                wishes.star = Some(wish);
            }
        }
        wishes
    }

    /// Gzip needs a word from the client: its name, or a star where identity is refused.
    fn gzip(&self) -> Option<Wish> {
        let unnamed = || self.star.filter(|_| self.identity().is_none());
        self.gzip.or_else(unnamed).filter(|wish| wish.weight > 0)
    }

    /// Identity is welcome unless it is refused, by name or by a star of weight 0; unnamed, it comes after whatever is named.
    fn identity(&self) -> Option<Wish> {
        const UNNAMED: Wish = Wish { weight: 0, place: usize::MAX };
        match (self.identity, self.star) {
            (Some(wish), _) => (wish.weight > 0).then_some(wish),
            (None, Some(star)) => (star.weight > 0).then_some(UNNAMED),
            (None, None) => Some(UNNAMED),
        }
    }
}

/// `q=0.123` in thousandths.
fn weight(parameter: &str) -> Option<u16> {
    let (name, value) = parameter.split_once('=')?;
    if !name.trim().eq_ignore_ascii_case("q") {
        return None;
    }
    let value: f32 = value.trim().parse().ok()?;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to 0..=1000")]
    Some((value.clamp(0.0, 1.0) * 1000.0).round() as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_preferred_encoding_wins() {
        const GZIP: Encoding = Encoding::Gzip { only: false };
        const ONLY_GZIP: Encoding = Encoding::Gzip { only: true };
        let cases: &[(Option<&str>, Encoding)] = &[
            (None, Encoding::Identity),
            (Some(""), Encoding::Identity),
            (Some("identity"), Encoding::Identity),
            (Some("gzip"), GZIP),
            (Some("GZIP"), GZIP),
            (Some("x-gzip"), GZIP),
            (Some("gzip, deflate, br"), GZIP),
            (Some("br, deflate"), Encoding::Identity),
            (Some("*"), Encoding::Identity),
            (Some("*;q=0.5"), Encoding::Identity),
            (Some("gzip;q=0.5, identity"), Encoding::Identity),
            (Some("gzip, identity;q=0.5"), GZIP),
            (Some("gzip;q=0.8, identity;q=0.8"), GZIP),
            (Some("identity, gzip"), Encoding::Identity),
            (Some("gzip;q=0"), Encoding::Identity),
            (Some("gzip;q=0, *"), Encoding::Identity),
            (Some("identity;q=0, gzip"), ONLY_GZIP),
            (Some("identity;q=0, *"), ONLY_GZIP),
            (Some("gzip, *;q=0"), ONLY_GZIP),
            (Some("gzip;q=0.001, *;q=0.0"), ONLY_GZIP),
            (Some("identity;q=0"), Encoding::None),
            (Some("*;q=0"), Encoding::None),
            (Some("gzip;q=0, identity;q=0"), Encoding::None),
            (Some("br, identity;q=0"), Encoding::None),
            (Some("gzip ; q=nonsense"), GZIP),
            (Some(",,gzip;;q=1,"), GZIP),
        ];
        for (accept, expected) in cases {
            let headers =
                accept.iter().map(|accept| (header::ACCEPT_ENCODING, accept.parse().unwrap())).collect();
            assert_eq!(negotiate(&headers), *expected, "{accept:?}");
        }
    }

    #[test]
    fn ranges_and_conditions_need_identity() {
        for name in NEEDS_IDENTITY {
            let mut headers = HeaderMap::from_iter([(name, "x".parse().unwrap())]);
            headers.insert(header::ACCEPT_ENCODING, "gzip".parse().unwrap());
            assert_eq!(negotiate(&headers), Encoding::Identity);
            headers.insert(header::ACCEPT_ENCODING, "gzip, identity;q=0".parse().unwrap());
            assert_eq!(negotiate(&headers), Encoding::None);
        }
    }

    #[test]
    fn several_header_lines_are_one_list() {
        let mut headers = HeaderMap::new();
        headers.append(header::ACCEPT_ENCODING, "identity;q=0".parse().unwrap());
        headers.append(header::ACCEPT_ENCODING, "gzip".parse().unwrap());
        assert_eq!(negotiate(&headers), Encoding::Gzip { only: true });
    }
}
