//! `slow`: some subscribers stall or trickle. What happens to them, and do the others notice?

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use clap::Args;
use mio::Registry;
use mio::event::Event;
use socket2::{Domain, Socket, Type};

use crate::options::{Crowd, Target, rate};
use crate::publisher::Pace;
use crate::report::Report;
use crate::summary::{curve_of, millis};
use crate::wire;
use crate::world::{Alone, Companion, World};

/// A small receive buffer, so that a stall shows at the server soon.
const RECEIVE_BYTES: usize = 8 << 10;

/// A trickling reader takes this much, and so often.
const TRICKLE_BYTES: usize = 512;
const TRICKLE_US: u64 = 100_000;

/// How long what waits may take to arrive when it is read out.
const READ_OUT: Duration = Duration::from_secs(3);

/// The largest close frame of a server (RFC 6455 §5.5).
const CLOSE_BYTES_MAX: usize = 127;

#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    crowd: Crowd,
    /// Subscribers that never read, of the first channel
    #[arg(long, default_value_t = 50)]
    stalled: u16,
    /// Subscribers that read 512 bytes ten times a second
    #[arg(long, default_value_t = 50)]
    trickling: u16,
    /// Publications a second
    #[arg(long, default_value_t = 500.0, value_parser = rate)]
    rate: f64,
    /// How long
    #[arg(long, default_value_t = 20.0, value_parser = rate)]
    seconds: f64,
}

struct Slow {
    readers: Vec<Reader>,
    trickle_us: u64,
}

struct Reader {
    socket: TcpStream,
    is_trickling: bool,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let title = "some subscribers stall or trickle: what happens to them, and what the others notice";
    let mut report = Report::new("slow", title, &options.target, &options.crowd);
    report.set("stalled, trickling", format!("{}, {}", options.stalled, options.trickling));
    report.set("schedule", format!("open loop, {} a second, {} s", options.rate, options.seconds));
    let mut world = World::connect(&options.target, &options.crowd)?;
    let pace = Pace::new(Some(options.rate), 0);
    let before = world.run(pace, (options.seconds / 4.0).max(1.0), &mut Alone)?;
    let mut slow = Slow::connect(options)?;
    let run = world.run(pace, options.seconds, &mut slow)?;
    report.add_run(&run, "with slow readers");
    let quiet = before.tally.latency_us();
    report.latency.push(curve_of("before they came", &quiet));
    report.figure("latency p99 before", millis(&quiet, 0.99), "ms");
    slow.report(&mut report)?;
    report.deliver(&options.target)
}

impl Slow {
    fn connect(options: &Options) -> anyhow::Result<Self> {
        anyhow::ensure!(!options.target.tls, "this command speaks no TLS");
        let mut readers = Vec::new();
        for at in 0..usize::from(options.stalled) + usize::from(options.trickling) {
            let socket = Socket::new(Domain::for_address(options.target.addr), Type::STREAM, None)?;
            socket.set_recv_buffer_size(RECEIVE_BYTES)?;
            socket.connect(&options.target.addr.into())?;
            let path = format!("/ws?channels={}", wire::channel(0));
            let token = options.target.token.as_deref();
            (&socket).write_all(&wire::upgrade(&options.target.addr.to_string(), &path, token))?;
            socket.set_nonblocking(true)?;
            readers.push(Reader { socket: socket.into(), is_trickling: at >= options.stalled.into() });
        }
        Ok(Self { readers, trickle_us: 0 })
    }

    /// Reads out what waits at the slow readers and says how it ends: with a close frame, cut off, or not at all.
    fn report(&mut self, report: &mut Report) -> anyhow::Result<()> {
        let mut ends = BTreeMap::new();
        let deadline = Instant::now() + READ_OUT;
        for reader in &mut self.readers {
            let kind = if reader.is_trickling { "trickling" } else { "stalled" };
            *ends.entry(format!("{kind} readers {}", reader.read_out(deadline)?)).or_insert(0) += 1;
        }
        for (end, count) in ends {
            report.figure(&end, f64::from(count), "");
        }
        Ok(())
    }
}

impl Companion for Slow {
    fn ready(&mut self, _: &Event, _: &Registry) -> anyhow::Result<bool> {
        Ok(false)
    }

    fn tick(&mut self, now_us: u64, _: &Registry) -> anyhow::Result<()> {
        if now_us >= self.trickle_us {
            self.trickle_us = now_us + TRICKLE_US;
            for reader in self.readers.iter_mut().filter(|reader| reader.is_trickling) {
                // How it ended is looked at afterwards.
                let _ = reader.socket.read(&mut [0; TRICKLE_BYTES]);
            }
        }
        Ok(())
    }
}

impl Reader {
    fn read_out(&mut self, deadline: Instant) -> anyhow::Result<String> {
        self.socket.set_nonblocking(false)?;
        let mut buffer = vec![0; 1 << 16];
        let mut last = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            self.socket.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            match self.socket.read(&mut buffer) {
                Ok(0) => break,
                Ok(len) => {
                    last.extend(&buffer[..len]);
                    last.drain(..last.len().saturating_sub(CLOSE_BYTES_MAX));
                }
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Ok("still connected".into());
                }
                Err(_) => break,
            }
        }
        // A close frame is the last thing there is: its length says where it begins.
        let begins = last.windows(2).position(|head| head[0] == 0x88 && usize::from(head[1]) >= 2);
        Ok(match begins.and_then(|at| wire::split_frame(&last[at..])) {
            Some((_, payload, [])) => format!("closed with {}", u16::from_be_bytes([payload[0], payload[1]])),
            _ => "cut off".into(),
        })
    }
}
