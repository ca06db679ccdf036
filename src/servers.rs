//! The Redis servers of this instance: the way to publish to each, and which of its links are up.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::join_all;

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
}

#[derive(Debug)]
struct Server {
    publisher: Publisher,
    fence: Fence,
    /// The multiplexer's link, and the publisher's.
    is_up: [AtomicBool; 2],
}

impl Servers {
    /// The servers, and the queue of each for [`crate::publisher::run`].
    pub fn new(topology: Arc<Topology>, publish_timeout: Duration) -> (Self, Vec<Jobs>) {
        let queues = (0..topology.servers()).map(|_| Publisher::new(publish_timeout));
        let (publishers, jobs): (Vec<_>, Vec<_>) = queues.unzip();
        let server = |publisher| Server { publisher, fence: Fence::default(), is_up: Default::default() };
        (Self { topology, servers: publishers.into_iter().map(server).collect() }, jobs)
    }

    /// The queue to the server of a channel.
    pub fn publisher(&self, channel: &str) -> &Publisher {
        &self.servers[self.topology.server_of(channel)].publisher
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
