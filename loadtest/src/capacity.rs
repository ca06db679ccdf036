//! `capacity`: raises the rate until latency, loss or throughput breaks, and names the knee.

use clap::Args;

use crate::options::{Crowd, Target, rate};
use crate::publisher::Pace;
use crate::report::{Report, Step};
use crate::summary::millis;
use crate::world::{Alone, Run, World};

/// A server that delivers less than this share of what was offered has had enough.
const SHARE_MIN: f64 = 0.95;

/// Between the highest rate that held and the lowest that broke, at most this factor remains.
const PRECISION: f64 = 1.08;

#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    crowd: Crowd,
    /// Publications a second to begin with
    #[arg(long, default_value_t = 10.0, value_parser = rate)]
    from: f64,
    /// The worst p99 that is still good, in milliseconds
    #[arg(long, default_value_t = 50.0, value_parser = rate)]
    p99: f64,
    /// How long each rate is tried
    #[arg(long, default_value_t = 4.0, value_parser = rate)]
    seconds: f64,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let title = format!("the highest rate with p99 at most {} ms and nothing lost", options.p99);
    let mut report = Report::new("capacity", &title, &options.target, &options.crowd);
    report.set("each rate", format!("{} s", options.seconds));
    let mut world = World::connect(&options.target, &options.crowd)?;
    let mut held: Option<(f64, Run)> = None;
    let mut broken: Option<(f64, Run)> = None;
    let mut offered = options.from;
    loop {
        let run = world.run(Pace::new(Some(offered), 0), options.seconds, &mut Alone)?;
        let step = step(options, offered, &run);
        let is_held = step.held;
        report.capacity.push(step);
        if is_held {
            held = Some((offered, run));
        } else {
            broken = Some((offered, run));
        }
        offered = match (&held, &broken) {
            (Some((held, _)), Some((broken, _))) if broken / held <= PRECISION => break,
            (Some((held, _)), Some((broken, _))) => (held * broken).sqrt(),
            (Some((held, _)), None) => held * 2.0,
            (None, Some((broken, _))) if *broken < 0.1 => break,
            (None, _) => offered / 4.0,
        };
    }
    report.capacity.sort_by(|one, other| one.offered.total_cmp(&other.offered));
    match &held {
        Some((offered, run)) => {
            report.figure("knee, publications", *offered, "/s");
            report.add_run(run, "at the knee");
        }
        None => report.notes.push("No rate held.".into()),
    }
    report.add_connected(&world.connected);
    if broken.is_some_and(|(_, run)| run.is_generator_busy()) {
        report
            .notes
            .push("Beyond the knee the generator itself was busy: the server may do more (try --processes).".into());
    }
    report.deliver(&options.target)
}

fn step(options: &Options, offered: f64, run: &Run) -> Step {
    let latency = run.tally.latency_us();
    let lost = run.tally.lost + run.tally.repeated;
    let p99_ms = millis(&latency, 0.99);
    // What is late at the end stretches the run.
    let share = options.seconds / run.seconds;
    Step {
        offered,
        deliveries_per_second: run.tally.deliveries as f64 / run.seconds,
        p50_ms: millis(&latency, 0.5),
        p99_ms,
        lost,
        server_cpu_percent: run.server_nanos.map(|nanos| nanos as f64 / 1e7 / run.seconds),
        own_cpu_percent: run.own_share_max * 100.0,
        held: lost == 0 && p99_ms <= options.p99 && share >= SHARE_MIN,
    }
}
