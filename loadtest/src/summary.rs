//! From a run to a report, and the report to where it was wanted.

use std::fs;
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context as _, bail};
use hdrhistogram::Histogram;

use crate::html;
use crate::options::{Crowd, Target};
use crate::report::{Curve, Figure, Report, Second};
use crate::world::{Connected, Run};

/// So many violations fit on a screen.
const VIOLATIONS_PRINTED: usize = 10;

impl Report {
    /// An empty report of a command.
    pub(crate) fn new(command: &'static str, title: &str, target: &Target, crowd: &Crowd) -> Self {
        Self { command, title: title.to_owned(), settings: target.settings(crowd), ..Self::default() }
    }

    /// Adds a setting.
    pub(crate) fn set(&mut self, name: &str, value: impl std::fmt::Display) {
        self.settings.push((name.to_owned(), value.to_string()));
    }

    /// Adds a number.
    pub(crate) fn figure(&mut self, name: &str, value: f64, unit: &'static str) {
        self.figures.push(Figure { name: name.to_owned(), value, unit });
    }

    /// Adds what connecting cost.
    pub(crate) fn add_connected(&mut self, connected: &Connected) {
        let connections = connected.connections as f64;
        self.figure("connects", connections / connected.seconds, "/s");
        if let Some(nanos) = connected.server_nanos {
            self.figure("server CPU a connect", nanos as f64 / 1e3 / connections, "us");
        }
        if let Some(kib) = connected.server_kib {
            self.figure("server memory a connection", kib as f64 / connections, "KiB");
        }
    }

    /// Adds what a run found.
    pub(crate) fn add_run(&mut self, run: &Run, curve: &str) {
        let latency = run.tally.latency_us();
        let deliveries = run.tally.deliveries.max(1) as f64;
        // The most telling first: the page makes tiles of them.
        self.figure("delivery rate", run.tally.deliveries as f64 / run.seconds, "/s");
        if let Some(nanos) = run.server_nanos {
            self.figure("server CPU a delivery", nanos as f64 / 1e3 / deliveries, "us");
            self.figure("server CPU of a core", nanos as f64 / 1e7 / run.seconds, "%");
        }
        self.figure("lost", run.tally.lost as f64, "");
        self.figure("repeated or out of order", run.tally.repeated as f64, "");
        self.figure("publication rate", run.publications as f64 / run.seconds, "/s");
        self.figure("publications", run.publications as f64, "");
        self.figure("deliveries", run.tally.deliveries as f64, "");
        for (name, quantile) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0)] {
            self.figure(&format!("latency {name}"), millis(&latency, quantile), "ms");
        }
        self.figure("own CPU a delivery", run.own_nanos as f64 / 1e3 / deliveries, "us");
        self.figure("own CPU of a core, busiest process", run.own_share_max * 100.0, "%");
        self.latency.push(curve_of(curve, &latency));
        self.timeline = timeline(run);
        for (reason, count) in &run.tally.ended {
            self.notes.push(format!("{count} subscribers were disconnected: {reason}"));
        }
        if run.is_generator_busy() {
            self.notes.push(
                "The generator was busy nearly all the time: it may be what limited the run (try --processes).".into(),
            );
        }
    }

    /// Prints the report and writes it where the options say. An error if anything was lost.
    pub(crate) fn deliver(&self, target: &Target) -> anyhow::Result<()> {
        self.write(target.json.as_deref(), target.html.as_deref())?;
        let count = |name| self.figures.iter().filter(|figure| figure.name == name).map(|it| it.value).sum::<f64>();
        let (lost, repeated) = (count("lost"), count("repeated or out of order"));
        if lost + repeated > 0.0 {
            bail!("{lost} deliveries were lost, {repeated} repeated or out of order");
        }
        Ok(())
    }

    /// Prints the report and writes it as JSON and as a page.
    pub(crate) fn write(&self, json: Option<&Path>, html: Option<&Path>) -> anyhow::Result<()> {
        let is_json_printed = json == Some(Path::new("-"));
        if !is_json_printed {
            self.print();
        }
        if let Some(path) = json {
            let json = serde_json::to_string_pretty(self)?;
            if is_json_printed {
                println!("{json}");
            } else {
                fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))?;
            }
        }
        if let Some(path) = html {
            fs::write(path, html::page(self, SystemTime::now()))
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }

    fn print(&self) {
        println!("{}: {}", self.command, self.title);
        for (name, value) in &self.settings {
            println!("  {name:<36} {value}");
        }
        println!();
        for Figure { name, value, unit } in &self.figures {
            let digits = if value.fract() == 0.0 || *value >= 1000.0 { 0 } else { 3 };
            println!("  {name:<36} {:>14} {unit}", format!("{value:.digits$}"));
        }
        for step in &self.capacity {
            println!(
                "  {:>9.1} publications/s  {:>10.0} deliveries/s  p50 {:>8.2} ms  p99 {:>8.2} ms  lost {:>6}  {}",
                step.offered,
                step.deliveries_per_second,
                step.p50_ms,
                step.p99_ms,
                step.lost,
                if step.held { "held" } else { "broken" }
            );
        }
        for violation in self.violations.iter().take(VIOLATIONS_PRINTED) {
            println!("  violation: {violation}");
        }
        if self.violations.len() > VIOLATIONS_PRINTED {
            println!("  … and more, of which --json and --html tell the first hundred of each kind");
        }
        for note in &self.notes {
            println!("  note: {note}");
        }
    }
}

/// A quantile of a histogram of microseconds, in milliseconds.
pub(crate) fn millis(latency_us: &Histogram<u64>, quantile: f64) -> f64 {
    latency_us.value_at_quantile(quantile) as f64 / 1e3
}

/// A latency distribution, from the fastest delivery to the slowest.
pub(crate) fn curve_of(name: &str, latency_us: &Histogram<u64>) -> Curve {
    let mut points: Vec<_> = latency_us
        .iter_quantiles(8)
        .map(|at| (at.quantile_iterated_to(), at.value_iterated_to() as f64 / 1e3))
        .collect();
    points.dedup_by(|next, last| next.0 <= last.0);
    Curve { name: name.to_owned(), count: latency_us.len(), points }
}

fn timeline(run: &Run) -> Vec<Second> {
    let second = |(at, latency): (usize, &Histogram<u64>)| {
        let sample = run.samples.get(at);
        Second {
            at_s: at as f64 * run.interval_s,
            // Counted where they arrive: a publication is as many deliveries as it has subscribers.
            publications: (run.publications as f64 * latency.len() as f64 / run.tally.deliveries.max(1) as f64) as u64,
            deliveries: (latency.len() as f64 / run.interval_s) as u64,
            p50_ms: millis(latency, 0.5),
            p99_ms: millis(latency, 0.99),
            server_cpu_percent: sample.and_then(|sample| sample.server).map(|share| share * 100.0),
            own_cpu_percent: sample.map_or(0.0, |sample| sample.own * 100.0),
        }
    };
    // What trickles in after the schedule's end is no full interval.
    let full = ((run.seconds / run.interval_s) as usize).max(1);
    run.tally.intervals.iter().take(full).enumerate().map(second).collect()
}
