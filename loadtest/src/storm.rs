//! `storm`: all connections drop at once and come back, while a few witnesses go on listening.

use clap::Args;
use mio::Registry;
use mio::event::Event;

use crate::children::Children;
use crate::machine::now_us;
use crate::options::{Crowd, Target, rate};
use crate::publisher::Pace;
use crate::report::Report;
use crate::summary::millis;
use crate::swarm::Swarm;
use crate::world::{CHILD_TOKENS, COMPANION_TOKENS, Companion, World, check_files, plan};

/// When the storm begins, in seconds.
const CALM_S: f64 = 1.0;

#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    crowd: Crowd,
    /// Witnesses: subscribers that stay
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..))]
    witnesses: u16,
    /// Publications a second
    #[arg(long, default_value_t = 100.0, value_parser = rate)]
    rate: f64,
    /// How long to publish; the storm begins after one second
    #[arg(long, default_value_t = 10.0, value_parser = rate)]
    seconds: f64,
}

struct Storm {
    /// Those of this process, and those of others.
    swarm: Swarm,
    children: Children,
    begins_us: u64,
    broke_us: Option<u64>,
    back_us: Option<u64>,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let title = "everybody drops and comes back: how long it takes, and what the others notice";
    let mut report = Report::new("storm", title, &options.target, &options.crowd);
    report.set("witnesses", options.witnesses);
    report.set("schedule", format!("open loop, {} a second, {} s", options.rate, options.seconds));
    let witnesses = Crowd { subscribers: options.witnesses.into(), channels: 1, subscriptions: 1, ..options.crowd };
    check_files(&options.target, &options.crowd)?;
    let mut alone = options.target.clone();
    alone.processes = 1;
    let mut world = World::connect(&alone, &witnesses)?;
    let mut plans: Vec<_> = (0..options.target.processes).map(|at| plan(&options.target, &options.crowd, at)).collect();
    let mut storm = Storm {
        swarm: Swarm::new(plans.remove(0), COMPANION_TOKENS, 1_000_000),
        children: Children::start(plans, CHILD_TOKENS, world.registry())?,
        begins_us: u64::MAX,
        broke_us: None,
        back_us: None,
    };
    world.settle(&mut storm)?;
    storm.begins_us = now_us() + (CALM_S * 1e6) as u64;
    let run = world.run(Pace::new(Some(options.rate), 0), options.seconds, &mut storm)?;
    report.add_run(&run, "witnesses");
    let stall = run.tally.latency_us().max() as f64 / 1e3;
    report.figure("longest publish stall", stall, "ms");
    match storm.broke_us.zip(storm.back_us) {
        Some((broke, back)) => {
            let seconds = (back - broke) as f64 / 1e6;
            report.figure("last re-subscribe after", seconds * 1e3, "ms");
            let live = storm.swarm.live() + storm.children.live().unwrap_or(0);
            report.figure("re-subscribes", live as f64 / seconds, "/s");
        }
        None => report.notes.push("Not everybody was back when the run ended: give it more --seconds.".into()),
    }
    report.figure("connect and subscribe p50", millis(&storm.swarm.connect_us, 0.5), "ms");
    report.figure("connect and subscribe p99", millis(&storm.swarm.connect_us, 0.99), "ms");
    report.figure("told to come later", storm.swarm.sent_away as f64, "");
    if !storm.swarm.failures.is_empty() {
        let (count, first) = (storm.swarm.failures.len(), &storm.swarm.failures[0]);
        report.notes.push(format!("{count} connections failed to come back, the first: {first}"));
    }
    report.deliver(&options.target)
}

impl Companion for Storm {
    fn ready(&mut self, event: &Event, registry: &Registry) -> anyhow::Result<bool> {
        Ok(self.swarm.ready(event.token(), registry)? || self.children.ready(event.token())?)
    }

    fn tick(&mut self, now_us: u64, registry: &Registry) -> anyhow::Result<()> {
        if self.broke_us.is_none() && now_us >= self.begins_us {
            self.children.drop_all()?;
            self.swarm.drop_all();
            self.swarm.connect_us.reset();
            self.swarm.sent_away = 0;
            self.broke_us = Some(now_us);
        }
        self.swarm.connect_more(registry)?;
        if self.broke_us.is_some() && self.back_us.is_none() && self.is_settled() {
            self.back_us = Some(now_us);
        }
        Ok(())
    }

    fn is_settled(&self) -> bool {
        self.swarm.is_settled() && self.children.live().is_some()
    }
}
