//! The table and the JSON.
//!
//! The JSON is one object: `version` (1), `quick`, `machine` (`cores`, `processor`, `kernel`), `rows` and `sweep`. A row has `name`,
//! `title`, `promise`, `gate` (what `--check` makes of it), `value` and `floor` (each `{amount, unit}` or null), `ratio` (value by
//! floor, or null), `verdict` (`ok`, `short`, `not_decided`, `failed`), `miss` (by which factor the promise is missed; at most 1 when it
//! is kept, null when nothing was measured), `fails_check`, `notes` (sentences) and `figures` (an object of further `{amount, unit}`).
//! A point of `sweep` has `operation` (`run`, `echo`, `output_json`, `output_binary`), `streams`, `p50_ms`, `p99_ms` (null for output)
//! and `per_second` (operations, or megabytes of output).

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use super::row::{Quantity, Reading, Row, number};
use super::sweep::Point;

/// Where notes are broken.
const WIDTH: usize = 118;

const HEADINGS: [&str; 7] = ["row", "what", "promise", "measured", "floor", "ratio", "verdict"];

/// A line for each row, with its notes below it.
pub fn table(rows: &[(&Row, Reading)]) -> String {
    let cells: Vec<[String; 7]> = rows.iter().map(|(row, reading)| line(row, reading)).collect();
    let widths: [usize; 7] = std::array::from_fn(|column| {
        let longest = cells.iter().map(|cells| cells[column].chars().count()).max().unwrap_or(0);
        longest.max(HEADINGS[column].len())
    });
    let mut text = String::new();
    push(&mut text, &HEADINGS.map(str::to_owned), &widths);
    push(&mut text, &widths.map(|width| "-".repeat(width)), &widths);
    for (cells, (_, reading)) in cells.iter().zip(rows) {
        push(&mut text, cells, &widths);
        for note in &reading.notes {
            wrap(&mut text, note);
        }
    }
    text
}

fn line(row: &Row, reading: &Reading) -> [String; 7] {
    let quantity =
        |quantity: Option<Quantity>| quantity.map_or("-".to_owned(), |quantity| quantity.to_string());
    [
        row.name.to_owned(),
        row.title.to_owned(),
        row.promise.to_owned(),
        quantity(reading.value),
        quantity(reading.floor),
        reading.ratio.map_or("-".to_owned(), number),
        reading.judgement.verdict.to_string(),
    ]
}

fn push(text: &mut String, cells: &[String; 7], widths: &[usize; 7]) {
    let mut line = String::new();
    for (column, (cell, width)) in cells.iter().zip(widths).enumerate() {
        // Numbers end in one line.
        let padding = " ".repeat(width.saturating_sub(cell.chars().count()));
        let (before, after) =
            if (3..=5).contains(&column) { (padding.as_str(), "") } else { ("", padding.as_str()) };
        line.push_str(&format!("{before}{cell}{after}  "));
    }
    text.push_str(line.trim_end());
    text.push('\n');
}

fn wrap(text: &mut String, note: &str) {
    let mut column = WIDTH;
    for word in note.split_whitespace() {
        let width = word.chars().count();
        if column + 1 + width > WIDTH {
            // Writing to a String cannot fail.
            let _ = write!(text, "{}      ", if column == WIDTH { "" } else { "\n" });
            column = 6;
        } else {
            text.push(' ');
            column += 1;
        }
        text.push_str(word);
        column += width;
        if column >= WIDTH {
            column = WIDTH - 1;
        }
    }
    text.push('\n');
}

/// Everything that was measured.
pub fn json(rows: &[(&Row, Reading)], points: &[Point], quick: bool) -> Value {
    let rows: Vec<_> = rows.iter().map(|(row, reading)| json_row(row, reading)).collect();
    json!({"version": 1, "quick": quick, "machine": machine(), "rows": rows, "sweep": points})
}

fn json_row(row: &Row, reading: &Reading) -> Value {
    let figures: Map<String, Value> =
        reading.figures.iter().map(|(name, quantity)| ((*name).to_owned(), json!(quantity))).collect();
    let miss = reading.judgement.miss;
    json!({
        "name": row.name,
        "title": row.title,
        "promise": row.promise,
        "gate": row.gate.to_string(),
        "value": reading.value,
        "floor": reading.floor,
        "ratio": reading.ratio,
        "verdict": reading.judgement.verdict,
        "miss": if reading.value.is_some() && miss.is_finite() { json!(miss) } else { Value::Null },
        "fails_check": reading.fails(row.gate),
        "notes": reading.notes,
        "figures": figures,
    })
}

fn machine() -> Value {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let processors = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let processor = processors.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    json!({"cores": cores, "processor": processor.map(|(_, name)| name), "kernel": kernel.trim()})
}

#[cfg(test)]
mod tests {
    use super::super::row::{Gate, Judgement, MILLISECONDS, Promise, Verdict};
    use super::super::sweep::Operation;
    use super::*;

    const ROW: Row = Row {
        name: "start",
        title: "start of the agent",
        promise: "<= 10 ms",
        gate: Gate::Margin(5.0),
        measure: |_| anyhow::bail!("not here"),
    };

    fn reading() -> Reading {
        Reading::new(2.5, MILLISECONDS, Promise::AtMost(10.0).exactly(2.5))
            .floor(0.5, MILLISECONDS)
            .ratio(5.0)
            .figure("min", 1.25, MILLISECONDS)
            .note("word ".repeat(60))
    }

    #[test]
    fn columns_line_up_and_notes_are_broken() {
        let failed = Reading::failed(&anyhow::anyhow!("it broke off"));
        let text = table(&[(&ROW, reading()), (&ROW, failed)]);
        let lines: Vec<_> = text.lines().collect();
        let at = |line: &str, word: &str| line.find(word);
        assert_eq!(at(lines[0], "promise"), at(lines[2], "<= 10 ms"));
        assert_eq!(at(lines[0], "verdict"), at(lines[2], "ok"));
        assert!(lines[2].contains("2.50 ms") && lines[2].contains("0.50 ms"));
        assert!(
            lines.iter().skip(3).take(3).all(|line| line.len() <= WIDTH && line.starts_with("      word"))
        );
        assert!(lines[lines.len() - 1].ends_with("it broke off"));
        assert!(lines[lines.len() - 2].ends_with("FAILED"));
    }

    #[test]
    fn the_json_has_what_its_schema_says() {
        let point = Point {
            operation: Operation::OutputJson,
            streams: 10,
            p50_ms: None,
            p99_ms: None,
            per_second: 5.0,
        };
        let failed = Reading::failed(&anyhow::anyhow!("lost"));
        let value = json(&[(&ROW, reading()), (&ROW, failed)], &[point], true);
        assert_eq!(value["version"], 1);
        assert_eq!(value["rows"][0]["value"], json!({"amount": 2.5, "unit": "ms"}));
        assert_eq!(value["rows"][0]["figures"]["min"]["amount"], 1.25);
        assert_eq!(value["rows"][0]["verdict"], "ok");
        assert_eq!(value["rows"][0]["miss"], 0.25);
        assert_eq!(value["rows"][1]["fails_check"], true);
        assert_eq!(value["rows"][1]["miss"], Value::Null);
        assert_eq!(value["sweep"][0]["operation"], "output_json");
        assert_eq!(value["sweep"][0]["p50_ms"], Value::Null);
        assert!(value["machine"]["cores"].as_u64() >= Some(1));
    }

    #[test]
    fn a_verdict_of_two_words_is_one_in_json() {
        let judged = Judgement { verdict: Verdict::NotDecided, miss: 1.0 };
        let value = json_row(&ROW, &Reading::new(1.0, "", judged));
        assert_eq!(value["verdict"], "not_decided");
    }
}
