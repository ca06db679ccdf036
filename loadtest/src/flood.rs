//! `flood`: somebody sends far too much of something. What becomes of him, and do the others notice?

#![expect(clippy::disallowed_methods, reason = "each flooder sleeps on a thread of its own")]

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use clap::{Args, ValueEnum};
use socket2::{Domain, Socket, Type};

use crate::options::{Crowd, Target, rate};
use crate::publisher::Pace;
use crate::report::Report;
use crate::summary::{curve_of, millis};
use crate::wire;
use crate::world::{Alone, World};

/// What a flooder sends at once.
const CHUNK_BYTES: usize = 64 << 10;

/// How long an answer may take before a flooder starts anew.
const PATIENCE: Duration = Duration::from_secs(1);

/// Whoever was turned away comes back after this long, whatever he was told.
const PAUSE: Duration = Duration::from_millis(1);

#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    crowd: Crowd,
    /// Kinds of floods, one after another; all by default
    #[arg(long, value_enum, value_delimiter = ',')]
    kinds: Vec<Kind>,
    /// Connections that flood at once
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..))]
    flooders: u16,
    /// The local address that they come from, to see limits by address
    #[arg(long)]
    from: Option<IpAddr>,
    /// Publications a second to the others
    #[arg(long, default_value_t = 100.0, value_parser = rate)]
    rate: f64,
    /// How long each flood lasts
    #[arg(long, default_value_t = 10.0, value_parser = rate)]
    seconds: f64,
}

/// What is too much.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// WebSocket pings
    Pings,
    /// WebSocket pongs that nobody asked for
    Pongs,
    /// Commands that are answered
    Commands,
    /// Text that is no command
    BadJson,
    /// Subscribing and unsubscribing one channel
    Churn,
    /// Publications to a channel with no subscriber
    Publishes,
    /// Fragments of one byte
    Fragments,
    /// Upgrades that are left at once
    Handshakes,
    /// Connections that say nothing
    Silence,
}

/// What flooders met: how often they connected, and how that ended.
type Ends = BTreeMap<String, u64>;

/// Flooders at work, each in a thread of its own.
struct Flood {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<(u64, Ends)>>,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let title = "somebody sends far too much: what becomes of him, and what the others notice";
    let mut report = Report::new("flood", title, &options.target, &options.crowd);
    report.set("flooders", options.flooders);
    report.set("schedule", format!("open loop, {} a second, {} s for each flood", options.rate, options.seconds));
    let mut world = World::connect(&options.target, &options.crowd)?;
    let pace = Pace::new(Some(options.rate), 0);
    let quiet = world.run(pace, options.seconds, &mut Alone)?.tally.latency_us();
    report.latency.push(curve_of("quiet", &quiet));
    report.figure("latency p50 quiet", millis(&quiet, 0.5), "ms");
    report.figure("latency p99 quiet", millis(&quiet, 0.99), "ms");
    let all = Kind::value_variants();
    for kind in if options.kinds.is_empty() { all } else { &options.kinds } {
        let name = format!("{kind:?}").to_lowercase();
        let flood = Flood::start(options, *kind);
        let run = world.run(pace, options.seconds, &mut Alone)?;
        let (sent, ends) = flood.stop();
        let latency = run.tally.latency_us();
        report.latency.push(curve_of(&name, &latency));
        report.figure(&format!("latency p50 during {name}"), millis(&latency, 0.5), "ms");
        report.figure(&format!("latency p99 during {name}"), millis(&latency, 0.99), "ms");
        report.figure(&format!("lost during {name}"), run.tally.lost as f64, "");
        report.figure(&format!("taken of {name}"), sent as f64 / run.seconds / 1e6, "MB/s");
        for (end, count) in ends {
            report.notes.push(format!("{name}: {end}, {count} times"));
        }
    }
    report.deliver(&options.target)
}

impl Flood {
    fn start(options: &Options, kind: Kind) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (addr, from) = (options.target.addr, options.from);
        let request = wire::upgrade(&addr.to_string(), "/ws", options.target.token.as_deref());
        let flooder = |number| {
            let (stop, request) = (Arc::clone(&stop), request.clone());
            std::thread::spawn(move || {
                // On the core that measures too, the flood gives way to the measuring.
                let _ = rustix::process::nice(19);
                flood(kind, number, || connect(addr, from), &request, &stop)
            })
        };
        let threads = (0..options.flooders).map(flooder).collect();
        Self { stop, threads }
    }

    /// Bytes that were taken, and how connections ended.
    fn stop(self) -> (u64, Ends) {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = (0, Ends::new());
        for (sent, ends) in self.threads.into_iter().filter_map(|thread| thread.join().ok()) {
            all.0 += sent;
            ends.into_iter().for_each(|(end, count)| *all.1.entry(end).or_default() += count);
        }
        all
    }
}

/// Connects and sends until it is told to stop, and comes back whenever it is thrown out.
fn flood(
    kind: Kind,
    number: u16,
    connect: impl Fn() -> std::io::Result<TcpStream>,
    request: &[u8],
    stop: &AtomicBool,
) -> (u64, Ends) {
    let (mut sent, mut ends) = (0, Ends::new());
    let chunk = chunk(kind, number);
    let mut held = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let end = match connect() {
            Err(error) => format!("connect: {}", error.kind()),
            Ok(socket) if kind == Kind::Silence => {
                held.push(socket);
                held.drain(..held.len().saturating_sub(1_000));
                "connected".to_owned()
            }
            Ok(mut socket) => match upgrade(&mut socket, request) {
                Ok(101) if kind == Kind::Handshakes => "upgraded".to_owned(),
                Ok(101) => send(&mut socket, &chunk, stop, &mut sent),
                Ok(status) => format!("refused with {status}"),
                Err(error) => format!("upgrade: {}", error.kind()),
            },
        };
        *ends.entry(end).or_default() += 1;
        if kind != Kind::Handshakes {
            std::thread::sleep(PAUSE);
        }
    }
    (sent, ends)
}

fn connect(addr: SocketAddr, from: Option<IpAddr>) -> std::io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None)?;
    if let Some(from) = from {
        socket.bind(&SocketAddr::new(from, 0).into())?;
    }
    // Ends with a reset: thousands of ports must not wait for the network.
    socket.set_linger(Some(Duration::ZERO))?;
    socket.connect_timeout(&addr.into(), PATIENCE)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    Ok(socket.into())
}

/// The status that an upgrade is answered with.
fn upgrade(socket: &mut TcpStream, request: &[u8]) -> std::io::Result<u16> {
    socket.write_all(request)?;
    let mut head = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match socket.read(&mut buffer)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            len => head.extend(&buffer[..len]),
        }
        if let Some((status, ..)) = wire::split_head(&head) {
            return Ok(status);
        }
    }
}

/// Sends as fast as it is taken, and reads what is answered, until the other side ends it.
fn send(socket: &mut TcpStream, chunk: &[u8], stop: &AtomicBool, sent: &mut u64) -> String {
    let mut buffer = vec![0; 1 << 18];
    let mut tail = Vec::new();
    let mut at = 0;
    let is_nonblocking = socket.set_nonblocking(true).is_ok();
    while is_nonblocking && !stop.load(Ordering::Relaxed) {
        let written = match socket.write(&chunk[at..]) {
            Ok(len) => {
                *sent += len as u64;
                at = (at + len) % chunk.len();
                len
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
            Err(error) => return ended(&tail, error.kind()),
        };
        match socket.read(&mut buffer) {
            Ok(0) => return ended(&tail, ErrorKind::UnexpectedEof),
            Ok(len) => {
                tail.extend(&buffer[len.saturating_sub(127)..len]);
                tail.drain(..tail.len().saturating_sub(127));
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if written == 0 {
                    std::thread::sleep(PAUSE);
                }
            }
            Err(error) => return ended(&tail, error.kind()),
        }
    }
    "still connected at the end".to_owned()
}

/// A close frame is the last thing there is.
fn ended(tail: &[u8], error: ErrorKind) -> String {
    let begins = tail.windows(2).rposition(|head| head[0] == 0x88 && usize::from(head[1]) >= 2);
    match begins.and_then(|at| wire::split_frame(&tail[at..])) {
        Some((_, payload, [])) => {
            let reason = String::from_utf8_lossy(&payload[2..]);
            format!("closed with {} {reason}", u16::from_be_bytes([payload[0], payload[1]]))
        }
        _ => format!("cut off: {error}"),
    }
}

/// Whole frames, again and again; of fragments a message that never ends.
fn chunk(kind: Kind, number: u16) -> Vec<u8> {
    let text = |text: &str| wire::frame(text.as_bytes(), true);
    let frames = match kind {
        Kind::Pings => wire::frame_of(0x89, b"flood", true),
        Kind::Pongs => wire::frame_of(0x8A, b"flood", true),
        Kind::Commands => text(r#"{"type":"ping"}"#),
        Kind::BadJson => text(r#"{"type":"#),
        Kind::Churn => {
            let command = |kind: &str| text(&format!(r#"{{"type":"{kind}","channel":"flood-{number}"}}"#));
            [command("subscribe"), command("unsubscribe")].concat()
        }
        Kind::Publishes => text(r#"{"type":"publish","channel":"flood","data":1}"#),
        Kind::Fragments => wire::frame_of(0x00, b" ", true),
        Kind::Handshakes | Kind::Silence => Vec::new(),
    };
    let mut chunk = if kind == Kind::Fragments { wire::frame_of(0x01, b" ", true) } else { Vec::new() };
    while !frames.is_empty() && chunk.len() < CHUNK_BYTES {
        chunk.extend(&frames);
    }
    chunk
}
