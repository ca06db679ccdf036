//! `idle`: what connections cost that only wait.

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
    /// How long they wait
    #[arg(long, default_value_t = 10.0, value_parser = rate)]
    seconds: f64,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let title = "what connections cost that only wait";
    let mut report = Report::new("idle", title, &options.target, &options.crowd);
    report.set("duration", format!("{} s", options.seconds));
    let mut world = World::connect(&options.target, &options.crowd)?;
    report.add_connected(&world.connected);
    // A closed loop with nothing in flight publishes nothing.
    let run = world.run(Pace::new(None, 0), options.seconds, &mut Alone)?;
    if let Some(nanos) = run.server_nanos {
        report.figure("server CPU of a core while idle", nanos as f64 / 1e7 / run.seconds, "%");
    } else {
        report.notes.push("Without --server-pid neither memory nor CPU of the server is known.".into());
    }
    for (reason, count) in &run.tally.ended {
        report.notes.push(format!("{count} connections ended: {reason}"));
    }
    report.deliver(&options.target)
}
