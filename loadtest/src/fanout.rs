//! `fanout`: subscribers, publications, and every delivery checked.
//!
//! Open loop (the default, `--rate`): the schedule is fixed beforehand and latency counts from the
//! scheduled time, so a server that is late cannot hide it. Closed loop (`--window`): that many
//! publications are in flight; the next one leaves when one has reached everybody.

use clap::Args;

use crate::options::{Crowd, Target, rate};
use crate::publisher::Pace;
use crate::report::Report;
use crate::world::{Alone, World};

#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    crowd: Crowd,
    /// Open loop: publications a second
    #[arg(long, default_value_t = 10.0, conflicts_with = "window", value_parser = rate)]
    rate: f64,
    /// Closed loop instead: publications in flight
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    window: Option<u64>,
    /// How long to publish
    #[arg(long, default_value_t = 10.0, value_parser = rate)]
    seconds: f64,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let title = "how fast publications reach every subscriber";
    let mut report = Report::new("fanout", title, &options.target, &options.crowd);
    let pace = match options.window {
        Some(window) => {
            report.set("schedule", format!("closed loop, {window} in flight"));
            Pace::new(None, window)
        }
        None => {
            report.set("schedule", format!("open loop, {} a second", options.rate));
            Pace::new(Some(options.rate), 0)
        }
    };
    report.set("duration", format!("{} s", options.seconds));
    let mut world = World::connect(&options.target, &options.crowd)?;
    let run = world.run(pace, options.seconds, &mut Alone)?;
    report.add_run(&run, "all deliveries");
    report.add_connected(&world.connected);
    report.deliver(&options.target)
}
