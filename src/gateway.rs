//! The composition root: builds the parts, accepts connections, and drains in order.
//!
//! Drain order: not ready, `draining` to all, closes spread over the window while the public
//! listener refuses and the internal one serves, wait for the peers, end.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::future::select_all;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::warn;

use crate::accepting::Accepting;
use crate::admission::Admission;
use crate::api::Api;
use crate::api_keys::ApiKeys;
use crate::authenticator::Authenticator;
use crate::broker::Broker;
use crate::clock::{self, micros};
use crate::close::CloseReason;
use crate::cluster::{self, Cluster};
use crate::config::{Config, RESERVED_FILES};
use crate::connection::{Connection, Liveness, Shared};
use crate::event;
use crate::fanout::{Fanout, Subscriber};
use crate::frame::{Frame, Opcode};
use crate::health::Health;
use crate::history_reader;
use crate::hub::{Histories, Hub};
use crate::lanes::Lanes;
use crate::listen::{self, Public};
use crate::memory::{self, Memory};
use crate::metrics::{Insecure, Metrics};
use crate::presence::{self, Presence, Store};
use crate::presence_reader::{self, Questions};
use crate::presence_redis::{self, RedisStore};
use crate::presence_store;
use crate::presence_writer;
use crate::redis_tasks::Redis;
use crate::registry::{self, Registry};
use crate::servers::Servers;
use crate::session::{End, SessionContext};
use crate::tls::Tls;
use crate::waiting::Waiting;

/// Connections that the kernel keeps for us while we are busy.
const BACKLOG: u32 = 4096;

/// How long peers may take to read what they have and to answer the last closes of a drain.
const DRAIN_GRACE: Duration = Duration::from_secs(16);

/// How often histories in memory are looked at for whether they take too much: at 1 GB/s that is 20 MB.
const ROOM_INTERVAL: Duration = Duration::from_millis(20);

/// How often entries of a history in memory are looked through for those that are too old to be kept.
const EXPIRE_INTERVAL: Duration = Duration::from_secs(10);

/// How long the last leaves of presence may hold up the end of the process.
const PRESENCE_TIMEOUT: Duration = Duration::from_secs(1);

/// A running gateway.
#[derive(Debug)]
pub struct Gateway {
    addr: SocketAddr,
    internal_addr: SocketAddr,
    broker: Arc<Broker>,
    ended: Arc<Ended>,
    drain_time: Duration,
    tasks: Vec<JoinHandle<()>>,
    _accepting: Accepting,
}

/// Counts the sessions that a drain waits for, and how they ended.
#[derive(Debug, Default)]
pub struct Ended {
    open: AtomicUsize,
    flushed: AtomicUsize,
    cut_off: AtomicUsize,
    changed: Notify,
}

/// What a drain did, for its summary line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Connections that the drain closed.
    pub closed: usize,
    /// Those that got everything accepted, our close frame, and ended the connection.
    pub flushed: usize,
    /// Those that did not.
    pub cut_off: usize,
}

impl Gateway {
    /// Builds everything, binds both listeners and starts to serve. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// An address that cannot be bound, or a bad Redis URL.
    pub fn start(config: Config) -> anyhow::Result<Self> {
        let instance_id = format!("{:016x}", rand::random::<u64>());
        let listener = bind("HUBCAST_LISTEN", config.listen)?;
        let internal = bind("HUBCAST_INTERNAL_LISTEN", config.internal_listen)?;
        let (addr, internal_addr) = (listener.local_addr()?, internal.local_addr()?);
        let api_keys = ApiKeys::load(config.api_keys.clone()).map_err(anyhow::Error::msg)?;
        let api_keys = Arc::new(api_keys);
        let tls = config.edge.tls.as_ref().map(Tls::load).transpose().map_err(anyhow::Error::msg)?.map(Arc::new);
        let authenticator = config.auth.jwt.clone().map(Authenticator::load).transpose().map_err(anyhow::Error::msg)?;
        let authenticator = authenticator.map(Arc::new);
        let redis = Redis::new(&config, &instance_id)?;
        let (cluster, questions) = Cluster::new(&config.redis_channel_prefix);
        let (presence, questions_of_presence) = presence(&config, redis.as_ref().map(Redis::servers));
        let (history, questions_of_history) = history_reader::Question::queue();
        let broker = Arc::new(Broker {
            hub: match &redis {
                Some(redis) => Hub::with_upstream(config.channel_rules.clone(), config.outbox, redis.topology()),
                None => Hub::local(config.channel_rules.clone(), config.outbox),
            },
            shared: Arc::new(Shared {
                outbox: config.outbox,
                lanes: Arc::new(Lanes::new(config.worker_threads)),
                metrics: Metrics::default(),
                memory: Memory::new(config.limits.memory_max),
                connections: Default::default(),
                instance_id: instance_id.into(),
                started_at_ms: clock::unix_ms(clock::now_us()),
                registry: redis.is_some().then(|| {
                    Arc::new(Registry::new(registry::Settings {
                        key_prefix: config.redis_key_prefix.as_str().into(),
                        lease: config.registry_lease,
                    }))
                }),
                presence,
            }),
            health: Arc::new(Health::new(redis.is_some(), config.auth.has_jwks())),
            cluster,
            servers: redis.as_ref().map(Redis::servers),
            authenticator,
            history,
            publish_bytes_max: config.publish_bytes_max,
        });
        let ended = Arc::new(Ended::default());
        let mut tasks = background(&config, &broker);
        if config.channel_rules.any_presence() {
            tasks.push(tokio::spawn(presence_writer::run(Arc::clone(&broker))));
            tasks.push(tokio::spawn(presence_reader::run(Arc::clone(&broker), questions_of_presence)));
        }
        tasks.extend(history_tasks(&config, &broker, questions_of_history));
        if let Some(redis) = redis {
            tasks.extend(redis.start(&config, &broker)?);
            tasks.push(tokio::spawn(cluster::run(Arc::clone(&broker), questions)));
        }
        tasks.push(tokio::spawn(Arc::clone(&api_keys).watch(Arc::clone(&broker.shared))));
        tasks.extend(authentication_tasks(&config, &broker));
        tasks.extend(tls.clone().map(|tls| tokio::spawn(tls.watch(Arc::clone(&broker.shared)))));
        let api = Arc::new(Api { broker: Arc::clone(&broker), keys: api_keys, body_timeout: config.handshake_timeout });
        let (handshake_timeout, drain_time) = (config.handshake_timeout, config.drain_time);
        let public = public(config, &broker, &ended, tls);
        let accept_errors = broker.shared.metrics.accept_errors.clone();
        let (accepting, accept) =
            Accepting::start(listener, accept_errors, move |socket, remote| public.take(socket, remote))?;
        tasks.push(accept);
        tasks.push(tokio::spawn(listen::internal(internal, api, handshake_timeout)));
        Ok(Self { addr, internal_addr, broker, ended, drain_time, tasks, _accepting: accepting })
    }

    /// Where WebSocket clients connect.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Where the API, health and metrics are.
    pub fn internal_addr(&self) -> SocketAddr {
        self.internal_addr
    }

    /// The parts that publish, for whoever embeds the gateway.
    pub fn broker(&self) -> &Arc<Broker> {
        &self.broker
    }

    /// Waits until a task of the gateway ends by a panic. What it did nobody does any more, be it a lane or the link to
    /// Redis, so the process is better begun anew.
    pub async fn failed(&mut self) {
        while !self.tasks.is_empty() {
            let (ended, index, _) = select_all(&mut self.tasks).await;
            drop(self.tasks.swap_remove(index));
            if ended.is_err_and(|error| error.is_panic()) {
                return;
            }
        }
        std::future::pending().await
    }

    /// Ends the gateway: every client that reads gets each publication accepted before its close, then 1012.
    pub async fn drain(self) -> Drained {
        self.broker.health.start_draining();
        let mut fanout = Fanout::default();
        self.broker.hub.start_draining(&mut fanout);
        self.broker.shared.submit(&mut fanout);
        self.tell_draining().await;
        self.close_spread().await;
        let _ = tokio::time::timeout(DRAIN_GRACE, self.ended.all()).await;
        if let Some(registry) = &self.broker.shared.registry {
            // Those who were closed have some time to come back elsewhere; whoever sweeps up announces the others.
            let _ = tokio::time::timeout(PRESENCE_TIMEOUT, self.broker.shared.presence.written()).await;
            registry.leave().await;
        }
        let left = self.ended.open.load(Ordering::Acquire);
        let flushed = self.ended.flushed.load(Ordering::Acquire);
        let cut_off = self.ended.cut_off.load(Ordering::Acquire) + left;
        for task in &self.tasks {
            task.abort();
        }
        Drained { closed: flushed + cut_off, flushed, cut_off }
    }

    /// `{"type":"draining"}` to all who speak the protocol: come back within the drain window, spread out.
    async fn tell_draining(&self) {
        let frame = event::draining(self.drain_time.as_millis() as u64);
        let mut fanout = Fanout::default();
        for connection in self.connections() {
            if connection.format() == crate::publication::Format::Json {
                fanout.push(&connection, &frame);
            }
        }
        self.broker.shared.submit(&mut fanout);
        tokio::task::yield_now().await;
    }

    /// Closes all connections, evenly over the drain window.
    async fn close_spread(&self) {
        let connections = self.connections();
        let started = Instant::now();
        let due = |index: usize| started + self.drain_time.mul_f64(index as f64 / connections.len() as f64);
        let mut closed = 0;
        while closed < connections.len() {
            tokio::time::sleep_until(due(closed)).await;
            // What was accepted before a close is in the outbox before its close frame.
            self.broker.flush_upstream().await;
            let now = Instant::now();
            while closed < connections.len() && due(closed) <= now {
                connections[closed].close(CloseReason::Drain);
                closed += 1;
            }
        }
        // Those that were still in their handshake when the list was made.
        self.broker.flush_upstream().await;
        for connection in self.connections() {
            connection.close(CloseReason::Drain);
        }
    }

    fn connections(&self) -> Vec<Arc<Connection>> {
        self.broker.shared.connections.iter().map(|connection| Arc::clone(&connection)).collect()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Ended {
    /// Counts a session as open until its guard is dropped.
    pub fn enter(self: &Arc<Self>) -> EndedGuard {
        self.open.fetch_add(1, Ordering::AcqRel);
        EndedGuard { ended: Arc::clone(self), end: End::CutOff }
    }

    /// Waits until no session is open.
    async fn all(&self) {
        loop {
            let changed = self.changed.notified();
            if self.open.load(Ordering::Acquire) == 0 {
                return;
            }
            changed.await;
        }
    }
}

/// One open session; [`EndedGuard::end`] is how it ended unless it panics.
#[derive(Debug)]
pub struct EndedGuard {
    ended: Arc<Ended>,
    /// How it ended.
    pub end: End,
}

impl Drop for EndedGuard {
    fn drop(&mut self) {
        match self.end {
            End::Flushed => drop(self.ended.flushed.fetch_add(1, Ordering::AcqRel)),
            End::CutOff => drop(self.ended.cut_off.fetch_add(1, Ordering::AcqRel)),
            End::Other => {}
        }
        self.ended.open.fetch_sub(1, Ordering::AcqRel);
        self.ended.changed.notify_waiters();
    }
}

/// Who is where: on the channels' servers with Redis, else here.
fn presence(config: &Config, servers: Option<Arc<Servers>>) -> (Presence, Questions) {
    let store = match servers {
        None => Store::Memory(presence_store::Memory::default()),
        Some(servers) => {
            let settings = presence_redis::Settings {
                key_prefix: config.redis_key_prefix.as_str().into(),
                // As a connection's entry, and a leave is settled before that.
                ttl: config.registry_lease * 4 + config.presence_debounce,
            };
            Store::Redis(RedisStore::new(settings, servers))
        }
    };
    let settings = presence::Settings { debounce: config.presence_debounce, lease: config.registry_lease };
    Presence::new(settings, store)
}

/// What the public listener works with.
fn public(config: Config, broker: &Arc<Broker>, ended: &Arc<Ended>, tls: Option<Arc<Tls>>) -> Arc<Public> {
    Arc::new(Public {
        sessions: Arc::new(SessionContext {
            broker: Arc::clone(broker),
            rules: config.channel_rules,
            message_bytes_max: config.message_bytes_max,
            subscriptions_max: config.subscriptions_max,
            allowances: config.limits.allowances(),
            admission: Arc::new(Admission::new(
                &config.limits,
                connections_max(config.connections_max),
                config.auth.jwt.is_some(),
            )),
            ping_interval: config.ping_interval,
        }),
        refusals: Arc::new(Semaphore::new(RESERVED_FILES / 4)),
        handshake_timeout: config.handshake_timeout,
        write_timeout: config.write_timeout,
        proxies: config.edge.proxies,
        is_behind_proxy: config.edge.proxy_protocol,
        tls,
        origins: config.edge.origins,
        is_echo_on: config.echo,
        ended: Arc::clone(ended),
    })
}

/// The tasks that every gateway has: one per lane, and the sweep.
fn background(config: &Config, broker: &Arc<Broker>) -> Vec<JoinHandle<()>> {
    let shared = &broker.shared;
    let mut tasks: Vec<_> = (0..shared.lanes.count())
        .map(|lane| {
            let shared = Arc::clone(shared);
            tokio::spawn(async move { Lanes::run(&shared, lane).await })
        })
        .collect();
    let liveness = Liveness {
        ping_interval_us: micros(config.ping_interval),
        pong_timeout_us: micros(config.pong_timeout),
        write_timeout_us: micros(config.write_timeout),
    };
    let waiting = Waiting::new(&config.limits);
    tasks.push(tokio::spawn(sweep(Arc::clone(shared), liveness, waiting)));
    tasks.push(tokio::spawn(memory::watch(Arc::clone(shared))));
    tasks
}

/// Looks at every connection a few times within the shortest interval: no timer per connection.
async fn sweep(shared: Arc<Shared>, liveness: Liveness, mut waiting: Waiting) {
    let shortest = liveness.ping_interval_us.min(liveness.pong_timeout_us).min(liveness.write_timeout_us);
    let period = Duration::from_micros((shortest / 8).clamp(10_000, 100_000));
    let mut looked_us = clock::now_us();
    loop {
        tokio::time::sleep(period).await;
        let now_us = clock::now_us();
        // Whoever was kept from the processor has not read yet what clients sent meanwhile.
        let was_stopped = now_us - looked_us > micros(period) + shortest / 4;
        looked_us = now_us;
        // Tokens expire by the wall clock, wherever that jumps.
        let now = (now_us, clock::unix_ms(now_us));
        // One frame for all, made now: its age is that of the pings.
        let ping = Frame::new(Opcode::Ping, &[]);
        let mut fanout = Fanout::default();
        for connection in &shared.connections {
            connection.sweep(now, was_stopped, &ping, &liveness, &mut fanout);
            waiting.note(&connection);
        }
        waiting.shed();
        shared.submit(&mut fanout);
    }
}

/// The tasks of history, if any channel has it.
fn history_tasks(config: &Config, broker: &Arc<Broker>, questions: history_reader::Questions) -> Vec<JoinHandle<()>> {
    if !config.channel_rules.any_history() {
        return Vec::new();
    }
    if let Histories::Memory(memory) = broker.hub.histories() {
        memory.bound(config.history_memory_max, broker.shared.metrics.history_forgotten.clone());
    }
    let key_prefix = config.redis_key_prefix.as_str().into();
    let reader = history_reader::run(Arc::clone(broker), key_prefix, questions);
    vec![tokio::spawn(reader), tokio::spawn(expire(Arc::clone(broker)))]
}

/// The tasks of authentication, and what an operator should see of it.
fn authentication_tasks(config: &Config, broker: &Arc<Broker>) -> Vec<JoinHandle<()>> {
    for (is_open, what, told) in [
        (config.is_open_to_anybody(), Insecure::NoAuth, "anybody on the network may connect: HUBCAST_AUTH is none"),
        (config.is_internal_open_to_anybody(), Insecure::Internal, "anybody on the network may use the API"),
    ] {
        if is_open {
            broker.shared.metrics.insecure(what);
            warn!("{told}");
        }
    }
    let Some(authenticator) = &broker.authenticator else { return Vec::new() };
    let revoked = format!("{}revoked", config.redis_key_prefix);
    vec![
        tokio::spawn(Arc::clone(authenticator).watch_files(Arc::clone(&broker.shared))),
        tokio::spawn(Arc::clone(authenticator).watch_jwks(Arc::clone(broker))),
        tokio::spawn(Arc::clone(authenticator).watch_revocations(Arc::clone(broker), revoked)),
    ]
}

/// Has what is too old forgotten, and what there is no room for, where the history is here.
async fn expire(broker: Arc<Broker>) {
    let Histories::Memory(memory) = broker.hub.histories() else { return };
    let mut expired = Instant::now();
    loop {
        tokio::time::sleep(ROOM_INTERVAL).await;
        memory.make_room();
        if expired.elapsed() > EXPIRE_INTERVAL {
            expired = Instant::now();
            memory.expire(clock::unix_ms(clock::now_us()));
        }
    }
}

fn bind(name: &str, addr: SocketAddr) -> anyhow::Result<TcpListener> {
    let listen = || -> io::Result<TcpListener> {
        let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket.set_reuseaddr(true)?;
        socket.bind(addr)?;
        socket.listen(BACKLOG)
    };
    listen().map_err(|error| anyhow::anyhow!("{name}={addr}: cannot listen there: {error}"))
}

/// How many WebSocket connections there may be: what is wanted, within what the file limit, raised as
/// far as allowed, leaves for them.
pub fn connections_max(wanted: Option<usize>) -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    let files = if raised.is_ok() { limit.maximum } else { limit.current };
    let files = files.map_or(Semaphore::MAX_PERMITS, |files| files as usize);
    let places = files.saturating_sub(RESERVED_FILES).clamp(1, Semaphore::MAX_PERMITS);
    if let Some(wanted) = wanted.filter(|wanted| *wanted > places) {
        warn!(wanted, places, "the file limit allows fewer connections than HUBCAST_CONNECTIONS_MAX");
    }
    wanted.map_or(places, |wanted| wanted.min(places))
}
