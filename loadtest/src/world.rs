//! One run: subscribers, publishers and a schedule on one event loop, with the costs sampled beside it.

use std::time::Duration;

use anyhow::bail;
use indicatif::{ProgressBar, ProgressStyle};
use mio::event::Event;
use mio::{Events, Poll, Registry, Token};

use crate::alarm::Alarm;
use crate::children::{Children, wait};
use crate::machine::{cpu_nanos, now_us, raise_file_limit, rss_kib};
use crate::options::{Crowd, Target};
use crate::publisher::{Pace, Publishers};
use crate::swarm::{Plan, Swarm};
use crate::tally::Tally;

/// Tokens: subscribers from 0, then those of a companion, then the rest.
pub(crate) const COMPANION_TOKENS: usize = 1 << 24;
const PUBLISHER_TOKENS: usize = 1 << 25;
/// Of a companion's processes, where the world has none.
pub(crate) const CHILD_TOKENS: usize = 1 << 26;
const ALARM: Token = Token(usize::MAX);

/// A run ends when nothing has arrived for this long.
const PATIENCE_US: u64 = 5_000_000;

/// Above this share of a core a process of ours is busy.
const BUSY: f64 = 0.9;

/// Files that are not connections.
const FILES_RESERVED: u64 = 100;

/// What else happens while publications flow.
pub(crate) trait Companion {
    /// Takes an event of one of its sockets; false if it is none of its own.
    fn ready(&mut self, event: &Event, registry: &Registry) -> anyhow::Result<bool>;

    /// Does what is due; called at least every 10 ms.
    fn tick(&mut self, now_us: u64, registry: &Registry) -> anyhow::Result<()>;

    /// Whether it has nobody left to connect.
    fn is_settled(&self) -> bool {
        true
    }
}

/// Nothing else happens.
pub(crate) struct Alone;

impl Companion for Alone {
    fn ready(&mut self, _: &Event, _: &Registry) -> anyhow::Result<bool> {
        Ok(false)
    }

    fn tick(&mut self, _: u64, _: &Registry) -> anyhow::Result<()> {
        Ok(())
    }
}

/// The generator, connected.
pub(crate) struct World {
    pub poll: Poll,
    events: Events,
    swarm: Swarm,
    children: Children,
    publishers: Publishers,
    alarm: Alarm,
    server_pid: Option<u32>,
    is_quiet: bool,
    /// What connecting cost.
    pub connected: Connected,
}

/// What connecting cost.
#[derive(Debug, Default)]
pub(crate) struct Connected {
    pub connections: usize,
    pub seconds: f64,
    pub server_nanos: Option<u64>,
    pub server_kib: Option<u64>,
}

/// What one run found.
#[derive(Debug)]
pub(crate) struct Run {
    pub seconds: f64,
    pub interval_s: f64,
    pub publications: u64,
    pub tally: Tally,
    pub server_nanos: Option<u64>,
    /// Of one core, of the busiest of our processes and of all together.
    pub own_share_max: f64,
    pub own_nanos: u64,
    /// Costs per interval.
    pub samples: Vec<Sample>,
}

impl Run {
    /// Whether the generator may be what limited the run.
    pub(crate) fn is_generator_busy(&self) -> bool {
        self.own_share_max > BUSY
    }
}

/// CPU of one interval, in shares of a core.
#[derive(Debug)]
pub(crate) struct Sample {
    pub server: Option<f64>,
    pub own: f64,
}

/// Whether every process may open as many files as it needs.
pub(crate) fn check_files(target: &Target, crowd: &Crowd) -> anyhow::Result<()> {
    let files = raise_file_limit();
    let per_process = crowd.subscribers.div_ceil(target.processes) as u64 + target.publishers as u64;
    if per_process + FILES_RESERVED > files {
        bail!("{per_process} connections need more than the {files} files of one process: use --processes");
    }
    Ok(())
}

impl World {
    /// Connects everybody.
    pub(crate) fn connect(target: &Target, crowd: &Crowd) -> anyhow::Result<Self> {
        check_files(target, crowd)?;
        if crowd.channels > crowd.subscribers * crowd.subscriptions || crowd.subscriptions > crowd.channels {
            bail!("every channel needs a subscriber, and a subscriber different channels");
        }
        let poll = Poll::new()?;
        let mut plans: Vec<_> = (0..target.processes).map(|at| plan(target, crowd, at)).collect();
        let swarm = Swarm::new(plans.remove(0), 0, 1_000_000);
        let children = Children::start(plans, CHILD_TOKENS, poll.registry())?;
        let publishers = Publishers::connect(
            target.destination(),
            target.publishers,
            PUBLISHER_TOKENS,
            crowd.channels,
            crowd.payload,
            poll.registry(),
        )?;
        let alarm = Alarm::new(poll.registry(), ALARM)?;
        let mut world = Self {
            poll,
            events: Events::with_capacity(4096),
            swarm,
            children,
            publishers,
            alarm,
            server_pid: target.server_pid,
            is_quiet: target.quiet,
            connected: Connected::default(),
        };
        world.await_connections(crowd)?;
        Ok(world)
    }

    fn await_connections(&mut self, crowd: &Crowd) -> anyhow::Result<()> {
        let bar = self.bar("connecting", crowd.subscribers as u64);
        let (cpu, rss) = (self.server_nanos()?, self.server_pid.map(rss_kib).transpose()?);
        let started_us = now_us();
        let live = loop {
            self.swarm.connect_more(self.poll.registry())?;
            if self.swarm.is_settled()
                && self.publishers.is_ready()
                && let Some(elsewhere) = self.children.live()
            {
                break self.swarm.live() + elsewhere;
            }
            bar.set_position(self.swarm.live() as u64);
            self.poll_once(&mut Alone)?;
        };
        bar.finish_and_clear();
        if live < crowd.subscribers {
            let failure = self.swarm.failures.first().map_or("see above", String::as_str);
            bail!("only {live} of {} subscribers connected: {failure}", crowd.subscribers);
        }
        let seconds = (now_us() - started_us) as f64 / 1e6;
        let server_nanos = self.server_nanos()?.zip(cpu).map(|(after, before)| after - before);
        let rss_after = self.server_pid.map(rss_kib).transpose()?;
        let server_kib = rss_after.zip(rss).map(|(after, before)| after.saturating_sub(before));
        self.connected = Connected { connections: live, seconds, server_nanos, server_kib };
        Ok(())
    }

    /// Where a companion registers what it waits for.
    pub(crate) fn registry(&self) -> &Registry {
        self.poll.registry()
    }

    /// Waits until a companion has connected.
    pub(crate) fn settle(&mut self, companion: &mut dyn Companion) -> anyhow::Result<()> {
        companion.tick(now_us(), self.poll.registry())?;
        while !companion.is_settled() {
            self.poll_once(companion)?;
        }
        Ok(())
    }

    /// Publishes for a while and waits until everything has arrived.
    pub(crate) fn run(&mut self, pace: Pace, seconds: f64, companion: &mut dyn Companion) -> anyhow::Result<Run> {
        let receivers_min = self.children.receivers_min().unwrap_or(u32::MAX).min(self.swarm.receivers_min());
        if pace.rate.is_none() && receivers_min == 0 {
            bail!("a closed loop over several processes needs a subscriber of every channel in each");
        }
        let interval_us = (seconds * 1e6 / 120.0).max(1e6) as u64;
        self.swarm.begin(interval_us);
        self.children.begin(interval_us)?;
        // What arrives before a child has begun would be in no tally.
        while !self.children.have_begun() {
            self.poll_once(companion)?;
        }
        let bar = self.bar("publishing", (seconds * 1e3) as u64);
        let mut costs = Costs::start(self)?;
        let published_before = self.publishers.published();
        let started_us = now_us();
        let ended_us = self.publish(pace.start(), seconds, companion, |world, now_us| {
            bar.set_position((now_us - started_us) / 1_000);
            costs.sample(world, now_us, interval_us)
        })?;
        costs.finish(self, interval_us)?;
        let elapsed = (ended_us - started_us) as f64 / 1e6;
        bar.finish_and_clear();
        Ok(Run {
            seconds: elapsed,
            interval_s: interval_us as f64 / 1e6,
            publications: self.publishers.published() - published_before,
            tally: self.collect(companion)?,
            server_nanos: costs.spent_server,
            own_share_max: costs.spent_own.iter().max().map_or(0.0, |nanos| *nanos as f64 / 1e9 / elapsed),
            own_nanos: costs.spent_own.iter().sum(),
            samples: costs.samples,
        })
    }

    /// Returns when the last publication had arrived.
    fn publish(
        &mut self,
        mut pace: Pace,
        seconds: f64,
        companion: &mut dyn Companion,
        mut each_turn: impl FnMut(&Self, u64) -> anyhow::Result<()>,
    ) -> anyhow::Result<u64> {
        let end_us = now_us() + (seconds * 1e6) as u64;
        let (mut completed, mut progress_us) = (0, now_us());
        loop {
            let now = now_us();
            let published = self.publishers.published();
            if self.completed() > completed {
                completed = self.completed();
                progress_us = now;
            }
            if now >= end_us && completed >= published || now >= progress_us.max(end_us) + PATIENCE_US {
                return Ok(progress_us.max(end_us));
            }
            while let Some(due_us) = pace.due_us(self.publishers.published() - completed, now)
                && due_us <= now.min(end_us)
                && now < end_us
            {
                self.publishers.publish(due_us);
                pace.sent();
            }
            let is_left = self.publishers.flush()?;
            match pace.due_us(self.publishers.published() - completed, now) {
                _ if is_left => self.alarm.set(now + 200)?,
                Some(due_us) if now < end_us => self.alarm.set(due_us.max(now + 1))?,
                _ => self.alarm.set(now + 10_000)?,
            }
            self.poll_once(companion)?;
            each_turn(self, now)?;
        }
    }

    fn poll_once(&mut self, companion: &mut dyn Companion) -> anyhow::Result<()> {
        wait(&mut self.poll, &mut self.events, Some(Duration::from_millis(10)))?;
        let registry = self.poll.registry();
        for event in &self.events {
            let token = event.token();
            let _ = self.swarm.ready(token, registry)?
                || self.publishers.ready(token)?
                || self.children.ready(token)?
                || companion.ready(event, registry)?;
        }
        companion.tick(now_us(), registry)
    }

    /// How many publications have reached everybody.
    fn completed(&self) -> u64 {
        self.children.completed().unwrap_or(u64::MAX).min(self.swarm.completed())
    }

    fn collect(&mut self, companion: &mut dyn Companion) -> anyhow::Result<Tally> {
        let published = self.publishers.published();
        self.swarm.finish(published);
        self.children.finish(published)?;
        let results = loop {
            if let Some(results) = self.children.results() {
                break results;
            }
            self.poll_once(companion)?;
        };
        let mut tally = std::mem::replace(&mut self.swarm.tally, Tally::new(0, 1));
        results.into_iter().for_each(|told| tally.add(told));
        Ok(tally)
    }

    fn server_nanos(&self) -> anyhow::Result<Option<u64>> {
        self.server_pid.map(cpu_nanos).transpose()
    }

    fn bar(&self, what: &'static str, len: u64) -> ProgressBar {
        if self.is_quiet {
            return ProgressBar::hidden();
        }
        let style = ProgressStyle::with_template("{msg:11} {wide_bar} {percent:>3} % {elapsed_precise}");
        ProgressBar::new(len).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())).with_message(what)
    }
}

/// What subscriber process number `process` connects.
pub(crate) fn plan(target: &Target, crowd: &Crowd, process: usize) -> Plan {
    Plan {
        addr: target.addr,
        is_tls: target.tls,
        token: target.token.clone(),
        sources: target.sources.clone(),
        first: process,
        connections: (crowd.subscribers + target.processes - 1 - process) / target.processes,
        stride: target.processes,
        channels: crowd.channels,
        subscriptions: crowd.subscriptions,
        connecting_max: target.connecting,
        is_ordered: target.publishers == 1,
    }
}

/// CPU of the server and of our processes, from a start on.
struct Costs {
    pids: Vec<u32>,
    server: Option<u64>,
    own: Vec<u64>,
    spent_server: Option<u64>,
    spent_own: Vec<u64>,
    last: (u64, Option<u64>, u64),
    samples: Vec<Sample>,
}

impl Costs {
    fn start(world: &World) -> anyhow::Result<Self> {
        let mut pids = vec![std::process::id()];
        pids.extend(world.children.pids());
        let own = pids.iter().map(|pid| cpu_nanos(*pid)).collect::<anyhow::Result<Vec<_>>>()?;
        let server = world.server_nanos()?;
        let last = (now_us(), server, own.iter().sum());
        Ok(Self { pids, server, spent_server: None, spent_own: vec![0; own.len()], own, last, samples: Vec::new() })
    }

    /// Takes a sample if an interval is over.
    fn sample(&mut self, world: &World, now_us: u64, interval_us: u64) -> anyhow::Result<()> {
        let (at_us, server, own) = self.last;
        if now_us < at_us + interval_us {
            return Ok(());
        }
        let elapsed = (now_us - at_us) as f64 * 1e3;
        let now_server = world.server_nanos()?;
        let mut now_own = 0;
        for pid in &self.pids {
            now_own += cpu_nanos(*pid)?;
        }
        self.samples.push(Sample {
            server: now_server.zip(server).map(|(after, before)| (after - before) as f64 / elapsed),
            own: (now_own - own) as f64 / elapsed,
        });
        self.last = (now_us, now_server, now_own);
        Ok(())
    }

    fn finish(&mut self, world: &World, interval_us: u64) -> anyhow::Result<()> {
        // The last interval may have ended a little early.
        self.sample(world, now_us(), interval_us / 2)?;
        self.spent_server = world.server_nanos()?.zip(self.server).map(|(after, before)| after - before);
        for (at, pid) in self.pids.iter().enumerate() {
            self.spent_own[at] = cpu_nanos(*pid)? - self.own[at];
        }
        Ok(())
    }
}
