//! The Redis servers of this instance: the way to publish to each, and which of its links are up.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use redis::aio::MultiplexedConnection;
use tokio::sync::watch;

use crate::fence::Fence;
use crate::metrics::Link;
use crate::publisher::{Jobs, Publisher};
use crate::topology::Topology;

/// All servers, in the order of the topology.
#[derive(Debug)]
pub struct Servers {
    /// Where channels live.
    pub topology: Arc<Topology>,
    servers: Box<[Server]>,
    commands: watch::Sender<CommandLinks>,
}

/// The links that take commands, all servers together: the publishers'.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CommandLinks {
    /// How many there are.
    pub up: usize,
    /// How many were made so far: after each, a Redis may have lost something.
    pub made: u64,
}

#[derive(Debug)]
struct Server {
    publisher: Publisher,
    fence: Fence,
    /// The multiplexer's link, and the publisher's.
    is_up: [AtomicBool; 2],
    /// Links that take commands, so far.
    made: AtomicU64,
}

impl Servers {
    /// The servers, and the queue of each for [`crate::publisher::run`].
    pub fn new(topology: Arc<Topology>, publish_timeout: Duration) -> (Self, Vec<Jobs>) {
        let queues = (0..topology.servers()).map(|_| Publisher::new(publish_timeout));
        let (publishers, jobs): (Vec<_>, Vec<_>) = queues.unzip();
        let server = |publisher| Server {
            publisher,
            fence: Fence::default(),
            is_up: Default::default(),
            made: AtomicU64::new(0),
        };
        let servers = publishers.into_iter().map(server).collect();
        (Self { topology, servers, commands: watch::Sender::default() }, jobs)
    }

    /// The queue to the server of a channel.
    pub fn publisher(&self, channel: &str) -> &Publisher {
        &self.servers[self.topology.server_of(channel)].publisher
    }

    /// A link for commands on what belongs to a channel, while there is one.
    pub fn commands(&self, channel: &str) -> Option<MultiplexedConnection> {
        self.publisher(channel).link()
    }

    /// The same for a server.
    pub fn link(&self, server: usize) -> Option<MultiplexedConnection> {
        self.servers[server].publisher.link()
    }

    /// How it is with the links that take commands.
    pub fn command_links(&self) -> CommandLinks {
        *self.commands.borrow()
    }

    /// Waits until [`Servers::command_links`] is not what it was.
    pub async fn command_links_changed(&self, known: CommandLinks) {
        // The sender is here, so it cannot be closed.
        let _ = self.commands.subscribe().wait_for(|links| *links != known).await;
    }

    /// How many links that take commands were made to each server so far.
    pub fn links_made(&self) -> Vec<u64> {
        self.servers.iter().map(|server| server.made.load(Ordering::Acquire)).collect()
    }

    /// For a publisher: its link takes commands, or does not any more.
    pub fn lend(&self, server: usize, link: Option<MultiplexedConnection>) {
        let is_up = link.is_some();
        self.servers[server].publisher.lend(link);
        self.servers[server].made.fetch_add(u64::from(is_up), Ordering::Release);
        self.commands.send_modify(|links| match is_up {
            true => *links = CommandLinks { up: links.up + 1, made: links.made + 1 },
            false => links.up -= 1,
        });
    }

    /// For a multiplexer: the fences of its server.
    pub fn fence(&self, server: usize) -> &Fence {
        &self.servers[server].fence
    }

    /// Waits until what every reachable server took before this call is in the outboxes, within half a second.
    pub async fn pass_fences(&self) {
        let reachable = self.servers.iter().filter(|server| server.is_usable());
        join_all(reachable.map(|server| server.fence.pass())).await;
    }

    /// Notes that a link came up or was lost; returns on how many servers that link is up now.
    pub fn note_link(&self, server: usize, link: Link, is_up: bool) -> usize {
        let of = |server: &Server| server.is_up.get(link as usize).is_some_and(|up| up.load(Ordering::Relaxed));
        if let Some(link) = self.servers[server].is_up.get(link as usize) {
            link.store(is_up, Ordering::Relaxed);
        }
        self.servers.iter().filter(|server| of(server)).count()
    }

    /// Whether any server can be published to and listened to. One that is away does not make an instance useless.
    pub fn is_any_usable(&self) -> bool {
        self.servers.iter().any(Server::is_usable)
    }
}

impl Server {
    fn is_usable(&self) -> bool {
        self.is_up.iter().all(|link| link.load(Ordering::Relaxed))
    }
}
