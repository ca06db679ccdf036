//! Two instances and a Redis, with a proxy on every way, and all that can befall them.

use std::net::SocketAddr;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rustix::process::Signal;
use tokio::time::sleep;

use crate::binary::Binary;
use crate::harness::{Client, Port, Redis, eventually, ready};
use crate::proxy::Proxy;
use crate::redis_pair::Pair;

/// What `verify` publishes to.
pub const CHANNELS: usize = 4;

/// Who is here is told on a channel of its own: where joins may be missed a gap is told after each lost link, which would
/// stand for any loss.
const RULES: &str =
    r#"[{"match":"verify:*","history":{"size":1000,"ttl":"5m"}},{"match":"here","presence":true},{"match":"flood"}]"#;

/// Connections of an instance to Redis.
pub const LINKS: usize = 3;

/// Something that fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    InstanceKilled,
    InstanceDrained,
    LinksCut,
    LinksStalled,
    LinksHalfOpen,
    ClientsCut,
    ClientsHalfOpen,
    RedisFrozen,
    ListenersKilled,
    PublishersKilled,
    ScriptsForgotten,
    BufferOverflows,
    RedisAsItWas,
    RedisKilledWithLog,
    RedisOlder,
    ReplicaBehindPromoted,
    StateOfReplicaBehind,
}

impl Fault {
    pub const ALL: [Self; 17] = [
        Self::InstanceKilled,
        Self::InstanceDrained,
        Self::LinksCut,
        Self::LinksStalled,
        Self::LinksHalfOpen,
        Self::ClientsCut,
        Self::ClientsHalfOpen,
        Self::RedisFrozen,
        Self::ListenersKilled,
        Self::PublishersKilled,
        Self::ScriptsForgotten,
        Self::BufferOverflows,
        Self::RedisAsItWas,
        Self::RedisKilledWithLog,
        Self::RedisOlder,
        Self::ReplicaBehindPromoted,
        Self::StateOfReplicaBehind,
    ];

    /// Redis loses what it has acknowledged.
    pub fn is_loss(self) -> bool {
        matches!(self, Self::RedisOlder | Self::ReplicaBehindPromoted | Self::StateOfReplicaBehind)
    }
}

/// Two instances, and a Redis with a standby.
pub struct World {
    pub pair: Pair,
    pub instances: Vec<Instance>,
    random: StdRng,
    /// The faults that there are, and those that come before the first one comes again.
    kinds: Vec<Fault>,
    deck: Vec<Fault>,
}

/// An instance that comes back at the same ports, behind a proxy on either side.
pub struct Instance {
    public: Port,
    internal: Port,
    /// The way to Redis.
    link: Proxy,
    /// The way to its clients.
    clients: Proxy,
    binary: Option<Binary>,
}

impl Instance {
    async fn new(redis: &Redis) -> Self {
        let (public, internal) = (Port::claim(), Port::claim());
        let (link, clients) = (Proxy::start(redis.addr()).await, Proxy::start(public.addr()).await);
        let mut instance = Self { public, internal, link, clients, binary: None };
        instance.start();
        instance
    }

    /// Where clients connect.
    pub fn url(&self) -> String {
        format!("ws://{}/ws?user=somebody&channels=here", self.clients.addr())
    }

    /// Where backends publish.
    pub fn api(&self) -> String {
        format!("http://{}", self.internal.addr())
    }

    fn start(&mut self) {
        let (public, internal) = (self.public.addr().to_string(), self.internal.addr().to_string());
        self.binary = Some(Binary::start(
            2000,
            &[
                ("HUBCAST_LISTEN", &public),
                ("HUBCAST_INTERNAL_LISTEN", &internal),
                ("HUBCAST_REDIS_URL", &format!("redis://{}/", self.link.addr())),
                ("HUBCAST_CHANNEL_RULES", RULES),
                ("HUBCAST_DRAIN_TIME", "500ms"),
                ("HUBCAST_PING_INTERVAL", "2s"),
                ("HUBCAST_PONG_TIMEOUT", "2s"),
                ("HUBCAST_LOG", "off"),
            ],
        ));
    }

    /// A client of a channel, past the proxy.
    pub async fn client(&self, channel: &str) -> Client {
        let path = format!("/ws?user=visitor&channels={channel}");
        let mut client = Client::open(self, &path, None).await;
        while client.json().await["type"] != "subscribed" {}
        client
    }

    /// Ends those of its links that are half open.
    pub fn bury(&self) {
        self.link.bury();
    }

    pub async fn end(&mut self, signal: Signal) {
        if let Some(binary) = self.binary.take() {
            binary.process.signal(signal);
            binary.end().await;
        }
    }

    pub async fn ready(&self) {
        ready(self).await;
    }
}

impl crate::harness::Instance for Instance {
    fn public(&self) -> SocketAddr {
        self.public.addr()
    }

    fn internal(&self) -> SocketAddr {
        self.internal.addr()
    }
}

impl World {
    /// In which these faults happen, from a seed.
    pub async fn new(seed: u64, kinds: Vec<Fault>) -> Self {
        let pair = Pair::start().await;
        let instances = vec![Instance::new(pair.redis()).await, Instance::new(pair.redis()).await];
        for instance in &instances {
            instance.ready().await;
        }
        Self { pair, instances, random: StdRng::seed_from_u64(seed), kinds, deck: Vec::new() }
    }

    pub fn millis(&mut self, range: std::ops::Range<u64>) -> Duration {
        Duration::from_millis(self.random.random_range(range))
    }

    /// One more, until the instances are ready again.
    pub async fn fault(&mut self) -> Fault {
        if self.deck.is_empty() {
            self.deck.clone_from(&self.kinds);
            self.deck.shuffle(&mut self.random);
        }
        let fault = self.deck.pop().expect("there are faults");
        let at = self.random.random_range(0..self.instances.len());
        self.befall(fault, at).await;
        for instance in &self.instances {
            instance.ready().await;
        }
        fault
    }

    async fn befall(&mut self, fault: Fault, at: usize) {
        match fault {
            Fault::InstanceKilled => self.replace(at, Signal::KILL).await,
            Fault::InstanceDrained => self.replace(at, Signal::TERM).await,
            Fault::LinksCut | Fault::ClientsCut => {
                let away = self.millis(200..1500);
                let way = self.way(fault, at);
                way.cut().await;
                sleep(away).await;
                way.heal().await;
            }
            Fault::LinksStalled => {
                let away = self.millis(500..3000);
                let way = self.way(fault, at);
                way.freeze();
                sleep(away).await;
                way.heal().await;
            }
            Fault::LinksHalfOpen | Fault::ClientsHalfOpen => self.way(fault, at).abandon(),
            Fault::RedisFrozen => {
                self.pair.redis().freeze();
                sleep(self.millis(300..2500)).await;
                self.pair.redis().thaw();
            }
            Fault::ListenersKilled => self.order(&["CLIENT", "KILL", "TYPE", "PUBSUB"]).await,
            Fault::PublishersKilled => self.order(&["CLIENT", "KILL", "TYPE", "NORMAL"]).await,
            Fault::ScriptsForgotten => self.order(&["SCRIPT", "FLUSH"]).await,
            Fault::BufferOverflows => self.overflow(at).await,
            Fault::RedisKilledWithLog => {
                self.pair.log_writes().await;
                sleep(self.millis(0..500)).await;
                let away = self.millis(0..500);
                self.pair.kill_logged(away).await;
            }
            Fault::RedisAsItWas | Fault::RedisOlder => {
                self.all_heard().await;
                if fault == Fault::RedisAsItWas {
                    self.pair.redis().command(&["SAVE"]).await;
                }
                let away = self.millis(0..500);
                self.pair.rewind(away).await;
            }
            Fault::ReplicaBehindPromoted | Fault::StateOfReplicaBehind => self.fall_behind(fault).await,
        }
    }

    fn way(&mut self, fault: Fault, at: usize) -> &mut Proxy {
        let Instance { link, clients, .. } = &mut self.instances[at];
        if matches!(fault, Fault::ClientsCut | Fault::ClientsHalfOpen) { clients } else { link }
    }

    async fn replace(&mut self, at: usize, signal: Signal) {
        self.instances[at].end(signal).await;
        self.instances[at].start();
    }

    /// Its own connection may be among those that are killed.
    async fn order(&self, command: &[&str]) {
        let _ = self.pair.redis().query::<redis::Value>(command).await;
    }

    /// It is not the channels with history that overflow the buffer, but they share its connection.
    async fn overflow(&mut self, at: usize) {
        let mut client = self.instances[at].client("flood").await;
        // It may be too slow for all that comes then.
        let reading = tokio::spawn(async move { client.finish().await });
        self.instances[at].link.freeze();
        self.pair.overflow("hub:flood").await;
        self.instances[at].link.heal().await;
        reading.abort();
    }

    /// A replica that lacks what was acknowledged last takes the primary's place, or the primary takes over its state.
    async fn fall_behind(&mut self, fault: Fault) {
        let link = self.pair.copy_and_part().await;
        sleep(self.millis(200..1500)).await;
        self.all_heard().await;
        if fault == Fault::StateOfReplicaBehind {
            return self.pair.take_over_standby().await;
        }
        self.pair.promote().await;
        self.pair.kill_standby();
        drop(link);
        sleep(self.millis(0..500)).await;
        let addr = self.pair.redis().addr();
        for instance in &mut self.instances {
            instance.link.lead_to(addr).await;
        }
    }

    /// Writes wait, and what was acknowledged is heard: if nobody heard of it, nobody can tell that it is lost.
    async fn all_heard(&self) {
        for instance in &self.instances {
            let links = async || (instance.link.connections() >= LINKS).then_some(());
            eventually("its connections to redis", links).await;
            // Redis sends to them still.
            instance.bury();
        }
        for channel in 0..CHANNELS {
            let redis_channel = format!("hub:verify:{channel}");
            eventually("somebody to follow the channel", async || {
                (self.pair.redis().numsub(&redis_channel).await > 0).then_some(())
            })
            .await;
        }
        // Whoever has just come back to it reads what it missed, which takes a moment; nothing says when it is over.
        sleep(Duration::from_millis(300)).await;
        hold_writes(self.pair.redis()).await;
    }
}

/// Writes wait from now on, and end with the server, or after a while; what it sent before has passed the proxies.
async fn hold_writes(redis: &Redis) {
    redis.command(&["CLIENT", "PAUSE", "10000", "WRITE"]).await;
    redis.command(&["PING"]).await;
    sleep(Duration::from_millis(100)).await;
}
