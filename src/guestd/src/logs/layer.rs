//! From `tracing` into the ring.

use std::fmt::{self, Write};
use std::sync::Arc;

use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use super::{LINE_LIMIT, Logs};

/// A layer that keeps each event in `logs`. Which levels come here is the subscriber's affair.
pub fn layer<S: Subscriber>(logs: &Arc<Logs>) -> impl Layer<S> + use<S> {
    Keeper(Arc::clone(logs))
}

struct Keeper(Arc<Logs>);

impl<S: Subscriber> Layer<S> for Keeper {
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        let mut words = Words { left: LINE_LIMIT, ..Words::default() };
        event.record(&mut words);
        self.0.say(*event.metadata().level(), words.message, words.fields);
    }
}

/// An event's words, up to the limit of a line.
#[derive(Default)]
struct Words {
    message: String,
    fields: Vec<(&'static str, String)>,
    left: usize,
}

impl Words {
    fn put(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        let mut text = Limited { text: String::new(), left: self.left };
        // It fails where the limit is reached, and what came before is kept.
        let _cut_off = text.write_fmt(value);
        self.left = text.left;
        if field.name() == "message" {
            self.message = text.text;
        } else {
            self.left = self.left.saturating_sub(field.name().len());
            self.fields.push((field.name(), text.text));
        }
    }
}

impl Visit for Words {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format_args!("{value:?}"));
    }
}

/// Takes text up to a limit, and no longer than that does a huge value write.
struct Limited {
    text: String,
    left: usize,
}

impl Write for Limited {
    fn write_str(&mut self, piece: &str) -> fmt::Result {
        if piece.len() <= self.left {
            self.left -= piece.len();
            self.text.push_str(piece);
            return Ok(());
        }
        self.text.push_str(&piece[..piece.floor_char_boundary(self.left)]);
        self.text.push('…');
        self.left = 0;
        Err(fmt::Error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing_subscriber::layer::SubscriberExt;

    #[test]
    fn an_event_becomes_a_line_with_its_fields() {
        let logs = Logs::new();
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer(&logs)), || {
            tracing::info!(pid = 7, user = "root", tag = None::<&str>, error = %"denied", "it went wrong");
        });
        let batch = logs.after(0, 10, 1 << 20);
        assert_eq!(batch.lines[0].message, "it went wrong");
        let expected = [("pid", "7"), ("user", "root"), ("error", "denied")];
        assert_eq!(batch.lines[0].fields, expected.map(|(name, value)| (name, value.to_owned())));
    }

    #[test]
    fn a_huge_value_is_cut_between_characters() {
        let logs = Logs::new();
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer(&logs)), || {
            tracing::info!(path = "é".repeat(LINE_LIMIT), other = "lost", "long");
        });
        let line = &logs.after(0, 10, 1 << 20).lines[0];
        let text: usize =
            line.fields.iter().map(|(_, value)| value.len()).sum::<usize>() + line.message.len();
        assert!(text <= LINE_LIMIT + 2 * '…'.len_utf8(), "{text}");
    }
}
