//! A TCP proxy in front of anything, to cut, freeze or slow down the way between two that know nothing of it.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

use crate::harness::{Port, eventually, soon};

const CHUNK_BYTES: usize = 16 * 1024;
/// Each way of a connection holds this many: 1 MiB at most, then the sender has to wait.
const CHUNKS_MAX: usize = 64;

/// Forwards connections on its own port to the target. Dropping it ends them all.
pub struct Proxy {
    port: Port,
    /// That of new connections.
    road: Arc<Mutex<Arc<Road>>>,
    /// Those of connections that stay silent.
    abandoned: Mutex<Vec<Arc<Road>>>,
    /// Listens and owns every connection; `None` while cut.
    accepting: Option<JoinHandle<()>>,
}

/// What all connections have in common.
struct Road {
    target: SocketAddr,
    frozen: watch::Sender<bool>,
    ended: watch::Sender<bool>,
    delay_us: AtomicU64,
    connections: AtomicUsize,
}

impl Proxy {
    pub async fn start(target: SocketAddr) -> Self {
        let road = Arc::new(Mutex::new(Road::to(target)));
        let mut proxy = Self { port: Port::claim(), road, abandoned: Mutex::default(), accepting: None };
        proxy.heal().await;
        proxy
    }

    pub fn addr(&self) -> SocketAddr {
        self.port.addr()
    }

    fn road(&self) -> Arc<Road> {
        Arc::clone(&self.road.lock().unwrap())
    }

    /// How many clients are connected.
    pub fn connections(&self) -> usize {
        self.road().connections.load(Ordering::Relaxed)
    }

    /// Closes all connections, and refuses new ones until healed.
    pub async fn cut(&mut self) {
        if let Some(accepting) = self.accepting.take() {
            accepting.abort();
            let _ = accepting.await;
        }
        eventually("the end of all connections", async || (self.connections() == 0).then_some(())).await;
    }

    /// Connections stand and new ones are accepted, but not a byte passes, nor the end of a connection.
    pub fn freeze(&self) {
        self.road().frozen.send_replace(true);
    }

    /// The connections that stand are half open from now on: not a byte passes any more, nor their end, until they are
    /// cut or buried. New ones know nothing of it.
    pub fn abandon(&self) {
        let target = self.road().target;
        let lost = std::mem::replace(&mut *self.road.lock().unwrap(), Road::to(target));
        lost.frozen.send_replace(true);
        self.abandoned.lock().unwrap().push(lost);
    }

    /// Ends the connections that were abandoned, as either side's keepalive does in the end.
    pub fn bury(&self) {
        for road in self.abandoned.lock().unwrap().drain(..) {
            road.ended.send_replace(true);
        }
    }

    /// Cuts, and leads to another target from then on.
    pub async fn lead_to(&mut self, target: SocketAddr) {
        self.cut().await;
        *self.road.lock().unwrap() = Road::to(target);
        self.heal().await;
    }

    /// Undoes a cut or a freeze; what was sent meanwhile on a frozen connection arrives.
    pub async fn heal(&mut self) {
        self.road().frozen.send_replace(false);
        if self.accepting.is_none() {
            let listener = TcpListener::bind(self.addr()).await.expect("the port is ours");
            self.accepting = Some(tokio::spawn(accept(listener, Arc::clone(&self.road))));
        }
    }

    /// What is read from now on arrives this much later, in each direction.
    pub fn delay(&self, delay: Duration) {
        self.road().delay_us.store(delay.as_micros() as u64, Ordering::Relaxed);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(accepting) = &self.accepting {
            accepting.abort();
        }
    }
}

async fn accept(listener: TcpListener, road: Arc<Mutex<Arc<Road>>>) {
    // Aborted with the task that owns it.
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (client, _) = accepted.expect("there are file descriptors");
                let counted = Counted::new(&road.lock().unwrap());
                connections.spawn(async move {
                    let mut ended = counted.0.ended.subscribe();
                    tokio::select! {
                        _ = ended.wait_for(|ended| *ended) => Ok(()),
                        forwarded = counted.0.forward(client) => forwarded,
                    }
                });
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// One connection in the count, for as long as it lives.
struct Counted(Arc<Road>);

impl Counted {
    fn new(road: &Arc<Road>) -> Self {
        road.connections.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(road))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Road {
    fn to(target: SocketAddr) -> Arc<Self> {
        let (delay_us, connections) = (AtomicU64::new(0), AtomicUsize::new(0));
        let (frozen, ended) = (watch::Sender::new(false), watch::Sender::new(false));
        Arc::new(Self { target, frozen, ended, delay_us, connections })
    }

    /// Ends when both directions have: as on a wire, what was sent before an end or an error arrives before it.
    async fn forward(&self, mut client: TcpStream) -> std::io::Result<()> {
        self.frozen_is(false).await;
        let mut server = TcpStream::connect(self.target).await?;
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        let (client_read, client_write) = client.split();
        let (server_read, server_write) = server.split();
        tokio::join!(self.pass(client_read, server_write), self.pass(server_read, client_write));
        Ok(())
    }

    async fn frozen_is(&self, frozen: bool) {
        self.frozen.subscribe().wait_for(|now| *now == frozen).await.expect("its sender is in here");
    }

    /// One direction, up to its end.
    async fn pass(&self, from: impl AsyncRead + Unpin, to: impl AsyncWrite + Unpin) {
        let (sender, receiver) = mpsc::channel(CHUNKS_MAX);
        // Nobody is there any more to send to, or to be told of it.
        let (_, _) = tokio::join!(self.take_in(from, sender), self.give_out(receiver, to));
    }

    async fn take_in(&self, mut from: impl AsyncRead + Unpin, queue: mpsc::Sender<(Instant, Vec<u8>)>) {
        let mut buffer = vec![0; CHUNK_BYTES];
        loop {
            // An error is an end.
            let len = from.read(&mut buffer).await.unwrap_or(0);
            let delay = Duration::from_micros(self.delay_us.load(Ordering::Relaxed));
            // An empty chunk is the end, and as late as all others.
            let chunk = (Instant::now() + delay, buffer[..len].to_vec());
            if queue.send(chunk).await.is_err() || len == 0 {
                return;
            }
        }
    }

    async fn give_out(
        &self,
        mut queue: mpsc::Receiver<(Instant, Vec<u8>)>,
        mut to: impl AsyncWrite + Unpin,
    ) -> std::io::Result<()> {
        while let Some((due, chunk)) = queue.recv().await {
            tokio::time::sleep_until(due).await;
            let mut rest = chunk.as_slice();
            while !rest.is_empty() {
                self.frozen_is(false).await;
                tokio::select! {
                    biased;
                    () = self.frozen_is(true) => {}
                    written = to.write(rest) => rest = &rest[written?..],
                }
            }
        }
        self.frozen_is(false).await;
        to.shutdown().await
    }
}

/// A server that says what it hears.
async fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = socket.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    addr
}

async fn there_and_back(socket: &mut TcpStream) -> std::io::Result<()> {
    socket.write_all(b"0123456789").await?;
    back(socket).await
}

async fn back(socket: &mut TcpStream) -> std::io::Result<()> {
    let mut answer = [0; 10];
    soon("the echo", socket.read_exact(&mut answer)).await?;
    assert_eq!(&answer, b"0123456789");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_proxy_closes_and_refuses_until_it_is_healed() {
    let mut proxy = Proxy::start(echo().await).await;
    let mut first = TcpStream::connect(proxy.addr()).await.unwrap();
    there_and_back(&mut first).await.unwrap();
    assert_eq!(proxy.connections(), 1);
    for _ in 0..2 {
        proxy.cut().await;
        assert_eq!(proxy.connections(), 0);
        assert!(there_and_back(&mut first).await.is_err());
        let refused = TcpStream::connect(proxy.addr()).await.unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        proxy.heal().await;
        first = TcpStream::connect(proxy.addr()).await.unwrap();
        there_and_back(&mut first).await.unwrap();
    }
    let addr = proxy.addr();
    drop(proxy);
    assert_eq!(soon("the end", first.read(&mut [0])).await.unwrap(), 0);
    eventually("nobody to listen", async || TcpStream::connect(addr).await.err()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_proxy_accepts_and_passes_nothing_until_it_is_healed() {
    let mut proxy = Proxy::start(echo().await).await;
    let mut before = TcpStream::connect(proxy.addr()).await.unwrap();
    there_and_back(&mut before).await.unwrap();
    proxy.freeze();
    let mut during = TcpStream::connect(proxy.addr()).await.unwrap();
    eventually("both", async || (proxy.connections() == 2).then_some(())).await;
    for socket in [&mut before, &mut during] {
        socket.write_all(b"0123456789").await.unwrap();
        let mut answer = [0];
        let nothing = tokio::time::timeout(Duration::from_millis(100), socket.read(&mut answer));
        assert!(nothing.await.is_err());
    }
    proxy.heal().await;
    back(&mut before).await.unwrap();
    back(&mut during).await.unwrap();
    drop(during);
    eventually("one", async || (proxy.connections() == 1).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_are_abandoned_stay_silent_and_new_ones_pass() {
    let mut proxy = Proxy::start(echo().await).await;
    let mut before = TcpStream::connect(proxy.addr()).await.unwrap();
    there_and_back(&mut before).await.unwrap();
    proxy.abandon();
    let mut after = TcpStream::connect(proxy.addr()).await.unwrap();
    there_and_back(&mut after).await.unwrap();
    proxy.heal().await;
    before.write_all(b"0123456789").await.unwrap();
    let mut answer = [0];
    assert!(tokio::time::timeout(Duration::from_millis(100), before.read(&mut answer)).await.is_err());
    proxy.bury();
    there_and_back(&mut after).await.unwrap();
    assert_eq!(soon("the end", before.read(&mut [0])).await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_leads_to_another_target() {
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let mut proxy = Proxy::start(gone).await;
    proxy.lead_to(echo().await).await;
    let mut socket = TcpStream::connect(proxy.addr()).await.unwrap();
    there_and_back(&mut socket).await.unwrap();
}

/// A server that says something and is gone, with unread input: its reset overtakes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_sent_before_a_reset_arrives() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = Proxy::start(listener.local_addr().unwrap()).await;
    let mut socket = TcpStream::connect(proxy.addr()).await.unwrap();
    proxy.delay(Duration::from_millis(100));
    let (mut server, _) = listener.accept().await.unwrap();
    socket.write_all(b"unread").await.unwrap();
    server.readable().await.unwrap();
    server.write_all(b"0123456789").await.unwrap();
    drop(server);
    back(&mut socket).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delay_counts_each_way() {
    const DELAY: Duration = Duration::from_millis(100);
    let proxy = Proxy::start(echo().await).await;
    let mut socket = TcpStream::connect(proxy.addr()).await.unwrap();
    proxy.delay(DELAY);
    let start = Instant::now();
    there_and_back(&mut socket).await.unwrap();
    assert!(start.elapsed() >= 2 * DELAY, "{:?}", start.elapsed());
    proxy.delay(Duration::ZERO);
    there_and_back(&mut socket).await.unwrap();
}

#[test]
fn a_claimed_port_is_free_for_one_server_and_claimed_once() {
    let ports: Vec<_> = (0..500).map(|_| Port::claim()).collect();
    let mut numbers: Vec<_> = ports.iter().map(|port| port.addr().port()).collect();
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), ports.len());
    for _ in 0..2 {
        std::net::TcpListener::bind(ports[0].addr()).expect("bound as often as the server starts");
    }
}
