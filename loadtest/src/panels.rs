//! What the page's charts show: latency by quantile, the run second by second, capacity step by step.

use maud::{Markup, html};

use crate::axis::{Axis, rarity};
use crate::chart::{Chart, Dot, Line, Shape};
use crate::number::{full, ms, percent, seconds, short};
use crate::report::{Curve, Second, Step};

/// The style sheet's colours and dashes; from the seventh curve on they begin again.
const SERIES: [&str; 6] = ["s0", "s1", "s2", "s3", "s4", "s5"];
/// Ticks on the y axis of a tall and of a low chart, and on an x axis.
const TALL: usize = 7;
const LOW: usize = 4;
const ACROSS: usize = 8;

/// The step to plan with.
pub(crate) struct Knee<'a> {
    pub step: &'a Step,
    /// Whether a higher rate was tried and did not hold.
    pub proven: bool,
}

/// The highest offered rate that held.
pub(crate) fn knee(steps: &[Step]) -> Option<Knee<'_>> {
    let held = steps.iter().filter(|step| step.held);
    let step = held.max_by(|one, other| one.offered.total_cmp(&other.offered))?;
    Some(Knee { step, proven: steps.iter().any(|other| !other.held && other.offered > step.offered) })
}

/// One line a curve, rare latencies stretched out to the right.
pub(crate) fn latency(curves: &[Curve]) -> Markup {
    let latencies: Vec<f64> = curves.iter().flat_map(|curve| &curve.points).map(|(_, latency)| *latency).collect();
    let Some(y) = Axis::fit("latency", &latencies, TALL, ms) else { return html! {} };
    let end = curves.iter().map(rarest).fold(1.0, f64::max);
    let mut chart = Chart {
        label: "Latency by percentile; the table below has the figures".to_owned(),
        x: Axis::quantiles(end),
        y,
        height: 300.0,
        shares_x: false,
        lines: Vec::new(),
        dots: Vec::new(),
        marker: None,
        hover: Vec::new(),
    };
    for (curve, class) in curves.iter().zip(SERIES.into_iter().cycle()) {
        let rarest = rarest(curve);
        let place = |(quantile, latency): &(f64, f64)| (rarity(*quantile, rarest), *latency);
        chart.lines.push(Line { class, points: curve.points.iter().map(place).collect(), filled: false });
        chart.dots.extend(curve.points.iter().map(|point| {
            let (quantile, latency) = *point;
            let name = if quantile >= 1.0 { "max".to_owned() } else { format!("p{}", trimmed(quantile * 100.0)) };
            let shape = if quantile >= 1.0 { Shape::Disc } else { Shape::Hidden };
            Dot { class, at: place(point), shape, title: format!("{}\n{name}: {}", curve.name, ms(latency)) }
        }));
    }
    let names = curves.iter().map(|curve| curve.name.as_str());
    html! { figure { (legend(names.zip(SERIES.into_iter().cycle()))) (chart.svg()) } }
}

/// Where a curve ends: of a thousand deliveries the slowest is at 99.9 %.
fn rarest(curve: &Curve) -> f64 {
    (curve.count.max(10) as f64).log10()
}

/// A quantile as people write it.
fn trimmed(percent: f64) -> String {
    let text = format!("{percent:.5}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Deliveries, latency and CPU above one time axis; nothing for a single second, which is no course.
pub(crate) fn timeline(run: &[Second]) -> Option<Markup> {
    if run.len() < 2 {
        return None;
    }
    let end = run.iter().map(|second| second.at_s).filter(|at| at.is_finite()).max_by(f64::total_cmp)?;
    // A second without deliveries has no latency.
    let latency =
        |pick: fn(&Second) -> f64| line(run, |second| if second.deliveries == 0 { f64::NAN } else { pick(second) });
    let deliveries = line(run, |second| second.deliveries as f64);
    let (p50, p99) = (latency(|second| second.p50_ms), latency(|second| second.p99_ms));
    let server = line(run, |second| second.server_cpu_percent.unwrap_or(f64::NAN));
    let own = line(run, |second| second.own_cpu_percent);

    let hover: Vec<(f64, String)> = run.iter().map(|second| (second.at_s, told(second))).collect();
    let chart = |label: &str, height, room, unit, shares_x, lines: Vec<Line>| {
        let values: Vec<f64> = lines.iter().flat_map(|line| &line.points).map(|(_, value)| *value).collect();
        let y = Axis::fit("", &values, room, unit)?;
        let x = Axis::until("since the start", end, ACROSS, seconds);
        let (label, hover) = (label.to_owned(), hover.clone());
        Some(Chart { label, x, y, height, shares_x, lines, dots: Vec::new(), marker: None, hover }.svg())
    };
    let mut cpu = vec![styled(own, "s1", false)];
    let mut cpu_names = vec![("generator CPU", "s1")];
    if run.iter().any(|second| second.server_cpu_percent.is_some()) {
        cpu.insert(0, styled(server, "s0", false));
        cpu_names.insert(0, ("server CPU", "s0"));
    }
    let rate = chart("Deliveries a second", 150.0, LOW, short, true, vec![styled(deliveries, "s0", true)]);
    let lines = vec![styled(p99, "s0", false), styled(p50, "s1", false)];
    let latency = chart("Latency by second", 110.0, LOW, ms, true, lines);
    let cpu = chart("CPU by second, in percent of one core", 90.0, LOW, percent, false, cpu);
    Some(html! {
        figure {
            (legend([("deliveries a second", "s0")])) @if let Some(chart) = rate { (chart) }
            (legend([("p99 latency", "s0"), ("p50 latency", "s1")])) @if let Some(chart) = latency { (chart) }
            (legend(cpu_names)) @if let Some(chart) = cpu { (chart) }
        }
    })
}

fn line(run: &[Second], value: impl Fn(&Second) -> f64) -> Vec<(f64, f64)> {
    run.iter().map(|second| (second.at_s, value(second))).collect()
}

fn styled(points: Vec<(f64, f64)>, class: &'static str, filled: bool) -> Line {
    Line { class, points, filled }
}

fn told(second: &Second) -> String {
    let mut told = format!(
        "{}\n{} publications\n{} deliveries\np50 {}, p99 {}\ngenerator CPU {}",
        seconds(second.at_s),
        full(second.publications as f64),
        full(second.deliveries as f64),
        ms(second.p50_ms),
        ms(second.p99_ms),
        percent(second.own_cpu_percent),
    );
    if let Some(server) = second.server_cpu_percent {
        told += &format!("\nserver CPU {}", percent(server));
    }
    told
}

/// Latency against throughput, from the lowest to the highest rate that was offered.
pub(crate) fn capacity(steps: &[Step]) -> Markup {
    let latencies: Vec<f64> = steps.iter().map(|step| step.p99_ms).collect();
    let Some(y) = Axis::fit("p99 latency", &latencies, TALL, ms) else { return html! {} };
    let highest = steps.iter().map(|step| step.deliveries_per_second).filter(|rate| rate.is_finite());
    let x = Axis::linear("deliveries a second", highest.fold(0.0, f64::max), ACROSS, short);
    let mut ordered: Vec<&Step> = steps.iter().collect();
    ordered.sort_by(|one, other| one.offered.total_cmp(&other.offered));
    let place = |step: &Step| (step.deliveries_per_second, step.p99_ms);
    let dots = ordered.iter().map(|step| {
        let (class, shape) = if step.held { ("held", Shape::Disc) } else { ("broken", Shape::Cross) };
        Dot { class, at: place(step), shape, title: outcome(step) }
    });
    let knee = knee(steps);
    let name = |knee: &Knee<'_>| {
        let name = if knee.proven { "knee" } else { "highest rate tried, held" };
        format!("{name}: {}/s at p99 {}", short(knee.step.deliveries_per_second), ms(knee.step.p99_ms))
    };
    let chart = Chart {
        label: "p99 latency by throughput; the table below has the figures".to_owned(),
        x,
        y,
        height: 260.0,
        shares_x: false,
        dots: dots.collect(),
        lines: vec![styled(ordered.iter().map(|step| place(step)).collect(), "path", false)],
        marker: knee.as_ref().map(|knee| (knee.step.deliveries_per_second, name(knee))),
        hover: Vec::new(),
    };
    html! {
        figure {
            ul.legend {
                @if knee.is_some() { li { span.held { "●" } " step held" } }
                @if steps.iter().any(|step| !step.held) {
                    li { span.broken { "✕" } " latency, loss or rate out of bounds" }
                }
            }
            (chart.svg())
        }
    }
}

fn outcome(step: &Step) -> String {
    format!(
        "{} publications/s offered: {}\n{} deliveries/s\np50 {}, p99 {}\n{} lost",
        full(step.offered),
        if step.held { "held" } else { "broken" },
        full(step.deliveries_per_second),
        ms(step.p50_ms),
        ms(step.p99_ms),
        step.lost,
    )
}

fn legend<'a>(series: impl IntoIterator<Item = (&'a str, &'static str)>) -> Markup {
    html! {
        ul.legend {
            @for (name, class) in series {
                li {
                    svg viewBox="0 0 26 8" aria-hidden="true" { path class={ "line " (class) } d="M2 4H24" {} }
                    " " (name)
                }
            }
        }
    }
}
