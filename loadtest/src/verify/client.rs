//! A client: subscribes, comes back whenever it has to, resumes, and writes down everything it is told.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::bail;
use futures_util::{SinkExt as _, StreamExt as _};
use rand::RngExt as _;
use rand::rngs::StdRng;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async_with_config};

use super::comeback::Comeback;
use super::evidence::{Log, Mark, What};
use super::message;
use super::stage::{Phase, Stage, count};
use super::told::{self, Frame};

/// How long connecting, and any single write, may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Pings in the time after which a silent connection is dead.
const PINGS: u32 = 5;

/// After a subscribe that could not be carried out, unless the server says when to try again.
const RETRY: Duration = Duration::from_millis(500);

/// Who leaves on purpose stays away for less than this.
const AWAY_MAX: Duration = Duration::from_secs(1);

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

pub(crate) struct Client {
    stage: Arc<Stage>,
    random: StdRng,
    /// How long it stays on average before it leaves on purpose; none: it never does.
    stay: Option<Duration>,
    /// A connection on which nothing at all came for so long is dead.
    silence: Duration,
    slots: Vec<Slot>,
    by_name: HashMap<String, usize>,
    comeback: Comeback,
    /// It has been connected before.
    was_welcome: bool,
    /// When to subscribe again to what is off.
    retry: Option<Instant>,
}

/// One channel of a client.
struct Slot {
    channel: usize,
    state: State,
    /// The last position that the server told.
    cursor: Option<String>,
    /// What was asked for.
    after: Mark,
    log: Log,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Off,
    Asked,
    Live,
}

/// How a connection ended.
struct End {
    why: String,
    code: Option<u16>,
    is_on_purpose: bool,
}

impl End {
    fn lost(why: impl Into<String>) -> Self {
        Self { why: why.into(), code: None, is_on_purpose: false }
    }

    fn left(why: &str) -> Self {
        Self { why: why.to_owned(), code: None, is_on_purpose: true }
    }
}

impl Client {
    pub(crate) fn new(
        stage: Arc<Stage>,
        channels: &[usize],
        stay: Option<Duration>,
        silence: Duration,
        random: StdRng,
    ) -> Self {
        let slot = |channel: &usize| Slot {
            channel: *channel,
            state: State::Off,
            cursor: None,
            after: Mark::NONE,
            log: Log::default(),
        };
        let by_name = channels.iter().enumerate().map(|(at, channel)| (stage.channels[*channel].clone(), at)).collect();
        let (slots, comeback) = (channels.iter().map(slot).collect(), Comeback::default());
        Self { stage, random, stay, silence, slots, by_name, comeback, was_welcome: false, retry: None }
    }

    /// Watches until the run is over. Returns what was seen, by channel.
    pub(crate) async fn run(mut self) -> Vec<(usize, Log)> {
        while self.stage.phase() < Phase::Over {
            let end = match self.connect().await {
                Ok(mut socket) => self.talk(&mut socket).await,
                Err(error) => {
                    count(&self.stage.tally.failed);
                    End::lost(format!("{error:#}"))
                }
            };
            if self.stage.phase() == Phase::Over {
                break;
            }
            let delay = self.ended(&end);
            // Whoever waits for long comes back when the run settles.
            let until = if self.stage.phase() < Phase::Settle { Phase::Settle } else { Phase::Over };
            self.stage.pause(delay, until).await;
        }
        self.slots.into_iter().map(|slot| (slot.channel, slot.log)).collect()
    }

    async fn connect(&mut self) -> anyhow::Result<Socket> {
        let url = &self.stage.urls[self.random.random_range(0..self.stage.urls.len())];
        let mut request = url.as_str().into_client_request()?;
        request.headers_mut().insert("sec-websocket-protocol", HeaderValue::from_static("hubcast.v1"));
        match timeout(PATIENCE, connect_async_with_config(request, None, true)).await {
            Ok(Ok((socket, _))) => Ok(socket),
            Ok(Err(tungstenite::Error::Http(response))) => {
                let status = response.status();
                if status.is_client_error() && !self.was_welcome {
                    self.stage.give_up(format!("{url} refuses clients: {status}"));
                }
                bail!("refused with {status}");
            }
            Ok(Err(error)) => Err(error.into()),
            Err(_) => bail!("no connection in time"),
        }
    }

    /// Writes down that a connection is over. Returns how long to stay away.
    fn ended(&mut self, end: &End) -> Duration {
        self.retry = None;
        for at in 0..self.slots.len() {
            self.set_off(at, &end.why);
        }
        if end.is_on_purpose {
            count(&self.stage.tally.left);
            self.comeback = Comeback::default();
            return AWAY_MAX.mul_f64(self.random.random());
        }
        count(&self.stage.tally.ended);
        if let Some(code @ (3000 | 3003)) = end.code {
            self.stage.give_up(format!("a client was turned away: {code} {}", end.why));
        }
        self.comeback.delay(end.code, &mut self.random)
    }

    fn set_off(&mut self, at: usize, why: &str) {
        let slot = &mut self.slots[at];
        if std::mem::replace(&mut slot.state, State::Off) == State::Live {
            slot.log.tell(self.stage.now_us(), What::Ended(why.to_owned()));
            self.stage.tally.live.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Serves one connection to its end.
    async fn talk(&mut self, socket: &mut Socket) -> End {
        let mut phase = self.stage.watch();
        let mut leave = self.leave_at(*phase.borrow_and_update());
        let mut go = None;
        let mut ping = Instant::now() + self.silence / PINGS;
        let mut heard = Instant::now();
        loop {
            tokio::select! {
                _ = phase.changed() => {
                    let now = *phase.borrow_and_update();
                    leave = self.leave_at(now);
                    if now == Phase::Over {
                        // All is written down; whether the goodbye arrives does not matter.
                        let _ = timeout(PATIENCE, socket.close(None)).await;
                        return End::left("over");
                    }
                }
                () = at(leave) => return self.leave(socket).await,
                () = at(go) => return End::left("drained"),
                () = at(self.retry) => {
                    self.retry = None;
                    if let Err(end) = self.subscribe(socket).await {
                        return end;
                    }
                }
                () = sleep_until(ping) => {
                    if heard.elapsed() > self.silence {
                        return End::lost("nothing came any more");
                    }
                    ping = Instant::now() + self.silence / PINGS;
                    if let Err(end) = send(socket, r#"{"type":"ping"}"#.to_owned()).await {
                        return end;
                    }
                }
                frame = socket.next() => {
                    heard = Instant::now();
                    let text = match frame {
                        Some(Ok(Message::Text(text))) => text,
                        Some(Ok(Message::Close(close))) => return closed(close, socket).await,
                        Some(Ok(_)) => continue,
                        Some(Err(error)) => return End::lost(error.to_string()),
                        None => return End::lost("cut off"),
                    };
                    match self.hear(&text, &mut go) {
                        Ok(true) => {}
                        Ok(false) => if let Err(end) = self.subscribe(socket).await {
                            return end;
                        },
                        Err(why) => {
                            self.stage.give_up(why);
                            return End::left("gave up");
                        }
                    }
                }
            }
        }
    }

    /// When to leave a connection on purpose.
    fn leave_at(&mut self, phase: Phase) -> Option<Instant> {
        let stay = self.stay.filter(|_| phase == Phase::Publish)?;
        Some(Instant::now() + stay.mul_f64(self.random.random_range(0.0..2.0)))
    }

    /// Half of those who leave say so, the others are just gone.
    async fn leave(&mut self, socket: &mut Socket) -> End {
        if self.random.random() {
            // Nothing is read any more: what is under way must come again on the next connection.
            let _ = timeout(PATIENCE, socket.close(None)).await;
        }
        End::left("left on purpose")
    }

    /// Asks for every channel that is off, after its cursor.
    async fn subscribe(&mut self, socket: &mut Socket) -> Result<(), End> {
        let off: Vec<_> = (0..self.slots.len()).filter(|at| self.slots[*at].state == State::Off).collect();
        for some in off.chunks(told::NAMES_MAX) {
            let channels: Vec<_> = some
                .iter()
                .map(|at| (self.stage.channels[self.slots[*at].channel].as_str(), self.slots[*at].cursor.as_deref()))
                .collect();
            let command = told::subscribe(&channels);
            for at in some {
                let slot = &mut self.slots[*at];
                slot.state = State::Asked;
                slot.after = Mark::of(slot.cursor.as_deref());
            }
            send(socket, command).await?;
        }
        Ok(())
    }

    /// Takes a frame. False: now is the time to subscribe. An error: the run makes no sense.
    fn hear(&mut self, text: &str, go: &mut Option<Instant>) -> Result<bool, String> {
        let frame: Frame<'_> = serde_json::from_str(text).map_err(|error| format!("{error} in {text}"))?;
        let at = frame.channel.as_ref().and_then(|channel| self.by_name.get(channel.as_ref())).copied();
        match (frame.kind.as_ref(), at) {
            ("event", Some(at)) => self.event(at, &frame),
            ("subscribed", Some(at)) => {
                self.comeback.succeeded();
                let slot = &mut self.slots[at];
                let (cursor, recovered) = (Mark::of(frame.cursor.as_deref()), frame.recovered);
                slot.log.tell(self.stage.now_us(), What::Subscribed { after: slot.after, cursor, recovered });
                slot.cursor = frame.cursor.map(Into::into);
                if std::mem::replace(&mut slot.state, State::Live) != State::Live {
                    self.stage.tally.live.fetch_add(1, Ordering::Relaxed);
                }
            }
            ("gap", Some(at)) => {
                let (after, next) = (Mark::of(frame.after.as_deref()), Mark::of(frame.next.as_deref()));
                let reason = frame.reason.unwrap_or_default().into_owned();
                self.slots[at].log.tell(self.stage.now_us(), What::Gap { after, next, reason });
            }
            ("unsubscribed", Some(at)) => {
                self.set_off(at, frame.reason.as_deref().unwrap_or("unsubscribed"));
                self.retry = Some(Instant::now() + RETRY);
            }
            ("error", at) => return self.refused(at, &frame, text).map(|()| true),
            ("draining", _) => {
                let retry_after = Duration::from_millis(frame.retry_after_ms.unwrap_or(0));
                *go = Some(self.comeback.draining(retry_after, &mut self.random));
            }
            ("welcome", _) => {
                self.was_welcome = true;
                return Ok(false);
            }
            _ => {}
        }
        Ok(true)
    }

    fn event(&mut self, at: usize, frame: &Frame<'_>) {
        count(&self.stage.tally.deliveries);
        let slot = &mut self.slots[at];
        let data = frame.data.map_or("", |data| data.get());
        let cursor = Mark::of(frame.cursor.as_deref());
        match message::identify(data, self.stage.run, slot.channel, self.stage.size) {
            Ok(id) => slot.log.event(id, cursor),
            Err(what) => slot.log.tell(self.stage.now_us(), What::Foreign(what)),
        }
        if let Some(cursor) = &frame.cursor {
            let kept = slot.cursor.get_or_insert_default();
            kept.clear();
            kept.push_str(cursor);
        }
    }

    /// A subscribe that may succeed later is tried again.
    fn refused(&mut self, at: Option<usize>, frame: &Frame<'_>, text: &str) -> Result<(), String> {
        let is_passing = matches!(frame.code.as_deref(), Some("unavailable" | "rate_limited"));
        let Some(at) = at.filter(|_| is_passing) else {
            return Err(format!("a subscribe was refused: {}", frame.message.as_deref().unwrap_or(text)));
        };
        self.set_off(at, text);
        let pause = frame.retry_after_ms.map_or(RETRY, Duration::from_millis);
        self.retry = Some(Instant::now() + pause);
        Ok(())
    }
}

async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

async fn send(socket: &mut Socket, text: String) -> Result<(), End> {
    match timeout(PATIENCE, socket.send(Message::text(text))).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(End::lost(error.to_string())),
        Err(_) => Err(End::lost("a write took too long")),
    }
}

/// The server closes: it is answered, and given the time to hear that.
async fn closed(close: Option<CloseFrame>, socket: &mut Socket) -> End {
    let _ = timeout(PATIENCE, async { while let Some(Ok(_)) = socket.next().await {} }).await;
    match close {
        Some(frame) => {
            let code = u16::from(frame.code);
            End { why: format!("{code} {}", frame.reason), code: Some(code), is_on_purpose: false }
        }
        None => End::lost("closed without a code"),
    }
}
