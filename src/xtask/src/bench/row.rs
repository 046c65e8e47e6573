//! What a row of the table is: a promise, how it is measured, and what came out.

use std::fmt;

use anyhow::Result;
use serde::Serialize;

use super::Bench;
use super::stats::Samples;

/// One promise of the design. A new one is a new entry in a family's list of rows.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// What `--row` takes.
    pub name: &'static str,
    pub title: &'static str,
    /// The promise in words and numbers.
    pub promise: &'static str,
    pub gate: Gate,
    pub measure: fn(&Bench) -> Result<Reading>,
}

/// What `--check` makes of a row that falls short.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gate {
    /// A size or a count: the same on every machine.
    Exact,
    /// A ratio: fails when it misses its promise by more than this factor, which no noise explains.
    Margin(f64),
    /// A shared machine cannot decide it.
    Open,
}

impl fmt::Display for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact => write!(f, "exact"),
            Self::Margin(factor) => write!(f, "fails beyond {factor} x the promise"),
            Self::Open => write!(f, "never fails"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Ok,
    Short,
    /// The machine was too noisy, or there is nothing to measure.
    NotDecided,
    /// The measurement itself did not come to its end.
    Failed,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Short => "SHORT",
            Self::NotDecided => "not decided",
            Self::Failed => "FAILED",
        })
    }
}

/// A number and its unit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Quantity {
    pub amount: f64,
    pub unit: &'static str,
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = number(self.amount);
        f.pad(&if self.unit.is_empty() { number } else { format!("{number} {}", self.unit) })
    }
}

/// Three digits that say something; whole numbers and large ones whole.
pub fn number(amount: f64) -> String {
    match amount.abs() {
        _ if amount.fract() == 0.0 => format!("{amount:.0}"),
        100.0.. => format!("{amount:.0}"),
        10.0.. => format!("{amount:.1}"),
        0.1.. => format!("{amount:.2}"),
        _ => format!("{amount:.4}"),
    }
}

pub const MEGABYTES_PER_SECOND: &str = "MB/s";
pub const MILLISECONDS: &str = "ms";
pub const MEBIBYTES: &str = "MiB";

/// What a row came to.
#[derive(Clone, Debug)]
pub struct Reading {
    pub value: Option<Quantity>,
    pub floor: Option<Quantity>,
    /// Value by floor: the median of the rounds' ratios.
    pub ratio: Option<f64>,
    pub judgement: Judgement,
    /// What a reader has to know to trust the numbers.
    pub notes: Vec<String>,
    /// Everything else that was measured, for the JSON.
    pub figures: Vec<(&'static str, Quantity)>,
}

impl Reading {
    pub fn new(amount: f64, unit: &'static str, judgement: Judgement) -> Self {
        let value = Some(Quantity { amount, unit });
        Self { value, floor: None, ratio: None, judgement, notes: Vec::new(), figures: Vec::new() }
    }

    pub fn failed(error: &anyhow::Error) -> Self {
        let judgement = Judgement { verdict: Verdict::Failed, miss: f64::INFINITY };
        let notes = vec![format!("{error:#}")];
        Self { value: None, floor: None, ratio: None, judgement, notes, figures: Vec::new() }
    }

    pub fn floor(mut self, amount: f64, unit: &'static str) -> Self {
        self.floor = Some(Quantity { amount, unit });
        self
    }

    pub fn ratio(mut self, ratio: f64) -> Self {
        self.ratio = Some(ratio);
        self
    }

    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.notes.push(note.into());
        self
    }

    pub fn figure(mut self, name: &'static str, amount: f64, unit: &'static str) -> Self {
        self.figures.push((name, Quantity { amount, unit }));
        self
    }

    /// Whether `--check` fails because of it.
    pub fn fails(&self, gate: Gate) -> bool {
        match (self.judgement.verdict, gate) {
            (Verdict::Failed, _) => true,
            (Verdict::Short, Gate::Exact) => true,
            (Verdict::Short, Gate::Margin(factor)) => self.judgement.miss > factor,
            _ => false,
        }
    }
}

/// A promise in numbers.
#[derive(Clone, Copy, Debug)]
pub enum Promise {
    AtMost(f64),
    AtLeast(f64),
}

/// How a measurement compares with its promise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Judgement {
    pub verdict: Verdict,
    /// By which factor the promise is missed; below 1 when it is kept.
    pub miss: f64,
}

impl Promise {
    fn miss(self, value: f64) -> f64 {
        match self {
            Self::AtMost(most) => value / most,
            Self::AtLeast(least) => least / value,
        }
    }

    /// Of a number that does not scatter.
    pub fn exactly(self, value: f64) -> Judgement {
        let miss = self.miss(value);
        Judgement { verdict: if miss <= 1.0 { Verdict::Ok } else { Verdict::Short }, miss }
    }

    /// Of numbers that do: kept when the median keeps it, short when most of the middle half do not, else not decided.
    pub fn of(self, samples: &Samples) -> Judgement {
        let judged = self.exactly(samples.median());
        let (low, high) = samples.spread();
        let best = self.miss(low).min(self.miss(high));
        if judged.verdict == Verdict::Short && best <= 1.0 {
            return Judgement { verdict: Verdict::NotDecided, ..judged };
        }
        judged
    }
}

impl Judgement {
    /// Either of two promises is enough.
    pub fn or(self, other: Self) -> Self {
        let rank = |verdict| match verdict {
            Verdict::Ok => 0,
            Verdict::NotDecided => 1,
            Verdict::Short => 2,
            Verdict::Failed => 3,
        };
        let verdict = if rank(other.verdict) < rank(self.verdict) { other.verdict } else { self.verdict };
        Self { verdict, miss: self.miss.min(other.miss) }
    }

    /// Both promises have to be kept.
    pub fn and(self, other: Self) -> Self {
        let worse = if self.miss >= other.miss { self } else { other };
        let verdict = match (self.verdict, other.verdict) {
            (Verdict::Ok, verdict) | (verdict, Verdict::Ok) => verdict,
            _ => worse.verdict,
        };
        Self { verdict, miss: worse.miss }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(verdict: Verdict, miss: f64) -> Judgement {
        Judgement { verdict, miss }
    }

    #[test]
    fn a_promise_is_kept_at_its_very_number() {
        assert_eq!(Promise::AtMost(2.0).exactly(2.0), judged(Verdict::Ok, 1.0));
        assert_eq!(Promise::AtLeast(0.5).exactly(0.25), judged(Verdict::Short, 2.0));
    }

    #[test]
    fn scattered_numbers_around_a_promise_decide_nothing_against_it() {
        let samples = |values: &[f64]| Samples::new(values.to_vec()).unwrap();
        let promise = Promise::AtMost(2.0);
        assert_eq!(promise.of(&samples(&[1.0, 1.9, 9.0])).verdict, Verdict::Ok);
        assert_eq!(promise.of(&samples(&[1.0, 2.1, 9.0])).verdict, Verdict::NotDecided);
        assert_eq!(promise.of(&samples(&[2.1, 2.2, 9.0])).verdict, Verdict::Short);
    }

    #[test]
    fn either_promise_is_enough_and_both_are_more() {
        let (kept, missed) = (judged(Verdict::Ok, 0.5), judged(Verdict::Short, 3.0));
        assert_eq!(kept.or(missed), kept);
        assert_eq!(missed.or(kept), kept);
        assert_eq!(kept.and(missed), missed);
        assert_eq!(missed.and(judged(Verdict::NotDecided, 1.1)), missed);
    }

    #[test]
    fn only_what_a_shared_machine_can_decide_fails_a_check() {
        let short = |miss| Reading::new(1.0, "", judged(Verdict::Short, miss));
        assert!(short(1.01).fails(Gate::Exact));
        assert!(!short(1.9).fails(Gate::Margin(2.0)));
        assert!(short(2.1).fails(Gate::Margin(2.0)));
        assert!(!short(100.0).fails(Gate::Open));
        let undecided = Judgement { verdict: Verdict::NotDecided, miss: 0.0 };
        assert!(!Reading::new(0.0, "", undecided).fails(Gate::Exact));
        assert!(Reading::failed(&anyhow::anyhow!("lost")).fails(Gate::Open));
    }

    #[test]
    fn numbers_are_short() {
        let cases = [(3.0, "3"), (1234.56, "1235"), (12.345, "12.3"), (1.239, "1.24"), (0.01234, "0.0123")];
        for (amount, text) in cases {
            assert_eq!(number(amount), text);
        }
        assert_eq!(Quantity { amount: 4.5, unit: "ms" }.to_string(), "4.50 ms");
    }
}
