//! What keeps channels with history continuous asks of Redis: reads of stream and position, and break markers.
//!
//! One task for all channels. Few requests are under way at once, and those that somebody waits for go first: a Redis
//! that comes back with 50,000 channels is asked for one after another, by every instance.

use std::sync::Arc;
use std::time::Duration;

use redis::RedisResult;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{info, warn};

use crate::broker::Broker;
use crate::cursor::Cursor;
use crate::fanout::Fanout;
use crate::following::{Following, Request, What};
use crate::history_redis::Place;
use crate::history_store::{Loss, Marked, Window};
use crate::hub::Histories;
use crate::replication::{self, Replication};
use crate::servers::Servers;

/// Requests under way: enough that a link is never idle, few enough that no other command waits for long.
const REQUESTS_MAX: usize = 64;

/// The pause after a request that failed, at random up to twice as long.
const PAUSE: Duration = Duration::from_millis(500);

/// How often all channels are looked through for those of which nothing is heard.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// What the task needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `HUBCAST_REDIS_KEY_PREFIX`
    pub key_prefix: Arc<str>,
    /// A position of which nothing was heard for so long is checked.
    pub check_interval: Duration,
}

/// What a request came to.
enum Done {
    Read(Option<Window>),
    Marked(Option<Marked>),
    Fenced,
    Paused,
}

/// Carries out requests until the runtime ends.
pub async fn run(broker: Arc<Broker>, servers: Arc<Servers>, settings: Settings) {
    let Histories::Redis(followings) = broker.hub.histories() else { return };
    let (mut requests, mut waits) = (JoinSet::new(), JoinSet::new());
    let mut look_at = Instant::now() + LOOK_INTERVAL;
    let mut links = servers.command_links();
    let mut made = servers.links_made();
    let mut replication = JoinSet::new();
    replication.spawn(Replication::new(Arc::clone(&servers)).changed());
    loop {
        while requests.len() < REQUESTS_MAX
            && let Some(Request { following, what }) = followings.requests().pop()
        {
            match what {
                What::Pause => waits.spawn(pause(following)),
                What::Fence => waits.spawn(fence(Arc::clone(&servers), following)),
                What::Read(unless) => {
                    broker.shared.metrics.history_reads.inc();
                    requests.spawn(read(Arc::clone(&servers), settings.clone(), following, unless))
                }
                What::Mark(loss) => requests.spawn(mark(Arc::clone(&servers), settings.clone(), following, loss)),
            };
        }
        let mut fanout = Fanout::default();
        tokio::select! {
            Some(Ok((following, done))) = requests.join_next() => answered(&broker, &following, done, &mut fanout),
            Some(Ok((following, done))) = waits.join_next() => answered(&broker, &following, done, &mut fanout),
            () = followings.requests().listed(), if requests.len() < REQUESTS_MAX => {}
            Some(Ok((known, changed))) = replication.join_next() => {
                followings.check_where(|name| changed.contains(&servers.topology.server_of(name)));
                replication.spawn(async { sleep(replication::INTERVAL).await; known.changed().await });
            }
            () = servers.command_links_changed(links) => {
                links = servers.command_links();
                let known = std::mem::replace(&mut made, servers.links_made());
                // Behind a new link may be a Redis that has lost something.
                followings.check_where(|name| {
                    let server = servers.topology.server_of(name);
                    known[server] != made[server]
                });
            }
            () = sleep_until(look_at) => {
                look_at = Instant::now() + LOOK_INTERVAL;
                followings.look_through(settings.check_interval);
            }
        }
        broker.deliver(&mut fanout);
        broker.flush(&mut fanout).await;
    }
}

async fn pause(following: Arc<Following>) -> (Arc<Following>, Done) {
    sleep(PAUSE.mul_f64(rand::random_range(1.0..2.0))).await;
    (following, Done::Paused)
}

async fn fence(servers: Arc<Servers>, following: Arc<Following>) -> (Arc<Following>, Done) {
    servers.fence(servers.topology.server_of(&following.name)).pass().await;
    (following, Done::Fenced)
}

async fn read(
    servers: Arc<Servers>,
    settings: Settings,
    following: Arc<Following>,
    unless: Option<Cursor>,
) -> (Arc<Following>, Done) {
    let place = Place::new(&settings.key_prefix, &following.name, &servers.topology);
    let window = match servers.commands(&following.name) {
        None => None,
        Some(mut link) => tell(&following, place.read(&mut link, unless, &following.retention, rand::random()).await),
    };
    (following, Done::Read(window))
}

async fn mark(
    servers: Arc<Servers>,
    settings: Settings,
    following: Arc<Following>,
    loss: Loss,
) -> (Arc<Following>, Done) {
    let place = Place::new(&settings.key_prefix, &following.name, &servers.topology);
    let marked = match servers.commands(&following.name) {
        None => None,
        Some(mut link) => tell(&following, place.mark(&mut link, &loss, &following.retention, rand::random()).await),
    };
    (following, Done::Marked(marked))
}

fn tell<T>(following: &Following, answer: RedisResult<T>) -> Option<T> {
    answer.inspect_err(|error| info!(%error, channel = &*following.name, "history cannot be read, trying again")).ok()
}

/// Acts on an answer; what it sets in motion is in `fanout`.
fn answered(
    broker: &Broker,
    following: &Arc<Following>,
    done: Done,
    fanout: &mut Fanout<Arc<crate::connection::Connection>>,
) {
    if let Done::Marked(Some(Marked::Written(marker))) = done {
        broker.shared.metrics.history_breaks.inc();
        warn!(channel = &*following.name, %marker, "redis lost what it had acknowledged, the subscribers are told");
    }
    let channel = broker.hub.channel(&following.name);
    following.with(channel.as_ref(), fanout, |follow, out, _| match done {
        Done::Read(window) => follow.read_answered(window.as_ref(), out),
        Done::Marked(marked) => follow.marked(marked, out),
        Done::Fenced => follow.fenced(out),
        Done::Paused => follow.resume(out),
    });
    if let Some(channel) = channel {
        broker.hub.hurry(&channel, fanout);
    }
}
