//! The picture of a sweep: latency, operations and output over the number of streams.

use std::path::Path;

use anyhow::{Context, Result};
use plotters::coord::Shift;
use plotters::prelude::*;

use super::sweep::{Operation, Point};

const SIZE: (u32, u32) = (960, 1180);
const FONT: &str = "sans-serif";

/// Told apart without colour too: by lightness, by the mark, and by the legend's order.
const RUN: RGBColor = RGBColor(0x1f, 0x5a, 0xa6);
const ECHO: RGBColor = RGBColor(0xd9, 0x5f, 0x02);
const JSON: RGBColor = RGBColor(0x6a, 0x3d, 0x9a);
const BINARY: RGBColor = RGBColor(0x1b, 0x8a, 0x5a);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

struct Series {
    name: &'static str,
    colour: RGBColor,
    dashed: bool,
    points: Vec<(f64, f64)>,
}

/// Writes the picture as an SVG.
///
/// # Errors
/// When the file cannot be written.
pub fn draw(path: &Path, points: &[Point]) -> Result<()> {
    let mut text = String::new();
    render(&mut text, points).map_err(|error| anyhow::anyhow!("cannot draw: {error}"))?;
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn series(
    points: &[Point],
    operation: Operation,
    name: &'static str,
    colour: RGBColor,
    value: impl Fn(&Point) -> Option<f64>,
) -> Series {
    let of_it = points.iter().filter(|point| point.operation == operation);
    let points = of_it.filter_map(|point| Some((point.streams as f64, value(point)?))).collect();
    Series { name, colour, dashed: false, points }
}

impl Series {
    fn dashed(mut self) -> Self {
        self.dashed = true;
        self
    }
}

fn render(text: &mut String, points: &[Point]) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(text, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let root = root.margin(10, 4, 0, 0);
    let title = "guestd: latency and throughput over concurrent streams";
    let root = root.titled(title, (FONT, 24))?;
    let below =
        "closed loop: each stream has one operation under way; agent, client and commands share this machine";
    let root = root.titled(below, (FONT, 14).into_font().color(&BLACK.mix(0.6)))?;
    let (latency, rest) = root.split_vertically(470);
    let (operations, output) = rest.split_vertically(330);
    panel(
        &latency,
        "Latency",
        "milliseconds",
        &[
            series(points, Operation::Run, "run /bin/true, p50", RUN, |point| point.p50_ms),
            series(points, Operation::Run, "run /bin/true, p99", RUN, |point| point.p99_ms).dashed(),
            series(points, Operation::Echo, "echo over a stream, p50", ECHO, |point| point.p50_ms),
            series(points, Operation::Echo, "echo over a stream, p99", ECHO, |point| point.p99_ms).dashed(),
        ],
    )?;
    let rate = |point: &Point| Some(point.per_second);
    panel(
        &operations,
        "Operations",
        "operations per second",
        &[
            series(points, Operation::Run, "run /bin/true", RUN, rate),
            series(points, Operation::Echo, "echo over a stream", ECHO, rate),
        ],
    )?;
    panel(
        &output,
        "Output of all streams together",
        "MB of payload per second",
        &[
            series(points, Operation::OutputJson, "stdout, JSON codec", JSON, rate),
            series(points, Operation::OutputBinary, "stdout, binary codec", BINARY, rate),
        ],
    )?;
    root.present()?;
    Ok(())
}

/// One diagram with logarithmic axes.
fn panel(
    area: &Area<'_>,
    title: &str,
    unit: &str,
    series: &[Series],
) -> Result<(), Box<dyn std::error::Error>> {
    let all = || series.iter().flat_map(|series| series.points.iter());
    let right = all().map(|(x, _)| *x).fold(10.0, f64::max);
    let low = all().map(|(_, y)| *y).fold(f64::INFINITY, f64::min);
    let high = all().map(|(_, y)| *y).fold(0.0, f64::max);
    let (bottom, top) = decades(low, high);

    let mut chart = ChartBuilder::on(area)
        .margin(8)
        .margin_right(28)
        .caption(title, (FONT, 18))
        .x_label_area_size(46)
        .y_label_area_size(78)
        .build_cartesian_2d((0.9..right * 1.12).log_scale(), (bottom..top).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("concurrent streams")
        .y_desc(unit)
        .axis_desc_style((FONT, 15))
        .label_style((FONT, 13))
        .x_labels(12)
        .y_labels(8)
        .x_label_formatter(&|x| tick(*x))
        .y_label_formatter(&|y| tick(*y))
        .bold_line_style(BLACK.mix(0.18))
        .light_line_style(BLACK.mix(0.05))
        .draw()?;
    for one in series {
        let style = one.colour.stroke_width(2);
        let dash = move |from, to| PathElement::new(vec![(from, 0), (to, 0)], style);
        if one.dashed {
            let line = DashedLineSeries::new(one.points.iter().copied(), 6, 4, style);
            let legend = move |at| EmptyElement::at(at) + dash(0, 6) + dash(10, 16) + dash(20, 24);
            chart.draw_series(line)?.label(one.name).legend(legend);
        } else {
            let line = LineSeries::new(one.points.iter().copied(), style);
            chart.draw_series(line)?.label(one.name).legend(move |at| EmptyElement::at(at) + dash(0, 24));
        }
        let marks = one.points.iter().map(|point| Circle::new(*point, 3, one.colour.filled()));
        chart.draw_series(marks)?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .margin(10)
        .legend_area_size(32)
        .label_font((FONT, 14))
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    Ok(())
}

/// Whole decades around all values, with room of at least one for the legend above.
fn decades(low: f64, high: f64) -> (f64, f64) {
    let (low, high) = if low.is_finite() && low > 0.0 && high > 0.0 { (low, high) } else { (1.0, 10.0) };
    let bottom = 10_f64.powf(low.log10().floor());
    (bottom, 10_f64.powf((high * 12.0).log10().ceil()))
}

fn tick(value: f64) -> String {
    if value >= 1000.0 && value % 1000.0 == 0.0 {
        return format!("{} 000", tick(value / 1000.0));
    }
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_picture_has_its_title_units_and_all_series() {
        let mut points = Vec::new();
        for streams in [1, 10, 1000] {
            for operation in [Operation::Run, Operation::Echo, Operation::OutputJson, Operation::OutputBinary]
            {
                let time = Some(streams as f64 / 7.0);
                points.push(Point { operation, streams, p50_ms: time, p99_ms: time, per_second: 100.0 });
            }
        }
        let mut text = String::new();
        render(&mut text, &points).unwrap();
        for words in ["concurrent streams", "milliseconds", "per second", "p99", "binary codec", "1 000"] {
            assert!(text.contains(words), "{words}");
        }
    }

    #[test]
    fn an_empty_sweep_is_an_empty_picture() {
        render(&mut String::new(), &[]).unwrap();
    }

    #[test]
    fn axes_are_whole_decades_around_the_values() {
        assert_eq!(decades(0.3, 40.0), (0.1, 1000.0));
        assert_eq!(decades(f64::INFINITY, 0.0), (1.0, 1000.0));
    }

    #[test]
    fn ticks_are_short() {
        assert_eq!([0.1, 250.0, 2000.0, 1e6].map(tick), ["0.1", "250", "2 000", "1 000 000"]);
    }
}
