//! One line chart as inline SVG. The page's style sheet colours it by class.
//!
//! It is drawn twice, for a wide and for a narrow page, and the style sheet shows one of them: text
//! in an SVG shrinks with it, and on a telephone nobody could read the wide one.

use maud::{Markup, html};

use crate::axis::Axis;

/// Pixels left of the plot: room for labels of up to nine characters.
const LEFT: f64 = 68.0;
/// One row of text.
const ROW: f64 = 22.0;
/// Of the labels beside the lowest and the highest tick.
const HALF_LABEL: f64 = 8.0;
/// The width of a character on average, to keep labels apart.
const CHARACTER: f64 = 6.8;
const BOLD_CHARACTER: f64 = 7.8;
/// More areas to point at than this are too narrow to hit.
const BANDS_MAX: usize = 150;

pub(crate) struct Chart {
    /// What it shows, for those who hear the page.
    pub label: String,
    pub x: Axis,
    pub y: Axis,
    /// Of the plot, in pixels.
    pub height: f64,
    /// Charts that share the x axis of the next one below leave its labels to that one.
    pub shares_x: bool,
    pub lines: Vec<Line>,
    pub dots: Vec<Dot>,
    /// A vertical line with a name.
    pub marker: Option<(f64, String)>,
    /// What a pointer over this x is told.
    pub hover: Vec<(f64, String)>,
}

pub(crate) struct Line {
    /// Which colour and dash: see the style sheet.
    pub class: &'static str,
    /// A point that has no place on an axis leaves a gap.
    pub points: Vec<(f64, f64)>,
    /// Whether the area below is tinted.
    pub filled: bool,
}

pub(crate) struct Dot {
    pub class: &'static str,
    pub at: (f64, f64),
    pub shape: Shape,
    pub title: String,
}

#[derive(Clone, Copy)]
pub(crate) enum Shape {
    Disc,
    Cross,
    /// Shown only under the pointer.
    Hidden,
}

/// One drawing: the plot's edges in pixels.
struct Plot<'a> {
    chart: &'a Chart,
    right: f64,
    top: f64,
    bottom: f64,
    wide: bool,
}

impl Chart {
    pub(crate) fn svg(&self) -> Markup {
        html! { (self.draw(880.0, true)) (self.draw(400.0, false)) }
    }

    fn draw(&self, width: f64, wide: bool) -> Markup {
        let rows = if self.marker.is_some() { 2.0 } else { 1.0 };
        let top = if self.y.name.is_empty() { HALF_LABEL } else { rows * ROW + HALF_LABEL };
        let bottom = top + self.height;
        let height = bottom + if self.shares_x { HALF_LABEL } else { 2.0 * ROW + 4.0 };
        let plot = Plot { chart: self, right: width, top, bottom, wide };
        html! {
            svg class=(if wide { "wide" } else { "narrow" }) viewBox={ "0 0 " (width) " " (height) } role="img"
                aria-label=(self.label) {
                (plot.y_axis())
                (plot.x_axis())
                @if let Some((at, name)) = &self.marker { (plot.marker(*at, name)) }
                @for line in &self.lines { (plot.line(line)) }
                @for dot in &self.dots { (plot.dot(dot)) }
                @if wide { (plot.bands()) }
            }
        }
    }
}

impl Plot<'_> {
    fn x(&self, value: f64) -> Option<f64> {
        Some(LEFT + self.chart.x.place(value)? * (self.right - LEFT))
    }

    fn y(&self, value: f64) -> Option<f64> {
        Some(self.bottom - self.chart.y.place(value)? * (self.bottom - self.top))
    }

    fn y_axis(&self) -> Markup {
        let ticks = self.chart.y.ticks.iter().filter_map(|tick| Some((self.y(tick.at)?, &tick.label)));
        html! {
            text class="name" x="0" y="12" { (self.chart.y.name) }
            @for (y, label) in ticks {
                path class="grid" d={ "M" (LEFT) " " (px(y)) "H" (px(self.right)) } {}
                text class="end" x=(LEFT - 9.0) y=(px(y + 4.0)) { (label) }
            }
        }
    }

    fn x_axis(&self) -> Markup {
        let mut free = f64::NEG_INFINITY;
        let ticks = self.chart.x.ticks.iter().filter_map(|tick| {
            let x = self.x(tick.at)?;
            let half = tick.label.chars().count() as f64 * CHARACTER / 2.0;
            // The last label ends with the plot, so that the plot can end with the page.
            let (anchor, text_x) = if x + half > self.right { ("end", self.right) } else { ("middle", x) };
            let start = if anchor == "end" { text_x - 2.0 * half } else { x - half };
            let fits = start >= free;
            if fits {
                free = start + 2.0 * half + 1.5 * CHARACTER;
            }
            fits.then_some((x, anchor, text_x, &tick.label))
        });
        html! {
            @for (x, anchor, text_x, label) in ticks {
                path class="grid" d={ "M" (px(x)) " " (px(self.top)) "V" (px(self.bottom)) } {}
                @if !self.chart.shares_x {
                    text class=(anchor) x=(px(text_x)) y=(px(self.bottom + 18.0)) { (label) }
                }
            }
            path class="base" d={ "M" (LEFT) " " (px(self.bottom)) "H" (px(self.right)) } {}
            @if !self.chart.shares_x {
                text class="name end" x=(px(self.right)) y=(px(self.bottom + 18.0 + ROW)) { (self.chart.x.name) }
            }
        }
    }

    fn marker(&self, at: f64, name: &str) -> Markup {
        let x = self.x(at).unwrap_or(LEFT);
        let half = name.chars().count() as f64 * BOLD_CHARACTER / 2.0;
        let middle = x.min(self.right - half).max(half);
        html! {
            path class="marker" d={ "M" (px(x)) " " (px(self.top - 4.0)) "V" (px(self.bottom)) } {}
            text class="marked middle" x=(px(middle)) y=(px(self.top - 10.0)) { (name) }
        }
    }

    fn line(&self, line: &Line) -> Markup {
        let placed: Vec<Option<(f64, f64)>> =
            line.points.iter().map(|(x, y)| Some((self.x(*x)?, self.y(*y)?))).collect();
        let pieces = placed.split(Option::is_none).map(|piece| piece.iter().flatten().copied().collect::<Vec<_>>());
        html! {
            @for piece in pieces {
                @if let (Some(first), Some(last)) = (piece.first(), piece.last()) {
                    @let path = path(&piece);
                    @if line.filled {
                        path class={ "area " (line.class) }
                            d={ (path) "V" (px(self.bottom)) "H" (px(first.0)) "Z" } {}
                    }
                    // One second alone is a line of no length: its round ends show it.
                    path class={ "line " (line.class) } d={ (path) "L" (px(last.0)) " " (px(last.1)) } {}
                }
            }
        }
    }

    fn dot(&self, dot: &Dot) -> Markup {
        let (Some(x), Some(y)) = (self.x(dot.at.0), self.y(dot.at.1)) else { return html! {} };
        let at = format!("translate({} {})", px(x), px(y));
        html! {
            @match dot.shape {
                Shape::Disc => g class=(dot.class) transform=(at) { circle r="4.5" {} title { (dot.title) } },
                Shape::Cross => g class={ "cross " (dot.class) } transform=(at) {
                    // Strokes alone are hard to point at.
                    circle class="hit" r="8" {}
                    path d="M-4.5-4.5L4.5 4.5M-4.5 4.5L4.5-4.5" {}
                    title { (dot.title) }
                },
                Shape::Hidden => @if self.wide {
                    g class={ "hidden " (dot.class) } transform=(at) { circle r="6" {} title { (dot.title) } }
                },
            }
        }
    }

    /// Each reaches halfway to the next.
    fn bands(&self) -> Markup {
        let stride = self.chart.hover.len().div_ceil(BANDS_MAX).max(1);
        let at: Vec<(f64, &String)> =
            self.chart.hover.iter().step_by(stride).filter_map(|(at, told)| Some((self.x(*at)?, told))).collect();
        let edge = |index: usize| match index {
            0 => LEFT,
            index if index < at.len() => f64::midpoint(at[index - 1].0, at[index].0),
            _ => self.right,
        };
        html! {
            @for (index, (_, told)) in at.iter().enumerate() {
                rect class="band" x=(px(edge(index))) y=(px(self.top))
                    width=(px((edge(index + 1) - edge(index)).max(0.0))) height=(px(self.bottom - self.top)) {
                    title { (told) }
                }
            }
        }
    }
}

fn path(points: &[(f64, f64)]) -> String {
    let points: Vec<String> = points.iter().map(|(x, y)| format!("{} {}", px(*x), px(*y))).collect();
    format!("M{}", points.join("L"))
}

/// A tenth of a pixel is more than enough, and short.
fn px(length: f64) -> String {
    format!("{length:.1}")
}
