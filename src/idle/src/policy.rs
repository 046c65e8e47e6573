//! What counts as use, by class of hold, and how a sandbox's metadata changes it (DESIGN.md section 4, rule 2).
//!
//! Three words say how a class counts: `ignore` (never), `alive` (from its start to its end) and `progress` (when bytes, events or
//! processor time move). `progress:30` lets each movement count for 30 s; a plain `progress` has the class's own default.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use crate::ledger::HoldClass;
use crate::terms::IDLE_TIMEOUT_KEY;

/// Metadata: a JSON object of class names and words, for example `{"detached":"progress:30","terminal":"alive"}`.
pub const IDLE_POLICY_KEY: &str = "idle_policy";

/// Metadata: seconds of notice before the end.
pub const IDLE_NOTICE_KEY: &str = "idle_notice";

/// Metadata: `idle_<class>`, one word for one class.
const CLASS_KEY_PREFIX: &str = "idle_";

/// The longest notice, and the longest time that one movement may count, in seconds.
pub const NOTICE_LIMIT: u64 = 60;
const LINGER_LIMIT: u64 = 3600;

/// How long a movement counts for classes whose progress is sampled and not seen: a process that only computes.
const SAMPLED_LINGER: Duration = Duration::from_secs(10);

/// When a hold counts as use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counting {
    /// From its start to its end.
    WhileHeld,
    /// At its start and whenever something moves, and for so long after; not for being open.
    OnProgress(Duration),
    Never,
}

impl Counting {
    /// Reads a word of the metadata.
    fn parse(word: &str, class: HoldClass) -> Option<Self> {
        match word.split_once(':') {
            None if word == "ignore" => Some(Self::Never),
            None if word == "alive" => Some(Self::WhileHeld),
            None if word == "progress" => Some(Self::OnProgress(class.default_linger())),
            Some(("progress", seconds)) => {
                let digits = !seconds.is_empty() && seconds.bytes().all(|byte| byte.is_ascii_digit());
                let seconds: u64 =
                    seconds.parse().ok().filter(|seconds| digits && *seconds <= LINGER_LIMIT)?;
                Some(Self::OnProgress(Duration::from_secs(seconds)))
            }
            _ => None,
        }
    }
}

impl fmt::Display for Counting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WhileHeld => f.write_str("alive"),
            Self::OnProgress(linger) => write!(f, "progress:{}", linger.as_secs()),
            Self::Never => f.write_str("ignore"),
        }
    }
}

impl HoldClass {
    /// How long a movement counts under a plain `progress`.
    const fn default_linger(self) -> Duration {
        match self {
            Self::Command | Self::Detached | Self::Code => SAMPLED_LINGER,
            _ => Duration::ZERO,
        }
    }
}

/// Why a piece of metadata was refused. The text names the key and the rule, for the 400 answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    #[error(
        "metadata.idle_policy must be a JSON object of strings, for example {{\"detached\":\"alive\"}}: {0}"
    )]
    NotJson(String),
    #[error("metadata.idle_policy: {0:?} is not a class of use; the classes are {classes}", classes = class_names())]
    Class(String),
    #[error(
        "metadata.{key} must be \"ignore\", \"alive\", \"progress\" or \"progress:SECONDS\" (0 to {LINGER_LIMIT}); got {got:?}"
    )]
    Word { key: String, got: String },
    #[error("metadata.{key} and metadata.idle_policy both say how {class} counts; say it once")]
    Twice { key: String, class: HoldClass },
    #[error("metadata.idle_notice must be a string of whole seconds from 1 to {NOTICE_LIMIT}; got {0:?}")]
    Notice(String),
}

fn class_names() -> String {
    HoldClass::ALL.map(HoldClass::name).join(", ")
}

/// What counts, by class. The default is the table of DESIGN.md section 4.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    overrides: BTreeMap<HoldClass, Counting>,
}

impl Policy {
    #[must_use]
    pub fn with(mut self, class: HoldClass, counting: Counting) -> Self {
        self.overrides.insert(class, counting);
        self
    }

    pub fn counting(&self, class: HoldClass) -> Counting {
        if let Some(counting) = self.overrides.get(&class) {
            return *counting;
        }
        match class {
            HoldClass::Call
            | HoldClass::Command
            | HoldClass::Code
            | HoldClass::GuestPort
            | HoldClass::Inhibitor => Counting::WhileHeld,
            HoldClass::Terminal
            | HoldClass::Transfer
            | HoldClass::Watch
            | HoldClass::GuestStream
            | HoldClass::Connect => Counting::OnProgress(Duration::ZERO),
            HoldClass::Detached => Counting::Never,
        }
    }

    /// Reads `class -> word` pairs, as `/init` carries them.
    ///
    /// # Errors
    /// A [`PolicyError`] that names the class or the word.
    pub fn from_words(words: &BTreeMap<String, String>) -> Result<Self, PolicyError> {
        let mut policy = Self::default();
        for (name, word) in words {
            let class = HoldClass::from_name(name).ok_or_else(|| PolicyError::Class(name.clone()))?;
            let key = || format!("{IDLE_POLICY_KEY}.{name}");
            let counting = Counting::parse(word, class)
                .ok_or_else(|| PolicyError::Word { key: key(), got: word.clone() })?;
            policy.overrides.insert(class, counting);
        }
        Ok(policy)
    }

    /// What differs from the default, as [`Policy::from_words`] reads it.
    pub fn words(&self) -> BTreeMap<String, String> {
        self.overrides
            .iter()
            .map(|(class, counting)| (class.name().to_owned(), counting.to_string()))
            .collect()
    }
}

/// What a sandbox's metadata says about its idleness, besides `idle_timeout`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdleSettings {
    pub policy: Policy,
    /// How long before its end the sandbox wants to hear of it.
    pub notice: Option<Duration>,
    /// Keys that look like settings and are none; a misspelt one must not go unnoticed.
    pub unknown: Vec<String>,
}

impl IdleSettings {
    /// Reads the keys `idle_policy`, `idle_<class>` and `idle_notice`.
    ///
    /// # Errors
    /// A [`PolicyError`] for the 400 answer.
    pub fn parse(metadata: &BTreeMap<String, String>) -> Result<Self, PolicyError> {
        let mut settings = Self::default();
        if let Some(text) = metadata.get(IDLE_POLICY_KEY) {
            let words =
                serde_json::from_str(text).map_err(|error| PolicyError::NotJson(error.to_string()))?;
            settings.policy = Policy::from_words(&words)?;
        }
        if let Some(text) = metadata.get(IDLE_NOTICE_KEY) {
            settings.notice = Some(parse_notice(text).ok_or_else(|| PolicyError::Notice(text.clone()))?);
        }
        for (key, word) in metadata {
            let Some(name) = key.strip_prefix(CLASS_KEY_PREFIX) else { continue };
            if [IDLE_TIMEOUT_KEY, IDLE_POLICY_KEY, IDLE_NOTICE_KEY].contains(&key.as_str()) {
                continue;
            }
            let Some(class) = HoldClass::from_name(name) else {
                settings.unknown.push(key.clone());
                continue;
            };
            let counting = Counting::parse(word, class)
                .ok_or_else(|| PolicyError::Word { key: key.clone(), got: word.clone() })?;
            if settings.policy.overrides.insert(class, counting).is_some() {
                return Err(PolicyError::Twice { key: key.clone(), class });
            }
        }
        Ok(settings)
    }
}

fn parse_notice(text: &str) -> Option<Duration> {
    let digits = !text.is_empty() && text.len() <= 2 && text.bytes().all(|byte| byte.is_ascii_digit());
    let seconds: u64 = text.parse().ok().filter(|_| digits)?;
    (1..=NOTICE_LIMIT).contains(&seconds).then(|| Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<IdleSettings, PolicyError> {
        IdleSettings::parse(
            &pairs.iter().map(|(key, word)| ((*key).to_owned(), (*word).to_owned())).collect(),
        )
    }

    #[test]
    fn one_key_switches_one_class_and_leaves_the_others() {
        let settings = parse(&[("idle_detached", "alive"), ("idle_timeout", "60"), ("owner", "me")]).unwrap();
        assert_eq!(settings.policy.counting(HoldClass::Detached), Counting::WhileHeld);
        assert_eq!(settings.policy.counting(HoldClass::Call), Counting::WhileHeld);
        assert_eq!(settings.policy.counting(HoldClass::Terminal), Counting::OnProgress(Duration::ZERO));
        assert!(settings.unknown.is_empty() && settings.notice.is_none());
    }

    #[test]
    fn a_policy_survives_its_way_over_the_wire() {
        let json = r#"{"detached":"progress:30","terminal":"alive","connect":"ignore","command":"progress"}"#;
        let policy = parse(&[("idle_policy", json)]).unwrap().policy;
        assert_eq!(policy.counting(HoldClass::Detached), Counting::OnProgress(Duration::from_secs(30)));
        assert_eq!(policy.counting(HoldClass::Command), Counting::OnProgress(SAMPLED_LINGER));
        assert_eq!(Policy::from_words(&policy.words()).unwrap(), policy);
    }

    #[test]
    fn a_bad_word_names_its_key_and_the_rule() {
        for (key, word) in [
            ("idle_detached", "yes"),
            ("idle_detached", ""),
            ("idle_terminal", "progress:"),
            ("idle_terminal", "progress:-1"),
            ("idle_terminal", "progress:+5"),
            ("idle_terminal", "progress:3601"),
            ("idle_watch", "ALIVE"),
        ] {
            let error = parse(&[(key, word)]).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains("progress:SECONDS"), "{error}");
        }
        for json in ["[]", "{", r#"{"detached":1}"#, "null"] {
            assert!(matches!(parse(&[("idle_policy", json)]), Err(PolicyError::NotJson(_))), "{json}");
        }
        let error = parse(&[("idle_policy", r#"{"detachd":"alive"}"#)]).unwrap_err().to_string();
        assert!(error.contains("detachd") && error.contains("guest_stream"), "{error}");
    }

    #[test]
    fn saying_a_class_twice_is_refused_because_nobody_knows_which_is_meant() {
        let twice = [("idle_policy", r#"{"detached":"alive"}"#), ("idle_detached", "ignore")];
        assert!(matches!(parse(&twice), Err(PolicyError::Twice { .. })));
    }

    #[test]
    fn a_misspelt_key_is_noticed() {
        let settings = parse(&[("idle_detachd", "alive")]).unwrap();
        assert_eq!(settings.unknown, ["idle_detachd"]);
    }

    #[test]
    fn a_notice_has_bounds() {
        assert_eq!(parse(&[("idle_notice", "30")]).unwrap().notice, Some(Duration::from_secs(30)));
        for bad in ["0", "61", "-1", "1.5", "", "030", "x"] {
            assert_eq!(parse(&[("idle_notice", bad)]), Err(PolicyError::Notice(bad.to_owned())));
        }
    }
}
