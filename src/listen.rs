//! The accept loop of the API, and a public connection's way from its first byte to its session.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tracing::{debug, warn};

use crate::accepting;
use crate::access::{self, Who};
use crate::admission::{Denied, Pending, Place};
use crate::allowance::Allowance;
use crate::answer::ApiError;
use crate::api::Api;
use crate::authenticator::Authenticator;
use crate::caller::Caller;
use crate::clock::{self, micros};
use crate::close::CloseReason;
use crate::connection::Connection;
use crate::gateway::{Ended, EndedGuard};
use crate::guests::Stay;
use crate::handshake::Mode;
use crate::handshake::{self, Handshake};
use crate::identity::Action;
use crate::jwt::Fault;
use crate::metrics::{Metrics, Refused};
use crate::origin::Origins;
use crate::pass::Pass;
use crate::protocol::{ErrorCode, Refusal};
use crate::proxies::Proxies;
use crate::proxy_protocol;
use crate::session::{Session, SessionContext};
use crate::socket::Socket;
use crate::tab::Share;
use crate::tls::Tls;
use crate::turned_away;

/// Unsent bytes that the kernel keeps for one connection: more would hide a stalled client from us.
const NOTSENT_BYTES: u32 = 128 << 10;

/// Largest request head, and what hyper buffers for it.
const HEAD_BYTES_MAX: usize = 16 << 10;

/// How long a handshake may take while very many are in progress.
const CROWDED_TIMEOUT: Duration = Duration::from_secs(2);

/// Connections to the internal listener at once: what else the process needs of its reserved files is left to it.
/// Those that are idle end after the handshake timeout, so whoever waits has his turn.
const INTERNAL_CONNECTIONS_MAX: usize = 128;

/// What the public listener needs.
#[derive(Debug)]
pub struct Public {
    /// What sessions share.
    pub sessions: Arc<SessionContext>,
    /// A permit per connection that is not, while it is told so and no place is to spare.
    pub refusals: Arc<Semaphore>,
    /// `HUBCAST_HANDSHAKE_TIMEOUT`
    pub handshake_timeout: Duration,
    /// `HUBCAST_WRITE_TIMEOUT`, after which the kernel gives up a peer that acknowledges nothing.
    pub write_timeout: Duration,
    /// Who may say for whom it speaks.
    pub proxies: Proxies,
    /// `HUBCAST_PROXY_PROTOCOL`
    pub is_behind_proxy: bool,
    /// TLS, where the listener speaks it.
    pub tls: Option<Arc<Tls>>,
    /// `HUBCAST_ORIGINS`
    pub origins: Origins,
    /// `--echo`
    pub is_echo_on: bool,
    /// Counts sessions for the drain.
    pub ended: Arc<Ended>,
}

/// Accepts API clients for ever. Keep-alive and pipelining are hyper's; a burst of pipelined
/// publishes is handled in one go, and flushed once.
pub async fn internal(listener: TcpListener, api: Arc<Api>, head_timeout: Duration) {
    let places = Arc::new(Semaphore::new(INTERNAL_CONNECTIONS_MAX));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let (socket, _) = accept(&listener, &api.broker.shared.metrics).await;
        let _ = SockRef::from(&socket).set_tcp_user_timeout(Some(head_timeout));
        let api = Arc::clone(&api);
        tokio::spawn(async move {
            let service = service_fn(|request| {
                let api = Arc::clone(&api);
                async move { Ok::<_, io::Error>(api.handle(request).await) }
            });
            let mut builder = http_builder(head_timeout);
            builder.pipeline_flush(true);
            if let Err(error) = builder.serve_connection(TokioIo::new(socket), service).await {
                if let Some(status) = unreadable(&error) {
                    api.broker.shared.metrics.answered(status);
                }
                debug!(%error, "api connection ended");
            }
            drop(place);
        });
    }
}

async fn accept(listener: &TcpListener, metrics: &Metrics) -> (TcpStream, SocketAddr) {
    let mut pause = Duration::from_millis(1);
    loop {
        match listener.accept().await {
            Ok((socket, remote)) => {
                // Without Nagle's algorithm a write leaves at once; if that cannot be set the peer is gone.
                let _ = socket.set_nodelay(true);
                return (socket, remote);
            }
            Err(error) => {
                metrics.accept_errors.inc();
                warn!(%error, "cannot accept a connection");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(accepting::PAUSE_MAX);
            }
        }
    }
}

/// What hyper has answered a request by itself: it could not be read.
fn unreadable(error: &hyper::Error) -> Option<StatusCode> {
    match (error.is_parse_too_large(), error.is_parse()) {
        (true, _) => Some(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE),
        (false, true) => Some(StatusCode::BAD_REQUEST),
        (false, false) => None,
    }
}

fn http_builder(head_timeout: Duration) -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(head_timeout).max_buf_size(HEAD_BYTES_MAX);
    builder.half_close(false);
    builder
}

/// A connection whose handshake is done.
struct Upgraded {
    socket: Socket,
    /// What arrived behind the upgrade request.
    behind: Bytes,
    accepted: Accepted,
}

/// Counts a connection among those of its user, and of its address where a proxy tells it.
type Stays = (Stay<Box<str>>, Option<Stay<IpAddr>>);

/// A connection that was admitted.
struct Arrived {
    socket: std::net::TcpStream,
    peer: SocketAddr,
    place: Place,
    pending: Pending,
    /// How long its handshake may take.
    limit: Duration,
}

/// What counts a connection for as long as its session lives.
struct Stayed {
    guard: EndedGuard,
    _stays: Stays,
    _place: Place,
}

/// What a handshake came to.
struct Accepted {
    upgrade: OnUpgrade,
    mode: Mode,
    caller: Caller,
    stay: Stays,
    remote: SocketAddr,
}

impl Public {
    /// A connection was accepted: lets it in, or turns it away. It has to return at once.
    pub fn take(self: &Arc<Self>, socket: std::net::TcpStream, remote: SocketAddr) {
        let is_tight = self.sessions.broker.shared.memory.is_tight();
        match self.sessions.admission.admit(self.own_address(remote), is_tight, clock::now_us()) {
            Ok((place, pending)) => {
                let limit = self.handshake_limit();
                let arrived = Box::new(Arrived { socket, peer: remote, place, pending, limit });
                tokio::spawn(Arc::clone(self).serve(arrived));
            }
            Err(denied) => self.turn_away(socket, denied),
        }
    }

    fn metrics(&self) -> &Metrics {
        &self.sessions.broker.shared.metrics
    }

    /// Even refusing has a bound; beyond it nobody waits for the peer to read the answer.
    fn turn_away(&self, socket: std::net::TcpStream, denied: Denied) {
        self.metrics().refused(denied.why);
        if self.tls.is_some() {
            // A handshake to say so would cost more than letting him in; without one he could not read it.
            return;
        }
        let permit =
            self.sessions.admission.spare_place().or_else(|| Arc::clone(&self.refusals).try_acquire_owned().ok());
        match permit {
            Some(permit) => drop(tokio::spawn(async move {
                turned_away::tell(socket, denied).await;
                drop(permit);
            })),
            None => turned_away::tell_now(&socket, &denied),
        }
    }

    /// The whole life of a public connection. What it came with, and the HTTP phase's memory, are gone while the session
    /// lives: this future is what each connection takes for as long as it is open.
    async fn serve(self: Arc<Self>, arrived: Box<Arrived>) {
        let Some((session, mut stayed)) = Box::pin(self.open(arrived)).await else { return };
        stayed.guard.end = session.run().await;
    }

    /// Everything before the session, and the session.
    async fn open(&self, arrived: Box<Arrived>) -> Option<(Box<Session>, Box<Stayed>)> {
        let Arrived { socket, peer, place, pending, limit } = *arrived;
        // It fails where no more can be watched.
        let socket = TcpStream::from_std(socket).inspect_err(|error| {
            warn!(%error, "cannot watch a connection");
            self.metrics().accept_errors.inc();
        });
        let socket = socket.ok()?;
        let Upgraded { socket, behind, accepted } = self.handshake(socket, peer, limit).await?;
        let Accepted { mode, caller, remote, stay, .. } = accepted;
        let shares = self.shares(&caller, &stay, &place);
        // A stranger's handshake goes on until it has shown who it is.
        let pass = match (&caller, pending) {
            (Caller::Unasked(_), _) => None,
            (Caller::Known(identity), _) => Some(Pass::known(Arc::clone(identity))),
            (Caller::Stranger(_), pending) => Some(Pass::stranger(pending)),
        };
        self.tune(socket.tcp());
        let guard = self.ended.enter();
        let shared = Arc::clone(&self.sessions.broker.shared);
        let first_ping_us = clock::now_us() + first_ping(self.sessions.ping_interval);
        let connection = Connection::open(shared, socket, remote, caller, mode.format(), first_ping_us);
        if self.sessions.broker.health.is_draining() {
            // The drain began during the handshake, and may have closed everybody it knew of.
            connection.close(CloseReason::Drain);
        }
        let allowance = Allowance::new(shares);
        let session = Session::new(connection, Arc::clone(&self.sessions), (pass, allowance), &behind, mode);
        Some((session, Box::new(Stayed { guard, _stays: stay, _place: place })))
    }

    /// What a connection shares with others: of the user whose token it has shown, of its address, of this instance.
    fn shares(&self, caller: &Caller, (user, told_address): &Stays, place: &Place) -> Vec<Share> {
        let user = Some(user).filter(|_| matches!(caller, Caller::Known(_)));
        let address = told_address.as_ref().or(place.address());
        let tabs = [user.and_then(Stay::tab), address.and_then(Stay::tab)];
        let shares = tabs.into_iter().flatten().map(Share::new).chain(self.sessions.admission.share());
        let mut shares: Vec<_> = shares.collect();
        shares.shrink_to_fit();
        shares
    }

    fn handshake_limit(&self) -> Duration {
        let is_crowded = self.sessions.admission.is_crowded();
        if is_crowded { self.handshake_timeout.min(CROWDED_TIMEOUT) } else { self.handshake_timeout }
    }

    /// Everything before the session, within its time.
    async fn handshake(&self, socket: TcpStream, peer: SocketAddr, limit: Duration) -> Option<Upgraded> {
        let arrival = tokio::time::timeout(limit, self.arrive(socket, peer)).await;
        arrival.unwrap_or_else(|_| {
            self.metrics().refused(Refused::Timeout);
            None
        })
    }

    /// The proxy's header, TLS and HTTP, in this order, as far as the listener has them.
    async fn arrive(&self, mut socket: TcpStream, peer: SocketAddr) -> Option<Upgraded> {
        let peer = self.proxied(&mut socket, peer).await?;
        let Some(tls) = &self.tls else {
            let (socket, behind, accepted) = self.speak_http(socket, peer).await?;
            return Some(Upgraded { socket: Socket::plain(socket), behind, accepted });
        };
        let stream = tls.accept(socket).await.inspect_err(|error| {
            debug!(%error, %peer, "no TLS handshake");
            self.metrics().refused(Refused::Tls);
        });
        let (stream, behind, accepted) = self.speak_http(stream.ok()?, peer).await?;
        let (socket, session) = stream.into_inner();
        let (socket, behind) = Socket::tls(socket, session, behind).ok()?;
        Some(Upgraded { socket, behind, accepted })
    }

    /// Who is at the other end: with the PROXY protocol only a listed proxy may come, and says it.
    async fn proxied(&self, socket: &mut TcpStream, peer: SocketAddr) -> Option<SocketAddr> {
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        if !self.is_behind_proxy {
            return Some(peer);
        }
        let client = match self.proxies.trust(peer.ip()) {
            true => proxy_protocol::read(socket).await,
            false => Err(io::Error::other("it is no listed proxy")),
        };
        let client = client.inspect_err(|error| {
            debug!(%error, %peer, "no PROXY protocol");
            self.metrics().refused(Refused::ProxyProtocol);
        });
        Some(client.ok()?.unwrap_or(peer))
    }

    /// Speaks HTTP until the upgrade; gives the stream back, and what was read behind the request.
    async fn speak_http<S>(&self, stream: S, peer: SocketAddr) -> Option<(S, Bytes, Accepted)>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let accepted: Mutex<Option<Accepted>> = Mutex::new(None);
        let service = service_fn(|request: Request<Incoming>| {
            let answer = self.answer(request, peer, &accepted);
            async move { Ok::<_, io::Error>(answer.await) }
        });
        let connection =
            http_builder(self.handshake_timeout).serve_connection(TokioIo::new(stream), service).with_upgrades();
        match connection.await {
            Ok(()) => {}
            Err(error) if error.is_timeout() => self.metrics().refused(Refused::Timeout),
            Err(error) => {
                if unreadable(&error).is_some() {
                    self.metrics().refused(Refused::Handshake);
                }
                debug!(%error, "connection ended before the upgrade");
            }
        }
        let mut accepted = accepted.lock().take()?;
        let parts = (&mut accepted.upgrade).await.ok()?.downcast::<TokioIo<S>>().ok()?;
        Some((parts.io.into_inner(), parts.read_buf, accepted))
    }

    async fn answer(
        &self,
        mut request: Request<Incoming>,
        peer: SocketAddr,
        accepted: &Mutex<Option<Accepted>>,
    ) -> Response<Full<Bytes>> {
        if self.sessions.broker.health.is_draining() {
            self.metrics().refused(Refused::Draining);
            return ApiError::handshake(StatusCode::SERVICE_UNAVAILABLE, "draining").last_response();
        }
        // Taken first: the crate's own upgrade would hide the socket behind a trait object.
        let upgrade = hyper::upgrade::on(&mut request);
        let remote = self.proxies.client(peer, request.headers());
        match handshake::check(&mut request, self.is_echo_on, &self.origins) {
            Ok(handshake) => match self.let_in(&handshake, peer, remote).await {
                Ok((caller, stay)) => {
                    *accepted.lock() = Some(Accepted { upgrade, mode: handshake.mode, caller, remote, stay });
                    handshake.response
                }
                Err((why, error)) => {
                    self.metrics().refused(why);
                    error.last_response()
                }
            },
            Err(refusal) => {
                self.metrics().refused(refusal.why);
                *refusal.response
            }
        }
    }

    /// Who it is, as far as it says so in the handshake, and whether he may come.
    async fn let_in(
        &self,
        handshake: &Handshake,
        peer: SocketAddr,
        remote: SocketAddr,
    ) -> Result<(Caller, Stays), (Refused, ApiError)> {
        let caller = self.recognise(handshake).await?;
        let user = match &caller {
            Caller::Unasked(user) => user.as_deref(),
            Caller::Known(identity) => identity.user.as_deref(),
            Caller::Stranger(_) => None,
        };
        let stay = self.admit_guest(user, peer, remote);
        let stay = stay.map_err(|denied| (denied.why, ApiError::denied(&denied)))?;
        Ok((caller, stay))
    }

    /// Verifies the token, where one is needed and is there.
    async fn recognise(&self, handshake: &Handshake) -> Result<Caller, (Refused, ApiError)> {
        let broker = &self.sessions.broker;
        let (Some(authenticator), false) = (&broker.authenticator, handshake.mode == Mode::Echo) else {
            return Ok(Caller::Unasked(handshake.user.clone()));
        };
        let refused = |code: ErrorCode, text| (Refused::Unauthorized, code.with(text));
        if handshake.user.is_some() {
            return Err(refused(ErrorCode::BadRequest, "the user is the token's sub: leave ?user= away"));
        }
        let outcome = match (&handshake.token, &handshake.mode) {
            (Some(token), _) => authenticator.authenticate(token).await,
            // It has no other way to show one.
            (None, Mode::Raw(_)) => Err(Fault::Missing),
            (None, _) => {
                let now_ms = clock::unix_ms(clock::now_us());
                return Ok(Caller::Stranger(now_ms + self.handshake_timeout.as_millis() as u64));
            }
        };
        Authenticator::count(self.metrics(), &outcome);
        let identity = outcome.map_err(|_| refused(ErrorCode::Unauthorized, "a valid token is needed"))?;
        if let Mode::Raw(channel) = &handshake.mode {
            let who = Who { user: identity.user.as_deref(), capabilities: &identity.capabilities, grant: None };
            access::decide(&self.sessions.rules, Some(who), Action::Subscribe, channel).map_err(|forbidden| {
                self.metrics().forbidden(Action::Subscribe);
                (Refused::Forbidden, Refusal::from(forbidden).into())
            })?;
        }
        Ok(Caller::Known(Arc::new(identity)))
    }

    /// The address that a connection counts for at once; a proxy's clients count for theirs once it is told.
    fn own_address(&self, peer: SocketAddr) -> Option<IpAddr> {
        (!self.proxies.trust(peer.ip())).then(|| peer.ip())
    }

    fn admit_guest(&self, user: Option<&str>, peer: SocketAddr, remote: SocketAddr) -> Result<Stays, Denied> {
        let now_us = clock::now_us();
        let is_told = self.is_behind_proxy || self.proxies.trust(peer.ip());
        let address = is_told.then(|| self.sessions.admission.admit_address(remote.ip(), now_us)).transpose()?;
        Ok((self.sessions.admission.admit_user(user, now_us)?, address))
    }

    /// Options that keep the kernel from hiding a stalled client. A socket that refuses them is about to fail anyway.
    fn tune(&self, socket: &TcpStream) {
        let socket = SockRef::from(socket);
        let _ = socket.set_tcp_notsent_lowat(NOTSENT_BYTES);
        let _ = socket.set_tcp_user_timeout(Some(self.write_timeout));
    }
}

/// The first ping after a random half to whole interval (µs), so that a reconnect storm is no ping storm.
fn first_ping(interval: Duration) -> u64 {
    micros(interval.mul_f64(rand::random_range(0.5..1.0)))
}
