//! `--html`: the report as one page that needs nothing else, to look at, to print and to send on.
//!
//! Here are the page and its tables; `panels` makes the charts. Sections without data are left out.

use std::time::SystemTime;

use maud::{DOCTYPE, Markup, PreEscaped, html};

use crate::number::{full, headline};
use crate::panels;
use crate::report::{Curve, Figure, Report, Step, Violation};

const STYLE: &str = include_str!("report.css");
/// More tiles than this are a table.
const TILES_MAX: usize = 6;
/// The columns of the latency table.
const QUANTILES: [(f64, &str); 6] =
    [(0.5, "p50"), (0.9, "p90"), (0.99, "p99"), (0.999, "p99.9"), (0.9999, "p99.99"), (1.0, "max")];

/// `ran_at` is when the run began.
pub(crate) fn page(report: &Report, ran_at: SystemTime) -> String {
    let program = concat!("hubcast-loadtest ", env!("CARGO_PKG_VERSION"));
    let ran_at = humantime::format_rfc3339_seconds(ran_at).to_string();
    let title = if report.title.is_empty() { report.command } else { &report.title };
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                meta name="generator" content=(program);
                title { (title) " – Hubcast" }
                style { (PreEscaped(STYLE)) }
            }
            body {
                header {
                    p.kicker { "Hubcast load test" @if !report.command.is_empty() { " · " (report.command) } }
                    h1 { (title) }
                    p.stamp { (program) " · run began " time datetime=(ran_at) { (readable(&ran_at)) } }
                }
                main {
                    (notes(&report.notes))
                    (tiles(report))
                    @if !report.violations.is_empty() { (section("Violations", &violations(&report.violations))) }
                    @if !report.capacity.is_empty() { (section("Capacity", &capacity(&report.capacity))) }
                    @if !report.latency.is_empty() { (section("Latency", &latency(&report.latency))) }
                    @if let Some(charts) = panels::timeline(&report.timeline) { (section("Over time", &charts)) }
                    div.columns {
                        @if !report.figures.is_empty() { (section("All figures", &figures(&report.figures))) }
                        @if !report.settings.is_empty() { (section("Settings", &settings(&report.settings))) }
                    }
                }
            }
        }
    }
    .into_string()
}

fn readable(rfc3339: &str) -> String {
    rfc3339.replace('T', " ").replace('Z', " UTC")
}

fn section(title: &str, content: &Markup) -> Markup {
    html! { section { h2 { (title) } (content) } }
}

fn notes(notes: &[String]) -> Markup {
    html! {
        @if !notes.is_empty() {
            aside.notes {
                h2 { "Before you believe the figures" }
                ul { @for note in notes { li { (note) } } }
            }
        }
    }
}

fn violations(violations: &[Violation]) -> Markup {
    html! { ol { @for violation in violations { li { (violation) } } } }
}

/// The knee, the first figures, and the latency that belongs to them.
fn tiles(report: &Report) -> Markup {
    let mut tiles = Vec::new();
    if let Some(knee) = panels::knee(&report.capacity) {
        let name = if knee.proven { "deliveries within bounds" } else { "deliveries, limit not reached" };
        tiles.push((name.to_owned(), knee.step.deliveries_per_second, "/s"));
    }
    let tails = if report.latency.is_empty() { 0 } else { 2 };
    let figures = report.figures.iter().take(TILES_MAX - tails - tiles.len());
    tiles.extend(figures.map(|figure| (figure.name.clone(), figure.value, figure.unit)));
    if let Some(curve) = report.latency.first() {
        tiles.extend([(0.5, "p50"), (0.99, "p99")].into_iter().filter_map(|(quantile, name)| {
            let name =
                if report.latency.len() > 1 { format!("{name}, {}", curve.name) } else { format!("{name} latency") };
            Some((name, at_quantile(curve, quantile)?, "ms"))
        }));
    }
    html! {
        @if !tiles.is_empty() {
            dl.tiles {
                @for (name, value, unit) in tiles {
                    div {
                        dt { (name) }
                        dd title={ (full(value)) " " (unit) } { (headline(value)) @if !unit.is_empty() { small { (unit) } } }
                    }
                }
            }
        }
    }
}

fn capacity(steps: &[Step]) -> Markup {
    let cpu = |percent: Option<f64>| percent.map_or("–".to_owned(), full);
    html! {
        (panels::capacity(steps))
        div.scroll {
            table.numbers {
                thead {
                    tr {
                        th { "Step" }
                        th { "Offered" small { "publications/s" } }
                        th { "Delivered" small { "deliveries/s" } }
                        th { "p50" small { "ms" } }
                        th { "p99" small { "ms" } }
                        th { "Lost" small { "deliveries" } }
                        th { "Server CPU" small { "% of a core" } }
                        th { "Generator CPU" small { "% of a core" } }
                    }
                }
                tbody {
                    @for step in steps {
                        tr {
                            th { @if step.held { span.held { "●" } " held" } @else { span.broken { "✕" } " broken" } }
                            @for number in [step.offered, step.deliveries_per_second, step.p50_ms, step.p99_ms] {
                                td { (full(number)) }
                            }
                            td { (full(step.lost as f64)) }
                            td { (cpu(step.server_cpu_percent)) }
                            td { (full(step.own_cpu_percent)) }
                        }
                    }
                }
            }
        }
    }
}

fn latency(curves: &[Curve]) -> Markup {
    html! {
        (panels::latency(curves))
        div.scroll {
            table.numbers {
                thead {
                    tr {
                        th { "Latency" small { "ms" } }
                        th { "Deliveries" }
                        @for (_, name) in QUANTILES { th { (name) } }
                    }
                }
                tbody {
                    @for curve in curves {
                        tr {
                            th { (curve.name) }
                            td { (full(curve.count as f64)) }
                            @for (quantile, _) in QUANTILES {
                                td { (at_quantile(curve, quantile).map_or("–".to_owned(), full)) }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The latency that this share of deliveries did not exceed; rounded up between two points.
fn at_quantile(curve: &Curve, quantile: f64) -> Option<f64> {
    let reached = curve.points.iter().find(|(at, _)| *at >= quantile - 1e-9);
    reached.or(curve.points.last()).map(|(_, latency_ms)| *latency_ms)
}

fn figures(figures: &[Figure]) -> Markup {
    html! {
        table.pairs {
            @for figure in figures {
                tr { th { (figure.name) } td { (full(figure.value)) } td.unit { (figure.unit) } }
            }
        }
    }
}

fn settings(settings: &[(String, String)]) -> Markup {
    html! {
        table.pairs { @for (name, value) in settings { tr { th { (name) } td { code { (value) } } } } }
    }
}
