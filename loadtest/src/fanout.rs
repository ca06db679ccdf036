//! `fanout`: N subscribers of one channel, one publisher, every delivery checked.
//!
//! Open loop (`--rate`): the schedule is fixed beforehand and latency counts from the scheduled
//! time, so a server that is late cannot hide it. Closed loop (`--window`): that many publications
//! are in flight; the next one leaves when one has reached everybody.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Args;
use hdrhistogram::Histogram;
use mio::{Events, Interest, Poll, Token};

use crate::{cpu, wire};

const READ_BYTES: usize = 1 << 20;

#[derive(Args)]
pub(crate) struct Options {
    /// The gateway's public listener
    #[arg(long, default_value = "127.0.0.1:8080")]
    addr: SocketAddr,
    /// How many subscribers
    #[arg(long, default_value_t = 1000)]
    subscribers: usize,
    /// Bytes of JSON in each publication, at least 30
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(30..=60_000))]
    payload: u32,
    /// Open loop: publications a second
    #[arg(long, conflicts_with = "window")]
    rate: Option<f64>,
    /// Closed loop: publications in flight
    #[arg(long)]
    window: Option<u64>,
    /// How long to publish
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// The server's process, to report its CPU time and memory
    #[arg(long)]
    server_pid: Option<u32>,
}

struct Subscriber {
    socket: mio::net::TcpStream,
    /// Bytes of a frame that is not complete yet.
    tail: Vec<u8>,
    /// The sequence number that comes next.
    next: u64,
}

/// One publication in flight.
struct Flight {
    /// When it was due (open loop) or sent (closed loop).
    due: Instant,
    missing: usize,
}

struct Run {
    subscribers: Vec<Subscriber>,
    publisher: TcpStream,
    /// Publish commands that the socket did not take yet.
    unsent: Vec<u8>,
    payload: usize,
    /// Flights by sequence number; those before `first` have reached everybody.
    flights: std::collections::VecDeque<Flight>,
    first: u64,
    latency_us: Histogram<u64>,
    deliveries: u64,
    lost: u64,
    buffer: Vec<u8>,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let rss_before = options.server_pid.map(cpu::rss_kib).transpose()?;
    let started = Instant::now();
    let mut poll = Poll::new()?;
    let mut run = Run::connect(options, &poll)?;
    println!("connected {} subscribers in {:.2?}", options.subscribers, started.elapsed());
    if let (Some(pid), Some(before)) = (options.server_pid, rss_before) {
        let grown = cpu::rss_kib(pid)?.saturating_sub(before) as f64;
        println!("server memory   {:.2} KiB a connection", grown / options.subscribers as f64);
    }
    let cpu_before = options.server_pid.map(cpu::nanos).transpose()?;
    let own_before = cpu::nanos(std::process::id())?;
    let started = Instant::now();
    run.publish_and_receive(options, &mut poll)?;
    let elapsed = started.elapsed();
    let own = cpu::nanos(std::process::id())? - own_before;
    run.report(elapsed, own);
    if let (Some(pid), Some(before)) = (options.server_pid, cpu_before) {
        let spent = cpu::nanos(pid)? - before;
        println!("server CPU      {:.3} us a delivery", spent as f64 / 1e3 / run.deliveries.max(1) as f64);
    }
    if run.lost > 0 {
        bail!("{} deliveries were lost or out of order", run.lost);
    }
    Ok(())
}

impl Run {
    fn connect(options: &Options, poll: &Poll) -> anyhow::Result<Self> {
        let path = format!("/ws?channels={}", wire::CHANNEL);
        let mut subscribers = Vec::with_capacity(options.subscribers);
        for index in 0..options.subscribers {
            let socket =
                wire::connect(options.addr, &path, "\"subscribed\"").with_context(|| format!("subscriber {index}"))?;
            let mut socket = mio::net::TcpStream::from_std(socket);
            poll.registry().register(&mut socket, Token(index), Interest::READABLE)?;
            subscribers.push(Subscriber { socket, tail: Vec::new(), next: 0 });
        }
        Ok(Self {
            subscribers,
            publisher: wire::connect(options.addr, "/ws", "\"welcome\"").context("publisher")?,
            unsent: Vec::new(),
            payload: options.payload as usize,
            flights: std::collections::VecDeque::new(),
            first: 0,
            latency_us: Histogram::new(3)?,
            deliveries: 0,
            lost: 0,
            buffer: vec![0; READ_BYTES],
        })
    }

    fn publish_and_receive(&mut self, options: &Options, poll: &mut Poll) -> anyhow::Result<()> {
        let mut events = Events::with_capacity(4096);
        let started = Instant::now();
        let end = started + Duration::from_secs_f64(options.seconds);
        let interval = options.rate.map(|rate| Duration::from_secs_f64(1.0 / rate));
        let mut due = started;
        let mut last_progress = Instant::now();
        loop {
            let now = Instant::now();
            if now < end {
                match interval {
                    Some(interval) => {
                        while due <= now {
                            self.publish(due);
                            due += interval;
                        }
                    }
                    None => {
                        while (self.flights.len() as u64) < options.window.unwrap_or(1) {
                            self.publish(now);
                        }
                    }
                }
            } else if self.flights.is_empty() {
                return Ok(());
            } else if now > last_progress + Duration::from_secs(5) {
                self.lost += self.flights.iter().map(|flight| flight.missing as u64).sum::<u64>();
                return Ok(());
            }
            self.flush()?;
            let wait = if interval.is_some() && now < end {
                due.saturating_duration_since(now)
            } else {
                Duration::from_millis(100)
            };
            let wait = if self.unsent.is_empty() { wait } else { wait.min(Duration::from_millis(1)) };
            poll.poll(&mut events, Some(wait))?;
            for event in &events {
                self.receive(event.token().0)?;
                last_progress = now;
            }
        }
    }

    fn publish(&mut self, due: Instant) {
        let sequence = self.first + self.flights.len() as u64;
        self.unsent.extend(wire::publish(sequence, self.payload));
        self.flights.push_back(Flight { due, missing: self.subscribers.len() });
    }

    fn flush(&mut self) -> anyhow::Result<()> {
        while !self.unsent.is_empty() {
            match self.publisher.write(&self.unsent) {
                Ok(len) => drop(self.unsent.drain(..len)),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error).context("the publisher's connection"),
            }
        }
        match self.publisher.read(&mut self.buffer) {
            Ok(0) => bail!("the publisher's connection ended"),
            Ok(len) if self.buffer[..len].windows(7).any(|window| window == b"\"error\"") => {
                bail!("the server refuses: {}", String::from_utf8_lossy(&self.buffer[..len]))
            }
            // Pings: a run is shorter than any pong timeout.
            _ => Ok(()),
        }
    }

    fn receive(&mut self, index: usize) -> anyhow::Result<()> {
        loop {
            let subscriber = &mut self.subscribers[index];
            let kept = subscriber.tail.len();
            self.buffer[..kept].copy_from_slice(&subscriber.tail);
            let len = match subscriber.socket.read(&mut self.buffer[kept..]) {
                Ok(0) => bail!("subscriber {index} was disconnected"),
                Ok(len) => len,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error).with_context(|| format!("subscriber {index}")),
            };
            let now = Instant::now();
            let mut rest = &self.buffer[..kept + len];
            while let Some((first, payload, after)) = wire::split_frame(rest) {
                rest = after;
                if first == 0x88 {
                    bail!(
                        "subscriber {index} was closed: {}",
                        String::from_utf8_lossy(payload.get(2..).unwrap_or_default())
                    );
                }
                let Some(sequence) = wire::sequence(payload) else { continue };
                self.lost += sequence.abs_diff(subscriber.next);
                subscriber.next = sequence + 1;
                self.deliveries += 1;
                if let Some(flight) = sequence.checked_sub(self.first).and_then(|at| self.flights.get_mut(at as usize))
                {
                    flight.missing -= 1;
                    self.latency_us.record(now.duration_since(flight.due).as_micros() as u64)?;
                }
            }
            subscriber.tail.clear();
            subscriber.tail.extend(rest);
            while self.flights.front().is_some_and(|flight| flight.missing == 0) {
                self.flights.pop_front();
                self.first += 1;
            }
            if len < READ_BYTES - kept {
                return Ok(());
            }
        }
    }

    fn report(&self, elapsed: Duration, own_nanos: u64) {
        let seconds = elapsed.as_secs_f64();
        println!("publications    {} in {seconds:.2} s", self.first);
        println!("deliveries      {} ({:.0}/s), {} lost", self.deliveries, self.deliveries as f64 / seconds, self.lost);
        let quantile = |q| self.latency_us.value_at_quantile(q) as f64 / 1e3;
        println!(
            "latency         p50 {:.3} ms, p99 {:.3} ms, max {:.3} ms",
            quantile(0.5),
            quantile(0.99),
            quantile(1.0)
        );
        let share = own_nanos as f64 / elapsed.as_nanos() as f64;
        println!(
            "own CPU         {:.3} us a delivery, {:.0} % of a core",
            own_nanos as f64 / 1e3 / self.deliveries.max(1) as f64,
            share * 100.0
        );
        if share > 0.95 {
            println!("note: the generator was busy all the time; it may be what limited the rate");
        }
    }
}
