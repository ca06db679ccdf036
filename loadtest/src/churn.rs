//! `churn`: connections that subscribe and unsubscribe as fast as they are answered, under load.

use std::io::{ErrorKind, Read as _, Write as _};

use anyhow::{Context as _, bail};
use clap::Args;
use mio::event::Event;
use mio::{Interest, Registry, Token};

use crate::options::{Crowd, Target, rate};
use crate::publisher::Pace;
use crate::report::Report;
use crate::stream::Stream;
use crate::wire;
use crate::world::{COMPANION_TOKENS, Companion, World};

#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    crowd: Crowd,
    /// Connections that subscribe and unsubscribe
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..))]
    churners: u16,
    /// Channels that each of them joins and leaves in turn
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..))]
    churned: u16,
    /// Let them churn the publications' own channels, not others
    #[arg(long)]
    same_channels: bool,
    /// Publications a second
    #[arg(long, default_value_t = 100.0, value_parser = rate)]
    rate: f64,
    /// How long
    #[arg(long, default_value_t = 10.0, value_parser = rate)]
    seconds: f64,
}

/// All churners.
struct Churn {
    churners: Vec<Churner>,
    answered: u64,
    buffer: Vec<u8>,
}

/// One connection with one pair of commands under way.
struct Churner {
    socket: Stream,
    input: Vec<u8>,
    unsent: Vec<u8>,
    is_upgraded: bool,
    /// One frame with both commands for each channel.
    commands: Vec<Vec<u8>>,
    next: usize,
    unanswered: usize,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let title = "subscribes and unsubscribes under load, and what the others notice";
    let mut report = Report::new("churn", title, &options.target, &options.crowd);
    report.set("churners", format!("{} over {} channels each", options.churners, options.churned));
    report.set("schedule", format!("open loop, {} a second, {} s", options.rate, options.seconds));
    let mut world = World::connect(&options.target, &options.crowd)?;
    let mut churn = Churn::connect(options, world.poll.registry())?;
    let run = world.run(Pace::new(Some(options.rate), 0), options.seconds, &mut churn)?;
    report.figure("subscribes and unsubscribes", churn.answered as f64 / run.seconds, "/s");
    report.add_run(&run, "subscribers that stay");
    report.deliver(&options.target)
}

impl Churn {
    fn connect(options: &Options, registry: &Registry) -> anyhow::Result<Self> {
        let mut churners = Vec::new();
        for at in 0..usize::from(options.churners) {
            let addr = options.target.addr;
            let request = wire::upgrade(&addr.to_string(), "/ws", options.target.token.as_deref());
            let mut socket = Stream::open(addr, &request, options.target.tls)?;
            let token = Token(COMPANION_TOKENS + at);
            registry.register(&mut socket.tcp, token, Interest::READABLE | Interest::WRITABLE)?;
            let commands = (0..options.churned).map(|number| {
                let name = match options.same_channels {
                    true => wire::channel(usize::from(number) % options.crowd.channels),
                    false => format!("churn-{at}-{number}"),
                };
                let command = |kind| format!(r#"{{"type":"{kind}","channel":"{name}"}}"#);
                let both = format!("[{},{}]", command("subscribe"), command("unsubscribe"));
                wire::frame(both.as_bytes(), true)
            });
            churners.push(Churner {
                socket,
                input: Vec::new(),
                unsent: Vec::new(),
                is_upgraded: false,
                commands: commands.collect(),
                next: 0,
                unanswered: 0,
            });
        }
        Ok(Self { churners, answered: 0, buffer: vec![0; 1 << 16] })
    }
}

impl Companion for Churn {
    fn ready(&mut self, event: &Event, _: &Registry) -> anyhow::Result<bool> {
        let at = event.token().0.checked_sub(COMPANION_TOKENS).filter(|at| *at < self.churners.len());
        let Some(churner) = at.map(|at| &mut self.churners[at]) else { return Ok(false) };
        self.answered += churner.receive(&mut self.buffer)?;
        churner.send()?;
        Ok(true)
    }

    fn tick(&mut self, _: u64, _: &Registry) -> anyhow::Result<()> {
        Ok(())
    }
}

impl Churner {
    /// Reads what is there; returns how many answers that were.
    fn receive(&mut self, buffer: &mut [u8]) -> anyhow::Result<u64> {
        loop {
            match self.socket.read(buffer) {
                Ok(0) => bail!("a churning connection was closed"),
                Ok(len) => self.input.extend(&buffer[..len]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error).context("a churning connection"),
            }
        }
        let mut rest = self.input.as_slice();
        if !self.is_upgraded {
            let Some((status, head, frames)) = wire::split_head(rest) else { return Ok(0) };
            if status != 101 {
                bail!("a churning connection was refused: {}", String::from_utf8_lossy(head));
            }
            self.is_upgraded = true;
            rest = frames;
        }
        let mut answers = 0;
        while let Some((first, payload, after)) = wire::split_frame(rest) {
            rest = after;
            if first == 0x88 || payload.starts_with(br#"{"type":"error""#) {
                bail!("the server refuses: {}", String::from_utf8_lossy(payload));
            }
            let is_answer = [&br#"{"type":"subscribed""#[..], br#"{"type":"unsubscribed""#];
            answers += usize::from(is_answer.iter().any(|head| payload.starts_with(head)));
        }
        let used = self.input.len() - rest.len();
        self.input.drain(..used);
        self.unanswered -= answers;
        Ok(answers as u64)
    }

    /// Sends the next pair of commands once the last is answered.
    fn send(&mut self) -> anyhow::Result<()> {
        if self.is_upgraded && self.unanswered == 0 && self.unsent.is_empty() {
            self.unsent.extend(&self.commands[self.next]);
            self.next = (self.next + 1) % self.commands.len();
            self.unanswered = 2;
        }
        while !self.unsent.is_empty() {
            match self.socket.write(&self.unsent) {
                Ok(len) => drop(self.unsent.drain(..len)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error).context("a churning connection"),
            }
        }
        Ok(())
    }
}
