//! One axis of a chart: its range, its ticks, and where a value lies on it. Pure.

/// A range wider than this many times is shown logarithmic.
const LOG_ABOVE: f64 = 50.0;
/// The steps between ticks, and the ticks of a logarithmic decade.
const NICE: [f64; 3] = [1.0, 2.0, 5.0];

pub(crate) struct Axis {
    pub name: String,
    pub ticks: Vec<Tick>,
    log: bool,
    low: f64,
    high: f64,
}

pub(crate) struct Tick {
    pub at: f64,
    pub label: String,
}

impl Axis {
    /// From zero, or logarithmic where that would flatten the small values; nothing without a value.
    /// `room` is how many labels fit.
    pub(crate) fn fit(name: &str, values: &[f64], room: usize, label: fn(f64) -> String) -> Option<Self> {
        let finite = values.iter().copied().filter(|value| value.is_finite());
        let max = finite.clone().max_by(f64::total_cmp)?;
        let min = finite.filter(|value| *value > 0.0).min_by(f64::total_cmp).unwrap_or(max);
        let wide = min > 0.0 && max / min > LOG_ABOVE;
        Some(if wide { Self::log(name, min, max, room, label) } else { Self::linear(name, max, room, label) })
    }

    /// From zero to a round number.
    pub(crate) fn linear(name: &str, max: f64, room: usize, label: fn(f64) -> String) -> Self {
        let max = if max > 0.0 { max } else { 1.0 };
        let step = nice_at_least(max / room as f64);
        let steps = (max / step - 1e-9).ceil();
        let ticks = (0..=steps as u32).map(|index| tick(f64::from(index) * step, label)).collect();
        Self { name: name.to_owned(), ticks, log: false, low: 0.0, high: steps * step }
    }

    /// From zero to exactly `max`, so that a line reaches the edge.
    pub(crate) fn until(name: &str, max: f64, room: usize, label: fn(f64) -> String) -> Self {
        let mut axis = Self::linear(name, max, room, label);
        if max > 0.0 {
            axis.high = max;
            axis.ticks.retain(|tick| tick.at <= max);
        }
        axis
    }

    /// The scale of HDR histograms: every step to the right is ten times rarer. See [`rarity`].
    pub(crate) fn quantiles(max: f64) -> Self {
        let high = max.max(1.0);
        let mut ticks = vec![
            Tick { at: 0.0, label: "0\u{a0}%".to_owned() },
            Tick { at: rarity(0.5, high), label: "50\u{a0}%".to_owned() },
            Tick { at: 1.0, label: "90\u{a0}%".to_owned() },
        ];
        ticks.extend((2..=high as usize).map(|nines| {
            let label = if nines == 2 { "99\u{a0}%".to_owned() } else { format!("99.{:9<1$}\u{a0}%", "", nines - 2) };
            Tick { at: nines as f64, label }
        }));
        Self { name: "share of deliveries at least as fast".to_owned(), ticks, log: false, low: 0.0, high }
    }

    fn log(name: &str, min: f64, max: f64, room: usize, label: fn(f64) -> String) -> Self {
        let decades = min.log10().floor() as i32..=max.log10().ceil() as i32;
        let steps: Vec<f64> = decades.flat_map(|decade| NICE.map(|step| step * 10f64.powi(decade))).collect();
        let low = steps.iter().copied().rfind(|step| *step <= min * (1.0 + 1e-9)).unwrap_or(min);
        let high = steps.iter().copied().find(|step| *step >= max * (1.0 - 1e-9)).unwrap_or(max);
        let inside: Vec<f64> = steps.into_iter().filter(|step| (low..=high).contains(step)).collect();
        let chosen: Vec<f64> = if inside.len() <= room {
            inside
        } else {
            let decades = inside.into_iter().filter(|step| (step.log10() - step.log10().round()).abs() < 1e-9);
            let stride = decades.clone().count().div_ceil(room.max(1)).max(1);
            decades.step_by(stride).collect()
        };
        let ticks = chosen.into_iter().map(|at| tick(at, label)).collect();
        Self { name: name.to_owned(), ticks, log: true, low, high }
    }

    /// Where the value lies: 0 at the start of the axis, 1 at its end; nowhere if it has no place.
    pub(crate) fn place(&self, value: f64) -> Option<f64> {
        let place = if self.log {
            (value / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        place.is_finite().then_some(place.clamp(0.0, 1.0))
    }
}

/// How far right a quantile lies: 0.9 at 1, 0.99 at 2, and the maximum at `end`.
pub(crate) fn rarity(quantile: f64, end: f64) -> f64 {
    if quantile >= 1.0 { end } else { (-(1.0 - quantile).log10()).clamp(0.0, end) }
}

fn tick(at: f64, label: fn(f64) -> String) -> Tick {
    Tick { at, label: label(at) }
}

/// The smallest of 1, 2, 5, 10, 20, … that is not below `size`.
fn nice_at_least(size: f64) -> f64 {
    let decade = 10f64.powi(size.log10().floor() as i32);
    NICE.into_iter().map(|step| step * decade).find(|step| *step >= size * (1.0 - 1e-9)).unwrap_or(10.0 * decade)
}
