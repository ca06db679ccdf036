//! `floor`: the same wire, served by a bare epoll + `send()` loop. Every publication is encoded
//! once and everything pending goes to each subscriber in one `send`: what the kernel alone costs.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::SocketAddr;

use clap::Args;
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token};

use crate::wire;

const LISTENER: Token = Token(usize::MAX);

#[derive(Args)]
pub(crate) struct Options {
    /// Where to listen
    #[arg(long, default_value = "127.0.0.1:9080")]
    listen: SocketAddr,
}

/// Event frames by channel.
type Pending = BTreeMap<String, Vec<u8>>;

struct Peer {
    socket: TcpStream,
    input: Vec<u8>,
    is_upgraded: bool,
    /// Channel names, as they were in the request.
    channels: Vec<String>,
    /// What the socket did not take yet.
    unsent: Vec<u8>,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let mut poll = Poll::new()?;
    let mut listener = TcpListener::bind(options.listen)?;
    poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
    println!("floor on {}", listener.local_addr()?);
    let mut peers: Vec<Option<Peer>> = Vec::new();
    let mut events = Events::with_capacity(4096);
    let mut buffer = vec![0; 1 << 20];
    loop {
        poll.poll(&mut events, None)?;
        let mut pending = Pending::new();
        for event in &events {
            if event.token() == LISTENER {
                accept(&listener, &poll, &mut peers)?;
                continue;
            }
            let slot = &mut peers[event.token().0];
            let Some(peer) = slot else { continue };
            if event.is_writable() && !peer.unsent.is_empty() {
                peer.send(&[]);
            }
            if event.is_readable() && !peer.read(&mut buffer, &mut pending) {
                *slot = None;
            }
        }
        for (channel, frames) in &pending {
            for peer in peers.iter_mut().flatten().filter(|peer| peer.channels.contains(channel)) {
                peer.send(frames);
            }
        }
    }
}

fn accept(listener: &TcpListener, poll: &Poll, peers: &mut Vec<Option<Peer>>) -> anyhow::Result<()> {
    while let Ok((mut socket, _)) = listener.accept() {
        socket.set_nodelay(true)?;
        let index = peers.iter().position(Option::is_none).filter(|_| peers.len() > 30_000).unwrap_or(peers.len());
        poll.registry().register(&mut socket, Token(index), Interest::READABLE | Interest::WRITABLE)?;
        let peer = Peer { socket, input: Vec::new(), is_upgraded: false, channels: Vec::new(), unsent: Vec::new() };
        if index == peers.len() {
            peers.push(Some(peer));
        } else {
            peers[index] = Some(peer);
        }
    }
    Ok(())
}

impl Peer {
    /// Reads what is there and adds the event frames of complete publishes to `pending`. False: the peer is gone.
    fn read(&mut self, buffer: &mut [u8], pending: &mut Pending) -> bool {
        loop {
            match self.socket.read(buffer) {
                Ok(0) => return false,
                Ok(len) => self.input.extend(&buffer[..len]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return false,
            }
        }
        if !self.is_upgraded {
            self.upgrade();
        }
        let mut rest = self.input.as_slice();
        while let Some((_, command, after)) = wire::split_frame(rest) {
            rest = after;
            if let Some((channel, data)) = publish_command(command) {
                let event =
                    [br#"{"type":"event","channel":""#, channel.as_bytes(), br#"","data":"#, data, b"}"].concat();
                pending.entry(channel.to_owned()).or_default().extend(wire::frame(&event, false));
            }
        }
        let used = self.input.len() - rest.len();
        self.input.drain(..used);
        true
    }

    fn upgrade(&mut self) {
        let Some(end) = self.input.windows(4).position(|window| window == b"\r\n\r\n") else { return };
        let head = String::from_utf8_lossy(&self.input[..end]);
        let query = head.split_once("channels=").and_then(|(_, rest)| rest.split_once(' '));
        self.channels = query.map_or(Vec::new(), |(names, _)| names.split(',').map(str::to_owned).collect());
        self.input.drain(..end + 4);
        self.is_upgraded = true;
        let mut answer =
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n".to_vec();
        answer.extend(wire::frame(br#"{"type":"welcome"}"#, false));
        for channel in &self.channels {
            answer.extend(wire::frame(format!(r#"{{"type":"subscribed","channel":"{channel}"}}"#).as_bytes(), false));
        }
        self.send(&answer);
    }

    fn send(&mut self, bytes: &[u8]) {
        if !self.unsent.is_empty() {
            self.unsent.extend(bytes);
            let unsent = std::mem::take(&mut self.unsent);
            return self.send_now(&unsent);
        }
        self.send_now(bytes);
    }

    fn send_now(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            match self.socket.write(bytes) {
                Ok(len) => bytes = &bytes[len..],
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return,
            }
        }
        self.unsent.extend(bytes);
    }
}

/// The channel and the data of a publish command, where the generator puts them.
fn publish_command(command: &[u8]) -> Option<(&str, &[u8])> {
    let rest = command.strip_prefix(br#"{"type":"publish","channel":""#)?;
    let (channel, rest) = rest.split_at_checked(wire::CHANNEL_BYTES)?;
    let data = rest.strip_prefix(br#"","data":"#)?.strip_suffix(b"}")?;
    Some((std::str::from_utf8(channel).ok()?, data))
}
