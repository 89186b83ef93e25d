//! The plot: how the drain rate changes with what is pending, and how far the long drains were at each moment.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use plotters::prelude::*;

use super::book::Spread;
use super::report::BenchReport;
use super::run::Point;

const SIZE: (u32, u32) = (1_000, 420);
/// What is drawn to the right of these counts of pending events.
const GROWTH: [(&str, f64); 4] =
    [("growth.10k", 1e4), ("growth.100k", 1e5), ("growth.1m", 1e6), ("growth.5m", 5e6)];
/// Inks that a reader who sees few colours can tell apart.
const INKS: [RGBColor; 4] =
    [RGBColor(0, 90, 180), RGBColor(214, 96, 0), RGBColor(0, 140, 90), RGBColor(120, 120, 120)];

/// Writes both as SVG.
pub(super) fn write(report: &BenchReport, path: &Path) -> Result<()> {
    draw(report, path).map_err(|error| anyhow!("{error}")).with_context(|| format!("draw {}", path.display()))
}

fn draw(report: &BenchReport, path: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let (left, right) = area.split_horizontally(SIZE.0 / 2);
    let growth: Vec<(f64, Spread)> =
        GROWTH.iter().filter_map(|(name, pending)| Some((*pending, report.book.spread(name)?))).collect();
    draw_growth(&left, &growth)?;
    draw_curves(&right, &report.curves)?;
    area.present()?;
    Ok(())
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

/// Events a second over events pending, with the spread of the rounds.
fn draw_growth(area: &Area<'_>, growth: &[(f64, Spread)]) -> Result<(), Box<dyn std::error::Error>> {
    let highest = growth.iter().map(|(_, spread)| spread.high).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption("drain rate by events pending", ("sans-serif", 16))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(64)
        .build_cartesian_2d((5e3..1e7).log_scale(), 0.0..highest * 1.1)?;
    chart
        .configure_mesh()
        .x_desc("events pending")
        .y_desc("events/s")
        .x_labels(4)
        .x_label_formatter(&|pending| thousands(*pending))
        .y_label_formatter(&|rate| thousands(*rate))
        .draw()?;
    chart.draw_series(growth.iter().map(|(pending, spread)| {
        PathElement::new([(*pending, spread.low), (*pending, spread.high)], INKS[0].stroke_width(2))
    }))?;
    chart.draw_series(LineSeries::new(
        growth.iter().map(|(pending, spread)| (*pending, spread.median)),
        INKS[0],
    ))?;
    chart.draw_series(
        growth.iter().map(|(pending, spread)| Circle::new((*pending, spread.median), 3, INKS[0].filled())),
    )?;
    Ok(())
}

/// Events published over time: a straight line is a rate that stays.
fn draw_curves(area: &Area<'_>, curves: &[(String, Vec<Point>)]) -> Result<(), Box<dyn std::error::Error>> {
    let points = || curves.iter().flat_map(|(_, points)| points);
    let longest = points().map(|(seconds, _)| *seconds).fold(1.0, f64::max);
    let most = points().map(|(_, published)| *published).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption("events published, a drain each", ("sans-serif", 16))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..longest * 1.05, 0.0..most * 1.05)?;
    chart
        .configure_mesh()
        .x_desc("seconds")
        .x_label_formatter(&|seconds| format!("{seconds:.0}"))
        .y_label_formatter(&|published| thousands(*published))
        .draw()?;
    for ((name, points), ink) in curves.iter().zip(INKS.iter().cycle()) {
        chart
            .draw_series(LineSeries::new(points.iter().copied(), ink.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], ink.stroke_width(2)));
    }
    if !curves.is_empty() {
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .background_style(WHITE.mix(0.8))
            .border_style(INKS[3])
            .draw()?;
    }
    Ok(())
}

fn thousands(value: f64) -> String {
    crate::lab::numbers::thousands(value.round().abs() as u64)
}
