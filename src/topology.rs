//! Which Redis server a channel lives on, and what it is called there. Pure but for one table.
//!
//! - One server (also behind Sentinel): every channel, as `{prefix}{channel}`.
//! - Several independent servers: consistent hashing, so that one more server moves few channels.
//! - Redis Cluster: channels are spread over partitions, `{prefix}{n}:{channel}` with real braces around `n`:
//!   everything of a partition shares a hash tag, so it lives in one slot. The owners of the partitions change.

use std::sync::atomic::{AtomicUsize, Ordering};

use crc16::{State, XMODEM};

/// Most primaries of a Redis Cluster that partitions can be on.
pub const NODES_MAX: usize = 64;

/// Slots of a Redis Cluster.
const SLOTS: u16 = 16_384;

/// The placement of channels.
#[derive(Debug)]
pub struct Topology {
    channel_prefix: Box<str>,
    placement: Placement,
}

#[derive(Debug)]
enum Placement {
    Servers(usize),
    /// The owner of each partition: a place in the list of nodes, [`NODES_MAX`] for those without one.
    Partitions(Box<[AtomicUsize]>),
}

impl Topology {
    /// So many independent servers, at least one.
    pub fn servers_of(count: usize, channel_prefix: &str) -> Self {
        Self { channel_prefix: channel_prefix.into(), placement: Placement::Servers(count.max(1)) }
    }

    /// A Redis Cluster whose nodes are not known yet.
    pub fn partitions_of(count: usize, channel_prefix: &str) -> Self {
        let owners = (0..count.max(1)).map(|_| AtomicUsize::new(NODES_MAX)).collect();
        Self { channel_prefix: channel_prefix.into(), placement: Placement::Partitions(owners) }
    }

    /// Places for servers. In a cluster the last is nobody's: what belongs to no node waits there.
    pub fn servers(&self) -> usize {
        match &self.placement {
            Placement::Servers(count) => *count,
            Placement::Partitions(_) => NODES_MAX + 1,
        }
    }

    /// Whether this is a Redis Cluster, with its sharded Pub/Sub (`SSUBSCRIBE`, `SPUBLISH`: Redis 7.0).
    pub fn is_cluster(&self) -> bool {
        matches!(self.placement, Placement::Partitions(_))
    }

    /// `PUBLISH` or `SPUBLISH`.
    pub fn publish_command(&self) -> &'static str {
        if self.is_cluster() { "SPUBLISH" } else { "PUBLISH" }
    }

    /// The server that a channel belongs to.
    pub fn server_of(&self, channel: &str) -> usize {
        match &self.placement {
            Placement::Servers(1) => 0,
            Placement::Servers(count) => jump_hash(fnv1a(channel), *count),
            Placement::Partitions(owners) => owners[partition(channel, owners.len())].load(Ordering::Relaxed),
        }
    }

    /// The name of a channel at Redis.
    pub fn redis_channel(&self, channel: &str) -> String {
        format!("{}{}", self.channel_prefix, self.tagged(channel))
    }

    /// A channel's name with the hash tag that keeps everything of it in one slot; without one outside a cluster.
    pub fn tagged(&self, channel: &str) -> String {
        match &self.placement {
            Placement::Servers(_) => channel.to_owned(),
            Placement::Partitions(owners) => format!("{{{}}}:{channel}", partition(channel, owners.len())),
        }
    }

    /// The hub's name of a Redis channel, if it is one of the hub's.
    pub fn channel_name<'a>(&self, redis_channel: &'a [u8]) -> Option<&'a str> {
        let name = str::from_utf8(redis_channel.strip_prefix(self.channel_prefix.as_bytes())?).ok()?;
        match &self.placement {
            Placement::Servers(_) => Some(name),
            Placement::Partitions(_) => name.split_once("}:").map(|(_, name)| name),
        }
    }

    /// Sets the owners of the partitions by the owners of their slots; true if one has changed.
    pub fn place(&self, owner_of_slot: impl Fn(u16) -> Option<usize>) -> bool {
        let Placement::Partitions(owners) = &self.placement else { return false };
        let mut has_changed = false;
        for (partition, owner) in owners.iter().enumerate() {
            let now = owner_of_slot(slot_of_partition(partition)).unwrap_or(NODES_MAX);
            has_changed |= owner.swap(now, Ordering::Relaxed) != now;
        }
        has_changed
    }

    /// The slots of all partitions.
    pub fn slots(&self) -> impl Iterator<Item = u16> {
        let count = if let Placement::Partitions(owners) = &self.placement { owners.len() } else { 0 };
        (0..count).map(slot_of_partition)
    }
}

/// The partition of a channel: `CRC16(channel) mod partitions`, with the CRC16 that Redis Cluster has (XMODEM).
fn partition(channel: &str, partitions: usize) -> usize {
    usize::from(State::<XMODEM>::calculate(channel.as_bytes())) % partitions
}

/// The slot of the hash tag `{n}` (Redis Cluster specification, "Hash tags").
fn slot_of_partition(partition: usize) -> u16 {
    State::<XMODEM>::calculate(partition.to_string().as_bytes()) % SLOTS
}

/// FNV-1a, 64 bits: simple enough for every backend that has to find a channel's server.
fn fnv1a(channel: &str) -> u64 {
    channel.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// Jump consistent hash (Lamping and Veach, 2014): with one more server, `1/servers` of the keys move, all to it.
fn jump_hash(mut key: u64, servers: usize) -> usize {
    let (mut server, mut next) = (0, 0);
    while next < servers as u64 {
        server = next;
        key = key.wrapping_mul(2_862_933_555_777_941_757).wrapping_add(1);
        next = ((server + 1) as f64 * ((1_u64 << 31) as f64 / ((key >> 33) + 1) as f64)) as u64;
    }
    server as usize
}
