//! How late releases were, as a picture: two histograms over one axis.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use plotters::prelude::*;

use super::traffic::Release;

const SIZE: (u32, u32) = (960, 480);
const FONT: &str = "sans-serif";
const BIN: f64 = 20.0;
const HOST: RGBColor = RGBColor(0x1f, 0x5a, 0xa6);
const CLIENT: RGBColor = RGBColor(0xd9, 0x5f, 0x02);

/// Writes the picture as an SVG.
///
/// # Errors
/// When the file cannot be written.
pub fn draw(path: &Path, releases: &[Release], idle: Duration) -> Result<()> {
    let mut text = String::new();
    render(&mut text, releases, idle).map_err(|error| anyhow::anyhow!("cannot draw: {error}"))?;
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// How many values lie in each bin, by the bin's start in milliseconds.
fn bins(values: impl Iterator<Item = f64>) -> Vec<(f64, usize)> {
    let mut bins = std::collections::BTreeMap::new();
    for value in values {
        *bins.entry((value * 1000.0 / BIN).floor() as i64).or_default() += 1;
    }
    bins.into_iter().map(|(bin, count)| (bin as f64 * BIN, count)).collect()
}

fn render(text: &mut String, releases: &[Release], idle: Duration) -> Result<(), Box<dyn std::error::Error>> {
    let host = bins(releases.iter().map(|release| release.host));
    let client = bins(releases.iter().map(|release| release.client));
    let top = host.iter().chain(&client).map(|(_, count)| *count).max().unwrap_or(1);
    let root = SVGBackend::with_string(text, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let title = format!("{} idle releases, idle timeout {} s", releases.len(), idle.as_secs());
    let mut chart = ChartBuilder::on(&root)
        .margin(12)
        .caption(title, (FONT, 22))
        .x_label_area_size(46)
        .y_label_area_size(70)
        .build_cartesian_2d(-100.0..1100.0, 0.0..top as f64 * 1.15)?;
    chart
        .configure_mesh()
        .x_desc("milliseconds after the idle timeout; promised: 0 to 1000")
        .y_desc("releases")
        .axis_desc_style((FONT, 15))
        .label_style((FONT, 13))
        .draw()?;
    for bound in [0.0, 1000.0] {
        chart.draw_series(LineSeries::new([(bound, 0.0), (bound, top as f64 * 1.1)], BLACK.mix(0.5)))?;
    }
    for (name, colour, bins) in [("by the tombstone", HOST, host), ("as its client saw it", CLIENT, client)] {
        let bars = bins.into_iter().map(|(from, count)| {
            Rectangle::new([(from, 0.0), (from + BIN, count as f64)], colour.mix(0.55).filled())
        });
        chart
            .draw_series(bars)?
            .label(name)
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 16, y + 5)], colour.mix(0.55).filled()));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .label_font((FONT, 14))
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    root.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_picture_shows_both_views_and_the_promise() {
        let releases = [Release { host: 0.151, client: 0.2 }, Release { host: 0.152, client: -0.01 }];
        assert_eq!(bins(releases.iter().map(|one| one.host)), [(140.0, 2)]);
        assert_eq!(bins(releases.iter().map(|one| one.client)), [(-20.0, 1), (200.0, 1)]);
        let mut text = String::new();
        render(&mut text, &releases, Duration::from_secs(60)).unwrap();
        for words in ["2 idle releases", "tombstone", "promised"] {
            assert!(text.contains(words), "{words}");
        }
    }
}
