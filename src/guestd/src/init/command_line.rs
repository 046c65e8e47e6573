//! The kernel command line, as far as the init stages read it: words, `name=value` pairs, and double quotes.
//!
//! Every parameter of ours begins with `guestd.`; [`RootDisk`] holds the ones that say where the root file system is.

/// The parameters of the running kernel, in the order in which they were given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandLine {
    words: Vec<(String, Option<String>)>,
}

impl CommandLine {
    /// Splits a command line as the kernel does: spaces separate, double quotes keep spaces together, and what stands
    /// after a lone `--` belongs to the init program's own arguments, not to the parameters.
    pub fn parse(text: &str) -> Self {
        let words = split_words(text)
            .into_iter()
            .take_while(|word| word != "--")
            .map(|word| match word.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (word, None),
            })
            .collect();
        Self { words }
    }

    /// The value of `name`. The last one wins, as in the kernel, so that a host can append an override.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.words.iter().rev().find(|(word, _)| word == name)?.1.as_deref()
    }

    /// Whether `name` was given at all, with or without a value.
    pub fn has(&self, name: &str) -> bool {
        self.words.iter().any(|(word, _)| word == name)
    }
}

/// Where the root file system is and how it is made writable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootDisk {
    /// `guestd.root=/dev/vda`: the block device of the read-only image.
    pub device: String,
    /// `guestd.rootfstype=squashfs`.
    pub file_system: String,
    /// `guestd.upper_size=50%`: how much the sandbox may write, in the words of tmpfs (`256m`, `50%`).
    pub upper_size: String,
}

impl RootDisk {
    /// `None` when the command line has no `guestd.root=`: the kernel has mounted the root file system by itself.
    pub fn of(command_line: &CommandLine) -> Option<Self> {
        let device = command_line.value("guestd.root").filter(|device| !device.is_empty())?;
        let or = |name: &str, default: &str| command_line.value(name).unwrap_or(default).to_owned();
        Some(Self {
            device: device.to_owned(),
            file_system: or("guestd.rootfstype", "squashfs"),
            upper_size: or("guestd.upper_size", "50%"),
        })
    }
}

fn split_words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quoted = false;
    for character in text.chars() {
        match character {
            '"' => quoted = !quoted,
            c if c.is_whitespace() && !quoted => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
            }
            c => word.push(c),
        }
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_values_and_quotes_are_told_apart() {
        let line =
            CommandLine::parse("console=ttyS0 quiet  guestd.note=\"two words\" \"guestd.x=a b\" empty=\n");
        assert_eq!(line.value("console"), Some("ttyS0"));
        assert!(line.has("quiet"));
        assert_eq!(line.value("quiet"), None);
        assert_eq!(line.value("guestd.note"), Some("two words"));
        assert_eq!(line.value("guestd.x"), Some("a b"));
        assert_eq!(line.value("empty"), Some(""));
        assert!(!line.has("missing"));
    }

    #[test]
    fn a_later_parameter_overrides_an_earlier_one() {
        let line = CommandLine::parse("guestd.root=/dev/vda guestd.root=/dev/vdb");
        assert_eq!(line.value("guestd.root"), Some("/dev/vdb"));
    }

    #[test]
    fn arguments_of_the_init_program_are_not_parameters() {
        let line = CommandLine::parse("quiet -- guestd.root=/dev/vda");
        assert_eq!(RootDisk::of(&line), None);
    }

    #[test]
    fn a_value_may_contain_an_equals_sign() {
        assert_eq!(CommandLine::parse("a=b=c").value("a"), Some("b=c"));
    }

    #[test]
    fn an_unfinished_quote_keeps_the_rest_as_one_word() {
        assert_eq!(CommandLine::parse("a=\"b c").value("a"), Some("b c"));
    }

    #[test]
    fn the_root_disk_has_defaults_and_needs_a_device() {
        assert_eq!(RootDisk::of(&CommandLine::parse("guestd.root=")), None);
        let root = RootDisk::of(&CommandLine::parse("guestd.root=/dev/vda")).unwrap();
        assert_eq!((root.file_system.as_str(), root.upper_size.as_str()), ("squashfs", "50%"));
        let line = CommandLine::parse("guestd.root=/dev/vda guestd.rootfstype=erofs guestd.upper_size=64m");
        let root = RootDisk::of(&line).unwrap();
        assert_eq!((root.file_system.as_str(), root.upper_size.as_str()), ("erofs", "64m"));
    }
}
