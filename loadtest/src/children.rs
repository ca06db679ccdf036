//! More processes of this program, each with a share of the subscribers: past one core and one file limit.
//!
//! Parent and child speak JSON lines over the child's standard input and output.

use std::io::{BufRead as _, ErrorKind, Read as _, Write as _};
use std::process::{Child as Process, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use anyhow::{Context as _, bail};
use mio::unix::pipe;
use mio::{Events, Interest, Poll, Registry, Token, Waker};
use serde::{Deserialize, Serialize};

use crate::swarm::{Plan, Swarm};
use crate::tally::Told;

/// The subcommand that a child is started with.
pub(crate) const SUBCOMMAND: &str = "subscriber-process";

const WAKER: Token = Token(usize::MAX);

#[derive(Serialize, Deserialize)]
enum Order {
    Connect(Plan),
    Begin {
        interval_us: u64,
    },
    /// Drop all connections and come back.
    DropAll,
    Finish {
        published: u64,
    },
}

#[derive(Serialize, Deserialize)]
enum Answer {
    /// How many are live, and the fewest receivers of a channel.
    Connected {
        live: usize,
        receivers_min: u32,
    },
    /// The new tally counts from here on.
    Begun,
    /// Publications that reached everybody.
    Done(u64),
    Result(Told),
}

/// The children of this process.
pub(crate) struct Children {
    children: Vec<Child>,
    token_base: usize,
}

struct Child {
    process: Process,
    input: ChildStdin,
    output: pipe::Receiver,
    line: Vec<u8>,
    live: Option<usize>,
    receivers_min: u32,
    has_begun: bool,
    done: u64,
    result: Option<Told>,
}

impl Children {
    /// Starts one child for each plan.
    pub(crate) fn start(plans: Vec<Plan>, token_base: usize, registry: &Registry) -> anyhow::Result<Self> {
        let mut children = Vec::with_capacity(plans.len());
        for (at, plan) in plans.into_iter().enumerate() {
            let mut process = Command::new(std::env::current_exe()?)
                .arg(SUBCOMMAND)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()?;
            let input = process.stdin.take().context("no input")?;
            let mut output = pipe::Receiver::from(process.stdout.take().context("no output")?);
            output.set_nonblocking(true)?;
            registry.register(&mut output, Token(token_base + at), Interest::READABLE)?;
            let line = Vec::new();
            let mut child = Child {
                process,
                input,
                output,
                line,
                live: None,
                receivers_min: 0,
                has_begun: false,
                done: 0,
                result: None,
            };
            child.order(&Order::Connect(plan))?;
            children.push(child);
        }
        Ok(Self { children, token_base })
    }

    /// Their process ids.
    pub(crate) fn pids(&self) -> Vec<u32> {
        self.children.iter().map(|child| child.process.id()).collect()
    }

    /// How many of their subscribers are live; none while some are on the way.
    pub(crate) fn live(&self) -> Option<usize> {
        self.children.iter().map(|child| child.live).sum::<Option<usize>>()
    }

    /// Receivers in the process that has fewest, of the channel that has fewest there.
    pub(crate) fn receivers_min(&self) -> Option<u32> {
        self.children.iter().map(|child| child.receivers_min).min()
    }

    /// How many publications have reached everybody.
    pub(crate) fn completed(&self) -> Option<u64> {
        self.children.iter().map(|child| child.done).min()
    }

    /// Has all connections drop and come back.
    pub(crate) fn drop_all(&mut self) -> anyhow::Result<()> {
        self.children.iter_mut().try_for_each(|child| {
            child.live = None;
            child.order(&Order::DropAll)
        })
    }

    /// Starts new tallies.
    pub(crate) fn begin(&mut self, interval_us: u64) -> anyhow::Result<()> {
        self.children.iter_mut().try_for_each(|child| {
            child.has_begun = false;
            child.order(&Order::Begin { interval_us })
        })
    }

    /// Whether all of them count into the new tallies.
    pub(crate) fn have_begun(&self) -> bool {
        self.children.iter().all(|child| child.has_begun)
    }

    /// Asks for the tallies after `published` publications.
    pub(crate) fn finish(&mut self, published: u64) -> anyhow::Result<()> {
        self.children.iter_mut().try_for_each(|child| child.order(&Order::Finish { published }))
    }

    /// Their tallies, once all are there.
    pub(crate) fn results(&mut self) -> Option<Vec<Told>> {
        if self.children.iter().any(|child| child.result.is_none()) {
            return None;
        }
        Some(self.children.iter_mut().filter_map(|child| child.result.take()).collect())
    }

    /// Reads what the child of `token` says; false if the token belongs to somebody else.
    pub(crate) fn ready(&mut self, token: Token) -> anyhow::Result<bool> {
        let at = token.0.checked_sub(self.token_base).filter(|at| *at < self.children.len());
        let Some(child) = at.map(|at| &mut self.children[at]) else { return Ok(false) };
        let mut buffer = [0; 1 << 16];
        loop {
            match child.output.read(&mut buffer) {
                Ok(0) => bail!("a subscriber process ended: {}", child.process.wait()?),
                Ok(len) => child.line.extend(&buffer[..len]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                Err(error) => return Err(error.into()),
            }
            while let Some(end) = child.line.iter().position(|byte| *byte == b'\n') {
                let answer = serde_json::from_slice(&child.line[..end])?;
                child.line.drain(..=end);
                match answer {
                    Answer::Connected { live, receivers_min } => {
                        child.live = Some(live);
                        child.receivers_min = receivers_min;
                    }
                    Answer::Begun => child.has_begun = true,
                    Answer::Done(done) => child.done = done,
                    Answer::Result(told) => child.result = Some(told),
                }
            }
        }
    }
}

impl Child {
    fn order(&mut self, order: &Order) -> anyhow::Result<()> {
        let mut line = serde_json::to_vec(order)?;
        line.push(b'\n');
        self.input.write_all(&line).context("a subscriber process is gone")
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        for child in &mut self.children {
            // It may have ended by itself.
            let _ = child.process.kill();
            let _ = child.process.wait();
        }
    }
}

/// What a child does until its parent is gone.
pub(crate) fn run() -> anyhow::Result<()> {
    let mut poll = Poll::new()?;
    let orders = read_orders(Waker::new(poll.registry(), WAKER)?);
    let Ok(Order::Connect(plan)) = orders.recv() else { bail!("{SUBCOMMAND} is started by this program itself") };
    let mut swarm = Swarm::new(plan, 0, 1_000_000);
    let mut events = Events::with_capacity(4096);
    let (mut is_connected, mut done) = (false, 0);
    loop {
        loop {
            match orders.try_recv() {
                Ok(Order::Connect(_)) => {}
                Ok(Order::Begin { interval_us }) => {
                    swarm.begin(interval_us);
                    answer(&Answer::Begun)?;
                }
                Ok(Order::DropAll) => {
                    swarm.drop_all();
                    is_connected = false;
                }
                Ok(Order::Finish { published }) => {
                    swarm.finish(published);
                    done = published;
                    answer(&Answer::Done(done))?;
                    answer(&Answer::Result(swarm.tally.tell()))?;
                }
                Err(std::sync::mpsc::TryRecvError::Empty) => break,
                Err(std::sync::mpsc::TryRecvError::Disconnected) => return Ok(()),
            }
        }
        swarm.connect_more(poll.registry())?;
        if !is_connected && swarm.is_settled() {
            is_connected = true;
            if let Some(failure) = swarm.failures.first() {
                eprintln!("{} connections failed, the first: {failure}", swarm.failures.len());
            }
            answer(&Answer::Connected { live: swarm.live(), receivers_min: swarm.receivers_min() })?;
        }
        if swarm.completed() > done {
            done = swarm.completed();
            answer(&Answer::Done(done))?;
        }
        wait(&mut poll, &mut events, None)?;
        for event in &events {
            swarm.ready(event.token(), poll.registry())?;
        }
    }
}

fn read_orders(waker: Waker) -> Receiver<Order> {
    let (sender, orders) = sync_channel(16);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            let Some(order) = line.ok().and_then(|line| serde_json::from_str(&line).ok()) else { break };
            if sender.send(order).is_err() || waker.wake().is_err() {
                return;
            }
        }
        drop(sender);
        // The parent is gone: the loop looks and ends.
        let _ = waker.wake();
    });
    orders
}

fn answer(answer: &Answer) -> anyhow::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    let mut output = std::io::stdout().lock();
    output.write_all(&line)?;
    Ok(output.flush()?)
}

/// Polls; a signal is no error.
pub(crate) fn wait(poll: &mut Poll, events: &mut Events, timeout: Option<Duration>) -> std::io::Result<()> {
    match poll.poll(events, timeout) {
        Err(error) if error.kind() == ErrorKind::Interrupted => Ok(()),
        done => done,
    }
}
