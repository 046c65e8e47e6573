//! Numbers of one kind: medians, percentiles, and whether a promise is kept when the numbers scatter.

use anyhow::Result;

/// A set of measurements, sorted. Never empty.
#[derive(Clone, Debug)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// `None` when there is nothing in it, or something that is no number.
    pub fn new(mut values: Vec<f64>) -> Option<Self> {
        if values.is_empty() || values.iter().any(|value| value.is_nan()) {
            return None;
        }
        values.sort_by(f64::total_cmp);
        Some(Self(values))
    }

    /// The value that `percent` of the samples do not exceed (nearest rank).
    pub fn percentile(&self, percent: f64) -> f64 {
        let rank = (percent / 100.0 * self.0.len() as f64).ceil() as usize;
        self.0[rank.clamp(1, self.0.len()) - 1]
    }

    pub fn median(&self) -> f64 {
        let middle = self.0.len() / 2;
        if self.0.len() % 2 == 1 { self.0[middle] } else { (self.0[middle - 1] + self.0[middle]) / 2.0 }
    }

    pub fn min(&self) -> f64 {
        self.0[0]
    }

    pub fn max(&self) -> f64 {
        self.0[self.0.len() - 1]
    }

    /// The middle half, as "a to b".
    pub fn spread(&self) -> (f64, f64) {
        (self.percentile(25.0), self.percentile(75.0))
    }
}

/// What was measured and its floor, in turns: whatever else the machine does, it does to both.
#[derive(Debug)]
pub struct Paired {
    pub measured: Samples,
    pub floor: Samples,
    /// Of each round: measured by floor.
    pub ratio: Samples,
}

impl Paired {
    /// Runs both `rounds` times, the floor first in every second round.
    ///
    /// # Errors
    /// The first failure of either.
    pub fn run(
        rounds: usize,
        mut measured: impl FnMut() -> Result<f64>,
        mut floor: impl FnMut() -> Result<f64>,
    ) -> Result<Self> {
        let mut values = Vec::new();
        for round in 0..rounds {
            let pair = if round % 2 == 0 {
                let value = measured()?;
                (value, floor()?)
            } else {
                let value = floor()?;
                (measured()?, value)
            };
            values.push(pair);
        }
        Self::of(&values).ok_or_else(|| anyhow::anyhow!("nothing was measured in {rounds} rounds"))
    }

    /// `None` as for [`Samples::new`].
    pub fn of(values: &[(f64, f64)]) -> Option<Self> {
        Some(Self {
            measured: Samples::new(values.iter().map(|(measured, _)| *measured).collect())?,
            floor: Samples::new(values.iter().map(|(_, floor)| *floor).collect())?,
            ratio: Samples::new(values.iter().map(|(measured, floor)| measured / floor).collect())?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(values: &[f64]) -> Samples {
        Samples::new(values.to_vec()).unwrap()
    }

    #[test]
    fn percentiles_are_measured_values_and_the_extremes_are_the_ends() {
        let hundred = samples(&(1..=100).rev().map(f64::from).collect::<Vec<_>>());
        assert_eq!((hundred.percentile(50.0), hundred.percentile(99.0)), (50.0, 99.0));
        assert_eq!((hundred.percentile(0.0), hundred.percentile(100.0)), (1.0, 100.0));
        assert_eq!((hundred.min(), hundred.max()), (1.0, 100.0));
        assert_eq!(hundred.spread(), (25.0, 75.0));
    }

    #[test]
    fn the_median_of_an_even_number_lies_between_the_middle_two() {
        assert_eq!(samples(&[4.0, 1.0]).median(), 2.5);
        assert_eq!(samples(&[9.0, 1.0, 2.0]).median(), 2.0);
    }

    #[test]
    fn nothing_and_no_number_are_no_samples() {
        assert!(Samples::new(Vec::new()).is_none());
        assert!(Samples::new(vec![1.0, f64::NAN]).is_none());
    }

    #[test]
    fn a_noisy_round_hits_both_sides_and_leaves_the_ratio() {
        let mut noise = [1.0, 10.0, 1.0].into_iter().cycle();
        let mut both = Vec::new();
        for _ in 0..3 {
            let factor = noise.next().unwrap();
            both.push((2.0 * factor, factor));
        }
        let paired = Paired::of(&both).unwrap();
        assert_eq!((paired.ratio.min(), paired.ratio.max()), (2.0, 2.0));
    }

    #[test]
    fn the_floor_goes_first_in_every_second_round() {
        let order = std::cell::RefCell::new(String::new());
        let say = |letter: char| {
            order.borrow_mut().push(letter);
            Ok(1.0)
        };
        Paired::run(3, || say('m'), || say('f')).unwrap();
        assert_eq!(order.into_inner(), "mffmmf");
    }
}
